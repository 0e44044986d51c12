from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from rgft.telemetry import environment as module
from rgft.telemetry.environment import environment, git


def run_git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_what_is_recorded(tmp_path: Path) -> None:
    found = environment(tmp_path)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["rgft"] == metadata.version("rgft")
    assert found["torch"]["threads"] == torch.get_num_threads()
    assert 1 <= found["cpu"]["usable_cores"] <= found["cpu"]["cores"]
    assert found["cpu"]["model"]
    assert found["memory"]["bytes"] > 1 << 28
    assert len(found["accelerators"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_packages_that_are_missing_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGES", ("torch", "no-such-package-of-this-name"))
    assert list(module.package_versions()) == ["torch"]


def test_no_package_is_imported_for_its_version() -> None:
    code = (
        "import sys; before = set(sys.modules); from rgft.telemetry.environment import environment; environment(); "
        "print(sorted({'transformers', 'peft', 'datasets', 'trl', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_variables_that_may_hold_secrets_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = environment()
    assert found["variables"]["OMP_NUM_THREADS"] == "3"
    assert "hf_secret" not in json.dumps(found)


def test_commit_and_changes(tmp_path: Path) -> None:
    run_git(tmp_path, "init", "-q")
    assert git(tmp_path) is None, "a repository without a commit has none to name"
    (tmp_path / "a.py").write_text("1")
    run_git(tmp_path, "add", "a.py")
    run_git(tmp_path, "commit", "-qm", "first")
    commit = run_git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("")
    assert git(tmp_path) == {"commit": commit, "changed": False}
    below = tmp_path / "below"
    below.mkdir()
    (tmp_path / "a.py").write_text("2")
    assert git(below) == {"commit": commit, "changed": True}


def test_outside_of_a_repository_and_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git(tmp_path) is None
    assert git(tmp_path / "missing") is None
    monkeypatch.setenv("PATH", os.devnull)
    assert git() is None


def test_a_container_without_a_limit_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = module.memory_bytes()
    assert machine is not None
    for text, expected in (("max\n", None), (f"{machine * 2}\n", None), (f"{machine // 2}\n", machine // 2)):
        monkeypatch.setattr(Path, "read_text", lambda self, text=text: text)
        assert module.memory_limit_bytes() == expected

from __future__ import annotations

import errno
import math
import os
import resource
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from rgft.cli.failures import exit_code
from rgft.errors import RunFolderError
from rgft.telemetry import atomic_write
from rgft.telemetry.atomic_write import write_bytes
from rgft.telemetry.run_folder import CHECKPOINT, CONFIG, LEDGER, PLANS, RECORDS, RunFolder
from tests.unit.telemetry.faults import die, die_after_writing, fill_disk_after, in_child


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run folder with a run in it."""
    folder = RunFolder.create(tmp_path / "run")
    folder.write_json(CONFIG, {"seed": 0})
    return folder


def content(path: Path) -> dict[str, bytes]:
    return {str(item.relative_to(path)): item.read_bytes() for item in sorted(path.rglob("*")) if item.is_file()}


# -------------------------------------------------------------------- making and taking


def test_a_new_or_empty_folder_is_taken(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path / "deep" / "run").path.is_dir()
    assert RunFolder.create(tmp_path / "deep" / "run", overwrite=True).path.is_dir()


def test_a_run_is_refused_without_a_flag_and_left_as_it_was(folder: RunFolder) -> None:
    before = content(folder.path)
    with pytest.raises(RunFolderError, match=r"found config\.json.*--resume.*--overwrite"):
        RunFolder.create(folder.path)
    with pytest.raises(RunFolderError, match="found both"):
        RunFolder.create(folder.path, resume=True, overwrite=True)
    assert content(folder.path) == before


def test_resume_keeps_everything(folder: RunFolder) -> None:
    folder.save_checkpoint({"step": 3})
    before = content(folder.path)
    assert RunFolder.create(folder.path, resume=True).load_checkpoint() == {"step": 3}
    assert content(folder.path) == before


def test_overwrite_removes_the_run_and_nothing_else(folder: RunFolder) -> None:
    folder.save_checkpoint({"step": 3})
    folder.records.append("step", {"step": 1})
    folder.model.mkdir()
    (folder.model / "weights").write_text("old")
    (folder.path / "notes.txt").write_text("mine")
    RunFolder.create(folder.path, overwrite=True)
    assert content(folder.path) == {"notes.txt": b"mine"}


def test_overwrite_never_touches_a_folder_without_a_run(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="holds none"):
        RunFolder.create(tmp_path, overwrite=True)
    assert content(tmp_path) == {"model/thesis.tex": b"years of work"}


def test_overwrite_does_not_follow_links(folder: RunFolder, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "weights").write_text("other run")
    folder.model.symlink_to(elsewhere)
    RunFolder.create(folder.path, overwrite=True)
    assert content(elsewhere) == {"weights": b"other run"}
    assert not folder.model.exists()


def test_nothing_to_resume(tmp_path: Path, folder: RunFolder) -> None:
    with pytest.raises(RunFolderError, match="nothing to resume"):
        RunFolder.create(tmp_path / "new", resume=True)
    assert not folder.has_checkpoint
    with pytest.raises(RunFolderError, match="before its first checkpoint"):
        folder.load_checkpoint()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunFolderError, match="found a file"):
        RunFolder.create(tmp_path / "run")
    with pytest.raises(RunFolderError, match=r"that can be written, found a file, .*; choose another") as caught:
        RunFolder.create(tmp_path / "run" / "below")
    assert exit_code(caught.value) == 2
    with pytest.raises(RunFolderError, match="could not be written") as caught:
        write_bytes(tmp_path / "none" / "x", b"")
    assert exit_code(caught.value) == 1


@pytest.mark.parametrize(("number", "code"), [(errno.EACCES, 2), (errno.EROFS, 2), (errno.ENOSPC, 1), (errno.EIO, 1)])
def test_a_folder_that_may_not_be_written_is_a_wrong_one_and_a_full_disk_is_not(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(RunFolderError) as caught:
            RunFolder.create(tmp_path / "run").write_json(LEDGER, {})
    assert exit_code(caught.value) == code
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RunFolderError) as caught:
        RunFolder.create(tmp_path / "other")
    assert exit_code(caught.value) == (1 if number == errno.ENOSPC else 2)


def test_open_takes_runs_only(tmp_path: Path, folder: RunFolder) -> None:
    assert RunFolder.open(folder.path).read_json(CONFIG) == {"seed": 0}
    with pytest.raises(RunFolderError, match="found none"):
        RunFolder.open(tmp_path)


# -------------------------------------------------------------------- files


def test_json_comes_back(folder: RunFolder) -> None:
    folder.write_json(LEDGER, {"a": [1, (2.5, None)], "b": math.inf, "ε": "ü"})
    assert folder.read_json(LEDGER) == {"a": [1, [2.5, None]], "b": math.inf, "ε": "ü"}
    with pytest.raises(TypeError, match=r"ledger\.json\.x"):
        folder.write_json(LEDGER, {"x": object()})
    assert folder.read_json(LEDGER)["b"] == math.inf


def test_unreadable_json(folder: RunFolder) -> None:
    with pytest.raises(RunFolderError, match="could not be read"):
        folder.read_json(LEDGER)
    folder.write_bytes(LEDGER, b"{")
    with pytest.raises(RunFolderError, match="expected JSON"):
        folder.read_json(LEDGER)


def test_records_and_plans_are_opened_when_used_and_again_after_close(folder: RunFolder) -> None:
    assert not (folder.path / RECORDS).exists()
    with folder:
        folder.records.append("step", {"step": 1})
        folder.plans.append("plan", {"step": 1, "multipliers": {"a": 1.0}})
    folder.records.append("step", {"step": 2})
    folder.close()
    assert [record.step for record in folder.read_records()] == [1, 2]
    assert folder.read_plans()[0].data["multipliers"] == {"a": 1.0}
    assert (folder.path / PLANS).exists()


@pytest.mark.parametrize("count", [0, 7])
def test_a_full_disk_leaves_the_old_file(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    before = content(folder.path)
    fill_disk_after(monkeypatch, count)
    with pytest.raises(RunFolderError, match=r"config\.json: the disk is full"):
        folder.write_json(CONFIG, {"seed": 1})
    monkeypatch.undo()
    assert content(folder.path) == before


def test_a_disk_that_is_full_only_when_synced(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(folder.path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError, match="disk is full"):
        folder.write_json(CONFIG, {"seed": 1})
    monkeypatch.undo()
    assert content(folder.path) == before


@pytest.mark.parametrize("moment", ["write", "replace"])
def test_killed_while_writing_a_file(folder: RunFolder, moment: str) -> None:
    def work() -> None:
        if moment == "write":
            die_after_writing(5)
        else:
            os.replace = lambda source, target: die()
        folder.write_json(CONFIG, {"seed": 1})

    assert in_child(work) == -9
    assert folder.read_json(CONFIG) == {"seed": 0}


# -------------------------------------------------------------------- checkpoints


def state(value: float) -> dict[str, Any]:
    weight = torch.full((300, 100), value)
    return {
        "model": OrderedDict(weight=weight, view=weight[10:20]), "step": 3, "loss": 0.1, "rng": torch.get_rng_state(),
        "nested": {1: [None, (True, "text", b"bytes")], ("a", 2): torch.float32},
        "parameter": torch.nn.Parameter(weight),
    }  # fmt: skip


def test_checkpoints_come_back_bit_for_bit(folder: RunFolder) -> None:
    saved = state(0.1)
    folder.save_checkpoint(saved)
    loaded = folder.load_checkpoint()
    assert torch.equal(loaded["model"]["weight"], saved["model"]["weight"])
    assert torch.equal(loaded["model"]["view"], saved["model"]["view"])
    assert torch.equal(loaded["rng"], saved["rng"])
    assert loaded["nested"] == saved["nested"]
    assert list(content(folder.path / CHECKPOINT)) == ["state.pt"]


def test_optimizer_and_scheduler_states_can_be_saved(folder: RunFolder) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    folder.save_checkpoint({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})
    loaded = folder.load_checkpoint()
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    scheduler.load_state_dict(loaded["scheduler"])


def test_what_could_not_be_read_back_is_refused_before_writing(folder: RunFolder) -> None:
    folder.save_checkpoint({"step": 1})

    class Text(str):
        pass

    with pytest.raises(TypeError) as caught:
        folder.save_checkpoint({"a": [object()], "b": {"c": Text("x")}, "d": frozenset({1}), frozenset(): 1})
    for part in ("object at state.a[0]", "Text at state.b.c", "frozenset at state.d", "the key frozenset() of state"):
        assert part in str(caught.value)
    assert folder.load_checkpoint() == {"step": 1}


@pytest.mark.parametrize("moment", ["first byte", "middle", "before the rename", "after the rename"])
def test_killed_while_saving_a_checkpoint(folder: RunFolder, moment: str) -> None:
    folder.save_checkpoint(state(1.0))

    def work() -> None:
        if moment == "before the rename":
            os.replace = lambda source, target: die()
        elif moment == "after the rename":
            atomic_write.sync_folder = lambda path: die()
        else:
            die_after_writing(1 if moment == "first byte" else 50_000)
        folder.save_checkpoint(state(2.0))

    assert in_child(work) == -9
    expected = 2.0 if moment == "after the rename" else 1.0
    assert torch.equal(folder.load_checkpoint()["model"]["weight"], torch.full((300, 100), expected))
    folder.save_checkpoint(state(3.0))  # what the killed process left behind is in nobody's way
    assert folder.load_checkpoint()["model"]["weight"][0, 0] == 3.0
    RunFolder.create(folder.path, resume=True)
    assert set(content(folder.path)) == {CONFIG, f"{CHECKPOINT}/state.pt"}


@pytest.mark.parametrize("count", [0, 50_000, 120_500])
def test_a_full_disk_leaves_the_old_checkpoint(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    folder.save_checkpoint(state(1.0))
    before = content(folder.path)
    fill_disk_after(monkeypatch, count)
    with pytest.raises(RunFolderError, match="disk is full") as caught:
        folder.save_checkpoint(state(2.0))
    assert caught.value.errno == 28
    monkeypatch.undo()
    assert content(folder.path) == before


def test_a_real_limit_of_the_system_leaves_the_old_checkpoint(folder: RunFolder) -> None:
    folder.save_checkpoint(state(1.0))
    before = content(folder.path)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        with pytest.raises(RunFolderError, match="could not be written: File too large"):
            folder.save_checkpoint(state(2.0))

    assert in_child(work) == 0
    assert content(folder.path) == before


def test_an_error_in_the_middle_leaves_the_old_checkpoint(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.save_checkpoint({"step": 1})
    before = content(folder.path)

    def interrupted(state: Any, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folder.save_checkpoint({"step": 2})
    assert content(folder.path) == before


@pytest.mark.parametrize("damage", [b"", b"no zip", None])
def test_a_damaged_checkpoint_is_named(folder: RunFolder, damage: bytes | None) -> None:
    folder.save_checkpoint(state(1.0))
    path = folder.path / CHECKPOINT / "state.pt"
    path.write_bytes(path.read_bytes()[:60_000] if damage is None else damage)
    with pytest.raises(RunFolderError, match=r"state\.pt: the checkpoint could not be read"):
        folder.load_checkpoint()


class TestModelFolder:
    def test_it_takes_its_place_when_complete(self, tmp_path: Path) -> None:
        folder = RunFolder.create(tmp_path / "run")
        for text in ("first", "second"):
            folder.save_model(lambda path, text=text: (path / "weights").write_text(text))
            assert (folder.model / "weights").read_text() == text
        assert [path.name for path in folder.path.iterdir()] == ["model"]

    def test_an_error_leaves_the_old_one_and_nothing_beside_it(self, tmp_path: Path) -> None:
        folder = RunFolder.create(tmp_path / "run")
        folder.save_model(lambda path: (path / "weights").write_text("old"))

        def save(path: Path) -> None:
            (path / "weights").write_text("half")
            raise ValueError("of the model's own")

        with pytest.raises(ValueError, match="of the model's own"):
            folder.save_model(save)
        assert (folder.model / "weights").read_text() == "old"
        assert [path.name for path in folder.path.iterdir()] == ["model"]

    def test_what_a_killed_process_was_writing_is_removed_on_resume(self, tmp_path: Path) -> None:
        folder = RunFolder.create(tmp_path / "run")
        folder.write_json("config.json", {})

        def save(path: Path) -> None:
            (path / "weights").write_text("half")
            die()

        assert in_child(lambda: folder.save_model(save) and None) == -9
        assert len(list(folder.path.iterdir())) == 2
        RunFolder.create(tmp_path / "run", resume=True)
        assert [path.name for path in folder.path.iterdir()] == ["config.json"]


def test_checking_touches_nothing(tmp_path: Path) -> None:
    assert RunFolder.check(tmp_path / "run") == []
    assert not (tmp_path / "run").exists()
    RunFolder.create(tmp_path / "run").write_json("config.json", {})
    with pytest.raises(RunFolderError, match="--resume"):
        RunFolder.check(tmp_path / "run")
    assert RunFolder.check(tmp_path / "run", overwrite=True) == ["config.json"]
    assert (tmp_path / "run" / "config.json").exists()

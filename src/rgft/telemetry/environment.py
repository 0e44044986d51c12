"""The environment of a run: versions, machine, accelerator, threads, the commit it was started from."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

#: Packages whose version may change a result. Read from their metadata: importing them would take seconds.
PACKAGES = (
    "rgft", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers", "safetensors",
    "bitsandbytes", "torchao", "numpy", "pydantic",
)  # fmt: skip

#: Environment variables that change speed or behaviour. Nothing else is recorded: others may hold secrets.
VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF", "WORLD_SIZE", "HF_HUB_OFFLINE",
)  # fmt: skip


def environment(folder: Path | str | None = None) -> dict[str, Any]:
    """All of it, fit for JSON. What the machine does not tell is None.

    Args:
        folder: where to look for a git repository; None is the working folder.
    """
    return {
        "python": platform.python_version(),
        "packages": package_versions(),
        "platform": platform.platform(),
        "cpu": cpu(),
        "memory": {"bytes": memory_bytes(), "limit_bytes": memory_limit_bytes()},
        "accelerators": accelerators(),
        "torch": {
            "threads": torch.get_num_threads(), "interop_threads": torch.get_num_interop_threads(),
            "cuda": torch.version.cuda, "deterministic": torch.are_deterministic_algorithms_enabled(),
            "matmul_precision": torch.get_float32_matmul_precision(),
        },
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "git": git(folder),
    }  # fmt: skip


def package_versions() -> dict[str, str]:
    """Installed packages of `PACKAGES` → version."""
    versions: dict[str, str] = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def cpu() -> dict[str, Any]:
    """Model, cores of the machine, and cores this process may use."""
    return {
        "model": _cpu_model(), "machine": platform.machine(), "cores": os.cpu_count(), "usable_cores": usable_cores(),
    }  # fmt: skip


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str | None:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() in ("model name", "cpu model"):
                return value.strip()
    return platform.processor() or None


def memory_bytes() -> int | None:
    """Physical memory of the machine."""
    with suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def memory_limit_bytes() -> int | None:
    """What a container allows this process; None without a limit below the machine's memory."""
    machine = memory_bytes()
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            limit = int(Path(path).read_text())
            return limit if machine is None or limit < machine else None
    return None


def accelerators() -> list[dict[str, Any]]:
    """Devices that torch can use, beside the CPU."""
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    if kind is None or kind.type != "cuda":
        return [{"type": str(kind), "count": torch.accelerator.device_count()}]
    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "type": "cuda",
                "name": properties.name,
                "bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return found


def git(folder: Path | str | None = None) -> dict[str, Any] | None:
    """Commit of the repository around `folder`, and whether tracked files differ from it; None outside of one."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": None if changes is None else bool(changes)}


def _git(folder: Path | str | None, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

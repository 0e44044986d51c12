"""Running code that a model wrote: one process for each program, limited, alone, and killed when its time is up.

What holds it: limits of the system on CPU time, address space, size and number of files, and no second process; a
session of its own, killed as a group; an empty folder, an empty environment, `python -I -S -B`; as root, the rights of
nobody and no network; without root, no network where the system has user namespaces; and an audit hook that refuses
files elsewhere, signals, sockets and foreign functions. It is meant for code that is wrong, wild or a cheat by
accident. It is no wall against an attacker: run such code on a machine that may be lost.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rgft.errors import RGFTError

log = logging.getLogger("rgft")

CHILD = Path(__file__).with_name("limited_child.py")

#: Bytes of the one line that a child says; whoever says more is killed.
LINE_BYTES = 4096

_network_is_noted = threading.Event()


@dataclass(frozen=True, kw_only=True)
class Program:
    """Code, and what it has to pass.

    Attributes:
        code: what is tested.
        test: code that runs after it, with its names, and raises an error if it is wrong.
    """

    code: str
    test: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a program.

    Attributes:
        passed: whether the test ran to its end.
        reason: "passed"; else the error's class, or how the process ended.
    """

    passed: bool
    reason: str

    @property
    def is_error(self) -> bool:
        """Whether it failed by an error of its own, whatever the machine: it was neither stopped nor left early."""
        return not self.passed and self.reason.isidentifier() and self.reason != MemoryError.__name__

    @property
    def kind(self) -> str:
        """The reason, one of a few: "passed"; "wrong answer" (an assertion), another "error"; out of "time", "memory",
        or "time or memory", where the system does not say which; "stopped" for what else it did, or left early.
        """
        if self.passed:
            return "passed"
        if self.is_error:
            return "wrong answer" if self.reason == AssertionError.__name__ else "error"
        known = {MemoryError.__name__: "memory", "out of time": "time", "out of time or memory": "time or memory"}
        return known.get(self.reason, "stopped")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one program.

    Attributes:
        seconds: of wall-clock time; CPU time has the next whole number.
        memory_bytes: of address space, the interpreter's own included.
    """

    seconds: float = 5.0
    memory_bytes: int = 1 << 30


def run_all(programs: Sequence[Program], *, limits: Limits | None = None, workers: int | None = None) -> list[Outcome]:
    """Runs programs, several at a time.

    Args:
        programs: run in any order.
        limits: of each; None: the usual ones.
        workers: at a time; None: as many as there are cores, four at most.

    Raises:
        RGFTError: the system cannot limit processes, or a program that is right does not pass here.
    """
    limits = limits or Limits()
    require_working(limits)
    with ThreadPoolExecutor(max_workers=workers or min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda program: run(program, limits=limits), programs))


def require_working(limits: Limits) -> None:
    """Makes sure that right code passes and wrong code fails: else every score would be 0, or 1, without a word.

    Raises:
        RGFTError: it is not so.
    """
    if os.name != "posix":
        raise RGFTError("generated code is run only where processes can be limited: on Linux or macOS, in a container")
    known = Program(code="import math\ndef two():\n    return math.floor(2.5)", test="assert two() == 2")
    right = run(known, limits=limits)
    wrong = run(Program(code=known.code, test="assert two() == 3"), limits=limits)
    if not right.passed or wrong.reason != "AssertionError":
        raise RGFTError(
            f"expected the process for generated code to pass a right program and fail a wrong one, found "
            f"{right.reason!r} and {wrong.reason!r}; the interpreter {_interpreter()} must be readable for everybody, "
            f"and {limits.memory_bytes >> 20} MB and {limits.seconds:g} s be enough for it"
        )


def run(program: Program, *, limits: Limits) -> Outcome:
    """Runs one program; whatever it does, nothing of it is left when this returns."""
    secret = secrets.token_hex(16)
    task = {
        "program": program.code, "test": program.test, "secret": secret,
        "cpu_seconds": math.ceil(limits.seconds), "memory_bytes": limits.memory_bytes,
    }  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="rgft-code-"))
    try:
        if os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
        with tempfile.TemporaryFile() as handed:
            handed.write(json.dumps(task).encode())
            handed.seek(0)
            # Nothing is run between fork and exec: this process has threads.
            process = subprocess.Popen(
                [_interpreter(), "-I", "-S", "-B", str(CHILD)], stdin=handed, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, cwd=folder, env={}, start_new_session=True, close_fds=True,
            )  # fmt: skip
            said, why = _listen(process, limits.seconds)
        return _judged(said, why, secret, process.returncode)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _interpreter() -> str:
    """The interpreter itself, not a virtual environment's link to it."""
    return os.path.realpath(sys.executable)


def _listen(process: subprocess.Popen[bytes], seconds: float) -> tuple[bytes, str]:
    """What it said until it ended, was out of time or said too much; then its whole group is killed."""
    assert process.stdout is not None
    # The interpreter's own start is not the program's time.
    deadline = time.monotonic() + seconds + 1.0
    said, why = b"", ""
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not why:
                left = deadline - time.monotonic()
                if left <= 0:
                    why = "out of time"
                elif selector.select(left):
                    piece = os.read(process.stdout.fileno(), LINE_BYTES)
                    said += piece
                    if not piece:
                        break
                    if len(said) > LINE_BYTES:
                        why = "said too much"
        if not why:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                why = "out of time"
    finally:
        # Its leader is not waited for before this, or its number could be another's by now.
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
    return said, why


def _judged(said: bytes, why: str, secret: str, code: int) -> Outcome:
    if why:
        return Outcome(passed=False, reason=why)
    words = said.decode("ascii", "replace").removesuffix("\n").split(" ", 2)
    if code != 0 or len(words) != 3 or words[0] != secret:
        if code == -signal.SIGXCPU:
            return Outcome(passed=False, reason="out of time")
        if code == -signal.SIGKILL:
            return Outcome(passed=False, reason="out of time or memory")
        return Outcome(passed=False, reason=f"ended early with status {code}")
    if words[1] == "1" and not _network_is_noted.is_set():
        _network_is_noted.set()
        log.warning("generated code: the network cannot be taken away here; its sockets are refused by a hook alone")
    return Outcome(passed=words[2] == "passed", reason=words[2].removeprefix("failed "))

"""Each program here does what a model's code may do; all must be stopped, counted as failed, and leave nothing."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rgft.bench.tasks import limited_process
from rgft.bench.tasks.limited_process import Limits, Program, require_working, run, run_all
from rgft.errors import RGFTError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes can be limited on POSIX systems only")

LIMITS = Limits(seconds=2.0, memory_bytes=1 << 29)
TEST = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\ncheck(square)"
RIGHT = "def square(x):\n    return x * x\n"


def outcome(code: str, test: str = TEST) -> str:
    return run(Program(code=code, test=test), limits=LIMITS).reason


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs have their folders in one of the test's own, which must be empty in the end."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)  # the programs are nobody's
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []
    folder.rmdir()


def test_right_code_passes_and_wrong_code_fails() -> None:
    assert outcome(RIGHT) == "passed"
    assert outcome("def square(x):\n    return x + x\n") == "AssertionError"
    assert outcome("def square(x) return") == "SyntaxError"
    assert outcome("x = 1") == "NameError"
    # What HumanEval's programs use: modules of the standard library, and files of their own are no crime.
    code = "import collections, decimal, functools, hashlib, itertools, math, re, string, typing, datetime\n" + RIGHT
    assert outcome(code + "hashlib.md5(b'x').hexdigest()\nopen('notes', 'w').write('x')\n") == "passed"


@pytest.mark.parametrize(
    ("code", "reasons"),
    [
        ("while True:\n    pass\n", {"out of time", "out of time or memory"}),
        ("import time\ntime.sleep(60)\n", {"out of time"}),
        ("import os\nwhile True:\n    os.fork()\n", {"PermissionError", "BlockingIOError"}),
        ("import _posixsubprocess, multiprocessing as m\nm.Process(target=print).start()\n", None),
        ("import threading\nthreading.Thread(target=print).start()\n", None),
        ("open('big', 'wb').write(b'x' * (1 << 24))\n", None),
        ("for i in range(10 ** 6):\n    open(str(i), 'w').close()\n", {"PermissionError"}),
        ("x = bytearray(1 << 40)\n", {"MemoryError"}),
        ("x = []\nwhile True:\n    x.append(bytearray(1 << 24))\n", None),
        ("while True:\n    print('x' * 10 ** 5)\n", {"out of time", "out of time or memory"}),
        ("import sys\nsys.exit(0)\n", {"SystemExit"}),
        ("import os\nos._exit(0)\n", {"ended early with status 0"}),
        ("import os\nos.kill(os.getppid(), 9)\n", {"PermissionError"}),
        ("input()\n", {"EOFError"}),
        ("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f():\n    f()\nf()\n", None),
        ("import os\nfor fd in range(3, 32):\n    try:\n        os.write(fd, b'x' * 10 ** 7)\n"
         "    except OSError:\n        pass\n", {"said too much"}),
        ("import socket\nsocket.create_connection(('127.0.0.1', 1))\n", {"PermissionError"}),
        ("import ctypes\nctypes.CDLL(None)\n", {"PermissionError"}),
        ("import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (9, 9))\n", {"PermissionError"}),
    ],
)  # fmt: skip
def test_wild_code_is_stopped(code: str, reasons: set[str] | None) -> None:
    started = time.monotonic()
    # The right function stands first: what follows is all that is wrong.
    found = outcome(RIGHT + code)
    assert found != "passed"
    if reasons is not None:
        assert found in reasons
    assert time.monotonic() - started < 20


CHEATS = {
    "equal to everything by built-ins": "import builtins\nbuiltins.abs = builtins.all = lambda *a: True\n"
    "builtins.AssertionError = ValueError\ndef square(x):\n    return abs(0)\n",
    "its own check": "def check(candidate):\n    pass\ndef square(x):\n    return 0\n",
    "its own way out": "import os, sys\nos.write = sys.stdout = print\nos._exit = lambda code: None\n"
    "def square(x):\n    return 0\n",
    "leaves while it is tested": "import os\ndef square(x):\n    os._exit(0)\n",
    "says that it passed": "import os\ndef square(x):\n    for fd in range(32):\n        try:\n"
    "            os.write(fd, b'passed\\n')\n        except OSError:\n            pass\n    os._exit(0)\n",
    "catches what the test raises": "import sys\nsys.excepthook = lambda *a: None\ndef square(x):\n    return 0\n",
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_do_not_pass(name: str) -> None:
    assert outcome(CHEATS[name]) != "passed"


def test_modules_that_the_code_changed_are_new_ones_to_the_test() -> None:
    code = "import math\nmath.isclose = lambda *a, **k: True\ndef third():\n    return 0.5\n"
    test = "import math\nassert math.isclose(third(), 1 / 3)"
    assert outcome(code, test) == "AssertionError"


def test_nothing_outside_its_folder_is_written_or_removed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    tmp_path.chmod(0o777)
    kept.chmod(0o666)
    for deed in (f"open({str(kept)!r}, 'w')", f"os.remove({str(kept)!r})", f"os.open({str(kept)!r}, os.O_RDWR)",
                 f"os.symlink({str(kept)!r}, 'link')", f"os.chmod({str(kept)!r}, 0)"):  # fmt: skip
        assert outcome(f"import os\n{RIGHT}{deed}\n") == "PermissionError"
    assert kept.read_text() == "as it was"


def test_the_environment_is_empty_and_rights_are_given_up() -> None:
    os.environ["RGFT_SECRET"] = "x"
    try:
        assert outcome(RIGHT, "import os\nassert 'RGFT_SECRET' not in os.environ and os.getuid() != 0") == "passed"
    finally:
        del os.environ["RGFT_SECRET"]
    assert outcome(RIGHT, "import sys\nassert not any('site-packages' in path for path in sys.path)") == "passed"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (RIGHT, "passed"),
        ("def square(x):\n    return 0\n", "wrong answer"),
        ("x = 1", "error"),
        ("while True:\n    pass\n", "time"),
        ("import time\ntime.sleep(60)\n", "time"),
        ("x = bytearray(1 << 40)\n", "memory"),
        ("import os\nos._exit(0)\n", "stopped"),
    ],
)
def test_why_it_failed_is_one_of_a_few_kinds(code: str, kind: str) -> None:
    assert run(Program(code=code, test=TEST), limits=Limits(seconds=1.0, memory_bytes=1 << 29)).kind == kind


def test_many_at_a_time_keep_their_order() -> None:
    programs = [Program(code=f"def two():\n    return {i % 2 * 2}", test="assert two() == 2") for i in range(8)]
    assert [found.passed for found in run_all(programs, limits=LIMITS)] == [False, True] * 4


def test_a_place_where_right_code_fails_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RGFTError, match="expected the process for generated code to pass a right program"):
        require_working(Limits(seconds=2.0, memory_bytes=1 << 22))
    monkeypatch.setattr(limited_process.os, "name", "nt")
    with pytest.raises(RGFTError, match="only where processes can be limited"):
        require_working(LIMITS)


def test_the_child_s_interpreter_is_this_one() -> None:
    assert outcome(RIGHT, f"import sys\nassert sys.version_info[:2] == {sys.version_info[:2]}") == "passed"

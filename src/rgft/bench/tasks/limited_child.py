"""The inside of `limited_process`: a program of its own, which limits itself and then runs what it is handed.

It imports nothing of the project and is started as a file, with `-I -S -B`. It reads one JSON object from its input
and writes one line to its output: the secret it was handed and what happened. That line is written by nobody else
unless the code under test goes looking for it; who means to deceive from inside the process can.
"""

from __future__ import annotations

import builtins
import json
import os
import sys

#: Nobody, on most systems.
NOBODY = 65534

#: Files that the code may open for writing, in its own folder.
FILES = 16

#: Beginnings of names of audit events that mean the world outside: refused.
REFUSED = (
    "os.", "socket.", "subprocess.", "shutil.", "ctypes.", "resource.", "fcntl.", "pty.", "mmap.", "signal.", "gc.",
    "ftplib.", "http.", "imaplib.", "nntplib.", "poplib.", "smtplib.", "telnetlib.", "urllib.", "webbrowser.",
    "sqlite3.", "syslog.", "_posixsubprocess.",
)  # fmt: skip

#: Of these, events of reading alone.
HARMLESS = frozenset({"os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv", "os.unsetenv"})

#: CLONE_NEWNET and CLONE_NEWUSER of Linux; PR_SET_NO_NEW_PRIVS and PR_SET_KEEPCAPS; _LINUX_CAPABILITY_VERSION_3.
NEW_NETWORK, NEW_USER, NO_NEW_PRIVILEGES, KEEP_RIGHTS, RIGHTS_VERSION = 0x40000000, 0x10000000, 38, 8, 0x20080522

#: CAP_DAC_READ_SEARCH, as a bit: what reading an interpreter below root's home takes.
READ_ALL = 1 << 2

#: Files and folders that may be read, beside the interpreter's modules and the process's own folder.
READABLE = ("/dev/null", "/dev/urandom", "/etc/localtime", "/usr/share/zoneinfo")


def main() -> None:
    """Reads the task, limits this process, runs the task, says what happened and is gone."""
    task = json.loads(sys.stdin.buffer.read())
    said = os.dup(1)
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silence, descriptor)
    has_network = _limit(task)
    write, leave = os.write, os._exit  # as they are now: the code may replace them in the module
    outcome = _outcome(task["program"], task["test"])
    try:
        write(said, f"{task['secret']} {int(has_network)} {outcome}\n".encode("ascii", "replace")[:2000])
    finally:
        leave(0)


def _limit(task: dict) -> bool:
    """Gives up rights, sets limits that cannot be raised again; returns whether there still is a network."""
    import resource

    has_network = _isolate()
    megabytes = 1 << 20
    limits = {
        "RLIMIT_CPU": task["cpu_seconds"], "RLIMIT_AS": task["memory_bytes"], "RLIMIT_FSIZE": megabytes,
        "RLIMIT_NOFILE": 32, "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0, "RLIMIT_MEMLOCK": 0, "RLIMIT_MSGQUEUE": 0,
    }  # fmt: skip
    for name, value in limits.items():
        kind = getattr(resource, name, None)  # macOS lacks some
        if kind is not None:
            # The signal at the soft limit of CPU time says what was exceeded; the one at the hard limit does not.
            resource.setrlimit(kind, (value, value + 1 if name == "RLIMIT_CPU" else value))
    _watch(os.getcwd())
    return has_network


def _isolate() -> bool:
    """Leaves the network where the system lets it, and root's rights wherever it has them."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    has_network = True
    if sys.platform == "linux":
        wanted = NEW_NETWORK if os.geteuid() == 0 else NEW_NETWORK | NEW_USER
        has_network = libc.unshare(wanted) != 0
        libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if os.geteuid() == 0:
        if sys.platform == "linux":
            libc.prctl(KEEP_RIGHTS, 1, 0, 0, 0)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        if sys.platform == "linux":
            right = 0 if os.access(os.__file__, os.R_OK) else READ_ALL
            header = (ctypes.c_uint32 * 2)(RIGHTS_VERSION, 0)
            if libc.capset(header, (ctypes.c_uint32 * 6)(right, right, 0, 0, 0, 0)) != 0:
                raise OSError(ctypes.get_errno(), "root's rights cannot be given up")
    return has_network


def _watch(folder: str) -> None:
    """Refuses, for good, what reaches out of the process: files elsewhere, processes, sockets, foreign code."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    # Kept here: the code may replace what modules name.
    inside, real, join, is_a = os.path.realpath(folder) + os.sep, os.path.realpath, os.path.join, isinstance
    text, number, refused, harmless = str, int, REFUSED, HARMLESS
    readable = (inside, *(os.path.realpath(path) for path in (*sys.path, *READABLE)))
    opened = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal opened
        if event == "open":
            path, _, flags = arguments
            place = real(join(folder, path)) if is_a(path, text) else ""
            if flags & writing:
                opened += 1
                if opened > FILES or not place.startswith(inside):
                    raise PermissionError("this process may write a few files in its own folder only")
            elif not (is_a(path, number) or (place and place.startswith(readable))):
                raise PermissionError("this process may read modules and its own files only")
        elif event.startswith(refused) and event not in harmless:
            raise PermissionError("this process may not reach outside: " + event)

    sys.addaudithook(watch)


def _outcome(program: str, test: str) -> str:
    originals = dict(vars(builtins))
    modules = set(sys.modules)
    names = {"__name__": "__candidate__", "__builtins__": dict(originals)}
    execute, compiled = exec, compile
    try:
        execute(compiled(program, "<candidate>", "exec"), names)
        # The test runs with the built-ins as they were, and with modules of its own.
        builtins.__dict__.update(originals)
        for name in set(sys.modules) - modules:
            del sys.modules[name]
        names["__builtins__"] = originals
        execute(compiled(test, "<test>", "exec"), names)
    except BaseException as error:  # SystemExit too: whoever leaves early has not passed
        names.clear()  # there may be no memory left to say so
        return "failed " + type(error).__name__
    return "passed"


if __name__ == "__main__":
    main()

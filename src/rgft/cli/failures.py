"""From errors to exit codes: 0 done, 1 the run failed, 2 something given is wrong, 130 Ctrl-C (128 + signal)."""

from __future__ import annotations

import errno
import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from rgft.errors import NonFiniteError, RGFTError, RGFTWarning, RunFolderError

FAILED, WRONG_INPUT = 1, 2
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


class Interrupted(Exception):
    """The run was ended from outside and can be resumed; the message says how.

    Attributes:
        number: of the signal.
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number


def exit_code(error: BaseException) -> int:
    """The exit code that an error stands for."""
    if isinstance(error, Interrupted):
        return 128 + error.number
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    # The system's number is there when a write failed, not when a folder was refused. One that may not be written was
    # the wrong one to give.
    is_failed_write = isinstance(error, RunFolderError) and error.errno not in (None, *_NOT_ALLOWED)
    return FAILED if isinstance(error, NonFiniteError) or is_failed_write else WRONG_INPUT


@contextmanager
def reported(*, quiet: bool = False) -> Iterator[None]:
    """Around a command: RGFT's errors become a short message on standard error, without a traceback, and an exit code.

    Warnings and log messages of RGFT go to standard error too, one line each.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    log = logging.getLogger("rgft")
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.ERROR if quiet else logging.INFO)
    log.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", RGFTWarning)
            warnings.showwarning = lambda message, *rest, **more: log.warning("%s", message)
            yield
    except (RGFTError, Interrupted) as error:
        name = "interrupted" if isinstance(error, Interrupted) else "error"
        print(f"{name}: {error}", file=sys.stderr)
        raise typer.Exit(exit_code(error)) from error
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(exit_code(error)) from error
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate

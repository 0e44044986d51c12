import io
import logging
import signal
import warnings
from dataclasses import replace
from typing import Any

import pytest
import typer
from rich.console import Console

from rgft.cli.failures import Interrupted, reported
from rgft.cli.progress import duration, line, plain, watching
from rgft.errors import BudgetError, ConfigError, NonFiniteError, RGFTWarning
from rgft.run import StepReport
from rgft.telemetry.atomic_write import write_error

REPORT = StepReport(
    step=12, loss=0.51234, progress=0.25, flops_fraction=0.075, seconds=30.0, step_seconds=1.0, active=4, components=9,
    cut=3, captured=0.634, top=(("bert.encoder.layer.3", 2.0), ("classifier", 1.0)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3599.9, "1 h 00 min"), (7805, "2 h 10 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_line_says_where_the_run_is() -> None:
    assert line(REPORT) == (
        "step 12 · loss 0.5123 · 1 min 30 s left · 25% of the budget spent · 4 of 9 on · captures 63% · "
        "errs most: layer.3, classifier"
    )


def test_a_line_leaves_out_what_is_not_known() -> None:
    text = line(replace(REPORT, progress=0.0, captured=None, top=()))
    assert "left" not in text
    assert "captures" not in text
    assert "errs" not in text


def test_plain_lines_come_at_intervals() -> None:
    lines: list[str] = []
    times = iter([0.0, 4.0, 9.9, 10.1, 15.0, 21.0])
    observe = plain(lines.append, clock=lambda: next(times))
    for step in range(1, 7):
        observe(replace(REPORT, step=step))
    assert [text.split(" ·")[0] for text in lines] == ["step 1", "step 4", "step 6"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_shown_on_terminals_and_elsewhere(is_terminal: bool) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=is_terminal, width=200)
    with watching(console, quiet=False) as observers:
        for observer in observers:
            observer(REPORT)
    assert "errs most: layer.3, classifier" in output.getvalue()
    assert ("\x1b" in output.getvalue()) == is_terminal


def test_quiet_shows_nothing() -> None:
    with watching(Console(file=io.StringIO()), quiet=True) as observers:
        assert observers == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("wrong"), 2), (BudgetError("too small"), 2), (NonFiniteError("nan"), 1),
        (write_error("f", OSError(28, "No space left on device")), 1), (Interrupted("after step 3"), 130),
        (Interrupted("after step 3", signal.SIGTERM), 143), (KeyboardInterrupt(), 130),
    ],
)  # fmt: skip
def test_errors_become_a_message_and_an_exit_code(error: Any, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, reported():
        raise error
    assert caught.value.exit_code == code
    output = capsys.readouterr()
    assert output.out == ""
    assert str(error) in output.err


def test_mistakes_of_the_program_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), reported():
        raise ZeroDivisionError


def test_warnings_are_lines_and_nothing_is_left_behind(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("rgft")
    before = (log.level, log.propagate, list(log.handlers), warnings.showwarning)
    with reported():
        warnings.warn("a setting without effect", RGFTWarning, stacklevel=1)
    with reported(quiet=True):
        warnings.warn("another", RGFTWarning, stacklevel=1)
    assert capsys.readouterr().err == "WARNING: a setting without effect\n"
    assert (log.level, log.propagate, list(log.handlers), warnings.showwarning) == before

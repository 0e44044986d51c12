"""Watching a run: a live line on a terminal, plain lines elsewhere, nothing when asked for quiet. All on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from rgft.run import StepReport

Observer = Callable[["StepReport"], None]

#: Seconds between two plain lines.
INTERVAL_SECONDS = 10.0


def duration(seconds: float) -> str:
    """Seconds as people say them: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def line(report: StepReport) -> str:
    """Where a run is: step, loss, time left, budget spent, captured share, and the components that err most."""
    parts = [f"step {report.step}", f"loss {report.loss:.4f}"]
    if report.progress > 0:
        parts.append(f"{duration(report.seconds / report.progress - report.seconds)} left")
    parts += [f"{report.progress:.0%} of the budget spent", f"{report.active} of {report.components} on"]
    if report.captured is not None:
        parts.append(f"captures {report.captured:.0%}")
    if report.top:
        parts.append("errs most: " + ", ".join(short(name) for name, _ in report.top))
    return " · ".join(parts)


def short(name: str) -> str:
    """A component's name without the path that all share: its last two parts."""
    return ".".join(name.split(".")[-2:])


def plain(write: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic) -> Observer:
    """An observer that writes the first step, then a line every INTERVAL_SECONDS."""
    last: float | None = None

    def observe(report: StepReport) -> None:
        nonlocal last
        now = clock()
        if last is None or now - last >= INTERVAL_SECONDS:
            last = now
            write(line(report))

    return observe


@contextmanager
def watching(console: Console, *, quiet: bool) -> Iterator[list[Observer]]:
    """The observers to give to a run, shown on `console` (standard error) while the block lasts."""
    if quiet:
        yield []
    elif not console.is_terminal:
        yield [plain(lambda text: console.print(text, highlight=False, soft_wrap=True))]
    else:
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (BarColumn(bar_width=24), TextColumn("{task.description}"))
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("measuring costs", total=1.0)
            yield [lambda report: progress.update(bar, completed=report.progress, description=line(report))]

"""What the commands that run things in sittings have in common: their options, and how they say what became of runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from rgft.cli.failures import FAILED

if TYPE_CHECKING:
    from rgft.bench.sitting import Outcome

Minutes = Annotated[float | None, typer.Option(help="begin no new run after this time")]
Jobs = Annotated[int, typer.Option(help="runs side by side, which share the cores; their seconds say less")]
Device = Annotated[str, typer.Option(help="auto: an accelerator where there is one, else the CPU")]


def show(outcomes: Iterable[Outcome]) -> None:
    """Names each result, and each run that failed; leaves with an exit code that says whether one did."""
    failures = 0
    for outcome in outcomes:
        typer.echo(f"{outcome.path}: FAILED: {outcome.failure}" if outcome.failure else outcome.path)
        failures += bool(outcome.failure)
    if failures:
        typer.echo(f"{failures} failed: see above; what has a result is kept", err=True)
        raise typer.Exit(FAILED)

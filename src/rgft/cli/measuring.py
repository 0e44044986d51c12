"""`rgft bench reach`, `map-study`, `map-summary`, `map-history`: what a target takes, and what error maps are worth."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rgft.cli.documents import Update, put
from rgft.cli.sittings import Device, Jobs, Minutes, show

RESULTS = Path("benchmarks/results")


def bench_reach(
    results: Annotated[Path, typer.Argument(help="folder with results of final runs")] = RESULTS,
    metric: Annotated[str, typer.Option(help="of the validation split: loss, accuracy, f1, …")] = "loss",
    target: Annotated[float | None, typer.Option(help="what is to be reached")] = None,
    of: Annotated[str | None, typer.Option(help="label of a contender: what it ends with is to be reached")] = None,
    baseline: Annotated[str | None, typer.Option(help="label of a contender to hold the others against")] = None,
    against: Annotated[float | None, typer.Option(help="budget of the baseline's runs  [default: its highest]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on standard output")] = False,
) -> None:
    """List what FLOPs, steps and seconds methods take to a target, where runs were evaluated along the way.

    Medians over all runs, those that did not get there above all others; beside a baseline the geometric mean of the
    ratios of runs with the same seed.
    """
    from rgft.cli.failures import reported

    with reported():
        from rgft.bench.convergence import is_meant, reached
        from rgft.cli.reaching import lines_of

        found = reached(results, metric=metric, target=target, of=of, against=baseline, against_budget=against)
        if as_json:
            typer.echo(json.dumps({group.heading: [asdict(row) for row in rows] for group, rows in found.items()}))
            return
        for group, rows in found.items():
            typer.echo(f"\n{group.heading}: {metric} {rows[0].target:.3f}")
            for row in rows:
                for line in lines_of(row, metric=metric):
                    typer.echo(f"  {line}")
            if baseline is not None and not any(is_meant(row, baseline, against) for row in rows):
                at = "" if against is None else f" at {against:g}"
                typer.echo(f"  held against nothing: no run of {baseline}{at} here was evaluated along the way")


def bench_engine_table(
    results: Annotated[Path, typer.Argument(help="folder of the engine bench's results")] = RESULTS / "engine",
    update: Update = None,
) -> None:
    """Print what steps take and hold beside full fine-tuning's as Markdown tables, or put them into a document."""
    from rgft.cli.failures import reported

    with reported():
        from rgft.bench.engine import tables

        put(tables.markdown(results), update)


def bench_map_study(
    studies: Annotated[list[Path], typer.Argument(help="map studies' files, see benchmarks/map_studies")],
    results: Annotated[Path, typer.Option(help="folder of all results")] = RESULTS,
    minutes: Minutes = None,
    jobs: Jobs = 1,
    device: Device = "auto",
) -> None:
    """Hold error maps against what components turn out to be worth: run the seeds that studies still lack."""
    from rgft.cli.failures import reported

    with reported():
        from rgft.bench.map_study.runner import run_studies
        from rgft.bench.map_study.settings import MapStudy
        from rgft.bench.runner import Conditions
        from rgft.cli.preparing import device_of

        loaded = [MapStudy.load(path) for path in studies]
        conditions = Conditions(device=device_of(device), jobs=jobs)
        show(run_studies(loaded, results, conditions, stop_after_seconds=minutes and minutes * 60))


def bench_map_summary(
    results: Annotated[Path, typer.Argument(help="folder with results of map studies")] = RESULTS,
    update: Update = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on standard output")] = False,
) -> None:
    """Say whether maps predict harm and gain, how they change over a run, and how alike they are between tasks."""
    from rgft.cli.failures import reported

    with reported():
        from rgft.bench.map_study.summary import markdown, summarise

        found = summarise(results)
        if as_json:
            typer.echo(json.dumps(found.to_dict()))
        else:
            put(markdown(found), update)


def bench_map_history(
    results: Annotated[
        Path, typer.Argument(help="folder with results of map studies, or of RGFT's final runs")
    ] = RESULTS,
    signal: Annotated[str, typer.Option(help="whose maps: a study's label of it")] = "generalising_decrease",
    picture: Annotated[Path | None, typer.Option(help="where to draw them, as .svg or .png")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="a list in JSON on standard output")] = False,
) -> None:
    """Show E over time, layer by layer and kind by kind: of map studies, and of runs that kept their own maps."""
    from rgft.cli.failures import reported

    with reported():
        from rgft.bench.map_study.history import histories, markdown
        from rgft.bench.map_study.history_picture import draw

        found = histories(results, signal=signal)
        drawn = None if picture is None else draw(found, picture)
        typer.echo(json.dumps([history.to_dict() for history in found]) if as_json else markdown(found))
        if drawn is not None:
            typer.echo(drawn, err=as_json)

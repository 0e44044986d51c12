"""`rgft bench reach`, `map-study` and `map-summary`: what it takes to a target, and what error maps are worth."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

RESULTS = Path("benchmarks/results")


def bench_reach(
    results: Annotated[Path, typer.Argument(help="folder with results of final runs")] = RESULTS,
    metric: Annotated[str, typer.Option(help="of the validation split: loss, accuracy, f1, …")] = "loss",
    target: Annotated[float | None, typer.Option(help="what is to be reached")] = None,
    of: Annotated[str | None, typer.Option(help="label of a contender: what it ends with is to be reached")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on standard output")] = False,
) -> None:
    """List what FLOPs, epochs and seconds methods take to a target, where runs were evaluated along the way."""
    from rgft.cli.failures import reported

    with reported():
        from rgft.bench.convergence import reached

        found = reached(results, metric=metric, target=target, of=of)
        if as_json:
            typer.echo(json.dumps({group.title: [asdict(row) for row in rows] for group, rows in found.items()}))
            return
        for group, rows in found.items():
            typer.echo(f"\n{group.title}")
            for row in rows:
                cost = "not reached"
                if row.reached:
                    flops = f"{row.fraction_of_full:.3f} of full fine-tuning's FLOPs"
                    cost = f"{flops}, {row.epochs:.2f} epochs, {row.seconds:.0f} s"
                typer.echo(f"  {row.label} ({row.reached} of {row.seeds} runs): {cost}; best {metric} {row.best:.3f}")


def bench_engine_table(
    results: Annotated[Path, typer.Argument(help="folder of the engine bench's results")] = RESULTS / "engine",
    update: Annotated[Path | None, typer.Option(help="Markdown file whose marked part is replaced")] = None,
) -> None:
    """Print what steps take and hold beside full fine-tuning's as Markdown tables, or put them into a document."""
    from rgft.cli.failures import reported

    with reported():
        from rgft.bench import table
        from rgft.bench.engine import tables

        text = tables.markdown(results)
        if update is None:
            typer.echo(text)
        else:
            table.update(update, text)


def bench_map_study(
    study: Annotated[Path, typer.Argument(help="a map study's file, see benchmarks/map_studies")],
    results: Annotated[Path, typer.Option(help="folder of all results")] = RESULTS,
) -> None:
    """Hold error maps against what components turn out to be worth: run the seeds that a study still lacks."""
    from rgft.cli.failures import reported

    with reported():
        from rgft.bench.map_study.runner import run_study
        from rgft.bench.map_study.settings import MapStudy

        loaded = MapStudy.load(study)
        for path in run_study(loaded, results / loaded.name):
            typer.echo(path)


def bench_map_summary(
    results: Annotated[Path, typer.Argument(help="folder with results of map studies")] = RESULTS,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on standard output")] = False,
) -> None:
    """Say whether maps predict harm and gain, how they change over a run, and how alike they are between tasks."""
    from rgft.cli.failures import reported

    with reported():
        from rgft.bench.map_study.summary import markdown, summarise

        found = summarise(results)
        typer.echo(json.dumps(found.to_dict()) if as_json else markdown(found))

"""`rgft bench`: the commands that run experiments and compare their results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rgft.cli import measuring
from rgft.cli.documents import Update, put
from rgft.cli.sittings import Device, Jobs, Minutes, show

bench = typer.Typer(no_args_is_help=True, help="Compare methods: run experiments, make tables.")

RESULTS = Path("benchmarks/results")
Results = Annotated[Path, typer.Argument(help="folder with results of final runs")]
Metric = Annotated[
    str, typer.Option(help="loss, accuracy, …; score: each task's own; seconds, joules, …: docs/measures.md")
]


@bench.command("run")
def bench_run(
    experiments: Annotated[list[Path], typer.Argument(help="experiment files, see benchmarks/experiments")],
    results: Annotated[Path, typer.Option(help="folder of all results")] = Path("benchmarks/results"),
    only: Annotated[
        list[str] | None, typer.Option(help="label of a contender that is run, and no others; may be repeated")
    ] = None,
    minutes: Minutes = None,
    jobs: Jobs = 1,
    device: Device = "auto",
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="let the task `code` run what a model wrote on this machine")
    ] = False,
) -> None:
    """Run what experiments still lack; it can be stopped and started again."""
    from rgft.cli.failures import reported

    with reported():
        from rgft.bench.experiment import Experiment, of_contenders
        from rgft.bench.runner import Conditions
        from rgft.bench.sitting import run_experiments
        from rgft.cli.preparing import device_of

        conditions = Conditions(device=device_of(device), jobs=jobs, allow_code_execution=allow_code_execution)
        loaded = [Experiment.load(path) for path in experiments]
        loaded = of_contenders(loaded, only) if only else loaded
        show(run_experiments(loaded, results, conditions, stop_after_seconds=minutes and minutes * 60))


@bench.command("list")
def bench_list(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on standard output")] = False,
) -> None:
    """List the methods that can be compared: where each comes from, and what it saves."""
    from rgft.cli.failures import reported

    with reported():
        from rgft.bench.methods import METHODS

        if as_json:
            shown = {
                m.name: {"title": m.title, "source": m.source, "cost": m.cost, "variants": m.variants}
                for m in METHODS.values()
            }
            typer.echo(json.dumps(shown))
            return
        width = max(map(len, METHODS))
        for method in METHODS.values():
            typer.echo(f"{method.name:{width}}  {method.title}" + (f". {method.source}" if method.source else ""))
            typer.echo(f"{'':{width}}  saves: {method.cost}")
            if method.variants:
                typer.echo(f"{'':{width}}  also tuned over: {', '.join(method.variants)}")


@bench.command("table")
def bench_table(
    results: Results = RESULTS,
    update: Update = None,
    overview: Annotated[
        bool, typer.Option(help="one table for all tasks, of RGFT beside full fine-tuning, LoRA and the last layers")
    ] = False,
) -> None:
    """Print the comparisons as Markdown tables, or put them into a document."""
    from rgft.cli.failures import reported

    with reported():
        from rgft.bench import table
        from rgft.bench.overview import overview as overview_of

        put(overview_of(results) if overview else table.markdown(results), update)


@bench.command("compare")
def bench_compare(
    method: Annotated[str, typer.Argument(help="label of a contender")],
    baseline: Annotated[str, typer.Argument(help="label of the contender that it is held against")],
    results: Results = RESULTS,
    metric: Metric = "loss",
    margin: Annotated[
        float | None,
        typer.Option(
            help="how much worse still counts as non-inferior, in the metric's unit  [default: 0; 0.005 for RGFT's "
            "score against full fine-tuning's at a higher budget]"
        ),
    ] = None,
    against: Annotated[float | None, typer.Option(help="budget of the baseline's runs  [default: the same]")] = None,
    at_equal: Annotated[
        str | None,
        typer.Option(
            help="a score, which must not be lower where the metric is better: less forgetting at equal score"
        ),
    ] = None,
    within: Annotated[
        float, typer.Option(help="how far apart scores are equal, in their unit; with --at-equal")
    ] = 0.005,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on standard output")] = False,
) -> None:
    """Say whether a method is better than another, non-inferior or worse: on each task, and over the tasks.

    Costs are compared as multiples, too: the geometric mean of the ratios of runs with the same seed.
    """
    from rgft.cli.failures import reported

    with reported():
        from rgft.bench.verdict import Equal, verdicts
        from rgft.cli import verdicts as shown

        equal = None if at_equal is None else Equal(metric=at_equal, margin=within)
        found = verdicts(results, method, baseline, metric=metric, margin=margin, against_budget=against, equal=equal)
        if as_json:
            typer.echo(json.dumps(shown.as_dict(found)))
        else:
            shown.show(found, metric=metric)


@bench.command("frontier")
def bench_frontier(
    results: Results = RESULTS,
    metric: Metric = "loss",
    against: Annotated[
        str, typer.Option(help="what methods cost: flops, seconds, joules, co2_grams or peak_memory")
    ] = "flops",
    picture: Annotated[Path | None, typer.Option(help="where to draw it, as .svg or .png")] = None,
) -> None:
    """List all methods by what they cost, mark those that nothing beats at their cost, and draw them."""
    from rgft.cli.failures import reported

    with reported():
        from rgft.bench.costs import cost_of
        from rgft.bench.frontier import frontiers
        from rgft.bench.frontier_picture import draw
        from rgft.cli import verdicts as shown

        cost = cost_of(against)
        found = frontiers(results, metric=metric, against=cost)
        shown.show_frontiers(found, against=cost)
        if picture is not None:
            typer.echo(draw(found, picture, against=cost))


@bench.command("engine")
def bench_engine(
    workload: Annotated[str, typer.Argument(help="minilm, smollm2, llama_1b, vit_b or resnet_50; or overheads")],
    results: Annotated[Path, typer.Option(help="folder of all results")] = Path("benchmarks/results/engine"),
    device: Device = "auto",
    minutes: Annotated[float | None, typer.Option(help="begin no new cell after this time")] = None,
    small: Annotated[bool, typer.Option("--small", help="overheads of tiny models: to see that it works")] = False,
) -> None:
    """Time, FLOPs and memory of a training step, beside full fine-tuning's; it can be stopped and started again.

    `overheads` measures what RGFT itself costs: seconds of a plan's switch on a model of 1 B parameters, the guide's
    own time per step, a step with everything on beside a plain loop's, and memory above a cut beside theory.
    """
    from rgft.cli.failures import reported

    with reported():
        if workload == "overheads":
            _bench_overheads(results, device, stop_after_seconds=minutes and minutes * 60, small=small)
            return
        import torch

        from rgft.bench.engine import tables
        from rgft.bench.engine.runner import run_engine
        from rgft.bench.engine.workloads import workload as chosen
        from rgft.cli.preparing import device_of

        model, place = chosen(workload), torch.device(device_of(device))
        folder = results / f"{model.name}-{place.type}"
        for path in run_engine(model, folder, device=place, stop_after_seconds=minutes and minutes * 60):
            typer.echo(path, err=True)
        typer.echo(tables.steps(folder))


def _bench_overheads(results: Path, device: str, *, stop_after_seconds: float | None, small: bool) -> None:
    import torch

    from rgft.bench.engine.overheads.runner import run_overheads, table
    from rgft.bench.engine.overheads.sizes import SMALL, USUAL
    from rgft.cli.preparing import device_of

    place = torch.device(device_of(device))
    sizes = SMALL if small else USUAL
    folder = results / f"overheads-{place.type}{'-small' if small else ''}"
    for path in run_overheads(sizes, folder, device=place, stop_after_seconds=stop_after_seconds):
        typer.echo(path, err=True)
    typer.echo(table(folder))


bench.command("engine-table")(measuring.bench_engine_table)
bench.command("reach")(measuring.bench_reach)
bench.command("map-study")(measuring.bench_map_study)
bench.command("map-summary")(measuring.bench_map_summary)
bench.command("map-history")(measuring.bench_map_history)

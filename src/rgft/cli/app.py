"""`rgft`: the commands, and how errors reach the terminal. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from rgft.cli.options import Train

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Residual-guided fine-tuning.")
bench = typer.Typer(no_args_is_help=True, help="Compare methods: run experiments, make tables.")
app.add_typer(bench, name="bench")


@app.command()
def train(
    model: Annotated[str, typer.Option(help="hub name or folder of a pre-trained model")],
    data: Annotated[str, typer.Option(help="training rows: .csv, .tsv, .jsonl, .parquet, or a hub name")],
    output: Annotated[Path, typer.Option(help="run folder")],
    budget: Annotated[float, typer.Option(help="share of full fine-tuning's FLOPs, in (0, 1]")] = 0.3,
    text: Annotated[list[str] | None, typer.Option(help="text column; twice for pairs")] = None,
    label: Annotated[str, typer.Option(help="label column")] = "label",
    regression: Annotated[bool, typer.Option(help="labels are numbers to be predicted")] = False,
    validation: Annotated[str | None, typer.Option(help="validation rows; else a tenth is held out")] = None,
    test: Annotated[str | None, typer.Option(help="test rows, evaluated once at the end")] = None,
    lr: Annotated[float, typer.Option(help="learning rate")] = 2e-4,
    epochs: Annotated[float, typer.Option(help="of the full fine-tuning that the budget is a share of")] = 3.0,
    batch_size: Annotated[int, typer.Option(help="examples per step")] = 32,
    max_length: Annotated[int, typer.Option(help="tokens; longer inputs are cut")] = 128,
    settings: Annotated[list[str] | None, typer.Option("--set", help="RGFT setting, e.g. probe.size=32")] = None,
    checkpoint_every: Annotated[int, typer.Option(help="steps between checkpoints; 0: only on Ctrl-C")] = 50,
    seed: Annotated[int, typer.Option(help="of data order, splits and new weights")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in the folder")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run in the folder")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show components, plan and cost; run nothing")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on standard output")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Fine-tune a text classifier (or regressor) within a compute budget."""
    from rgft.cli.train import run_training

    options = Train(
        model=model, data=data, output=output, budget=budget, text=tuple(text or ("text",)), label=label,
        regression=regression, validation=validation, test=test, lr=lr, epochs=epochs, batch_size=batch_size,
        max_length=max_length, settings=tuple(settings or ()), checkpoint_every=checkpoint_every, seed=seed,
        resume=resume, overwrite=overwrite, dry_run=dry_run, quiet=quiet,
    )  # fmt: skip
    report = run_training(options)
    if as_json:
        typer.echo(json.dumps(report))


@app.command()
def env() -> None:
    """Versions, processor, memory and accelerators, as JSON (for bug reports and result files)."""
    from rgft.telemetry.environment import environment

    typer.echo(json.dumps(environment(), indent=1))


@bench.command("run")
def bench_run(
    experiment: Annotated[Path, typer.Argument(help="an experiment file, see benchmarks/experiments")],
    results: Annotated[Path, typer.Option(help="folder of all results")] = Path("benchmarks/results"),
    minutes: Annotated[float | None, typer.Option(help="begin no new run after this time")] = None,
) -> None:
    """Run what an experiment still lacks; it can be stopped and started again."""
    from rgft.bench.experiment import Experiment
    from rgft.bench.runner import run_experiment

    loaded = Experiment.load(experiment)
    for path in run_experiment(loaded, results / loaded.name, stop_after_seconds=minutes and minutes * 60):
        typer.echo(path)


@bench.command("table")
def bench_table(
    results: Annotated[Path, typer.Argument(help="folder with results of final runs")],
    update: Annotated[Path | None, typer.Option(help="Markdown file whose marked part is replaced")] = None,
) -> None:
    """Print the comparison as a Markdown table, or put it into a document."""
    from rgft.bench import table

    text = table.markdown(results)
    if update is None:
        typer.echo(text)
    else:
        table.update(update, text)


def main() -> None:
    """The entry point: RGFT's own errors become one message on standard error, and an exit code.

    2: something given is wrong (settings, data, budget, folders); 1: the run itself failed; 130: Ctrl-C.
    """
    from rgft.errors import NonFiniteError, RGFTError

    try:
        app()
    except RGFTError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, NonFiniteError) else 2)

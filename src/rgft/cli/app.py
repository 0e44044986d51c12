"""`rgft`: the commands. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from rgft.cli.benching import bench

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Residual-guided fine-tuning.")
app.add_typer(bench, name="bench")


def _share(text: str) -> float:
    """A number, or a percentage."""
    try:
        number = text.removesuffix("%").strip()
        return float(number) / 100.0 if text.endswith("%") else float(number)
    except ValueError:
        raise typer.BadParameter(
            f"expected a share of full fine-tuning's FLOPs, such as 0.3 or 30%, found {text!r}"
        ) from None


Model = Annotated[str | None, typer.Option(help="hub name or folder of a pre-trained model")]
Data = Annotated[
    str | None,
    typer.Option(help="training examples: .csv, .tsv, .jsonl, .parquet, .txt, a folder of images, or a hub name"),
]
Task = Annotated[
    str | None,
    typer.Option(help="text-classification (default), regression, language-modelling, chat or image-classification"),
]
Text = Annotated[list[str] | None, typer.Option(help="text column; given twice: pairs of texts  [default: text]")]
Label = Annotated[str | None, typer.Option(help="label column  [default: label]")]
LearningRate = Annotated[
    str | None,
    typer.Option(
        help="learning rate of dense weights (low-rank pairs have a multiple of it); auto: by rule; several "
        "(1e-4,3e-4), or search: the best is searched for inside the budget  [default: auto]"
    ),
]
MaxLength = Annotated[
    int | None, typer.Option(help="tokens; longer inputs are cut  [default: 128; 512 and 1024 for language models]")
]
Preset = Annotated[str | None, typer.Option(help="rgft (default), proposal_a, proposal_b or full")]
Granularity = Annotated[str | None, typer.Option(help="layer (default), block, head or adapter")]
Optimizer = Annotated[
    str | None,
    typer.Option(
        help="adamw (default), sgd, adafactor, lion, muon, schedule-free or adamw-8bit; each has a default learning "
        "rate of its own"
    ),
]
Seed = Annotated[int | None, typer.Option(help="of splits, new weights, data order and dropout  [default: 0]")]
File = Annotated[Path | None, typer.Option("--config", help="YAML: run settings, and RGFT's own below `rgft:`; flags "
                                                             "override it")]  # fmt: skip
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any setting of the file, e.g. "
                                                     "probe.size=32; may be repeated")]  # fmt: skip
Memory = Annotated[
    str | None,
    typer.Option(
        help="memory that tensors of a step may take on the training device, e.g. 8GB or 7.5GiB  [default: any]"
    ),
]
LowRank = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="train layers by low-rank pairs of this rank in place of dense dW; more: --set update.low_rank.…; none: "
        "--set update.low_rank=null  [default: 8 with language models, else none]",
    ),
]
Watts = Annotated[
    float | None,
    typer.Option(help="power of the training device, for energy that is not measured  [default: by its type]"),
]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on standard output, all else on standard error")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress, no tables")]


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="run folder: records, model, ledger")],
    model: Model = None,
    data: Data = None,
    task: Task = None,
    text: Text = None,
    label: Label = None,
    validation: Annotated[str | None, typer.Option(help="validation examples; else a tenth is held out")] = None,
    test: Annotated[str | None, typer.Option(help="test examples, evaluated once at the end")] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            parser=_share,
            metavar="SHARE",
            help="of full fine-tuning's FLOPs, such as 0.3 or 30%  [default: 0.3 with the preset rgft, else no limit]",
        ),
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="wall-clock budget; with --budget, what is first")] = None,
    joules: Annotated[float | None, typer.Option(help="energy budget; with others, what is first")] = None,
    watts: Watts = None,
    memory: Memory = None,
    preset: Preset = None,
    granularity: Granularity = None,
    low_rank: LowRank = None,
    optimizer: Optimizer = None,
    lr: LearningRate = None,
    epochs: Annotated[
        float | None, typer.Option(help="of the full fine-tuning that the budget is a share of  [default: 3]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="examples per step  [default: 32]")] = None,
    max_length: MaxLength = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="steps between checkpoints; 0: on Ctrl-C and at the end only  [default: 100]")
    ] = None,
    config: File = None,
    overrides: Overrides = None,
    seed: Seed = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in the folder")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run in the folder")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show components, plan and predicted cost; run and write nothing")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model within a compute budget.

    Exit codes: 0 done, 1 the run failed, 2 something given is wrong, 130 Ctrl-C (--resume goes on).
    """
    from rgft.cli.failures import reported

    with reported(quiet=quiet):
        from rgft.cli import preview, summary
        from rgft.cli.request import budget_of, read_request
        from rgft.cli.train import describe_run, run_training, stored_request

        # Beside what the file says of the same group, which they do not replace.
        beside = [] if memory is None else [f"budget.memory={memory}"]
        beside += [] if low_rank is None else [f"update.low_rank.rank={low_rank}"]
        beside += [] if watts is None else [f"energy.watts={watts}"]
        request = read_request(
            file=config, overrides=[*beside, *(overrides or ())], stored=stored_request(output) if resume else None,
            flags={"model": model, "data": data, "task": task, "text": tuple(text) if text else None, "label": label,
                   "validation": validation, "test": test, "optimizer": optimizer, "lr": lr,
                   "epochs": epochs, "batch_size": batch_size,
                   "max_length": max_length, "checkpoint_every": checkpoint_every, "seed": seed},
            rgft_flags={"budget": budget_of(budget, seconds, joules), "preset": preset, "granularity": granularity},
        )  # fmt: skip
        if dry_run:
            _show(describe_run(request), preview.show, as_json=as_json, quiet=quiet)
            return
        console = Console(stderr=True)
        report = run_training(request, output, resume=resume, overwrite=overwrite, console=console, quiet=quiet)
        _show(report, summary.show, as_json=as_json, quiet=quiet)


@app.command()
def sweep(
    output: Annotated[Path, typer.Option(help="folder of the sweep: a run folder per trial, sweep.json")],
    search: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=VALUES",
            help="setting to search: KEY=A,B,… or KEY=LOW:HIGH, e.g. lr=1e-4:1e-3; may be repeated",
        ),
    ],
    trials: Annotated[
        int | None, typer.Option(min=1, help="runs in all; not needed where only choices are searched")
    ] = None,
    model: Model = None,
    data: Data = None,
    task: Task = None,
    text: Text = None,
    label: Label = None,
    validation: Annotated[str | None, typer.Option(help="validation examples; else a tenth is held out")] = None,
    budget: Annotated[
        float | None,
        typer.Option(parser=_share, metavar="SHARE", help="of each trial, as a share of full fine-tuning's FLOPs"),
    ] = None,
    preset: Preset = None,
    granularity: Granularity = None,
    epochs: Annotated[float | None, typer.Option(help="of each trial, as in `rgft train`")] = None,
    batch_size: Annotated[int | None, typer.Option(help="examples per step  [default: 32]")] = None,
    max_length: MaxLength = None,
    config: File = None,
    overrides: Overrides = None,
    seed: Seed = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the sweep in the folder")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Search settings by validation loss, on one activation cache shared by all trials.

    Trials share activations where layers are frozen from the first step on, e.g. with --set mask.frozen_fraction=0.5
    --set warmup_fraction=0.
    """
    from rgft.cli.failures import reported

    with reported(quiet=quiet):
        from rgft.cli import sweep as sweeping

        report = sweeping.sweep(
            file=config, overrides=overrides or (), dimensions=[sweeping.Dimension.parse(item) for item in search],
            flags={"model": model, "data": data, "task": task, "text": tuple(text) if text else None, "label": label,
                   "validation": validation, "epochs": epochs, "batch_size": batch_size, "max_length": max_length,
                   "seed": seed},
            rgft_flags={"budget": budget, "preset": preset, "granularity": granularity}, trials=trials, output=output,
            resume=resume, console=Console(stderr=True), quiet=quiet,
        )  # fmt: skip
        _show(report, sweeping.show, as_json=as_json, quiet=quiet)


@app.command("map")
def map_errors(
    model: Model = None,
    data: Data = None,
    task: Task = None,
    text: Text = None,
    label: Label = None,
    probes: Annotated[int, typer.Option(min=1, help="looks at the data")] = 8,
    probe_size: Annotated[int, typer.Option(min=2, help="examples per probe")] = 32,
    preset: Preset = None,
    granularity: Granularity = None,
    signal: Annotated[str | None, typer.Option(help="what is measured, e.g. grad_norm; else the preset's")] = None,
    lr: Annotated[
        float | None, typer.Option(help="learning rate, of signals that score a step  [default: by rule]")
    ] = None,
    max_length: MaxLength = None,
    config: File = None,
    overrides: Overrides = None,
    seed: Seed = None,
    png: Annotated[Path | None, typer.Option(help="write components × probes as a picture")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure where a model errs: a score per component. Trains nothing."""
    from rgft.cli.failures import reported

    with reported(quiet=quiet):
        from rgft.cli import mapping
        from rgft.cli.preparing import device_of, prepare_task
        from rgft.cli.request import read_request
        from rgft.errors import ConfigError, RGFTWarning

        with warnings.catch_warnings():
            # Whether scalings and masks have an effect does not matter here: nothing is decided.
            warnings.simplefilter("ignore", RGFTWarning)
            request = read_request(
                file=config, overrides=overrides or (),
                flags={"model": model, "data": data, "task": task, "text": tuple(text) if text else None,
                       "label": label, "lr": lr, "max_length": max_length, "seed": seed},
                rgft_flags={"preset": preset, "granularity": granularity, "signal": signal},
            )  # fmt: skip
        settings = request.settings
        if settings.lr == "search" or isinstance(settings.lr, tuple):
            raise ConfigError(f"lr: a map is measured at one learning rate, found {settings.lr}")
        measured = mapping.measure(
            prepare_task(settings), request.config, probes=probes, probe_size=probe_size,
            lr=None if settings.lr == "auto" else settings.lr, device=device_of(settings.device),
        )  # fmt: skip
        if png is not None:
            mapping.write_picture(measured, png)
        if as_json:
            typer.echo(json.dumps(measured.to_dict()))
        elif not quiet:
            mapping.show(measured, Console())


@app.command("plan")
def plan_costs(
    model: Annotated[str, typer.Option(help="hub name, folder or config.json; weights are not needed")],
    task: Annotated[
        str, typer.Option(help="text-classification, language-modelling or image-classification")
    ] = "text-classification",
    batch_size: Annotated[int, typer.Option(min=1, help="examples per step")] = 32,
    tokens: Annotated[int, typer.Option(min=2, help="tokens per example")] = 128,
    examples: Annotated[int, typer.Option(min=1, help="of the training set")] = 10_000,
    epochs: Annotated[float, typer.Option(min=0.01, help="passes over them")] = 3.0,
    labels: Annotated[int, typer.Option(min=2, help="classes")] = 2,
    dtype: Annotated[str, typer.Option(help="of the weights: fp32 or bf16")] = "fp32",
    budget: Annotated[
        float | None, typer.Option(parser=_share, metavar="SHARE", help="of full fine-tuning's FLOPs")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="say what fits into so much, e.g. 8GB, and what RGFT would do to fit")
    ] = None,
    low_rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="also say what layers cost by low-rank pairs of this rank, below each cut  [default: as in `rgft "
            "train`, 8 with language models]",
        ),
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="as in `rgft train`: adamw, sgd, adafactor, lion, muon, schedule-free, adamw-8bit")
    ] = "adamw",
    device: Annotated[
        str, typer.Option(help="whose rates the times are for: auto, cpu, cuda, …; none: no times")
    ] = "auto",
    watts: Watts = None,
    as_json: AsJson = False,
) -> None:
    """Say what full fine-tuning, LoRA and RGFT would cost: FLOPs, memory, time, energy.

    Needs no weights and trains nothing.
    """
    from rgft.cli.failures import reported

    with reported():
        from rgft.cli import planning
        from rgft.cli.preparing import device_of
        from rgft.errors import ConfigError
        from rgft.sizes import parsed_bytes

        if dtype not in planning.DTYPES:
            raise ConfigError(f"dtype: expected {' or '.join(planning.DTYPES)}, found {dtype!r}")
        if budget is not None and not 0.0 < budget <= 1.0:
            raise ConfigError(f"budget: expected a share of full fine-tuning's FLOPs, 0 < budget <= 1, found {budget}")
        found = planning.plan(
            model=model, task=task, rows=batch_size, tokens=tokens, examples=examples, epochs=epochs, labels=labels,
            dtype=dtype, budget=budget, memory=None if memory is None else parsed_bytes(memory, setting="memory"),
            device=None if device == "none" else device_of(device), low_rank=low_rank, watts=watts,
            optimizer=optimizer,
        )  # fmt: skip
        _show(found, planning.show, as_json=as_json, quiet=False)


@app.command()
def env(as_json: AsJson = False) -> None:
    """Versions, processor, memory and accelerators (for bug reports and result files)."""
    from rgft.cli.failures import reported

    with reported():
        from rgft.cli import summary
        from rgft.telemetry.environment import environment

        _show(environment(), summary.show_nested, as_json=as_json, quiet=False)


def _show(data: dict[str, Any], show: Any, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        typer.echo(json.dumps(data))
    elif not quiet:
        show(data, Console())


def main() -> None:
    """The entry point."""
    app()

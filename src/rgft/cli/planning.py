"""`rgft plan`: what full fine-tuning, LoRA and RGFT would cost on a model, without its weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from rgft.assembly import attach_pairs, find_pair_sites
from rgft.cli.memory_rows import MemoryRows, limit_text
from rgft.cli.planned_optimizer import planned_optimizer
from rgft.cli.preparing import silence_transformers
from rgft.config import Config
from rgft.cost.memory import StepMemory
from rgft.cost.rates import measure_rates, product_shapes
from rgft.errors import ConfigError, DataError
from rgft.execution.binding import Binding
from rgft.execution.low_rank import LowRank
from rgft.execution.views import bind
from rgft.forecast import Forecast, Length, forecast
from rgft.model_defaults import usual_pairs
from rgft.optimizer import kind_named
from rgft.partition import partition
from rgft.tasks.models import require_causal_kind, require_positions
from rgft.telemetry.energy import DEFAULT_WATTS, OTHER_WATTS, energy_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Kind = Literal["text-classification", "language-modelling", "image-classification"]

FROZEN = (0.0, 0.25, 0.5, 0.75)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def empty_model(name: str, task: str, *, labels: int, dtype: torch.dtype) -> nn.Module:
    """The model of that name without weights, on the meta device.

    Args:
        name: hub name, folder, or configuration file (`config.json`).
        task: what it is for.
        labels: classes.
        dtype: of the weights.

    Raises:
        DataError: its configuration cannot be read.
        ConfigError: the task is unknown.
    """
    import transformers

    factories = {
        "text-classification": transformers.AutoModelForSequenceClassification,
        "language-modelling": transformers.AutoModelForCausalLM,
        "image-classification": transformers.AutoModelForImageClassification,
    }
    if task not in factories:
        raise ConfigError(f"task: expected one of {', '.join(factories)}, found {task!r}")
    silence_transformers()
    settings = {} if task == "language-modelling" else {"num_labels": labels}
    try:
        config = transformers.AutoConfig.from_pretrained(str(Path(name).expanduser()) if Path(name).exists() else name)
        for key, value in settings.items():
            setattr(config, key, value)
        with torch.device("meta"):
            return factories[task].from_config(config, dtype=dtype).train()
    except Exception as error:  # the hub's client and the configurations raise many kinds
        raise DataError(
            f"{name}: expected a hub name, a folder or a config.json of a model for {task}: "
            f"{type(error).__name__}: {error}"
        ) from error


def empty_batch(model: nn.Module, task: str, *, rows: int, tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A batch of that shape, without values."""
    with torch.device("meta"):
        if task == "image-classification":
            config: Any = model.config
            size = config.image_size if isinstance(getattr(config, "image_size", None), int) else 224
            pixels = torch.empty(rows, getattr(config, "num_channels", 3), size, size, dtype=dtype)
            return {"pixel_values": pixels, "labels": torch.zeros(rows, dtype=torch.long)}
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        return {"input_ids": ids, "labels": ids if task == "language-modelling" else ids[:, 0]}


def plan(
    *, model: str, task: str, rows: int, tokens: int, examples: int, epochs: float, labels: int = 2,
    dtype: str = "fp32", budget: float | None = None, memory: int | None = None, rank: int = 8,
    device: str | None = None, low_rank: int | None = None, watts: float | None = None, optimizer: str = "adamw",
) -> dict[str, Any]:  # fmt: skip
    """Forecasts of all ways of training, fit for JSON.

    Args:
        model, task, labels, dtype: see `empty_model`.
        rows, tokens: of a batch.
        examples: of the training set.
        epochs: passes over them.
        budget: share of full fine-tuning's FLOPs; then each row says how many epochs it buys.
        memory: limit in bytes; then each row says whether it fits as it is, and `under_limit` what RGFT would do.
        rank: of LoRA, on all linear layers.
        device: whose rates are measured for the times; None: no times, and no energy.
        low_rank: rank of pairs in place of dense dW, for rows of their own; None: as `rgft train` has them where
            nothing is said.
        watts: its power, for energy; None: typical of its type.
        optimizer: by name; see `rgft.optimizer.KINDS`.

    Raises:
        DataError, ConfigError: see `empty_model`; the model has fewer positions than `tokens`, or is to predict tokens
            and is an encoder; no optimizer has that name.
        OptimizerError: its package is not installed.
        PartitionError: the model's layers cannot be found.
    """
    kind, stepping = DTYPES[dtype], kind_named(optimizer)
    whole = empty_model(model, task, labels=labels, dtype=kind)
    if task == "language-modelling":
        require_causal_kind(model, whole)
    if task != "image-classification":
        require_positions(whole, tokens, setting="tokens")
    batch = empty_batch(whole, task, rows=rows, tokens=tokens, dtype=kind)
    length = Length(steps=math.ceil(examples / rows), epochs=epochs)
    rates = None
    if device is not None:
        shapes = product_shapes(whole, lambda: _loss(whole, batch))
        rates = measure_rates(torch.device(device), kind, shapes, optimizer=stepping)
    parts = partition(whole)
    if low_rank is None and (usual := usual_pairs(Config().resolved(), whole, parts)) is not None:
        low_rank = usual.rank
    of_whole = planned_optimizer(stepping, whole, parts)
    found = forecast(
        whole, parts, batch, length=length, loss=_loss, frozen_fractions=FROZEN, rates=rates, optimizer=of_whole
    )  # fmt: skip
    full = found[0]
    passes = full.step_flops - full.optimizer_flops
    with_lora = with_pairs = None
    adapted = _with_lora(empty_model(model, task, labels=labels, dtype=kind), rank)
    if adapted is not None:
        parts = partition(adapted, "adapter")
        with_lora = adapted, planned_optimizer(stepping, adapted, parts)
        found[1:1] = forecast(
            adapted, parts, batch, length=length, loss=_loss, frozen_fractions=(0.0,), rates=rates,
            reference_flops=passes, name="lora", optimizer=with_lora[1],
        )  # fmt: skip
    if low_rank is not None:
        model_with_pairs = empty_model(model, task, labels=labels, dtype=kind)
        parts = partition(model_with_pairs)
        binding = bind(model_with_pairs, parts)
        paired = _with_pairs(model_with_pairs, binding, low_rank)
        with_pairs = paired, planned_optimizer(stepping, model_with_pairs, binding)
        found += forecast(
            model_with_pairs, parts, batch, length=length, loss=_loss, frozen_fractions=FROZEN, rates=rates,
            reference_flops=passes, low_rank=paired, optimizer=with_pairs[1],
        )  # fmt: skip
        paired.be_trained(frozenset(parts.names))
    if watts is not None and not 0.0 < watts < math.inf:
        raise ConfigError(f"watts: expected a number > 0, found {watts:g}")
    if device is not None and watts is None:
        watts = DEFAULT_WATTS.get(torch.device(device).type, OTHER_WATTS)
    limited = (
        None
        if memory is None
        else MemoryRows(
            memory, (whole, of_whole), with_lora, batch, rows=rows, tokens=tokens, loss=_loss, paired=with_pairs
        )
    )
    return {
        "model": model, "task": task, "dtype": dtype, "rows": rows, "tokens": tokens, "examples": examples,
        "optimizer": optimizer, "epochs": epochs, "steps": round(length.steps * epochs), "budget": budget,
        "parameters": sum(p.numel() for p in whole.parameters()),
        "rates": None if rates is None else {"device": device, **rates.to_dict()},
        "watts": None if rates is None else watts, "memory": memory,
        "under_limit": None if limited is None else limited.under_limit(),
        "ways": [
            {
                **row.to_dict(),
                "estimated_joules": None if row.seconds is None or watts is None else row.seconds * watts,
                "epochs_in_budget": _epochs_in(row, full, length, budget),
                **({} if limited is None else limited.of(row)),
            }
            for row in found
        ],
    }  # fmt: skip


def _loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def _with_lora(model: nn.Module, rank: int) -> nn.Module | None:
    """The model with LoRA on its linear layers; None without PEFT, or without linear layers to adapt."""
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        return None
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.count(".") > 2}
    if not names:
        return None
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of one library about the other's names
        return get_peft_model(model, LoraConfig(r=rank, target_modules=sorted(names)))  # type: ignore[arg-type]


def _with_pairs(model: nn.Module, binding: Binding, rank: int) -> LowRank:
    """Pairs on all layers, as `rgft train --low-rank` has them."""
    config = Config(update={"low_rank": {"rank": rank}})
    pairs = attach_pairs(config, model, binding, find_pair_sites(config, model, binding.partition, None))
    assert pairs is not None
    return pairs


def _epochs_in(row: Forecast, full: Forecast, length: Length, budget: float | None) -> float | None:
    """How many epochs the budget buys."""
    if budget is None:
        return None
    allowed = budget * full.flops / full.fraction_of_full  # a budget is a share of what passes spend
    first, later = row.step_flops * length.steps, row.cached_step_flops * length.steps
    return allowed / first if allowed < first else 1.0 + (allowed - first) / later


def show(found: Mapping[str, Any], console: Console) -> None:
    """Two tables, of costs and of memory, with a row per way of training; they fit 80 columns."""
    console.print(
        f"{found['model']}: {found['parameters']:,} parameters in {found['dtype']}; {found['examples']:,} examples × "
        f"{found['epochs']:g} epochs, {found['steps']:,} steps of {found['rows']} × {found['tokens']} by "
        f"{found['optimizer']}"
        + ("" if found["budget"] is None else f"; epochs: how many {found['budget']:.0%} of full fine-tuning's buys")
    )
    cost, held = (_Columns(found["ways"]) for _ in range(2))
    cost.add("trained", lambda way: _count(way["trained_parameters"]))
    cost.add("FLOPs", lambda way: f"{way['flops']:.2g}")
    cost.add("of full", lambda way: f"{way['fraction_of_full']:.0%}")
    if found["rates"] is not None:
        cost.add("time", lambda way: _time(way["seconds"]))
        cost.add("energy", lambda way: energy_text(way["estimated_joules"]))
    if found["budget"] is not None:
        cost.add("epochs", lambda way: f"{way['epochs_in_budget']:.1f}")
    held.add("memory", lambda way: _size(_step_memory(way).total))
    held.add("(saved)", lambda way: _size(way["memory"]["activations"]))
    held.add("cache", lambda way: _size(way["cache_bytes"]) if way["cache_bytes"] else "–")
    for table in (cost.table, held.table):
        console.print()
        console.print(table)
    console.print()
    console.print(
        "RGFT: by share of frozen layers. FLOPs: of products. Memory: of a step; (saved): activations kept for "
        "backward, less with fused attention. Cache: of the frozen prefix, all examples. Time: at this machine's "
        "rates of products, elementwise work and the optimizer."
        + ("" if found["watts"] is None else f" Energy: estimated, time × {found['watts']:g} W."),
        highlight=False,
    )
    if found["memory"] is not None:
        console.print(
            limit_text(found["ways"], found["under_limit"], found["memory"], _title), highlight=False, soft_wrap=True
        )


class _Columns:
    """A table with a row per way of training. All figures side by side are wider than a terminal, so there are two."""

    def __init__(self, ways: Sequence[Mapping[str, Any]]) -> None:
        self._columns = [("way", [_title(way) for way in ways])]
        self._ways = ways

    def add(self, name: str, cell: Callable[[Mapping[str, Any]], str]) -> None:
        self._columns.append((name, [cell(way) for way in self._ways]))

    @property
    def table(self) -> Table:
        from rich.table import Table

        table = Table(box=None, padding=(0, 1), pad_edge=False)
        names, cells = zip(*self._columns, strict=True)
        for index, name in enumerate(names):
            table.add_column(name, justify="right" if index else "left", no_wrap=True)
        for row in zip(*cells, strict=True):
            table.add_row(*row)
        return table


def _step_memory(way: Mapping[str, Any]) -> StepMemory:
    return StepMemory(**{key: way["memory"][key] for key in ("weights", "gradients", "moments", "activations")})


def _title(way: Mapping[str, Any]) -> str:
    if way["name"] == "lora":
        return "LoRA"
    if way["rank"]:
        return f"RGFT {way['frozen_fraction']:.0%}, pairs of {way['rank']}"
    return f"RGFT {way['frozen_fraction']:.0%}" if way["frozen_fraction"] else "full"


def _count(number: float) -> str:
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.3g} M"


def _size(amount: float) -> str:
    value, unit = (amount / 2**30, "GiB") if amount >= 2**30 else (amount / 2**20, "MiB")
    return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"


def _time(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    if hours >= 100:
        return f"{hours:,} h"
    return f"{hours} h {rest // 60:02} m" if hours else f"{rest // 60} m {rest % 60:02} s"

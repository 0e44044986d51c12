"""`rgft map`: measures where a model errs, and trains nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rgft.assembly import build_signal
from rgft.cli.progress import short
from rgft.config import Config
from rgft.errors import ConfigError, DataError
from rgft.execution.views import bind
from rgft.learning_rate import usual_rate
from rgft.measurement import Measurement
from rgft.partition import partition
from rgft.tasks.base import PreparedTask

if TYPE_CHECKING:
    from rich.console import Console

BAR_WIDTH = 16


@dataclass(frozen=True, kw_only=True)
class MapRow:
    """A component's score: mean over the probes, its standard error, and its share of all positive scores."""

    component: str
    kind: str
    depth: int
    parameters: int
    score: float
    standard_error: float | None
    share: float | None


@dataclass(frozen=True, kw_only=True)
class MeasuredMap:
    """What was measured: the signal's name, a row per component, and each probe's own scores."""

    signal: str
    rows: tuple[MapRow, ...]
    history: tuple[tuple[int, Mapping[str, float]], ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "signal": self.signal, "probes": len(self.history), "components": [asdict(row) for row in self.rows],
            "history": [{"probe": number, "scores": dict(scores)} for number, scores in self.history],
        }  # fmt: skip


def measure(
    task: PreparedTask, config: Config, *, probes: int, probe_size: int, lr: float | None, device: str = "cpu",
    on_probe: Callable[[int], object] = lambda number: None,
) -> MeasuredMap:  # fmt: skip
    """Scores every component on `probes` draws of `probe_size` training examples; the model is left as it was.

    Signals of the optimizer's step judge the step that a fresh AdamW would make on one half, by the other half.

    Args:
        lr: learning rate of that step; None: by rule (`rgft.learning_rate`).
        on_probe: called with the number of each finished probe, from 1.

    Raises:
        ConfigError: the configuration measures nothing.
        DataError: fewer than two training examples.
    """
    signal = build_signal(config)
    if signal is None or config.signal is None:
        raise ConfigError(f"signal: expected something to measure, found none (preset {config.preset!r})")
    if len(task.train) < 2:
        raise DataError(f"a probe needs at least two examples, found {len(task.train)}")
    model = task.model.to(device)
    was_training = model.training
    binding = bind(model, partition(model, config.granularity, ffn_blocks=config.ffn_blocks))
    try:

        def loss(model: nn.Module, batch: Any) -> Tensor:
            return task.loss(model, {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}).mean()

        # The running map is not used: here every probe counts alike.
        measurement = Measurement(model, binding, signal, loss, beta=0.9, bias_correction=True)
        if signal.needs_update:
            groups = [p for _, parameters in binding for p in parameters]
            measurement.set_optimizer(torch.optim.AdamW(groups, lr=usual_rate(model) if lr is None else lr))
        draws = random.Random(f"{config.seed}/map")
        history: list[tuple[int, Mapping[str, float]]] = []
        for number in range(1, probes + 1):
            chosen = draws.sample(range(len(task.train)), min(probe_size, len(task.train)))
            half = len(chosen) // 2 if signal.needs_update else 0
            own = task.collate([task.train[i] for i in chosen[:half]]) if half else None
            batch = task.collate([task.train[i] for i in chosen[half:]])
            torch.manual_seed(config.seed + number)
            history.append((number, measurement.probe(batch, own=own, step=number)))
            on_probe(number)
        components = binding.partition.components
    finally:
        binding.restore()
        model.train(was_training)
    return _summary(config.signal.name, components, history)


def _summary(signal: str, components: Any, history: list[tuple[int, Mapping[str, float]]]) -> MeasuredMap:
    scores = {c.name: [probe[c.name] for _, probe in history if c.name in probe] for c in components}
    means = {name: sum(values) / len(values) for name, values in scores.items() if values}
    positive = sum(max(0.0, value) for value in means.values())
    rows = tuple(
        MapRow(
            component=c.name,
            kind=c.kind,
            depth=c.depth,
            parameters=c.numel,
            score=means[c.name],
            standard_error=_standard_error(scores[c.name]),
            share=max(0.0, means[c.name]) / positive if positive > 0 else None,
        )
        for c in components
        if c.name in means
    )
    return MeasuredMap(signal=signal, rows=rows, history=tuple(history))


def _standard_error(values: list[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)) ** 0.5


def show(measured: MeasuredMap, console: Console) -> None:
    """Prints a table with a bar per component; a negative score's bar is hatched."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("component", overflow="fold", min_width=14)
    for name in ("kind", "depth", "score", "±", "share"):
        table.add_column(name, no_wrap=True, justify="left" if name == "kind" else "right")
    table.add_column("", no_wrap=True)
    largest = max((abs(row.score) for row in measured.rows), default=0.0) or 1.0
    for row in measured.rows:
        error = "" if row.standard_error is None else f"{row.standard_error:.0e}"
        share = "" if row.share is None else f"{row.share:.0%}"
        table.add_row(
            short(row.component), row.kind, str(row.depth), f"{row.score:.2e}", error, share, bar(row.score, largest)
        )
    console.print(table)
    console.print(f"{measured.signal}, mean of {len(measured.history)} probes", highlight=False)


def bar(score: float, largest: float, *, width: int = BAR_WIDTH) -> str:
    """A bar whose length is |score| / largest of `width`; negative scores are hatched."""
    return ("█" if score >= 0 else "░") * round(width * abs(score) / largest)


def write_picture(measured: MeasuredMap, path: Path) -> Path:
    """Writes components × probes as PNG; see `draw_error_map`."""
    from rgft.cli.picture import draw_error_map

    return draw_error_map(measured.history, path)

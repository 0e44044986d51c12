"""What `rgft plan` says about a memory limit: which ways of training fit, and what RGFT would do to fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from rgft.cli.preview import memory_text
from rgft.components import Partition
from rgft.config import Config
from rgft.errors import BudgetError
from rgft.execution.low_rank import LowRank
from rgft.forecast import Forecast
from rgft.memory import MemoryForecast, Setup, Wish, choose, kept_steps
from rgft.optimizer.state_bytes import state_bytes
from rgft.partition import partition
from rgft.probe_schedule import MAX_PROBE_SIZE
from rgft.sizes import size_text

Loss = Callable[[nn.Module, Any], Tensor]


class MemoryRows:
    """Forecasts under a limit.

    Args:
        limit: in bytes.
        whole, adapted: the model, and the model with LoRA, each with an optimizer of all of it; None: there is none.
        batch: of `rows` × `tokens`, the largest.
        loss: (model, batch) → scalar.
        paired: low-rank pairs, on a model of their own, everything trained, and its optimizer; None: there are none.
    """

    def __init__(
        self, limit: int, whole: tuple[nn.Module, Optimizer], adapted: tuple[nn.Module, Optimizer] | None, batch: Any,
        *, rows: int, tokens: int, loss: Loss, paired: tuple[LowRank, Optimizer] | None = None,
    ) -> None:  # fmt: skip
        def forecast(model: nn.Module, parts: Partition, optimizer: Optimizer, *, guided: bool) -> MemoryForecast:
            setup = Setup(state=state_bytes(optimizer))
            if guided:
                kept = kept_steps(optimizer, row_stride=Config().probe.row_stride)
                setup = replace(setup, steps_in_probe=1, kept_steps=kept)
            return MemoryForecast(
                model, parts, parameters=dict(model.named_parameters()), batch=batch, rows=rows, tokens=tokens,
                is_padded=False, loss=loss, setup=setup,
            )  # fmt: skip

        self.limit = limit
        model, optimizer = whole
        self._plain = forecast(model, partition(model), optimizer, guided=False)
        self._guided = forecast(model, partition(model), optimizer, guided=True)
        self._paired = self._adapted = None
        self._rank = 0
        if paired is not None:
            pairs, optimizer = paired
            self._rank = pairs.rank
            self._paired = forecast(pairs.model, pairs.as_trained, optimizer, guided=True)
        if adapted is not None:
            model, optimizer = adapted
            self._adapted = forecast(model, partition(model, "adapter"), optimizer, guided=False)

    def of(self, row: Forecast) -> dict[str, Any]:
        """What the way of training needs as it is, and whether that fits."""
        forecast = self._guided if row.frozen_fraction else self._plain
        if row.name == "lora" and self._adapted is not None:
            forecast = self._adapted
        if row.rank and self._paired is not None:
            forecast = self._paired
        frozen = round(row.frozen_fraction * len(forecast.partition.layers))
        needed = forecast.needed(frozen + 1 if frozen else 0, rows=forecast.rows, checkpointing=False)
        return {"needed": needed, "fits": needed <= self.limit}

    def under_limit(self) -> dict[str, Any]:
        """The plan that RGFT would choose, by low-rank pairs of `rank` where there are any, or why there is none."""
        try:
            plan = choose(self._paired or self._guided, self.limit, Wish(probe_size=MAX_PROBE_SIZE))
        except BudgetError as error:
            return {"rank": self._rank, "plan": None, "problem": str(error)}
        return {"rank": self._rank, "plan": asdict(plan), "problem": None}


def limit_text(
    ways: Sequence[Mapping[str, Any]], found: Mapping[str, Any], limit: int, title: Callable[[Mapping[str, Any]], str]
) -> str:
    """What fits, and what `under_limit` found, for people."""
    rows = [
        f"  {title(way)}: {size_text(way['needed'])}, {'fits' if way['fits'] else 'does not fit'}"
        for way in ways
    ]  # fmt: skip
    lines = [f"Under {size_text(limit)}, with temporaries and a margin, as it is:", *dict.fromkeys(rows)]
    form = f" by pairs of {found['rank']}" if found["rank"] else ""
    lines.append(
        f"RGFT{form}" + (f": {found['problem']}" if found["plan"] is None else f", {memory_text(found['plan'])}")
    )
    return "\n".join(lines)

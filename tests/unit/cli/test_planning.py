"""What `rgft plan` shows."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from rgft.cli.planning import show


def way(**changes: Any) -> dict[str, Any]:
    memory = {"weights": 2**34, "gradients": 2**34, "moments": 2**35, "activations": 2**36}
    return {
        "name": "rgft", "rank": 0, "frozen_fraction": 0.75, "trained_parameters": 1.24e9, "flops": 1.3e19,
        "fraction_of_full": 1.0, "memory": memory, "cache_bytes": 2**40, "seconds": 359_940.0,
        "estimated_joules": 9.99e8, "epochs_in_budget": 12.3, **changes,
    }  # fmt: skip


@pytest.mark.parametrize("is_timed", [True, False])
@pytest.mark.parametrize("budget", [None, 0.3])
def test_every_figure_can_be_read_at_80_columns(budget: float | None, is_timed: bool) -> None:
    ways = [way(), way(rank=16), way(name="lora", seconds=4e9, cache_bytes=0)]
    if not is_timed:
        ways = [{**row, "seconds": None, "estimated_joules": None} for row in ways]
    found = {
        "model": "large", "dtype": "bf16", "parameters": 1_240_000_000, "examples": 10_000, "epochs": 3, "steps": 939,
        "rows": 32, "tokens": 128, "optimizer": "adamw", "budget": budget, "rates": {} if is_timed else None,
        "watts": 65.0 if is_timed else None, "memory": None, "ways": ways,
    }  # fmt: skip
    output = io.StringIO()
    show(found, Console(file=output, width=80))
    shown = output.getvalue()
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    names = ["way", "trained", "FLOPs", "of full", *(["time", "energy"] if is_timed else [])]
    (costs,) = [line for line in shown.splitlines() if line.startswith("way") and "FLOPs" in line]
    assert " ".join(costs.split()) == " ".join([*names, *(["epochs"] if budget else [])])
    (paired,) = [line for line in shown.splitlines() if line.startswith("RGFT 75%, pairs of 16") and "e+19" in line]
    assert "1.24 B  1.3e+19     100%" in paired
    assert ("99 h 59 m" in paired) == is_timed
    assert ("12.3" in paired) == (budget is not None)
    assert "RGFT 75%, pairs of 16  128 GiB   64 GiB  1,024 GiB" in shown

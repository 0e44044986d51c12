from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rgft.bench.acting import acted
from rgft.bench.frontier import frontiers
from rgft.bench.table import markdown
from rgft.cli.app import app
from tests.unit.bench.test_finals import row
from tests.unit.bench.test_table import write

ON = {"step": 0, "multipliers": {"a": 1.0, "b": 1.0}, "cut": 0, "periods": {}, "low_rank": None}


def result(method: str = "proposal_a", **more: Any) -> dict[str, Any]:
    flops = {"fraction_of_full": 0.1, "fraction_of_same_batches": 1.0, **more.pop("flops", {})}
    return {"method": method, "steps": 18, "plans": [ON], "ledger": {"flops": flops, **more.pop("ledger", {})}, **more}


def test_everything_on_at_full_price_is_full_fine_tuning() -> None:
    assert not acted(result())
    assert not acted(result(plans=[]))
    assert not acted(result("example_pruning", plans=[], ledger={"data": {"examples_skipped": 0}}))
    assert not acted(result(plans=[ON, {**ON, "step": 18, "cut": 3}]))  # which no step was made under
    assert not acted(result("uniform_rate", followed={"lr_factor": 1.0}))


@pytest.mark.parametrize(
    "other",
    [
        result(plans=[ON, {**ON, "step": 17, "multipliers": {"a": 1.0, "b": 0.0}}]),
        result(plans=[{**ON, "multipliers": {"a": 1.0, "b": 1.1}}]),
        result(plans=[{**ON, "periods": {"b": 2}}]),
        result(plans=[{**ON, "low_rank": ["b"]}]),
        result(plans=[{**ON, "cut": 1}]),
        result("example_pruning", plans=[], ledger={"data": {"examples_skipped": 3}}),
        result(ledger={"data": {"targets_skipped": 3}}),
        result(config={"update": {"average_last": 0.3}}),
        result("uniform_rate", followed={"lr_factor": 0.9}),
        result(flops={"fraction_of_same_batches": 0.98}),  # padding was left out
        result(flops={"fraction_of_same_batches": 1.01}),  # something was measured
        {**result(), "ledger": {"flops": {}}},  # nobody knows
        # They act by something else than a policy.
        result("full", plans=[]), result("lora", plans=[]), result("lora_top"), result("galore", plans=[]),
        result("fait", plans=[]), result("shira", plans=[]), result("of another time"),
    ],
)  # fmt: skip
def test_whatever_else_it_did_shows(other: dict[str, Any]) -> None:
    assert acted(other)


def test_tables_mark_rows_of_which_no_run_acted(tmp_path: Path) -> None:
    for seed in range(2):
        for label, acting in (("proposal_a", False), ("random", bool(seed))):
            told = result(label) if not acting else result(label, plans=[{**ON, "cut": 1}])
            write(tmp_path, label, seed, 0.4, method=label, plans=told["plans"], ledger=told["ledger"])
    table = markdown(tmp_path)
    assert row(table, "proposal_a").startswith("| proposal_a (2 seeds; did not act in so short a run) |")
    assert row(table, "random").startswith("| random (2 seeds) |")
    (frontier,) = frontiers(tmp_path, metric="loss").values()
    assert {point.label: point.acted for point in frontier.points} == {"proposal_a": False, "random": True}
    shown = CliRunner().invoke(app, ["bench", "frontier", str(tmp_path)]).output
    assert shown.count("(did not act)") == 1

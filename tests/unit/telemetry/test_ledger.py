from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch

from rgft.cost import StepCost
from rgft.errors import ConfigError
from rgft.telemetry import ledger as module
from rgft.telemetry.ledger import Ledger, Skipped

FULL = StepCost(forward=100.0, dx=90.0, dw=100.0)
HALF = StepCost(forward=40.0, dx=30.0, dw=20.0, head=12.0)


def small() -> Ledger:
    """Two steps, the first of two passes; a probe, a readout, a filling, a search, an
    evaluation, an audit. All by hand below."""
    ledger = Ledger()
    ledger.add_probe(flops=60.0, seconds=0.5)
    ledger.add_scoring(seconds=0.125)
    ledger.add_readout(flops=3.0, seconds=0.125)
    ledger.add_data(seconds=0.5)
    ledger.add_forward(full=FULL, spent=FULL, rows=4, tokens=40, padding_tokens=10)
    ledger.add_forward(full=FULL, spent=HALF, rows=4, tokens=40, padding_tokens=6)
    ledger.end_step(seconds=2.0, updated={"a": 10, "b": 5})
    ledger.add_fill(flops=7.0, seconds=0.25)
    ledger.add_search(flops=5.0, seconds=0.125)
    ledger.add_forward(full=FULL, spent=HALF, rows=2, tokens=16, padding_tokens=0)
    ledger.end_step(seconds=1.0, updated={"b": 5, "c": 1})
    ledger.add_evaluation(seconds=9.0, flops=1000.0)
    ledger.add_audit(counted=200.0, modelled=201.0)
    return ledger


def test_pairs_are_an_axis_of_their_own() -> None:
    """What they cost is no saving of another axis gone wrong; rows add up, also where positions are skipped."""
    ledger = Ledger()
    planned = StepCost(forward=100.0, dx=80.0, dw=5.0, pairs=30.0)
    spent = StepCost(forward=60.0, dx=50.0, dw=3.0, pairs=18.0, recomputed=8.0)
    ledger.add_forward(full=FULL, spent=spent, all_positions=planned, rows=4, tokens=40)
    assert (ledger.forward_cached_flops, ledger.dx_truncated_flops, ledger.dw_skipped_flops) == (0.0, 10.0, 95.0)
    assert (ledger.unread_flops, ledger.pair_flops) == (72.0, 18.0)
    assert ledger.spent_flops == spent.total == 139.0
    rows = ledger.as_rows()
    assert sum(flops for _, flops, _ in rows[:-1]) == rows[-1][1]
    saved = ledger.summary()["flops"]["saved"]
    assert saved["net"] == FULL.total - spent.total


def test_every_figure_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "peak_memory_bytes", lambda: 1234)
    summary = small().summary(full_flops=10_000.0)
    assert summary == {
        "steps": 2,
        "flops": {
            "spent": 290 + 90 + 90 + 60 + 3 + 7 + 5, "full": 10_000.0, "fraction_of_full": 0.0545,
            "same_batches_in_full": 870.0, "fraction_of_same_batches": 545 / 870,
            "forward": 180.0, "dx": 150.0, "dw": 140.0, "head_at_targets": 24.0, "probes": 60.0, "readout": 3.0,
            "cache_filling": 7.0, "search": 5.0, "recomputed": 0.0, "low_rank_pairs": 0.0, "optimizer": 0.0,
            "scoring_fraction": 60 / 545,
            "saved": {
                "dw_skipped": 160.0, "dx_truncated": 120.0, "forward_cached": 120.0, "unread_positions": 0.0,
                "padding": 0.0,
                "examples_skipped": 0.0, "targets_skipped": 0.0,
                "added": 75.0, "net": 325.0,
            },
            "evaluation": 1000.0,
        },
        "audit": {"audits": 1, "counted": 200.0, "modelled": 201.0, "error": pytest.approx(0.005)},
        "seconds": {
            "step": 3.0, "probe": 0.75, "fill": 0.25, "search": 0.125, "data": 0.5, "evaluation": 9.0, "total": 4.625,
        },
        "energy": {
            "joules": {"total": 0}, "kwh": 0.0, "co2_grams": 0.0, "carbon_intensity": 473.0,
            "source": None, "notes": [],
        },
        "memory": {"peak_bytes": 1234, "peak_accelerator_bytes": small().peak_accelerator_bytes or None},
        "data": {"passes": 3, "examples": 10, "tokens": 96, "padding_tokens": 16, "examples_skipped": 0,
                 "targets_skipped": 0, "targets_are_biased": False},
        "parameters": {
            "updated_in_last_step": 6, "updated_per_step": 10.5, "updated_in_all": 16,
            "steps_by_component": {"a": 1, "b": 2, "c": 1},
        },
    }  # fmt: skip
    json.dumps(summary, allow_nan=False)


def test_padding_that_no_pass_computed_by_hand() -> None:
    ledger = Ledger()
    ledger.add_padding(flops=25.0)
    ledger.add_forward(full=FULL, spent=HALF, rows=4, tokens=40)
    assert ledger.reference_flops == FULL.total + 25.0
    rows = {what: flops for what, flops, _ in ledger.as_rows()}
    assert rows["padding"] == -25.0
    assert sum(flops for what, flops in rows.items() if what != "spent") == rows["spent"] == HALF.total
    saved = ledger.summary()["flops"]["saved"]
    assert saved["padding"] == 25.0
    assert saved["net"] == FULL.total + 25.0 - HALF.total


def skipping() -> Ledger:
    """A pass over a batch of ten, of which four rows, and then some targets of the others, were skipped."""
    ledger = Ledger()
    ledger.add_forward(full=FULL, spent=HALF, rows=10, tokens=40)
    ledger.add_skipped(
        Skipped(rows=4, row_targets=9, targets=3, is_biased=True), tokens=16,
        examples=StepCost(forward=16.0, dx=12.0, dw=8.0, head=4.0),
        targets=StepCost(forward=2.0, dx=2.0, dw=2.0, head=6.0),
    )  # fmt: skip
    return ledger


def test_what_is_skipped_by_hand() -> None:
    ledger = skipping()
    assert (ledger.examples, ledger.examples_skipped, ledger.targets_skipped, ledger.tokens) == (6, 4, 3, 24)
    assert (ledger.forward_flops, ledger.dx_flops, ledger.dw_flops) == (22.0, 16.0, 10.0)
    assert (ledger.examples_flops, ledger.targets_flops, ledger.head_flops) == (36.0, 6.0, 2.0)
    assert ledger.reference_flops == FULL.total
    rows = {what: flops for what, flops, _ in ledger.as_rows()}
    assert rows["targets skipped (BIASED)"] == -6.0
    assert sum(flops for what, flops in rows.items() if what != "spent") == rows["spent"] == 48.0
    summary = ledger.summary()
    assert FULL.total - summary["flops"]["saved"]["net"] == 48.0
    assert summary["data"]["targets_are_biased"]


def test_net_saving_is_what_separates_the_spent_from_the_reference() -> None:
    ledger = small()
    assert ledger.reference_flops - ledger.summary()["flops"]["saved"]["net"] == ledger.spent_flops


def test_rows_between_the_reference_and_the_total_add_up() -> None:
    rows = small().as_rows(full_flops=10_000.0)
    assert sum(flops for _, flops, _ in rows[:-1]) == rows[-1][1] == 545.0
    assert [share for _, _, share in rows] == [flops / 10_000.0 for _, flops, _ in rows]
    assert small().as_rows()[0][2] == 1.0
    assert {share for _, _, share in Ledger().as_rows()} == {None}


def test_random_runs_against_plain_lists() -> None:
    rng = random.Random(0)
    ledger, passes, probes, sets = Ledger(), [], [], []
    for _ in range(200):
        for _ in range(rng.randint(1, 3)):
            full = StepCost(forward=rng.random(), dx=rng.random(), dw=rng.random())
            spent = StepCost(forward=full.forward * rng.random(), dx=full.dx * rng.random(), dw=full.dw * rng.random())
            passes.append((full, spent))
            ledger.add_forward(full=full, spent=spent, rows=1, tokens=3)
        if rng.random() < 0.1:
            probes.append(rng.random())
            ledger.add_probe(flops=probes[-1], seconds=0.0)
        sets.append({name: ord(name) for name in "abcdef" if rng.random() < 0.5})
        ledger.end_step(seconds=0.1, updated=sets[-1])
    assert ledger.spent_flops == pytest.approx(sum(spent.total for _, spent in passes) + sum(probes))
    assert ledger.reference_flops == pytest.approx(sum(full.total for full, _ in passes))
    assert ledger.dw_skipped_flops == pytest.approx(sum(full.dw - spent.dw for full, spent in passes))
    assert ledger.dx_truncated_flops == pytest.approx(sum(full.dx - spent.dx for full, spent in passes))
    assert ledger.forward_cached_flops == pytest.approx(sum(full.forward - spent.forward for full, spent in passes))
    assert ledger.parameters_ever_updated == sum(ord(name) for name in set().union(*sets))
    assert ledger.updated_parameters == sum(sum(updated.values()) for updated in sets)
    assert ledger.component_steps == {name: sum(name in updated for updated in sets) for name in ledger.component_steps}


def test_padding_is_told_only_when_all_of_it_is_known() -> None:
    ledger = Ledger()
    ledger.add_forward(full=FULL, spent=FULL, rows=1, tokens=10, padding_tokens=2)
    assert ledger.summary()["data"]["padding_tokens"] == 2
    ledger.add_forward(full=FULL, spent=FULL, rows=1, tokens=10)
    assert ledger.summary()["data"]["padding_tokens"] is None


def test_an_empty_ledger_divides_by_nothing() -> None:
    summary = Ledger().summary()
    assert summary["flops"]["fraction_of_full"] is None
    assert summary["flops"]["fraction_of_same_batches"] is None
    assert summary["flops"]["scoring_fraction"] is None
    assert summary["audit"]["error"] is None


def test_a_resumed_ledger_is_the_same_bit_for_bit() -> None:
    ledger = small()
    ledger.add_probe(flops=0.1 + 0.2, seconds=1 / 3)
    restored = Ledger.from_dict(json.loads(json.dumps(ledger.to_dict())))
    assert restored == ledger
    for item in (ledger, restored):
        item.add_forward(full=FULL, spent=HALF, rows=1, tokens=1)
        item.add_fill(flops=0.7, seconds=0.1)
    restored.peak_memory_bytes = ledger.peak_memory_bytes
    assert restored == ledger


def test_a_saved_ledger_is_not_changed_by_going_on() -> None:
    ledger = small()
    saved = ledger.to_dict()
    before = json.dumps(saved)
    ledger.end_step(seconds=1.0, updated={"z": 3})
    restored = Ledger.from_dict(saved)
    restored.end_step(seconds=1.0, updated={"y": 3})
    assert json.dumps(saved) == before


def test_an_odd_state_is_refused_with_all_its_problems() -> None:
    data = small().to_dict()
    del data["steps"], data["seconds"]
    with pytest.raises(ConfigError) as caught:
        Ledger.from_dict({**data, "calories": 1.0})
    assert len(caught.value.problems) == 3


def test_peak_memory_grows_with_what_is_held_and_never_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger()
    ledger.observe_memory()
    assert ledger.peak_memory_bytes is not None
    assert ledger.peak_memory_bytes > 50 << 20  # torch alone is more
    held: Any = torch.ones((ledger.peak_memory_bytes + (64 << 20)) // 4)
    ledger.observe_memory()
    assert ledger.peak_memory_bytes >= held.numel() * 4
    peak = ledger.peak_memory_bytes
    monkeypatch.setattr(module, "peak_memory_bytes", lambda: 1)
    ledger.observe_memory()
    assert ledger.peak_memory_bytes == peak

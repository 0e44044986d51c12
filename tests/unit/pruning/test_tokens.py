from typing import Any

import pytest
import torch

from rgft.pruning import TokenPruning
from tests.unit.pruning.sampling import assert_unbiased

#: Two examples with four and three targets; the mean is 1.
LOSSES = torch.tensor([0.1, 0.2, 3.0, 0.3, 0.4, 2.5, 0.5])
IDS, COUNTS = [0, 1], [4, 3]


def pruning(**settings: Any) -> TokenPruning:
    made = TokenPruning(
        **{"probability": 0.4, "select": "unbiased", "threshold": 1.0, "off_for_last": 0.25, "seed": 0,
           "progress": lambda: 0.0, **settings}
    )  # fmt: skip
    made.observe(IDS, COUNTS, None, LOSSES)
    return made


def test_expectation_is_that_of_all_targets() -> None:
    made = pruning()
    found: list[torch.Tensor] = []
    for epoch in range(8000):
        made.begin_epoch(epoch)
        factors = made.factors(IDS, COUNTS)
        found.append(torch.ones(7) if factors is None else factors)
    draws = torch.stack(found)
    assert draws.unique().tolist() == pytest.approx([0.0, 1.0, 1 / 0.6])
    assert bool((draws[:, [2, 5]] == 1.0).all())
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    assert_unbiased((draws * values).sum(1, keepdim=True), values.sum()[None].double(), torch.tensor([19.0]))
    # Targets are drawn apart: also those of one example.
    assert abs(float(torch.corrcoef(draws[:, :2].T)[0, 1])) < 0.06


def test_top_keeps_the_highest_losses_alike() -> None:
    made = pruning(select="top")
    assert made.is_biased
    made.begin_epoch(1)
    factors = made.factors(IDS, COUNTS)
    assert factors is not None
    assert factors.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]  # int(.4 · 7) = 2 are skipped
    assert made.kept_share == pytest.approx(5 / 7)
    assert made.history[-1] == {"epoch": 1, "known": 7, "well_learnt": 2, "threshold": pytest.approx(0.3)}


def test_what_is_skipped_keeps_its_loss_and_comes_back() -> None:
    made = pruning(select="top")
    made.begin_epoch(1)
    factors = made.factors(IDS, COUNTS)
    made.observe(IDS, COUNTS, factors, torch.linspace(0.01, 0.05, 5))
    made.begin_epoch(2)
    later = made.factors(IDS, COUNTS)
    assert later is not None
    assert later[:2].tolist() == [1.0, 1.0]


def test_unknown_examples_changed_ones_and_the_last_part_are_whole() -> None:
    progress = [0.0]
    made = pruning(select="top", probability=0.9, progress=lambda: progress[0])
    assert made.factors(IDS, COUNTS) is None  # no epoch was begun with something known
    made.begin_epoch(1)
    assert made.factors([5], [4]) is None
    assert made.factors([0], [5]) is None  # it has another number of targets than when it was seen
    assert made.factors([0], [4]) is not None
    progress[0] = 0.8
    assert made.factors([0], [4]) is None
    assert made.kept_share == 1.0


@pytest.mark.parametrize("select", ["unbiased", "top"])
def test_a_restored_state_goes_on(select: str) -> None:
    made = pruning(select=select)
    made.begin_epoch(1)
    factors = made.factors(IDS, COUNTS)
    kept = 7 if factors is None else int((factors > 0).sum())
    made.observe(IDS, COUNTS, factors, torch.linspace(0.1, 2.0, kept))
    other = pruning(select=select)
    other.load_state_dict(made.state_dict())
    for epoch in (1, 2, 3):
        made.begin_epoch(epoch)
        other.begin_epoch(epoch)
        first, second = made.factors(IDS, COUNTS), other.factors(IDS, COUNTS)
        assert first is second is None or torch.equal(first, second)  # type: ignore[arg-type]
    assert other.history == made.history
    assert other.state_dict()["ids"] == [0, 1]

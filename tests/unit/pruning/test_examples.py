from collections.abc import Sequence

import pytest
import torch

from rgft.errors import DataError
from rgft.pruning import ExamplePruning
from rgft.pruning.draws import uniform
from tests.unit.pruning.sampling import assert_unbiased

LOSSES = [0.1, 0.2, 0.3, 3.0, 0.25, 2.0, 0.15, 0.05]  # the mean is .756: all but two are learnt well


class Run:
    """Its progress, to be set."""

    def __init__(self) -> None:
        self.progress = 0.0


def pruning(
    losses: Sequence[float] = LOSSES, probability: float = 0.4, *, run: Run | None = None, seed: int = 0,
    threshold: float = 1.0,
) -> ExamplePruning:  # fmt: skip
    run = run or Run()
    made = ExamplePruning(
        probability=probability, threshold=threshold, off_for_last=0.25, seed=seed, progress=lambda: run.progress
    )
    made.begin(len(losses))
    observe(made, losses)
    return made


def observe(made: ExamplePruning, losses: Sequence[float]) -> None:
    ids = range(len(losses))
    made.observe(ids, torch.tensor(losses), [1.0] * len(losses), [1] * len(losses))


def test_draws_depend_on_their_key_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(uniform(5, "a", 1, 2), uniform(5, "a", 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    others = [uniform(5, *key) for key in (("a", 1, 3), ("a", 2, 2), ("b", 1, 2))]
    assert all(not torch.equal(uniform(5, "a", 1, 2), other) for other in others)
    # Not the numbers of a generator that something else may have seeded alike.
    assert not torch.equal(uniform(5, 7), torch.rand(5, generator=torch.Generator().manual_seed(7)).double())


def test_what_was_never_seen_is_kept() -> None:
    made = ExamplePruning(probability=0.9, threshold=1.0, off_for_last=0.0, seed=0, progress=lambda: 0.0)
    made.begin(6)
    made.begin_epoch(0)
    assert made.kept(range(6)).is_whole
    assert made.kept_share == 1.0
    made.observe([0, 1, 2], torch.tensor([0.1, 0.2, float("inf")]), [1.0] * 3, [1] * 3)
    made.begin_epoch(1)
    assert made.history[-1] == {"epoch": 1, "known": 2, "well_learnt": 1, "threshold": pytest.approx(0.15)}
    for epoch in range(2, 30):
        made.begin_epoch(epoch)
        assert set(made.kept(range(6)).skipped) <= {0}


def test_well_learnt_is_a_loss_below_the_mean() -> None:
    made = pruning()
    made.begin_epoch(1)
    assert made.history[-1]["well_learnt"] == 6
    assert made.kept_share == pytest.approx(1 - 0.4 * 6 / 8)
    lower = pruning(threshold=0.25)
    lower.begin_epoch(1)
    assert lower.history[-1]["well_learnt"] == 3
    skipped: set[int] = set()
    for epoch in range(2, 60):
        made.begin_epoch(epoch)
        kept = made.kept(range(8))
        skipped |= set(kept.skipped)
        weights = dict(zip(kept.ids, kept.weights, strict=True))
        assert set(weights.values()) <= {1.0, 1.0 / 0.6}
        assert weights[3] == weights[5] == 1.0
        assert sorted((*kept.ids, *kept.skipped)) == list(range(8))
    assert skipped == {0, 1, 2, 4, 6, 7}


def test_a_draw_is_of_seed_epoch_and_example() -> None:
    """In which batch an example lies, and where, does not matter (next to one that is not learnt well)."""
    first, second = pruning(), pruning()
    for epoch in range(1, 20):
        first.begin_epoch(epoch)
        second.begin_epoch(epoch)
        apart = {i for ids in ([0, 1, 2, 3], [4, 5, 6, 7]) for i in first.kept(ids).skipped}
        together = set(second.kept([7, 6, 5, 4, 3, 2, 1, 0]).skipped)
        assert apart == together
    other = pruning(seed=1)
    other.begin_epoch(19)
    assert set(other.kept(range(8)).skipped) != together


@pytest.mark.parametrize(
    "batch", [[0, 1, 2, 3], [0, 1, 2, 4, 6, 7], [0, 1], [0]], ids=["mixed", "all well", "two", "one"]
)
def test_expectation_is_that_of_the_whole_batch(batch: list[int]) -> None:
    made, values = pruning(), torch.arange(1.0, 9.0)
    found: list[list[float]] = []
    for epoch in range(8000 if len(batch) > 1 else 50):
        made.begin_epoch(epoch)
        kept = made.kept(batch)
        assert kept.ids
        weight = dict(zip(kept.ids, kept.weights, strict=True))
        found.append([weight.get(i, 0.0) * float(values[i]) for i in batch])
        made.history.clear()
    draws = torch.tensor(found)
    each = values[batch].double()
    if len(batch) == 1:
        assert bool((draws == each).all())  # the one row there is, is always kept
        return
    assert bool(((draws.double().mean(0) - each).abs() <= 4.5 * draws.double().std(0) / len(draws) ** 0.5).all())
    well = sum(float(values[i]) for i in batch if i not in (3, 5))
    assert_unbiased(draws.sum(1, keepdim=True), each.sum()[None], torch.tensor([well]))


def test_nothing_is_skipped_in_the_last_part_and_never_again() -> None:
    run = Run()
    made = pruning(run=run, probability=0.8)
    made.begin_epoch(1)
    assert not made.has_ended()
    assert made.kept(range(8)).skipped
    run.progress = 0.75
    assert made.has_ended()
    assert made.kept(range(8)).is_whole
    assert made.kept_share == 1.0
    run.progress = 0.5  # a budget of seconds may be revised
    assert made.has_ended()


def test_an_epoch_is_decided_at_its_start_and_a_restored_state_goes_on() -> None:
    made = pruning()
    made.begin_epoch(1)
    decided = made.kept(range(8))
    observe(made, [5.0 - loss for loss in LOSSES])
    made.begin_epoch(1)
    assert made.kept(range(8)) == decided
    state = made.state_dict()
    other = ExamplePruning(probability=0.4, threshold=1.0, off_for_last=0.25, seed=0, progress=lambda: 0.0)
    other.load_state_dict(state)
    other.begin(8)
    assert other.kept(range(8)) == decided
    made.begin_epoch(2)
    other.begin_epoch(2)
    assert other.kept(range(8)) == made.kept(range(8))
    assert other.history == made.history
    assert other.history[-1]["well_learnt"] == 2
    with pytest.raises(DataError, match="8 training examples, found 9"):
        other.begin(9)


def test_variants_of_an_example_are_one_example() -> None:
    made = pruning()
    made.begin_epoch(3)
    plain, variants = made.kept(range(8)), made.kept([i + 8 * (i % 3) for i in range(8)])
    assert tuple(i % 8 for i in variants.ids) == plain.ids
    made.observe([8 + 3], torch.tensor([0.0]), [1.0], [1])
    made.begin_epoch(4)
    assert made.history[-1]["threshold"] == pytest.approx((sum(LOSSES) - 3.0) / 8)


def test_counts_are_remembered_and_scales_make_an_examples_own_loss() -> None:
    made = pruning([0.0] * 4)
    made.observe([1, 2], torch.tensor([4.0, 1.0]), [0.5, 3.0], [10, 2])
    assert made.counts([1, 2, 3]) == 13
    assert made.counts([]) == 0
    made.begin_epoch(1)
    assert made.history[-1]["threshold"] == pytest.approx((2.0 + 3.0) / 4)

from collections import Counter

import pytest
import torch

from rgft.batches import BatchStream, Subset
from rgft.errors import DataError
from rgft.pruning import ExamplePruning


def ids(stream: BatchStream) -> list[tuple[int, ...]]:
    return [indexed.ids for indexed in stream]


def stream(**kwargs: object) -> BatchStream:
    return BatchStream([torch.tensor(float(i)) for i in range(10)], batch_size=4, **{"epochs": 2, "seed": 1, **kwargs})  # type: ignore[arg-type]


def test_every_epoch_has_every_example_once_in_a_new_order() -> None:
    batches = ids(stream())
    assert [len(b) for b in batches] == [4, 4, 2, 4, 4, 2]
    first, second = [i for b in batches[:3] for i in b], [i for b in batches[3:] for i in b]
    assert Counter(first) == Counter(second) == Counter(range(10))
    assert first != second
    assert ids(stream()) == batches
    assert ids(stream(seed=2)) != batches


def test_rows_are_the_examples_of_the_ids() -> None:
    for indexed in stream():
        assert torch.equal(indexed.batch, torch.tensor(indexed.ids, dtype=torch.float32))


@pytest.mark.parametrize("position", [1, 3, 5])
def test_resuming_gives_the_rest(position: int) -> None:
    whole, resumed = ids(stream()), stream()
    resumed.position = position
    assert ids(resumed) == whole[position:]


def test_workers_change_nothing() -> None:
    assert ids(stream(workers=2)) == ids(stream())


def test_loading_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    ids(stream())
    assert torch.equal(torch.get_rng_state(), before)


def test_endless_stream_counts_epochs() -> None:
    endless = stream(epochs=None)
    seen = []
    for _ in endless:
        seen.append(endless.epoch)
        if len(seen) == 7:
            break
    assert seen == [0, 0, 0, 1, 1, 1, 2]
    with pytest.raises(DataError, match="endless"):
        _ = endless.total_batches


def test_fractional_epochs() -> None:
    assert len(ids(stream(epochs=0.5))) == 2


def test_empty_dataset() -> None:
    with pytest.raises(DataError, match="empty"):
        BatchStream([], batch_size=4)


class Signed:
    """0…9; variant 1 of each is its negative."""

    variants = 2

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(float(index) if index < 10 else 10.0 - index)


def test_variants_are_drawn_by_epoch_and_told_apart_by_their_ids() -> None:
    def signed() -> BatchStream:
        return BatchStream(Signed(), batch_size=4, epochs=40, seed=1)

    batches = list(signed())
    epochs = [[i for b in batches[3 * e : 3 * e + 3] for i in b.ids] for e in range(40)]
    assert all(sorted(i % 10 for i in epoch) == list(range(10)) for epoch in epochs)
    assert len({frozenset(epoch) for epoch in epochs}) > 30
    assert 0.4 < sum(i >= 10 for epoch in epochs for i in epoch) / 400 < 0.6
    for indexed in batches:
        assert torch.equal(indexed.batch, torch.stack([Signed()[i] for i in indexed.ids]))
    resumed = signed()
    resumed.position = 50
    assert ids(resumed) == [b.ids for b in batches[50:]]


def test_a_subset_has_all_variants_of_its_examples() -> None:
    subset = Subset(Signed(), [7, 2, 5])
    assert [int(subset[i]) for i in range(6)] == [7, 2, 5, -7, -2, -5]
    with pytest.raises(IndexError):
        subset[6]


def test_subset() -> None:
    subset = Subset(["a", "b", "c"], [2, 0])
    assert (len(subset), subset[0], subset[1]) == (2, "c", "a")


# -------------------------------------------------------------------- what is skipped


class Half:
    """Progress of a run, and its pruning: examples below 5 are learnt well."""

    def __init__(self, **kwargs: object) -> None:
        self.progress = 0.0
        self.pruning = ExamplePruning(
            probability=0.6, threshold=1.0, off_for_last=0.25, seed=3, progress=lambda: self.progress
        )
        self.stream = stream(**{"epochs": 6, **kwargs})
        self.stream.prune(self.pruning)
        self.pruning.observe(range(10), torch.arange(10.0), [1.0] * 10, [1] * 10)


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_examples_leave_gaps_in_the_same_batches(workers: int) -> None:
    plain, half = ids(stream(epochs=6)), Half(workers=workers)
    seen = list(half.stream)
    assert len(seen) == len(plain)
    for indexed, nominal in zip(seen, plain, strict=True):
        assert indexed.kept is not None
        assert indexed.kept.ids == indexed.ids == tuple(i for i in nominal if i not in indexed.kept.skipped)
        assert set(indexed.kept.ids) | set(indexed.kept.skipped) == set(nominal)
        assert all(i < 5 for i in indexed.kept.skipped)
        assert torch.equal(indexed.batch, torch.tensor(indexed.ids, dtype=torch.float32))
    assert 3 < sum(len(indexed.kept.skipped) for indexed in seen if indexed.kept) < 30


def test_skipped_examples_are_not_loaded() -> None:
    loaded: list[int] = []

    class Data:
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> torch.Tensor:
            loaded.append(index)
            return torch.tensor(float(index))

    half = Half()
    half.stream.dataset = Data()
    seen = ids(half.stream)
    assert loaded == [i for batch in seen for i in batch]
    assert len(loaded) < 60


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [1, 4, 9, 17])
def test_resuming_a_pruned_stream_gives_the_rest(at: int, workers: int) -> None:
    """Also when the last part begins in the middle of an epoch, ahead of which a loader may have run."""

    def run(half: Half, until: int) -> list[tuple[int, ...]]:
        seen: list[tuple[int, ...]] = []
        for indexed in half.stream:
            seen.append(indexed.ids)
            half.pruning.observe(
                indexed.ids, indexed.batch + half.stream.position, [1.0] * len(seen[-1]), [1] * len(seen[-1])
            )
            half.progress = half.stream.position / 18
            if half.stream.position == until:
                break
        return seen

    whole = run(Half(workers=workers), 99)
    assert [len(batch) for batch in whole[14:]] == [2, 4, 4, 2][: len(whole) - 14]  # 14 of 18 is in the last quarter
    first = Half(workers=workers)
    before = run(first, at)
    second = Half(workers=workers)
    second.pruning.load_state_dict(first.pruning.state_dict())
    second.stream.position, second.progress = at, first.progress
    assert before + run(second, 99) == whole

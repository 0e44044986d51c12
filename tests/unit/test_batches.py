from collections import Counter

import pytest
import torch

from rgft.batches import BatchStream, Subset
from rgft.errors import DataError


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


def test_subset() -> None:
    subset = Subset(["a", "b", "c"], [2, 0])
    assert (len(subset), subset[0], subset[1]) == (2, "c", "a")

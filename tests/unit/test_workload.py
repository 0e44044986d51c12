"""What a run's batches look like, and what full fine-tuning of them costs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from rgft import workload
from rgft.batches import BatchStream
from rgft.cost import CostModel
from rgft.cost.operations import Operation, Product
from rgft.workload import Workload, batch_shape


class Texts:
    """`count` rows of token ids of the given lengths, in turn."""

    def __init__(self, count: int, lengths: tuple[int, ...] = (3, 9, 5, 7)) -> None:
        self.lengths = [lengths[i % len(lengths)] for i in range(count)]
        self.loaded = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.loaded += 1
        return torch.ones(self.lengths[index], dtype=torch.long)


def padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)}


def costs() -> CostModel:
    """F of 5 + 2·T + T² per row, with a dW of the same."""
    flops = (5.0, 2.0, 1.0)
    op = Operation(kind="mm", depth=1, flops=flops, products=(Product(flops=flops, upstream=1, shares=((0, 1.0),)),))
    return CostModel(names=("a",), depths=(1,), training=(op,), probing=(op,))


@pytest.mark.parametrize(
    ("batch", "shape"),
    [
        ({"input_ids": torch.ones(4, 7, dtype=torch.long), "labels": torch.ones(4)}, (4, 7)),
        ({"pixel_values": torch.ones(3, 3, 8, 8)}, (3, 1)),
        ({"features": torch.ones(5, 16)}, (5, 1)),
        ((torch.ones(2, 6, dtype=torch.long), torch.ones(2)), (2, 6)),
        (torch.ones(4, 2), (4, 1)),
    ],
)
def test_shapes_of_batches(batch: Any, shape: tuple[int, int]) -> None:
    assert batch_shape(batch) == shape


def test_targets_are_a_share_of_all_positions() -> None:
    stream = BatchStream(Texts(8), batch_size=4, collate_fn=padded, epochs=1, seed=1)
    counts = {indexed.batch["input_ids"].numel(): 5 + number for number, indexed in enumerate(stream)}
    stream = BatchStream(Texts(8), batch_size=4, collate_fn=padded, epochs=1, seed=1)
    found = Workload.scan(stream, lambda batch: counts[batch["input_ids"].numel()])
    positions = [rows * tokens * n for (rows, tokens), n in found.shapes.items()]
    assert sum(positions) == sum(p * n for p, n in zip(counts, found.shapes.values(), strict=True))
    assert found.target_share == pytest.approx(
        sum(counts[r * t] * n for (r, t), n in found.shapes.items()) / sum(positions)
    )
    assert found.largest_target_share == pytest.approx(max(n / p for p, n in counts.items()))
    assert Workload.scan(stream).target_share == Workload.scan(stream).largest_target_share == 1.0


def test_scanning_counts_every_batch_of_all_epochs() -> None:
    stream = BatchStream(Texts(22), batch_size=4, collate_fn=padded, epochs=3, seed=1)
    found = Workload.scan(stream)
    shapes = Counter(batch_shape(indexed.batch) for indexed in stream)
    assert found.shapes == dict(shapes)
    assert found.batches == 18
    assert found.examples == 66
    # Padded tokens count: what the collator makes is what is paid for.
    direct = sum(n * 2 * rows * (5 + 2 * t + t * t) for (rows, t), n in shapes.items())
    assert found.full_flops(costs()) == pytest.approx(direct)


def test_scanning_leaves_the_stream_and_the_random_state_alone() -> None:
    stream, state = BatchStream(Texts(10), batch_size=4, collate_fn=padded, epochs=2), torch.get_rng_state()
    Workload.scan(stream)
    assert stream.position == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_long_runs_are_sampled_over_their_whole_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "MAX_SCANNED", 30)
    data = Texts(400)
    stream = BatchStream(data, batch_size=4, collate_fn=padded, epochs=2)
    found = Workload.scan(stream)
    assert data.loaded <= 30 * 4
    assert sum(found.shapes.values()) == pytest.approx(200)
    data.loaded = 0
    monkeypatch.setattr(workload, "MAX_SCANNED", 1000)
    assert found.full_flops(costs()) == pytest.approx(Workload.scan(stream).full_flops(costs()), rel=0.05)


def test_typical_batches_are_full_ones_with_tokens_averaged_over_examples() -> None:
    found = Workload(shapes={(4, 10): 3.0, (4, 20): 1.0, (2, 40): 1.0}, batches=5)
    assert found.typical == (4, round((120 + 80 + 80) / 18))
    assert Workload(shapes={(8, 1): 2.0}, batches=2).typical == (8, 1)


def test_of_examples_of_one_shape_a_single_batch_is_loaded() -> None:
    class Uniform(Texts):
        is_uniform = True

    data = Uniform(22, lengths=(7,))
    scanned = Workload.scan(BatchStream(data, batch_size=4, collate_fn=padded, epochs=3))
    assert data.loaded == 4
    assert scanned == Workload.scan(BatchStream(Texts(22, lengths=(7,)), batch_size=4, collate_fn=padded, epochs=3))
    assert scanned.shapes == {(4, 7): 15, (2, 7): 3}

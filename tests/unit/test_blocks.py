import pytest
import torch

from rgft import blocks


@pytest.mark.parametrize("shape", [(), (5,), (7, 3), (3, 100), (40, 2, 2)])
@pytest.mark.parametrize("size", [1, 8, 1000])
def test_blocks_cover_every_row_once(shape: tuple[int, ...], size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", size)
    tensor = torch.zeros(shape)
    pieces = [tensor[rows] for rows in blocks.row_blocks(tensor)]
    for piece in pieces:
        piece += 1.0
    assert bool((tensor == 1.0).all())
    row = tensor[0].numel() if tensor.dim() else 1
    assert all(piece.numel() <= max(size, row) for piece in pieces)
    assert len(pieces) > 1 or tensor.numel() <= size or tensor.dim() == 0


def test_accelerators_get_one_block() -> None:
    tensor = torch.zeros(1 << 10, 1 << 10, device="meta")
    assert list(blocks.row_blocks(tensor)) == [...]


@pytest.mark.parametrize("size", [1, 8, 1000])
def test_rows_of_a_table_that_were_read(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", size)
    gradient = torch.zeros(6, 3)
    gradient[1, 2], gradient[4], gradient[5, 0] = 1.0, 2.0, float("nan")
    found = torch.cat([torch.arange(6)[rows] for rows in blocks.rows_with_gradient(gradient)])
    assert found.tolist() == [1, 4, 5]
    assert not torch.cat([torch.arange(6)[rows] for rows in blocks.rows_with_gradient(torch.zeros(6, 3))]).tolist()
    assert list(blocks.rows_with_gradient(torch.ones(2, 2, 2, device="meta"))) == [...]


@pytest.mark.parametrize("shape", [(9,), (8, 3), (30, 7), (5, 2, 2)])
@pytest.mark.parametrize("size", [1, 16, 1000])
def test_sampled_rows_in_turn_are_every_row_once(
    shape: tuple[int, ...], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", size)
    monkeypatch.setattr(blocks, "SAMPLED_FROM", 1)
    tensor, counted = (
        torch.arange(shape[0]).double().view(-1, *[1] * (len(shape) - 1)).expand(shape),
        torch.zeros(shape),
    )
    sums = []
    for turn in range(4, 8):
        sample = blocks.RowSample(stride=4, turn=turn)
        read = list(sample.blocks(tensor))
        for rows in read:
            counted[rows] += 1.0
        sums.append(sample.factor(tensor) * sum(float(tensor[rows].sum()) for rows in read))
    assert bool((counted == 1.0).all())
    assert sum(sums) / 4 == pytest.approx(float(tensor.sum()))
    assert len(set(sums)) > 1


@pytest.mark.parametrize("tensor", [torch.zeros(()), torch.zeros(3, 5000), torch.zeros(40, 100)])
def test_what_is_small_is_read_whole(tensor: torch.Tensor) -> None:
    sample = blocks.RowSample(stride=4, turn=1)
    assert sample.factor(tensor) == 1
    counted = torch.zeros_like(tensor)
    for rows in sample.blocks(tensor):
        counted[rows] += 1.0
    assert bool((counted == 1.0).all())


def test_sampled_rows_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SAMPLED_FROM", 1)
    gradient = torch.zeros(9, 3)
    gradient[[1, 2, 5, 6, 8], 1] = 1.0
    found = [
        torch.cat([*blocks.rows_with_gradient(gradient, blocks.RowSample(stride=4, turn=turn))]).tolist()
        for turn in range(4)
    ]
    assert found == [[8], [1, 5], [2, 6], []]

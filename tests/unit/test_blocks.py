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

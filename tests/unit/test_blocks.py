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

"""GaLore: AdamW in a low-rank subspace of each matrix's gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rgft.allocation.turns import in_steps, is_stretch
from rgft.bench.optimizers.renewal import is_charged, stretch_of
from rgft.bench.optimizers.stand_ins import StandInAdamW
from rgft.errors import ConfigError


class GaLoreAdamW(StandInAdamW):
    """Projects each gradient G to Pᵀ G (or G P, along the shorter side) and steps there; P is renewed every T steps.

    Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", ICML 2024 (arXiv:2403.03507),
    algorithm 2: P holds the r leading singular vectors of the gradient of that step; W changes by scale · P N, N being
    Adam's step in the subspace; moments stay when P is renewed. Products and decompositions are in the ledger.

    Args:
        params, lr, weight_decay: see `StandInAdamW`.
        rank: r, at most the shorter side is used.
        every: T, or a share of the run (see `over`).
        scale: α.
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float, weight_decay: float = 0.0, rank: int = 8, every: float = 200,
        scale: float = 0.25,
    ) -> None:  # fmt: skip
        problems = [
            f"galore.{name}: expected {what}, found {value!r}"
            for name, what, value, ok in (
                ("rank", "an integer >= 1", rank, rank >= 1),
                ("every", "a number of steps, or a share of the run", every, is_stretch(every)),
                ("scale", "a number > 0", scale, scale > 0),
            )
            if not ok
        ]
        if problems:
            raise ConfigError(problems)
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.rank, self.every, self.scale = rank, every, scale

    def over(self, steps: int) -> None:
        """Makes steps of what is given as a share of a run of so many."""
        self.every = stretch_of(self.every, steps)

    def _prepare(self, matrices: list[nn.Parameter]) -> None:
        if self.steps_made % in_steps("galore.every", self.every, None) == 0:
            for matrix in matrices:
                assert matrix.grad is not None
                self.state[matrix]["projector"] = projector(matrix.grad, self.rank)

    def _value(self, matrix: nn.Parameter) -> Tensor:
        return torch.zeros_like(self._gradient(matrix))

    def _gradient(self, matrix: nn.Parameter) -> Tensor:
        gradient, basis = matrix.grad, self.state[matrix]["projector"]
        assert gradient is not None
        return basis.T @ gradient if _is_wide(matrix) else gradient @ basis

    def _write(self, matrix: nn.Parameter, value: Tensor, group: dict[str, Any]) -> None:
        basis = self.state[matrix]["projector"]
        matrix.mul_(1.0 - group["lr"] * group["weight_decay"])
        matrix.add_(basis @ value if _is_wide(matrix) else value @ basis.T, alpha=self.scale)

    def product_flops(self) -> Mapping[int, float]:
        """Of every step: the gradient into the subspace, and the step back."""
        return {id(m): 4.0 * m.numel() * min(self.rank, *m.shape) for m in self.matrices}

    def occasional_flops(self, step: int) -> float:
        """Of the decompositions, in the steps that make them."""
        return sum(svd_flops(m.shape) for m in self.matrices) if is_charged(self.every, step) else 0.0


def projector(gradient: Tensor, rank: int) -> Tensor:
    """Leading singular vectors [shorter side, ≤ rank] of a gradient."""
    left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
    vectors = left[:, :rank] if _is_wide(gradient) else right[:rank].T
    return vectors.to(gradient.dtype).contiguous()


def svd_flops(shape: Iterable[int]) -> float:
    """FLOPs of the thin singular value decomposition with both sides' vectors: 6 m n² + 20 n³ for m ≥ n.

    Golub and Van Loan, "Matrix Computations", 4th edition, figure 8.6.1 (R-SVD).
    """
    n, m = sorted(shape)
    return 6.0 * m * n * n + 20.0 * n**3


def _is_wide(matrix: Tensor) -> bool:
    """Whether rows are projected (the shorter side)."""
    return matrix.shape[0] <= matrix.shape[1]

"""AdamW on chosen single entries of matrices; all other entries stay bit for bit as they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rgft.bench.optimizers.stand_ins import MOMENTS, StandInAdamW

#: Keys of a matrix's state: flat positions of its entries, rising; those before the last choice.
INDEX, INITIAL = "index", "initial"


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """What a choice sees of one matrix, all flat.

    Attributes:
        weight, gradient: [rows · columns].
        shape: (rows, columns); rows are output neurons.
        index: positions of the entries that are trained, rising; None before the first choice.
        memory: what the choice keeps of the matrix; part of the optimizer's state.
    """

    weight: Tensor
    gradient: Tensor
    shape: tuple[int, int]
    index: Tensor | None
    memory: dict[str, Tensor]


class Choice(ABC):
    """Says which entries train. Frozen settings; all that it remembers is in `Matrix.memory`."""

    @abstractmethod
    def choose(self, step: int, matrices: Sequence[Matrix]) -> Sequence[Tensor] | None:
        """Positions of the entries of each matrix from this step on, each once; None: those of the step before."""

    def over(self, steps: int) -> Choice:
        """The same in a run of so many steps: what is a share of the run becomes steps."""
        return self

    def flops(self, step: int, shapes: Sequence[tuple[int, int]]) -> float:
        """FLOPs of products that choosing takes in that step."""
        return 0.0


class SparseAdamW(StandInAdamW):
    """AdamW, decay included, on the entries that a choice makes; moments are kept of these alone.

    Moments of entries that stay are carried along; new ones begin at zero (the count of steps is the matrix's).

    Args:
        params, lr, weight_decay: see `StandInAdamW`.
        choice: of the entries.
        penalty: λ, adds λ (θ − θ₀) to the gradient of chosen entries: a pull to the pre-trained weights.
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float, choice: Choice, weight_decay: float = 0.0, penalty: float = 0.0
    ) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.choice, self.penalty = choice, penalty

    @torch.no_grad()
    def choose_from(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """Chooses before the first step, from gradients of one's own."""
        self._choose({matrix: gradients[matrix] for matrix in self.matrices})

    def _prepare(self, matrices: list[nn.Parameter]) -> None:
        self._choose({matrix: matrix.grad for matrix in matrices if matrix.grad is not None})

    def _choose(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        seen = [
            Matrix(
                weight=matrix.detach().view(-1), gradient=gradient.reshape(-1), shape=_shape(matrix),
                index=self.state[matrix].get(INDEX), memory=self.state[matrix],
            )
            for matrix, gradient in gradients.items()
        ]  # fmt: skip
        chosen = self.choice.choose(self.steps_made, seen)
        if chosen is not None:
            for matrix, index in zip(gradients, chosen, strict=True):
                self._take(matrix, index.sort().values)

    def _take(self, matrix: nn.Parameter, index: Tensor) -> None:
        state = self.state[matrix]
        before = state.get(INDEX)
        if before is not None and torch.equal(before, index):
            return
        for key in MOMENTS:
            if before is not None and key in state:
                state[key] = _carried(state[key], before, index)
        if self.penalty:
            state[INITIAL] = matrix.detach().view(-1)[index].clone()
        state[INDEX] = index

    def _value(self, matrix: nn.Parameter) -> Tensor:
        return matrix.detach().view(-1)[self.state[matrix][INDEX]]

    def _gradient(self, matrix: nn.Parameter) -> Tensor:
        assert matrix.grad is not None
        gradient = matrix.grad.reshape(-1)[self.state[matrix][INDEX]]
        if self.penalty:
            gradient += self.penalty * (self._value(matrix) - self.state[matrix][INITIAL])
        return gradient

    def _write(self, matrix: nn.Parameter, value: Tensor, group: dict[str, Any]) -> None:
        matrix.view(-1)[self.state[matrix][INDEX]] = value

    def occasional_flops(self, step: int) -> float:
        """FLOPs of products that choosing takes."""
        return self.choice.flops(step, [_shape(matrix) for matrix in self.matrices])


def _carried(values: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Values of entries `before`, as of entries `after`; 0 of those that are new. Both rise."""
    if not len(before):
        return values.new_zeros(len(after))
    place = torch.searchsorted(before, after).clamp(max=len(before) - 1)
    return torch.where(before[place] == after, values[place], 0.0)


def _shape(matrix: nn.Parameter) -> tuple[int, int]:
    """Of a kernel: output channels, and what comes into each."""
    return matrix.shape[0], matrix[0].numel()

"""Which entries of matrices train: GPS, SIFT, GRFT (chosen once), LIFT (renewed), ID³ (growing), SpIEL (exchanged)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgft.allocation.selection import require_at_least, require_fraction, share_of
from rgft.allocation.turns import in_steps, require_stretch
from rgft.bench.optimizers.galore import svd_flops
from rgft.bench.optimizers.renewal import is_charged, stretch_of
from rgft.bench.optimizers.sparse import Choice, Matrix


class ChosenOnce(Choice):
    """Chosen from the first gradients that are seen."""

    def choose(self, step: int, matrices: Sequence[Matrix]) -> Sequence[Tensor] | None:
        if all(matrix.index is not None for matrix in matrices):
            return None
        return self.first(matrices)

    @abstractmethod
    def first(self, matrices: Sequence[Matrix]) -> Sequence[Tensor]:
        """Positions of the entries of each matrix, each once."""


@dataclass(frozen=True, kw_only=True)
class PerNeuron(ChosenOnce):
    """The entries with the largest gradient of each neuron's incoming weights.

    Zhang et al., "Gradient-based Parameter Selection for Efficient Fine-Tuning" (GPS), CVPR 2024 (arXiv:2312.10136).

    Attributes:
        count: entries per neuron.
    """

    count: int = 4

    def __post_init__(self) -> None:
        require_at_least("choice.count", self.count, 1)

    def first(self, matrices: Sequence[Matrix]) -> Sequence[Tensor]:
        chosen: list[Tensor] = []
        for matrix in matrices:
            rows, columns = matrix.shape
            best = matrix.gradient.view(rows, columns).abs().topk(min(self.count, columns), dim=1).indices
            chosen.append((best + columns * torch.arange(rows, device=best.device).unsqueeze(1)).flatten())
        return chosen


@dataclass(frozen=True, kw_only=True)
class TopShare(ChosenOnce):
    """The share of all matrices' entries with the largest gradients.

    Song et al., "Sparse is Enough in Fine-tuning Pre-trained Large Language Models" (SIFT), ICML 2024
    (arXiv:2312.11875).

    Attributes:
        fraction: of all entries.
    """

    fraction: float = 0.05

    def __post_init__(self) -> None:
        require_fraction("choice.fraction", self.fraction)

    def first(self, matrices: Sequence[Matrix]) -> Sequence[Tensor]:
        scores = [matrix.gradient.abs() for matrix in matrices]
        return top_over_all(scores, share_of(self.fraction, sum(map(len, scores))))


@dataclass(frozen=True, kw_only=True)
class RowsOrColumns(ChosenOnce):
    """Of each matrix the rows, or the columns, with the largest sums of squared gradients: whichever have more of them.

    Liu et al., "Gradient-based Fine-Tuning through Pre-trained Model Regularization" (GRFT), 2025 (arXiv:2507.00016),
    whose penalty on the distance to the pre-trained weights is `SparseAdamW.penalty`.

    Attributes:
        fraction: of the rows or of the columns.
    """

    fraction: float = 0.0125

    def __post_init__(self) -> None:
        require_fraction("choice.fraction", self.fraction)

    def first(self, matrices: Sequence[Matrix]) -> Sequence[Tensor]:
        chosen: list[Tensor] = []
        for matrix in matrices:
            squares = matrix.gradient.view(matrix.shape).square()
            positions = torch.arange(squares.numel(), device=squares.device).view(matrix.shape)
            best = [squares.sum(1 - dim).topk(share_of(self.fraction, matrix.shape[dim])) for dim in (0, 1)]
            dim = int(best[1].values.sum() > best[0].values.sum())
            chosen.append(positions.index_select(dim, best[dim].indices).flatten())
        return chosen


@dataclass(frozen=True, kw_only=True)
class LowRankMagnitude(Choice):
    """Of each matrix the entries that are largest in its approximation of low rank; renewed every so many steps.

    Liu et al., "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for Reasoning-Focused
    Supervised Fine-Tuning", ICML 2025 (arXiv:2506.00772).

    Attributes:
        fraction: of each matrix's entries.
        rank: of the approximation.
        every: steps, or a share of the run (see `over`).
    """

    fraction: float = 0.05
    rank: int = 128
    every: float = 100

    def __post_init__(self) -> None:
        require_fraction("choice.fraction", self.fraction)
        require_at_least("choice.rank", self.rank, 1)
        require_stretch("choice.every", self.every)

    def over(self, steps: int) -> LowRankMagnitude:
        return replace(self, every=stretch_of(self.every, steps))

    def choose(self, step: int, matrices: Sequence[Matrix]) -> Sequence[Tensor] | None:
        if step % in_steps("choice.every", self.every, None):
            return None
        chosen: list[Tensor] = []
        for matrix in matrices:
            left, values, right = torch.linalg.svd(matrix.weight.view(matrix.shape).float(), full_matrices=False)
            principal = (left[:, : self.rank] * values[: self.rank]) @ right[: self.rank]
            chosen.append(principal.abs().flatten().topk(share_of(self.fraction, principal.numel())).indices)
        return chosen

    def flops(self, step: int, shapes: Sequence[tuple[int, int]]) -> float:
        if not is_charged(self.every, step):
            return 0.0
        return sum(svd_flops(shape) + 2.0 * math.prod(shape) * min(self.rank, *shape) for shape in shapes)


@dataclass(frozen=True, kw_only=True)
class Unmasking(Choice):
    """Entries join at an even pace, those with the largest |g| / (|θ| + ε)^e first, and stay.

    Agarwal et al., "Step-by-Step Unmasking for Parameter-Efficient Fine-tuning of Large Language Models" (ID³), TACL
    2025 (arXiv:2408.14470).

    Attributes:
        fraction: of all entries, in the end.
        unmask_steps: until then, or a share of the run (see `over`).
        exponent, epsilon: e and ε.
    """

    fraction: float = 0.05
    unmask_steps: float = 100
    exponent: float = 0.5
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        require_fraction("choice.fraction", self.fraction)
        require_stretch("choice.unmask_steps", self.unmask_steps)

    def over(self, steps: int) -> Unmasking:
        return replace(self, unmask_steps=in_steps("choice.unmask_steps", self.unmask_steps, steps))

    def quota(self, step: int, entries: int) -> int:
        """Entries that train in that step."""
        until = in_steps("choice.unmask_steps", self.unmask_steps, None)
        return share_of(self.fraction * min(1.0, (step + 1) / until), entries)

    def choose(self, step: int, matrices: Sequence[Matrix]) -> Sequence[Tensor] | None:
        before = sum(0 if matrix.index is None else len(matrix.index) for matrix in matrices)
        joining = self.quota(step, sum(len(matrix.weight) for matrix in matrices)) - before
        if joining <= 0:
            return None
        scores = [matrix.gradient.abs() / (matrix.weight.abs() + self.epsilon) ** self.exponent for matrix in matrices]
        new = top_over_all(_without(scores, matrices), joining)
        return [
            more if matrix.index is None else torch.cat([matrix.index, more])
            for matrix, more in zip(matrices, new, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class DropAndGrow(Choice):
    """A fixed number of entries, of which those that moved least make room for those with the largest gradients.

    Ansell et al., "Scaling Sparse Fine-Tuning to Large Language Models" (SpIEL-AG), 2024 (arXiv:2401.16405): every
    `every` steps, in each matrix, a share of the entries with the smallest |θ − θ₀| goes back to θ₀, and as many grow,
    by the gradients that candidates gathered over the `window` steps before; candidates have the largest gradient at
    the window's beginning. The share falls to 0 as a cosine. The first entries are drawn by lot.

    Attributes:
        fraction: of each matrix's entries.
        churn: share exchanged at first.
        every: steps, or a share of the run (see `over`).
        window: steps, fewer than `every`; where that is a share of the run, at most so many.
        until: steps after which nothing is exchanged, or a share of the run.
        seed: of the first entries.
    """

    fraction: float = 0.04
    churn: float = 0.2
    every: float = 20
    window: int = 5
    until: float = 100
    seed: int = 0

    def __post_init__(self) -> None:
        require_fraction("choice.fraction", self.fraction)
        require_fraction("choice.churn", self.churn)
        require_at_least("choice.window", self.window, 1)
        require_stretch("choice.every", self.every)
        require_stretch("choice.until", self.until)
        if self.every >= 1:
            require_at_least("choice.every", self.every, self.window + 1)

    def over(self, steps: int) -> DropAndGrow:
        """Exchanges are at least two steps apart: gradients are gathered in between, however short the run."""
        every, until = (in_steps(f"choice.{key}", getattr(self, key), steps) for key in ("every", "until"))
        every = max(2, every)
        return replace(self, every=every, until=until, window=min(self.window, every - 1))

    def choose(self, step: int, matrices: Sequence[Matrix]) -> Sequence[Tensor] | None:
        if any(matrix.index is None for matrix in matrices):
            return [self._drawn(number, matrix) for number, matrix in enumerate(matrices)]
        every = in_steps("choice.every", self.every, None)
        if step >= in_steps("choice.until", self.until, None):
            return None
        if (position := step % every) >= every - self.window:
            for matrix in matrices:
                self._gather(matrix, is_first=position == every - self.window)
        if position or step == 0:
            return None
        return [self._exchanged(step, matrix) for matrix in matrices]

    def exchanges(self, step: int, count: int) -> int:
        """Entries of `count` that are exchanged in that step."""
        return math.floor(self.churn * count * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / self.until))))

    def _drawn(self, number: int, matrix: Matrix) -> Tensor:
        draw = torch.Generator().manual_seed(self.seed + number)
        size = len(matrix.weight)
        index = torch.randperm(size, generator=draw)[: share_of(self.fraction, size)].sort().values
        index = index.to(matrix.weight.device)
        matrix.memory["pretrained"] = matrix.weight[index]
        return index

    def _gather(self, matrix: Matrix, *, is_first: bool) -> None:
        assert matrix.index is not None
        if is_first:
            (scores,) = _without([matrix.gradient.abs()], [matrix])
            free = len(scores) - len(matrix.index)
            matrix.memory["candidates"] = scores.topk(min(len(matrix.index), free)).indices
            matrix.memory["gathered"] = torch.zeros_like(matrix.gradient[matrix.memory["candidates"]])
        if "candidates" in matrix.memory:
            matrix.memory["gathered"] += matrix.gradient[matrix.memory["candidates"]]

    def _exchanged(self, step: int, matrix: Matrix) -> Tensor:
        index, candidates, pretrained = matrix.index, matrix.memory["candidates"], matrix.memory["pretrained"]
        assert index is not None
        count = min(self.exchanges(step, len(index)), len(candidates))
        order = (matrix.weight[index] - pretrained).abs().argsort(stable=True)
        dropped, kept = order[:count], order[count:]
        matrix.weight[index[dropped]] = pretrained[dropped]
        grown = candidates[matrix.memory["gathered"].abs().topk(count).indices]
        index, position = torch.cat([index[kept], grown]).sort()
        matrix.memory["pretrained"] = torch.cat([pretrained[kept], matrix.weight[grown]])[position]
        return index


def top_over_all(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Positions in each of the tensors of the `count` highest scores of all together."""
    best = torch.cat(list(scores)).topk(count).indices
    chosen: list[Tensor] = []
    start = 0
    for score in scores:
        chosen.append(best[(best >= start) & (best < start + len(score))] - start)
        start += len(score)
    return chosen


def _without(scores: Sequence[Tensor], matrices: Sequence[Matrix]) -> list[Tensor]:
    """Scores in which entries that train already are below all others."""
    return [
        score if matrix.index is None else score.index_fill(0, matrix.index, -1.0)
        for score, matrix in zip(scores, matrices, strict=True)
    ]

"""The workload: which batch shapes a run would see, and so what full fine-tuning of it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any

from rgft.batches import BatchStream, is_uniform
from rgft.cost import BatchShape, CostModel

#: Scanning more batches than this costs more time than their shapes are worth; beyond, a spread sample is taken.
MAX_SCANNED = 1024


def batch_shape(batch: Any) -> tuple[int, int]:
    """(rows, tokens) of a batch; tokens are 1 without a token dimension."""
    shape = BatchShape.of(batch)
    return shape.rows, shape.tokens or 1


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Batch shapes of a whole run.

    Attributes:
        shapes: (rows, tokens) → number of batches, scaled up from the sample.
        batches: number of batches of the run.
        target_share: targets per position, padding included; 1 where targets are not counted.
        largest_target_share: of any batch.
        computed_share: positions that training steps compute, of all; below 1 where rows of like length pass together.
        is_exact: whether every batch was looked at.
    """

    shapes: Mapping[tuple[int, int], float]
    batches: int
    target_share: float = 1.0
    largest_target_share: float = 1.0
    computed_share: float = 1.0
    is_exact: bool = True

    @classmethod
    def scan(
        cls, stream: BatchStream, count: Callable[[Any], int] | None = None,
        computed: Callable[[Any], int | None] = lambda batch: None,
    ) -> Workload:  # fmt: skip
        """Collates the batches of a run (a spread sample of long ones) to learn their shapes.

        Of examples of one shape, a single batch tells them all.

        Args:
            stream: the batches.
            count: targets of a batch; None: they are not counted.
            computed: how many positions of a batch training steps compute; None: all.
        """
        shapes: Counter[tuple[int, int]] = Counter()
        targets: list[tuple[int, int]] = []  # and positions, of each batch
        positions: list[tuple[int, int]] = []  # that are computed, of how many

        def look(batch: Any) -> tuple[int, int]:
            shape = batch_shape(batch)
            if count is not None:
                targets.append((count(batch), prod(shape)))
            positions.append((computed(batch) or prod(shape), prod(shape)))
            return shape

        if is_uniform(stream.dataset):
            _, tokens = look(stream.load(next(stream.indices())))
            shapes.update((len(indices), tokens) for indices in stream.indices())
        else:
            stride = -(-stream.total_batches // MAX_SCANNED)
            for indices in islice(stream.indices(), 0, None, stride):
                shapes[look(stream.load(indices))] += 1
        scale = stream.total_batches / sum(shapes.values())
        return cls(
            shapes={shape: n if scale == 1.0 else n * scale for shape, n in shapes.items()},
            batches=stream.total_batches,
            target_share=sum(n for n, _ in targets) / sum(of for _, of in targets) if targets else 1.0,
            largest_target_share=max((n / of for n, of in targets), default=1.0),
            computed_share=sum(n for n, _ in positions) / sum(of for _, of in positions), is_exact=scale == 1.0,
        )  # fmt: skip

    def full_flops(self, costs: CostModel) -> float:
        """FLOPs of full fine-tuning on all of the run's batches."""
        return sum(n * costs.full_step(rows, tokens).total for (rows, tokens), n in self.shapes.items())

    @property
    def examples(self) -> float:
        return sum(n * rows for (rows, _), n in self.shapes.items())

    @property
    def typical(self) -> tuple[int, int]:
        """(rows, tokens) of a typical batch: the largest row count, and tokens averaged over examples."""
        return self._typical(1.0)

    @property
    def typical_of_steps(self) -> tuple[int, int]:
        """The same, of what training steps compute of it."""
        return self._typical(self.computed_share)

    def _typical(self, share: float) -> tuple[int, int]:
        rows = max(rows for rows, _ in self.shapes)
        tokens = sum(n * r * t for (r, t), n in self.shapes.items()) / self.examples
        return rows, max(1, round(share * tokens))

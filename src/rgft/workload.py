"""The workload: which batch shapes a run would see, and so what full fine-tuning of it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
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
    """

    shapes: Mapping[tuple[int, int], float]
    batches: int

    @classmethod
    def scan(cls, stream: BatchStream) -> Workload:
        """Collates the batches of a run (a spread sample of long ones) to learn their shapes.

        Of examples of one shape, a single batch tells them all.
        """
        counts: Counter[tuple[int, int]] = Counter()
        if is_uniform(stream.dataset):
            _, tokens = batch_shape(stream.load(next(stream.indices())))
            counts.update((len(indices), tokens) for indices in stream.indices())
            return cls(shapes=dict(counts), batches=stream.total_batches)
        stride = -(-stream.total_batches // MAX_SCANNED)
        for indices in islice(stream.indices(), 0, None, stride):
            counts[batch_shape(stream.load(indices))] += 1
        scale = stream.total_batches / sum(counts.values())
        return cls(shapes={shape: n * scale for shape, n in counts.items()}, batches=stream.total_batches)

    def full_flops(self, costs: CostModel) -> float:
        """FLOPs of full fine-tuning on all of the run's batches."""
        return sum(n * costs.full_step(rows, tokens).total for (rows, tokens), n in self.shapes.items())

    @property
    def examples(self) -> float:
        return sum(n * rows for (rows, _), n in self.shapes.items())

    @property
    def typical(self) -> tuple[int, int]:
        """(rows, tokens) of a typical batch: the largest row count, and tokens averaged over examples."""
        rows = max(rows for rows, _ in self.shapes)
        tokens = sum(n * r * t for (r, t), n in self.shapes.items()) / self.examples
        return rows, max(1, round(tokens))

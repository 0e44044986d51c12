"""Example pruning: a well-learnt example is skipped with probability r, and weighs more where it is kept.

After InfoBatch (Qin et al. 2024, ICLR, arXiv:2303.04947): well learnt is a loss below the mean of all known ones, a
loss is that of the last visit, and at the end of training nothing is skipped. Other than there, a batch shrinks by what
is skipped instead of being filled up: steps × learning rate stay those of the nominal batches.

A batch that is well learnt as a whole keeps at least one row, drawn fairly: the one with the largest number of its
draws. A row of it is then kept with probability π = (1 − r) + r^B / B instead of 1 − r, and weighs 1/π (Horvitz and
Thompson 1952). So there is always something to compute, and the expectation is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rgft.errors import DataError
from rgft.pruning.draws import uniform


@dataclass(frozen=True, kw_only=True)
class KeptRows:
    """What is left of a batch.

    Attributes:
        ids: of the kept rows, in order.
        weights: of their losses.
        skipped: ids of the others.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    skipped: tuple[int, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether it is the batch as it is."""
        return not self.skipped and all(weight == 1.0 for weight in self.weights)


class ExamplePruning:
    """Which examples come up in an epoch.

    Args:
        probability: r, of a well-learnt example to be skipped, in [0, 1).
        threshold: well learnt is a loss below so many times the mean of the known ones.
        off_for_last: share of the run, at its end, in which nothing is skipped.
        seed: of the draws.
        progress: share of the run that is done.

    Attributes:
        probability: see above.
        kept_share: share of the rows that comes up from here to the end of the epoch, about.
        history: of each epoch that began: `epoch`, `known` and `well_learnt` (numbers of examples), `threshold` (a
            loss; None: nothing is known).
    """

    def __init__(
        self, *, probability: float, threshold: float, off_for_last: float, seed: int, progress: Callable[[], float]
    ) -> None:
        self.probability, self._threshold, self._off_for_last = probability, threshold, off_for_last
        self._seed, self._progress = seed, progress
        self._losses = torch.empty(0, dtype=torch.float64)  # [n] at the last visit; NaN: never visited
        self._counts = torch.empty(0, dtype=torch.int64)  # [n] what each counts in a mean of losses
        self._seen: list[tuple[list[int], Tensor, list[float]]] = []  # not fetched from the device yet
        self._epoch: int | None = None
        self._is_well = torch.empty(0, dtype=torch.bool)  # [n] in this epoch
        self._draws: list[float] = []
        self._is_over = False
        self.kept_share = 1.0
        self.history: list[dict[str, Any]] = []

    def begin(self, examples: int) -> None:
        """Says how many examples there are, before all else; what a restored state knows of them is kept.

        Args:
            examples: n; an id i stands for example i mod n (ids beyond are augmented variants).

        Raises:
            DataError: the restored state is of another number.
        """
        if len(self._losses) != examples:
            if len(self._losses):
                raise DataError(
                    f"the saved state knows losses of {len(self._losses)} training examples, found {examples}; resume "
                    "with the data of its run"
                )
            self._losses = torch.full((examples,), float("nan"), dtype=torch.float64)
            self._counts = torch.ones(examples, dtype=torch.int64)
            self._is_well = torch.zeros(examples, dtype=torch.bool)

    # ---------------------------------------------------------------- deciding

    def begin_epoch(self, epoch: int) -> None:
        """Decides what is well learnt, from earlier epochs' losses; once an epoch."""
        if self._epoch != epoch:
            self._fetch()
            known = ~self._losses.isnan()
            threshold = self._threshold * float(self._losses[known].mean()) if bool(known.any()) else None
            self._is_well = known & (self._losses < (0.0 if threshold is None else threshold))
            self._epoch = epoch
            self._share()
            self.history.append(
                {"epoch": epoch, "known": int(known.sum()), "well_learnt": int(self._is_well.sum()),
                 "threshold": threshold}
            )  # fmt: skip
        self._draw(epoch)
        self.has_ended()

    def _draw(self, epoch: int) -> None:
        self._draws = uniform(len(self._losses), "examples", self._seed, epoch).tolist()

    def has_ended(self) -> bool:
        """Whether nothing is skipped any more; once so, always so."""
        if not self._is_over and self._progress() >= 1.0 - self._off_for_last:
            self._is_over, self.kept_share = True, 1.0
        return self._is_over

    def kept(self, ids: Sequence[int]) -> KeptRows:
        """What comes up of a nominal batch of the epoch that was begun."""
        n, r = len(self._losses), self.probability
        is_well = self._is_well[[example % n for example in ids]].tolist()
        if self._is_over or not any(is_well):
            return KeptRows(ids=tuple(ids), weights=(1.0,) * len(ids))
        draws = [self._draws[example % n] for example in ids]
        is_kept = [not well or draw >= r for well, draw in zip(is_well, draws, strict=True)]
        probability = 1.0 - r
        if all(is_well):
            probability += r ** len(ids) / len(ids)
            if not any(is_kept):
                is_kept[max(range(len(ids)), key=draws.__getitem__)] = True
        chosen = [row for row, kept in enumerate(is_kept) if kept]
        return KeptRows(
            ids=tuple(ids[row] for row in chosen),
            weights=tuple(1.0 / probability if is_well[row] else 1.0 for row in chosen),
            skipped=tuple(example for example, kept in zip(ids, is_kept, strict=True) if not kept),
        )

    def _share(self) -> None:
        is_off = self._is_over or not len(self._is_well)
        self.kept_share = 1.0 if is_off else 1.0 - self.probability * float(self._is_well.double().mean())

    # ---------------------------------------------------------------- losses

    def observe(self, ids: Sequence[int], losses_B: Tensor, factors: Sequence[float], counts: Sequence[int]) -> None:
        """Takes note of a training pass; nothing is fetched from the device before the epoch's end.

        Args:
            ids: of the rows.
            losses_B: theirs, detached.
            factors: make of each the loss of an example on its own.
            counts: what each counts in a mean.
        """
        if not self._is_over:
            places = [example % len(self._losses) for example in ids]
            self._counts[places] = torch.tensor(list(counts))
            self._seen.append((places, losses_B, list(factors)))

    def counts(self, ids: Sequence[int]) -> int:
        """What examples that were visited count in a mean of losses, together."""
        return int(self._counts[[example % len(self._losses) for example in ids]].sum()) if ids else 0

    def _fetch(self) -> None:
        if not self._seen:
            return
        losses = torch.cat([losses_B.double() for _, losses_B, _ in self._seen]).cpu()
        losses = losses * torch.tensor([f for _, _, factors in self._seen for f in factors], dtype=torch.float64)
        start = 0
        for ids, *_ in self._seen:
            self._losses[ids] = losses[start : start + len(ids)]
            start += len(ids)
        self._losses[~self._losses.isfinite()] = float("nan")
        self._seen.clear()

    # ---------------------------------------------------------------- saving

    def state_dict(self) -> dict[str, Any]:
        self._fetch()
        return {
            "losses": self._losses.clone(), "counts": self._counts.clone(), "epoch": self._epoch,
            "is_well": self._is_well.clone(), "is_over": self._is_over,
            "history": [dict(entry) for entry in self.history],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen.clear()
        self._losses, self._counts = state["losses"].clone(), state["counts"].clone()
        self._epoch, self._is_well, self._is_over = state["epoch"], state["is_well"].clone(), state["is_over"]
        self.history = [dict(entry) for entry in state["history"]]
        self._share()
        if self._epoch is not None:
            self._draw(self._epoch)

"""Token selection: of a language model's targets, those that are well learnt are left out of the head and the loss.

`unbiased` is example pruning, target by target: skipped with probability r, weighing 1/(1−r) where kept. `top` keeps
those with the highest loss, all weighing alike, as Rho-1 does (Lin et al. 2024, NeurIPS, arXiv:2404.07965; without its
reference model): the mean over them is another objective than the loss, so that all of its figures are labelled BIASED.

Either goes by a target's loss at its last visit. It is not computed to be thrown away, but what is skipped keeps an old
loss; under `top` it comes back once the losses of others have fallen below that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rgft.pruning.draws import uniform


class TokenPruning:
    """Which targets of an example count in an epoch. A target is known by its example and its place among its targets.

    Args:
        probability: share r of the well-learnt targets that is skipped (`unbiased`), or of all known ones (`top`).
        select: see the module.
        threshold, off_for_last, seed, progress: as of `ExamplePruning`; the threshold is of `unbiased`.

    Attributes:
        probability: see above.
        kept_share: of the targets, about, that is computed from here to the end of the epoch.
        history: of each epoch that began: `epoch`, `known` and `well_learnt` (numbers of targets), `threshold`.
    """

    def __init__(
        self, *, probability: float, select: Literal["unbiased", "top"], threshold: float, off_for_last: float,
        seed: int, progress: Callable[[], float],
    ) -> None:  # fmt: skip
        self.probability, self._select, self._threshold = probability, select, threshold
        self._off_for_last, self._seed, self._progress = off_for_last, seed, progress
        self._losses: dict[int, Tensor] = {}  # example → [targets] in fp32 at the last visit; NaN: never
        self._seen: list[tuple[Sequence[int], Sequence[int], Tensor | None, Tensor]] = []  # not fetched yet
        self._epoch: int | None = None
        self._below: float | None = None
        self._is_over = False
        self.kept_share = 1.0
        self.history: list[dict[str, Any]] = []

    @property
    def is_biased(self) -> bool:
        """Whether the expectation of the loss is another one than without it."""
        return self._select == "top"

    # ---------------------------------------------------------------- deciding

    def begin_epoch(self, epoch: int) -> None:
        """Decides from which loss on a target is well learnt; once an epoch."""
        if self._epoch == epoch:
            return
        self._fetch()
        known = torch.cat([*self._losses.values(), torch.empty(0)])
        known = known[~known.isnan()]
        self._epoch, self._below = epoch, self._boundary(known)
        well = 0 if self._below is None else int((known < self._below).sum())
        skipped = well / max(1, len(known)) * (1.0 if self.is_biased else self.probability)
        self.kept_share = 1.0 - skipped
        self.history.append({"epoch": epoch, "known": len(known), "well_learnt": well, "threshold": self._below})

    def _boundary(self, known: Tensor) -> float | None:
        if not len(known):
            return None
        if self.is_biased:
            place = int(self.probability * len(known))
            return float(known.sort().values[place])
        return self._threshold * float(known.double().mean())

    def has_ended(self) -> bool:
        """Whether nothing is skipped any more; once so, always so."""
        self._is_over = self._is_over or self._progress() >= 1.0 - self._off_for_last
        if self._is_over:
            self.kept_share = 1.0
        return self._is_over

    def factors(self, ids: Sequence[int], counts: Sequence[int]) -> Tensor | None:
        """What each target of a batch weighs [N], row after row: 0 is not computed. None: all weigh 1.

        Args:
            ids: of the rows.
            counts: targets of each.
        """
        if self._below is None or self.has_ended():
            return None
        factors = [self._factors(example, count) for example, count in zip(ids, counts, strict=True)]
        factor_N = torch.cat(factors)
        return None if bool((factor_N == 1.0).all()) else factor_N

    def _factors(self, example: int, count: int) -> Tensor:
        losses = self._losses.get(example)
        if losses is None or len(losses) != count:
            return torch.ones(count)
        is_well = losses < (0.0 if self._below is None else self._below)
        if self.is_biased:
            return (~is_well).float()
        assert self._epoch is not None
        draws = uniform(count, "tokens", self._seed, self._epoch, example)
        kept = torch.where(is_well, 1.0 / (1.0 - self.probability), 1.0)
        return torch.where(is_well & (draws < self.probability), 0.0, kept)

    # ---------------------------------------------------------------- losses

    def observe(self, ids: Sequence[int], counts: Sequence[int], factor_N: Tensor | None, losses_K: Tensor) -> None:
        """Takes note of a training pass; nothing is fetched from the device before the epoch's end.

        Args:
            ids, counts: as of `factors`.
            factor_N: what `factors` gave.
            losses_K: of those with a weight above 0, detached, unweighted.
        """
        if not self._is_over:
            self._seen.append((list(ids), list(counts), factor_N, losses_K))

    def _fetch(self) -> None:
        if not self._seen:
            return
        losses_K = torch.cat([losses.float() for *_, losses in self._seen]).cpu()
        start = 0
        for ids, counts, factor_N, losses in self._seen:
            mine, start = losses_K[start : start + len(losses)], start + len(losses)
            found = torch.full((sum(counts),), float("nan"))
            found[slice(None) if factor_N is None else factor_N > 0.0] = mine
            for example, new in zip(ids, found.split(list(counts)), strict=True):
                old = self._losses.get(example)
                if old is not None and len(old) == len(new):
                    new = torch.where(new.isnan(), old, new)
                self._losses[example] = new.clone()
        self._seen.clear()

    # ---------------------------------------------------------------- saving

    def state_dict(self) -> dict[str, Any]:
        self._fetch()
        losses = list(self._losses.values())
        return {
            "ids": list(self._losses), "counts": [len(values) for values in losses],
            "losses": torch.cat([*losses, torch.empty(0)]), "epoch": self._epoch, "below": self._below,
            "is_over": self._is_over, "kept_share": self.kept_share, "history": [dict(entry) for entry in self.history],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen.clear()
        parts = state["losses"].split(list(state["counts"])) if state["ids"] else ()
        self._losses = {example: part.clone() for example, part in zip(state["ids"], parts, strict=True)}
        self._epoch, self._below, self._is_over = state["epoch"], state["below"], state["is_over"]
        self.kept_share, self.history = state["kept_share"], [dict(entry) for entry in state["history"]]

"""Whether runs of one study are more alike than runs of different ones: rank correlations, and a permutation test."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from rgft.bench.map_study.correlation import Values, correlate

#: Ways to deal runs out to studies that are tried one by one; of more, as many are drawn.
MOST = 5000


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How alike maps are: mean Spearman's ρ over pairs of runs.

    Attributes:
        within: study → between its seeds: how far a map repeats itself at all; None with one seed.
        between: between runs of different studies; None with one study, or different models.
        difference: mean ρ of all pairs within a study, less `between`; above 0: studies favour different components.
        p: share of the ways to deal the same runs out to studies of these sizes whose difference is at least as large
            (permutation test, one-sided): how often it would be so if studies did not differ.
        least_p: the smallest that `p` can be with so few runs.
    """

    within: Mapping[str, float | None]
    between: float | None
    difference: float | None = None
    p: float | None = None
    least_p: float | None = None


def likeness(runs: Mapping[str, Sequence[Values]], *, seed: int = 0) -> Likeness:
    """How alike the runs of studies are.

    Args:
        runs: study → the map of each of its seeds; empty ones, of what was not measured, are left out.
        seed: of the draws, where there are too many ways to deal runs out.
    """
    runs = {study: [values for values in of_study if values] for study, of_study in runs.items()}
    maps = [values for of_study in runs.values() for values in of_study]
    studies = np.repeat(np.arange(len(runs)), [len(of_study) for of_study in runs.values()])
    rho = np.full((len(maps), len(maps)), np.nan)  # above the diagonal
    for one, other in combinations(range(len(maps)), 2):
        found = correlate([(maps[one], maps[other])], draws=1).rho
        rho[one, other] = np.nan if found is None else found
    within = {
        study: _mean(rho[np.ix_(studies == place, studies == place)]) for place, study in enumerate(runs)
    }  # fmt: skip
    # Runs that cannot be held against each other, as those of two models, cannot change places.
    pairs = rho[np.triu_indices(len(maps), k=1)]
    difference = _difference(rho, studies) if np.isfinite(pairs).all() else None
    if difference is None:
        return Likeness(within=within, between=_mean(rho[studies[:, None] != studies]))
    sizes = [len(of_study) for of_study in runs.values() if of_study]
    ways = math.factorial(len(maps)) // math.prod(math.factorial(size) for size in sizes)
    # Two studies of one size change places without any effect.
    alike = math.prod(math.factorial(sizes.count(size)) for size in set(sizes))
    if ways <= MOST:
        dealt, least = _deals(np.arange(len(maps)), sizes), alike / ways
    else:
        generator = np.random.default_rng(seed)
        dealt = (studies, *(generator.permutation(studies) for _ in range(MOST)))
        least = 1.0 / (MOST + 1)
    differences = [found for labels in dealt if (found := _difference(rho, labels)) is not None]
    return Likeness(
        within=within, between=_mean(rho[studies[:, None] != studies]), difference=difference,
        p=sum(found >= difference - 1e-12 for found in differences) / len(differences), least_p=least,
    )  # fmt: skip


def _difference(rho: np.ndarray, studies: np.ndarray) -> float | None:
    """Mean ρ of pairs within studies less that of pairs between them; None where one of them is undefined."""
    is_same = studies[:, None] == studies
    same, other = _mean(rho[is_same]), _mean(rho[~is_same])
    return None if same is None or other is None else same - other


def _mean(rho: np.ndarray) -> float | None:
    """Mean of what is defined."""
    defined = rho[np.isfinite(rho)]
    return float(defined.mean()) if defined.size else None


def _deals(runs: np.ndarray, sizes: Sequence[int]) -> Iterator[np.ndarray]:
    """Every way to deal runs out to studies of these sizes: the study of each run [R]."""
    if len(sizes) == 1:
        yield np.zeros(len(runs), dtype=int)
        return
    for chosen in combinations(range(len(runs)), sizes[0]):
        rest = np.setdiff1d(np.arange(len(runs)), chosen)
        for labels in _deals(runs[rest], sizes[1:]):
            dealt = np.zeros(len(runs), dtype=int)
            dealt[rest] = labels + 1
            yield dealt

"""Rank correlation over components, averaged over seeds, with an interval for the choice of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import rankdata

Values = Mapping[str, float]
Resampled = Literal["", "components", "seeds and components"]

#: Draws of a bootstrap.
DRAWS = 2000


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Spearman's ρ between a map and what was measured, in the mean over seeds.

    Attributes:
        rho: None where it is undefined.
        low, high: 95 % percentile bootstrap over what `over` says: seeds are drawn, and components, the same ones in
            every seed, since it is the same components that all seeds have (Owen's pigeonhole bootstrap, 2007).
        over: with one seed components alone, which says how much hangs on those that the model happens to have, and
            nothing of seeds. Few seeds make an interval too narrow.
        components: over how many.
        seeds: over how many it is defined.
        reason: why it is undefined; "" where it is not.
    """

    rho: float | None
    low: float | None = None
    high: float | None = None
    over: Resampled = ""
    components: int = 0
    seeds: int = 0
    reason: str = ""


def correlate(pairs: Sequence[tuple[Values, Values]], *, draws: int = DRAWS, seed: int = 0) -> Correlation:
    """Spearman's ρ, in the mean over seeds.

    Args:
        pairs: of each seed: the map, and what was measured; seeds that lack one of them are left out, and components
            that either lacks in a seed.
        draws: of the bootstrap.
        seed: of these.
    """
    pairs = [(one, other) for one, other in pairs if one and other]
    if not pairs:
        return Correlation(rho=None, reason="not measured")
    common = set.intersection(*(set(one) & set(other) for one, other in pairs))
    names = [name for name in pairs[0][0] if name in common]
    if len(names) < 3:
        return Correlation(rho=None, components=len(names), reason=f"{len(names)} components have both")
    one = np.array([[values[name] for name in names] for values, _ in pairs])
    other = np.array([[values[name] for name in names] for _, values in pairs])
    rho = _spearman(one, other)
    defined = np.isfinite(rho)
    if not defined.any():
        return Correlation(rho=None, components=len(names), reason="all components are alike")
    seeds, generator = int(defined.sum()), np.random.default_rng(seed)
    drawn = generator.integers(len(names), size=(draws, len(names)))
    # [draws, seeds]; a draw in which all are alike tells nothing
    resampled = np.stack([_spearman(x[drawn], y[drawn]) for x, y in zip(one[defined], other[defined], strict=True)], 1)
    if seeds > 1:
        resampled = np.take_along_axis(resampled, generator.integers(seeds, size=(draws, seeds)), axis=1)
    means = resampled.mean(1)
    low, high = np.percentile(means[np.isfinite(means)], [2.5, 97.5]) if np.isfinite(means).any() else (np.nan, np.nan)
    is_known = bool(np.isfinite(low))
    return Correlation(
        rho=float(rho[defined].mean()), low=float(low) if is_known else None, high=float(high) if is_known else None,
        over=("seeds and components" if seeds > 1 else "components") if is_known else "",
        components=len(names), seeds=seeds,
    )  # fmt: skip


def _spearman(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """ρ of each row, tied values sharing their mean rank; NaN where a side is constant."""
    x, y = rankdata(one, axis=-1), rankdata(other, axis=-1)
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    norms = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(norms > 0.0, (x * y).sum(-1) / norms, np.nan)

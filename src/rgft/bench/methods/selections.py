"""Methods that choose what trains: policies of `rgft.allocation.peers`, where each has its paper and its reading.

They run with all that RGFT saves beside its choice (truncation, the cache, padding and unread positions not computed,
no dropout where no example comes again): what they are held against is the choice alone. What they look at, how finely
they choose and how often are their papers'; intervals that these give in steps are shares of the run here, whose runs
are shorter. Multipliers are 1 and nothing is averaged. LISA's and BAdam's codes make Adam anew at each switch: what
goes off loses its moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rgft.bench.methods.base import Method, variants_of
from rgft.bench.methods.granularities import matrices, tensors

_PREFIX = "dW of what is off, dX and (cached) F below the lowest layer that is on"
_LOOKS = f"{_PREFIX}; probes added"

#: IST: layers scaled down, looked at every 10 steps, at about the price of its three forward passes.
_IST: Mapping[str, Any] = {
    "signal": {"name": "suppression", "factor": 0.25}, "probe": {"interval": 10, "size": 8}, "warmup_fraction": 0.0,
}  # fmt: skip
#: AutoFreeze: gradient norms of the training batches themselves, without a phase of measuring.
_AUTOFREEZE: Mapping[str, Any] = {
    "signal": {"name": "grad_norm", "p": 2, "normalise": "raw"}, "probe": {"interval": 1, "size": 0},
    "warmup_fraction": 0.0,
}  # fmt: skip
#: GreenTrainer: tensors, by the last look alone; it looks first where all is on, then now and then.
_GREENTRAINER: Mapping[str, Any] = {
    "granularity": tensors, "signal": "predicted_decrease", "error_map": {"beta": 0.0},
    "probe": {"max_fraction": 0.05, "row_stride": 1},
}  # fmt: skip


def _selection(
    name: str, title: str, source: str, *, policy: str = "", cost: str = _PREFIX, moments: str = "keep",
    cache: str = "auto", measures: Mapping[str, Any] | None = None, revision: int = 1,
    tries: tuple[Any, ...] = (), **settings: Any,
) -> Method:  # fmt: skip
    """A policy with its settings.

    `measures`: what it is decided by, and of what; `tries`: a setting of it, and its other values.
    """
    return Method(
        name=name, title=title, source=source, cost=cost, revision=revision,
        variants=variants_of(f"config.policy.{tries[0]}", *tries[1:]) if tries else {},
        config={
            "policy": {"name": policy or name, **settings}, "update": {"average_last": 0.0, "moments": moments},
            "execution": {"cache": cache}, **(measures or {}),
        },
    )  # fmt: skip


METHODS = (
    _selection("last_n", "the last layers", "Lee et al. 2019 (arXiv:1911.03090)", layers=3, tries=("layers", 2, 4)),
    _selection(
        "last_n_uncached", "the last layers, no cache", "Lee et al. 2019 (arXiv:1911.03090)", policy="last_n", layers=3,
        tries=("layers", 2, 4), cache="none", cost="dW and dX below the last layers; F is computed each time",
    ),
    _selection("linear_probe", "the classifier alone", "Alain and Bengio 2016 (arXiv:1610.01644)"),
    _selection(
        "layer_wise_decay", "rates decaying with depth, by .95 a layer", "Sun et al. 2019 (arXiv:1905.05583)",
        cost="nothing", tries=("xi", 0.9, 0.8),
    ),
    _selection(
        "gradual_unfreezing", "gradual unfreezing", "Howard and Ruder 2018 (arXiv:1801.06146)", until=0.75, revision=2,
        tries=("until", 0.25, 0.5),
    ),
    _selection(
        "lisa", "LISA", "Pan et al. 2024 (arXiv:2403.17919)", moments="reset", every=0.1, revision=2,
        tries=("layers", 1, 4),
        cost="dW of layers that are off; embeddings train, so that dX runs to the bottom",
    ),
    # As its code has it: no block of embeddings, and a new head trains beside every block (`active_modules`).
    _selection(
        "badam", "BAdam", "Luo et al. 2024 (arXiv:2404.02827)", moments="reset", cycles=1, revision=3,
        embeddings=False, always_on=("classifier",), tries=("cycles", 2, 4),
    ),
    _selection(
        "hft", "half fine-tuning", "Hui et al. 2024 (arXiv:2404.18466)", measures={"granularity": matrices}, every=0.25,
        cost="dW of what is off", revision=2, tries=("every", 0.1, 0.5),
    ),
    _selection(
        "ist", "IST", "Yao et al. 2024 (arXiv:2410.11772)", measures=_IST, cost=_LOOKS, revision=2,
        tries=("fraction", 0.5, 0.75),
    ),
    _selection(
        "autofreeze", "AutoFreeze", "Liu et al. 2021 (arXiv:2102.01386)", measures=_AUTOFREEZE, every=0.05, revision=2,
        tries=("percentile", 25, 75),
    ),
    _selection(
        "greentrainer", "GreenTrainer", "Huang et al. 2023 (arXiv:2309.13192)", measures=_GREENTRAINER, cost=_LOOKS,
        revision=2, tries=("rho", 0.4, 0.7),
    ),
)  # fmt: skip

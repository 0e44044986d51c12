"""Methods that choose what trains: policies of `rgft.allocation.peers`, where each has its paper and its reading.

They run with all that RGFT saves beside its choice (truncation, the cache, padding and unread positions not computed,
no dropout where no example comes again): what they are held against is the choice alone. Multipliers are 1 and nothing
is averaged, as in their papers. LISA's and BAdam's codes make Adam anew at each switch: what goes off loses its
moments.
"""

from __future__ import annotations

from typing import Any

from rgft.bench.methods.base import Method

_PREFIX = "dW of what is off, dX and (cached) F below the lowest layer that is on"


def _selection(
    name: str, title: str, source: str, *, policy: str = "", cost: str = _PREFIX, moments: str = "keep",
    cache: str = "auto", **settings: Any,
) -> Method:  # fmt: skip
    return Method(
        name=name, title=title, source=source, cost=cost,
        config={
            "policy": {"name": policy or name, **settings}, "update": {"average_last": 0.0, "moments": moments},
            "execution": {"cache": cache},
        },
    )  # fmt: skip


METHODS = (
    _selection("last_n", "the last layers", "Lee et al. 2019 (arXiv:1911.03090)", layers=3),
    _selection(
        "last_n_uncached", "the last layers, no cache", "Lee et al. 2019 (arXiv:1911.03090)", policy="last_n", layers=3,
        cache="none", cost="dW and dX below the last layers; F is computed each time",
    ),
    _selection("linear_probe", "the classifier alone", "Alain and Bengio 2016 (arXiv:1610.01644)"),
    _selection(
        "layer_wise_decay", "rates decaying with depth", "Howard and Ruder 2018 (arXiv:1801.06146)",
        cost="nothing",
    ),
    _selection("gradual_unfreezing", "gradual unfreezing", "Howard and Ruder 2018 (arXiv:1801.06146)", every=15),
    _selection(
        "lisa", "LISA", "Pan et al. 2024 (arXiv:2403.17919)", moments="reset",
        cost="dW of layers that are off; embeddings train, so that dX runs to the bottom",
    ),
    _selection("badam", "BAdam", "Luo et al. 2024 (arXiv:2404.02827)", moments="reset", every=15),
    _selection("hft", "half fine-tuning", "Hui et al. 2024 (arXiv:2404.18466)", cost="dW of what is off"),
    _selection("ist", "IST", "Yao et al. 2024 (arXiv:2410.11772)"),
    _selection("autofreeze", "AutoFreeze", "Liu et al. 2021 (arXiv:2102.01386)"),
    _selection("greentrainer", "GreenTrainer", "Huang et al. 2023 (arXiv:2309.13192)"),
    _selection("fim_static", "Fisher information, chosen once", "Sung et al. 2021 (arXiv:2111.09839)"),
)  # fmt: skip

"""Router share: how much of the traffic of a mixture of experts each expert gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rgft.components import Component
from rgft.errors import DataError
from rgft.signals.base import Probe, Signal
from rgft.signals.captures import first_tensor


@dataclass(frozen=True, kw_only=True)
class RouterShare(Signal):
    """Share of the routed tokens' choices that go to an expert; over a block's experts the shares add up to 1.

    Each token chooses k experts (Shazeer et al. 2017). The choices are read off the router: the integer tensor it
    returns, or the top k of its logits. Only experts are scored. Padding tokens are routed too and count. One forward
    pass without gradients.

    Attributes:
        k: experts per token where the router only returns logits; None: its `top_k`, its parent's, or the model
            configuration's `num_experts_per_tok`.
    """

    name: ClassVar[str] = "router_share"
    k: int | None = None

    @torch.no_grad()
    def measure(self, probe: Probe) -> dict[str, float]:
        routers = {_router_path(c): c for c in probe.partition if c.kind == "router"}
        chosen: dict[str, list[Tensor]] = {path: [] for path in routers}

        def hook(path: str) -> Callable[..., None]:
            return lambda module, args, output: chosen[path].append(self._choices(probe.model, path, output))

        handles = [probe.model.get_submodule(path).register_forward_hook(hook(path)) for path in routers]
        try:
            probe.loss(probe.model, probe.batch)
        finally:
            for handle in handles:
                handle.remove()
        counts = {path: torch.cat(calls).bincount() for path, calls in chosen.items() if calls}
        shares = {path: (count / count.sum()).tolist() for path, count in counts.items()}
        scores: dict[str, float] = {}
        for component in probe.partition:
            path = _nearest(component, shares) if component.kind == "expert" else None
            if path is not None and component.index is not None:
                share = shares[path]
                scores[component.name] = share[component.index] if component.index < len(share) else 0.0
        return scores

    def _choices(self, model: nn.Module, path: str, output: Any) -> Tensor:
        """Index of every chosen expert, flat."""
        items = output if isinstance(output, tuple | list) else (output,)
        for item in items:
            if isinstance(item, Tensor) and not item.is_floating_point() and item.dtype != torch.bool:
                return item.flatten()
        logits = first_tensor(output)
        k = self.k
        if k is None:
            settings = (
                getattr(model.get_submodule(path), "top_k", None),
                getattr(model.get_submodule(path.rpartition(".")[0]), "top_k", None),
                getattr(getattr(model, "config", None), "num_experts_per_tok", None),
            )
            k = next((setting for setting in settings if isinstance(setting, int)), None)
        if logits is None or k is None:
            raise DataError(f"cannot read the choices of router {path!r}; pass k=<experts per token>")
        return logits.topk(k, dim=-1).indices.flatten()


def _router_path(router: Component) -> str:
    return router.slices[0].parameter.rpartition(".")[0]


def _nearest(expert: Component, routers: dict[str, list[float]]) -> str | None:
    """The router of the expert's own block: in its layer, with the longest path in common."""
    own = expert.slices[0].parameter
    inside = [path for path in routers if expert.layer is None or path.startswith(expert.layer + ".")]
    return max(inside, key=lambda path: _modules_in_common(path, own), default=None)


def _modules_in_common(first: str, second: str) -> int:
    pairs = zip(first.split("."), second.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

"""Parameter groups for an optimizer: all components, whether on now or not."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from rgft.components import Component
from rgft.errors import RGFTWarning
from rgft.execution.binding import Binding
from rgft.optimizer.muon import IS_MATRIX

#: How parameters are grouped beside rate and decay; see `rgft.optimizer.Kind`.
By = Literal["rate", "matrix", "component"]

#: Kinds of components that hold no hidden layers' matrices.
NOT_HIDDEN = frozenset({"embedding", "classifier", "lm_head", "norm"})


def param_groups(
    model: nn.Module, binding: Binding, *, lr: float, classifier_lr: float, weight_decay: float,
    decays: Collection[str] | None, by: By = "rate", pair_lr_multiplier: float = 1.0,
) -> list[dict[str, Any]]:  # fmt: skip
    """Groups of equal rate and decay.

    Args:
        model, binding: whose parameters.
        lr, classifier_lr: learning rates at multiplier 1.
        weight_decay: for weights; biases and norms (one-dimensional parameters) have none.
        decays: names of the parameters that decay, as the model shows them now; None: as under `weight_decay`.
        by: "matrix" puts matrices of hidden layers apart and marks them (low-rank pairs are none of them); "component"
            gives each component its own, and what may be off by itself of one with pairs (`Binding.parts`).
        pair_lr_multiplier: of the learning rate of low-rank pairs.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[float, float, Any], list[nn.Parameter]] = {}
    for component, parameters in binding:
        rate = classifier_lr if component.kind == "classifier" else lr
        names = binding.names[component.name]
        for part, parameter, name in zip(component.slices, parameters, names, strict=True):
            is_decayed = len(part.shape) > 1 if decays is None else name in decays
            is_matrix = _is_matrix(component, parameter) and id(parameter) not in tables
            apart = {"rate": None, "matrix": is_matrix, "component": binding.part_of(parameter)}[by]
            groups.setdefault((rate, weight_decay if is_decayed else 0.0, apart), []).append(parameter)
        for parameter, name in _pairs(binding, component):
            decay = weight_decay if decays is None or name in decays else 0.0
            apart = {"rate": None, "matrix": False, "component": binding.part_of(parameter)}[by]
            groups.setdefault((rate * pair_lr_multiplier, decay, apart), []).append(parameter)
    return [
        {"params": p, "lr": rate, "weight_decay": decay, **({IS_MATRIX: apart} if by == "matrix" else {})}
        for (rate, decay, apart), p in groups.items()
    ]


def warn_of_shared_rates(optimizer: Optimizer, binding: Binding, *, pair_lr_multiplier: float) -> None:
    """Says where low-rank pairs stand in one group with dense weights, and so learn at the rate of these."""
    low_rank = binding.low_rank
    if low_rank is None or pair_lr_multiplier == 1.0:
        return
    # A classifier has a rate of its own, which may well be that of pairs.
    dense = {id(p) for component, held in binding if component.kind != "classifier" for p in held}
    for index, group in enumerate(optimizer.param_groups):
        has_pairs = any(low_rank.owner(parameter) is not None for parameter in group["params"])
        if has_pairs and any(id(parameter) in dense for parameter in group["params"]):
            warnings.warn(
                f"the optimizer's group {index} holds low-rank pairs beside dense weights, at one learning rate "
                f"({group['lr']:g}); pairs are meant to have {pair_lr_multiplier:g} times that of dense weights. Build "
                "the optimizer from guide.param_groups(lr=…), or set update.low_rank.lr_multiplier to 1",
                RGFTWarning, stacklevel=3,
            )  # fmt: skip
            return


def _pairs(binding: Binding, component: Component) -> Iterator[tuple[nn.Parameter, str]]:
    """A component's low-rank pairs, if it may have any, and their names."""
    low_rank = binding.low_rank
    if low_rank is not None and component.name in low_rank.sites:
        yield from zip(low_rank.pairs[component.name], low_rank.names[component.name], strict=True)


def _is_matrix(component: Component, parameter: nn.Parameter) -> bool:
    return parameter.dim() == 2 and component.kind not in NOT_HIDDEN

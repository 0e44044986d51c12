"""Finer splits than RGFT's own, of methods whose papers choose among tensors or matrices."""

from __future__ import annotations

from torch import nn

from rgft.partition import partition


def tensors(model: nn.Module) -> dict[str, list[str]]:
    """Each parameter by itself."""
    return {name: [name] for name, parameter in model.named_parameters() if parameter.requires_grad}


def matrices(model: nn.Module) -> dict[str, list[str]]:
    """Each matrix of a layer with its bias and the norms behind it, and each module outside the layers.

    Norms that a layer has before its first matrix belong to that.
    """
    dimensions = {name: p.dim() for name, p in model.named_parameters() if p.requires_grad}
    owned: dict[str, list[str]] = {}
    for layer in partition(model).layers:
        inside = [name for name in dimensions if name.startswith(f"{layer}.")]
        owner = next((name for name in inside if dimensions[name] > 1), layer)
        for name in inside:
            if dimensions.pop(name) > 1:
                owner = name
            owned.setdefault(owner, []).append(name)
    for name in dimensions:
        owned.setdefault(name.rpartition(".")[0], []).append(name)
    return owned

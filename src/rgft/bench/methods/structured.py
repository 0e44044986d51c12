"""S²FT: a share of heads and of feed-forward channels, drawn once, of which the output projections' columns train.

dW is a dense product over those columns alone. The paper permutes weights so that what is chosen lies together; here
slices need no permutation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from rgft.architectures.patterns import ATTENTION, FFN, matches
from rgft.architectures.roles import Range, head_ranges, neuron_ranges
from rgft.bench.methods.base import Method, variants_of
from rgft.bench.methods.peft_kinds import HEADS
from rgft.components import ParameterSlice
from rgft.errors import ConfigError
from rgft.partition import partition

#: Blocks that a feed-forward block's channels are chosen by.
FFN_BLOCKS = 24


def coupled_columns(model: nn.Module) -> dict[str, list[str | ParameterSlice]]:
    """One component for each head's, and each block of channels', columns of the output projection; and the head."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    owned: dict[str, list[str | ParameterSlice]] = {}
    for path in partition(model).layers:
        layer = model.get_submodule(path)
        for pattern in matches(layer, (*ATTENTION, *FFN)):
            groups: list[list[Range]] = (
                head_ranges(layer, pattern, getattr(model, "config", None))
                if pattern.kind == "attention" else neuron_ranges(layer, pattern, FFN_BLOCKS)
            )  # fmt: skip
            for number, ranges in enumerate(groups):
                of_output = ranges[-1]
                name = f"{path}.{of_output.parameter}"
                if name in shapes:
                    owned[f"{path}.{pattern.name}.columns.{number}"] = [
                        ParameterSlice(
                            parameter=name, shape=shapes[name], dim=of_output.dim, start=of_output.start,
                            stop=of_output.stop,
                        )
                    ]  # fmt: skip
    taken = {item.parameter for items in owned.values() for item in items if isinstance(item, ParameterSlice)}
    for name in shapes:
        if name not in taken:
            owned.setdefault(name.rpartition(".")[0], []).append(name)
    return owned


def _only_outputs(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    chosen = {
        f"{path}.{pattern.output}.weight"
        for path in partition(model).layers
        for pattern in matches(model.get_submodule(path), (*ATTENTION, *FFN))
    }
    if not chosen.intersection(name for name, _ in model.named_parameters()):
        raise ConfigError(
            "s2ft: expected layers with attention heads or feed-forward channels that are known (see "
            f"rgft.architectures.patterns), found none in {type(model).__name__}, so that its head would train alone; "
            "leave this method out on this model"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen or any(part in HEADS for part in name.split(".")))
    return model


METHOD = Method(
    name="s2ft", title="S2FT: columns of heads and channels", source="Yang et al. 2024 (arXiv:2412.06289)",
    cost="dW but for the chosen columns, a dense product; dX runs to the lowest layer", change=_only_outputs,
    config={
        "granularity": coupled_columns, "policy": {"name": "s2ft"}, "execution": {"cache": "none"},
        "update": {"average_last": 0.0},
    },
    variants=variants_of("config.policy.fraction", 0.05, 0.3), revision=2,
)  # fmt: skip

"""Bottleneck adapters: a small two-layer network with a skip connection behind a sub-layer, near identity at first.

PEFT has none. They sit on the output projections of attention and feed-forward blocks, which any known architecture has
(`rgft.architectures`), before the block's own skip connection, as Houlsby et al. place them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rgft.architectures.patterns import ATTENTION, FFN, find, matches
from rgft.bench.methods.adapters import adapter
from rgft.bench.methods.base import Change, variants_of
from rgft.bench.methods.peft_kinds import HEADS
from rgft.errors import ConfigError
from rgft.partition import partition

#: Deviation of weights at the beginning (Houlsby et al., section 3.6).
INITIAL_DEVIATION = 1e-2


class Bottleneck(nn.Module):
    """y + U act(D y + b) + c, of the output y of the module that it wraps, which is frozen.

    Args:
        base_layer: whose output has `width` features.
        width, size: of the states, and of the bottleneck.
        activation: between the two layers.
    """

    #: Makes it an adapter for `rgft.partition`, as PEFT's modules are.
    adapter_layer_names = ("down", "up")

    def __init__(self, base_layer: nn.Module, *, width: int, size: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        weight = next(base_layer.parameters())
        self.base_layer, self.activation = base_layer, activation
        down, up = (
            nn.Linear(*sizes, device=weight.device, dtype=weight.dtype) for sizes in ((width, size), (size, width))
        )
        # As in PEFT's modules, by the name of an adapter: so all of it is one component.
        self.down, self.up = nn.ModuleDict({"default": down}), nn.ModuleDict({"default": up})
        for layer in (down, up):
            nn.init.trunc_normal_(
                layer.weight, std=INITIAL_DEVIATION, a=-2 * INITIAL_DEVIATION, b=2 * INITIAL_DEVIATION
            )
            nn.init.zeros_(layer.bias)

    @property
    def weight(self) -> Tensor:
        """Of the wrapped module: T5 asks its output projections for the type of their weights."""
        return self.base_layer.get_parameter("weight")

    def forward(self, states_BTD: Tensor) -> Tensor:
        y_BTD = self.base_layer(states_BTD)
        return y_BTD + self.up["default"](self.activation(self.down["default"](y_BTD)))


def outputs(model: nn.Module, *, attention: bool) -> list[str]:
    """Paths of the output projections of all layers' feed-forward blocks, and of attention if asked."""
    return [
        f"{layer}.{pattern.output}"
        for layer in partition(model).layers
        for pattern in matches(model.get_submodule(layer), (*(ATTENTION if attention else ()), *FFN))
    ]


def _with_bottlenecks(
    *, attention: bool, norms: bool, activation: Callable[[Tensor], Tensor]
) -> Change:  # fmt: skip
    def change(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
        paths = outputs(model, attention=attention)
        if not paths:
            raise ConfigError(
                f"bottleneck adapters: expected a model with known attention and feed-forward blocks, found none in "
                f"{type(model).__name__}; its family needs a line in rgft.architectures.patterns"
            )
        for name, parameter in model.named_parameters():
            is_norm = norms and isinstance(find(model, name.rpartition(".")[0]), nn.LayerNorm)
            parameter.requires_grad_(is_norm or any(part in HEADS for part in name.split(".")))
        for path in paths:
            parent, _, name = path.rpartition(".")
            projection = model.get_submodule(path)
            width = getattr(projection, "out_features", None) or projection.get_parameter("weight").shape[-1]
            wrapper = Bottleneck(projection, width=int(width), size=settings["size"], activation=activation)
            setattr(model.get_submodule(parent), name, wrapper)
        return model

    return change


METHODS = (
    adapter(
        "houlsby", "adapters after attention and feed-forward", "Houlsby et al. 2019 (arXiv:1902.00751)",
        _with_bottlenecks(attention=True, norms=True, activation=nn.functional.gelu), settings={"size": 16},
        variants=variants_of("size", 8, 64),
    ),
    adapter(
        "pfeiffer", "adapters after feed-forward", "Pfeiffer et al. 2020 (arXiv:2005.00247)",
        _with_bottlenecks(attention=False, norms=False, activation=torch.relu), settings={"size": 24},
        variants=variants_of("size", 8, 96),
    ),
)  # fmt: skip

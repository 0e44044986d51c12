"""The convolutions of a layer, and which slices of which parameters belong to which of their output channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from rgft.architectures.layers import join, parametered
from rgft.architectures.roles import Range

_Convolving = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """A convolution, whose weight has its output channels along dimension 0.

    Attributes:
        path: below the layer; empty for a layer that is one.
        module: the convolution.
        norm: path of the batch norm over its output, or None.
    """

    path: str
    module: _Convolving
    norm: str | None = None


def find_convolutions(layer: nn.Module) -> Iterator[Convolution]:
    """The convolutions of a layer, in registration order.

    Left out are transposed ones, whose output channels lie along another dimension, and parametrized ones.
    """
    if isinstance(layer, _Convolving) and not is_parametrized(layer):
        yield Convolution(path="", module=layer)
    for path, module in layer.named_modules():
        children = list(parametered(module).items())
        for position, (name, child) in enumerate(children):
            if isinstance(child, _Convolving) and not is_parametrized(child):
                norm = _norm_over(child, children[position + 1 :])
                yield Convolution(path=join(path, name), module=child, norm=None if norm is None else join(path, norm))


def _norm_over(convolution: _Convolving, behind: Sequence[tuple[str, nn.Module]]) -> str | None:
    """Name of the batch norm over a convolution's output: what is registered right behind it, with as many channels.

    Modules are registered in the order that they run in, as a rule. Two norms in a row (conv1, conv2, bn1, bn2) show
    that here they are not.
    """
    norms = [module for _, module in behind[:2] if isinstance(module, _BatchNorm)]
    if len(norms) != 1 or norms[0] is not behind[0][1] or is_parametrized(norms[0]):
        return None
    return behind[0][0] if norms[0].num_features == convolution.out_channels else None


def channel_ranges(convolution: Convolution, blocks: int) -> list[list[Range]]:
    """What belongs to each of `blocks` blocks of output channels of (nearly) equal size, along dimension 0.

    That are kernels, biases, and weights and biases of the norm. There are never more blocks than channels. Where there
    are as many groups as blocks, blocks are whole groups.
    """
    module = convolution.module
    units = module.groups if module.groups >= blocks else module.out_channels
    size, count = module.out_channels // units, min(blocks, units)
    names = [join(convolution.path, name) for name in _own(module)]
    if convolution.norm is not None:
        names += [join(convolution.norm, name) for name in ("weight", "bias")]
    bounds = [units * block // count * size for block in range(count + 1)]
    return [[Range(name, 0, start, stop) for name in names] for start, stop in pairwise(bounds)]


def _own(module: _Convolving) -> tuple[str, ...]:
    return ("weight",) if module.bias is None else ("weight", "bias")

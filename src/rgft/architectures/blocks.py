"""The blocks of a layer: attention and feed-forward by the tables, or else by names, or else child by child."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from rgft.architectures.layers import is_norm, join, parametered
from rgft.architectures.patterns import ATTENTION, FFN, BlockPattern, ExpertsPattern, match_experts, matches

_CONTAINERS = (nn.ModuleList, nn.Sequential)
_ATTENTION_NAMES = ("attention", "attn")
_FFN_NAMES = ("mlp", "ffn", "ff", "feed_forward", "feedforward", "moe", "block_sparse_moe", "experts")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A part of a layer.

    Attributes:
        name: below the layer; the module's path when the block is one module.
        kind: attention, ffn, conv_block or other.
        members: module paths below the layer whose parameters belong to the block.
        pattern: how to split it, or None when that is not known.
        experts: how its experts lie, for a mixture of experts.
    """

    name: str
    kind: str
    members: tuple[str, ...]
    pattern: BlockPattern | None = None
    experts: ExpertsPattern | None = None

    def owns(self, name: str) -> bool:
        """Whether the parameter (named relative to the layer) lies in one of the members."""
        return any(name.startswith(f"{member}.") for member in self.members)


def find_blocks(layer: nn.Module) -> list[Block]:
    """Blocks of a layer in forward order: attention, cross-attention, feed-forward; else its units in registration order.

    What belongs to none of them (norms between the blocks) is left out.
    """
    blocks = [
        Block(name=found.name, kind=found.kind, members=found.members, pattern=found)
        for found in matches(layer, ATTENTION)
    ]
    blocks = blocks or [
        Block(name=path, kind="attention", members=(path,)) for path in _named(layer, _is_attention_name)
    ]
    experts = match_experts(layer)
    dense = [
        Block(name=found.name, kind=found.kind, members=found.members, pattern=found) for found in matches(layer, FFN)
    ]
    if experts is not None:
        # A shared expert lies inside the mixture's module and is split by a pattern of its own.
        blocks += [block for block in dense if block.name.startswith(f"{experts.name}.")]
        blocks.append(Block(name=experts.name, kind="ffn", members=(experts.name,), experts=experts))
    else:
        blocks += dense or [
            Block(name=path, kind="ffn", members=(path,)) for path in _named(layer, lambda name: name in _FFN_NAMES)
        ]
    return blocks if any(block.kind == "attention" for block in blocks) else blocks + _units(layer, blocks)


def is_transformer(blocks: list[Block]) -> bool:
    """Whether a layer with these blocks has attention."""
    return any(block.kind == "attention" for block in blocks)


def _is_attention_name(name: str) -> bool:
    return "norm" not in name and any(part in name for part in _ATTENTION_NAMES)


def _named(layer: nn.Module, accept: Callable[[str], bool]) -> list[str]:
    """Outermost submodules with a matrix inside whose own name is accepted."""
    found: list[str] = []

    def walk(path: str, module: nn.Module) -> None:
        for name, child in parametered(module).items():
            below = join(path, name)
            if accept(name.lower()) and any(p.dim() >= 2 for p in child.parameters()):
                found.append(below)
            else:
                walk(below, child)

    walk("", layer)
    return found


def _units(layer: nn.Module, blocks: list[Block]) -> list[Block]:
    """The layer's remaining children, containers opened; a norm joins the unit before it."""
    units: list[tuple[str, nn.Module, list[str]]] = []

    def walk(path: str, module: nn.Module) -> None:
        for name, child in parametered(module).items():
            below = join(path, name)
            if any(block.owns(f"{below}.") for block in blocks):
                continue
            if isinstance(child, _CONTAINERS):
                walk(below, child)
            elif units and is_norm(child):
                units[-1][2].append(below)
            else:
                units.append((below, child, [below]))

    walk("", layer)
    return [
        Block(name=path, kind="conv_block" if _has_conv(unit) else "other", members=tuple(members))
        for path, unit, members in units
    ]


def _has_conv(module: nn.Module) -> bool:
    return any(isinstance(inner, _ConvNd) for inner in module.modules())

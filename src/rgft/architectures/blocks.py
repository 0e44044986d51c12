"""The blocks of a layer: attention and feed-forward by the tables, or else by names, or else child by child."""

from __future__ import annotations

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
    """Blocks of a layer in forward order: attention, cross-attention, feed-forward; without attention, its units.

    What belongs to none of them (norms between the blocks) is left out.
    """
    blocks = [_known(pattern) for pattern in matches(layer, ATTENTION)]
    blocks = blocks or [Block(name=path, kind="attention", members=(path,)) for path in _attention_by_name(layer)]
    has_attention = bool(blocks)
    experts = match_experts(layer)
    dense = [_known(pattern) for pattern in matches(layer, FFN)]
    if experts is not None:
        # A shared expert lies inside the mixture's module and is split by a pattern of its own.
        dense = [block for block in dense if block.name.startswith(f"{experts.name}.")]
        dense.append(Block(name=experts.name, kind="ffn", members=(experts.name,), experts=experts))
    return blocks + dense + _units(layer, blocks + dense, has_attention=has_attention)


def is_transformer(blocks: list[Block]) -> bool:
    """Whether a layer with these blocks has attention."""
    return any(block.kind == "attention" for block in blocks)


def outermost(blocks: list[Block]) -> list[Block]:
    """Blocks without those that lie inside another one (a shared expert inside its mixture)."""
    return [
        block
        for block in blocks
        if not any(other is not block and all(other.owns(f"{m}.") for m in block.members) for other in blocks)
    ]


def _known(pattern: BlockPattern) -> Block:
    return Block(name=pattern.name, kind=pattern.kind, members=pattern.members, pattern=pattern)


def _has_matrix(module: nn.Module) -> bool:
    return any(
        p.dim() >= 2
        for inner in module.modules()
        if not isinstance(inner, nn.Embedding)
        for p in inner.parameters(recurse=False)
    )


def _attention_by_name(layer: nn.Module) -> list[str]:
    """Outermost submodules with a matrix inside that are called attention and are no norm."""
    found: list[str] = []

    def walk(path: str, module: nn.Module) -> None:
        for name, child in parametered(module).items():
            below, lower = join(path, name), name.lower()
            if "norm" not in lower and any(part in lower for part in _ATTENTION_NAMES) and _has_matrix(child):
                found.append(below)
            else:
                walk(below, child)

    walk("", layer)
    return found


def _units(layer: nn.Module, blocks: list[Block], *, has_attention: bool) -> list[Block]:
    """The layer's remaining children with matrices, containers opened.

    Beside attention, vectors (norms, scales) are left to the layer's rest; elsewhere a norm joins the unit before it.
    """
    units: list[tuple[str, nn.Module, list[str]]] = []

    def walk(path: str, module: nn.Module) -> None:
        for name, child in parametered(module).items():
            below = join(path, name)
            if any(block.owns(f"{below}.") for block in blocks):
                continue
            if isinstance(child, _CONTAINERS) or _holds_block(below):
                walk(below, child)
            elif has_attention and not _has_matrix(child):
                continue
            elif is_norm(child):
                if units:
                    units[-1][2].append(below)
            else:
                units.append((below, child, [below]))

    def _holds_block(path: str) -> bool:
        return any(member.startswith(f"{path}.") for block in blocks for member in block.members)

    walk("", layer)
    return [Block(name=path, kind=_kind(path, unit), members=tuple(members)) for path, unit, members in units]


def _kind(path: str, module: nn.Module) -> str:
    if path.rpartition(".")[2].lower() in _FFN_NAMES:
        return "ffn"
    return "conv_block" if any(isinstance(inner, _ConvNd) for inner in module.modules()) else "other"

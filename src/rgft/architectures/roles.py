"""Which rows and columns of which weight belong to which attention head or FFN neuron block.

Counts of heads come from the attention module's own attributes or its configuration and are checked against the
shapes. With grouped-query attention a head is one key/value group with all its query heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from torch import nn

from rgft.architectures.matrices import is_transposed, linear_size
from rgft.architectures.patterns import BlockPattern, Projection, find, unwrapped
from rgft.errors import PartitionError

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
_HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_kv")
_NESTED = ("text_config", "decoder", "encoder")


class Range(NamedTuple):
    """Indices start:stop along one dimension of the parameter of that name, relative to the layer."""

    parameter: str
    dim: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class HeadCounts:
    """Query heads, key/value heads, and features per head."""

    queries: int
    keys: int
    size: int


class _Linear(NamedTuple):
    """A linear map: its parameters' names below the layer, which dimension its outputs are, and its sizes."""

    weight: str
    bias: str | None
    output_dim: int
    inputs: int
    outputs: int


def _linear(layer: nn.Module, path: str, weight: str = "weight", bias: str = "bias") -> _Linear:
    found = find(layer, path)
    assert found is not None
    module: Any
    module, path = unwrapped(found, path)
    bias_name = f"{path}.{bias}" if getattr(module, bias, None) is not None else None
    if weight != "weight":  # nn.MultiheadAttention holds a bare parameter
        outputs, inputs = getattr(module, weight).shape
        return _Linear(f"{path}.{weight}", bias_name, 0, inputs, outputs)
    size = linear_size(module)
    if size is not None:
        return _Linear(f"{path}.weight", bias_name, 1 if is_transposed(module) else 0, *size)
    raise PartitionError(
        f"expected a Linear or Conv1D at {path!r}, found {type(module).__name__}, whose rows and columns are unknown"
    )


def _rows(linear: _Linear, start: int, stop: int) -> list[Range]:
    rows = [Range(linear.weight, linear.output_dim, start, stop)]
    return rows if linear.bias is None else [*rows, Range(linear.bias, 0, start, stop)]


def _columns(linear: _Linear, start: int, stop: int) -> Range:
    return Range(linear.weight, 1 - linear.output_dim, start, stop)


def _project(layer: nn.Module, projection: Projection) -> _Linear:
    return _linear(layer, projection.module, projection.weight, projection.bias)


def head_counts(layer: nn.Module, pattern: BlockPattern, config: Any) -> HeadCounts:
    """Counts of an attention block, from the modules on the way to its projections, their configurations, or `config`.

    Raises:
        PartitionError: no count is known.
    """
    sources = list(_sources(layer, pattern, config))
    queries = _first(sources, _HEADS)
    if queries is None:
        raise PartitionError(
            f"{pattern.name!r} and its configuration tell no number of heads (looked for {', '.join(_HEADS)})"
        )
    keys = queries
    for source in sources:  # a module's own attributes come before any configuration's
        own, groups = _first([source], _KV_HEADS), _first([source], ("num_key_value_groups",))
        if own or groups:
            keys = own or max(1, queries // (groups or 1))
            break
    size = _first(sources, _HEAD_DIM) or _linear(layer, pattern.output).inputs // queries
    return HeadCounts(queries=queries, keys=keys, size=size)


def _sources(layer: nn.Module, pattern: BlockPattern, config: Any) -> Iterable[Any]:
    segments = pattern.inputs[0].module.split(".")
    for length in range(len(segments), 0, -1):
        module = find(layer, ".".join(segments[:length]))
        if module is None:
            continue
        yield module
        if getattr(module, "config", None) is not None:
            yield module.config
    if config is not None:
        yield config
        yield from (nested for name in _NESTED if (nested := getattr(config, name, None)) is not None)


def _first(sources: list[Any], names: tuple[str, ...]) -> int | None:
    for source in sources:
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def head_ranges(layer: nn.Module, pattern: BlockPattern, config: Any) -> list[list[Range]]:
    """Rows and biases of q, k and v, then columns of the output projection, of each head (key/value group).

    Raises:
        PartitionError: counts and shapes contradict each other.
    """
    counts = head_counts(layer, pattern, config)
    output = _linear(layer, pattern.output)
    widths = {"q": counts.queries * counts.size, "k": counts.keys * counts.size, "v": counts.keys * counts.size}
    problems = [] if counts.queries % counts.keys == 0 else [f"{counts.queries} heads over {counts.keys} key heads"]
    if output.inputs != widths["q"]:
        problems.append(f"{output.weight} takes {output.inputs} features, expected {widths['q']}")
    for projection in pattern.inputs:
        expected, linear = sum(widths[part] for part in projection.parts), _project(layer, projection)
        if linear.outputs != expected:
            problems.append(f"{linear.weight} gives {linear.outputs} features, expected {expected}")
        if projection.interleaved and counts.keys != counts.queries:
            problems.append(f"{linear.weight} alternates q, k, v per head, which leaves no room for shared keys")
    if problems:
        raise PartitionError(
            f"{pattern.name!r} with {counts.queries} query heads, {counts.keys} key/value heads and {counts.size} "
            f"features per head does not fit its weights: {'; '.join(problems)}"
        )
    heads: list[list[Range]] = []
    for group in range(counts.keys):
        ranges: list[Range] = []
        for projection in pattern.inputs:
            linear, offset = _project(layer, projection), 0
            if projection.interleaved:
                share = linear.outputs // counts.keys
                ranges += _rows(linear, group * share, (group + 1) * share)
                continue
            for part in projection.parts:
                share = widths[part] // counts.keys
                ranges += _rows(linear, offset + group * share, offset + (group + 1) * share)
                offset += widths[part]
        share = widths["q"] // counts.keys
        heads.append([*ranges, _columns(output, group * share, (group + 1) * share)])
    return heads


def neuron_ranges(layer: nn.Module, pattern: BlockPattern, blocks: int) -> list[list[Range]]:
    """Rows and biases of up and gate, then columns of down, of `blocks` neuron blocks of (nearly) equal size.

    Raises:
        PartitionError: fewer neurons than blocks, or shapes that contradict each other.
    """
    output = _linear(layer, pattern.output)
    neurons = output.inputs
    for projection in pattern.inputs:
        linear = _project(layer, projection)
        if linear.outputs != neurons * len(projection.parts):
            raise PartitionError(
                f"{pattern.name!r}: {linear.weight} gives {linear.outputs} features, expected "
                f"{neurons * len(projection.parts)} for the {neurons} neurons that {output.weight} takes"
            )
    if blocks > neurons:
        raise PartitionError(f"{pattern.name!r} has {neurons} neurons, too few for ffn_blocks={blocks}")
    bounds = [neurons * block // blocks for block in range(blocks + 1)]
    found: list[list[Range]] = []
    for start, stop in pairwise(bounds):
        ranges: list[Range] = []
        for projection in pattern.inputs:
            linear = _project(layer, projection)
            for position in range(len(projection.parts)):
                ranges += _rows(linear, position * neurons + start, position * neurons + stop)
        found.append([*ranges, _columns(output, start, stop)])
    return found

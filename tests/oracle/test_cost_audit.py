"""The cost model against `FlopCounterMode` on every family, at shapes other than the traced ones."""

from __future__ import annotations

import dataclasses
import random

import pytest
from torch import nn

from rgft.components import Component, ParameterSlice, Partition
from rgft.cost import CostModel, trace_costs
from rgft.execution.linear import layout_of
from rgft.execution.views import bind
from rgft.partition import partition
from rgft.telemetry.flop_counter import count_flops
from tests.families import FAMILIES, Family, loss_of

#: nn.TransformerEncoder in eval mode swaps frozen layers for a fused kernel that nothing counts, and fails outright
#: when only some of its layers are frozen.
FUSES_FROZEN_LAYERS = {"torch_transformer_encoder"}


def layer_paths(model: nn.Module) -> list[str]:
    """Paths of the repeated blocks; of the weighted modules but the last, where nothing repeats."""
    paths: list[str] = []
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{path}.") for path in paths)
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not nested:
            paths += [f"{name}.{i}" for i in range(len(module))]
    return paths or [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][:-1]


def leaf_partition(model: nn.Module) -> Partition:
    """One component per module that holds parameters of its own, made by hand: independent of `rgft.partition`."""
    layers = layer_paths(model)
    slices: dict[str, list[ParameterSlice]] = {}
    depths: dict[str, int] = {}
    named = list(model.named_parameters())
    first = next(i for i, (name, _) in enumerate(named) if any(name.startswith(f"{path}.") for path in layers))
    for position, (name, parameter) in enumerate(named):
        if parameter.requires_grad:
            owner = name.rpartition(".")[0]
            inside = [i + 1 for i, path in enumerate(layers) if name.startswith(f"{path}.")]
            depths[owner] = inside[0] if inside else (0 if position < first else len(layers) + 1)
            part = ParameterSlice(parameter=name, shape=tuple(parameter.shape))
            slices.setdefault(owner, []).append(part)
    components = tuple(
        Component(name=name, kind="norm" if "norm" in name.lower() else "other", slices=tuple(slices[name]), depth=d)
        for name, d in sorted(depths.items(), key=lambda item: item[1])
    )
    return Partition(components=components, layers=tuple(layers), granularity="custom")


def plans(partition: Partition) -> dict[str, list[str]]:
    draw = random.Random(0)
    middle = (len(partition.layers) + 1) // 2
    named = {
        "all": list(partition.names),
        "one block": [c.name for c in partition if c.depth == middle],
        "norms": [c.name for c in partition if c.kind == "norm"],
        "random half": [name for name in partition.names if draw.random() < 0.5],
        "random few": draw.sample(partition.names, 2),
    }
    named |= {f"cut {cut}": [c.name for c in partition.above(cut)] for cut in range(1, partition.max_cut + 1)}
    return {name: active for name, active in named.items() if active}


def executed(
    family: Family, model: nn.Module, partition: Partition, active: list[str], rows: int, tokens: int
) -> float:  # fmt: skip
    for component in partition:
        for part in component.slices:
            model.get_parameter(part.parameter).requires_grad_(component.name in active)
    batch = family.batch(rows, tokens)
    return count_flops(lambda: loss_of(model, batch).backward())


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_modelled_step_equals_counted_step(family: Family) -> None:
    model = family.build()
    partition = leaf_partition(model)
    costs = trace_costs(model, partition, family.batch(4, 12))
    for training in (True, False):
        model.train(training)
        wrong = {}
        for name, active in plans(partition).items():
            if not training and family.name in FUSES_FROZEN_LAYERS and name != "all":
                continue
            counted = executed(family, model, partition, active, rows=3, tokens=20)
            modelled = costs.step_flops(active, rows=3, tokens=20, training=training).total
            if modelled != pytest.approx(counted, rel=1e-6):
                wrong[name] = (modelled, counted)
        assert not wrong, f"training={training}"


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "resnet"])
def test_passes_of_a_probe_equal_counted_ones(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    costs: CostModel = trace_costs(model, leaf_partition(model), family.batch(4, 12))
    model.eval()
    batch = family.batch(2, 16)
    forward = count_flops(lambda: loss_of(model, batch))
    both = count_flops(lambda: loss_of(model, batch).backward())
    assert costs.forward_flops(2, 16) == pytest.approx(forward, rel=1e-6)
    assert costs.probe_flops(2, 16, weights=True) == pytest.approx(both, rel=1e-6)
    assert forward < costs.probe_flops(2, 16, weights=False) < both


def test_t5_with_a_frozen_position_bias_takes_the_fused_kernel() -> None:
    """Without dropout T5's attention is unfused only as long as its position bias needs a gradient."""
    family = FAMILIES["t5"]
    model = family.build()
    partition = leaf_partition(model)
    costs = trace_costs(model, partition, family.batch(4, 12))
    biases = [name for name in partition.names if "relative_attention_bias" in name]
    assert len(biases) == 2
    model.eval()
    for off in (biases[:1], biases[1:], biases):
        active = [name for name in partition.names if name not in off]
        counted = executed(family, model, partition, active, rows=3, tokens=20)
        assert costs.step_flops(active, rows=3, tokens=20, training=False).total == pytest.approx(counted, rel=1e-6)


#: Module-name endings → the dimension along which the test splits their weight into four.
SPLIT = {
    "q_proj": 0, "gate_proj": 0, "down_proj": 1, "query": 0, "intermediate.dense": 0, "mlp.c_fc": 1, "mlp.c_proj": 0,
}  # fmt: skip


def quartered(partition: Partition) -> Partition:
    """The weights of `SPLIT` in four components each; the first also owns the bias."""
    components: list[Component] = []
    for component in partition:
        dim = next((dim for ending, dim in SPLIT.items() if component.name.endswith(ending)), None)
        weight, *others = sorted(component.slices, key=lambda part: -len(part.shape))
        if dim is None or component.depth == 0:
            components.append(component)
            continue
        size = weight.shape[dim]
        for i in range(4):
            part = ParameterSlice(
                parameter=weight.parameter, shape=weight.shape, dim=dim, start=i * size // 4, stop=(i + 1) * size // 4
            )
            slices = (part, *others) if i == 0 else (part,)
            quarter = f"{component.name}.{i}"
            components.append(
                Component(name=quarter, kind="ffn_block", depth=component.depth, index=i, slices=slices)
            )  # fmt: skip
    return Partition(components=tuple(components), layers=partition.layers, granularity="custom")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_sliced_backward_executes_what_is_modelled(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    partition = quartered(leaf_partition(model))
    assert any(component.index == 3 for component in partition)
    costs = trace_costs(model, partition, family.batch(4, 12))
    binding = bind(model, partition)
    draw = random.Random(1)
    chosen = [[n for n in partition.names if draw.random() < share] for share in (1.1, 0.5, 0.5, 0.3)]
    chosen.append([c.name for c in partition if c.depth >= 2 and c.index in (None, 1, 3)])
    batch = family.batch(3, 20)
    for active in chosen:
        for component, parameters in binding:
            for parameter in parameters:
                parameter.requires_grad_(component.name in active)
        counted = count_flops(lambda: loss_of(model, batch).backward())
        assert costs.step_flops(active, rows=3, tokens=20).total == pytest.approx(counted, rel=1e-6)


@pytest.mark.parametrize("blocks", [1, 3, 8])
@pytest.mark.parametrize("name", ["resnet", "efficientnet", "conv_net"])
def test_channel_blocks_execute_what_is_modelled(name: str, blocks: int) -> None:
    family = FAMILIES[name]
    model = family.build()
    parts = partition(model, "head", ffn_blocks=blocks)
    costs = trace_costs(
        model, parts, family.batch(4), is_sliceable=lambda module: layout_of(module) is not None
    )  # fmt: skip
    binding = bind(model, parts)
    draw = random.Random(1)
    chosen = [[n for n in parts.names if draw.random() < share] for share in (1.1, 0.5, 0.3, 0.1)]
    chosen.append([c.name for c in parts if c.depth >= 2 and c.index in (None, 0)])
    batch = family.batch(3)
    for active in filter(None, chosen):
        for component, parameters in binding:
            for parameter in parameters:
                parameter.requires_grad_(component.name in active)
        counted = count_flops(lambda: loss_of(model, batch).backward())
        assert costs.step_flops(active, rows=3, tokens=1).total == pytest.approx(counted, rel=1e-6)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_kernels_are_sliceable_along_their_outputs(dim: int) -> None:
    family = FAMILIES["conv_net"]
    model = family.build()
    leaves, weight = leaf_partition(model), "network.3.weight"
    shape = tuple(model.get_parameter(weight).shape)

    def sliced(start: int, stop: int) -> ParameterSlice:
        return ParameterSlice(parameter=weight, shape=shape, dim=dim, start=start, stop=stop)

    low = Component(name="low", kind="other", depth=2, slices=(sliced(0, 1),))
    high = Component(name="high", kind="other", depth=2, slices=(sliced(1, shape[dim]),))
    others = [
        dataclasses.replace(c, slices=tuple(part for part in c.slices if part.parameter != weight)) for c in leaves
    ]
    parts = Partition(components=(*others, low, high), layers=leaves.layers, granularity="custom")
    costs = trace_costs(
        model, parts, family.batch(4), is_sliceable=lambda module: layout_of(module) is not None
    )  # fmt: skip
    binding = bind(model, parts)
    for component, parameters in binding:
        for parameter in parameters:
            parameter.requires_grad_(component.name == "low")
    counted = count_flops(lambda: loss_of(model, family.batch(3)).backward())
    assert costs.step_flops(["low"], rows=3, tokens=1).total == pytest.approx(counted, rel=1e-6)

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgft.components import Component, ParameterSlice, Partition
from rgft.cost import CostModel, trace_costs, with_targets
from rgft.cost.batch_shape import BatchShape
from rgft.cost.model import FROZEN
from rgft.cost.operations import Operation, Product
from rgft.errors import ConfigError, PartitionError, RGFTError
from rgft.telemetry.flop_counter import count_flops

WIDTHS = (8, 12, 10, 4)
ROWS = 5


def whole(model: nn.Module, *names: str) -> tuple[ParameterSlice, ...]:
    named = dict(model.named_parameters())
    return tuple(ParameterSlice(parameter=name, shape=tuple(named[name].shape)) for name in names)


def by_module(model: nn.Module, depths: dict[str, int], layers: tuple[str, ...] = ()) -> Partition:
    components = tuple(
        Component(name=path, kind="other", depth=depth, slices=whole(model, *names))
        for path, depth in depths.items()
        if (names := [name for name, _ in model.named_parameters() if name.startswith(f"{path}.")])
    )
    return Partition(components=components, layers=layers, granularity="custom")


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(WIDTHS[0], WIDTHS[1]), nn.ReLU(), nn.Linear(WIDTHS[1], WIDTHS[2]), nn.ReLU(),
        nn.Linear(WIDTHS[2], WIDTHS[3]),
    )  # fmt: skip


def mlp_partition(model: nn.Module) -> Partition:
    return by_module(model, {"0": 1, "2": 2, "4": 3}, layers=("0", "2"))


def sum_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).sum()


def products(rows: int = ROWS) -> tuple[float, float, float]:
    a, b, c = (2.0 * rows * m * n for m, n in pairwise(WIDTHS))
    return a, b, c


@pytest.fixture
def mlp_costs() -> CostModel:
    model = mlp()
    return trace_costs(model, mlp_partition(model), torch.randn(3, WIDTHS[0]), sum_loss)


def test_full_step_by_hand(mlp_costs: CostModel) -> None:
    a, b, c = products()
    cost = mlp_costs.full_step(ROWS, 1)
    assert (cost.forward, cost.dx, cost.dw) == (a + b + c, b + c, a + b + c)
    assert cost.total == cost.forward + cost.dx + cost.dw


def test_backward_stops_at_the_lowest_active_component(mlp_costs: CostModel) -> None:
    a, b, c = products()
    assert mlp_costs.step_flops(["4"], rows=ROWS, tokens=1).total == (a + b + c) + c
    only_middle = mlp_costs.step_flops(["2"], rows=ROWS, tokens=1)
    assert (only_middle.forward, only_middle.dx, only_middle.dw) == (a + b + c, c, b)
    assert mlp_costs.step_flops([], rows=ROWS, tokens=1).total == a + b + c


def test_cached_prefix_is_not_run(mlp_costs: CostModel) -> None:
    a, b, c = products()
    cost = mlp_costs.step_flops(["2", "4"], rows=ROWS, tokens=1, cached_below=2)
    assert (cost.forward, cost.dx, cost.dw) == (b + c, c, b + c)
    assert mlp_costs.forward_flops(ROWS, 1, below=2) == a
    assert mlp_costs.forward_flops(ROWS, 1) == a + b + c


def test_active_component_below_the_cached_cut_is_refused(mlp_costs: CostModel) -> None:
    with pytest.raises(RGFTError, match=r"below the cached cut 2.*active: 0;"):
        mlp_costs.step_flops(["0", "4"], rows=1, tokens=1, cached_below=2)


def test_unknown_component_is_refused(mlp_costs: CostModel) -> None:
    with pytest.raises(RGFTError, match="'encoder'"):
        mlp_costs.step_flops(["encoder"], rows=1, tokens=1)


def test_probe_goes_to_the_bottom(mlp_costs: CostModel) -> None:
    a, b, c = products()
    assert mlp_costs.probe_flops(ROWS, 1, weights=False) == a + b + c + b + c
    assert mlp_costs.probe_flops(ROWS, 1, weights=True) == mlp_costs.full_step(ROWS, 1).total


def test_slices_scale_dw_alone() -> None:
    model = mlp()
    shape = (WIDTHS[2], WIDTHS[1])
    rows = (Component(
        name=f"2.{start}", kind="ffn_block", depth=2,
        slices=(ParameterSlice(parameter="2.weight", shape=shape, dim=0, start=start, stop=stop),),
    ) for start, stop in ((0, 3), (3, 10)))  # fmt: skip
    rest = Component(name="rest", kind="rest", depth=2, slices=whole(model, "2.bias"))
    others = mlp_partition(model)
    partition = Partition(
        components=(others["0"], *rows, rest, others["4"]), layers=("0", "2"), granularity="custom"
    )  # fmt: skip
    costs = trace_costs(model, partition, torch.randn(3, WIDTHS[0]), sum_loss)
    _, b, c = products()
    cost = costs.step_flops(["2.0"], rows=ROWS, tokens=1)
    assert (cost.dx, cost.dw) == (c, pytest.approx(0.3 * b))
    # A bias makes no product of its own, but backward has to reach it.
    cost = costs.step_flops(["rest"], rows=ROWS, tokens=1)
    assert (cost.dx, cost.dw) == (c, 0)


def test_by_component_adds_up_to_the_full_step(mlp_costs: CostModel) -> None:
    a, b, c = products()
    parts = mlp_costs.by_component(ROWS, 1)
    assert list(parts) == ["0", "2", "4"]
    assert (parts["2"].forward, parts["2"].dx, parts["2"].dw) == (b, b, b)
    assert parts["0"].total == 2 * a
    assert sum(part.total for part in parts.values()) == mlp_costs.full_step(ROWS, 1).total
    assert parts["4"].total == 3 * c


class Tied(nn.Module):
    """Embedding, attention with an additive bias, and a head that is the embedding again."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(2)])
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        q = x.unsqueeze(1)
        mask = self.bias.expand(q.shape[0], 1, q.shape[2], q.shape[2])
        x = x + F.scaled_dot_product_attention(q, q, q, attn_mask=mask).squeeze(1)
        return x @ self.embedding.weight.T


def tied_partition(model: Tied) -> Partition:
    made = by_module(model, {"embedding": 0, "layers.0": 1, "layers.1": 2}, layers=("layers.0", "layers.1"))
    bias = Component(name="bias", kind="rest", depth=2, slices=whole(model, "bias"))
    return Partition(components=(*made.components, bias), layers=made.layers, granularity="custom")


@pytest.mark.parametrize("tokens", [3, 6, 12, 35])
@pytest.mark.parametrize(
    "active", [("embedding",), ("layers.0",), ("layers.1", "bias"), ("bias",), ("embedding", "layers.1")]
)
def test_tied_weight_and_masked_attention_equal_the_counter(tokens: int, active: tuple[str, ...]) -> None:
    model = Tied()
    partition = tied_partition(model)
    costs = trace_costs(model, partition, torch.randint(0, 11, (4, 9)), sum_loss)
    for component in partition:
        for part in component.slices:
            model.get_parameter(part.parameter).requires_grad_(component.name in active)
    counted = count_flops(lambda: sum_loss(model, torch.randint(0, 11, (7, tokens))).backward())
    assert costs.step_flops(active, rows=7, tokens=tokens).total == pytest.approx(counted, rel=1e-9)


def test_head_after_the_layers_runs_above_every_cut() -> None:
    model = Tied()
    costs = trace_costs(model, tied_partition(model), torch.randint(0, 11, (4, 9)), sum_loss)
    layer, core, head = 2 * 9 * 64, 4 * 9 * 9 * 8, 2 * 9 * 8 * 11
    assert costs.step_flops([], rows=1, tokens=9, cached_below=2).forward == layer + core + head
    assert costs.step_flops([], rows=1, tokens=9, cached_below=3).forward == head


def test_frozen_base_weight_costs_forward_and_dx_but_no_dw() -> None:
    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 2, False), nn.Linear(2, 8, False)
            self.base.weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.b(self.a(x))

    model = nn.Sequential(Lora(), Lora())
    named = [name for name, p in model.named_parameters() if p.requires_grad]
    components = tuple(
        Component(name=i, kind="adapter", depth=int(i) + 1, slices=whole(model, f"{i}.a.weight", f"{i}.b.weight"))
        for i in "01"
    )
    partition = Partition(components=components, layers=("0", "1"), granularity="adapter")
    costs = trace_costs(model, partition, torch.randn(3, 8), sum_loss)
    base, pair = 2 * 64, 2 * 2 * 16
    cost = costs.full_step(1, 1)
    assert (cost.forward, cost.dw) == (2 * base + 2 * pair, 2 * pair)
    assert cost.dx == base + pair + pair / 2
    assert costs.step_flops(["1"], rows=1, tokens=1, cached_below=2).forward == base + pair
    assert costs.by_component(1, 1)[FROZEN].total == 3 * base
    assert [name for name, p in model.named_parameters() if p.requires_grad] == named


def test_trace_moves_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(4 * 36, 2))
    model[1].eval()
    model[0].weight.requires_grad_(False)
    partition = by_module(model, {"0": 1, "1": 1, "4": 2}, layers=("0",))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    random.seed(3)
    rng, python = torch.get_rng_state(), random.getstate()
    trace_costs(model, partition, torch.randn(4, 3, 8, 8, generator=torch.Generator()), sum_loss)
    assert torch.equal(torch.get_rng_state(), rng)
    assert random.getstate() == python
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_model_is_put_back_when_the_forward_pass_fails() -> None:
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    model[0].bias.requires_grad_(False)
    with pytest.raises(RGFTError, match="forward pass failed on 2 rows"):
        trace_costs(model, by_module(model, {"0": 1}), torch.randn(2, 5), sum_loss)
    assert not model.training
    assert not model[0].bias.requires_grad


class Classifier(nn.Module):
    """Of texts of 7 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        if input_ids.shape[1] != 7:
            raise ValueError("another length")
        logits = self.head(self.embedding(input_ids).mean(1))
        return SimpleNamespace(loss=None if labels is None else F.cross_entropy(logits, labels))


def test_a_forward_pass_that_fails_is_told_from_one_that_fails_on_other_sizes() -> None:
    model = Classifier()
    partition = by_module(model, {"embedding": 0, "head": 1})
    ids = torch.zeros(4, 7, dtype=torch.long)
    with pytest.raises(
        RGFTError, match=r"failed on 4 rows × 7 tokens, the example batch as it is: IndexError: Target 5"
    ):
        trace_costs(model, partition, {"input_ids": ids, "labels": torch.tensor([0, 5, 1, 0])})
    with pytest.raises(ConfigError, match="returned no loss for a batch with input_ids; add labels"):
        trace_costs(model, partition, {"input_ids": ids})
    with pytest.raises(ConfigError, match="loss: expected a tensor, found NoneType; models return none"):
        trace_costs(model, partition, {"input_ids": ids}, lambda model, batch: model(**batch).loss)


def test_a_model_of_one_length_is_known_at_that_one() -> None:
    model = Classifier()
    partition = by_module(model, {"embedding": 0, "head": 1})
    batch = {"input_ids": torch.zeros(4, 7, dtype=torch.long), "labels": torch.tensor([0, 1, 1, 0])}
    costs = CostModel.from_dict(trace_costs(model, partition, batch).to_dict())
    assert costs.fixed_tokens == 7
    for rows in (4, 9):
        ids, labels = torch.zeros(rows, 7, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
        counted = count_flops(lambda ids=ids, labels=labels: model(ids, labels).loss.backward())
        assert costs.full_step(rows, 7).total == counted
    for ask in (lambda: costs.full_step(4, 6), lambda: costs.forward_flops(4, 6)):
        with pytest.raises(RGFTError, match=r"known for batches of 7 tokens alone, .*found one of 6: pad all"):
            ask()


def test_round_trip_through_json(mlp_costs: CostModel) -> None:
    tied = Tied()
    costs = trace_costs(tied, tied_partition(tied), torch.randint(0, 11, (4, 9)), sum_loss)
    costs.full_step(1, 5)
    for made in (mlp_costs, costs):
        assert CostModel.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_repeated_question_is_fast() -> None:
    count = 300
    model = nn.Sequential(nn.Linear(4, count), nn.Linear(count, 4))
    rows = tuple(Component(
        name=f"encoder.layer.{i}.head.{i}", kind="head", depth=1,
        slices=(ParameterSlice(parameter="0.weight", shape=(count, 4), dim=0, start=i, stop=i + 1),),
    ) for i in range(count))  # fmt: skip
    rest = Component(name="rest", kind="rest", depth=2, slices=whole(model, "0.bias", "1.weight", "1.bias"))
    partition = Partition(components=(*rows, rest), layers=("0",), granularity="head")
    costs = trace_costs(model, partition, torch.randn(3, 4), sum_loss)
    active = [name for i, name in enumerate(partition.names) if i % 2 == 0]
    costs.step_flops(active, rows=1, tokens=1)
    seconds = []
    for _ in range(200):
        start = time.perf_counter()
        cost = costs.step_flops(active, rows=1, tokens=1)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 50e-6
    assert cost.dw == pytest.approx(0.5 * 2 * 4 * count + 2 * 4 * count)


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 2


def test_custom_autograd_function_is_refused_unless_declared() -> None:
    model = mlp()
    batch = torch.randn(3, WIDTHS[0])

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return Custom.apply(model(batch)).sum()  # pyright: ignore

    with pytest.raises(RGFTError, match="CustomBackward"):
        trace_costs(model, mlp_partition(model), batch, loss)
    costs = trace_costs(model, mlp_partition(model), batch, loss, elementwise=["CustomBackward"])
    assert costs.full_step(ROWS, 1).forward == sum(products())


def test_recurrent_kernel_is_refused() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    model = Recurrent()
    with pytest.raises(RGFTError, match=r"cannot be read off the autograd graph.*(Rnn|Lstm)"):
        trace_costs(model, by_module(model, {"lstm": 1}), torch.randn(3, 2, 4), sum_loss)


def test_work_outside_the_graph_beyond_two_percent_is_an_error() -> None:
    model = mlp()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            hidden = batch @ torch.ones(WIDTHS[0], 40)
        return (model(batch) + hidden.mean()).sum()

    missing = 2 * 2 * WIDTHS[0] * 40
    with pytest.raises(RGFTError, match=rf"FlopCounterMode counts .* \(-{missing}\)"):
        trace_costs(model, mlp_partition(model), torch.randn(3, WIDTHS[0]), loss)


def test_little_work_outside_the_graph_is_added_to_every_forward_pass() -> None:
    model = nn.Sequential(nn.Linear(64, 64))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            shift = (batch @ torch.ones(64, 1)).mean()
        return (model(batch) + shift).sum()

    costs = trace_costs(model, by_module(model, {"0": 1}, layers=("0",)), torch.randn(3, 64), loss)
    assert costs.full_step(1, 1).forward == 2 * 64 * 64 + 2 * 64
    assert costs.step_flops([], rows=1, tokens=1, cached_below=2).forward == 2 * 64


def test_cubic_cost_in_tokens_is_an_error() -> None:
    class Cubic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 1)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids).expand(-1, -1, ids.shape[1])
            return x @ x

    model = Cubic()
    with pytest.raises(RGFTError, match="no polynomial of degree two"):
        trace_costs(model, by_module(model, {"embedding": 0}), torch.randint(0, 5, (2, 24)), sum_loss)


def test_operations_that_depend_on_the_batch_are_an_error() -> None:
    class PerToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.linear = nn.Embedding(5, 4), nn.Linear(4, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return torch.stack([self.linear(x) for x in self.embedding(ids).unbind(1)])

    model = PerToken()
    partition = by_module(model, {"embedding": 0, "linear": 1})
    with pytest.raises(RGFTError, match=r"operations depend on the batch: \d+ at 24 tokens, \d+ at 12"):
        trace_costs(model, partition, torch.randint(0, 5, (2, 24)), sum_loss)


def test_partition_that_does_not_fit_names_every_parameter() -> None:
    model = mlp()
    stranger = Component(name="x", kind="other", depth=1, slices=(ParameterSlice(parameter="9.weight", shape=(1,)),))
    partition = Partition(components=(mlp_partition(model)["2"], stranger), layers=(), granularity="custom")
    with pytest.raises(PartitionError) as caught:
        trace_costs(model, partition, torch.randn(3, WIDTHS[0]), sum_loss)
    for name in ("9.weight", "0.weight", "0.bias", "4.weight", "4.bias"):
        assert repr(name) in str(caught.value)


def test_quantised_weight_is_refused() -> None:
    model = mlp()
    partition = mlp_partition(model)
    model.register_parameter("packed", nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False))
    with pytest.raises(RGFTError, match=r"'packed' of dtype torch\.int8"):
        trace_costs(model, partition, torch.randn(3, WIDTHS[0]), sum_loss)


def test_batch_without_loss_is_refused() -> None:
    model = mlp()
    with pytest.raises(ConfigError, match="needs loss="):
        trace_costs(model, mlp_partition(model), torch.randn(3, WIDTHS[0]))


class TestBatchShape:
    def test_encoder_and_decoder_lengths_scale_together(self) -> None:
        batch = {"input_ids": torch.arange(26).view(2, 13), "labels": torch.arange(14).view(2, 7)}
        shape = BatchShape.of(batch)
        assert shape == BatchShape(rows=2, tokens=13, targets=7)
        resized = shape.resize(batch, shape.scaled(2))
        assert resized["input_ids"].shape == (2, 26)
        assert resized["labels"].shape == (2, 14)
        assert torch.equal(resized["input_ids"][:, 13:], batch["input_ids"])
        assert batch["input_ids"].shape == (2, 13)

    def test_only_token_dimensions_change(self) -> None:
        batch = {
            "input_ids": torch.zeros(4, 6, dtype=torch.long), "attention_mask": torch.zeros(4, 1, 6, 6),
            "labels": torch.zeros(4, 3), "scale": torch.zeros(5), "flag": True,
        }  # fmt: skip
        shape = BatchShape.of(batch)
        resized = shape.resize(batch, BatchShape(rows=2, tokens=5))
        assert {k: tuple(v.shape) for k, v in resized.items() if k != "flag"} == {
            "input_ids": (2, 5), "attention_mask": (2, 1, 5, 5), "labels": (2, 3), "scale": (5,),
        }  # fmt: skip

    def test_tuple_and_images_have_no_tokens(self) -> None:
        batch = (torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))
        shape = BatchShape.of(batch)
        assert shape == BatchShape(rows=4)
        assert [len(value) for value in shape.resize(batch, BatchShape(rows=2))] == [2, 2]


class TestFlopCounter:
    def test_grouped_convolution_counts_three_equal_products(self) -> None:
        x = torch.randn(2, 6, 9, 9, requires_grad=True)
        for conv in (nn.Conv2d(6, 12, 3, stride=2, groups=3), nn.ConvTranspose2d(6, 12, 3, stride=2, groups=3)):
            forward = count_flops(lambda conv=conv: conv(x))
            per_position = 2 * 2 * conv.weight.numel()
            assert forward == per_position * (16 if isinstance(conv, nn.Conv2d) else 81)
            assert count_flops(lambda conv=conv: conv(x).sum().backward()) == 3 * forward
            conv.weight.requires_grad_(False)
            assert count_flops(lambda conv=conv: conv(x).sum().backward()) == 2 * forward

    def test_cpu_flash_attention(self) -> None:
        q = torch.randn(2, 4, 10, 8, requires_grad=True)
        forward = 4 * 2 * 4 * 10 * 10 * 8
        attend = F.scaled_dot_product_attention
        assert count_flops(lambda: attend(q, q, q)) == forward
        assert count_flops(lambda: attend(q, q, q).sum().backward()) == 3.5 * forward

    def test_grouped_mm(self) -> None:
        x = torch.randn(16, 8, dtype=torch.bfloat16, requires_grad=True)
        w = torch.randn(2, 8, 16, dtype=torch.bfloat16, requires_grad=True)
        ends = torch.tensor([5, 16], dtype=torch.int32)
        forward = 2 * 16 * 8 * 16
        multiply = torch._grouped_mm  # pyright: ignore
        assert count_flops(lambda: multiply(x, w, offs=ends)) == forward
        assert count_flops(lambda: multiply(x, w, offs=ends).square().sum().backward()) == 3 * forward


# ---------------------------------------------------------------- what is needed at targets alone


def rows_of(flops: tuple[float, float, float], *, weight: int) -> Operation:
    product = Product(flops=flops, upstream=1 << weight, shares=((weight, 1.0),))
    return Operation(kind="mm", depth=1 + weight, flops=flops, products=(product,), owners=((weight, 1.0),))


def modelled(*operations: Operation) -> CostModel:
    return CostModel(names=("a", "b"), depths=(1, 2), training=operations, probing=operations)


BODY, HEAD, HEAD_OF_ONE = (2.0, 3.0, 5.0), (0.0, 7.0, 0.0), (7.0, 0.0, 0.0)


def test_a_head_at_targets_by_hand() -> None:
    plain = modelled(rows_of(BODY, weight=0), rows_of(HEAD, weight=1))
    costs = with_targets(plain, modelled(rows_of(BODY, weight=0), rows_of(HEAD_OF_ONE, weight=1)))
    assert costs is not None
    body = 3 * (2 + 4 * (3 + 4 * 5))
    cost = costs.step_flops(["a", "b"], rows=3, tokens=4, targets=5)
    assert (cost.forward, cost.dw, cost.head) == (body + 5 * 7, body + 5 * 7, 2 * 5 * 7)
    assert costs.step_flops(["a"], rows=3, tokens=4, targets=5).head == 5 * 7
    assert costs.step_flops(["a"], rows=3, tokens=4, targets=0).forward == body
    assert costs.step_flops(["a"], rows=3, tokens=4).forward == body + 12 * 7
    assert replace(costs, target_share=0.25).step_flops(["a"], rows=3, tokens=4).forward == body + 3 * 7
    everywhere = plain.full_step(3, 4)
    assert replace(costs, target_share=0.25).full_step(3, 4).total == everywhere.total
    assert everywhere.head == 0.0
    assert costs.step_flops(["a", "b"], rows=3, tokens=4, training=False).head == 0.0  # probes compute everything
    assert CostModel.from_dict(json.loads(json.dumps(costs.to_dict()))) == costs


@pytest.mark.parametrize(
    "one",
    [
        modelled(rows_of(BODY, weight=0)),  # something is missing
        modelled(rows_of(BODY, weight=0), rows_of(HEAD, weight=1)),  # nothing is spared
        modelled(rows_of(BODY, weight=0), rows_of((8.0, 0.0, 0.0), weight=1)),  # more than a position's share
        modelled(rows_of(BODY, weight=0), rows_of((7.0, 1.0, 0.0), weight=1)),  # grows with the length all the same
        modelled(rows_of((2.0, 0.0, 0.0), weight=0), rows_of(HEAD_OF_ONE, weight=1)),  # the body is another
        modelled(rows_of(BODY, weight=1), rows_of(HEAD_OF_ONE, weight=1)),
    ],
)
def test_costs_that_do_not_show_what_is_needed_at_targets(one: CostModel) -> None:
    assert with_targets(modelled(rows_of(BODY, weight=0), rows_of(HEAD, weight=1)), one) is None


class MergedNorm(nn.Module):
    """A linear layer scaled by the norm of W + B A, found outside the graph; and turned by a matrix made of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(16, 16)
        self.low, self.high = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.randn(16, 4))
        self.turn = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        norm = (self.base.weight + self.high @ self.low).detach().norm()
        return nn.functional.linear(x, self.turn @ self.base.weight) / norm


def test_work_on_weights_alone_is_booked_once_a_pass() -> None:
    model = nn.Sequential(MergedNorm(), nn.Linear(16, 4))
    parts = by_module(model, {"0": 1, "1": 2}, layers=("0",))
    costs = trace_costs(model, parts, torch.randn(3, 16), sum_loss)
    for rows in (1, 2, 64):
        counted = count_flops(lambda rows=rows: sum_loss(model, torch.randn(rows, 16)).backward())
        assert costs.step_flops(parts.names, rows=rows, tokens=1).total == counted
    once = [op.flops[0] for op in costs.training if op.once]
    assert once == [2 * 16**3, 2 * 16 * 4 * 16]
    assert CostModel.from_dict(costs.to_dict()) == costs
    shares = costs.by_component(5, 1)
    assert sum(cost.total for cost in shares.values()) == pytest.approx(costs.full_step(5, 1).total)

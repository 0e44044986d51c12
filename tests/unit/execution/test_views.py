from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from rgft.components import Component, ParameterSlice, Partition
from rgft.errors import AttachError, PartitionError, StorageError
from rgft.execution.binding import Binding
from rgft.execution.views import bind
from tests.unit.execution.split_toy import Block, activate, head_partition


def bound(layers: str = "linear") -> tuple[Block, Block, Binding]:
    """A bound block, its plain twin, and the binding."""
    model, plain = Block(layers), Block(layers)
    return model, plain, bind(model, head_partition(model))


def one_weight(shape: tuple[int, ...], *spans: tuple[int, int], parameter: str = "weight", dim: int = 0) -> Partition:
    return Partition(
        components=tuple(
            Component(
                name=f"part.{i}", kind="head", index=i, depth=1,
                slices=(ParameterSlice(parameter=parameter, shape=shape, dim=dim, start=a, stop=b),),
            )
            for i, (a, b) in enumerate(spans)
        ),
        layers=(), granularity="custom",
    )  # fmt: skip


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(5, 4, 8, generator=generator, dtype=next(model.parameters()).dtype)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_views_are_what_the_model_shows() -> None:
    model, _, binding = bound()
    names = [name for name, _ in model.named_parameters()]
    assert names == [
        "up.head_0_weight", "up.head_1_weight", "up.head_2_weight", "up.head_0_bias", "up.head_1_bias",
        "up.head_2_bias", "down.head_0_weight", "down.head_1_weight", "down.head_2_weight", "down.bias",
    ]  # fmt: skip
    shown = dict(model.named_parameters())
    for component, parameters in binding:
        for parameter, name, part in zip(parameters, binding.names[component.name], component.slices, strict=True):
            assert shown[name] is parameter
            assert torch.equal(parameter, part.of(model.get_submodule(part.parameter[:-7].strip(".")).weight)
                               if part.parameter.endswith("weight") else parameter)  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in Block().parameters())


def test_a_slice_of_everything_stays_the_models_own() -> None:
    model = nn.Linear(3, 4)
    own = model.weight
    binding = bind(model, one_weight((4, 3), (0, 4)))
    assert binding.parameters["part.0"][0] is own
    assert type(model) is nn.Linear


def test_several_slices_of_a_weight_in_one_component() -> None:
    model = nn.Linear(2, 6, bias=False)
    parts = [ParameterSlice(parameter="weight", shape=(6, 2), dim=0, start=a, stop=a + 1) for a in range(6)]
    components = tuple(
        Component(name=f"head.{i}", kind="head", index=i, depth=1, slices=(parts[4 + i], parts[2 + i], parts[i]))
        for i in range(2)
    )
    binding = bind(model, Partition(components=components, layers=(), granularity="custom"))
    assert len({name for names in binding.names.values() for name in names}) == 6
    for component, parameters in binding:
        for parameter, part in zip(parameters, component.slices, strict=True):
            assert torch.equal(parameter, part.of(model.weight))


def test_restore_leaves_no_trace() -> None:
    model = Block()
    before = [(name, parameter, parameter.requires_grad) for name, parameter in model.named_parameters()]
    modules = [(name, type(module), set(module.__dict__)) for name, module in model.named_modules()]
    binding = bind(model, head_partition(model))
    train(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    for view in binding.parameters["head.0"]:
        view.requires_grad_(False)
    binding.restore()
    after = list(model.named_parameters())
    assert [(n, r) for n, _, r in before] == [(n, p.requires_grad) for n, p in after]
    assert all(old is new for (_, old, _), (_, new) in zip(before, after, strict=True))
    assert modules == [(name, type(module), set(module.__dict__)) for name, module in model.named_modules()]
    assert all(torch.equal(parameter, trained[name]) for name, parameter in after)
    binding.restore()  # again: nothing to do
    bind(model, head_partition(model)).check()


def test_state_dict_is_the_plain_models() -> None:
    model, plain, _ = bound()
    found, expected = model.state_dict(), plain.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(isinstance(value, nn.Parameter) for value in model.state_dict(keep_vars=True).values())


@pytest.mark.parametrize("assign", [False, True])
def test_loading_goes_through_the_views(assign: bool) -> None:
    model, _, binding = bound()
    other = Block(seed=1)
    views = binding.parameters["head.1"]
    assert model.load_state_dict(copy.deepcopy(other.state_dict()), strict=True, assign=assign).missing_keys == []
    binding.check()
    assert binding.parameters["head.1"] is views
    assert torch.equal(views[0], other.up.weight[8:16])
    x = torch.randn(3, 8)
    assert torch.equal(model(x), other(x))
    train(model, torch.optim.SGD(model.parameters(), lr=0.01))
    train(other, torch.optim.SGD(other.parameters(), lr=0.01))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())


def test_loading_reports_missing_and_unexpected_keys_of_the_plain_model() -> None:
    model, _, _ = bound()
    state = model.state_dict()
    state["up.head_0_weight"] = state.pop("up.weight")
    with pytest.raises(RuntimeError, match=r"Missing.*up\.weight(.|\n)*Unexpected.*up\.head_0_weight"):
        model.load_state_dict(state)


@pytest.mark.parametrize("cast", ["double", "bfloat16", "half"])
def test_casts_keep_views_over_their_weight(cast: str) -> None:
    model, plain, binding = bound()
    views = [p for parameters in binding.parameters.values() for p in parameters]
    model(torch.ones(2, 8)).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    getattr(model, cast)()
    getattr(plain, cast)()
    binding.check()
    assert views == [p for parameters in binding.parameters.values() for p in parameters]
    assert all(v.grad is not None and v.grad.dtype == v.dtype == plain.up.weight.dtype for v in views)
    optimizer.zero_grad()
    x = torch.randn(4, 8, dtype=plain.up.weight.dtype)
    for net in (model, plain):
        net(x).square().sum().backward()
    for component, parameters in binding:
        for parameter, part in zip(parameters, component.slices, strict=True):
            assert torch.equal(parameter.grad, part.of(plain.get_parameter(part.parameter).grad))
    optimizer.step()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    for key, value in plain.state_dict().items():
        # In half precision torch's own update of narrow column slices (< 32) rounds unlike that of whole rows.
        tolerance = 0.0 if cast == "double" else 2 * torch.finfo(value.dtype).eps
        torch.testing.assert_close(model.state_dict()[key], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("way", ["overwrite_module_params", "swap_module_params"])
def test_casts_that_replace_parameters_keep_views(way: str) -> None:
    model, _, binding = bound()
    switch = getattr(torch.__future__, f"set_{way}_on_conversion")
    switch(True)
    try:
        model.double()
    finally:
        switch(False)
    binding.check()
    assert model.up.weight.dtype == binding.parameters["head.0"][0].dtype == torch.float64


def test_deepcopy_has_views_of_its_own() -> None:
    model, plain, binding = bound()
    twin = copy.deepcopy(model)
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in model.named_parameters()]
    train(twin, torch.optim.AdamW(twin.parameters(), lr=0.1))
    expected = copy.deepcopy(plain)
    train(expected, torch.optim.AdamW(expected.parameters(), lr=0.1, foreach=False))
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
        torch.testing.assert_close(twin.state_dict()[key], expected.state_dict()[key])
    twin.double()
    assert torch.equal(twin(torch.ones(1, 8).double()), twin.double()(torch.ones(1, 8).double()))
    binding.check()


def test_averaged_models_average_the_weights() -> None:
    model, plain, _ = bound()
    averages = [torch.optim.swa_utils.AveragedModel(net) for net in (model, plain)]
    for net, average in zip((model, plain), averages, strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for _ in range(2):
            train(net, optimizer, steps=1)
            average.update_parameters(net)
    assert not torch.equal(averages[0].module.up.weight, model.up.weight)
    for key, value in averages[1].state_dict().items():
        torch.testing.assert_close(averages[0].state_dict()[key], value)


def test_data_parallel_is_refused() -> None:
    model, _, _ = bound()
    with pytest.raises(AttachError, match="DistributedDataParallel"):
        model.up._replicate_for_data_parallel()


def test_pickles_are_plain() -> None:
    model, plain, _ = bound()
    module = model.up
    loaded = pickle.loads(pickle.dumps(nn.Sequential(module)))[0]
    assert type(loaded) is nn.Linear
    assert [n for n, _ in loaded.named_parameters()] == ["weight", "bias"]
    assert torch.equal(loaded.weight, plain.up.weight)
    assert loaded.weight.requires_grad
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    x = torch.randn(2, 8)
    assert torch.equal(again(x), plain(x))


def test_check_names_views_that_went_astray() -> None:
    _, _, binding = bound()
    view = binding.parameters["head.1"][0]
    view.data = view.data.clone()
    with pytest.raises(StorageError, match=r"'up\.weight', 8:16 of dimension 0: memory of its own"):
        binding.check()


def test_check_notices_replaced_weights_and_views() -> None:
    model, _, binding = bound()
    model.up._parameters["head_0_weight"] = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(StorageError, match="other parameters than its views"):
        binding.check()
    model, _, binding = bound()
    fused = model.state_dict(keep_vars=True)["down.weight"]
    fused.data = fused.data.clone()
    with pytest.raises(StorageError, match=r"'down\.weight': the weight's memory was replaced"):
        binding.check()


def test_stale_views_are_never_saved_silently() -> None:
    model, _, binding = bound()
    view = binding.parameters["head.0"][2]
    view.data = view.data.clone()
    for action in (model.state_dict, model.double, lambda: pickle.dumps(model.down)):
        with pytest.raises(StorageError, match="share no memory"):
            action()
    with pytest.raises(StorageError, match="trained apart"):
        binding.restore()
    assert type(model.down) is nn.Linear


def test_a_split_weight_cannot_be_replaced() -> None:
    model, _, _ = bound()
    with pytest.raises(StorageError, match=r"'up\.weight' is split.*detach"):
        model.up.weight = nn.Parameter(torch.zeros(24, 8))
    with torch.no_grad():
        model.up.weight.zero_()
    assert not any(p.any() for n, p in model.named_parameters() if n.startswith("up.head") and n.endswith("weight"))


def test_weight_is_readable() -> None:
    model, plain, binding = bound()
    weight = model.up.weight
    assert (weight.shape, weight.dtype, weight.device) == (plain.up.weight.shape, torch.float32, torch.device("cpu"))
    assert weight.requires_grad
    assert torch.equal(weight, plain.up.weight)
    activate(binding)
    assert not model.up.weight.requires_grad


def test_tied_weights_are_split_once() -> None:
    def tied() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
        model[2].weight = model[0].weight
        return model

    model, plain = tied(), tied()
    binding = bind(model, one_weight((4, 4), (0, 1), (1, 4), parameter="0.weight"))
    assert len(list(model.parameters())) == 2
    for twin in (model, copy.deepcopy(model).double().float()):
        expected = copy.deepcopy(plain)
        for net in (twin, expected):
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            for _ in range(2):
                net(torch.eye(4)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert torch.equal(twin.state_dict()["2.weight"], expected[0].weight)
        assert torch.equal(twin.state_dict()["0.weight"], expected[0].weight)
    binding.restore()
    assert model[2].weight is model[0].weight


def test_attaching_twice_is_refused() -> None:
    model, _, _ = bound()
    with pytest.raises(AttachError, match="'up'"):
        bind(model, head_partition(Block()))


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (one_weight((4, 3), (0, 1), (2, 4)), "between positions 1 and 2"),
        (one_weight((4, 3), (0, 2), (1, 4)), "between positions 2 and 1"),
        (one_weight((4, 3), (0, 2)), "between positions 2 and 4"),
        (one_weight((5, 3), (0, 5)), r"has shape \(4, 3\)"),
        (one_weight((4, 3), (0, 4), parameter="other"), "'other', which the model does not have"),
        (one_weight((4, 3), (0, 4), (0, 4)), "overlap"),
    ],
)
def test_partitions_that_do_not_fit(partition: Partition, message: str) -> None:
    model = nn.Linear(3, 4)
    with pytest.raises(PartitionError, match=message):
        bind(model, partition)
    assert type(model) is nn.Linear


def test_modules_that_hide_their_weights_are_refused() -> None:
    parametrized = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
    name = "parametrizations.weight.original"
    with pytest.raises(PartitionError, match=r"is parametrized.*\n.*remove the parametrization"):
        bind(parametrized, one_weight((4, 4), (0, 2), (2, 4), parameter=name))
    with pytest.raises(PartitionError, match="list of its own"):
        bind(nn.LSTM(4, 1), one_weight((4, 4), (0, 2), (2, 4), parameter="weight_ih_l0"))
    with pytest.raises(PartitionError, match="sparse gradients"):
        bind(nn.Embedding(4, 4, sparse=True), one_weight((4, 4), (0, 2), (2, 4)))


def test_detaching_under_another_tools_class_is_refused() -> None:
    model, _, binding = bound()
    nn.utils.parametrize.register_parametrization(model.down, "bias", nn.Identity())
    with pytest.raises(AttachError, match="class was changed"):
        binding.restore()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, foreach=False, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.5, foreach=True),
    ],
)
@pytest.mark.parametrize("layers", ["linear", "conv1d"])
def test_frozen_views_keep_every_bit_while_neighbours_train(make, layers: str) -> None:
    model, _, binding = bound(layers)
    optimizer = make(list(model.parameters()))
    train(model, optimizer)  # moments exist for all
    activate(binding, "head.0", "head.2")
    before = {n: [p.detach().clone() for p in parameters] for n, parameters in binding.parameters.items()}
    train(model, optimizer)
    for name, parameters in binding.parameters.items():
        same = [torch.equal(p, b) for p, b in zip(parameters, before[name], strict=True)]
        assert same == [name in ("head.1", "rest")] * len(same), name


def test_accumulation_equals_the_plain_model_bit_for_bit() -> None:
    model, plain, binding = bound()
    for _ in range(3):
        x = torch.randn(2, 5, 8)
        for net in (model, plain):
            net(x).square().sum().backward()
    for component, parameters in binding:
        for parameter, part in zip(parameters, component.slices, strict=True):
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, part.of(plain.get_parameter(part.parameter).grad))


def test_clipping_takes_the_norm_over_views() -> None:
    model, plain, _ = bound()
    x = torch.randn(6, 8)
    norms = []
    for net in (model, plain):
        net(x).square().sum().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1))
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-6, atol=0.0)
    clipped = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(clipped, torch.tensor(0.1), rtol=1e-5, atol=0.0)


def test_a_step_between_forward_and_backward_is_noticed() -> None:
    model, _, binding = bound()
    loss = model(torch.randn(3, 8)).sum()
    with torch.no_grad():
        binding.parameters["head.0"][2].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_trainer_decays_weights_and_not_biases() -> None:
    from transformers import BertConfig, BertModel, Trainer

    def decayed(model: nn.Module) -> set[str]:
        return set(Trainer.get_decay_parameter_names(Trainer.__new__(Trainer), model))

    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=8,
    )  # fmt: skip
    model = BertModel(config)
    whole = decayed(model)
    spans = [(0, 4), (4, 8)]
    layer = "encoder.layer.0."
    names = [f"{layer}attention.self.query.weight", f"{layer}attention.self.query.bias", f"{layer}output.dense.weight"]
    split = {n: tuple(model.get_parameter(n).shape) for n in names}

    def part(name: str, start: int, stop: int) -> ParameterSlice:
        return ParameterSlice(parameter=name, shape=split[name], dim=len(split[name]) - 1, start=start, stop=stop)

    components = [
        Component(
            name=f"head.{i}", kind="head", index=i, depth=1,
            slices=tuple(part(n, a, b) for n in names),
        )
        for i, (a, b) in enumerate(spans)
    ]  # fmt: skip
    bind(model, Partition(components=tuple(components), layers=(), granularity="custom"))
    found = decayed(model)
    views = {f"{layer}attention.self.query.head_{i}_weight" for i in range(2)}
    views |= {f"{layer}output.dense.head_{i}_weight" for i in range(2)}
    assert found == (whole - set(names)) | views


def test_a_bound_model_saves_in_its_own_format(tmp_path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    bind(model, one_weight((8, 24), (0, 12), (12, 24), parameter="transformer.h.0.attn.c_attn.weight", dim=1))
    model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    x = torch.arange(8).unsqueeze(0)
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert list(loaded.state_dict()) == list(model.state_dict())

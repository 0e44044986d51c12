import pytest
import torch
from torch import Tensor, nn

from rgft.components import Partition
from rgft.errors import CacheError
from rgft.execution.activation_cache import ActivationCache
from rgft.execution.switching import Switch
from rgft.partition import partition
from rgft.plan import UpdatePlan
from tests.families import FAMILIES
from tests.unit.execution.toy import Toy, toy_batch, toy_binding, toy_partition


def cached_toy(cut: int = 3, **kwargs: object) -> tuple[Toy, ActivationCache]:
    model = Toy().train()
    names = toy_partition(model).names
    Switch(model, toy_binding(model)).apply(
        UpdatePlan(step=0, multipliers={n: float(n in names[cut:]) for n in names}, cut=cut), 0
    )
    cache = ActivationCache(model, toy_partition(model), **kwargs)  # type: ignore[arg-type]
    cache.set_cut(cut)
    return model, cache


def forward(
    model: Toy, cache: ActivationCache, ids: list[int], tokens: Tensor, mask: Tensor | None = None
) -> tuple[bool, Tensor]:
    torch.manual_seed(0)
    hit = cache.begin(ids, mask) > 0
    output = model(tokens, mask)
    cache.end()
    return hit, output


def trained(model: Toy, cache: ActivationCache, ids: list[int], tokens: Tensor, mask: Tensor) -> Tensor:
    """As `forward`, with the backward pass that shows whether padding is read."""
    hit, output = forward(model, cache, ids, tokens, mask)
    assert not hit
    output.sum().backward()
    model.zero_grad()
    return output.detach()


def test_a_hit_gives_the_same_outputs_and_gradients_without_running_the_prefix() -> None:
    model, cache = cached_toy()
    ran: list[int] = []
    for i in (0, 1):
        model.layers[i].linear.register_forward_hook(lambda m, a, o, i=i: ran.append(i))
    outputs, gradients = [], []
    for expected_hit in (False, True):
        hit, output = forward(model, cache, [4, 7, 9, 2], toy_batch())
        assert hit is expected_hit
        output.square().sum().backward()
        outputs.append(output)
        gradients.append(model.layers[2].linear.weight.grad.clone())
        model.layers[2].linear.weight.grad = None
    assert ran == [0, 1]
    # Dropout above the cut draws from the generator; the prefix below drew nothing.
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(gradients[0], gradients[1])
    assert (cache.hits, cache.misses) == (4, 4)


def test_rows_are_matched_by_id_in_any_order_and_padding() -> None:
    model, cache = cached_toy()
    model.layers[2].eval()
    tokens, mask = toy_batch(tokens=6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 3 + [0] * 3, [1] * 5 + [0]])
    assert not any(forward(model, cache, [0, 1, 2, 3], tokens, mask)[0] for _ in range(2))  # no gradient has shown yet
    first = trained(model, cache, [0, 1, 2, 3], tokens, mask)
    hit, again = forward(model, cache, [2, 1], tokens[[2, 1], :4], mask[[2, 1], :4])
    assert hit
    assert torch.allclose(again, first[[2, 1]], atol=1e-6)


def test_another_place_in_the_row_is_no_hit() -> None:
    model, cache = cached_toy()
    tokens = toy_batch(rows=1, tokens=4)
    trained(model, cache, [0], tokens, torch.tensor([[1, 1, 1, 0]]))
    assert not forward(model, cache, [0], tokens, torch.tensor([[0, 1, 1, 1]]))[0]
    assert forward(model, cache, [0], tokens, torch.tensor([[0, 1, 1, 1]]))[0]


@pytest.mark.parametrize("required", [True, False])
def test_a_loss_that_reads_padding_is_noticed_before_the_first_hit(
    required: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, cache = cached_toy(required=required)
    tokens, mask = toy_batch(rows=2, tokens=4), torch.tensor([[1] * 4, [1, 1, 0, 0]])

    def loss() -> Tensor:
        states: list[Tensor] = []
        handle = model.layers[2].register_forward_hook(lambda m, a, output: states.append(output))
        hit, _ = forward(model, cache, [0, 1], tokens, mask)
        handle.remove()
        assert not hit
        return states[0].mean()  # over padding, too

    if required:
        with pytest.raises(CacheError, match="states of padding"):
            loss().backward()
        return
    loss().backward()
    assert "states of padding" in caplog.text
    loss().backward()
    assert cache.hits == 0
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_a_partly_known_batch_is_recomputed_and_stored() -> None:
    model, cache = cached_toy()
    forward(model, cache, [0, 1, 2, 3], toy_batch())
    assert not forward(model, cache, [0, 1, 8, 9], toy_batch())[0]
    assert 8 in cache
    assert len(cache) == 6


def test_filling_computes_the_prefix_of_the_missing_rows_alone() -> None:
    model, cache = cached_toy()
    model.layers[2].eval()
    tokens, mask = toy_batch(), torch.tensor([[1] * 5, [1] * 4 + [0], [1] * 3 + [0] * 2, [1] * 5])
    _, expected = forward(model, cache, [0, 1, 2, 3], tokens, mask)
    other, partial = cached_toy()
    other.layers[2].eval()
    trained(other, partial, [0, 3, 5], tokens[[0, 3, 2]], mask[[0, 3, 2]])
    ran: list[tuple[int, int]] = []
    for position, layer in enumerate(other.layers):
        layer.linear.register_forward_hook(lambda m, a, o, position=position: ran.append((position, len(o))))
    assert partial.rows_by_level([0, 1, 2, 3], mask) == {3: [0, 3], 0: [1, 2]}
    partial.fill(other, (tokens,), {"attention_mask": mask}, [0, 1, 2, 3], [1, 2])
    assert ran == [(0, 2), (1, 2)]
    assert partial.rows_by_level([0, 1, 2, 3], mask) == {3: [0, 1, 2, 3]}
    hit, output = forward(other, partial, [0, 1, 2, 3], tokens, mask)
    assert hit
    assert torch.allclose(output, expected, atol=1e-6)
    assert all(m.training for m in other.layers[:2])


def test_without_ids_or_outside_a_batch_the_cache_is_bypassed() -> None:
    model, cache = cached_toy()
    forward(model, cache, [0, 1, 2, 3], toy_batch())
    model.eval()
    plain = Toy().eval()
    assert torch.equal(model(toy_batch(5)), plain(toy_batch(5)))


def test_a_lower_cut_drops_everything_and_detach_restores_forward() -> None:
    model, cache = cached_toy()
    forward(model, cache, [0, 1, 2, 3], toy_batch())
    assert cache.bytes == 4 * 5 * 8 * 4
    cache.set_cut(2)
    assert len(cache) == cache.bytes == 0
    cache.detach()
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_full_means_no_more_is_stored() -> None:
    model, cache = cached_toy(max_bytes=2 * 5 * 8 * 4)
    forward(model, cache, [0, 1, 2, 3], toy_batch())
    assert len(cache) == 2
    assert cache.bytes <= 2 * 5 * 8 * 4


def test_state_survives_bit_for_bit() -> None:
    model, cache = cached_toy()
    _, first = forward(model, cache, [0, 1, 2, 3], toy_batch())
    other, restored = cached_toy()
    restored.load_state_dict(cache.state_dict())
    hit, again = forward(other, restored, [0, 1, 2, 3], toy_batch())
    assert hit
    assert torch.equal(first, again)


def test_lower_precision_states_its_error() -> None:
    model, cache = cached_toy(dtype=torch.bfloat16)
    model.layers[2].eval()
    _, first = forward(model, cache, [0, 1, 2, 3], toy_batch())
    _, again = forward(model, cache, [0, 1, 2, 3], toy_batch())
    assert 0 < (first - again).abs().max() < 2**-8 * 10


def test_a_layer_that_returns_more_than_states_is_refused() -> None:
    class Biased(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.inner = layer

        def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(hidden_states), torch.ones(1)

    model, cache = cached_toy()
    cache.detach()
    model.layers[0] = Biased(model.layers[0])
    cache = ActivationCache(model, toy_partition(model))
    cache.set_cut(3)
    with pytest.raises(CacheError, match="cache='none'"):
        forward(model, cache, [0, 1, 2, 3], toy_batch())


def test_where_the_cache_is_not_required_it_stays_out_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class Biased(Toy):
        def __init__(self) -> None:
            super().__init__()
            for layer in self.layers:
                layer.forward = lambda hidden_states, own=layer.forward: (own(hidden_states), torch.ones(1))

    model = Biased()
    cache = ActivationCache(model, toy_partition(model), required=False)
    cache.set_cut(2)
    cache.begin([0, 1, 2, 3], None)
    model.layers[0](torch.randn(4, 5, 8))
    cache.end()
    assert "cache='none'" in caplog.text
    assert not cache.begin([0, 1, 2, 3], None)
    cache.set_cut(3)
    assert len(cache) == 0


def test_models_of_encoder_and_decoder_have_none_which_asks_for_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = FAMILIES["t5"].build()
    with caplog.at_level("INFO", logger="rgft"):
        assert not ActivationCache(model, partition(model, "layer"), required=False).is_usable
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert "no activation cache: " in record.message
    assert "execution.cache" not in record.message
    with pytest.raises(CacheError, match=r"use execution\.cache='none'"):
        ActivationCache(model, partition(model, "layer"))


def test_layers_that_change_the_shape_are_cached_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 2))
    partition = Partition(components=(), layers=("0", "1", "2"), granularity="layer")
    cache, inputs = ActivationCache(model, partition), torch.randn(3, 4)
    cache.set_cut(3)
    outputs = []
    for hit in (False, True):
        assert (cache.begin([5, 6, 7], None) > 0) is hit
        outputs.append(model(inputs))
        cache.end()
    assert torch.equal(outputs[0], outputs[1])


def test_non_finite_states_are_not_cached() -> None:
    model, cache = cached_toy()
    with torch.no_grad():
        model.layers[0].linear.weight.fill_(float("nan"))
    with pytest.raises(CacheError, match="not finite"):
        forward(model, cache, [0, 1, 2, 3], toy_batch())
    assert len(cache) == 0

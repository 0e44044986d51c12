import pytest
import torch

from rgft.execution.averaging import IterateAverage
from tests.unit.execution.toy import Toy, toy_binding


def walk(average: IterateAverage, model: Toy, steps: list[set[str]]) -> list[dict[str, torch.Tensor]]:
    """Steps that change what is active; returns the weights after each."""
    generator = torch.Generator().manual_seed(0)
    iterates = []
    for active in steps:
        average.before_step(active)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(name.startswith(component + ".") for component in active):
                    parameter += torch.randn(parameter.shape, generator=generator)
        average.after_step(active)
        iterates.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return iterates


def test_the_mean_of_all_iterates_whatever_was_on_when() -> None:
    model = Toy()
    average = IterateAverage(toy_binding(model))
    both, first, second = {"layers.0", "layers.1"}, {"layers.0"}, {"layers.1"}
    iterates = walk(average, model, [first, first, both, second, second])
    assert average.count == 5
    average.apply()
    for name, parameter in model.named_parameters():
        expected = torch.stack([iterate[name] for iterate in iterates]).double().mean(0)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_what_was_never_updated_keeps_its_bits() -> None:
    model = Toy()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    average = IterateAverage(toy_binding(model))
    walk(average, model, [{"layers.1"}, {"layers.1"}])
    average.apply()
    same = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert same == {name for name in before if not name.startswith("layers.1.")}


def test_half_precision_weights_are_averaged_in_single() -> None:
    model = Toy().to(torch.bfloat16)
    average = IterateAverage(toy_binding(model))
    iterates = walk(average, model, [{"layers.0"}] * 40)
    average.apply()
    for name, parameter in model.named_parameters():
        expected = torch.stack([iterate[name] for iterate in iterates]).double().mean(0)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=2**-8, atol=1e-4)


def test_applied_twice_is_applied_once() -> None:
    model = Toy()
    average = IterateAverage(toy_binding(model))
    walk(average, model, [{"layers.0"}] * 2)
    average.apply()
    with torch.no_grad():
        model.layers[0].linear.weight += 1.0
    after = model.layers[0].linear.weight.detach().clone()
    average.apply()
    assert torch.equal(model.layers[0].linear.weight, after)


@pytest.mark.parametrize("stop_at", [1, 3])
def test_state_goes_on_bit_for_bit_and_is_a_copy(stop_at: int) -> None:
    steps = [{"layers.0"}, {"layers.0", "layers.1"}, {"layers.1"}, {"layers.0"}]
    whole, model = Toy(), Toy()
    model.load_state_dict(whole.state_dict())
    uninterrupted, first = IterateAverage(toy_binding(whole)), IterateAverage(toy_binding(model))
    iterates = walk(uninterrupted, whole, steps)
    walk(first, model, steps[:stop_at])
    state = first.state_dict()
    first.apply()  # must not reach into the saved state
    resumed = IterateAverage(toy_binding(model))
    resumed.load_state_dict(state)
    for number in range(stop_at, len(steps)):
        resumed.before_step(steps[number])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(iterates[number][name])
        resumed.after_step(steps[number])
    uninterrupted.apply()
    resumed.apply()
    for left, right in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_statistics_of_batch_normalisation_are_averaged_and_constants_keep_their_bits() -> None:
    model = Toy()
    norm = torch.nn.BatchNorm1d(4)
    constant = torch.tensor([0.1, 0.2, 0.3])
    before = constant.clone()
    average = IterateAverage(toy_binding(model), [*norm.buffers(), constant])
    seen = []
    for step in range(7):
        average.before_step({"layers.0"})
        norm(torch.randn(6, 4, generator=torch.Generator().manual_seed(step)) + step)
        average.after_step({"layers.0"})
        seen.append(norm.running_mean.clone())  # type: ignore[union-attr]
    average.apply()
    torch.testing.assert_close(norm.running_mean, torch.stack(seen).mean(0))
    assert torch.equal(constant, before)
    assert int(norm.num_batches_tracked) == 7  # type: ignore[arg-type]

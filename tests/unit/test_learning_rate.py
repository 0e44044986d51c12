import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from rgft.learning_rate import scale_rates, usual_rate
from rgft.schedule import learning_rate_schedule


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 7)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
        self.down, self.norm = nn.Linear(4 * width, width), nn.LayerNorm(width)


def test_the_less_is_trained_the_less_repetitions_count() -> None:
    net = Net(384)
    rates = [usual_rate(net, passes=2.0, trained=share) for share in (1.0, 0.5, 0.25, 0.0)]
    assert rates == [8.9e-5, 8.9e-5, 1.6e-4, 3e-4]


def test_rates_fall_with_the_width() -> None:
    assert usual_rate(Net(384)) == 3e-4
    assert usual_rate(Net(768)) == 1.5e-4
    assert usual_rate(Net(384).to(torch.bfloat16), factor=0.2) == 6e-5
    assert usual_rate(nn.LayerNorm(5)) == usual_rate(nn.Embedding(5, 5)) == 3e-4


def test_rates_fall_with_passes_beyond_the_first() -> None:
    net = Net(384)
    assert [usual_rate(net, passes=passes) for passes in (0.1, 1.0, 2.0, 3.0)] == [3e-4, 3e-4, 8.9e-5, 4.4e-5]


def test_runs_of_few_steps_keep_a_rate_at_which_they_get_somewhere() -> None:
    net = Net(384)
    rates = [usual_rate(net, passes=passes, steps=10 * passes) for passes in (1.0, 2.0, 5.0, 10.0, 20.0)]
    assert rates == [2.5e-4 * 1.2, 1.3e-4, 5e-5, 2.5e-5, 1.3e-5]
    assert usual_rate(net, passes=5.0, steps=1e6) == usual_rate(net, passes=5.0) == 1.8e-5
    assert usual_rate(net, passes=0.2, steps=1e6) == usual_rate(net, passes=9.0, steps=3) == 3e-4
    assert usual_rate(Net(768), passes=5.0, steps=50) == 2.5e-5


def test_the_width_is_of_inputs() -> None:
    assert usual_rate(nn.Conv2d(24, 48, 4)) == 3e-4
    assert usual_rate(Conv1D(1536, 384)) == 3e-4


def test_adapters_take_a_higher_rate_at_the_width_of_what_they_stand_for() -> None:
    adapted = get_peft_model(Net(384), LoraConfig(r=4, target_modules=["layers.0", "layers.1", "down"]))
    assert usual_rate(adapted) == 1.2e-3


@pytest.mark.parametrize("shape", ["linear", "constant"])
def test_scaled_rates_go_on_as_if_they_had_been_given(shape: str) -> None:
    rates: list[list[float]] = []
    for given, switch in ((1e-3, None), (4e-3, 3)):
        parameters = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
        optimizer = torch.optim.AdamW(
            [{"params": parameters[:1], "lr": 10 * given}, {"params": parameters[1:]}], lr=given
        )
        done = 0.0
        scheduler = learning_rate_schedule(optimizer, lambda: done, shape=shape)  # noqa: B023
        for step in range(8):
            if step == switch:
                scale_rates(optimizer, scheduler, 0.25)
            if switch is None or step >= switch:
                rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            done = (step + 1) / 8
            scheduler.step()
    after = len(rates) - 8
    assert rates[8:] == [pytest.approx(rate) for rate in rates[8 - after : 8]]

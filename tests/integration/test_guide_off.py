"""What is off is bit-unchanged, whatever decay and momentum would do; what comes back has the moments it should."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rgft import Config, Guide
from tests.families import FAMILIES
from tests.integration.loops import Examples, adamw, changed, guided, weights_of
from tests.integration.policies import Scripted, steer

PHASES = (range(2), range(2, 4), range(4, 6))  # on, off, on again


def half_off(guide: Guide, step: int) -> set[str]:
    """Everything; every second component in the middle phase."""
    names = guide.partition.names
    return set(names[1::2]) if step in PHASES[1] else set(names)


def run(
    name: str, granularity: str, optimizer_of: object = None, moments: str = "keep"
) -> tuple[Guide, list[set[str]]]:
    family = FAMILIES[name]
    config = Config(
        preset="rgft",
        granularity=granularity,
        ffn_blocks=2 if granularity == "head" else 1,
        signal="grad_norm",
        scaling=None,
        update={"moments": moments},
    )
    guide = Guide(family.build(), config)
    steer(guide, Scripted(lambda situation: half_off(guide, situation.step)))
    optimizer = optimizer_of(guide) if callable(optimizer_of) else adamw(guide, weight_decay=0.1)
    moved: list[set[str]] = []
    before = weights_of(guide)

    def record(guide: Guide) -> None:
        nonlocal before
        moved.append(changed(guide, before))
        before = weights_of(guide)

    guided(guide, optimizer, Examples(family), steps=6, after_step=record)
    return guide, moved


def coupled_sgd(guide: Guide) -> torch.optim.Optimizer:
    return torch.optim.SGD(guide.param_groups(lr=0.05, weight_decay=0.1), lr=0.05, momentum=0.9, nesterov=True)


@pytest.mark.parametrize("optimizer_of", [None, coupled_sgd], ids=["adamw", "sgd"])
@pytest.mark.parametrize(
    ("name", "granularity"),
    [("bert", "layer"), ("bert", "head"), ("gpt2", "head"), ("llama", "head"), ("t5", "block"), ("mixtral", "head"),
     ("vit", "head"), ("resnet", "block"), ("resnet", "head"), ("efficientnet", "head"), ("peft_lora", "adapter"),
     ("conv_net", "layer")],
)  # fmt: skip
def test_off_components_do_not_move_and_on_ones_do(name: str, granularity: str, optimizer_of: object) -> None:
    guide, moved = run(name, granularity, optimizer_of)
    for step, names in enumerate(moved):
        on = half_off(guide, step)
        assert names <= on, f"step {step}"
        # Key biases have no gradient (softmax), rows of unused embeddings too: all others move.
        assert len(names) > 0.8 * len(on), f"step {step}"


class Net(nn.Module):
    """Two linear layers and a mean-squared error; no layer stack, so nothing is ever below a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


@pytest.mark.parametrize("moments", ["keep", "decay", "reset", "offload"])
def test_moments_of_what_comes_back(moments: str) -> None:
    """Against Adam written out, with the mode applied by hand while the component is off."""
    torch.manual_seed(0)
    data = [(torch.randn(4), torch.randn(1)) for _ in range(24)]
    model = Net()
    guide = Guide(
        model,
        Config(signal="grad_norm", scaling=None, update={"moments": moments}),
        loss=lambda net, batch: ((net(batch[0]) - batch[1]) ** 2).mean(),
    )
    names = guide.partition.names
    victim = next(name for name in names if "first" in name)
    steer(guide, Scripted(lambda s: set(names) - ({victim} if s.step in (2, 3, 4) else set())))
    optimizer = torch.optim.AdamW(guide.param_groups(lr=0.01), lr=0.01, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.0)
    weight = model.first.weight
    value, first, second, count = weight.detach().clone(), torch.zeros(4, 4), torch.zeros(4, 4), 0
    for step, batch in enumerate(guide.batches(data, batch_size=4)):  # type: ignore[arg-type]
        guide.loss(batch).backward()
        gradient = None if weight.grad is None else weight.grad.clone()
        guide.step(optimizer)
        optimizer.zero_grad()
        if step in (2, 3, 4):
            assert gradient is None
            if step == 2 and moments == "reset":
                assert weight not in optimizer.state
                first, second, count = torch.zeros(4, 4), torch.zeros(4, 4), 0
            if moments == "decay":
                first, second = first * 0.8, second * 0.9
        else:
            assert gradient is not None
            count += 1
            first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
            value -= 0.01 * (first / (1 - 0.8**count)) / ((second / (1 - 0.9**count)).sqrt() + 1e-8)
        assert torch.allclose(weight, value, rtol=0, atol=1e-6), f"step {step}"
    assert guide.step_count == 6


def test_an_off_batch_norm_keeps_its_statistics() -> None:
    family = FAMILIES["conv_net"]
    guide = Guide(family.build(), Config(signal="grad_norm", scaling=None))
    norms = {n: m for n, m in guide.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    owners = {n: guide._binding.owner(m.weight) for n, m in norms.items()}
    (first, _), (second, _) = norms.items()
    assert owners[first] != owners[second]
    steer(guide, Scripted(lambda s: set(guide.partition.names) - {owners[first]}))
    before = {n: m.running_mean.clone() for n, m in norms.items()}
    guided(guide, adamw(guide), Examples(family), steps=2)
    assert torch.equal(norms[first].running_mean, before[first])
    assert not torch.equal(norms[second].running_mean, before[second])
    assert all(m.training for m in norms.values())

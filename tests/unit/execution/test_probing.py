import pytest
import torch
from torch import nn

from rgft.execution.probing import still
from tests.unit.execution.toy import Toy, toy_batch, toy_binding


def test_a_probe_moves_nothing() -> None:
    model = Toy().train()
    model.norm = nn.BatchNorm1d(2)
    model.layers[0].requires_grad_(False)
    model(toy_batch()).sum().backward()
    model.drop.eval()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients = {n: p.grad for n, p in model.named_parameters()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    random_state = torch.get_rng_state()

    with pytest.raises(RuntimeError, match="inside"), still(model, toy_binding(model)):  # noqa: PT012
        assert all(p.requires_grad for n, p in model.named_parameters() if not n.startswith("norm"))
        assert not any(m.training for m in model.modules())
        assert all(p.grad is None for p in model.parameters())
        model.norm.train()
        model.norm(model(toy_batch())).sum().backward()
        torch.rand(3)
        raise RuntimeError("inside")

    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(p.grad is gradients[n] for n, p in model.named_parameters())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), random_state)

"""A two-layer block split into heads by hand: rows of the first weight and bias, columns of the second weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rgft.components import Component, ParameterSlice, Partition
from rgft.execution.binding import Binding

WIDTH, HIDDEN, HEADS = 8, 24, 3


class Conv1D(nn.Module):
    """transformers' layer of this name, by its structure: weight [I, O], y = x W + b."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.2)
        self.bias = nn.Parameter(torch.randn(nf) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


class Block(nn.Module):
    """x → down(gelu(up(x))) with layers [O, I] (`linear`), without biases (`no_bias`) or [I, O] (`conv1d`)."""

    def __init__(self, layers: str = "linear", seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up: nn.Module
        self.down: nn.Module
        if layers == "conv1d":
            self.up, self.down = Conv1D(HIDDEN, WIDTH), Conv1D(WIDTH, HIDDEN)
        else:
            self.up = nn.Linear(WIDTH, HIDDEN, bias=layers == "linear")
            self.down = nn.Linear(HIDDEN, WIDTH, bias=layers == "linear")

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


def head_partition(model: nn.Module, heads: int = HEADS) -> Partition:
    """`head.i`: its part of `up` and of `down`; `rest`: the bias of `down`, when there is one."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    transposed = shapes["up.weight"][0] == WIDTH
    hidden_dim = {"up.weight": int(transposed), "up.bias": 0, "down.weight": int(not transposed)}
    components = []
    for head in range(heads):
        start, stop = head * HIDDEN // heads, (head + 1) * HIDDEN // heads
        slices = tuple(
            ParameterSlice(parameter=name, shape=shapes[name], dim=dim, start=start, stop=stop)
            for name, dim in hidden_dim.items()
            if name in shapes
        )
        components.append(Component(name=f"head.{head}", kind="head", index=head, depth=1, slices=slices))
    if "down.bias" in shapes:
        bias = ParameterSlice(parameter="down.bias", shape=shapes["down.bias"])
        components.append(Component(name="rest", kind="rest", depth=1, slices=(bias,)))
    return Partition(components=tuple(components), layers=(), granularity="custom")


def activate(binding: Binding, *names: str) -> None:
    for component, parameters in binding:
        for parameter in parameters:
            parameter.requires_grad_(component.name in names)
            parameter.grad = None

"""A three-layer model whose partition is written by hand, so that acting is tested without splitting."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rgft.components import Component, ParameterSlice, Partition
from rgft.execution.binding import Binding


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.norm(hidden_states + self.dropout(torch.tanh(self.linear(hidden_states))))


class Toy(nn.Module):
    """tokens [B, T] → logits [B, 2]; padding does not reach other positions."""

    def __init__(self, seed: int = 0, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, width)
        self.drop = nn.Dropout(0.5)
        self.layers = nn.ModuleList([Layer(width) for _ in range(3)])
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.drop(self.embed(tokens))
        for layer in self.layers:
            hidden = layer(hidden)
        mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
        return self.head((hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))


def toy_partition(model: Toy) -> Partition:
    def owned(prefix: str) -> tuple[ParameterSlice, ...]:
        return tuple(
            ParameterSlice(parameter=name, shape=tuple(p.shape))
            for name, p in model.named_parameters()
            if name.startswith(prefix)
        )

    layers = tuple(f"layers.{i}" for i in range(3))
    return Partition(
        components=(
            Component(name="embed", kind="embedding", slices=owned("embed"), depth=0),
            *(Component(name=p, kind="layer", slices=owned(p), depth=i + 1, layer=p) for i, p in enumerate(layers)),
            Component(name="head", kind="classifier", slices=owned("head"), depth=4),
        ),
        layers=layers,
        granularity="layer",
    )


def toy_binding(model: Toy) -> Binding:
    partition, parameters = toy_partition(model), dict(model.named_parameters())
    return Binding(
        partition=partition,
        parameters={c.name: tuple(parameters[s.parameter] for s in c.slices) for c in partition},
        names={c.name: tuple(s.parameter for s in c.slices) for c in partition},
        restore=lambda: None,
        check=lambda: None,
    )


def toy_batch(seed: int = 1, rows: int = 4, tokens: int = 5) -> Tensor:
    return torch.randint(0, 11, (rows, tokens), generator=torch.Generator().manual_seed(seed))

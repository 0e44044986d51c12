"""Random partitions of any model: uneven slices along random dimensions, several of one weight in one component."""

from __future__ import annotations

import random
from itertools import pairwise

from torch import nn

from rgft.components import Component, ParameterSlice, Partition


def random_partition(model: nn.Module, seed: int, components: int = 4, whole: float = 0.25) -> Partition:
    """Deals every trainable parameter, cut at random places or (with probability `whole`) uncut, to components."""
    rng = random.Random(seed)
    slices: list[list[ParameterSlice]] = [[] for _ in range(components)]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = tuple(parameter.shape)
        dims = [dim for dim, size in enumerate(shape) if size > 1]
        if not dims or rng.random() < whole:
            rng.choice(slices).append(ParameterSlice(parameter=name, shape=shape))
            continue
        dim = rng.choice(dims)
        edges = sorted({0, shape[dim], *(rng.randrange(1, shape[dim]) for _ in range(rng.randint(1, 5)))})
        for start, stop in pairwise(edges):
            rng.choice(slices).append(ParameterSlice(parameter=name, shape=shape, dim=dim, start=start, stop=stop))
    return Partition(
        components=tuple(
            Component(name=f"part.{i}", kind="other", index=i, depth=1, slices=tuple(owned))
            for i, owned in enumerate(slices)
        ),
        layers=(),
        granularity="custom",
    )

"""Uniform numbers that depend on what they are drawn for, and on nothing else."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def uniform(count: int, *key: int | str) -> Tensor:
    """`count` numbers in [0, 1) in float64, the same for the same key in any process and order.

    The key goes through a hash: a generator seeded alike elsewhere (the order of an epoch is) would not be independent.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)

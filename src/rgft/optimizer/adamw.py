"""AdamW, the default."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import AdamW

#: Types of devices where AdamW has a kernel that makes its step in one pass.
WITH_FUSED_KERNEL = ("cpu", "cuda")


def adamw(parameters: Iterable[Any], *, lr: float) -> AdamW:
    """AdamW with the kernel that makes its step in one pass, where there is one: about a third of the time.

    Args:
        parameters: or groups of them.
        lr: learning rate of groups without one.
    """
    held = list(parameters)
    tensors = [p for group in held for p in (group["params"] if isinstance(group, dict) else [group])]
    return AdamW(held, lr=lr, fused=all(p.device.type in WITH_FUSED_KERNEL for p in tensors))

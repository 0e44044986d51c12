"""The learning rate where none is given: by a rule of thumb, from the width, the passes over the data and the steps.

The best rate of Adam falls with the width (Yang et al. 2021, arXiv:2203.03466). How it falls with how often the run
sees its examples, and where it stops to, was read off the grids of this project's bench (decision 20).
"""

from __future__ import annotations

import math
from statistics import median

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rgft.architectures.adapters import adapter_of, adapter_paths
from rgft.architectures.matrices import has_matrix, matrix_size

#: AdamW's rate for a run of up to one pass, and the width that it suits.
REFERENCE_RATE, REFERENCE_WIDTH = 3e-4, 384
#: The power of the passes, beyond the first, that the rate falls with where half of the layers or more are trained;
#: where fewer are, less, by their share: the less is trained, the less a repetition spoils (decision 25).
POWER, ENOUGH_LAYERS = 1.75, 0.5
#: What the rate times the steps is at least, at that width: with less, runs over few examples end before they have
#: learnt anything, however often they see them.
LEAST_MOVE = 2.5e-3
#: Of adapters, against dense weights.
ADAPTERS = 4.0


def usual_rate(
    model: nn.Module, *, passes: float = 1.0, steps: float = math.inf, trained: float = 1.0, factor: float = 1.0
) -> float:  # fmt: skip
    """A learning rate that suits a run.

    Args:
        model: to be trained. One that carries adapters trains them.
        passes: how often the run sees each training example, in the mean.
        steps: of the optimizer, that it makes; infinite: many.
        trained: share of the layers that are trained.
        factor: of the optimizer's usual rate against AdamW's.
    """
    carriers = adapter_paths(model)
    widths = [
        matrix_size(module)[0] for path, module in model.named_modules()
        if has_matrix(module) and adapter_of(f"{path}.weight", carriers) is None
    ]  # fmt: skip
    width = median(widths) if widths else REFERENCE_WIDTH
    power = POWER * min(1.0, trained / ENOUGH_LAYERS)
    rate = REFERENCE_RATE / max(1.0, passes) ** power
    rate = max(rate, min(REFERENCE_RATE, LEAST_MOVE / max(1.0, steps))) * factor * REFERENCE_WIDTH / width
    return float(f"{rate * (ADAPTERS if carriers else 1.0):.2g}")


def rate_text(lr: float, multiplier: float | None) -> str:
    """A learning rate as it is shown.

    Args:
        lr: of dense weights.
        multiplier: of the low-rank pairs' rate; None: there are none.
    """
    return f"{lr:g}" if multiplier is None else f"{lr:g} ({lr * multiplier:.2g} of low-rank pairs)"


def scale_rates(optimizer: Optimizer, scheduler: LRScheduler, factor: float) -> None:
    """Multiplies the learning rates of a run that is under way, where its schedule is and where it goes."""
    for group in optimizer.param_groups:
        group["lr"] *= factor
        group["initial_lr"] *= factor
    scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]

"""What optimizers make anew now and then: every so many steps, or every such share of a run."""

from __future__ import annotations

import math


def stretch_of(every: float, steps: int) -> float:
    """What is done `every` so many steps, or every such share of a run of `steps`, in steps; rounded up."""
    return every if every >= 1 else max(1, math.ceil(every * steps))


def is_charged(every: float, step: int) -> bool:
    """Whether a step is charged with what is done every so many steps, or every such share of a run.

    While the length of the run is not known, the first steps are charged, once for each time that it will be done.
    """
    return step % int(every) == 0 if every >= 1 else step < math.ceil(1 / every)

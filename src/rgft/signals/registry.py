"""Signals by name, as configurations give them."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from rgft.errors import ConfigError
from rgft.signals.activation import ActXGrad
from rgft.signals.base import Signal
from rgft.signals.control import Random, Uniform
from rgft.signals.decrease import GeneralisingDecrease, PredictedDecrease
from rgft.signals.gradient import Fisher, GradNorm, GradOverWeight, Taylor
from rgft.signals.residual import ResidualDot
from rgft.signals.router import RouterShare
from rgft.signals.suppression import Suppression
from rgft.signals.tuned_lens import TunedLens
from rgft.signals.weights import Delta, LowRankMagnitude, WeightMagnitude

_ALL: tuple[type[Signal], ...] = (
    ResidualDot, GradNorm, PredictedDecrease, GeneralisingDecrease, Fisher, Taylor, GradOverWeight, WeightMagnitude,
    LowRankMagnitude, Delta, ActXGrad, Suppression, RouterShare, TunedLens, Random, Uniform,
)  # fmt: skip

#: Name in configurations → signal.
SIGNALS: dict[str, type[Signal]] = {signal.name: signal for signal in _ALL}


def make(name: str, **params: Any) -> Signal:
    """The signal of that name.

    Raises:
        ConfigError: an unknown name, or parameters that are unknown or have bad values; all of them at once, unknown
            ones with the nearest valid name.
    """
    if name not in SIGNALS:
        raise ConfigError(f"signal: expected one of {', '.join(sorted(SIGNALS))}; found {name!r}{_hint(name, SIGNALS)}")
    signal = SIGNALS[name]
    valid = list(inspect.signature(signal).parameters)
    problems = [
        f"signal {name!r} has no parameter {param!r}{_hint(param, valid)}; it has {', '.join(valid) or 'none'}"
        for param in params
        if param not in valid
    ]
    try:
        made = signal(**{param: value for param, value in params.items() if param in valid})
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    except TypeError as error:
        raise ConfigError([*problems, f"signal {name!r}: a value has the wrong type: {error}"]) from error
    if problems:
        raise ConfigError(problems)
    return made


def _hint(name: str, valid: Any) -> str:
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.4)
    return f" (did you mean {close[0]!r}?)" if close else ""

"""Dropout off and on again: what a model leaves out at random in training keeps it from learning examples by heart.

A run that is over before an example comes again has nothing to learn by heart, and what is left out is noise in every
gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

from torch import nn

from rgft.execution.eager import is_compiled


class Dropout:
    """What a model drops at random: values in dropout modules and in attention, layers, branches.

    It is found by name: probabilities that modules hold as numbers under a name with "drop" in it, or as `p` or `prob`
    where the module's class is one of dropout or stochastic depth. What is read from a model's configuration at each
    call (Wav2Vec2's layer drop) stays.

    Args:
        model: whose modules are looked at once.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._own: list[tuple[nn.Module, str, float]] = [
            (module, name, value)
            for module in model.modules()
            for name, value in vars(module).items()
            if type(value) is float and 0.0 < value < 1.0 and _is_of_dropout(module, name)
        ]
        self.is_off = False

    @cached_property
    def may_change(self) -> bool:
        """Whether it costs nothing to change it during a run; a compiled model would be compiled anew.

        A model inside a wrapper of `torch.compile(model)` is not known to be compiled.
        """
        return not is_compiled(self._model)

    def turn(self, *, off: bool) -> None:
        """Sets all probabilities to 0, or back to what they were."""
        if off == self.is_off:
            return
        self.is_off = off
        for module, name, value in self._own:
            # At every step: `setattr` of a module takes ten times as long.
            module.__dict__[name] = 0.0 if off else value

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Inside, all are 0."""
        was_off = self.is_off
        self.turn(off=True)
        try:
            yield
        finally:
            self.turn(off=was_off)

    def __len__(self) -> int:
        return len(self._own)


def _is_of_dropout(module: nn.Module, name: str) -> bool:
    kind = type(module).__name__.lower()
    return "drop" in name.lower() or (name in ("p", "prob") and ("drop" in kind or "stochasticdepth" in kind))

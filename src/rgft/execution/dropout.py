"""Dropout off and on again: what a model leaves out at random in training keeps it from learning examples by heart.

A run that is over before an example comes again has nothing to learn by heart, and what is left out is noise in every
gradient.
"""

from __future__ import annotations

from functools import cached_property

from torch import nn

from rgft.execution.eager import is_compiled


class Dropout:
    """All that a model drops at random: in dropout modules, in attention, whole layers, whole branches.

    These are the probabilities that modules hold as numbers under a name with "drop" in it, or as `p` where the
    module's own name has it.

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
        """Whether it costs nothing to change it during a run; a compiled model would be compiled anew."""
        return not is_compiled(self._model)

    def turn(self, *, off: bool) -> None:
        """Sets all probabilities to 0, or back to what they were."""
        if off == self.is_off:
            return
        self.is_off = off
        for module, name, value in self._own:
            setattr(module, name, 0.0 if off else value)

    def __len__(self) -> int:
        return len(self._own)


def _is_of_dropout(module: nn.Module, name: str) -> bool:
    return "drop" in (type(module).__name__ if name == "p" else name).lower()

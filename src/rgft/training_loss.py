"""The loss of a run, in the form that computes least."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from rgft.execution.target_positions import CHOSEN, ChosenTargets, TargetLoss

#: model, batch → per-example losses [B] or their mean.
Loss = Callable[[nn.Module, Any], Tensor]


class TrainingLoss:
    """A batch's mean loss: as it was given, and for training steps at targets alone, where that was proved.

    Args:
        plain: as it was given.
        form: the same loss at targets alone, not proved yet; None: there is no such form.

    Attributes:
        plain: see above.
        form: see above.
        at_targets: the form as it was proved on the model; None: steps compute the plain one.
        targets: of the batch whose loss is being computed at these alone; else None.
    """

    def __init__(self, plain: Loss, form: TargetLoss | None) -> None:
        self.plain = plain
        self.form = form
        self.at_targets: Loss | None = None
        self.targets: int | None = None

    def mean(self, model: nn.Module, batch: Any) -> Tensor:
        """The plain one."""
        return self.plain(model, batch).mean()

    def of_step(self, model: nn.Module, batch: Any) -> Tensor:
        """What a training step computes."""
        values = self.values(model, batch)
        return values.mean() if values.dim() else values

    def values(self, model: nn.Module, batch: Any, *, chosen: ChosenTargets | None = None) -> Tensor:
        """What it computes, before the mean.

        Args:
            model: of the run.
            batch: of the step.
            chosen: where it runs at targets, which of them; None: all.
        """
        form, at_targets = self.form, self.at_targets
        if form is None or at_targets is None or not form.applies(model):
            return self.plain(model, batch)
        self.targets = form.count(batch) if chosen is None else int((chosen.factors_N > 0.0).sum())
        try:
            return at_targets(model, batch if chosen is None else {**batch, CHOSEN: chosen})
        finally:
            self.targets = None

    def runs_at_targets(self, model: nn.Module) -> bool:
        """Whether steps compute the head at targets alone."""
        return self.form is not None and self.at_targets is not None and self.form.applies(model)

    def count_rows(self, batch: Any) -> list[int] | None:
        """What each row counts in the loss's mean: its targets; None: all count alike."""
        return None if self.form is None else self.form.count_rows(batch)

    @property
    def count(self) -> Callable[[Any], int] | None:
        """Targets of a batch, where steps compute what they can at these alone; else None."""
        return None if self.form is None or self.at_targets is None else self.form.count

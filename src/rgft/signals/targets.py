"""What a batch asks for: the kind of task, logits and targets aligned, and the residual between them.

Shapes: B examples, T tokens, C classes or vocabulary, N targets that count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rgft.errors import DataError
from rgft.signals.base import at_least_float32
from rgft.signals.captures import first_tensor

Task = Literal["classification", "multi_label_classification", "language_model", "regression"]

#: Label of a target that does not count, as in `torch.nn.CrossEntropyLoss`.
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Aligned predictions and targets of a batch.

    Attributes:
        task: kind of task.
        logits: [B, C] (classification, one label or several), [B, T, C] (language model), or [B, D] (regression); at
            least float32.
        labels: [B] or [B, T] integers (−100 does not count), or floats, [B, C] (several labels) or [B, D]; aligned with
            `logits`.
        shifted: whether position t predicts token t+1, so that T is one less than the model's.
    """

    task: Task
    logits: Tensor
    labels: Tensor
    shifted: bool = False

    @property
    def counts(self) -> Tensor:
        """Which targets count, [B] or [B, T]; of floats all examples do."""
        is_float = self.labels.is_floating_point()
        return torch.ones_like(self.labels[:, 0]).bool() if is_float else self.labels != IGNORED

    @property
    def counting(self) -> Tensor:
        """The targets that count: integers [N], or floats as `labels`."""
        return self.labels[self.counts]

    def residual(self) -> Tensor:
        """R = ‖y − ŷ‖², a scalar with a graph.

        Brier's score Σ_c (1[c = y] − softmax_c)² as a mean over targets for classification and language models
        (Brier 1950), its Σ_c (y_c − sigmoid_c)² where an example has several labels, the squared error summed over
        outputs as a mean over examples for regression.
        """
        if self.labels.is_floating_point():
            found = self.logits if self.task == "regression" else self.logits.sigmoid()
            return (found - self.labels).square().sum(-1).mean()
        probabilities_NC = self.logits[self.counts].softmax(-1)
        right_N = probabilities_NC.gather(-1, self.counting.unsqueeze(-1)).squeeze(-1)
        return (probabilities_NC.square().sum(-1) - 2.0 * right_N + 1.0).mean()


def targets_of(
    model: nn.Module, batch: Any, output: Any, *, outputs: Callable[[Any], Tensor] | None, shift: bool | None
) -> Targets:
    """Finds logits and labels, infers the task from them, and aligns them.

    Integer labels [B] mean classification, [B, T] a language model (also masked ones and token classification), floats
    regression, or several labels an example where `model.config.problem_type` says so. Token labels are shifted when
    they repeat the input tokens, as causal models' labels do; `shift` decides instead where that cannot be seen.

    Raises:
        DataError: logits or labels are missing, do not fit each other, or no target counts.
    """
    logits = outputs(output) if outputs is not None else getattr(output, "logits", None)
    logits = first_tensor(output) if logits is None else logits
    labels = _labels_of(batch)
    if logits is None:
        raise DataError(
            f"expected the model to return logits (an object with .logits, a tensor or a tuple); found "
            f"{type(output).__name__}; pass outputs=<function from the model's output to logits>"
        )
    logits, labels = at_least_float32(logits), labels.to(logits.device)
    if labels.is_floating_point():
        return _of_floats(model, logits, labels)
    if logits.dim() != labels.dim() + 1 or labels.dim() not in (1, 2) or logits.shape[:-1] != labels.shape:
        raise DataError(
            f"expected integer labels [B] with logits [B, C], or [B, T] with [B, T, C]; found labels "
            f"{tuple(labels.shape)} with logits {tuple(logits.shape)}; pass residual=<function of output and batch>, "
            "or float labels for regression"
        )
    task: Task = "classification" if labels.dim() == 1 else "language_model"
    shifted = task == "language_model" and (_repeats_inputs(batch, labels) if shift is None else shift)
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counting = labels[labels != IGNORED]
    if counting.numel() == 0:
        raise DataError(f"no target of the batch counts: all labels are {IGNORED}")
    low, high = (int(v) for v in torch.aminmax(counting))
    if low < 0 or high >= logits.shape[-1]:
        raise DataError(f"labels must lie in 0…{logits.shape[-1] - 1} or be {IGNORED}; found {low}…{high}")
    return Targets(task=task, logits=logits, labels=labels, shifted=shifted)


def _of_floats(model: nn.Module, logits: Tensor, labels: Tensor) -> Targets:
    several = "multi_label_classification"
    task: Task = several if getattr(getattr(model, "config", None), "problem_type", None) == several else "regression"
    if logits.numel() != labels.numel() or logits.shape[0] != labels.shape[0]:
        raise DataError(
            f"expected one output per float label; found labels {tuple(labels.shape)} with outputs "
            f"{tuple(logits.shape)}; pass residual=<function of output and batch>"
        )
    rows = labels.shape[0]
    return Targets(task=task, logits=logits.reshape(rows, -1), labels=labels.to(logits.dtype).reshape(rows, -1))


def _labels_of(batch: Any) -> Tensor:
    found: Any = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in ("labels", "label") if batch.get(key) is not None), None)
    elif isinstance(batch, tuple | list) and batch:
        found = batch[-1]
    if isinstance(found, Tensor) and found.dim() > 0:
        return found
    keys = f"keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
    raise DataError(
        f"expected labels as batch['labels'], batch['label'] or the last element of a tuple; found {keys}; pass "
        "residual=<function of output and batch>"
    )


def _repeats_inputs(batch: Any, labels: Tensor) -> bool:
    """Whether the labels are the input tokens themselves, wherever they count."""
    inputs = batch.get("input_ids") if isinstance(batch, Mapping) else batch[0]
    if not isinstance(inputs, Tensor):
        raise DataError("token labels without input_ids: pass shift=True (causal) or shift=False (aligned)")
    if inputs.shape != labels.shape:
        return False
    keep = labels != IGNORED
    return bool(torch.equal(inputs.to(labels.device)[keep], labels[keep]))

"""What steps of a run will hold on the training device, from forward passes that keep nothing.

    needed = (weights + gradients + moments + averages + max(activations + temporaries of backward,
              temporaries of the optimizer, a frozen layer's forward pass)) · (1 + margin)

Gradients and activations are added up although backward frees one as it makes the other: with accumulation both exist
at once, and without it the difference pays for what the margin does not. The largest batch of the run counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rgft.components import Partition
from rgft.cost import BatchShape
from rgft.cost.saved import SavedActivations, saved_activations
from rgft.cost.undisturbed import undisturbed
from rgft.optimizer.state_bytes import StateBytes, state_bytes

#: Share of what was counted that is kept free for what is not counted: inputs, masks, small temporaries.
MARGIN = 0.05
#: Gradients of activations that backward holds beside them, in tensors as large as the largest that is saved.
BACKWARD_TEMPORARIES = 3
#: Rows and tokens of the passes that costs are traced on under a memory budget.
TRACE_ROWS, TRACE_TOKENS = 2, 128


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a run keeps beside weights and gradients.

    Attributes:
        state: (parameter, share of it that is a slice) → bytes of optimizer state.
        kept_steps: float32 copies of what is trained that tell signals of a step what was made, while it is scored.
        averages: whether means of the weights are kept, in fp32 at least.
        copies: of all weights, kept by signals.
        steps_in_probe: model-sized temporaries that a probe makes.
        keeps_moments: whether the optimizer state of what is off stays in the same memory.
    """

    state: StateBytes = field(default_factory=lambda: state_bytes(None))
    kept_steps: float = 0.0
    averages: bool = False
    copies: int = 0
    steps_in_probe: int = 0
    keeps_moments: bool = True


class MemoryForecast:
    """Forecasts for one model and one largest batch; each shape of pass is run once, when first asked for.

    Args:
        model: plain or bound; may be on the meta device, where attention keeps more than fused kernels do.
        partition: its components.
        parameters: name → parameter, as the partition names them.
        batch: an example of the run's batches.
        rows, tokens: of the largest batch; tokens are 1 without a token dimension.
        is_padded: whether batches hold padding, which attention then needs a mask for.
        loss: (model, batch) → scalar.
        setup: what else is kept.
    """

    def __init__(
        self, model: nn.Module, partition: Partition, *, parameters: Mapping[str, Tensor], batch: Any, rows: int,
        tokens: int, is_padded: bool, loss: Callable[[nn.Module, Any], Tensor], setup: Setup,
    ) -> None:  # fmt: skip
        self._model, self._batch, self._loss, self._setup = model, batch, loss, setup
        self.partition, self.rows, self.tokens, self._is_padded = partition, rows, tokens, is_padded
        self._is_accelerated = next(iter(parameters.values())).device.type not in ("cpu", "meta")
        self.weights = sum(storage.nbytes() for storage in _distinct([*model.parameters(), *model.buffers()]))
        self._buffers = sum(b.numel() * max(4, b.element_size()) for b in model.buffers() if b.is_floating_point())
        #: Per slice of a component: depth, bytes, bytes in fp32 at least.
        self._slices = [
            (c.depth, math.ceil(size), math.ceil(size * max(4, p.element_size()) / p.element_size()))
            for c in partition
            for part in c.slices
            for p in (parameters[part.parameter],)
            for size in (part.fraction * p.nbytes,)
        ]  # fmt: skip
        #: Per slice: depth, bytes of optimizer state.
        self._states = [
            (c.depth, setup.state(parameters[part.parameter], part.fraction)) for c in partition for part in c.slices
        ]
        self._saved: dict[tuple[int, int, bool], SavedActivations] = {}
        self._checkpointed = list(checkpointed_modules(model))

    @property
    def is_checkpointing(self) -> bool:
        """Whether the model came with it."""
        return bool(self._checkpointed)

    @property
    def cuts(self) -> list[int]:
        """Depths to cut at, 0 first: everything is trained there."""
        return [0, *sorted({c.depth for c in self.partition})[1:]]

    @property
    def checkpointing_options(self) -> tuple[bool, ...]:
        """Whether layers may be checkpointed: as it is, then what the model offers beside."""
        if self.is_checkpointing:
            return (True,)
        return (False, True) if offers_checkpointing(self._model) else (False,)

    def parts(self, cut: int, *, rows: int, checkpointing: bool, moments_from: int | None = None) -> dict[str, int]:
        """Bytes of a step by what holds them; they add up to what is needed.

        Args:
            cut: everything above is on.
            rows: that go through the model at once.
            checkpointing: of the layers.
            moments_from: cut of the lowest component that ever was on; None: `cut`.
        """
        on = [(size, wide) for depth, size, wide in self._slices if depth >= cut]
        gradients, largest = sum(size for size, _ in on), max((wide for _, wide in on), default=0)
        lowest = cut if moments_from is None or not self._setup.keeps_moments else moments_from
        state = sum(size for depth, size in self._states if depth >= lowest)
        kept = math.ceil(self._setup.kept_steps * sum(wide for _, wide in on))
        plain = self._saved_by(rows, self.tokens, False)
        saved = self._saved_by(rows, self.tokens, True) if checkpointing else plain
        again = max(plain.by_layer[max(0, cut - 1) :], default=0) if checkpointing else 0
        activations = saved.above(cut) + again
        of_backward = BACKWARD_TEMPORARIES * max(plain.largest, saved.largest) + largest
        # A step that is found out on a copy takes the parameter, its gradient, both before and after, and its state.
        of_copy = (6 * largest if self._setup.kept_steps else 0) + kept
        of_optimizer = (gradients if self._is_accelerated else 2 * largest) + of_copy
        # A layer that is off holds at once no more than it would save if it were on.
        of_prefix = max(plain.by_layer, default=0) + plain.largest
        return self._with_margin({
            "weights": self.weights * (1 + self._setup.copies),
            "gradients": gradients,
            "moments": state,
            "averages": (sum(wide for _, wide in on) + self._buffers) * self._setup.averages,
            "activations": activations,
            "temporaries": max(activations + of_backward + kept, of_optimizer, of_prefix) - activations,
        })  # fmt: skip

    def needed(self, cut: int, *, rows: int, checkpointing: bool) -> int:
        """Bytes of a step, the margin included, or those of tracing its costs where that takes more."""
        return max(sum(self.parts(cut, rows=rows, checkpointing=checkpointing).values()), self.tracing)

    @property
    def tracing(self) -> int:
        """Bytes of the passes that costs are read off: two rows, everything on, nothing checkpointed."""
        saved = self._saved_by(TRACE_ROWS, min(self.tokens, TRACE_TOKENS), False)
        parts = self._with_margin({"weights": self.weights, "activations": saved.above(0) + 2 * saved.largest})
        return sum(parts.values())

    def cached(self, examples: int) -> int:
        """Bytes of so many examples' states at a cut, at most: as computed, and none shorter than the longest."""
        return math.ceil(examples * self._saved_by(self.rows, self.tokens, False).hidden / self.rows)

    def probe(self, examples: int, *, lowest_cut: int) -> int:
        """Bytes of a probe of so many examples: everything on, nothing checkpointed.

        Args:
            examples: of the probe; half of them make a step where the signal scores steps, and are passed on their own.
            lowest_cut: of the run; its moments and averages exist beside.
        """
        per_pass = examples - examples // 2 if self._setup.steps_in_probe else examples
        saved = self._saved_by(self.rows, self.tokens, False)
        activations = math.ceil(per_pass / self.rows * saved.above(0))
        largest = math.ceil(per_pass / self.rows * saved.largest)
        step = self.parts(lowest_cut, rows=self.rows, checkpointing=False)
        whole = sum(size for _, size, _ in self._slices)
        return sum(self._with_margin({
            "kept": step["weights"] + step["moments"] + step["averages"],
            "steps": self._setup.steps_in_probe * whole,
            "activations": activations + BACKWARD_TEMPORARIES * largest,
            "gradients": 2 * max(size for _, size, _ in self._slices),
        }).values())  # fmt: skip

    @contextmanager
    def _with_checkpointing(self, on: bool) -> Iterator[None]:
        """Inside, layers are checkpointed (or not); afterwards none is, and a model's own way of doing it is kept."""
        if on and not self._checkpointed:
            enable_checkpointing(self._model)
        for module in self._checkpointed if on else ():
            setattr(module, "gradient_checkpointing", True)  # noqa: B010
        try:
            yield
        finally:
            if on and not self._checkpointed:
                disable_checkpointing(self._model)
            for module in self._checkpointed:
                setattr(module, "gradient_checkpointing", False)  # noqa: B010

    def _with_margin(self, parts: dict[str, int]) -> dict[str, int]:
        return {**parts, "margin": math.ceil(MARGIN * sum(parts.values()))}

    def _saved_by(self, rows: int, tokens: int, checkpointing: bool) -> SavedActivations:
        key = (rows, tokens, checkpointing)
        if key not in self._saved:
            batch = resized(self._batch, rows=rows, tokens=tokens, is_padded=self._is_padded)
            with _as_in_training(self._model), self._with_checkpointing(checkpointing):
                self._saved[key] = saved_activations(
                    self._model, self.partition.layers, lambda: self._loss(self._model, batch)
                )
        return self._saved[key]


def resized(batch: Any, *, rows: int, tokens: int, is_padded: bool = False) -> Any:
    """A batch of another shape, made of the rows and tokens of `batch`; with padding in it if asked."""
    shape = BatchShape.of(batch)
    to = replace(shape, rows=rows)
    if shape.tokens is not None:
        targets = None if shape.targets is None else math.ceil(shape.targets * tokens / shape.tokens)
        to = replace(to, tokens=tokens, targets=targets)
    changed = shape.resize(batch, to)
    mask = changed.get("attention_mask") if isinstance(changed, Mapping) else None
    if is_padded and isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > 1:
        mask = mask.clone()
        mask[0, -1] = 0
        changed = {**changed, "attention_mask": mask}
    return changed


@contextmanager
def _as_in_training(model: nn.Module) -> Iterator[None]:
    """Training mode with the flags as they are; all is put back, and nothing is checkpointed."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with undisturbed(model):
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        model.train()
        yield


def offers_checkpointing(model: nn.Module) -> bool:
    """Whether the model can be told to checkpoint its layers (Transformers' convention)."""
    return hasattr(model, "gradient_checkpointing_enable") and getattr(model, "supports_gradient_checkpointing", True)


def enable_checkpointing(model: Any) -> None:
    """Turns it on, in the kind that gives gradients above a cut."""
    if hasattr(model, "activation_checkpointing_enable"):  # the newer name
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def disable_checkpointing(model: Any) -> None:
    """Takes it back."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()


def checkpointed_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Those whose layers are checkpointed now."""
    return (module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True)


def _distinct(tensors: list[Tensor]) -> list[torch.UntypedStorage]:
    found = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return list(found.values())

"""Tuned lens: how much error a linear probe on a layer's output leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rgft.errors import ConfigError, DataError
from rgft.signals.base import Probe, Signal, at_least_float32
from rgft.signals.captures import as_floats, capture, unit_scores
from rgft.signals.targets import Targets, targets_of


@dataclass(frozen=True, kw_only=True)
class TunedLens(Signal):
    """Leave-one-out squared error of a ridge probe from hidden states to targets, per layer output and head context.

    After Belrose et al. 2023 ("Eliciting Latent Predictions… with the Tuned Lens"), with a ridge regression in place of
    a trained translator: its leave-one-out error has a closed form, e_i / (1 − H_ii), so that a handful of examples in
    wide layers does not show zero error. Targets are one-hot labels (error summed over classes) or regression targets
    (summed over outputs); hidden states are means over tokens (attention mask respected) or pixels, except for token
    labels, where each counting token is a sample. A layer whose positions do not match the labels (an encoder under a
    decoder's labels) is left out. One forward pass without gradients, one linear solve of the samples' size per unit.

    Attributes:
        ridge: λ relative to the mean eigenvalue of the centred Gram matrix.
        samples: at most so many samples, the first of the batch.
        outputs, shift: as in `ResidualDot`.
    """

    name: ClassVar[str] = "tuned_lens"
    ridge: float = 1.0
    samples: int = 512
    outputs: Callable[[Any], Tensor] | None = None
    shift: bool | None = None

    def __post_init__(self) -> None:
        problems = []
        if not self.ridge > 0.0:
            problems.append(f"tuned_lens.ridge: expected a number > 0; found {self.ridge!r}")
        if self.samples < 3:
            problems.append(f"tuned_lens.samples: expected an integer >= 3; found {self.samples!r}")
        if problems:
            raise ConfigError(problems)

    def measure(self, probe: Probe) -> dict[str, float]:
        with capture(probe, gradients=False) as seen:
            probe.loss(probe.model, probe.batch)
        if len(seen.outputs) != 1:
            raise DataError(f"expected the loss to call the model once; it was called {len(seen.outputs)} times")
        targets = targets_of(probe.model, probe.batch, seen.outputs[0], outputs=self.outputs, shift=self.shift)
        wanted_NC = target_matrix(targets.counting[: self.samples])
        if wanted_NC.shape[0] < 3:
            raise DataError(f"tuned_lens needs at least 3 targets in its batch; found {wanted_NC.shape[0]}")

        def loss(tensor: Tensor, cut: Callable[[Tensor], Tensor]) -> Tensor | None:
            states_ND = hidden_states(cut(tensor), targets, probe.batch)
            if states_ND is None:
                return None
            return leave_one_out_errors(states_ND[: self.samples], wanted_NC, ridge=self.ridge).mean()

        return as_floats(unit_scores(probe, seen, loss))


def leave_one_out_errors(states_ND: Tensor, targets_NC: Tensor, *, ridge: float) -> Tensor:
    """[N] squared leave-one-out error of each sample, for ridge regression with intercept on centred data.

    With H = 11ᵀ/N + K(K + λI)⁻¹, K the centred Gram matrix and λ = ridge · tr K / N, sample i's error without itself is
    ((I − H)Y)_i / (1 − H_ii); exact for intercept and weights refitted at the same λ.
    """
    centred = at_least_float32(states_ND) - at_least_float32(states_ND).mean(0)
    gram = (centred @ centred.T).cpu().double()
    targets = targets_NC.cpu().double()
    count = gram.shape[0]
    identity = torch.eye(count, dtype=gram.dtype)
    penalty = ridge * gram.trace().clamp_min(torch.finfo(gram.dtype).tiny) / count
    hat = torch.linalg.solve(gram + penalty * identity, gram) + 1.0 / count
    errors = (targets - hat @ targets) / (1.0 - hat.diagonal()).unsqueeze(-1)
    return errors.square().sum(-1)


def target_matrix(counting: Tensor) -> Tensor:
    """[N, C]: one-hot over the classes that occur among integers [N], or float targets as they are."""
    if counting.is_floating_point():
        return counting
    return torch.nn.functional.one_hot(counting.unique(return_inverse=True)[1]).to(torch.float64)


def hidden_states(tensor: Tensor, targets: Targets, batch: Any) -> Tensor | None:
    """[N, D] hidden states, one per target that counts, or None where positions do not match."""
    if targets.task == "language_model":
        rows, tokens = targets.labels.shape
        length = tokens + 1 if targets.shifted else tokens
        if tensor.dim() != 3 or tensor.shape[:2] != (rows, length):
            return None
        return tensor[:, :tokens][targets.counts.to(tensor.device)]
    if tensor.shape[0] != targets.labels.shape[0]:
        return None
    pooled = _pooled(tensor, batch)
    return pooled[targets.counts.to(pooled.device)]


def _pooled(tensor: Tensor, batch: Any) -> Tensor:
    """[B, D]: mean over the tokens of [B, T, D], or the pixels of [B, D, H, W].

    Where channels stand elsewhere ([B, H, W, D], [B, D, T]) positions are left in their place: a probe of those tells
    less than the layer does.
    """
    if tensor.dim() == 4:
        return tensor.flatten(2).mean(-1)
    if tensor.dim() != 3:
        return tensor.flatten(1)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.shape != tensor.shape[:2]:
        return tensor.mean(1)
    weights = mask.to(tensor).unsqueeze(-1)
    return (tensor * weights).sum(1) / weights.sum(1).clamp_min(1.0)

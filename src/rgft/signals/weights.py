"""Scores of the weights themselves. They need no pass at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from rgft.components import Component, ParameterSlice
from rgft.errors import ConfigError
from rgft.signals.base import Probe, Signal, at_least_float32
from rgft.signals.gradient import check_choice, norm_from_powers, power_sum


@dataclass(frozen=True, kw_only=True)
class WeightMagnitude(Signal):
    """‖θ_k‖_p, by default divided by n_k^{1/p}.

    Attributes:
        p: 1 or 2.
        normalise: "rms" or "raw", as in `GradNorm`.
    """

    name: ClassVar[str] = "weight_magnitude"
    p: int = 1
    normalise: Literal["rms", "raw"] = "rms"

    def __post_init__(self) -> None:
        check_choice("weight_magnitude.p", self.p, (1, 2))
        check_choice("weight_magnitude.normalise", self.normalise, ("rms", "raw"))

    @torch.no_grad()
    def measure(self, probe: Probe) -> dict[str, float]:
        totals = {
            component.name: torch.stack([power_sum(w, self.p) for w in probe.parameters[component.name]]).sum()
            for component in probe.partition
        }
        return _normed(totals, probe, self.p, self.normalise)


@dataclass(frozen=True, kw_only=True)
class Delta(Signal):
    """‖θ_k − θ_{0,k}‖_p: how far a component has moved since the run began, by default divided by n_k^{1/p}.

    Attributes:
        p: 1 or 2.
        normalise: "rms" or "raw", as in `GradNorm`.
    """

    name: ClassVar[str] = "delta"
    needs_initial: ClassVar[bool] = True
    p: int = 1
    normalise: Literal["rms", "raw"] = "rms"

    def __post_init__(self) -> None:
        check_choice("delta.p", self.p, (1, 2))
        check_choice("delta.normalise", self.normalise, ("rms", "raw"))

    @torch.no_grad()
    def measure(self, probe: Probe) -> dict[str, float]:
        self.check(probe)
        assert probe.initial is not None
        totals: dict[str, Tensor] = {}
        for component in probe.partition:
            initials = probe.initial(component.name)
            if initials is None:
                continue
            pairs = zip(probe.parameters[component.name], initials, strict=True)
            moved = [power_sum(at_least_float32(now) - at_least_float32(then), self.p) for now, then in pairs]
            totals[component.name] = torch.stack(moved).sum()
        return _normed(totals, probe, self.p, self.normalise)


def _normed(totals: dict[str, Tensor], probe: Probe, p: int, normalise: str) -> dict[str, float]:
    if not totals:
        return {}
    values = torch.stack(list(totals.values())).tolist()
    return {
        name: norm_from_powers(value, p, probe.partition[name].numel, normalise)
        for name, value in zip(totals, values, strict=True)
    }


@dataclass(frozen=True, kw_only=True)
class LowRankMagnitude(Signal):
    """Mean |W_r| over the component's weights, W_r the best rank-r approximation of the whole matrix (LIFT).

    Magnitude alone finds no weights that matter for fine-tuning; after rank reduction it does (Liu et al. 2025, "LIFT
    the Veil for the Truth: Principal Weights Emerge after Rank Reduction"). Convolutions count as matrices of their
    flattened kernels, stacked experts as one matrix each. Embedding tables, vectors and components without a matrix are
    left out. Costs one singular value decomposition per matrix: for rare observations.

    Attributes:
        rank: r ≥ 1.
        reduction: "mean" over the component's matrix elements or "sum".
    """

    name: ClassVar[str] = "low_rank_magnitude"
    rank: int = 128
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"low_rank_magnitude.rank: expected an integer >= 1; found {self.rank!r}")
        check_choice("low_rank_magnitude.reduction", self.reduction, ("mean", "sum"))

    @torch.no_grad()
    def measure(self, probe: Probe) -> dict[str, float]:
        # Component by component would repeat the decomposition for every head of a matrix.
        owners: dict[str, list[tuple[Component, ParameterSlice, Tensor]]] = {}
        for component in probe.partition:
            if component.kind == "embedding":
                continue
            for part, weight in zip(component.slices, probe.parameters[component.name], strict=True):
                if len(part.shape) >= 2:
                    owners.setdefault(part.parameter, []).append((component, part, weight))
        sums: dict[str, list[Tensor]] = {}
        counts: dict[str, int] = {}
        for name, parts in owners.items():
            kernel = isinstance(probe.model.get_submodule(name.rpartition(".")[0]), _ConvNd)
            approximation = _rank_reduced(_assembled(parts), self.rank, kernel=kernel).abs()
            for component, part, _ in parts:
                sums.setdefault(component.name, []).append(part.of(approximation).sum())
                counts[component.name] = counts.get(component.name, 0) + part.numel
        if not sums:
            return {}
        values = torch.stack([torch.stack(terms).sum() for terms in sums.values()]).tolist()
        return {
            name: value / counts[name] if self.reduction == "mean" else value
            for name, value in zip(sums, values, strict=True)
        }


def _assembled(parts: list[tuple[Component, ParameterSlice, Tensor]]) -> Tensor:
    """The whole parameter from its slices, which cover it."""
    dim = parts[0][1].dim
    if dim is None:
        return at_least_float32(parts[0][2])
    ordered = sorted(parts, key=lambda item: item[1].start)
    return torch.cat([at_least_float32(weight) for _, _, weight in ordered], dim=dim)


def _rank_reduced(weight: Tensor, rank: int, *, kernel: bool) -> Tensor:
    """Best rank-r approximation of each matrix, in the weight's shape (Eckart–Young)."""
    matrices = weight.flatten(1) if kernel else weight
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    return ((u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]).reshape(weight.shape)

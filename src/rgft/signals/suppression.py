"""Suppression: how much the loss rises when a component's output contribution is scaled down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rgft.components import Component, ParameterSlice
from rgft.errors import ConfigError
from rgft.signals.base import Probe, Signal
from rgft.signals.captures import input_dimension, module_of


@dataclass(frozen=True, kw_only=True)
class Suppression(Signal):
    """L(contribution scaled by `factor`) − L, as IST's response suppression (Yao et al. 2024, section 3.3).

    What is scaled is what the component adds to the model: for a layer h_out − h_in, where both have one shape (else
    h_out); for a head or neuron block its columns of the output projection; otherwise the component's last weight
    matrix and the bias beside it (LoRA's B, a block's output projection, an expert's down projection), or, without a
    matrix, all its parameters. One forward pass per component and one more: for small partitions or rare observations.
    Weights are restored bit for bit.

    Attributes:
        factor: in [0, 1); 0 removes the component.
    """

    name: ClassVar[str] = "suppression"
    factor: float = 0.25

    def __post_init__(self) -> None:
        if not 0.0 <= self.factor < 1.0:
            raise ConfigError(f"suppression.factor: expected 0 <= factor < 1; found {self.factor!r}")

    @torch.no_grad()
    def measure(self, probe: Probe) -> dict[str, float]:
        losses = [probe.loss(probe.model, probe.batch)]
        for component in probe.partition:
            with self._suppressed(probe, component):
                losses.append(probe.loss(probe.model, probe.batch))
        base, *values = torch.stack(losses).tolist()
        return {component.name: value - base for component, value in zip(probe.partition, values, strict=True)}

    @contextmanager
    def _suppressed(self, probe: Probe, component: Component) -> Iterator[None]:
        if component.kind == "layer" and component.layer is not None:
            handle = probe.model.get_submodule(component.layer).register_forward_hook(self._damp, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()
            return
        weights = [probe.parameters[component.name][index] for index in contribution(probe.model, component)]
        kept = [weight.detach().clone() for weight in weights]
        try:
            for weight in weights:
                weight.mul_(self.factor)
            yield
        finally:
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)

    def _damp(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        entering = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)

        def damped(leaving: Tensor) -> Tensor:
            if entering is None or entering.shape != leaving.shape:
                return leaving * self.factor
            return entering + (leaving - entering) * self.factor

        if isinstance(output, Tensor):
            return damped(output)
        if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
            return type(output)((damped(output[0]), *output[1:]))
        raise ConfigError(
            f"suppression: expected a layer that returns a tensor or a tuple of tensors, found {type(output).__name__} "
            f"from {type(module).__name__}; choose another signal"
        )


def contribution(model: nn.Module, component: Component) -> list[int]:
    """Positions in `component.slices` of the parameters in which the component's output is linear."""
    holders = [module_of(model, part.parameter) for part in component.slices]
    parts = list(zip(component.slices, holders, strict=True))
    columns = [
        i for i, (part, holder) in enumerate(parts)
        if len(part.shape) == 2 and part.dim is not None and part.dim == input_dimension(holder)
    ]  # fmt: skip
    if columns:
        return columns
    matrices = [i for i, (p, holder) in enumerate(parts) if len(p.shape) >= 2 and not isinstance(holder, nn.Embedding)]
    if not matrices:
        return list(range(len(parts)))
    last = matrices[-1]
    beside = [i for i, (part, _) in enumerate(parts) if _is_bias_of(part, parts[last][0])]
    return sorted([last, *beside])


def _is_bias_of(part: ParameterSlice, weight: ParameterSlice) -> bool:
    """Whether both sit in one module under the names X_weight and X_bias."""
    (path, _, name), (other, _, weight_name) = part.parameter.rpartition("."), weight.parameter.rpartition(".")
    return path == other and name.endswith("bias") and weight_name == name.removesuffix("bias") + "weight"

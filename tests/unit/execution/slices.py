"""Gradients of slices, beside those of the plain weights."""

from __future__ import annotations

from torch import Tensor, nn

from rgft.execution.binding import Binding


def slice_gradients(binding: Binding, plain: nn.Module) -> list[tuple[str, Tensor | None, Tensor]]:
    """(component, found gradient, expected one) of each slice."""
    found = []
    for component, parameters in binding:
        for parameter, part in zip(parameters, component.slices, strict=True):
            dense = plain.get_parameter(part.parameter).grad
            assert dense is not None
            found.append((component.name, parameter.grad, part.of(dense)))
    return found

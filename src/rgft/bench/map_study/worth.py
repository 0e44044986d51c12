"""What a component is worth, measured: the loss when it is undone or scaled, and the loss when it alone trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rgft.components import Component
from rgft.execution.binding import Binding

#: Component → its weights.
Weights = Mapping[str, Sequence[Tensor]]


def weights_of(binding: Binding) -> dict[str, list[Tensor]]:
    """A copy of all components' weights."""
    return {component.name: [p.detach().clone() for p in parameters] for component, parameters in binding}


@torch.no_grad()
def put_back(binding: Binding, weights: Weights, names: Sequence[str] | None = None) -> None:
    """Gives components (all of them, or those named) the weights of a copy."""
    for component, parameters in binding:
        if names is None or component.name in names:
            for parameter, value in zip(parameters, weights[component.name], strict=True):
                parameter.copy_(value)


@contextmanager
def moved_back(binding: Binding, name: str, origin: Weights, share: float) -> Iterator[None]:
    """Inside, a component is at origin + share · (θ − origin). Afterwards it is as before."""
    (kept,) = ([p.detach().clone() for p in params] for component, params in binding if component.name == name)
    with torch.no_grad():
        for parameter, start in zip(binding.parameters[name], origin[name], strict=True):
            # 0 is the origin itself, not what rounding makes of it.
            parameter.copy_(torch.lerp(start, parameter.detach(), share) if share else start)
    try:
        yield
    finally:
        put_back(binding, {name: kept}, [name])


def harm_of_moving(binding: Binding, origin: Weights, loss: Callable[[], float], *, share: float) -> dict[str, float]:
    """How much higher the held-out loss is when a component keeps a share of its way from an origin; each by itself.

    Args:
        binding: of the trained model, which is left as it was.
        origin: the weights before training, whereby the component keeps a share of its update; or zeros, whereby it is
            itself scaled by the share.
        loss: the held-out loss of the model as it is.
        share: 0 puts a component at the origin.
    """
    trained, harm = loss(), {}
    for component, _ in binding:
        with moved_back(binding, component.name, origin, share):
            harm[component.name] = loss() - trained
    return harm


def gain_of_training_alone(
    binding: Binding, loss: Callable[[], float], train: Callable[[Sequence[nn.Parameter]], Any]
) -> dict[str, float]:
    """How much lower the held-out loss gets when a component trains beside the classifier than by the classifier alone.

    A classifier is new: without it nothing else can be told from training alone. It is no candidate itself.

    Args:
        binding: of the model before training, which is left as it was.
        loss: the held-out loss of the model as it is.
        train: trains these parameters and no others, in the same way at each call.

    Returns:
        Of every component but classifiers; empty without a classifier that trains.
    """
    initial = weights_of(binding)
    always = [component for component, _ in binding if is_classifier(component)]

    def after(components: Sequence[Component]) -> float:
        chosen = {component.name for component in components}
        on = [p for component, parameters in binding if component.name in chosen for p in parameters]
        kept = [(p, p.requires_grad) for _, parameters in binding for p in parameters]
        try:
            for parameter, _ in kept:
                parameter.requires_grad_(False)
            for parameter in on:
                parameter.requires_grad_(True)
            train(on)
            return loss()
        finally:
            for parameter, requires in kept:
                parameter.requires_grad_(requires)
                parameter.grad = None
            put_back(binding, initial, list(chosen))

    if not always:
        return {}
    alone = after(always)
    return {
        component.name: alone - after([*always, component]) for component, _ in binding if not is_classifier(component)
    }


def is_classifier(component: Component) -> bool:
    """Whether it is (part of) what is new on the model."""
    return component.kind == "classifier"

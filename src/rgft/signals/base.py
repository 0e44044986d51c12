"""The one protocol of all signals: a probe (or a training backward pass) in, one raw score per component out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rgft.components import Component, Partition
from rgft.errors import ConfigError

#: Tensors of a component, one per slice of it, in the order of `Component.slices`.
Parts = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One batch that is looked at and never trained on, and all that a signal may use.

    The guide hands it out inside a context that moves nothing: gradients are empty and required everywhere, the model
    is in eval mode, RNG and buffers are restored afterwards.

    Attributes:
        model: the live model.
        partition: its components.
        parameters: component name → live parameters (views or whole ones), aligned with `Component.slices`.
        batch: what `loss` takes.
        loss: mean loss of the batch, a scalar with a graph.
        update: component name → Δθ of the optimizer's step at reference learning rate, without decay; None unknown.
        initial: component name → θ_0; None when the run does not keep it.
        step: step that comes next.
    """

    model: nn.Module
    partition: Partition
    parameters: Mapping[str, Parts]
    batch: Any
    loss: Callable[[nn.Module, Any], Tensor]
    update: Callable[[str], Parts | None] | None = None
    initial: Callable[[str], Parts | None] | None = None
    step: int = 0


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision as float32, float64 as it is: what statistics are computed in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Signal(ABC):
    """Turns one look at the model into a raw score per component.

    A component without information (no gradient reached it) is left out of the result, never scored zero.
    """

    #: Name in configurations and records.
    name: ClassVar[str]
    #: Whether `Probe.update` / `Probe.initial` must be given.
    needs_update: ClassVar[bool] = False
    needs_initial: ClassVar[bool] = False

    @abstractmethod
    def measure(self, probe: Probe) -> dict[str, float]:
        """Scores of the probe's components. May run passes of its own; leaves no gradient behind."""

    def check(self, probe: Probe) -> None:
        """Raises ConfigError when the probe lacks what the signal needs."""
        if self.needs_update and probe.update is None:
            raise ConfigError(
                f"signal {self.name!r} scores the optimizer's step, and this probe knows none; give it an optimizer "
                "first, or choose a signal without steps, e.g. 'grad_norm'"
            )
        if self.needs_initial and probe.initial is None:
            raise ConfigError(f"signal {self.name!r} needs the initial weights, and this run does not keep them")


@dataclass(frozen=True, kw_only=True)
class PartGradient:
    """What a gradient signal sees of one slice: tensors of equal shape."""

    weight: Tensor
    gradient: Tensor
    update: Tensor | None = None
    initial: Tensor | None = None


class GradientSignal(Signal):
    """A signal that is a sum over elements of something local to weight and gradient.

    Subclasses give `partial`, summed over the component's slices, and `finish`. That form lets a probe stream: each
    gradient is scored as it is made and freed at once, and a training backward pass is scored at no extra cost.
    """

    @abstractmethod
    def partial(self, part: PartGradient) -> Tensor:
        """0-dim tensor of at least float32, summed over the component's slices."""

    def finish(self, total: float, component: Component) -> float:
        """The score from the sum of partials."""
        return total

    @property
    def sketchable(self) -> Literal["squared_norm", "decrease"] | None:
        """What `partial` is when a sketch can estimate it without the gradient: ‖g‖², −⟨g, Δθ⟩, or nothing of these."""
        return None

    def score(
        self, components: Iterable[Component], parts: Callable[[Component], Iterable[PartGradient]]
    ) -> dict[str, float]:
        """Scores from gradients that exist already; a component for which `parts` is empty is left out.

        Each part is scored before the next is asked for. One device synchronisation for all components together.
        """
        scored: list[Component] = []
        totals: list[Tensor] = []
        for component in components:
            partials = [self.partial(part) for part in parts(component)]
            if partials:
                scored.append(component)
                totals.append(torch.stack(partials).sum())
        if not totals:
            return {}
        values = torch.stack(totals).tolist()
        return {component.name: self.finish(value, component) for component, value in zip(scored, values, strict=True)}

    def measure(self, probe: Probe) -> dict[str, float]:
        totals = self.stream(probe)
        names = list(totals)
        if not names:
            return {}
        values = torch.stack([torch.stack(totals[name]).sum() for name in names]).tolist()
        return {name: self.finish(v, probe.partition[name]) for name, v in zip(names, values, strict=True)}

    def stream(self, probe: Probe) -> dict[str, list[Tensor]]:
        """One backward pass: partials of every slice that requires gradients and got one, by component name.

        Each gradient is freed as soon as it is scored, so that never more than a few exist at once.

        Raises:
            ConfigError: the signal needs steps or initial weights, and the probe has none.
        """
        self.check(probe)
        totals: dict[str, list[Tensor]] = {}
        handles = []
        for component in probe.partition:
            updates = probe.update(component.name) if probe.update and self.needs_update else None
            initials = probe.initial(component.name) if probe.initial and self.needs_initial else None
            if (self.needs_update and updates is None) or (self.needs_initial and initials is None):
                continue
            for index, parameter in enumerate(probe.parameters[component.name]):

                def score_and_free(
                    param: Tensor, name: str = component.name, index: int = index, updates: Parts | None = updates,
                    initials: Parts | None = initials,
                ) -> None:  # fmt: skip
                    gradient, param.grad = param.grad, None
                    if gradient is None:
                        return
                    part = PartGradient(
                        weight=param.detach(), gradient=gradient, update=updates[index] if updates else None,
                        initial=initials[index] if initials else None,
                    )  # fmt: skip
                    totals.setdefault(name, []).append(self.partial(part))

                if parameter.requires_grad:
                    handles.append(parameter.register_post_accumulate_grad_hook(score_and_free))
        try:
            probe.loss(probe.model, probe.batch).backward()
        finally:
            for handle in handles:
                handle.remove()
            for parameters in probe.parameters.values():
                for parameter in parameters:
                    parameter.grad = None
        return totals

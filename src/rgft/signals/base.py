"""The one protocol of all signals: a probe (or a training backward pass) in, one raw score per component out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
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

        Each part is scored before the next is asked for.
        """
        partials = {component.name: [self.partial(part) for part in parts(component)] for component in components}
        return self.finished(partials, components)

    def finished(self, partials: Mapping[str, Sequence[Tensor]], components: Iterable[Component]) -> dict[str, float]:
        """Scores from partials, by component name; one without any is left out.

        One device synchronisation for all components together.
        """
        scored = [component for component in components if partials.get(component.name)]
        if not scored:
            return {}
        values = torch.stack([torch.stack(list(partials[component.name])).sum() for component in scored]).tolist()
        return {component.name: self.finish(value, component) for component, value in zip(scored, values, strict=True)}

    def measure(self, probe: Probe) -> dict[str, float]:
        return self.finished(self.stream(probe), probe.partition)

    def stream(self, probe: Probe) -> dict[str, list[Tensor]]:
        """One backward pass: partials of every slice that requires gradients and got one, by component name.

        Each gradient is freed as soon as it is scored, so that never more than a few exist at once.

        Raises:
            ConfigError: the signal needs steps or initial weights, and the probe has none.
        """
        self.check(probe)
        totals: dict[str, list[Tensor]] = {}
        kept = {
            component.name: (
                probe.update(component.name) if probe.update and self.needs_update else None,
                probe.initial(component.name) if probe.initial and self.needs_initial else None,
            )
            for component in probe.partition
        }

        def score(component: Component, index: int, parameter: Tensor, gradient: Tensor) -> None:
            updates, initials = kept[component.name]
            if (self.needs_update and updates is None) or (self.needs_initial and initials is None):
                return
            part = PartGradient(
                weight=parameter.detach(), gradient=gradient, update=updates[index] if updates else None,
                initial=initials[index] if initials else None,
            )  # fmt: skip
            totals.setdefault(component.name, []).append(self.partial(part))

        stream_gradients(
            probe.partition, probe.parameters, lambda: probe.loss(probe.model, probe.batch).backward(), score
        )
        return totals


def stream_gradients(
    partition: Iterable[Component], parameters: Mapping[str, Parts], backward: Callable[[], object],
    use: Callable[[Component, int, Any, Tensor], None],
) -> None:  # fmt: skip
    """Runs a backward pass and hands over each gradient as it is made: never more than a few exist at once.

    Args:
        partition, parameters: components and their parameters; of those that require gradients.
        backward: the pass.
        use: called with component, index among its parameters, parameter and gradient, which is freed afterwards.
    """
    handles = []

    def register(component: Component, index: int, parameter: Tensor) -> None:
        def hand_over(made: Tensor) -> None:
            gradient, made.grad = made.grad, None
            if gradient is not None:
                use(component, index, made, gradient)

        handles.append(parameter.register_post_accumulate_grad_hook(hand_over))

    for component in partition:
        for index, parameter in enumerate(parameters[component.name]):
            if parameter.requires_grad:
                register(component, index, parameter)
    try:
        backward()
    finally:
        for handle in handles:
            handle.remove()
        for held in parameters.values():
            for parameter in held:
                parameter.grad = None

"""The decrease that an optimizer's steps cause, measured on gradients as they are made.

A measurement reads a sample of each weight's rows, others the next time, and keeps neither gradients nor steps of the
whole model: a backward pass hands over each gradient once, and what is kept of it is its share of a score and, where
another batch is to judge the step, the step of the sampled rows. Of a lookup table only the rows that a batch has read
are looked at; with the rest, over half the elements of a small encoder.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from rgft.blocks import Rows, RowSample, rows_with_gradient
from rgft.components import Component
from rgft.execution.binding import Binding
from rgft.execution.directions import Directions
from rgft.execution.split_module import SplitModule
from rgft.signals.base import GradientSignal, PartGradient, stream_gradients

#: Rows of a parameter, and the step that it makes there.
Piece = tuple[Rows, Tensor]


#: A parameter and its gradient → what is scored of them.
PartsOf = Callable[[nn.Parameter, Tensor], Iterator[PartGradient]]


@dataclass(frozen=True, kw_only=True)
class ReadRows:
    """Rows of a lookup table that a batch has read, in order, [n], and their gradients, [n, width]."""

    rows: Tensor
    gradients: Tensor

    @classmethod
    def of(cls, gradient: Tensor) -> Self:
        """From a sparse gradient."""
        gradient = gradient.coalesce()
        return cls(rows=gradient.indices()[0], gradients=gradient.values())

    def at(self, rows: Tensor) -> Tensor:
        """Gradients at other rows; of a row that was not read it is zero."""
        if not len(self.rows):
            return self.gradients.new_zeros(len(rows), *self.gradients.shape[1:])
        places = torch.searchsorted(self.rows, rows).clamp(max=len(self.rows) - 1)
        return self.gradients[places] * (self.rows[places] == rows).unsqueeze(1)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What a batch would make of the weights.

    Attributes:
        pieces: identity of a parameter → steps of its sampled rows.
        tables: identity of a lookup table → the rows that the batch has read. Their steps are worked out when another
            batch judges them, for its rows are what counts then.
        turn: which rows were sampled.
    """

    pieces: Mapping[int, list[Piece]]
    tables: Mapping[int, ReadRows]
    turn: int


class StepScores:
    """Scores of steps, of the components of a bound model.

    Args:
        model, binding: what is scored.
        directions: of the optimizer's steps.
        rates: identity of a parameter → its learning rate at multiplier 1.
        row_stride: one row in so many of each large weight is read.
    """

    def __init__(
        self, model: nn.Module, binding: Binding, directions: Directions, rates: Mapping[int, float], row_stride: int
    ) -> None:
        self._binding, self._directions, self._rates, self._row_stride = binding, directions, rates, row_stride
        self._tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        self._sparse = [table for table in _may_be_sparse(model, binding) if directions.is_rowwise(table.weight)]
        self._names = {id(p): f"{name}:{index}" for name, held in binding.held.items() for index, p in enumerate(held)}

    def keep_next(self, turns: Iterable[int]) -> None:
        """Before the optimizer's step: it will be scored, on the rows of these turns."""
        self._directions.keep_next(self._row_stride, tuple(turns))

    def take_seconds(self) -> float:
        """Time since the last call that keeping steps took."""
        seconds, self._directions.seconds = self._directions.seconds, 0.0
        return seconds

    def state_dict(self) -> dict[str, Any]:
        return self._directions.state_dict(self._names)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        held = {self._names[id(p)]: p for parameters in self._binding.held.values() for p in parameters}
        self._directions.load_state_dict(state, held)

    def detach(self) -> None:
        self._directions.detach()

    def last(self, component: Component, turn: int) -> Iterator[PartGradient]:
        """Parts of a component that pair its gradients with the step just made; none before its first step.

        Args:
            component: its gradients are those of a training batch.
            turn: which rows are read.
        """
        for parameter in self._binding.trained[component.name]:
            gradient = parameter.grad
            if gradient is None:
                continue
            sample = self._sample(turn)
            scale = self._scale(parameter) * sample.factor(gradient)
            is_table = id(parameter) in self._tables
            for rows in rows_with_gradient(gradient, sample) if is_table else sample.blocks(gradient):
                update = self._directions.last(parameter, scale, rows, stride=sample.factor(parameter))
                if update is None:
                    break
                yield PartGradient(weight=parameter.detach()[rows], gradient=gradient[rows], update=update)

    def make(self, backward: Callable[[], None], signal: GradientSignal, turn: int) -> tuple[Steps, dict[str, float]]:
        """The steps that a batch would make from the moments kept, and their scores on that batch.

        Args:
            backward: a backward pass on the batch. Its gradients are taken away.
            signal: of steps.
            turn: which rows are read.
        """
        pieces: dict[int, list[Piece]] = {}
        tables: dict[int, ReadRows] = {}

        def parts(parameter: nn.Parameter, gradient: Tensor) -> Iterator[PartGradient]:
            if gradient.is_sparse:
                tables[id(parameter)] = read = ReadRows.of(gradient)
                yield from self._of_table(parameter, read, read)
                return
            made = pieces[id(parameter)] = []
            for rows, update in self._would_make(parameter, gradient, turn):
                made.append((rows, update))
                yield PartGradient(weight=parameter.detach()[rows], gradient=gradient[rows], update=update)

        scores = self._scores(backward, signal, parts)
        return Steps(pieces=pieces, tables=tables, turn=turn), scores

    def judge(self, backward: Callable[[], None], signal: GradientSignal, steps: Steps) -> dict[str, float]:
        """Scores of steps on another batch.

        A parameter that got no gradient from the batch that made the steps makes the step of a gradient of zero.

        Args:
            backward: a backward pass on that other batch. Its gradients are taken away.
            signal: of steps.
            steps: what is judged.
        """

        def parts(parameter: nn.Parameter, gradient: Tensor) -> Iterator[PartGradient]:
            if gradient.is_sparse:
                yield from self._of_table(parameter, steps.tables.get(id(parameter)), ReadRows.of(gradient))
                return
            made = steps.pieces.get(id(parameter))
            for rows, update in self._would_make(parameter, None, steps.turn) if made is None else made:
                yield PartGradient(weight=parameter.detach()[rows], gradient=gradient[rows], update=update)

        return self._scores(backward, signal, parts)

    def _sample(self, turn: int) -> RowSample:
        return RowSample(stride=self._row_stride, turn=turn)

    def _scale(self, parameter: Tensor) -> float:
        """Δθ at reference learning rate is the direction times this."""
        return -self._rates.get(id(parameter), 1.0)

    def _would_make(self, parameter: nn.Parameter, gradient: Tensor | None, turn: int) -> Iterator[Piece]:
        """Steps of the sampled rows, so much larger as fewer are read; none of what the optimizer does not hold."""
        sample = self._sample(turn)
        scale = self._scale(parameter) * sample.factor(parameter)
        if not self._directions.is_rowwise(parameter):
            whole = self._directions.would_make(
                parameter, torch.zeros_like(parameter) if gradient is None else gradient
            )
            if whole is not None:
                yield from ((rows, whole[rows] * scale) for rows in sample.blocks(parameter))
            return
        for rows in sample.blocks(parameter):
            own = torch.zeros_like(parameter[rows]) if gradient is None else gradient[rows]
            update = self._directions.would_make(parameter, own, scale, rows)
            if update is None:
                return
            yield rows, update

    def _of_table(self, parameter: nn.Parameter, made: ReadRows | None, judged: ReadRows) -> Iterator[PartGradient]:
        """Steps of the rows that the judging batch has read, which the batch that makes them need not have."""
        own = torch.zeros_like(judged.gradients) if made is None else made.at(judged.rows)
        update = self._directions.would_make(parameter, own, self._scale(parameter), judged.rows)
        if update is not None:
            yield PartGradient(weight=parameter.detach()[judged.rows], gradient=judged.gradients, update=update)

    def _scores(self, backward: Callable[[], None], signal: GradientSignal, parts: PartsOf) -> dict[str, float]:
        partials: dict[str, list[Tensor]] = defaultdict(list)

        def score(component: Component, index: int, parameter: nn.Parameter, gradient: Tensor) -> None:
            partials[component.name] += [signal.partial(part) for part in parts(parameter, gradient)]

        with sparse_gradients(self._sparse):
            stream_gradients(self._binding.as_trained, self._binding.trained, backward, score)
        return signal.finished(partials, self._binding.as_trained)


def _may_be_sparse(model: nn.Module, binding: Binding) -> list[nn.Embedding]:
    """Tables whose rows alone can get gradients: those that are nothing else besides, and are trained themselves.

    An adapter looks its own tables up as the frozen one beside it is.
    """
    holders = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        and not isinstance(module, SplitModule)
        and not module.scale_grad_by_freq
        and holders[id(module.weight)] == 1
        and isinstance(module.weight, nn.Parameter)
        and binding.owner(module.weight) is not None
    ]


def _has_hooks(weight: Tensor) -> bool:
    """Whether somebody looks at its gradient, and may not expect a sparse one."""
    return bool(weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None))


@contextmanager
def sparse_gradients(tables: Iterable[nn.Embedding]) -> Iterator[None]:
    """Inside, these tables' gradients are sparse. A dense one is mostly zeros, and as large as the table."""
    kept = [
        (table, table.sparse) for table in tables if table.weight.device.type == "cpu" and not _has_hooks(table.weight)
    ]
    try:
        for table, _ in kept:
            table.sparse = True
        yield
    finally:
        for table, sparse in kept:
            table.sparse = sparse

"""Positions whose output the loss never reads, and which the last layer need not compute.

A classifier on top of a transformer reads one position ([CLS]). What the last layer computes for the others after its
attention (output projection, feed-forward block) has a residual of exactly zero: no forward result of it is used, and
all of its gradients vanish. While skipping is on, those modules see the one position that is read. Loss and gradients
are the same, but for the order of sums and, with dropout, for the random numbers drawn.

Nothing is assumed of the model. The first position must be all that is read, by the autograd graph: every path from
the loss to anything the last layer computes goes through a selection of it. A module is narrowed only if the gradient
of its output vanishes elsewhere and its output at the position depends on nothing else, and in the end loss and
gradients are compared with the plain ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rgft.components import Partition
from rgft.cost.batch_shape import BatchShape
from rgft.cost.graph import topological
from rgft.cost.nodes import Node, kind
from rgft.cost.undisturbed import undisturbed
from rgft.execution.agreement import Loss, all_close, is_close, loss_and_gradients
from rgft.nested import tensors_in

#: Rows of the batches looked at: one example would not show what is read from which.
ROWS = 2
#: Normalise over examples and positions in training mode, whatever they do in eval mode.
OVER_BATCH = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True, kw_only=True)
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class ReadPositions:
    """Skips what the last layer would compute for positions that the loss does not read.

    Args:
        model: changed by hooks until `detach`; they do nothing while `is_on` is false.
        paths: of the modules that work position by position, downstream of the last attention.
        position: the one that is read.

    Attributes:
        is_on: whether forwards in training mode, with gradients, skip.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], position: int) -> None:
        self.paths, self.position = tuple(paths), position
        self.is_on = self._is_forced = False
        self._lengths: dict[nn.Module, int] = {}
        modules = [model.get_submodule(path) for path in paths]
        self._handles = [m.register_forward_pre_hook(self._narrow, with_kwargs=True) for m in modules]
        self._handles += [m.register_forward_hook(self._widen) for m in modules]

    @classmethod
    def find(
        cls, model: nn.Module, partition: Partition, batch: Any, loss: Loss, *, has_one_length: bool = False
    ) -> ReadPositions | None:  # fmt: skip
        """What can be skipped on batches like `batch`; None where nothing can, or where that cannot be proved.

        Runs a few passes on two rows of it, and leaves the model as it was, but for the hooks.

        Args:
            model, partition, batch: of the run.
            loss: of its steps.
            has_one_length: whether the model takes batches of no other length.
        """
        if not partition.layers:
            return None
        shape = BatchShape.of(batch)
        small = replace(shape, rows=min(shape.rows, ROWS))
        lengths = {small}
        if shape.tokens and not has_one_length:
            lengths.add(small.scaled(max(1, small.unit // 2)))
        batches = [shape.resize(batch, length) for length in lengths]
        with undisturbed(model), torch.enable_grad():
            search = _Search(model, partition.layers[-1], loss)
            model.train()
            position = 0  # another one may be counted from an end that differs between batches
            if not all(search.is_all_that_is_read(position, small_batch) for small_batch in batches):
                return None
            candidates = set(search.paths)
            for small_batch in batches:
                candidates &= search.paths_read_at(position, small_batch)
            model.eval()
            for small_batch in batches:
                candidates &= search.paths_of_one_position(position, small_batch, candidates)
            paths = [path for path in search.paths if path in candidates and not _has_parent(path, candidates)]
            if not paths:
                return None
            found = cls(model, paths, position)
            if not all(search.is_unchanged(found, small_batch) for small_batch in batches):
                found.detach()
                return None
        return found

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Inside, all forwards skip."""
        before, self._is_forced = self._is_forced, True
        try:
            yield
        finally:
            self._is_forced = before

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _narrow(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._lengths.pop(module, None)
        # Between a step's passes users compute other things: those are in eval mode, or without gradients.
        is_on = self._is_forced or (self.is_on and module.training and torch.is_grad_enabled())
        length = _length(args, kwargs) if is_on else None
        if length is None or length <= self.position:
            return None
        self._lengths[module] = length
        return _at(self.position, args, kwargs)

    def _widen(self, module: nn.Module, args: Any, output_B1D: Tensor) -> Tensor | None:
        length = self._lengths.pop(module, None)
        if length is None:
            return None
        return nn.functional.pad(output_B1D, (0, 0, self.position, length - self.position - 1))


class _Search:
    """The passes from which `ReadPositions.find` concludes."""

    def __init__(self, model: nn.Module, layer: str, loss: Loss) -> None:
        self.model, self.layer, self.loss = model, layer, loss
        inside = model.get_submodule(layer).named_modules(prefix=layer)
        self.everything = [path for path, _ in inside]
        self.paths = [path for path in self.everything if _may_be_narrowed(model.get_submodule(path))]

    def is_all_that_is_read(self, position: int, batch: Any) -> bool:
        """Whether the loss depends on the last layer by that position of its output alone."""
        loss, calls = self._run(batch, self.everything)
        hidden_BTD = _hidden(calls[self.layer].output) if self.layer in calls else None
        if hidden_BTD is None or hidden_BTD.grad_fn is None or loss.grad_fn is None:
            return False
        computed = {tensor.grad_fn for call in calls.values() for tensor in tensors_in(call.output)}
        return _selections(loss.grad_fn, computed - {None}) == {position}

    def paths_read_at(self, position: int, batch: Any) -> set[str]:
        """Modules called once, on [B, T, …] alone, the gradient of whose output vanishes at all other positions.

        None, where the gradient of the layer's input vanishes there too: then the examples have nothing at other
        positions (padding), and zeros prove nothing. Nor does a gradient that vanishes everywhere (a LoRA pair's).
        """
        loss, calls = self._run(batch, sorted({self.layer, *self.paths}))
        fit = {path: calls[path] for path in self.paths if path in calls and _is_positional(calls[path])}
        layer = calls[self.layer]
        hidden_BTD = _hidden((*layer.args, *layer.kwargs.values()))
        if hidden_BTD is None or not hidden_BTD.requires_grad:
            return set()
        tensors = [hidden_BTD, *(call.output for call in fit.values())]
        mixed_BTD, *gradients = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
        if not bool(_without(position, mixed_BTD).any()):
            return set()
        return {
            path
            for path, gradient_BTD in zip(fit, gradients, strict=True)
            if bool(gradient_BTD.any()) and not bool(_without(position, gradient_BTD).any())
        }

    def paths_of_one_position(self, position: int, batch: Any, candidates: set[str]) -> set[str]:
        """Those whose output at the position is the same when they see nothing else."""
        found: set[str] = set()

        def compare(path: str, call: _Call) -> None:
            args, kwargs = _at(position, call.args, call.kwargs)
            with torch.no_grad():
                try:
                    alone_B1D = self.model.get_submodule(path).forward(*args, **kwargs)
                except (IndexError, RuntimeError, TypeError, ValueError):
                    return  # it needs the others
            whole_B1D = call.output[:, position : position + 1]
            if alone_B1D.shape == whole_B1D.shape and is_close(alone_B1D, whole_B1D):
                found.add(path)

        self._run(batch, sorted(candidates), then=compare)  # at once: in the precision that the loss computes in
        return found

    def is_unchanged(self, skipped: ReadPositions, batch: Any) -> bool:
        """Whether loss and gradients of the last layer are as without skipping."""
        parameters = list(self.model.get_submodule(self.layer).parameters())
        plain = loss_and_gradients(self.model, self.loss, batch, parameters)
        with skipped.skipping():
            narrowed = loss_and_gradients(self.model, self.loss, batch, parameters)
        return all_close(narrowed, plain)

    def _run(
        self, batch: Any, paths: Sequence[str], then: Callable[[str, _Call], None] | None = None
    ) -> tuple[Tensor, dict[str, _Call]]:  # fmt: skip
        """The loss, and the calls of those modules that were called exactly once; `then` is called after each."""
        calls: dict[str, list[_Call]] = {}
        is_inside = False

        def note(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                nonlocal is_inside
                if is_inside:  # called by `then`
                    return
                calls.setdefault(path, []).append(_Call(args=args, kwargs=kwargs, output=output))
                is_inside = True
                try:
                    if then is not None:
                        then(path, calls[path][-1])
                finally:
                    is_inside = False

            return hook

        handles = [self.model.get_submodule(path).register_forward_hook(note(path), with_kwargs=True) for path in paths]
        try:
            loss = self.loss(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return loss, {path: made[0] for path, made in calls.items() if len(made) == 1}


def _may_be_narrowed(module: nn.Module) -> bool:
    has_weights = any(parameter.dim() > 1 for parameter in module.parameters())
    return has_weights and not any(isinstance(inner, OVER_BATCH) for inner in module.modules())


def _selections(loss: Node, computed: Set[Node]) -> set[int] | None:
    """Indices by which dimension 1 is selected on the paths from the loss to `computed`; None if a path has none."""
    found: set[int] = set()
    seen: set[Node] = set()
    stack = [loss]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in computed:
            return None
        if kind(node) == "SelectBackward" and node._saved_dim == 1:
            if any(source in computed for source in topological(node)):
                found.add(int(node._saved_index))
        else:
            stack.extend(source for source, _ in node.next_functions if source is not None)
    return found


def _hidden(output: Any) -> Tensor | None:
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) and first.dim() == 3 else None


def _is_positional(call: _Call) -> bool:
    """Whether all tensors that go in and out are [B, T, …] of the same B and T."""
    tensors = [v for v in (*call.args, *call.kwargs.values(), call.output) if not isinstance(v, str | int | float)]
    tensors = [value for value in tensors if value is not None]
    if not all(isinstance(value, Tensor) and value.dim() == 3 for value in tensors):
        return False
    return call.output.requires_grad and len({tuple(value.shape[:2]) for value in tensors}) == 1


def _length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    return next((value.shape[1] for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _at(position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def cut(value: Any) -> Any:
        return value[:, position : position + 1] if isinstance(value, Tensor) else value

    return tuple(cut(value) for value in args), {name: cut(value) for name, value in kwargs.items()}


def _without(position: int, tensor_BTD: Tensor) -> Tensor:
    return torch.cat([tensor_BTD[:, :position], tensor_BTD[:, position + 1 :]], dim=1)


def _has_parent(path: str, paths: set[str]) -> bool:
    return any(path.startswith(f"{other}.") for other in paths)

"""Modules with split weights: the plain module's class, extended for as long as the binding lasts.

Whatever torch does to a module's parameters as wholes (cast, move, save, load, pickle) is done to the plain layout: the
fused parameters are put back under their names for the length of the call, and the views laid over the result. So
`state_dict` has exactly the plain module's keys, order and values, and loading goes through to the views.
"""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

from torch import Tensor, nn

from rgft.errors import AttachError, StorageError
from rgft.execution.assembled import assemble
from rgft.execution.convolution import Kernel
from rgft.execution.linear import DRAW, Layout, layout_of
from rgft.execution.split_weight import SplitWeight

#: Where a bound module keeps its `_Splits`; not an attribute that any module has.
_KEY = "_rgft_splits"


class _Splits:
    """Of one module: its class before, its split weights by attribute name, and the names of their views."""

    def __init__(
        self, plain: type[nn.Module], layout: Layout | Kernel | None, weights: dict[str, SplitWeight],
        views: dict[str, list[str]],
    ) -> None:  # fmt: skip
        self.plain = plain
        self.layout = layout
        self.weights = weights
        self.views = views
        self.in_plain_layout = False

    def problems(self) -> list[str]:
        return [problem for split in self.weights.values() for problem in split.problems()]


class SplitModule(nn.Module):
    """Mixed into the class of every module that owns a split weight."""

    @property
    def _splits(self) -> _Splits:
        return self.__dict__[_KEY]

    @contextmanager
    def _plain_layout(self, convert: Callable[[Tensor], Tensor] | None = None) -> Iterator[None]:
        """Inside, the fused parameters are registered in the place of the views; `convert` is for a cast or move."""
        splits = self._splits
        bound = self._parameters
        plain = plain_parameters(bound, splits.weights, splits.views)
        self.__dict__["_parameters"] = plain
        splits.in_plain_layout = True
        try:
            yield
        finally:
            splits.in_plain_layout = False
            self.__dict__["_parameters"] = {name: plain.get(name, value) for name, value in bound.items()}
            for name, split in splits.weights.items():
                fused = plain[name]
                assert fused is not None
                if convert is not None or fused is not split.fused or split.problems():
                    split.realias(fused, convert)

    def _refuse_stale(self, action: str) -> None:
        if problems := self._splits.problems():
            raise StorageError(
                f"{action} would lose what was trained: these views share no memory with their weight any more:\n  "
                + "\n  ".join(problems)
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if recurse:  # children first: a child's own splits are its own matter
            for child in self.children():
                child._apply(fn)
        self._refuse_stale("moving or casting the module")
        with self._plain_layout(convert=fn):
            return super()._apply(fn, recurse=False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._refuse_stale("saving the module")
        with self._plain_layout():
            super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, split in self._splits.weights.items():
            if split.is_laid_out_anew and not keep_vars:
                destination[prefix + name] = split.in_own_layout()  # formats such as safetensors take no other

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._plain_layout():
            super()._load_from_state_dict(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles the plain module, which loads where RGFT is not installed."""
        self._refuse_stale("pickling the module")
        splits = self._splits
        state = _state_of(self)
        del state[_KEY]
        plain = plain_parameters(self._parameters, splits.weights, splits.views)
        state["_parameters"] = plain | {name: split.to_pickle() for name, split in splits.weights.items()}
        # The standard library's own constructor: __newobj__ insists on the class that the object has now.
        return copyreg._reconstructor, (splits.plain, object, None), state  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with views of its own over a fused weight of its own."""
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(_state_of(self), memo))
        return twin

    def _replicate_for_data_parallel(self) -> Any:
        raise AttachError(
            "nn.DataParallel gives every replica tensors that are no views, so that slices would not be trained; use "
            "DistributedDataParallel (torchrun), or one device (CUDA_VISIBLE_DEVICES=0)"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        splits = self.__dict__.get(_KEY)
        if splits is not None and name in splits.weights and not splits.in_plain_layout:
            raise StorageError(
                f"{splits.weights[name].name!r} is split between components and cannot be replaced; "
                "detach RGFT first, or write into it in place (under torch.no_grad())"
            )
        super().__setattr__(name, value)


class _SlicedModule(SplitModule):
    """Of linear layers and convolutions whose weight is split: dW for active slices only."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The plain module's forward, bit for bit."""
        (x,) = (*args, *kwargs.values())
        splits = self._splits
        assert splits.layout is not None
        bias = splits.weights.get("bias") or self._parameters["bias"]
        return splits.layout.sliced(self, x, splits.weights["weight"], bias)


def _reading(name: str) -> property:
    """The class attribute that answers for a fused parameter's name."""

    def read(module: SplitModule) -> Tensor:
        splits = module._splits
        if splits.in_plain_layout:
            whole = module._parameters[name]
            assert whole is not None
            return whole
        return assemble(splits.weights[name])

    return property(read, doc=f"The whole {name}, with a graph to its active slices; split between components.")


@cache
def _bound_class(plain: type[nn.Module], names: tuple[str, ...], is_sliced: bool) -> type[nn.Module]:
    base = _SlicedModule if is_sliced else SplitModule
    namespace = {name: _reading(name) for name in names}
    about = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (base, plain), {**about, **namespace})


def install(module: nn.Module, weights: dict[str, SplitWeight], views: dict[str, list[str]]) -> None:
    """Makes `module` use split weights.

    Args:
        module: a plain module.
        weights: by the attribute they are registered under.
        views: for each, the names to register its views under, in the order of its ranges.
    """
    plain = type(module)
    layout = layout_of(module) if "weight" in weights else None
    if layout is not None and not layout.slices(weights["weight"].dim):
        layout = None
    parameters: dict[str, nn.Parameter | None] = {}
    for name, value in module._parameters.items():
        if name in weights:
            parameters.update(zip(views[name], weights[name].views, strict=True))
        else:
            parameters[name] = value
    module.__dict__["_parameters"] = parameters
    module.__dict__[_KEY] = _Splits(plain, layout, weights, views)
    module.__class__ = _bound_class(plain, tuple(weights), layout is not None)


def uninstall(module: SplitModule) -> None:
    """Gives the module its class and its parameters back: the same objects, with the trained values.

    Raises:
        AttachError: another tool has changed the module's class since, and must take its change back first.
    """
    splits = module._splits
    if type(module) is not _bound_class(splits.plain, tuple(splits.weights), splits.layout is not None):
        raise AttachError(
            f"cannot detach from a {type(module).__name__}: its class was changed after RGFT was attached (by "
            "parametrize, fully_shard, …); take that change back first"
        )
    module.__dict__["_parameters"] = plain_parameters(module._parameters, splits.weights, splits.views)
    del module.__dict__[_KEY]
    cast("nn.Module", module).__class__ = splits.plain


@contextmanager
def shown_plain(modules: Iterable[SplitModule]) -> Iterator[None]:
    """Inside, the modules are plain: their own class and whole parameters. The views come back unchanged."""
    shown = [(module, type(module), module.__dict__["_parameters"], module._splits) for module in modules]
    try:
        for module, _, parameters, splits in shown:
            module.__dict__["_parameters"] = plain_parameters(parameters, splits.weights, splits.views)
            cast("nn.Module", module).__class__ = splits.plain
        yield
    finally:
        for module, bound_class, parameters, _ in shown:
            cast("nn.Module", module).__class__ = bound_class
            module.__dict__["_parameters"] = parameters


def is_intact(module: SplitModule) -> bool:
    """Whether the views are still the parameters that the module shows."""
    splits = module._splits
    return all(
        module._parameters.get(view_name) is view
        for name, split in splits.weights.items()
        for view_name, view in zip(splits.views[name], split.views, strict=True)
    )


def _state_of(module: nn.Module) -> dict[str, Any]:
    """What a copy has of it: not what draws the rows of its dW, which is the guide's."""
    state = object.__reduce_ex__(module, 4)[2]
    assert isinstance(state, dict)
    return {key: value for key, value in state.items() if key != DRAW}


def plain_parameters(
    bound: Mapping[str, nn.Parameter | None], weights: Mapping[str, SplitWeight], views: Mapping[str, list[str]]
) -> dict[str, nn.Parameter | None]:
    """A module's parameters with each fused one in the place of its views."""
    first = {names[0]: name for name, names in views.items()}
    others = {view for names in views.values() for view in names[1:]}
    return {
        first.get(name, name): weights[first[name]].fused if name in first else value
        for name, value in bound.items()
        if name not in others
    }

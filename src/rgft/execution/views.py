"""View parameters: binding a partition to a live model.

A parameter that one component owns whole stays the model's own. One that is split between components is tiled by view
parameters, registered in its module under names that end in its own name (`head_3_weight`), so that rules by name treat
them as they treat the whole: an optimizer, clipping, decay groups and accumulation need to know nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from rgft.components import Component, ParameterSlice, Partition
from rgft.errors import AttachError, PartitionError, StorageError
from rgft.execution.binding import Binding
from rgft.execution.optimizers import check_optimizer
from rgft.execution.split_module import SplitModule, install, is_intact, shown_plain, uninstall
from rgft.execution.split_weight import SplitWeight

__all__ = ["bind", "check_optimizer"]


@dataclass(frozen=True, kw_only=True)
class _Share:
    """One slice of one component, and its place among the component's slices."""

    component: Component
    position: int
    part: ParameterSlice


def bind(model: nn.Module, partition: Partition) -> Binding:
    """Gives every slice of every component a parameter to train.

    The model computes what it did, to the last bit, with the same `state_dict`. Gradients that exist are dropped. Build
    optimizers afterwards. Deep copies of a bound model are bound too (to parameters of their own); pickles are plain.

    Args:
        model: a plain model; modified in place until `Binding.restore`.
        partition: of this model.

    Raises:
        AttachError: the model is bound already.
        PartitionError: the partition does not fit the model, or a module that cannot be split owns a split weight.
    """
    bound = [name for name, module in model.named_modules() if isinstance(module, SplitModule)]
    if bound:
        raise AttachError(f"RGFT is attached to this model already (e.g. at {bound[0]!r}); detach it first")
    live = dict(model.named_parameters())
    shares = _shares(partition, live)
    places = _places(model, {id(live[name]): name for name, found in shares.items() if _is_split(found)})
    splits = {name: _split(name, live[name], shares[name]) for name in places}
    view_names = {name: _view_names(name, places[name], shares[name]) for name in places}
    _refuse_unsuitable(places)

    by_module: dict[int, tuple[nn.Module, dict[str, str]]] = {}
    for name, owners in places.items():
        for _, module, attribute in owners:
            by_module.setdefault(id(module), (module, {}))[1][attribute] = name
    for module, names in by_module.values():
        install(module, {a: splits[n] for a, n in names.items()}, {a: view_names[n] for a, n in names.items()})
    for parameter in live.values():
        parameter.grad = None
    return _binding(model, partition, live, shares, places, splits, view_names, [m for m, _ in by_module.values()])


def _binding(
    model: nn.Module, partition: Partition, live: dict[str, nn.Parameter], shares: dict[str, list[_Share]],
    places: dict[str, list[tuple[str, nn.Module, str]]], splits: dict[str, SplitWeight],
    view_names: dict[str, list[str]], modules: list[nn.Module],
) -> Binding:  # fmt: skip
    slots: dict[str, dict[int, tuple[str, nn.Parameter]]] = {component.name: {} for component in partition}
    for name, found in shares.items():
        if name in splits:
            path = places[name][0][0]
            for share, view_name, view in zip(found, view_names[name], splits[name].views, strict=True):
                slots[share.component.name][share.position] = (f"{path}.{view_name}" if path else view_name, view)
        else:
            slots[found[0].component.name][found[0].position] = (name, live[name])

    def bound_modules() -> Iterator[SplitModule]:
        return (module for module in modules if isinstance(module, SplitModule))

    def problems() -> list[str]:
        found = [problem for split in splits.values() for problem in split.problems()]
        found += [
            f"a {type(m).__name__} shows other parameters than its views" for m in bound_modules() if not is_intact(m)
        ]
        return found

    def check() -> None:
        if found := problems():
            raise StorageError(
                "expected every view to share its weight's memory, so that training it trains the model; found:\n  "
                + "\n  ".join(found) + "\nmove, cast and load the model as a whole (model.to, load_state_dict), "
                "not parameter by parameter, or attach afterwards"
            )  # fmt: skip

    split_of = {id(view): split for split in splits.values() for view in split.views}

    def make_dense(parameters: Iterable[nn.Parameter]) -> None:
        for split in {id(s): s for p in parameters if (s := split_of.get(id(p))) is not None}.values():
            split.make_slices_dense()

    def restore() -> None:
        found = problems() if any(True for _ in bound_modules()) else []
        for module in list(bound_modules()):
            uninstall(module)
        split_of.clear()
        for split in splits.values():
            split.lay_back()
        if found:
            raise StorageError("detached, but these slices were trained apart from the model:\n  " + "\n  ".join(found))

    return Binding(
        partition=partition,
        parameters={c.name: tuple(slots[c.name][i][1] for i in range(len(c.slices))) for c in partition},
        names={c.name: tuple(slots[c.name][i][0] for i in range(len(c.slices))) for c in partition},
        restore=restore,
        check=check,
        plain=lambda: shown_plain(bound_modules()),
        make_dense=make_dense,
    )


def _shares(partition: Partition, live: dict[str, nn.Parameter]) -> dict[str, list[_Share]]:
    """Who owns what of each parameter, sorted by position in it."""
    shares: dict[str, list[_Share]] = defaultdict(list)
    problems: list[str] = []
    for component in partition:
        for position, part in enumerate(component.slices):
            parameter = live.get(part.parameter)
            if parameter is None:
                problems.append(f"{component.name} owns {part.parameter!r}, which the model does not have")
            elif tuple(parameter.shape) != part.shape:
                problems.append(f"{component.name}: {part.parameter!r} has shape {tuple(parameter.shape)}")
            else:
                shares[part.parameter].append(_Share(component=component, position=position, part=part))
    for name, found in shares.items():
        if len(found) > 1 and (any(s.part.is_whole for s in found) or len({s.part.dim for s in found}) > 1):
            owners = ", ".join(share.component.name for share in found)
            problems.append(f"{name!r} is owned whole and in slices, or sliced along several dimensions: {owners}")
        found.sort(key=lambda share: share.part.start)
    if problems:
        raise PartitionError("the partition does not fit the model:\n  " + "\n  ".join(problems))
    return shares


def _is_split(shares: list[_Share]) -> bool:
    """Whether the parameter needs views: a slice that covers all of it is the parameter itself."""
    part = shares[0].part
    return len(shares) > 1 or part.fraction < 1.0


def _split(name: str, fused: nn.Parameter, shares: list[_Share]) -> SplitWeight:
    dim = shares[0].part.dim
    assert dim is not None
    return SplitWeight(name, fused, dim, tuple((share.part.start, share.part.stop) for share in shares))


def _places(model: nn.Module, wanted: dict[int, str]) -> dict[str, list[tuple[str, nn.Module, str]]]:
    """Where each split parameter is registered, as (module path, module, attribute): several places when tied."""
    places: dict[str, list[tuple[str, nn.Module, str]]] = {name: [] for name in wanted.values()}
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in wanted:
                places[wanted[id(parameter)]].append((path, module, attribute))
    return places


def _view_names(name: str, places: list[tuple[str, nn.Module, str]], shares: list[_Share]) -> list[str]:
    """A name per view that no place has yet: `head_3_weight`; `head_3_part_1_weight` for a head's second slice."""
    ending = name.rpartition(".")[2]
    taken = {existing for _, module, _ in places for existing in dir(module)}
    counts: dict[str, int] = defaultdict(int)
    names: list[str] = []
    for share in shares:
        kind, index = share.component.kind, share.component.index
        stem = kind if index is None else f"{kind}_{index}"
        while True:
            candidate = f"{stem}_part_{counts[stem]}_{ending}" if counts[stem] else f"{stem}_{ending}"
            counts[stem] += 1
            if candidate not in taken:
                break
        taken.add(candidate)
        names.append(candidate)
    return names


def _refuse_unsuitable(places: dict[str, list[tuple[str, nn.Module, str]]]) -> None:
    """Modules that keep or compute their parameters elsewhere would go on using the whole weight, untrained."""
    problems: list[str] = []
    for name, owners in places.items():
        for path, module, _ in owners:
            if isinstance(module, ParametrizationList) or is_parametrized(module):
                reason = "is parametrized (torch.nn.utils.parametrize)"
            elif isinstance(module, nn.RNNBase):
                reason = "keeps references to its weights in a list of its own"
            elif getattr(module, "sparse", False) is True:
                reason = "has sparse gradients"
            else:
                continue
            problems.append(f"{name!r} is split, but {path or 'the model'!r} ({type(module).__name__}) {reason}")
    if problems:
        raise PartitionError(
            "these parameters cannot be trained in slices:\n  " + "\n  ".join(problems)
            + "\ngive each to one component as a whole, or remove the parametrization first"
        )  # fmt: skip

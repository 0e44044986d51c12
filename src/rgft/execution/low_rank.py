"""The two forms in which a component is trained: by dense weight gradients, or by low-rank pairs in their place.

Every candidate has its pairs from the start, so that an optimizer knows them; the plan says which form is in force. In
the low-rank form the dense weights are frozen, and a pair begins as nothing (B = 0): the model computes what it did.
When a component that is on becomes dense again, and when RGFT leaves the model, pairs are merged into their weights.
What is off keeps its form, its pairs and its weights, to the last bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from rgft.components import ParameterSlice, Partition
from rgft.cost import LowRankShapes
from rgft.execution.binding import Binding
from rgft.execution.pair_set import PairSet, Parameters, couples
from rgft.execution.pair_sites import PairSite
from rgft.execution.pairs import add_to


class LowRank(PairSet):
    """The forms of a bound model's components. Attaches to model and binding; `leave` takes everything back.

    The parameters of a candidate are three parts, which go on and off by themselves: its weights that have a pair, its
    pairs, and what else it owns. Any other component is one part, itself.

    Args:
        model, binding: what is trained.
        sites: component → where its pairs are (`find_sites`).
        rank: of the pairs.
        alpha: pairs count alpha / rank times.
        freezes_others: whether, in the low-rank form, what has no pair is not trained.
        seed: of A.

    Attributes:
        in_form: components in the low-rank form.
    """

    def __init__(
        self, model: nn.Module, binding: Binding, sites: Mapping[str, tuple[PairSite, ...]], *, rank: int, alpha: float,
        freezes_others: bool, seed: int,
    ) -> None:  # fmt: skip
        super().__init__(model, binding, sites, rank=rank, alpha=alpha, seed=seed)
        self.freezes_others = freezes_others
        self.in_form: frozenset[str] = frozenset()
        self._last: tuple[frozenset[str], frozenset[str]] | None = None  # what `take_forms` was asked for
        self._seen: Partition | None = None
        self._trained: dict[str, Parameters] = {}
        self._known: tuple[tuple[frozenset[str], frozenset[str]], frozenset[str]] | None = None
        binding.low_rank = self

    # ---------------------------------------------------------------- what a component consists of

    @cached_property
    def held(self) -> Mapping[str, Parameters]:
        """Component → all parameters that it may ever train."""
        return {c.name: (*parameters, *self.pairs.get(c.name, ())) for c, parameters in self._binding}

    def owner(self, pair: nn.Parameter) -> str | None:
        """Name of the component that one of the pairs belongs to, or None."""
        return self._owners.get(id(pair))

    @cached_property
    def _owners(self) -> Mapping[int, str]:
        return {id(pair): name for name, pairs in self.pairs.items() for pair in pairs}

    @cached_property
    def parts(self) -> Mapping[str, Parameters]:
        """Part → parameters. A candidate's own name stands for what of it has no pair."""
        parts: dict[str, Parameters] = {}
        for component, parameters in self._binding:
            name = component.name
            with_pair = {site.position for site in self.sites.get(name, ())}
            parts[name] = tuple(p for i, p in enumerate(parameters) if i not in with_pair)
            if with_pair:
                parts[self.weight_part(name)] = tuple(parameters[site.position] for site in self.sites[name])
                parts[self.pair_part(name)] = self.pairs[name]
        return parts

    def part_of(self, parameter: nn.Parameter) -> str | None:
        """Name of the part that a parameter belongs to, or None."""
        return self._parts_of.get(id(parameter))

    @cached_property
    def _parts_of(self) -> Mapping[int, str]:
        return {id(parameter): part for part, parameters in self.parts.items() for parameter in parameters}

    def parts_on(self, active: Collection[str]) -> frozenset[str]:
        """Parts that are trained while `active` is on, each in the form that it has."""
        key = (frozenset(active), self.in_form)
        if self._known is None or self._known[0] != key:
            self._known = (key, self._parts_on(active))
        return self._known[1]

    def _parts_on(self, active: Collection[str]) -> frozenset[str]:
        on: set[str] = set()
        for name in active:
            if name not in self.sites:
                on.add(name)
            elif name in self.in_form:
                on |= {self.pair_part(name)} if self.freezes_others else {name, self.pair_part(name)}
            else:
                on |= {name, self.weight_part(name)}
        return frozenset(on)

    @property
    def shapes(self) -> LowRankShapes:
        return replace(super().shapes, freezes_others=self.freezes_others)

    @property
    def trained(self) -> Mapping[str, Parameters]:
        """Component → what is trained of it in the form that it has, aligned with `as_trained`."""
        self._look()
        return self._trained

    @property
    def as_trained(self) -> Partition:
        """The partition with the slices that are trained in the forms that components have: pairs, as an adapter's."""
        self._look()
        assert self._seen is not None
        return self._seen

    def _look(self) -> None:
        if self._seen is not None:
            return
        components, trained = [], dict[str, Parameters]()
        for component, parameters in self._binding:
            name = component.name
            if name not in self.in_form:
                components.append(component)
                trained[name] = parameters
                continue
            with_pair = {site.position for site in self.sites[name]}
            others = [] if self.freezes_others else [i for i in range(len(parameters)) if i not in with_pair]
            slices = [component.slices[i] for i in others]
            slices += [
                ParameterSlice(parameter=own, shape=tuple(p.shape))
                for own, p in zip(self.names[name], self.pairs[name], strict=True)
            ]
            components.append(replace(component, slices=tuple(slices)))
            trained[name] = (*(parameters[i] for i in others), *self.pairs[name])
        self._seen = replace(self._binding.partition, components=tuple(components))
        self._trained = trained

    # ---------------------------------------------------------------- taking form

    def to_merge(self, wanted: Collection[str], active: Collection[str]) -> list[str]:
        """Components whose pairs `take_forms` would merge into their weights."""
        return [name for name in self.sites if name in self._running and name in active and name not in wanted]

    def take_forms(self, wanted: frozenset[str], active: frozenset[str]) -> None:
        """Gives what is on the form that a plan says. Cheap when nothing changes.

        Args:
            wanted: components that are to be in the low-rank form.
            active: components that are on in the next step.
        """
        if self._last == (wanted, active):
            return
        for name in self.to_merge(wanted, active):
            self._merge(name)
        on = [name for name in self.sites if name in active]
        paired = [name for name in on if name in wanted]
        for name in paired:
            self._run(name, True)
        self._set_forms(self.in_form.difference(on).union(paired))
        self._last = (wanted, active)

    def begin(self, wanted: frozenset[str]) -> None:
        """The forms at the beginning: nothing is trained yet."""
        self._set_forms(wanted.intersection(self.sites))
        on = self.parts_on(self._binding.partition.names)
        for part, parameters in self.parts.items():
            for parameter in parameters:
                parameter.requires_grad_(part in on)

    def be_trained(self, active: frozenset[str]) -> None:
        """The forms of a run that trains `active` by pairs and never trained anything else. For looking ahead."""
        self._set_forms(frozenset(self.sites))
        for name in self.sites:
            self._run(name, name in active)
        self._last = None

    def _set_forms(self, names: frozenset[str]) -> None:
        if names != self.in_form:
            self.in_form, self._seen = names, None

    @torch.no_grad()
    def _merge(self, name: str) -> None:
        for weight, delta in zip(self.parts[self.weight_part(name)], self.deltas(name, self.pairs[name]), strict=True):
            add_to(weight, delta)
        for _, b in couples(self.pairs[name]):
            b.zero_()
        self._run(name, False)

    @staticmethod
    def weight_part(name: str) -> str:
        """The part that a component's weights with a pair are."""
        return f"{name} (weights)"

    @staticmethod
    def pair_part(name: str) -> str:
        """The part that a component's pairs are."""
        return f"{name} (pairs)"

    # ---------------------------------------------------------------- for a while

    @contextmanager
    def all_computed(self) -> Iterator[None]:
        """Inside, pairs in the low-rank form are computed, whether ever trained or not, so that they have gradients."""
        idle = [place for name in self.in_form - self._running for place in self._places[name]]
        try:
            for holder, place in idle:
                holder.is_running[place] = True
            yield
        finally:
            for holder, place in idle:
                holder.is_running[place] = False

    # ---------------------------------------------------------------- saving and leaving

    def state_dict(self, *, values: bool) -> dict[str, Any]:
        """Forms; with `values` also pairs, and the weights beside those that run: a model's state has them merged."""
        state: dict[str, Any] = {"in_form": sorted(self.in_form), "running": sorted(self._running)}
        if values:
            state["pairs"] = {name: [p.detach().clone() for p in pairs] for name, pairs in self.pairs.items()}
            state["weights"] = {
                name: [p.detach().clone() for p in self.parts[self.weight_part(name)]] for name in sorted(self._running)
            }
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], *, values: bool) -> None:
        """Restores `state_dict`.

        Args:
            state: of these same pairs.
            values: whether weights and pairs are restored, too.
        """
        if values:
            for saved, live in (
                (state["pairs"], self.pairs),
                (state["weights"], {name: self.parts[self.weight_part(name)] for name in state["weights"]}),
            ):
                for name, tensors in saved.items():
                    for parameter, value in zip(live[name], tensors, strict=True):
                        parameter.copy_(value)
        self._set_forms(frozenset(state["in_form"]))
        running = set(state["running"])
        for name in self.sites:
            self._run(name, name in running)
        self._last = None

    def leave(self) -> None:
        """Merges all pairs into their weights and takes them from the model."""
        for name in sorted(self._running):
            self._merge(name)
        self.take_away()

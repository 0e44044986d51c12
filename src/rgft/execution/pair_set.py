"""The low-rank pairs of a bound model: attached to its modules, shown by component, computed or not, and taken away."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rgft.cost import LowRankShapes
from rgft.errors import AttachError
from rgft.execution.binding import Binding
from rgft.execution.pair_sites import PairSite
from rgft.execution.pairs import CHILD, LowRankPairs, attach

Parameters = tuple[nn.Parameter, ...]


class PairSet:
    """Pairs at given sites of a model.

    Args:
        model, binding: what is trained.
        sites: component → where its pairs are (`find_sites`).
        rank: of the pairs.
        alpha: pairs count alpha / rank times.
        seed: of A, which is drawn as PEFT draws it; from a generator of its own.
    """

    def __init__(
        self, model: nn.Module, binding: Binding, sites: Mapping[str, tuple[PairSite, ...]], *, rank: int, alpha: float,
        seed: int,
    ) -> None:  # fmt: skip
        self.model, self._binding, self.sites, self.rank = model, binding, sites, rank
        self._holders: dict[str, LowRankPairs] = {}  # by module
        self._places: dict[str, list[tuple[LowRankPairs, int]]] = {}  # by component, aligned with its sites
        self._handles: list[Any] = []
        self._running: set[str] = set()
        kinds = {c.name: c.kind if c.index is None else f"{c.kind}_{c.index}" for c in binding.partition}
        for name, found in sites.items():
            for site in found:
                self._attach(site, kinds[name], alpha / rank, seed)
        self._show_plain_without_pairs()

    def _attach(self, site: PairSite, kind: str, scale: float, seed: int) -> None:
        module = self.model.get_submodule(site.module)
        holder = self._holders.get(site.module)
        if holder is None:
            holder = self._holders[site.module] = LowRankPairs(site.layout, site.part.dim, scale)
            self._handles += attach(module, holder)
        weight = self._binding.parameters[site.component][site.position]
        count = sum(1 for known, _ in self._places.get(site.component, ()) if known is holder)
        stem = f"{kind}_part_{count}" if count else kind
        a, b = first_values(site, self.rank, weight, seed=seed)
        self._places.setdefault(site.component, []).append((holder, holder.add(stem, site.part, a, b)))

    def _show_plain_without_pairs(self) -> None:
        inner = self._binding.plain

        @contextmanager
        def plain() -> Iterator[None]:
            with self.hidden(), inner():
                yield

        self._binding.plain = plain

    @cached_property
    def pairs(self) -> Mapping[str, Parameters]:
        """Candidate → A, B, A, B, … of its sites."""
        return {
            name: tuple(p for holder, place in places for p in holder.pair(place))
            for name, places in self._places.items()
        }

    @cached_property
    def names(self) -> Mapping[str, tuple[str, ...]]:
        """Names of `pairs` as the model shows them."""
        return {
            name: tuple(
                f"{site.module}.{CHILD}.{own}"
                for site, (holder, place) in zip(self.sites[name], places, strict=True)
                for own in holder.names[place]
            )
            for name, places in self._places.items()
        }  # fmt: skip

    @property
    def shapes(self) -> LowRankShapes:
        """What the cost model must know of the pairs."""
        sizes: dict[str, list[tuple[str, int, int]]] = {}
        for name, sites in self.sites.items():
            for site in sites:
                sizes.setdefault(site.part.parameter, []).append((name, site.inputs, site.outputs))
        return LowRankShapes(sizes=sizes, rank=self.rank)

    @property
    def running(self) -> frozenset[str]:
        """Components whose pairs have been trained since they were last merged, and so are part of the model."""
        return frozenset(self._running)

    def _run(self, name: str, is_running: bool) -> None:
        for holder, place in self._places[name]:
            holder.is_running[place] = is_running
        (self._running.add if is_running else self._running.discard)(name)

    def deltas(self, name: str, pairs: Collection[Tensor]) -> list[Tensor]:
        """What pairs like a component's would add to each of its weights that has one."""
        return [
            holder.delta(a, b) for (holder, _), (a, b) in zip(self._places[name], couples(pairs), strict=True)
        ]  # fmt: skip

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Inside, the model has no pairs."""
        modules = [(self.model.get_submodule(path), holder) for path, holder in self._holders.items()]
        try:
            for module, _ in modules:
                del module._modules[CHILD]
            yield
        finally:
            for module, holder in modules:
                module._modules[CHILD] = holder

    @contextmanager
    def seeing_calls(self) -> Iterator[Callable[[], None]]:
        """Inside, calls of the modules with pairs are noted.

        Yields:
            A function that raises AttachError if some module was not called: one that reads the weight instead (a
            fused kernel) would never see its pair.
        """
        called: set[str] = set()
        handles = [
            self.model.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: called.add(path))
            for path in self._holders
        ]

        def check() -> None:
            if missed := [path for path in self._holders if path not in called]:
                raise AttachError(
                    f"low-rank pairs: {len(missed)} modules are never called, e.g. {missed[0]!r}. Their weights are "
                    "read by others (a fused kernel), or not used on this batch: pairs beside them would not be "
                    "trained. Leave these components out of update.low_rank.components"
                )

        try:
            yield check
        finally:
            for handle in handles:
                handle.remove()

    def take_away(self) -> None:
        """Takes all pairs from the model, as they are."""
        for handle in self._handles:
            handle.remove()
        for path in self._holders:
            del self.model.get_submodule(path)._modules[CHILD]
        self._handles.clear()
        self._holders.clear()


def first_values(site: PairSite, rank: int, weight: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """A [R, I], uniform within ±1/√I, and B [O, R], zero; in fp32 at least, where the weight is."""
    text = f"{seed}/{site.component}/{site.part.parameter}/{site.part.start}"
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))
    dtype = torch.promote_types(weight.dtype, torch.float32)
    a = torch.empty(rank, site.inputs)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    b = torch.zeros(site.outputs, rank, dtype=dtype, device=weight.device)
    return a.to(device=weight.device, dtype=dtype), b


def couples(pairs: Collection[Any]) -> Iterator[tuple[Any, Any]]:
    """A and B of each site."""
    ordered = iter(pairs)
    return zip(ordered, ordered, strict=True)

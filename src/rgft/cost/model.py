"""The cost model: FLOPs of a step as a function of what is active, the batch's shape and the cut.

A step is a list of operations in forward order. Each costs its forward product F and one product of F FLOPs per
operand whose gradient is needed: an operand with an active parameter upstream. A product into a weight is dW and is
scaled by the active share of that weight; every other is dX.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from rgft.cost.axes import Axes, Forms, by_axis, pairs_beside, pairs_in_dx
from rgft.cost.operations import Operation, evaluate
from rgft.errors import RGFTError

#: Key of `by_component` for the work of weights that belong to no component.
FROZEN = "(frozen)"

_MEMO_LIMIT = 4096

K = TypeVar("K")
V = TypeVar("V")


def _remember(memo: dict[K, V], key: K, value: V) -> V:
    """Keeps a value, and of too many none of the others."""
    if len(memo) >= _MEMO_LIMIT:
        memo.clear()
    memo[key] = value
    return value


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """FLOPs of one pass, by axis.

    Attributes:
        forward, dx, dw: by axis.
        head: what of them is made at targets alone, in models that know of such work.
        recomputed: forward work done again, by gradient checkpointing or, where nothing is dropped, in attention's
            fused kernel.
        pairs: what low-rank pairs cost beside the model's own weights, all axes together.
    """

    forward: float
    dx: float
    dw: float
    head: float = 0.0
    recomputed: float = 0.0
    pairs: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.dx + self.dw + self.recomputed + self.pairs


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """FLOPs of any plan on one model. Made by `trace_costs`.

    Attributes:
        names: components, in the partition's order.
        depths: their depths.
        training: operations of a training step.
        probing: operations in eval mode, as probes and cache filling run.
        dropless: operations of a training step in which nothing is dropped at random, where attention may be fused;
            empty: the same as with dropout, or never asked for.
        plain: where training steps skip work that no plan needs (`ReadPositions`), the costs without that.
        skips_to: depth of the last layer; plans with a cut above it, whose layers only fill caches, skip nothing.
        target_share: targets per position, where a step's own number is not told.
        recomputes_to: depth of the last layer where training steps compute the layers above the cut twice (gradient
            checkpointing); 0: they do not. An upper bound: what nothing in backward reads is not computed again.
        low_rank: components that are trained by pairs while they are on, where a step's own are not told.
        running: components whose pairs are part of the model, whether they are on or off.
        freezes_others: whether, of a component that is trained by pairs, nothing else is.
        drops: whether training steps are made with the model's dropout. Full fine-tuning always is.
        fixed_tokens: the one length of batches that the model takes; None: it takes others.
        sampled: share of the positions that weight gradients of training steps are made from, where that may be less.
    """

    names: tuple[str, ...]
    depths: tuple[int, ...]
    training: tuple[Operation, ...]
    probing: tuple[Operation, ...]
    dropless: tuple[Operation, ...] = ()
    plain: CostModel | None = None
    skips_to: int = 0
    target_share: float = 1.0
    recomputes_to: int = 0
    low_rank: frozenset[str] = frozenset()
    running: frozenset[str] = frozenset()
    freezes_others: bool = False
    drops: bool = True
    fixed_tokens: int | None = None
    sampled: float = 1.0
    _memo: dict[Any, tuple[Axes, Axes, Axes]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _steps: dict[Any, StepCost] = field(default_factory=dict, init=False, repr=False, compare=False)
    _full: dict[tuple[int, int], StepCost] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def _bits(self) -> Mapping[str, int]:
        return {name: 1 << index for index, name in enumerate(self.names)}

    def step_flops(
        self, active: Collection[str], *, rows: int, tokens: int, cached_below: int = 0, training: bool = True,
        targets: int | None = None, dx_into: int = 0, low_rank: frozenset[str] | None = None,
    ) -> StepCost:  # fmt: skip
        """FLOPs of one step on a batch of `rows` × `tokens`.

        Args:
            active: names of the components that are on.
            rows, tokens: shape of the batch, padding included; tokens are ignored by models without them.
            cached_below: a cut: layers of lower depth do not run, their result is read from the activation cache. What
                runs before the layers (a vision model's stem) still does.
            training: whether the step runs in training mode; False: in eval mode.
            targets: positions at which what is needed at targets alone is computed; None: their share in the run.
            dx_into: the plan's cut, where the gradient of the states there is computed, which no plan with that cut
                needs (the cache does once, to see whether padding is read); 0: it is not.
            low_rank: names of the components that are trained by pairs if they are on; None: as the model has it.

        Raises:
            RGFTError: a name is unknown, an active component lies below `cached_below`, or the model takes batches of
                another length alone.
        """
        on = active if isinstance(active, frozenset) else frozenset(active)
        plan = (on, cached_below, training, self.low_rank if low_rank is None else low_rank)
        step = (plan, rows, tokens, targets, dx_into)
        # A step asks for what the one before asked for, and more than once.
        return self._steps.get(step) or _remember(self._steps, step, self._step(*step))

    def _step(
        self, plan: tuple[frozenset[str], int, bool, frozenset[str]], rows: int, tokens: int, targets: int | None,
        dx_into: int,
    ) -> StepCost:  # fmt: skip
        self._check_length(tokens)
        parts = self._memo.get(plan) or _remember(self._memo, plan, self._plan(*plan))
        share = self.target_share if targets is None else targets / (rows * tokens)
        body, head = ([evaluate(axis, rows, tokens) for axis in axes] for axes in parts[:2])
        once = [evaluate(axis, 1, tokens) for axis in parts[2]]
        head = [share * flops for flops in head]
        forward, dx, dw, recomputed, pairs = (b + h + o for b, h, o in zip(body, head, once, strict=True))
        if dx_into:
            more = self._dx_into(dx_into, self._forms(plan[0], plan[-1]), rows, tokens, share)
            dx, pairs = dx + more[0], pairs + more[1]
        if self.dropless and not self.drops and plan[2]:
            again = max(0.0, dx - self._dropping._step(plan, rows, tokens, targets, dx_into).dx)
            dx, recomputed = dx - again, recomputed + again
        return StepCost(forward=forward, dx=dx, dw=dw, head=sum(head), recomputed=recomputed, pairs=pairs)

    def _dx_into(
        self, cut: int, forms: Forms, rows: int, tokens: int, target_share: float
    ) -> tuple[float, float]:  # fmt: skip
        """Of the weights, and of the pairs beside them."""
        products = [
            (evaluate(product.flops, rows, tokens) * (target_share if op.at_targets else 1.0), pairs_in_dx(op, forms))
            for op in self._of_steps if op.depth == cut and not op.once
            for product in op.products_for(forms.mask) if product.shares is None and not product.upstream & forms.mask
        ]  # fmt: skip
        return sum(flops for flops, _ in products), sum(flops * share for flops, share in products)

    def full_step(self, rows: int, tokens: int) -> StepCost:
        """FLOPs of a step of full fine-tuning: all components active, nothing cached, skipped or computed twice."""
        if (known := self._full.get((rows, tokens))) is not None:
            return known
        plan = (self._all, 0, True, frozenset[str]())
        step = self._dropping.without_skipping._step(plan, rows, tokens, rows * tokens, dx_into=0)
        return _remember(self._full, (rows, tokens), replace(step, recomputed=0.0))

    def _check_length(self, tokens: int) -> None:
        if self.fixed_tokens not in (None, tokens):
            raise RGFTError(
                f"the model's costs are known for batches of {self.fixed_tokens} tokens alone, since it failed on "
                f"others made from the first batch; found one of {tokens}: pad all batches to one length, or, if the "
                "model takes others, begin with a longer batch"
            )

    @property
    def without_skipping(self) -> CostModel:
        """The costs of steps that compute everything."""
        return self.plain or self

    @cached_property
    def _dropping(self) -> CostModel:
        """The costs of steps with dropout, and weight gradients of all positions, by which full fine-tuning is
        reckoned."""
        return self.with_dropout(True).with_sampling(1.0)

    @property
    def _of_steps(self) -> tuple[Operation, ...]:
        return self.training if self.drops else self.dropless or self.training

    def with_skipping(self, skipping: CostModel, *, last_layer: int) -> CostModel:
        """These costs, but for training steps that train the last layer or below: they cost what `skipping` says."""
        return replace(
            self, training=skipping.training, dropless=skipping.dropless, plain=self, skips_to=last_layer
        )  # fmt: skip

    def with_dropout(self, drops: bool) -> CostModel:
        """These costs, of training steps with the model's dropout or without."""
        if drops == self.drops:
            return self
        return replace(self, drops=drops, plain=self.plain and self.plain.with_dropout(drops))

    def with_sampling(self, share: float) -> CostModel:
        """These costs, with weight gradients from a share of the positions."""
        if share == self.sampled:
            return self
        return replace(self, sampled=share, plain=self.plain and self.plain.with_sampling(share))

    def with_recomputation(self, *, last_layer: int) -> CostModel:
        """These costs with gradient checkpointing of the layers."""
        plain = self.plain and replace(self.plain, recomputes_to=last_layer)
        return replace(self, plain=plain, recomputes_to=last_layer)

    def with_pairs(self, *, form: frozenset[str], running: frozenset[str]) -> CostModel:
        """These costs with `form` trained by pairs while on, and the pairs of `running` in the model."""
        if (form, running) == (self.low_rank, self.running):
            return self
        plain = self.plain and self.plain.with_pairs(form=form, running=running)
        return replace(self, plain=plain, low_rank=form, running=running)

    def forward_flops(
        self, rows: int, tokens: int, *, below: int | None = None, cached_below: int = 0
    ) -> float:  # fmt: skip
        """FLOPs of a forward pass in eval mode: all of it, or (filling a cache) what lies below a cut.

        Args:
            rows, tokens: of the batch.
            below: only layers of lower depth run.
            cached_below: a lower cut, where it is read from the cache.
        """
        self._check_length(tokens)
        operations = (
            op for op in self.probing
            if (below is None or op.depth < below) and (op.depth >= cached_below or op.depth == 0)
        )  # fmt: skip
        running = frozenset(index for index, name in enumerate(self.names) if name in self.running)
        return sum(op.evaluate(op.flops, rows, tokens) * (1.0 + pairs_beside(op, running)) for op in operations)

    def probe_flops(self, rows: int, tokens: int, weights: bool) -> float:
        """FLOPs of a probe: forward and backward to the bottom in eval mode, with or without (dense) dW."""
        cost = self.step_flops(self._all, rows=rows, tokens=tokens, training=False)
        return cost.total if weights else cost.total - cost.dw

    def by_component(self, rows: int, tokens: int) -> dict[str, StepCost]:
        """A full step's FLOPs attributed to components, for reports; the values add up to `full_step`.

        An operation's F and dX go to the owners of its weight by their share of it; an attention core goes to the
        attention (heads, block or layer) of its layer by size. Weights of no component appear under `FROZEN`.
        """
        everything = (1 << 2 * len(self.names)) - 1
        named = {name: [0.0, 0.0, 0.0] for name in (*self.names, FROZEN)}
        names = [*self.names, FROZEN]
        for op in self.without_skipping.training:
            dx = 0.0
            for product in op.products_for(everything):
                flops = op.evaluate(product.flops, rows, tokens)
                if product.shares is None:
                    dx += flops if product.upstream else 0.0
                    continue
                for index, share in product.shares:
                    named[names[index]][2] += share * flops
            rest = 1.0 - sum(share for _, share in op.owners)
            forward = op.evaluate(op.flops, rows, tokens)
            for index, share in (*op.owners, (-1, rest)):
                if share:
                    named[names[index]][0] += share * forward
                    named[names[index]][1] += share * dx
        if not any(named[FROZEN]):
            del named[FROZEN]
        return {name: StepCost(forward=f, dx=dx, dw=dw) for name, (f, dx, dw) in named.items()}

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of plain values, fit for JSON."""
        return {
            "names": list(self.names), "depths": list(self.depths),
            "training": [asdict(op) for op in self.training], "probing": [asdict(op) for op in self.probing],
            "dropless": [asdict(op) for op in self.dropless], "drops": self.drops,
            "plain": None if self.plain is None else self.plain.to_dict(), "skips_to": self.skips_to,
            "target_share": self.target_share,
            "recomputes_to": self.recomputes_to, "low_rank": sorted(self.low_rank), "running": sorted(self.running),
            "freezes_others": self.freezes_others, "fixed_tokens": self.fixed_tokens, "sampled": self.sampled,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CostModel:
        return cls(
            names=tuple(data["names"]), depths=tuple(data["depths"]),
            training=tuple(Operation.from_dict(op) for op in data["training"]),
            probing=tuple(Operation.from_dict(op) for op in data["probing"]),
            dropless=tuple(Operation.from_dict(op) for op in data.get("dropless", ())), drops=data.get("drops", True),
            plain=None if data["plain"] is None else cls.from_dict(data["plain"]), skips_to=data["skips_to"],
            target_share=data["target_share"],
            recomputes_to=data["recomputes_to"], low_rank=frozenset(data.get("low_rank", ())),
            running=frozenset(data.get("running", ())), freezes_others=data.get("freezes_others", False),
            fixed_tokens=data.get("fixed_tokens"), sampled=data.get("sampled", 1.0),
        )  # fmt: skip

    @cached_property
    def _all(self) -> frozenset[str]:
        return frozenset(self.names)

    def _plan(
        self, active: frozenset[str], cached_below: int, training: bool, low_rank: frozenset[str]
    ) -> tuple[Axes, Axes, Axes]:
        """What is computed at all positions, at targets alone, and once a pass."""
        unknown = sorted(active - self._all)
        if unknown:
            raise RGFTError(f"the cost model knows no component named {', '.join(map(repr, unknown))}")
        below = [name for name, depth in zip(self.names, self.depths, strict=True) if depth < cached_below]
        wrong = [name for name in below if name in active]
        if wrong:
            raise RGFTError(
                f"expected every component below the cached cut {cached_below} to be off; found active: "
                f"{', '.join(wrong)}; lower cached_below or turn them off"
            )
        if self.plain is not None and all(self.depths[self.names.index(name)] > self.skips_to for name in active):
            return self.plain._plan(active, cached_below, training, low_rank)
        forms = replace(self._forms(active, low_rank), positions=self.sampled if training else 1.0)
        operations = self._of_steps if training else self.probing
        lowest = min((depth for depth, is_on in zip(self.depths, forms.on, strict=True) if is_on), default=0)
        twice = range(max(1, lowest), self.recomputes_to + 1 if training and active else 0)
        once = [op for op in operations if op.once]
        body, head = ([op for op in operations if op.at_targets is at and not op.once] for at in (False, True))
        body, head, once = (by_axis(some, forms, cached_below, twice) for some in (body, head, once))
        return body, head, once

    def _forms(self, active: frozenset[str], low_rank: frozenset[str]) -> Forms:
        paired, mask = active & low_rank, sum(self._bits[name] for name in active)
        # Bits of what is frozen in the low-rank form (`graph.WeightInfo.mask`).
        mask |= sum(self._bits[name] for name in active - paired) << len(self.names)
        return Forms(
            mask=mask, on=tuple(name in active for name in self.names), freezes_others=self.freezes_others,
            paired=frozenset(i for i, name in enumerate(self.names) if name in paired),
            carried=frozenset(i for i, name in enumerate(self.names) if name in self.running - active),
        )  # fmt: skip

"""The executor: puts plans into force on a bound model and its optimizer, and takes everything back.

It holds the four ways of acting together: what requires gradients (`Switch`), learning-rate multipliers, optimizer
moments, and the activation cache of the frozen prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from rgft.cost import CostModel
from rgft.errors import AttachError
from rgft.execution.activation_cache import ActivationCache
from rgft.execution.binding import Binding
from rgft.execution.fused_kernels import FusedKernels
from rgft.execution.gradient_norms import GradientNorms, StepNorms
from rgft.execution.moments import MomentMode, Moments
from rgft.execution.multipliers import Multipliers
from rgft.execution.read_positions import ReadPositions
from rgft.execution.sampled_rows import SampledRows
from rgft.execution.schedule_free import MeanOfIterates
from rgft.execution.switching import Switch
from rgft.execution.views import check_optimizer
from rgft.optimizer.products import product_flops
from rgft.plan import UpdatePlan


class Executor:
    """Acts on a model.

    Args:
        model, binding: the model and its components' live parameters.
        moments: what happens to the optimizer state of a component that is off.
        cache: an activation cache to use, or None.
    """

    def __init__(
        self, model: nn.Module, binding: Binding, *, moments: MomentMode = "keep", cache: ActivationCache | None = None
    ) -> None:
        self._model = model
        self._binding = binding
        self._mode: MomentMode = moments
        self._switch = Switch(model, binding)
        self._norms = GradientNorms(binding)
        self._multipliers: Multipliers | None = None
        self._multiplied: UpdatePlan | None = None  # whose multipliers are set
        self._moments: Moments | None = None
        self._kernels: FusedKernels | None = None
        self.mean: MeanOfIterates | None = None
        self.optimizer: Optimizer | None = None
        self.cache = cache
        self.positions: ReadPositions | None = None
        self.sampled: SampledRows | None = None
        self._on: frozenset[str] = frozenset()  # parts, in the last step, also when that was before a resume

    @property
    def active(self) -> frozenset[str]:
        """Names of the components that are on in this step."""
        return self._switch.active

    @property
    def parts(self) -> frozenset[str]:
        """The parts of the binding that are on in this step."""
        return self._binding.parts_on(self._switch.active)

    @property
    def trained_sizes(self) -> dict[str, int]:
        """Number of elements that this step updates, by component."""
        active = self._switch.active
        return {c.name: c.numel for c in self._binding.as_trained if c.name in active}

    def to_merge(self, plan: UpdatePlan, step: int) -> list[str]:
        """Components whose low-rank pairs `apply` would merge into their weights."""
        low_rank = self._binding.low_rank
        return [] if low_rank is None else low_rank.to_merge(plan.pairs, plan.active_set(step))

    def with_pairs(self, costs: CostModel) -> CostModel:
        """The costs of steps on the model with the low-rank pairs that it has now."""
        low_rank = self._binding.low_rank
        return costs if low_rank is None else costs.with_pairs(form=low_rank.in_form, running=low_rank.running)

    def set_optimizer(self, optimizer: Optimizer) -> None:
        """Attaches to the optimizer.

        Raises:
            OptimizerError: it cannot work on this granularity.
            AttachError: it lacks parameters of some component, or another optimizer is attached.
        """
        if self.optimizer is not None:
            raise AttachError("this guide has another optimizer; one guide works with one optimizer")
        check_optimizer(optimizer, self._binding)
        self._refuse_missing(optimizer)
        self.optimizer = optimizer
        self._multipliers = Multipliers(optimizer, self._binding)
        self._moments = Moments(optimizer, self._binding, self._mode)
        self._kernels = FusedKernels(optimizer, self._binding)
        self.mean = MeanOfIterates.of(optimizer, self._is_on)

    def _refuse_missing(self, optimizer: Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = {
            name: lacking for name, parameters in self._binding.held.items()
            if (lacking := [p for p in parameters if id(p) not in held])
        }  # fmt: skip
        if not missing:
            return
        low_rank, lacking = self._binding.low_rank, chain.from_iterable(missing.values())
        what, remedy = "parameters", ""
        if low_rank is not None and all(low_rank.owner(p) for p in lacking):
            what, remedy = "the low-rank pairs", ", or train dense weights (update.low_rank: null)"
        raise AttachError(
            f"the optimizer lacks {what} of {len(missing)} components, first {next(iter(missing))!r}: they would get "
            f"gradients and never a step. Build it from guide.param_groups(lr=…), after making the guide{remedy}"
        )

    def _is_on(self, parameter: nn.Parameter) -> bool:
        """Whether the plan in force updates a parameter, if not at every step."""
        plan = self._switch.plan
        return plan is None or self._binding.part_of(parameter) in self._binding.parts_on(plan.active())

    def optimizer_flops(self) -> dict[str, float]:
        """FLOPs of products in the optimizer's own step, by component; none without any."""
        by_parameter = {} if self.optimizer is None else product_flops(self.optimizer)
        by_component = {c.name: sum(by_parameter.get(id(p), 0.0) for p in held) for c, held in self._binding}
        return {name: flops for name, flops in by_component.items() if flops}

    def apply(self, plan: UpdatePlan, step: int) -> None:
        """Puts the plan into force for `step`."""
        before = self._on
        low_rank = self._binding.low_rank
        if low_rank is not None:
            if self.mean is not None:
                for name in self.to_merge(plan, step):
                    self.mean.before_merge(low_rank, name)
            low_rank.take_forms(plan.pairs, plan.active_set(step))
        self._switch.apply(plan, step)
        self._on = active = self.parts
        if self._multipliers is not None and plan is not self._multiplied:
            self._multipliers.set(plan.multipliers)
            self._multiplied = plan
        if self._moments is not None and before and before is not active and before != active:
            self._moments.switch(turned_off=before - active, turned_on=active - before, step=step)
        if self.cache is not None:
            self.cache.set_cut(plan.cut)

    def fill_cache(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], ids: Sequence[int] | None, tokens: int | None
    ) -> dict[int, int]:  # fmt: skip
        """Computes the prefix of the rows that the cache lacks, where it knows others.

        Returns:
            How many rows were computed, by the cut that they were computed from.
        """
        if self.cache is None or ids is None:
            return {}
        self.cache.identify(ids, args, kwargs, tokens)
        rows = self.cache.rows_by_level(ids, kwargs.get("attention_mask"), tokens)
        if len(rows) < 2:  # all are read, or all are computed by the pass itself
            return {}
        lacking = {level: some for level, some in rows.items() if level < self.cache.cut}
        for some in lacking.values():
            self.cache.fill(self._model, args, kwargs, ids, some, tokens)
        return {level: len(some) for level, some in lacking.items()}

    def begin_forward(
        self, ids: Sequence[int] | None, attention_mask: Tensor | None, tokens: int | None
    ) -> int:  # fmt: skip
        """Announces a training forward; returns the cut below which it is read from the cache, 0 for none."""
        return 0 if self.cache is None else self.cache.begin(ids, attention_mask, tokens)

    def read_ahead(self, ids: Sequence[int], tokens: int | None) -> None:
        """Begins to read what a cache on disk has of the examples that come next."""
        if self.cache is not None and ids:
            self.cache.read_ahead(ids, tokens)

    @property
    def proves_padding(self) -> bool:
        """Whether the pass that was announced computes the gradient of the states at the cut, too."""
        return self.cache is not None and self.cache.proves_padding

    def skip_positions(self, skips: bool) -> None:
        """Whether forwards from here on skip positions that the loss does not read, where that is possible.

        Not taken back before the step ends: gradient checkpointing runs the forward again in the backward pass.
        """
        if self.positions is not None:
            self.positions.is_on = skips

    def sample_rows(self, step: int, number: int) -> None:
        """Weight gradients of a pass, the one of this number in its step, are made from a sample, if that is set."""
        if self.sampled is not None:
            self.sampled.is_on = True
            self.sampled.begin_pass(step, number)

    def use_all_rows(self) -> None:
        """Weight gradients of forwards from here on are made from all positions."""
        if self.sampled is not None:
            self.sampled.is_on = False

    def end_forward(self) -> None:
        if self.cache is not None:
            self.cache.end()

    def gradient_norms(self) -> StepNorms | None:
        """‖∇_{θ_k} L‖ of every active component with a gradient; None: none has one."""
        return self._norms.of(self.parts)

    def state_dict(self, *, cache: bool = True, weights: bool = True) -> dict[str, Any]:
        """What `load_state_dict` restores, with what the activation cache holds or without.

        Args:
            cache: whether what the activation cache holds is part of it.
            weights: whether low-rank pairs, and the weights beside them, are.
        """
        low_rank = self._binding.low_rank
        return {
            "on": sorted(self._on),
            "moments": self._moments.state_dict() if self._moments else {},
            "cache": self.cache.state_dict() if self.cache is not None and cache else None,
            "low_rank": None if low_rank is None else low_rank.state_dict(values=weights),
        }

    def load_state_dict(self, state: dict[str, Any], *, weights: bool = True) -> None:
        """Restores `state_dict`, after `set_optimizer`.

        Args:
            state: to go to.
            weights: whether low-rank pairs, and the weights beside them, are restored; else the caller does it.

        Raises:
            AttachError: no optimizer is known yet, so that its moments could not be looked after.
        """
        if self._moments is None and state["on"]:
            raise AttachError("call guide.set_optimizer(optimizer) first: the saved state is about its moments too")
        self._on = frozenset(state["on"])
        if self._binding.low_rank is not None:
            self._binding.low_rank.load_state_dict(state["low_rank"], values=weights)
        if self._moments is not None:
            self._moments.load_state_dict(state["moments"])
        if self.cache is not None and state["cache"] is not None:
            self.cache.load_state_dict(state["cache"])

    def detach(self) -> None:
        """Takes hooks, wrappers and views back; the trained weights stay."""
        if self._multipliers is not None:
            self._multipliers.detach()
        if self._kernels is not None:
            self._kernels.detach()
        if self.mean is not None:
            self.mean.detach()
        if self.cache is not None:
            self.cache.detach()
        if self.positions is not None:
            self.positions.detach()
        if self.sampled is not None:
            self.sampled.detach()
        self._switch.detach()
        if self._binding.low_rank is not None:
            self._binding.low_rank.leave()
        self._binding.restore()

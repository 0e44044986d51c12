"""A guided run: its parts, put together around a model; all that is known of it; and leaving the model again."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from rgft.allocation.base import Situation
from rgft.allocation.selection import matching
from rgft.assembly import attach_pairs, build_cache, build_policy, build_signal, find_pair_sites
from rgft.config import Config, checked
from rgft.cost import CostModel
from rgft.cost.loss import model_loss
from rgft.deciding import Decisions
from rgft.error_map import ErrorMap
from rgft.errors import AttachError
from rgft.execution.activation_cache import ActivationCache
from rgft.execution.averaging import IterateAverage
from rgft.execution.dropout import Dropout
from rgft.execution.executor import Executor
from rgft.execution.target_positions import TargetLoss
from rgft.execution.views import bind
from rgft.measurement import Measurement
from rgft.memory import MemoryKeeper
from rgft.model_defaults import spelled_out
from rgft.partition import partition
from rgft.plan import RunPlan, UpdatePlan
from rgft.prober import Prober
from rgft.progress import Progress
from rgft.pruning import ExamplePruning, TokenPruning
from rgft.readout import Reader, Readout
from rgft.spending import Spending
from rgft.step import Step
from rgft.telemetry.ledger import Ledger
from rgft.training_loss import Loss, TrainingLoss
from rgft.weighted_loss import WeightedLoss


class GuidedRun:
    """What a guide consists of and what it shows; `Guide` is what moves it.

    Args:
        model, config, loss, loss_at_targets: see `Guide`.
    """

    def __init__(
        self, model: nn.Module, config: Config | None, *, loss: Loss | None, loss_at_targets: TargetLoss | None
    ) -> None:
        if getattr(model, "_rgft_guide", None) is not None:
            raise AttachError("this model has a guide already; call its detach() before attaching another")
        if not any(p.requires_grad for p in model.parameters()):
            raise AttachError("no parameter of the model requires gradients, so there is nothing to fine-tune")
        self.model = model
        config = checked(config).resolved()
        self._loss = TrainingLoss(loss or model_loss, loss_at_targets)
        self.partition = partition(model, config.granularity, ffn_blocks=config.ffn_blocks)
        self.config = spelled_out(config, model, self.partition)
        matching(self.partition, self.config.stability.always_on, setting="stability.always_on")
        self._refuse_mean(loss)
        policy, signal = build_policy(self.config), build_signal(self.config)
        sites = find_pair_sites(self.config, model, self.partition, signal)
        cache = build_cache(self.config, model, self.partition)
        # Whatever may be refused was refused above, while the model was still as it came.
        self._binding = bind(model, self.partition)
        low_rank = attach_pairs(self.config, model, self._binding, sites)
        self._executor = Executor(model, self._binding, moments=self.config.update.moments, cache=cache)
        if low_rank is not None:
            low_rank.begin(frozenset(sites))
        settings = self.config.error_map
        self._measurement = signal and Measurement(
            model, self._binding, signal, self._loss.mean, beta=settings.beta, bias_correction=settings.bias_correction,
            row_stride=self.config.probe.row_stride,
        )  # fmt: skip
        self._memory = MemoryKeeper.of(model, self._binding, self.config, policy, signal)
        self._average = IterateAverage(self._binding, model.buffers())
        self._dropout = Dropout(model)
        self._spending = Spending(self.config.budget, cache)
        self._progress = Progress(self._spending)
        self._weighted = self._build_weighted_loss()
        self._prober = Prober(self._measurement, self.config.probe, self._spending)
        self._reader = Reader(model, self._binding, self._loss.mean, self._spending)
        self._decisions = Decisions(
            self.config, self.partition, policy, self._measurement, self._prober, self._memory, self._progress,
            self._spending, low_rank=tuple(sites),
        )  # fmt: skip
        self._step = Step(
            model, self.partition, self._executor, self._average, self._loss, self._progress, self._spending,
            average_last=self.config.update.average_last, weighted=self._weighted,
        )  # fmt: skip
        model.__dict__["_rgft_guide"] = self

    def _refuse_mean(self, loss: Loss | None) -> None:
        settings = self.config.examples
        if loss is None and (settings.prune > 0.0 or settings.tokens > 0.0):
            raise AttachError(
                "examples.prune, examples.tokens: expected a loss of each example, found the model's own .loss, a "
                "mean in which examples cannot be told apart. Give Guide a loss(model, batch) that returns one loss "
                "for each row, or set them to 0; everything else works without"
            )

    def _build_weighted_loss(self) -> WeightedLoss | None:
        """The loss where well-learnt examples or tokens are skipped; None: none are."""
        settings = self.config.examples
        if settings.prune == settings.tokens == 0.0:
            return None
        common = {
            "threshold": settings.threshold, "off_for_last": settings.off_for_last, "seed": self.config.seed,
            "progress": lambda: self._progress.share,
        }  # fmt: skip
        examples = ExamplePruning(probability=settings.prune, **common) if settings.prune else None
        tokens = (
            TokenPruning(probability=settings.tokens, select=settings.select, **common) if settings.tokens else None
        )
        return WeightedLoss(self._loss, self._progress, self._spending, examples=examples, tokens=tokens)

    # ---------------------------------------------------------------- what is known

    @property
    def plan(self) -> UpdatePlan:
        """The update plan in force."""
        return self._decisions.plan

    @property
    def plans(self) -> list[UpdatePlan]:
        """All plans that acted differently, in order."""
        return self._decisions.plans

    @property
    def is_measuring(self) -> bool:
        """Whether everything is still on, to be scored."""
        return self._decisions.is_measuring

    @property
    def run_plan(self) -> RunPlan | None:
        """What is fixed for the run; None before `prepare`."""
        return self._progress.run_plan

    @property
    def step_count(self) -> int:
        """Steps made so far."""
        return self._progress.step

    @property
    def error_map(self) -> ErrorMap:
        """The map that the next decision is made from."""
        return self._decisions.error_map

    @property
    def readout(self) -> Readout | None:
        """What a linear readout of each layer left unexplained before the first step; None: nothing was read."""
        return self._decisions.readout

    def situation(self) -> Situation:
        """All that the next decision depends on."""
        return self._decisions.situation()

    @property
    def active(self) -> frozenset[str]:
        """Names of the components that are on in this step."""
        return self._executor.active

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer attached to, if any yet."""
        return self._executor.optimizer

    @property
    def trained_parameters(self) -> list[nn.Parameter]:
        """Parameters of the components that the plan in force updates, if not at every step."""
        return [p for name in self.plan.active() for p in self._binding.trained[name]]

    @property
    def budget_spent(self) -> float:
        """What was spent so far, as a share of the budget; 0 without one."""
        return self._spending.share_spent

    @property
    def flops_fraction(self) -> float:
        """What was spent so far, as a share of full fine-tuning's FLOPs."""
        return self._spending.fraction

    def summary(self) -> dict[str, Any]:
        """The ledger against full fine-tuning of the same run."""
        return self.ledger.summary(self.run_plan.full_flops if self.run_plan else None)

    @property
    def costs(self) -> CostModel | None:
        """FLOPs of any plan on this model, once `prepare` has traced them."""
        return self._spending.costs

    @property
    def ledger(self) -> Ledger:
        """All that was spent."""
        return self._spending.ledger

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step: one is begun only if the budget pays for all of them, and then ended."""
        return self._spending.accumulation

    @accumulation.setter
    def accumulation(self, value: int) -> None:
        self._spending.accumulation = value

    @property
    def map_history(self) -> list[tuple[int, dict[str, float]]]:
        """Step and scores at each probe."""
        return self._prober.history

    @property
    def weighted_loss(self) -> WeightedLoss | None:
        """The loss of training passes where well-learnt examples or tokens are skipped; None: none are."""
        return self._weighted

    @property
    def skipping_history(self) -> list[dict[str, Any]]:
        """What was taken for well learnt in each epoch, where well-learnt examples or tokens are skipped."""
        return [] if self._weighted is None else self._weighted.history

    @property
    def is_averaging(self) -> bool:
        """Whether means of the weights are kept by now."""
        return self._average.count > 0

    def kept_tensors(self) -> list[Tensor]:
        """All that exists between steps: weights, buffers, optimizer state, means."""
        optimizer = self._executor.optimizer
        state = optimizer.state.values() if optimizer is not None else ()
        moments = [value for values in state for value in values.values() if isinstance(value, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *moments, *self._average.tensors()]

    @property
    def cache(self) -> ActivationCache | None:
        """The activation cache, or None."""
        return self._executor.cache

    @property
    def flops_left(self) -> float | None:
        """What the run may still spend; None before `prepare`."""
        return self._progress.flops_left

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0…1: of the budget or of the epochs, whichever is further."""
        return self._progress.share

    @property
    def steps_left(self) -> float:
        """About how many steps of the plan in force the budget and the data have left; infinite where neither ends."""
        return self._progress.steps_left(self.plan)

    @property
    def passes(self) -> float:
        """About how often the run will have seen each training example at its end; 1 where the data are unknown."""
        return self._progress.passes(self.plan)

    @property
    def steps(self) -> float:
        """About how many steps the run will have made at its end; infinite where the data are unknown."""
        return self._progress.steps(self.plan)

    @property
    def is_done(self) -> bool:
        """Whether the budget would not pay for another step."""
        if self._step.is_open:
            return False
        return self._progress.is_over(self._decisions.floor)

    @property
    def probe_examples(self) -> int:
        """How many examples `prepare` wants set aside for probes; 0: none."""
        return self._prober.examples

    @property
    def announced_ids(self) -> Sequence[int] | None:
        """Which examples the rows of the batch in hand are; None: unknown."""
        return self._progress.ids

    @property
    def affords_upcoming(self) -> bool:
        """Whether the batch announced last is paid for: by the step in hand, or by one under the cheapest plan."""
        if self._step.is_open and self._step.batches < self.accumulation:
            return True
        return not self.is_done and self._progress.pays_for(self._decisions.floor)

    @property
    def batches_of_step(self) -> int:
        """Micro-batches of the step that the batch announced last begins: fewer where the data end in it."""
        return self._progress.batches_of_step

    # ---------------------------------------------------------------- leaving

    def detach(self) -> None:
        """Takes everything back: modules, parameter names, flags, hooks. Only the trained weights stay."""
        if self.model.__dict__.get("_rgft_guide") is not self:
            return  # detached already; another guide may hold the model now
        self._step.leave()
        if self._measurement is not None:
            self._measurement.detach()
        self._executor.detach()
        self._dropout.turn(off=False)
        if self._memory is not None:
            self._memory.leave()
        self.model.__dict__.pop("_rgft_guide", None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

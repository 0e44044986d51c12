"""RGFT in a Transformers Trainer (and TRL's SFTTrainer): `enable`.

trainer = Trainer(model=model, args=args, train_dataset=dataset)
guide = rgft.integrations.enable(trainer, budget=0.3)
trainer.train()

The Trainer keeps its loop, data order, loss, clipping, evaluation and checkpoints. What RGFT needs and callbacks cannot
give (ids of examples, parameter groups, the schedule's horizon, the checkpoint's folder) it takes by replacing methods
of this one trainer object until training ends.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Unpack, cast

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_optimizer import is_optimizer_factory

from rgft.config import Config
from rgft.config.tree import Settings
from rgft.cost.loss import model_loss
from rgft.errors import AttachError, BudgetError, RGFTError, RGFTWarning
from rgft.guide import Guide
from rgft.integrations.hf_callback import RGFTCallback
from rgft.integrations.peft import base_flops, is_peft
from rgft.integrations.trainer_checks import chosen_config, refuse_unsupported, stop, unwrapped
from rgft.integrations.trainer_data import (
    ID_KEY,
    LoaderStream,
    TrainerCourse,
    cache_obstacle,
    id_obstacle,
    randomness_untouched,
    substitute,
    train_loader,
)
from rgft.integrations.trainer_examples import KEPT, TrainerPruning
from rgft.integrations.trainer_state import load_state, log_entries, save_state
from rgft.model_defaults import without_usual_pairs
from rgft.probe_schedule import ProbePool, set_aside
from rgft.pruning import KeptRows
from rgft.workload import batch_shape

log = logging.getLogger("rgft")

#: Trainer's schedule → the guide's shape, and whether it warms up.
SHAPES = {
    "linear": ("linear", True), "cosine": ("cosine", True), "constant": ("constant", False),
    "constant_with_warmup": ("constant", True),
}  # fmt: skip


def enable(
    trainer: Trainer, config: Config | None = None, *, full_flops: float | None = None, **settings: Unpack[Settings]
) -> Guide:
    """Makes the next `trainer.train()` residual-guided. Call it after making the trainer, before `train()`.

    During training, `rgft/…` numbers are logged beside the loss, and each checkpoint holds an `rgft_state.pt`, so that
    `train(resume_from_checkpoint=…)` on a trainer enabled alike goes on bit for bit (on CPU). Training stops when the
    budget is spent. Afterwards model and trainer are plain again; models that the trainer saves always are.

    Language models train by low-rank pairs (`Config.update.low_rank`), whose learning rate is a multiple of the
    Trainer's: what it is given, and logs, is that of dense weights. With an optimizer of one's own they train dense
    weights, unless pairs are asked for.

    Args:
        trainer: of Transformers or TRL, on one device, with a map-style training set. A small part of that is set
            aside for probes and never trained on.
        config: all settings; or give them one by one:
        full_flops: FLOPs of the full fine-tuning that the budget is a share of. None: of all that is trainable in this
            model; with PEFT, of the whole base model without adapters.
        settings: of `Config`, `budget` first: the share of full fine-tuning's FLOPs on the same data and epochs.

    Returns:
        The guide: error map, plan, ledger, costs.

    Raises:
        AttachError: too late, twice, or a kind of training that RGFT cannot work in.
        ConfigError: a setting is wrong, or both `config` and single settings were given.
        BudgetError: no plan fits the budget.
        OptimizerError: the optimizer cannot work on this granularity.
    """
    config = chosen_config(config, settings)
    refuse_unsupported(trainer.args, accelerator=trainer.accelerator)
    _refuse_late(trainer)
    if trainer.optimizer is not None:
        config = without_usual_pairs(config)
    decides = (config.scaling, config.mask, config.period, config.policy, config.budget, config.update.low_rank)
    if all(stage is None for stage in decides) and config.examples.prune == config.examples.tokens == 0.0:
        warnings.warn(
            f"preset {config.preset!r} decides nothing and has no budget: training will be what it is without RGFT",
            RGFTWarning, stacklevel=2,
        )  # fmt: skip
    return _Engagement(trainer, config, full_flops).guide


def _refuse_late(trainer: Trainer) -> None:
    if trainer.is_in_train:
        raise AttachError(
            "training has begun (or ended with an error): its optimizer and data are fixed. Call "
            "rgft.integrations.enable(trainer) on a new Trainer, before train()"
        )
    if getattr(trainer.model, "_rgft_guide", None) is not None:
        raise AttachError("this model has a guide already: enable() was called before, or a Guide was made by hand")
    if trainer.model_init is not None:
        raise AttachError(
            "this Trainer makes a new model in train() (model_init), which the guide would not see. Pass model="
        )
    if any(isinstance(callback, RGFTCallback) for callback in trainer.callback_handler.callbacks):
        raise AttachError("this Trainer has an RGFTCallback already; enable() does all that it does, so leave it out")


class _Engagement:
    """One guide in one trainer, from `enable` until training ends."""

    def __init__(self, trainer: Trainer, config: Config, full_flops: float | None) -> None:
        self.trainer = trainer
        model = cast("nn.Module", trainer.model)
        self._before: dict[str, tuple[bool, Any]] = {}
        with randomness_untouched():
            loader = train_loader(trainer)
            total = TrainerCourse.of(trainer, len(loader)).total_batches
            everything = LoaderStream(loader, total_batches=total, seed=config.seed)
            if full_flops is None and is_peft(model):
                full_flops = base_flops(model, everything, (self._loss, self._models_loss))
        self.guide = Guide(model, config, loss=self._loss)
        self._callback = _Steps(self)
        self.guide.accumulation = trainer.args.gradient_accumulation_steps
        self._pruning: TrainerPruning | None = None
        try:
            with randomness_untouched():
                self._course = self._prepare_data(loader, everything, full_flops)
            if trainer.optimizer is not None:
                self.guide.set_optimizer(unwrapped(trainer.optimizer))
        except BaseException:
            self._put_back()
            self.guide.detach()
            raise
        trainer.add_callback(self._callback)
        for name in (
            "create_optimizer", "create_scheduler", "get_batch_samples", "training_step", "log", "train",
            "_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler",
        ):  # fmt: skip
            self._replace(name, getattr(self, f"_{name.lstrip('_')}"))
        if self._pruning is not None:
            self._replace("compute_loss", partial(self._pruning.compute_loss, trainer.compute_loss))

    # ---------------------------------------------------------------- data

    def _prepare_data(
        self, loader: DataLoader[Any], everything: LoaderStream, full_flops: float | None
    ) -> TrainerCourse:
        trainer, guide = self.trainer, self.guide
        seed = guide.config.seed
        self._prepare_costs(everything, full_flops)
        total = len(everything.dataset)
        train, pool = set_aside(total, guide.probe_examples, seed=seed)
        obstacle = None if guide.cache is None else cache_obstacle(loader)
        with_ids = guide.cache is not None and obstacle is None
        weighted = guide.weighted_loss
        if weighted is not None and weighted.examples is not None:
            # Ids are told for both or for neither: where they would mislead the cache, nothing is skipped.
            reason = obstacle and f"{obstacle}; set examples.prune to 0, or execution.cache to 'none'"
            self._pruning = TrainerPruning(
                trainer, weighted, weighted.examples, everything, obstacle=reason or id_obstacle(loader)
            )
            with_ids = True
        elif obstacle is not None:
            log.warning("no activation cache: %s", obstacle)
        if not pool and not with_ids:
            course = TrainerCourse.of(trainer, len(loader))
        else:
            for name in ("train_dataset", "data_collator", "_signature_columns"):
                self._remember(name)
            substitute(trainer, train, with_ids=with_ids)
            course = TrainerCourse.of(trainer, self._checked_batches(len(train)))
        pool_of_probes = ProbePool(pool, everything.load, seed=seed) if pool else None
        guide.follow(course, pool=pool_of_probes, prunes=self._pruning is not None)
        return course

    def _prepare_costs(self, stream: LoaderStream, full_flops: float | None) -> None:
        """Costs on the Trainer's loss, or on the model's own where that goes through fused kernels (TRL's LM head)."""
        try:
            self.guide.prepare(stream, full_flops=full_flops)
        except BudgetError:
            raise
        except RGFTError as error:
            log.info("FLOPs are read off the model's own loss; the Trainer's cannot be read: %s", error)
            self.guide.prepare(stream, full_flops=full_flops, cost_loss=self._models_loss)

    def _models_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model_loss(model, self.trainer._prepare_inputs(batch))

    def _checked_batches(self, expected: int) -> int:
        """Batches per epoch of the training set that was put in place."""
        loader = train_loader(self.trainer)
        found = len(cast("Any", loader.dataset))
        if found != expected:
            raise AttachError(
                f"expected get_train_dataloader() to go over trainer.train_dataset ({expected} examples, without the "
                f"probes), found {found}: this Trainer brings examples of its own, and would train on the probes. Use "
                "probe={'interval': 0} and execution={'cache': 'none'}, or RGFTCallback"
            )
        return len(loader)

    def _loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The Trainer's own loss of a batch beside training (probes, costs)."""
        trainer = self.trainer
        with _metrics_untouched(trainer), trainer.compute_loss_context_manager():
            # A copy: label smoothing takes the labels out of its batch.
            return cast("Tensor", trainer.compute_loss(model, dict(trainer._prepare_inputs(batch))))

    # ---------------------------------------------------------------- what replaces the trainer's methods

    def _create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        trainer = self.trainer
        if trainer.optimizer is None:
            trainer.optimizer = self._own_optimizer() or self._original("create_optimizer")(model)
        self.guide.set_optimizer(unwrapped(trainer.optimizer))
        return cast("Optimizer", trainer.optimizer)

    def _own_optimizer(self) -> Optimizer | None:
        """From the guide's groups; None where the trainer must build it itself."""
        trainer, args = self.trainer, self.trainer.args
        model = cast("nn.Module", trainer.model)
        if type(trainer).create_optimizer is not Trainer.create_optimizer:
            return None
        made = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(args, cast("Any", model))
        kind, kwargs = made[0], dict(made[1])
        if is_optimizer_factory(kind) or {"params", "model", "optimizer_dict"} & kwargs.keys():
            return None
        groups = self.guide.param_groups(
            args.learning_rate, weight_decay=args.weight_decay,
            decays=frozenset(trainer.get_decay_parameter_names(model)),
            by="component" if kind.__module__.startswith("schedulefree") else "rate",
        )  # fmt: skip
        return kind(groups, **kwargs)

    def _create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        trainer, args, guide = self.trainer, self.trainer.args, self.guide
        original = self._original("create_scheduler")
        if guide.config.budget is None or not guide.config.budget.is_spent:
            return original(num_training_steps, optimizer)
        kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        is_own = type(trainer).create_scheduler is Trainer.create_scheduler and not args.lr_scheduler_kwargs
        if trainer.lr_scheduler is not None or kind not in SHAPES or not is_own:
            warnings.warn(
                f"the learning-rate schedule ({kind!r}) ends with the Trainer's {num_training_steps} steps, not with "
                f"the budget; lr_scheduler_type {', '.join(map(repr, SHAPES))} without kwargs follow the budget",
                RGFTWarning, stacklevel=2,
            )  # fmt: skip
            return original(num_training_steps, optimizer)
        shape, warms_up = SHAPES[kind]
        assert guide.run_plan is not None
        warmup = float(args.warmup_steps) if warms_up else 0.0
        if warmup >= 1:  # a number of steps, at full cost; below 1 it is a share
            warmup = min(0.99, warmup / guide.run_plan.steps)
        trainer.lr_scheduler = guide.scheduler(
            optimizer or cast("Optimizer", trainer.optimizer), shape=shape, warmup=warmup
        )
        trainer._created_lr_scheduler = True
        return trainer.lr_scheduler

    def _training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        kept: KeptRows | None = inputs.pop(KEPT, None)
        ids = _ids_of(inputs)
        inputs.pop(ID_KEY, None)
        self.guide.announce(inputs, ids, kept=kept)
        self._course.position += 1
        with nullcontext() if self._pruning is None else self._pruning.training(ids or ()):
            loss = self._original("training_step")(model, inputs, *args, **kwargs)
        if self.trainer.accelerator.sync_gradients:
            # Here, and not in on_pre_optimizer_step: clipping comes between, which hides where a NaN came from.
            self.guide.before_optimizer_step()
        return loss

    def _get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The batches of the next step; none when the budget does not pay for them."""
        trainer, guide = self.trainer, self.guide
        batches, items = self._original("get_batch_samples")(*args, **kwargs)
        if not batches:
            return batches, items
        if self._pruning is not None:
            epoch = self._course.position // self._course.batches_per_epoch
            batches = self._pruning.thin(batches, [_ids_of(batch) or () for batch in batches], epoch=epoch)
        largest = max(batches, key=lambda batch: math.prod(batch_shape(batch)))
        guide.announce(largest, _ids_of(largest))
        if guide.affords_upcoming:
            return batches, items
        guide.finish()
        stop(trainer.args, trainer.control)
        return [], None

    def _log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs or "train_loss" in logs:
            logs.update(log_entries(self.guide))
        self._original("log")(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._original("_save_optimizer_and_scheduler")(output_dir)
        save_state(self.guide, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:  # first: it says more clearly than the optimizer what does not fit
            load_state(self.guide, checkpoint)
        self._original("_load_optimizer_and_scheduler")(checkpoint)

    def _train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._original("train")(*args, **kwargs)
        except BaseException as error:
            log.warning("training ended with %s; RGFT is detached from this trainer", type(error).__name__)
            raise
        finally:
            self.leave()

    # ---------------------------------------------------------------- replacing and putting back

    def _remember(self, name: str) -> None:
        held = vars(self.trainer)
        self._before[name] = (name in held, held.get(name))

    def _replace(self, name: str, function: Callable[..., Any]) -> None:
        self._remember(name)
        setattr(self.trainer, name, function)

    def _original(self, name: str) -> Callable[..., Any]:
        was_set, value = self._before[name]
        return value if was_set else getattr(type(self.trainer), name).__get__(self.trainer)

    def _put_back(self) -> None:
        for name, (was_set, value) in self._before.items():
            if was_set:
                setattr(self.trainer, name, value)
            else:
                delattr(self.trainer, name)
        self._before.clear()

    def leave(self) -> None:
        """Model and trainer are plain again."""
        self.trainer.remove_callback(self._callback)
        self._put_back()
        self.guide.detach()
        # Its groups and hooks were the guide's; another train() makes one of its own.
        self.trainer.optimizer = self.trainer.lr_scheduler = None


class _Steps(TrainerCallback):
    """Tells the guide where the Trainer is within a step."""

    def __init__(self, engagement: _Engagement) -> None:
        self._engagement, self._guide = engagement, engagement.guide
        self._started_at = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._engagement.trainer
        refuse_unsupported(args, accelerator=trainer.accelerator)
        if trainer.model is not self._guide.model:
            raise AttachError("the Trainer has another model than when enable() was called; enable it on the new one")
        self._guide.set_optimizer(unwrapped(kwargs["optimizer"]))
        self._started_at = self._guide.step_count

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._guide.begin_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._guide.end_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._guide.is_done and not control.should_training_stop:
            stop(args, control)
        if self._guide.is_done or state.global_step >= state.max_steps:
            # Before the last evaluation and checkpoint, which come after this event.
            self._guide.finish()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        guide = self._guide
        steps = guide.step_count - self._started_at
        if steps == 0:
            warnings.warn("RGFT saw no training step, and had no effect", RGFTWarning, stacklevel=2)
        log.info(
            "RGFT: %d steps, %.3g of full fine-tuning's FLOPs, %d of %d components on at the end, cut %d",
            steps, guide.flops_fraction, len(guide.active), len(guide.partition), guide.plan.cut,
        )  # fmt: skip


def _ids_of(batch: Any) -> tuple[int, ...] | None:
    ids = batch.get(ID_KEY)
    return None if ids is None else tuple(ids.tolist())


@contextmanager
def _metrics_untouched(trainer: Trainer) -> Iterator[None]:
    """TRL's trainers add up metrics inside compute_loss; those of probes are no training's and no evaluation's."""
    names = [name for name in ("_metrics", "_total_train_tokens") if hasattr(trainer, name)]
    saved = {name: getattr(trainer, name) for name in names}
    for name, value in saved.items():
        setattr(trainer, name, copy.deepcopy(value))
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(trainer, name, value)

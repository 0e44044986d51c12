"""RGFT as a Trainer callback: the subset that needs no trainer object."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any, Unpack, cast

from torch import nn
from transformers import TrainerCallback

from rgft.assembly import build_signal
from rgft.config import Config
from rgft.config.tree import Settings
from rgft.errors import AttachError, ConfigError, RGFTWarning
from rgft.guide import Guide
from rgft.integrations.trainer_checks import chosen_config, refuse_unsupported, stop, unwrapped
from rgft.integrations.trainer_data import LoaderStream, TrainerCourse, randomness_untouched
from rgft.integrations.trainer_state import load_state, log_entries, save_state
from rgft.model_defaults import without_usual_pairs
from rgft.signals.base import GradientSignal

log = logging.getLogger("rgft")


class RGFTCallback(TrainerCallback):
    """`Trainer(..., callbacks=[RGFTCallback(budget=0.3)])`: what can be done from a Trainer's events alone.

    It can: split the model into whole parameters (granularity "layer" or "block"), score the gradients of training
    batches, decide, switch components off and on, cut the backward pass, scale learning rates per component, stop when
    the budget is spent, log `rgft/…` numbers, and save and restore its state with the Trainer's checkpoints.

    It cannot, and `rgft.integrations.enable(trainer)` can: split weights into heads and neuron blocks; probe examples
    that are not trained on, so that the map is measured at the start only (or at every step with probe interval 1),
    and signals that need probes are refused; read a frozen prefix from an activation cache, as it does not see which
    examples a batch holds; skip well-learnt examples; train layers by low-rank pairs, so that language models train
    dense weights; let the learning-rate schedule end with the budget instead of
    with the Trainer's steps; write into the Trainer's log before other callbacks, so that trackers may show `rgft/…`
    numbers one step late. Gradients are seen after clipping. FLOPs are counted on the model's own `.loss`.

    Args:
        config: all settings; or give them one by one:
        settings: of `Config`, `budget` first: the share of full fine-tuning's FLOPs on the same data and epochs.

    Raises:
        ConfigError: a setting is wrong, or needs `enable`.
    """

    def __init__(self, config: Config | None = None, **settings: Unpack[Settings]) -> None:
        config = chosen_config(config, settings)
        _refuse_config(config)
        self.config = without_usual_pairs(config).model_copy(
            update={"execution": config.execution.model_copy(update={"cache": "none"})}
        )
        self.guide: Guide | None = None
        self._course: TrainerCourse | None = None
        self._started_at = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        refuse_unsupported(args)
        model = cast("nn.Module", kwargs["model"])
        loader = kwargs["train_dataloader"]
        guide = Guide(model, self.config)
        guide.accumulation = args.gradient_accumulation_steps
        try:
            guide.set_optimizer(unwrapped(kwargs["optimizer"]))
            steps_per_epoch = max(1, -(-len(loader) // args.gradient_accumulation_steps))
            epochs, rest = divmod(state.max_steps, steps_per_epoch)
            total = epochs * len(loader) + min(rest * args.gradient_accumulation_steps, len(loader))
            with randomness_untouched():
                stream = LoaderStream(loader, total_batches=total, seed=self.config.seed)
                guide.prepare(stream, own_loss=False)
            self._course = TrainerCourse(total_batches=total, batches_per_epoch=len(loader))
            guide.follow(self._course)
            if state.global_step > 0:
                load_state(guide, Path(args.output_dir) / f"checkpoint-{state.global_step}")
        except BaseException:
            guide.detach()
            raise
        kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        spends = self.config.budget is not None and self.config.budget.is_spent
        if spends and not kind.startswith("constant"):
            warnings.warn(
                f"the learning-rate schedule ({kind!r}) ends with the Trainer's {state.max_steps} steps, not with the "
                "budget. Use rgft.integrations.enable(trainer), or lr_scheduler_type='constant'",
                RGFTWarning, stacklevel=2,
            )  # fmt: skip
        self.guide, self._started_at = guide, guide.step_count

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._attached.begin_step()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance()
        self._attached.before_optimizer_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._attached.end_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._attached.is_done:
            stop(args, control)
        if self._attached.is_done or state.global_step >= state.max_steps:
            # Before the last evaluation and checkpoint, which come after this event.
            self._attached.finish()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.guide is not None and logs is not None and "loss" in logs:
            entries = log_entries(self.guide)
            logs.update(entries)
            state.log_history[-1].update(entries)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.guide is not None and not args.save_only_model:
            save_state(self.guide, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        guide, self.guide = self._attached, None
        if guide.step_count == self._started_at:
            warnings.warn("RGFT saw no training step, and had no effect", RGFTWarning, stacklevel=2)
        log.info("RGFT: %d steps, %.3g of full fine-tuning's FLOPs", guide.step_count, guide.flops_fraction)
        guide.detach()

    @property
    def _attached(self) -> Guide:
        if self.guide is None:
            raise AttachError(
                "training has begun without RGFTCallback: pass it to Trainer(callbacks=[…]) or trainer.add_callback(…) "
                "before train()"
            )
        return self.guide

    def _advance(self) -> None:
        if self._course is not None:
            self._course.position += 1


def _refuse_config(config: Config) -> None:
    remedy = "use rgft.integrations.enable(trainer, …) instead of the callback"
    problems: list[str] = []
    if config.granularity not in ("layer", "block"):
        problems.append(
            f"granularity: expected 'layer' or 'block', found {config.granularity!r}; when a callback hears of it, the "
            f"optimizer exists already, of whole weights; {remedy}"
        )
    if config.examples.prune > 0.0 or config.examples.tokens > 0.0:
        problems.append(f"examples: a callback does not make batches, and cannot skip anything in them; {remedy}")
    signal = build_signal(config)
    if signal is not None and not isinstance(signal, GradientSignal):
        problems.append(
            f"signal: {signal.name!r} is measured in probes only, for which a callback has no data; {remedy}"
        )
    if config.update.pairs is not None:
        problems.append(
            f"update.low_rank: when a callback hears of it, the optimizer exists already, without the pairs; {remedy}"
        )
    if config.execution.cache == "memory":
        problems.append(f"execution.cache: a callback does not see which examples a batch holds; {remedy}")
    if problems:
        raise ConfigError(problems)

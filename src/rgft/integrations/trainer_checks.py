"""What RGFT refuses to be attached to or configured with, each problem with what works instead."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerControl, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from rgft.config import Config
from rgft.config.tree import Settings
from rgft.errors import AttachError, ConfigError


def refuse_unsupported(args: TrainingArguments, *, accelerator: Any = None) -> None:
    """Raises AttachError for trainings that RGFT would get wrong without anyone noticing."""
    problems: list[str] = []
    kind = getattr(accelerator, "distributed_type", None)
    kind = getattr(kind, "value", "NO")
    if args.world_size > 1 or kind not in ("NO", "MULTI_GPU") or (kind == "MULTI_GPU" and args.world_size > 1):
        problems.append(
            f"expected one process, found {args.world_size} ({kind}): DDP would never reduce gradients of components "
            "that come back on, and DeepSpeed and FSDP shard what RGFT splits. Start it without torchrun or "
            "accelerate's multi-process configurations, on one device"
        )
    if args.n_gpu > 1:
        problems.append(
            f"expected one device, found {args.n_gpu}: nn.DataParallel copies the model at each step, so that what "
            "RGFT switches off is not. Set CUDA_VISIBLE_DEVICES to one device"
        )
    if args.fp16:
        problems.append("fp16=True skips steps by its gradient scaler, which RGFT would count. Use bf16=True")
    if args.auto_find_batch_size:
        problems.append("auto_find_batch_size=True starts over with other batches in the middle. Set a batch size")
    kwargs = _checkpointing_kwargs(args)
    # Given nothing, Transformers takes the other kind; given other settings, torch takes this one.
    if kwargs is not None and kwargs.get("use_reentrant", True):
        problems.append(
            "reentrant gradient checkpointing needs gradients at the input of every layer, so backward could never "
            "stop early. Set use_reentrant to False in its kwargs"
        )
    if problems:
        raise AttachError("RGFT cannot be attached to this training:\n  " + "\n  ".join(problems))


def _checkpointing_kwargs(args: TrainingArguments) -> dict[str, Any] | None:
    """What checkpointing was given; None: nothing, or there is none."""
    names = ("gradient_checkpointing", "activation_checkpointing")
    given = [getattr(args, f"{name}_kwargs", None) for name in names if getattr(args, name, False)]
    given = [kwargs for kwargs in given if isinstance(kwargs, dict)]
    return {key: value for kwargs in given for key, value in kwargs.items()} if given else None


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside Accelerate's wrapper."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def chosen_config(config: Config | None, settings: Settings) -> Config:
    """A configuration from what `enable` and the callback take; ConfigError when both forms were used."""
    if config is None:
        return Config(**settings)
    if settings:
        raise ConfigError(f"expected config, or single settings; found both (config and {', '.join(sorted(settings))})")
    return config


def stop(args: TrainingArguments, control: TrainerControl) -> None:
    """Ends training after this step, with what the Trainer does at a last step of its own."""
    control.should_training_stop = True
    control.should_save |= args.save_strategy == SaveStrategy.STEPS
    control.should_evaluate |= args.eval_strategy == IntervalStrategy.STEPS

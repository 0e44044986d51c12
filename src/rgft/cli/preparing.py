"""From a request to a task and a run that is ready to start; nothing is written here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from rgft.cli.request import EVAL_BATCH_SIZE, LANGUAGE_MODELS, MAX_LENGTH, RunSettings, TaskName
from rgft.errors import ConfigError
from rgft.run import Settings

if TYPE_CHECKING:
    from rgft.tasks.base import PreparedTask


def silence_transformers() -> None:
    """Its progress bars and notes about new classifiers say nothing that a run does not say itself."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def prepare_task(settings: RunSettings) -> PreparedTask:
    """Model, data and loss.

    Raises:
        DataError: a file, column, label or model cannot be used.
    """
    silence_transformers()
    prepare: dict[TaskName, Callable[[RunSettings, dict[str, Any]], PreparedTask]] = {
        "text-classification": _text, "regression": _text, "language-modelling": _language_modelling, "chat": _chat,
        "image-classification": _images,
    }  # fmt: skip
    shared = {
        "model": settings.model, "train": settings.data, "validation": settings.validation, "test": settings.test,
        "held_out": settings.held_out, "seed": settings.seed,
    }  # fmt: skip
    if settings.task in MAX_LENGTH:
        shared["max_length"] = settings.max_length or MAX_LENGTH[settings.task]
    return prepare[settings.task](settings, shared)


def _text(settings: RunSettings, shared: dict[str, Any]) -> PreparedTask:
    from rgft.tasks.text_classification import text_classification

    return text_classification(
        **shared, text=settings.text, label=settings.label, regression=settings.task == "regression"
    )


def _language_modelling(settings: RunSettings, shared: dict[str, Any]) -> PreparedTask:
    from rgft.tasks.language_modelling import language_modelling

    return language_modelling(**shared, text=settings.text[0], packing=settings.packing)


def _chat(settings: RunSettings, shared: dict[str, Any]) -> PreparedTask:
    from rgft.tasks.chat import chat

    return chat(
        **shared, messages=settings.messages, chat_template=settings.chat_template,
        assistant_only=settings.loss_on == "assistant",
    )  # fmt: skip


def _images(settings: RunSettings, shared: dict[str, Any]) -> PreparedTask:
    from rgft.tasks.image_classification import image_classification

    return image_classification(**shared, image=settings.image, label=settings.label, flip=settings.flip)


def run_settings(settings: RunSettings) -> Settings:
    """What a `Run` is told."""
    shared = set(Settings.__dataclass_fields__) & set(RunSettings.model_fields) - {"device", "eval_batch_size"}
    largest = min(EVAL_BATCH_SIZE, settings.batch_size) if settings.task in LANGUAGE_MODELS else EVAL_BATCH_SIZE
    return Settings(
        **{name: getattr(settings, name) for name in shared}, device=device_of(settings.device),
        eval_batch_size=settings.eval_batch_size or largest,
    )  # fmt: skip


def device_of(name: str) -> str:
    """The device of that name; "auto" is an accelerator where there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return "cpu" if accelerator is None else accelerator.type
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device: expected auto, cpu or a device of this machine, found {name!r} ({reason})"
        ) from error
    return name

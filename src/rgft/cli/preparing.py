"""From a request to a task and a run that is ready to start; nothing is written here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rgft.cli.request import RunSettings
from rgft.errors import ConfigError
from rgft.run import Settings

if TYPE_CHECKING:
    from rgft.tasks.base import PreparedTask


def silence_transformers() -> None:
    """Its progress bars and notes about new classifiers say nothing that a run does not say itself."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def prepare_task(settings: RunSettings) -> PreparedTask:
    """Model, data and loss.

    Raises:
        DataError: a file, column, label or model cannot be used.
    """
    silence_transformers()
    from rgft.tasks.text_classification import text_classification

    return text_classification(
        model=settings.model, train=settings.data, text=settings.text, label=settings.label,
        validation=settings.validation, test=settings.test, regression=settings.task == "regression",
        max_length=settings.max_length, held_out=settings.held_out, seed=settings.seed,
    )  # fmt: skip


def run_settings(settings: RunSettings) -> Settings:
    """What a `Run` is told."""
    shared = set(Settings.__dataclass_fields__) & set(RunSettings.model_fields) - {"device"}
    return Settings(**{name: getattr(settings, name) for name in shared}, device=device_of(settings.device))


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

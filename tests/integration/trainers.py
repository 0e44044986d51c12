"""Tiny Trainers over the model zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.families import CLASSES, FAMILIES, VOCABULARY

TOKENS = 10

#: A cut by hand: such budgets pay for an epoch of everything, where RGFT itself freezes nothing.
HALF = {"name": "budget", "frozen_fraction": 0.5}


def examples(count: int = 64, *, kind: str = "text", seed: int = 0) -> Dataset:
    """Texts of one length, whose label is written in their tokens."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    input_ids = torch.randint(3, VOCABULARY, (count, TOKENS), generator=generator)
    input_ids[:, 1:4] = 10 + labels[:, None]
    columns: dict[str, Any] = {
        "input_ids": input_ids.tolist(), "attention_mask": torch.ones_like(input_ids).tolist(),
        "labels": labels.tolist() if kind == "text" else input_ids.tolist(),
    }  # fmt: skip
    return Dataset.from_dict(columns)


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    given = {
        "per_device_train_batch_size": 8, "num_train_epochs": 3, "learning_rate": 1e-3, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, **settings,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **given)


def make_trainer(
    folder: Path, *, family: str = "bert", model: nn.Module | None = None, dataset: Any = None,
    kind: type[Trainer] = Trainer, more: dict[str, Any] | None = None, **settings: Any,
) -> Trainer:  # fmt: skip
    model = model if model is not None else FAMILIES[family].build()
    if dataset is None:
        dataset = examples(kind=FAMILIES[family].kind)
    return kind(model=model, args=arguments(folder, **settings), train_dataset=dataset, **(more or {}))  # type: ignore[arg-type]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different


class Watch(TrainerCallback):
    """Keeps what it is told to look at after each step."""

    def __init__(self, look: Any) -> None:
        self.look, self.seen = look, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(self.look())

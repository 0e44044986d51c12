"""A tiny task on a family's random batches, and a method's run on it as the bench makes it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rgft.batches import BatchStream
from rgft.bench.methods import METHODS, Followed, Method
from rgft.bench.tasks.pairs import SENSITIVE
from rgft.cost import trace_costs
from rgft.partition import partition
from rgft.run import Run, Settings
from rgft.tasks.base import PreparedTask
from rgft.tasks.metrics import OfWholeSplit, classification
from rgft.tasks.token_loss import TokenMetric, number_of_targets, token_losses
from rgft.workload import Workload
from tests.families import FAMILIES
from tests.integration.loops import Examples, collate, example_losses, trimmed

#: Methods of language models.
CODE = {"fait"}


def tiny_task(family: str = "bert", *, count: int = 64) -> PreparedTask:
    """Examples of a family of classifiers, or (llama) of programs of which every third token is error-sensitive."""
    data = Examples(FAMILIES[family], count=count)
    is_code, is_padded = FAMILIES[family].kind == "lm", "attention_mask" in data.rows[0]
    if is_code:
        for row in data.rows:
            row[SENSITIVE] = torch.arange(len(row["input_ids"])) % 3 == 0
    return PreparedTask(
        model=FAMILIES[family].build(), processor=None, train=data, validation=None, test=None,
        collate=trimmed if is_padded and not is_code else collate, loss=token_losses if is_code else example_losses,
        metric=TokenMetric if is_code else lambda: OfWholeSplit(classification),
        weight=number_of_targets if is_code else lambda batch: len(batch["labels"]),
    )  # fmt: skip


@dataclass(kw_only=True)
class Tried:
    """A method's run, and the model's parameters before it."""

    run: Run
    before: dict[str, Tensor]
    method: Method

    def moved(self) -> dict[str, Tensor]:
        """Name → which elements are not what they were. Ends the run."""
        self.run.close()
        now = dict(self.run.task.model.named_parameters())
        return {name: now[name].detach() != old for name, old in self.before.items() if not torch.equal(now[name], old)}

    def updated(self) -> dict[str, Tensor]:
        """Name → which elements belong to components that were on in some step."""
        masks: dict[str, Tensor] = {}
        for component in self.run.guide.partition:
            if component.name in self.run.guide.ledger.component_steps:
                for part in component.slices:
                    mask = masks.setdefault(part.parameter, torch.zeros(part.shape, dtype=torch.bool))
                    own = mask if part.dim is None else mask.narrow(part.dim, part.start, part.stop - part.start)
                    own.fill_(True)
        return masks


def prepared(
    name: str, *, budget: float = 0.6, lr: float = 1e-2, epochs: float = 2, batch_size: int = 8, count: int = 64,
    settings: Mapping[str, Any] | None = None, followed: Followed | None = None, family: str = "bert", **run: Any,
) -> Tried:  # fmt: skip
    """A method's run, prepared and begun and not trained; as `bench.runner.run_cell` does it."""
    method, given = METHODS[name], settings or {}
    task = tiny_task("llama" if name in CODE else family, count=count)
    stream = BatchStream(task.train, batch_size=batch_size, collate_fn=task.collate, epochs=epochs, seed=0)
    costs = trace_costs(
        task.model, partition(task.model), stream.load(next(stream.indices())),
        loss=lambda model, batch: task.loss(model, batch).mean(),
    )  # fmt: skip
    full = Workload.scan(stream).full_flops(costs)
    torch.manual_seed(0)
    task.model, task.loss = method.prepare(task.model, given), method.loss_of(task.loss, given)
    before = copy.deepcopy({name: p.detach() for name, p in task.model.named_parameters()})
    config = method.configuration(budget=budget, seed=0, settings=given, followed=followed)
    of_run = Settings(lr=lr, epochs=epochs, batch_size=batch_size, **run)
    made = Run(
        task, config, of_run, full_flops=full if method.changes_model else None,
        optimizer=method.optimizer_of(of_run, given),
    )  # fmt: skip
    made.prepare()
    method.begin(made)
    return Tried(run=made, before=before, method=method)


def trained(name: str, **options: Any) -> Tried:
    """The same, trained to the end."""
    tried = prepared(name, **options)
    tried.run.train()
    return tried

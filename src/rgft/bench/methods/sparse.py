"""Sparse fine-tuning: single entries of the layers' matrices train, and the classifier; see `bench.optimizers.choices`.

The gradient of whole matrices is made and then masked: nothing is saved but the dW of embeddings, which none has. What
choosing takes beside (passes over some batches, decompositions) is in the ledger.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from rgft.batches import BatchStream
from rgft.bench.methods.base import Method, Rates, steps_of, variants_of
from rgft.bench.methods.peft_kinds import HEADS
from rgft.bench.optimizers.choices import (
    DropAndGrow,
    LowRankMagnitude,
    PerNeuron,
    RowsOrColumns,
    TopShare,
    Unmasking,
)
from rgft.bench.optimizers.groups import taken_apart
from rgft.bench.optimizers.sparse import Choice, SparseAdamW
from rgft.guide import Guide
from rgft.optimizer.muon import IS_MATRIX
from rgft.partition import partition
from rgft.run import Run
from rgft.workload import batch_shape

#: Batches whose gradients are added up before a choice that is made once, and the share of the steps they may take.
BATCHES, SHARE = 4, 0.1
#: Dimensions of the kernel of a convolution over images.
KERNEL = 4


def _only_matrices(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """Freezes all but the matrices and kernels in layers, and the head."""
    layers = tuple(f"{path}." for path in partition(model).layers)
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() in (2, KERNEL) and name.startswith(layers)
        parameter.requires_grad_(is_matrix or any(part in HEADS for part in name.split(".")))
    return model


def _optimizer(make: Callable[..., Choice]) -> Callable[[Guide, Rates], Optimizer]:
    def build(guide: Guide, rates: Rates) -> Optimizer:
        groups = guide.param_groups(lr=rates.lr, weight_decay=rates.weight_decay, by="matrix")
        return SparseAdamW(
            [
                {**group, IS_MATRIX: group[IS_MATRIX] or is_kernel}
                for group, is_kernel in taken_apart(groups, lambda parameter: parameter.dim() == KERNEL)
            ],
            lr=rates.lr, choice=make(**rates.settings["choice"]), penalty=rates.settings["penalty"],
        )  # fmt: skip

    return build


def _fit(run: Run) -> None:
    """Makes steps of what the choice has as shares of the run."""
    optimizer = run.optimizer
    assert isinstance(optimizer, SparseAdamW)
    optimizer.choice = optimizer.choice.over(steps_of(run))


def _choose_first(run: Run, *, fisher: bool = False) -> None:
    """Chooses before the first step by the examples of a few batches, without dropout; booked as scoring.

    Args:
        run: which has not begun.
        fisher: go by the sum of squares of each example's gradient, not by the sum of batches' gradients.
    """
    optimizer, task, started = run.optimizer, run.task, time.perf_counter()
    assert isinstance(optimizer, SparseAdamW)
    rows = 1 if fisher else run.settings.batch_size
    passes = max(1, int(min(BATCHES, SHARE * run.guide.steps_left))) * run.settings.batch_size // rows
    stream = BatchStream(task.train, batch_size=rows, collate_fn=task.collate, epochs=1, seed=run.config.seed)
    matrices = optimizer.matrices
    sums = [torch.zeros_like(matrix) for matrix in matrices]
    costs = run.guide.costs
    assert costs is not None
    flops, of_matrices = 0.0, [c.name for c in run.guide.partition if c.layer is not None]
    was_training = task.model.training
    task.model.eval()
    for indices in islice(stream.indices(), passes):
        batch = stream.load(indices)
        rows, tokens = batch_shape(batch)
        gradients = torch.autograd.grad(run.loss(task.model, batch).mean(), matrices)
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient.square() if fisher else gradient
        flops += costs.step_flops(of_matrices, rows=rows, tokens=tokens, training=False).total
    task.model.train(was_training)
    optimizer.choose_from(dict(zip(matrices, sums, strict=True)))
    run.guide.ledger.add_probe(flops=flops, seconds=time.perf_counter() - started)


def _sparse(
    name: str, title: str, source: str, make: type[Choice], *, begin: Callable[[Run], None] = _fit,
    penalty: float = 0.0, cost: str = "nothing: dW is made whole, and masked", revision: int = 1,
    tries: tuple[Any, ...] = ("fraction", 0.01, 0.2), **choice: Any,
) -> Method:  # fmt: skip
    """A method of that choice.

    `choice`: settings of it in place of its defaults; `tries`: one of them, and its other values.
    """
    defaults = {field.name: field.default for field in fields(make)}  # type: ignore[arg-type]
    return Method(
        name=name, title=title, source=source, cost=cost, change=_only_matrices, config={"preset": "full"},
        settings={"choice": {**defaults, **choice}, "penalty": penalty}, optimizer=_optimizer(make), begin=begin,
        variants=variants_of(f"choice.{tries[0]}", *tries[1:]), revision=revision,
    )  # fmt: skip


METHODS = (
    _sparse(
        "fim_static", "FISH Mask: largest Fisher information", "Sung et al. 2021 (arXiv:2111.09839)", TopShare,
        begin=partial(_choose_first, fisher=True), fraction=0.005, revision=2,
        tries=("fraction", 0.001, 0.025),
    ),
    _sparse(
        "gps", "GPS: largest gradients of each neuron", "Zhang et al. 2023 (arXiv:2312.10136)", PerNeuron,
        begin=_choose_first, tries=("count", 1, 16),
    ),
    _sparse("sift", "SIFT: largest gradients", "Song et al. 2023 (arXiv:2312.11875)", TopShare, begin=_choose_first),
    _sparse(
        "grft", "GRFT: rows or columns, held to where they were", "Liu et al. 2025 (arXiv:2507.00016)", RowsOrColumns,
        begin=_choose_first, penalty=1e-3, tries=("fraction", 0.0025, 0.05),
    ),
    _sparse(
        "id3", "ID3: unmasking step by step", "Agarwal et al. 2024 (arXiv:2408.14470)", Unmasking, unmask_steps=0.5,
        revision=2,
    ),
    _sparse(
        "spiel", "SpIEL: entries dropped and grown", "Ansell et al. 2024 (arXiv:2401.16405)", DropAndGrow, every=0.1,
        until=0.75, revision=2,
    ),
    _sparse(
        "lift", "LIFT: principal weights", "Liu et al. 2025 (arXiv:2506.00772)", LowRankMagnitude,
        cost="nothing: dW is made whole, and masked; decompositions are added", every=0.2, revision=2,
    ),
)  # fmt: skip

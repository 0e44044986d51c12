"""The Trainer's own batches, as the guide needs to know them: their shapes, their examples, and how many there are."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from rgft.batches import BatchStream, SizedDataset
from rgft.errors import AttachError
from rgft.workload import batch_shape

#: Column of the data set and key of the batch that hold example ids.
ID_KEY = "rgft_example"
#: Examples that are loaded twice to see whether they come out the same.
COMPARED_EXAMPLES = 16


@dataclass(kw_only=True)
class TrainerCourse:
    """Where a Trainer is in its data; see `rgft.progress.Course`."""

    total_batches: int
    batches_per_epoch: int
    position: int = 0

    @property
    def epoch(self) -> int:
        """Epoch of the micro-batch handed out last."""
        return max(0, self.position - 1) // self.batches_per_epoch

    @classmethod
    def of(cls, trainer: Trainer, batches_per_epoch: int) -> TrainerCourse:
        """As the Trainer counts: the last optimizer step of an epoch takes what batches are left."""
        accumulation = trainer.args.gradient_accumulation_steps
        steps_per_epoch = max(1, -(-batches_per_epoch // accumulation))
        steps = trainer.args.max_steps
        if steps <= 0:
            steps = math.ceil(trainer.args.num_train_epochs * steps_per_epoch)
        epochs, rest = divmod(steps, steps_per_epoch)
        total = epochs * batches_per_epoch + min(rest * accumulation, batches_per_epoch)
        return cls(total_batches=max(1, total), batches_per_epoch=batches_per_epoch)


class LoaderStream(BatchStream):
    """The batches that a Trainer's loader would yield, for scanning: its sampler, columns and collator."""

    def __init__(self, loader: DataLoader[Any], *, total_batches: int, seed: int) -> None:
        dataset: Any = loader.dataset
        batch_size = max(1, round(len(dataset) / max(1, len(loader))))
        super().__init__(dataset, batch_size=batch_size, collate_fn=loader.collate_fn, seed=seed)
        self._loader, self._total = loader, total_batches

    @property
    def total_batches(self) -> int:
        return self._total

    def indices(self, start: int = 0) -> Iterator[list[int]]:
        """The ids of each batch, by the loader's own sampler."""
        position = 0
        while position < self._total:
            for batch in self._loader.batch_sampler or ():
                if position >= start:
                    yield list(batch)
                position += 1
                if position == self._total:
                    return


class Indexed:
    """Some examples of a data set, each with its id beside its own fields.

    Args:
        dataset: of mappings.
        ids: which examples, in order.
        with_ids: whether examples carry their id.
    """

    def __init__(self, dataset: SizedDataset, ids: Sequence[int], *, with_ids: bool) -> None:
        self._dataset, self._ids, self._with_ids = dataset, ids, with_ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Any:
        example = self._dataset[self._ids[index]]
        if self._with_ids:
            example = copy.copy(example)
            example[ID_KEY] = self._ids[index]
        return example


class IdCollator:
    """Takes ids off the examples, collates the rest with the Trainer's own collator, and puts them into the batch."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, examples: list[Any]) -> Any:
        has_ids = all(isinstance(e, MutableMapping) and ID_KEY in e for e in examples)
        ids = [int(example.pop(ID_KEY)) for example in examples] if has_ids else None
        batch = self.collate(examples)
        if ids is not None:
            batch[ID_KEY] = torch.tensor(ids)
        return batch

    def __getattr__(self, name: str) -> Any:  # the Trainer saves a collator's tokenizer
        if name == "collate":
            raise AttributeError(name)
        return getattr(self.collate, name)


def train_loader(trainer: Trainer) -> DataLoader[Any]:
    """A training loader of the Trainer's, to look at; its accelerator forgets it again.

    Raises:
        AttachError: the training set is not map-style.
    """
    dataset = trainer.train_dataset
    if dataset is None:
        raise AttachError("the Trainer has no train_dataset; RGFT needs one to know what the run costs")
    if isinstance(dataset, IterableDataset | datasets.IterableDataset) or not hasattr(dataset, "__len__"):
        raise AttachError(
            f"expected a map-style train_dataset (with a length), found {type(dataset).__name__}: what the run would "
            "cost, and which examples repeat, cannot be known of a stream. Use a map-style data set"
        )
    known = list(trainer.accelerator._dataloaders)
    loader = trainer.get_train_dataloader()
    trainer.accelerator._dataloaders[:] = known
    return loader


def substitute(trainer: Trainer, ids: Sequence[int], *, with_ids: bool) -> None:
    """Puts the examples `ids` of the training set, with ids if wanted, in its place."""
    dataset: Any = trainer.train_dataset
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom":
        if with_ids:
            column: Any = np.arange(len(dataset))
            dataset = dataset.add_column(ID_KEY, column)
        trainer.train_dataset = dataset.select(ids) if len(ids) < len(dataset) else dataset
    else:
        wrapped: Any = Indexed(dataset, ids, with_ids=with_ids)
        trainer.train_dataset = wrapped
    if with_ids:
        trainer._set_signature_columns_if_needed()
        trainer._signature_columns = [*(trainer._signature_columns or ()), ID_KEY]
        trainer.data_collator = IdCollator(trainer.data_collator)


def id_obstacle(loader: DataLoader[Any]) -> str | None:
    """Why rows of batches cannot be told to be examples; None where they can. Padding-free collators fill one row."""
    dataset: Any = loader.dataset
    collate: Callable[[list[Any]], Any] = loader.collate_fn
    count = min(COMPARED_EXAMPLES, len(dataset))
    batch = cast("Any", collate([dataset[i] for i in range(count)]))
    if not isinstance(batch, MutableMapping) or not isinstance(dataset[0], MutableMapping):
        return f"expected examples and batches that are mappings, found {type(dataset[0]).__name__}"
    if batch_shape(batch)[0] != count:
        return f"{count} examples are collated into {batch_shape(batch)[0]} rows"
    return None


def cache_obstacle(loader: DataLoader[Any]) -> str | None:
    """Why the activations of an example cannot be kept for when it comes again; None where they can.

    Masking and augmentation draw an example anew each time; padding-free collators lay several out in one row.
    """
    dataset: Any = loader.dataset
    collate: Callable[[list[Any]], Any] = loader.collate_fn
    count = min(COMPARED_EXAMPLES, len(dataset))
    states = random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state()
    first, second = (cast("Any", collate([dataset[i] for i in range(count)])) for _ in range(2))
    drew = (
        random.getstate() != states[0]
        or repr(np.random.get_state(legacy=True)) != repr(states[1])
        or not torch.equal(torch.get_rng_state(), states[2])
    )
    if (obstacle := id_obstacle(loader)) is not None:
        return obstacle
    if drew or not _equal(first, second):
        return "an example comes out differently each time it is loaded (masking, augmentation)"
    return None


def _equal(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return all(
        torch.equal(value, second[key]) if isinstance(value, Tensor) else value == second[key]
        for key, value in first.items()
    )


@contextmanager
def randomness_untouched() -> Iterator[None]:
    """The random state of Python, NumPy and PyTorch (all devices) is afterwards what it was."""
    python, arrays = random.getstate(), np.random.get_state(legacy=True)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)

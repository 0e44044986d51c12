"""Batches over epochs in an order that a resumed run repeats, with the ids of their examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol, cast

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from rgft.errors import DataError
from rgft.pruning import ExamplePruning, KeptRows


class SizedDataset(Protocol):
    """A map-style dataset: `len(dataset)` and `dataset[i]`.

    With augmentation it has an attribute `variants` > 1, and `dataset[i + v * len(dataset)]` is variant v of example i
    (variant 0: the example as it is). Training then draws a variant each time an example comes up; an id tells variants
    apart, so that nothing kept of one is taken for another.

    Where all examples have one shape, an attribute `is_uniform` = True says so: then none is loaded to find that out.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


def number_of_variants(dataset: SizedDataset) -> int:
    """How many variants the dataset has of each example."""
    return getattr(dataset, "variants", 1)


def is_uniform(dataset: SizedDataset) -> bool:
    """Whether the dataset says that all its examples have one shape."""
    return getattr(dataset, "is_uniform", False)


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on a device."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _check_map_style(dataset: Any) -> None:
    missing = [name for name in ("__len__", "__getitem__") if not hasattr(dataset, name)]
    if isinstance(dataset, IterableDataset):  # which inherits an indexing that only raises
        missing = ["__len__", "__getitem__"]
    if not missing:
        return
    what = "a DataLoader" if isinstance(dataset, DataLoader) else type(dataset).__name__
    instead = "give its dataset" if isinstance(dataset, DataLoader) else "give a list of its examples"
    raise DataError(
        f"dataset: expected a map-style dataset (len(dataset) and dataset[i]), found {what} without "
        f"{' and '.join(missing)}: the budget is a share of passes over all examples, in an order that a resumed run "
        f"repeats; {instead}"
    )


@dataclass(frozen=True, kw_only=True)
class IndexedBatch:
    """A collated batch and which examples (positions in the dataset, variants included) its rows are.

    Attributes:
        ids: in row order.
        batch: as collated.
        kept: what was left of a batch where examples may be skipped; None: they may not.
        following: the ids of the batch that comes next, as far as that is known.
    """

    ids: tuple[int, ...]
    batch: Any
    kept: KeptRows | None = None
    following: tuple[int, ...] = ()


class BatchStream:
    """Yields `epochs` epochs of shuffled batches; the order depends on the seed and the epoch alone.

    Args:
        dataset: map-style; an example's id is its position. Which variant comes up depends on the seed and the epoch.
        batch_size: examples per batch; the last of an epoch may be smaller.
        collate_fn: list of examples → batch; None is torch's default.
        epochs: epochs until the stream ends; None never ends.
        seed: of the order.
        workers: worker processes of the loader (0: in this process).

    Raises:
        DataError: the dataset is empty, or not map-style.
    """

    def __init__(
        self, dataset: SizedDataset, *, batch_size: int, collate_fn: Callable[[list[Any]], Any] | None = None,
        epochs: float | None = 1, seed: int = 0, workers: int = 0,
    ) -> None:  # fmt: skip
        _check_map_style(dataset)
        if len(dataset) == 0:
            raise DataError("the training set is empty; expected at least one example")
        self.dataset, self.batch_size, self.collate_fn = dataset, batch_size, collate_fn or default_collate
        self.seed, self.workers = seed, workers
        self.batches_per_epoch = -(-len(dataset) // batch_size)
        self._epochs = epochs
        self.position = 0
        self._pruning: ExamplePruning | None = None

    def prune(self, pruning: ExamplePruning) -> None:
        """Has batches hold only what is kept of them; what is skipped is not loaded."""
        pruning.begin(len(self.dataset))
        self._pruning = pruning

    @property
    def total_batches(self) -> int:
        """Batches until the stream ends."""
        if self._epochs is None:
            raise DataError("an endless stream has no number of batches; give it epochs")
        return max(1, round(self.batches_per_epoch * self._epochs))

    @property
    def epoch(self) -> int:
        """Epoch of the batch handed out last (0 before the first)."""
        return max(0, self.position - 1) // self.batches_per_epoch

    def order(self, epoch: int) -> list[int]:
        """The ids of an epoch's examples."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order, variants = torch.randperm(len(self.dataset), generator=generator), number_of_variants(self.dataset)
        if variants > 1:
            order += len(order) * torch.randint(variants, (len(order),), generator=generator)
        return order.tolist()

    def indices(self, start: int = 0) -> Iterator[list[int]]:
        """The ids of each batch from position `start` on, without loading anything."""
        order, position = [], start
        while self._epochs is None or position < self.total_batches:
            epoch, batch = divmod(position, self.batches_per_epoch)
            if batch == 0 or not order:
                order = self.order(epoch)
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]
            position += 1

    def __iter__(self) -> Iterator[IndexedBatch]:
        """From the current position on; `position` counts batches handed out."""
        if self._pruning is not None:
            yield from self._pruned(self._pruning)
            return
        following = self.indices(self.position + 1)
        for batch in self._loader_of(_Indices(self, self.position), seed=self.seed):
            self.position += 1
            yield replace(batch, following=tuple(next(following, ())))

    def _pruned(self, pruning: ExamplePruning) -> Iterator[IndexedBatch]:
        """An epoch at a time, each decided once the one before was trained on: a loader may run ahead of training."""
        while self._epochs is None or self.position < self.total_batches:
            epoch, place = divmod(self.position, self.batches_per_epoch)
            pruning.begin_epoch(epoch)
            nominal = islice(self.indices(self.position), self.batches_per_epoch - place)
            kept = [pruning.kept(ids) for ids in nominal]
            loader = self._loader_of([list(rows.ids) for rows in kept], seed=self.seed + epoch)
            for batch, rows, following in zip(loader, kept, [*kept[1:], None], strict=True):
                was_over = pruning.has_ended()
                self.position += 1
                yield replace(batch, kept=rows, following=() if following is None else tuple(following.ids))
                if pruning.has_ended() and not was_over:
                    break  # from here on nothing is skipped: the rest of the epoch was chosen otherwise

    def _loader_of(self, batches: Iterable[Sequence[int]], *, seed: int) -> DataLoader[Any]:
        # A loader draws its workers' seed from the global generator: given one of its own, it leaves that alone.
        return DataLoader(
            cast("Any", _WithIds(self.dataset)), batch_sampler=cast("Any", batches), num_workers=self.workers,
            collate_fn=_CollateWithIds(self.collate_fn), generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip

    def of(self, indices: Sequence[int]) -> BatchStream:
        """A stream like this one, from its beginning, of these examples alone."""
        return BatchStream(
            Subset(self.dataset, indices), batch_size=self.batch_size, collate_fn=self.collate_fn, epochs=self._epochs,
            seed=self.seed, workers=self.workers,
        )  # fmt: skip

    def load(self, indices: Sequence[int]) -> Any:
        """One collated batch of the given examples."""
        return self.collate_fn([self.dataset[index] for index in indices])


class Subset:
    """A dataset of some positions of another, in all their variants."""

    def __init__(self, dataset: SizedDataset, indices: Sequence[int]) -> None:
        self._dataset, self._indices = dataset, indices
        self.variants = number_of_variants(dataset)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        variant, place = divmod(index, len(self))
        if not 0 <= variant < self.variants:
            raise IndexError(f"expected a position below {self.variants * len(self)}, found {index}")
        return self._dataset[self._indices[place] + variant * len(self._dataset)]


class _Indices:
    """A batch sampler over a stream's order (a loader wants something that can be iterated anew)."""

    def __init__(self, stream: BatchStream, start: int) -> None:
        self._stream, self._start = stream, start

    def __iter__(self) -> Iterator[list[int]]:
        return self._stream.indices(self._start)


class _WithIds:
    def __init__(self, dataset: SizedDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self._dataset[index]


class _CollateWithIds:
    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self._collate_fn = collate_fn

    def __call__(self, examples: list[tuple[int, Any]]) -> IndexedBatch:
        return IndexedBatch(ids=tuple(index for index, _ in examples), batch=self._collate_fn([e for _, e in examples]))

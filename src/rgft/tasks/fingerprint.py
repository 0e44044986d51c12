"""What a run is made from: a fingerprint of each split, of the classes and of the tokenizer, which shows any change."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rgft.batches import SizedDataset, number_of_variants
from rgft.errors import DataError
from rgft.tasks.base import PreparedTask

#: Split, or `judged_on` → number of its examples and their fingerprint.
Data = dict[str, dict[str, Any]]

SPLITS = ("train", "validation", "test")


def data_of(task: PreparedTask) -> Data:
    """The splits of a task, as a result says them, and what it is judged on beside."""
    datasets = {part: getattr(task, part) for part in (*SPLITS, "judged_on")}
    return {split: part_of(dataset) for split, dataset in datasets.items() if dataset is not None}


def part_of(dataset: SizedDataset) -> dict[str, Any]:
    """The number of examples and their fingerprint."""
    return {"examples": len(dataset), "sha256": fingerprint(dataset)}


def inputs_of(task: PreparedTask) -> dict[str, Any]:
    """What a run is made from beside its settings, fit for JSON: splits, class names, tokenizer or image processor."""
    return {
        "splits": data_of(task), "classes": list(task.label_names), "processor": _processor_fingerprint(task.processor)
    }  # fmt: skip


def require_same_inputs(then: Mapping[str, Any], task: PreparedTask, where: str) -> None:
    """Refuses to go on with a run on other inputs than it was started with.

    Args:
        then: `inputs_of` its task when it was started.
        task: what it would go on with.
        where: the run, for messages.

    Raises:
        DataError: naming all that differs.
    """
    now = inputs_of(task)
    about = {"train": "training data", "validation": "validation data", "test": "test data"}
    found = [
        f"{about[split]} ({said(then['splits'].get(split))} then, {said(now['splits'].get(split))} now)"
        for split in SPLITS
        if then["splits"].get(split) != now["splits"].get(split)
    ]
    if list(then["classes"]) != now["classes"]:
        found.append(f"classes ({_listed(then['classes'])} then, {_listed(now['classes'])} now)")
    if then["processor"] != now["processor"]:
        found.append("tokenizer or image processor")
    if found:
        raise DataError(
            f"{where}: the run was started on other inputs; what differs: {'; '.join(found)}. --resume goes on with "
            "the same ones: bring them back, or start anew in another folder"
        )


def said(split: Mapping[str, Any] | None) -> str:
    """A split in a message."""
    return "none" if split is None else f"{split['examples']} examples {str(split['sha256'])[:12]}"


def _listed(names: list[str]) -> str:
    return (", ".join(names[:10]) or "none") + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _processor_fingerprint(processor: Any) -> str | None:
    """SHA-256 of a tokenizer's vocabulary and of how it pads, or of an image processor's settings; None without one."""
    if hasattr(processor, "get_vocab"):
        # By content: the files of a tokenizer differ between versions of its library.
        vocabulary = sorted(processor.get_vocab().items(), key=lambda item: (item[1], repr(item[0])))
        padding = processor.pad_token_id, processor.padding_side
        return fingerprint([repr((vocabulary, padding, getattr(processor, "chat_template", None)))])
    return fingerprint([repr(processor.to_dict())]) if hasattr(processor, "to_dict") else None


def fingerprint(dataset: SizedDataset) -> str:
    """SHA-256 of a data set's examples in order: as a model sees them, or as the data set itself says (`fingerprint`).

    A data set that costs much to read, as of images, has an attribute `fingerprint`.
    """
    own = getattr(dataset, "fingerprint", None)
    if own is not None:
        return str(own)
    digest = hashlib.sha256()
    for index in range(len(dataset) * number_of_variants(dataset)):
        _add(digest, dataset[index])
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Adds a value, its kind and its size, so that no two different ones read alike."""
    if isinstance(value, Mapping):
        digest.update(f"mapping {len(value)};".encode())
        for key in sorted(value):
            _add(digest, str(key))
            _add(digest, value[key])
    elif isinstance(value, Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, (list, tuple)):
        digest.update(f"list {len(value)};".encode())
        if all(type(item) is int for item in value):  # token ids, of which there are many
            digest.update("".join(map(_whole_number, value)).encode())
            return
        for item in value:
            _add(digest, item)
    elif value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value).encode()
        digest.update(f"{type(value).__name__} {len(text)};".encode() + text)
    else:
        raise DataError(f"expected examples of numbers, texts, lists and tensors, found {type(value).__name__}")


@lru_cache(maxsize=2**18)
def _whole_number(value: int) -> str:
    text = repr(value)
    return f"int {len(text)};{text}"

"""What cached states depend on: the frozen prefix, and the content of an example."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rgft.components import Partition
from rgft.execution.disk_states import tensor_bytes

#: Raised when what is stored, or what it means, changes.
FORMAT = 1
#: Inputs of a model that its hidden states do not depend on.
_NOT_STATES = ("labels", "label", "label_ids")
#: Entries of a Transformers configuration that say where a model came from, and what its classes are called.
_NAMES = ("_name_or_path", "id2label", "label2id", "transformers_version", "problem_type", "architectures")


def prefix_fingerprint(model: nn.Module, partition: Partition, cut: int, storage: str) -> str:
    """Digest of all that the states at a cut depend on beside the example.

    Weights and buffers below the cut, the layers' structure, the model's configuration, the device's type, torch's
    version, and how states are stored. What lies above (other classifiers, other seeds) does not count.

    Args:
        model: plain or bound.
        partition: of it.
        cut: depth.
        storage: the stored type.
    """
    above_layers = tuple(f"{path}." for path in partition.layers[max(0, cut - 1) :])
    above = {part.parameter for c in partition if c.depth >= cut for part in c.slices}
    digest = hashlib.blake2b(digest_size=16)
    layers = [repr(model.get_submodule(path)) for path in partition.layers[: max(0, cut - 1)]]
    device = next(model.parameters()).device.type
    facts = [FORMAT, cut, storage, device, torch.__version__, layers, _configuration(model)]
    digest.update(json.dumps(facts, default=str, sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        if name not in above and not name.startswith(above_layers):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _configuration(model: nn.Module) -> Any:
    told = getattr(getattr(model, "config", None), "to_dict", dict)()
    return [type(model).__qualname__, {key: value for key, value in told.items() if key not in _NAMES}]


def row_digests(
    rows: int, args: Sequence[Any], kwargs: Mapping[str, Any], spans: Sequence[tuple[int, int]] | None
) -> list[bytes]:  # fmt: skip
    """Digest of what the model is given of each row: all batched tensors but labels, without padding.

    Args:
        rows: of the batch.
        args, kwargs: of the model's forward.
        spans: (offset, length) of each row's tokens; None: rows are used whole.
    """
    named = [(str(place), value) for place, value in enumerate(args)] + sorted(kwargs.items())
    inputs = [
        (name, value.detach().cpu())
        for name, value in named
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows and name not in _NOT_STATES
    ]  # fmt: skip
    width = _width(kwargs) if spans is not None else None
    digests: list[bytes] = []
    for row in range(rows):
        digest = hashlib.blake2b(digest_size=16)
        for name, value in inputs:
            part = value[row]
            if spans is not None and part.dim() and part.shape[0] == width:
                offset, length = spans[row]
                part = part[offset : offset + length]
            digest.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
            digest.update(tensor_bytes(part))
        digests.append(digest.digest())
    return digests


def _width(kwargs: Mapping[str, Any]) -> int | None:
    mask = kwargs.get("attention_mask")
    return mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else None

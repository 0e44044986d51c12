"""What cached states depend on: the frozen prefix, and the content of an example."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rgft.components import Partition
from rgft.execution.disk_states import tensor_bytes
from rgft.execution.pairs import CHILD, LowRankPairs

#: Raised when what is stored, or what it means, changes.
FORMAT = 2
#: Attributes that every module has, hooks and modes among them.
_TORCHS_OWN = frozenset(vars(nn.Module()))
#: Inputs of a model that its hidden states do not depend on (encoder–decoder models, whose do, are not cached).
_NOT_STATES = ("labels", "label", "label_ids", "num_items_in_batch")
#: Entries of a Transformers configuration that say where a model came from, and what its classes are called.
_NAMES = ("_name_or_path", "id2label", "label2id", "transformers_version", "problem_type", "architectures")


def prefix_fingerprint(model: nn.Module, partition: Partition, cut: int, storage: str) -> str:
    """Digest of all that the states at a cut depend on beside the example.

    Weights and buffers below the cut, the modules' classes, code and plain attributes, the model's configuration, the
    device's type, torch's version, and how states are stored. What lies above (other classifiers, other seeds) does
    not count. What a forward pass takes from elsewhere (a global, a closure) is not seen.

    Args:
        model: plain or bound.
        partition: of it.
        cut: depth.
        storage: the stored type.
    """
    above = {part.parameter for c in partition if c.depth >= cut for part in c.slices}
    outside = [f"{path}." for path in partition.layers[max(0, cut - 1) :]]
    outside += [f"{path}." for path in _modules_of(model, above)]

    def is_below(name: str) -> bool:
        return name not in above and not f"{name}.".startswith(tuple(outside))

    digest = hashlib.blake2b(digest_size=16)
    found = [(path, module) for path, module in model.named_modules() if is_below(path)]
    modules = [(path, _described(module)) for path, module in found if not isinstance(module, LowRankPairs)]
    device = next(model.parameters()).device.type
    facts = [FORMAT, cut, storage, device, torch.__version__, modules, _configuration(model)]
    digest.update(_text(facts).encode())
    tensors = {**model.state_dict(), **dict(model.named_buffers())}  # some buffers are in no state_dict
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, Tensor) and is_below(name):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor))
    for path, module in found:  # a state has pairs merged: computed beside their weights, they differ in the last bits
        for a, b in module.running() if isinstance(module, LowRankPairs) else ():
            digest.update(path.encode() + tensor_bytes(a.detach()) + tensor_bytes(b.detach()))
    return digest.hexdigest()


def _text(value: Any) -> str:
    """Plain values as text that is the same in every process, which the order of a set is not."""

    def told(item: Any) -> Any:
        return sorted(map(repr, item)) if isinstance(item, set | frozenset) else str(item)

    return json.dumps(value, default=told, sort_keys=True)


def _modules_of(model: nn.Module, parameters: set[str]) -> list[str]:
    """Modules all of whose parameters are among `parameters`: classifiers, say, with their attributes."""
    found: list[str] = []
    for path, module in model.named_modules():
        names = [f"{path}.{name}" for name, _ in module.named_parameters() if f".{CHILD}." not in f".{name}"]
        if path and names and parameters.issuperset(names):
            found.append(path)
    return found


def _described(module: nn.Module) -> list[Any]:
    """Class, code of its forward, and attributes that are plain values."""
    code = getattr(type(module).forward, "__code__", None)
    told = "" if code is None else hashlib.blake2b(code.co_code + repr(code.co_names).encode()).hexdigest()
    plain = {
        key: value for key, value in vars(module).items()
        if not key.startswith("_rgft") and key not in _TORCHS_OWN and _is_plain(value)
    }  # fmt: skip
    return [type(module).__name__, told, plain]


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float | bool)


def _configuration(model: nn.Module) -> Any:
    told = getattr(getattr(model, "config", None), "to_dict", dict)()
    return {key: value for key, value in told.items() if key not in _NAMES}


def row_digests(
    rows: int, args: Sequence[Any], kwargs: Mapping[str, Any], spans: Sequence[tuple[int, int]] | None
) -> list[bytes]:  # fmt: skip
    """Digest of what the model is given of each row, without padding, and of the precision that it computes in.

    All tensors but labels count, also in nested mappings and sequences: of batched ones the row, others whole; and
    plain values.

    Args:
        rows: of the batch.
        args, kwargs: of the model's forward.
        spans: (offset, length) of each row's tokens; None: rows are used whole.
    """
    inputs = sorted(_leaves("", {**{str(place): value for place, value in enumerate(args)}, **kwargs}))
    width = _width(kwargs) if spans is not None else None
    shared = hashlib.blake2b(f"{_precision()}".encode(), digest_size=16)
    batched: list[tuple[str, Tensor]] = []
    for name, value in inputs:
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows:
            batched.append((name, value.detach().cpu()))
        elif isinstance(value, Tensor):
            shared.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + tensor_bytes(value))
        else:
            shared.update(f"{name} {_text(value)}".encode())
    digests: list[bytes] = []
    for row in range(rows):
        digest = shared.copy()
        if spans is not None:
            digest.update(f"from {spans[row][0]}".encode())
        for name, value in batched:
            part = value[row]
            if spans is not None and part.dim() and part.shape[0] == width:
                offset, length = spans[row]
                part = part[offset : offset + length]
            digest.update(f"{name} {part.dtype} {tuple(part.shape)}".encode() + tensor_bytes(part))
        digests.append(digest.digest())
    return digests


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key not in _NOT_STATES:
                yield from _leaves(f"{path}.{key}", item)
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _leaves(f"{path}.{place}", item)
    elif isinstance(value, Tensor) or _is_plain(value):
        yield path, value


def _precision() -> list[str]:
    devices = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    return [
        torch.get_float32_matmul_precision(), *(f"{device} {torch.get_autocast_dtype(device)}" for device in devices)
    ]  # fmt: skip


def _width(kwargs: Mapping[str, Any]) -> int | None:
    mask = kwargs.get("attention_mask")
    return mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else None

"""Elements written by everything that is no product: activation functions, norms, residuals, masks, dropout, casts.

Such work is bound by memory, not by arithmetic, and is a fifth to a third of a step's time though FLOPs do not show it.
So are products with a narrow side (low-rank pairs', adapters'), which count here with what they read and write, beside
their FLOPs. Random numbers, which dropout draws, and large tensors, whose pages the system hands out anew, are dearer
by an order of magnitude and stand apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rgft.cost.counting import is_product
from rgft.nested import tensors_in

#: A product with a side below this many elements does too little with what it reads to be bound by arithmetic.
NARROW = 32
#: Bytes of a tensor from which on an allocator gives its memory back at once (glibc's largest threshold), so that the
#: next such tensor is of pages that the system has to clear first.
FRESH_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class Elements:
    """How many elements work writes.

    Attributes:
        written: by whatever is no product, into memory that is used again and again.
        drawn: random numbers.
        fresh: of large tensors (`FRESH_BYTES`), products' among them.
    """

    written: float = 0
    drawn: float = 0
    fresh: float = 0

    def __add__(self, other: Elements) -> Elements:
        return Elements(
            written=self.written + other.written, drawn=self.drawn + other.drawn, fresh=self.fresh + other.fresh
        )

    def __mul__(self, times: float) -> Elements:
        return Elements(written=self.written * times, drawn=self.drawn * times, fresh=self.fresh * times)


class ElementCounter(TorchDispatchMode):
    """Counts, inside, the elements that operators write, but for products and the optimizer's fused lists.

    Memory that is only reserved is not written.

    Attributes:
        elements: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements = Elements()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name: str = func._schema.name
        # Attention is products and more: what it writes counts.
        is_attention = "scaled_dot_product" in name
        if name.startswith(("aten::_foreach", "aten::_fused", "aten::empty", "aten::new_empty")):
            return output
        if is_product(func) and not is_attention:
            fresh = sum(tensor.numel() for tensor in tensors_in(output) if tensor.nbytes >= FRESH_BYTES)
            self.elements += Elements(written=max(0, _of_narrow(tensors_in(args), output) - fresh), fresh=fresh)
            return output
        is_in_place = any(argument.alias_info is not None and argument.alias_info.is_write for argument in
                          func._schema.arguments)  # fmt: skip
        read = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs or {}))}
        made = [
            tensor for tensor in tensors_in(output)
            if is_in_place or tensor.untyped_storage()._cdata not in read  # else a view
        ]  # fmt: skip
        large = [] if is_in_place else [tensor for tensor in made if tensor.nbytes >= FRESH_BYTES]
        fresh = sum(tensor.numel() for tensor in large)
        others = sum(tensor.numel() for tensor in made) - fresh
        is_random = not is_attention and torch.Tag.nondeterministic_seeded in func.tags
        self.elements += Elements(fresh=fresh, **{"drawn" if is_random else "written": others})
        return output


def _of_narrow(operands: Iterable[Tensor], output: Any) -> int:
    """Elements that a matrix product reads and writes, if a side of it is narrow; else 0."""
    matrices = [tensor for tensor in operands if tensor.dim() in (2, 3)][-2:]
    if len(matrices) < 2 or not isinstance(output, Tensor):
        return 0
    (*_, rows, inner), (*_, columns) = matrices[0].shape, matrices[1].shape
    if min(rows, inner, columns) >= NARROW:
        return 0
    return output.numel() + sum(matrix.numel() for matrix in matrices)


class FusedAttention(TorchFunctionMode):
    """Stands in for attention, inside, where kernels are only imagined.

    On the meta device `scaled_dot_product_attention` falls apart into products and a softmax over all pairs of tokens,
    which no kernel that will be used writes out. Here it writes its output, and its gradient that of the queries.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
        return query[..., :1] * value.new_ones(value.shape[-1]) + (key.sum() + value.sum())


def count_elements(work: Callable[[], object]) -> Elements:
    """Elements that `work` writes, see `ElementCounter`; it makes the work once."""
    with ElementCounter() as counter:
        work()
    return counter.elements

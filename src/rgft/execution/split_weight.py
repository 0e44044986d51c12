"""A weight that several components share: the fused parameter, and the view parameters that tile it.

The fused parameter is the model's own and is never replaced; each view is an `nn.Parameter` over a range of it along
one dimension, sharing its memory and its version counter. Views are what optimizers, clipping and accumulation see; the
fused tensor is what the forward multiplies with.

The weight keeps the memory layout that the model gave it, unless something needs every slice as one block of memory
(`make_slices_dense`, for fused optimizer kernels). Shapes and values are the same in both, and `lay_back` undoes it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rgft.errors import PartitionError

#: Half-open range along the split dimension.
Range = tuple[int, int]


class SplitWeight:
    """One fused parameter and its views.

    Args:
        name: as in `model.named_parameters()`.
        fused: the model's parameter.
        dim: dimension that the ranges divide.
        ranges: sorted; together they must cover the dimension once.

    Raises:
        PartitionError: the ranges leave a gap or overlap, or the parameter cannot be trained in slices.

    Attributes:
        views: one parameter per range; they inherit `requires_grad`.
        data: the fused values without gradient, an alias of all views together.
    """

    def __init__(self, name: str, fused: nn.Parameter, dim: int, ranges: tuple[Range, ...]) -> None:
        unusual = fused.layout is not torch.strided or is_traceable_wrapper_subclass(fused)
        if not fused.is_floating_point() or unusual:
            raise PartitionError(
                f"{name!r} is a {type(fused).__name__} of {fused.dtype}, {fused.layout}; only plain floating-point "
                "parameters can be trained in slices. Give it to one component as a whole"
            )
        edges = [(0, 0), *ranges, (fused.shape[dim], fused.shape[dim])]
        wrong = [(before[1], after[0]) for before, after in pairwise(edges) if before[1] != after[0]]
        if wrong:
            raise PartitionError(
                f"{name!r}: expected slices that cover dimension {dim} of {tuple(fused.shape)} once; found a gap or an "
                f"overlap between positions {wrong[0][0]} and {wrong[0][1]}"
            )
        self.name = name
        self.fused = fused
        self.dim = dim
        self.ranges = ranges
        self.data: Tensor = fused.detach()
        self.views = [nn.Parameter(self._part(r), requires_grad=fused.requires_grad) for r in ranges]
        self._own_stride: tuple[int, ...] | None = None
        self._dense_stride: tuple[int, ...] | None = None  # with which each view is known to be one block
        self._pickled: weakref.ref[nn.Parameter] | None = None

    def _part(self, span: Range) -> Tensor:
        return self.data.narrow(self.dim, span[0], span[1] - span[0])

    def active(self) -> list[tuple[Range, nn.Parameter]]:
        """Ranges and views that require gradients, in order."""
        return [pair for pair in zip(self.ranges, self.views, strict=True) if pair[1].requires_grad]

    def realias(self, fused: nn.Parameter, convert: Callable[[Tensor], Tensor] | None = None) -> None:
        """Puts the views over `fused`, in place: optimizers keep the parameters they have.

        Args:
            fused: the fused parameter after a move, cast or assignment.
            convert: applied to the views' gradients, so that these move along.
        """
        self.fused = fused
        self.data = fused.detach()
        for span, view in zip(self.ranges, self.views, strict=True):
            gradient, view.grad = view.grad, None
            view.data = self._part(span)
            if gradient is not None:
                view.grad = gradient if convert is None else convert(gradient)

    @property
    def is_laid_out_anew(self) -> bool:
        """Whether the weight is stored otherwise than the model had it."""
        return self._own_stride is not None and self.fused.stride() != self._own_stride

    def make_slices_dense(self) -> None:
        """Stores the weight anew, so that each view is one block of memory; it stays the same parameter."""
        if self.fused.stride() == self._dense_stride:
            return
        # `empty_like` keeps the strides of what has no gaps.
        if any(torch.empty_like(view, device="meta").stride() != view.stride() for view in self.views):
            self._own_stride = self.fused.stride()
            # New memory: whoever holds the old one (a graph, a state_dict) still reads there what it read.
            self.fused.data = self.data.movedim(self.dim, 0).contiguous().movedim(0, self.dim)
            self.realias(self.fused)
        self._dense_stride = self.fused.stride()

    def lay_back(self) -> None:
        """Stores the weight as the model had it. The views stay on the memory they have, which is nobody's then.

        A fused optimizer that goes on stepping them harms nothing.
        """
        if self.is_laid_out_anew:
            self.fused.data = self.in_own_layout()
            self.data = self.fused.detach()

    def in_own_layout(self) -> Tensor:
        """The values as the model stored them: an alias, or a copy where slices were made dense."""
        if not self.is_laid_out_anew:
            return self.data
        assert self._own_stride is not None
        own = torch.empty_strided(
            self.data.size(), self._own_stride, dtype=self.data.dtype, device=self.data.device
        )  # fmt: skip
        return own.copy_(self.data)

    def to_pickle(self) -> nn.Parameter:
        """The parameter that stands for the fused one in a pickle: itself, or a copy where slices were made dense.

        Modules that share the weight get the same copy while one of them holds it.
        """
        if not self.is_laid_out_anew:
            return self.fused
        known = self._pickled() if self._pickled is not None else None
        if known is None or known.device != self.data.device or not torch.equal(known, self.data):
            known = nn.Parameter(self.in_own_layout(), requires_grad=self.fused.requires_grad)
            self._pickled = weakref.ref(known)
        return known

    def problems(self) -> list[str]:
        """What is wrong with the views' memory; empty when all of them alias the fused weight."""
        if self.data.data_ptr() != self.fused.data_ptr() or self.data.dtype != self.fused.dtype:
            return [f"{self.name!r}: the weight's memory was replaced"]
        start = self.fused.data_ptr()
        step = self.fused.stride(self.dim) * self.fused.element_size()
        found = []
        for span, view in zip(self.ranges, self.views, strict=True):
            same = (
                view.data_ptr() == start + span[0] * step
                and view.dtype == self.fused.dtype
                and view.stride() == self.fused.stride()
                and view.shape[self.dim] == span[1] - span[0]
            )
            if not same and view.numel() > 0:
                found.append(f"{self.name!r}, {span[0]}:{span[1]} of dimension {self.dim}: memory of its own")
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> SplitWeight:
        twin = object.__new__(SplitWeight)
        memo[id(self)] = twin
        twin.name, twin.dim, twin.ranges = self.name, self.dim, self.ranges
        # A module's views were copied with its `_parameters`; the memo hands out those same copies.
        twin.views = [copy.deepcopy(view, memo) for view in self.views]
        # The layout is copied too (an optimizer copied along may need it) and is the copy's own: nothing undoes it.
        twin._own_stride = twin._dense_stride = twin._pickled = None
        twin.realias(copy.deepcopy(self.fused, memo))
        return twin

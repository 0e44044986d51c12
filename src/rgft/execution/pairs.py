"""Low-rank pairs beside a linear layer's weight: W + s · B A, computed as x Wᵀ + s · (x Aᵀ) Bᵀ (LoRA, Hu et al. 2021).

A pair belongs to a whole weight, or to a slice of it: to some rows of q/k/v (then its product goes to these outputs) or
to some columns of an output projection (then it reads these inputs). Pairs of one weight are computed together, those
of neighbouring slices of equal size in one batched product. All of it is plain autograd: dX flows through both terms,
and backward keeps x and x Aᵀ.

Shapes: N rows (all leading dimensions folded), I inputs, O outputs, R rank, P pairs of a run, D inputs or outputs of
one of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgft.components import ParameterSlice
from rgft.execution.linear import Layout

#: Name of the child that holds a module's pairs.
CHILD = "low_rank"

#: A pair to be computed: where its slice begins and ends, A [R, I or D], B [O or D, R].
Placed = tuple[int, int, Tensor, Tensor]


class LowRankPairs(nn.Module):
    """The pairs of one linear module, as a child of it: moved, cast and copied along, shown by `named_parameters`, and
    in no `state_dict`, whose weights are merged instead (`attach`).

    Args:
        layout: how the module keeps its weight.
        dim: dimension of the weight that its slices divide; None: it has one pair, for all of it.
        scale: s.

    Attributes:
        is_running: by pair, whether it is computed; what was never trained has B = 0 and need not be.
        is_inside: whether the module's forward computes them itself (`forward_with_pairs`), and its hook does not.
    """

    def __init__(self, layout: Layout, dim: int | None, scale: float) -> None:
        super().__init__()
        self.layout, self.dim, self.scale = layout, dim, scale
        self.spans: list[tuple[int, int]] = []
        self.names: list[tuple[str, str]] = []
        self.is_running: list[bool] = []
        self.is_inside = False

    def add(self, stem: str, part: ParameterSlice, a_RI: Tensor, b_OR: Tensor) -> int:
        """Registers the pair of a slice; returns its place among them."""
        names = (f"{stem}_a_weight", f"{stem}_b_weight")
        for name, value in zip(names, (a_RI, b_OR), strict=True):
            self.register_parameter(name, nn.Parameter(value))
        self.names.append(names)
        self.spans.append((part.start, part.stop))
        self.is_running.append(False)
        return len(self.names) - 1

    def pair(self, place: int) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B."""
        a, b = (self._parameters[name] for name in self.names[place])
        assert a is not None
        assert b is not None
        return a, b

    def running(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """A and B of those that are computed."""
        return [self.pair(place) for place, is_on in enumerate(self.is_running) if is_on]

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """What the module gives with its pairs.

        Args:
            x: [..., I], what it was given.
            y: [..., O], what it gave.
        """
        placed: list[Placed] = [
            (*self.spans[place], *self.pair(place)) for place, is_on in enumerate(self.is_running) if is_on
        ]  # fmt: skip
        if not placed:
            return y
        if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
            placed = [(start, stop, a.to(x.dtype), b.to(x.dtype)) for start, stop, a, b in placed]
        x_NI, y_NO = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        placed.sort(key=lambda pair: pair[0])
        # Apart: joined with one that is trained, a frozen pair would get gradients, too.
        for together in ([p for p in placed if p[3].requires_grad], [p for p in placed if not p[3].requires_grad]):
            if together and self.dim == self.layout.output_dim:
                y_NO = _into_outputs(x_NI, y_NO, together, self.scale)
            elif together:
                y_NO = _from_inputs(x_NI, y_NO, together, self.scale, is_whole=self.dim is None)
        return y_NO.view(y.shape)

    @torch.no_grad()
    def delta(self, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        """What a pair adds to its slice of the weight, in the weight's layout; in fp32 at least."""
        wide = torch.promote_types(a_RI.dtype, torch.float32)
        delta_OI = self.scale * (b_OR.to(wide) @ a_RI.to(wide))
        return delta_OI if self.layout.output_dim == 0 else delta_OI.t()

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """A copy of the weight with the pairs in it; itself where none is in force."""
        if not any(self.is_running):
            return weight
        merged = weight.detach().clone()
        for place, (start, stop) in enumerate(self.spans):
            if self.is_running[place]:
                part = merged if self.dim is None else merged.narrow(self.dim, start, stop - start)
                add_to(part, self.delta(*self.pair(place)))
        return merged

    @torch.no_grad()
    def forget(self) -> None:
        """B = 0: the weight alone counts."""
        for place in range(len(self.names)):
            self.pair(place)[1].zero_()

    # ---------------------------------------------------------------- nothing of it is saved with the model

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        return OrderedDict() if destination is None else destination

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        return


@torch.no_grad()
def add_to(weight: Tensor, delta: Tensor) -> None:
    """Adds in the wider of both types, and rounds once."""
    weight.copy_(weight.to(torch.promote_types(weight.dtype, delta.dtype)) + delta)


def _into_outputs(x_NI: Tensor, y_NO: Tensor, placed: Sequence[Placed], scale: float) -> Tensor:
    """Pairs of slices of the outputs: one product for all A, one batched product for each run of B."""
    rank = placed[0][2].shape[0]
    h_NR = F.linear(x_NI, torch.cat([a for _, _, a, _ in placed]) if len(placed) > 1 else placed[0][2]) * scale
    pieces: list[Tensor] = []
    end = used = 0
    for run in _runs(placed):
        start, stop, count = run[0][0], run[-1][1], len(run)
        h_NPR = h_NR[:, used : used + count * rank].unflatten(1, (count, rank))
        b_PDR = torch.stack([b for _, _, _, b in run])
        delta_NPD = torch.bmm(h_NPR.transpose(0, 1), b_PDR.transpose(1, 2)).transpose(0, 1)
        pieces += [y_NO[:, end:start]] if start > end else []
        pieces.append(y_NO[:, start:stop] + delta_NPD.flatten(1))
        end, used = stop, used + count * rank
    pieces += [y_NO[:, end:]] if end < y_NO.shape[1] else []
    return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]


def _from_inputs(x_NI: Tensor, y_NO: Tensor, placed: Sequence[Placed], scale: float, *, is_whole: bool) -> Tensor:
    """Pairs of slices of the inputs, or of the whole weight: a batched product for each run of A, one for all B."""
    hidden: list[Tensor] = []
    for run in _runs(placed):
        start, stop, count = run[0][0], run[-1][1], len(run)
        if is_whole:
            hidden.append(F.linear(x_NI, run[0][2]))
            continue
        x_ND = x_NI if stop - start == x_NI.shape[1] else x_NI[:, start:stop].contiguous()  # a view would keep all of x
        if count == 1:
            hidden.append(F.linear(x_ND, run[0][2]))
            continue
        x_PND = x_ND.unflatten(1, (count, -1)).transpose(0, 1)
        a_PRD = torch.stack([a for _, _, a, _ in run])
        hidden.append(torch.bmm(x_PND, a_PRD.transpose(1, 2)).transpose(0, 1).flatten(1))
    h_NR = (torch.cat(hidden, 1) if len(hidden) > 1 else hidden[0]) * scale
    b_OR = torch.cat([b for _, _, _, b in placed], 1) if len(placed) > 1 else placed[0][3]
    return torch.addmm(y_NO, h_NR, b_OR.t())


def _runs(placed: Sequence[Placed]) -> list[list[Placed]]:
    """Pairs of neighbouring slices of equal size, in order."""

    def key(item: tuple[int, Placed]) -> tuple[int, int]:
        index, (start, stop, _, _) = item
        return stop - start, start - index * (stop - start)

    return [[pair for _, pair in run] for _, run in groupby(enumerate(placed), key)]


def attach(module: nn.Module, pairs: LowRankPairs) -> list[Any]:
    """Makes a linear module compute with its pairs; returns the handles that take it back (but for the child)."""
    module.add_module(CHILD, pairs)
    return [
        module.register_forward_hook(_compute, prepend=True, with_kwargs=True),
        module.register_state_dict_post_hook(_merge_saved),
        module.register_load_state_dict_pre_hook(_load_merged),
    ]


def _pairs_of(module: nn.Module) -> LowRankPairs | None:
    """Its own: a deep copy has a copy of them."""
    child = module._modules.get(CHILD)
    return child if isinstance(child, LowRankPairs) else None


def _compute(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
    pairs = _pairs_of(module)
    if pairs is None or pairs.is_inside:
        return None
    (x,) = (*args, *kwargs.values())
    return pairs.added(x, output)


def forward_with_pairs(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A module's forward that computes its pairs, if it has any, so that who skips it skips them, too.

    Hooks are not part of a forward: they run on what a skipped module hands on. Undone by `pairs_outside`.
    """
    if (holder := _pairs_of(module)) is None:
        return forward
    holder.is_inside = True

    def computed(*args: Any, **kwargs: Any) -> Any:
        output, pairs = forward(*args, **kwargs), _pairs_of(module)
        if pairs is None:  # hidden for a while
            return output
        (x,) = (*args, *kwargs.values())
        return pairs.added(x, output)

    return computed


def pairs_outside(module: nn.Module) -> None:
    """Has the module's hook compute its pairs again."""
    if (holder := _pairs_of(module)) is not None:
        holder.is_inside = False


def _merge_saved(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """What is saved is the weight that the module computes with; `keep_vars` asks for the parameter itself."""
    pairs, weight = _pairs_of(module), state.get(f"{prefix}weight")
    if pairs is not None and weight is not None and not isinstance(weight, nn.Parameter):
        state[f"{prefix}weight"] = pairs.merged(weight)


def _load_merged(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """What is loaded is all of the weight."""
    pairs = _pairs_of(module)
    if pairs is not None and f"{prefix}weight" in state:
        pairs.forget()

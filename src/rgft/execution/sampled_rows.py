"""Weight gradients of linear layers from a sample of a batch's positions.

dW = Σ_t dy_t x_tᵀ is a sum over positions t, a few of which make most of it. Of N positions k are drawn with
probabilities p_t ∝ ‖dy_t‖ ‖x_t‖ (at most 1: what would be above is taken for sure), and each one counts 1/p_t times.
The expectation is dW, and among all probabilities these leave the least variance (Drineas, Kannan & Mahoney, "Fast
Monte Carlo algorithms for matrices I", SIAM J. Comput. 2006, lemma 4; in training: Wang, Chen & Zhu, "Efficient
backpropagation with variance-controlled adaptive sampling", ICLR 2024). dX, biases, norms and embeddings are exact.

Modules are extended as those with split weights are: by a class of their own, from attaching to detaching.
"""

from __future__ import annotations

import copyreg
import math
from collections.abc import Collection
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from rgft.components import Partition
from rgft.cost.batch_shape import BatchShape
from rgft.cost.trace import TRACE_ROWS
from rgft.cost.undisturbed import undisturbed
from rgft.errors import AttachError
from rgft.execution.agreement import Loss
from rgft.execution.linear import DRAW, Draw, Layout, layout_of, sampled_linear
from rgft.execution.split_module import SplitModule

#: Rounds in which probabilities above 1 are cut, and the rest raised: with fewer positions to share than that leaves, a
#: few are drawn more often than needed, which is unbiased, too.
_ROUNDS = 6


class SampledRows:
    """Draws the positions that weight gradients are made from.

    Args:
        model: changed until `detach`.
        paths: of its modules.
        share: of the positions, in (0, 1].
        seed: of the draws, with the number of the step.

    Attributes:
        is_on: whether forwards in training mode, with gradients, draw in their backward pass.
    """

    def __init__(self, model: nn.Module, paths: Collection[str], share: float, seed: int) -> None:
        self.paths, self.share, self.is_on = tuple(paths), share, False
        self._seed, self._generator = seed, torch.Generator()
        self._modules = [model.get_submodule(path) for path in self.paths]
        for module in self._modules:
            module.__dict__[DRAW] = self
            layout = layout_of(module)
            if not isinstance(module, SplitModule) and isinstance(layout, Layout):
                module.__class__ = _sampling_class(type(module), layout)

    def begin_pass(self, step: int, number: int) -> None:
        """Draws from here on are those of a pass of a step, whatever was drawn before."""
        self._generator.manual_seed((self._seed * 1_000_003 + step) * 1_009 + number)

    def applies(self, module: nn.Module, x: Tensor) -> bool:
        """Whether a call's dW is made from a sample: not where there is one position of an example alone."""
        return self.is_on and module.training and torch.is_grad_enabled() and has_positions(x)

    def draw(self, x_NI: Tensor, dy_NO: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows, and how often each counts.

        Args:
            x_NI, dy_NO: inputs, and gradients of outputs.

        Returns:
            Indices and factors, each [k]; k = ⌈share · N⌉.
        """
        norms_N = x_NI.float().norm(dim=1) * dy_NO.float().norm(dim=1)
        uniform = float(torch.rand((), generator=self._generator))
        return drawn(norms_N, math.ceil(self.share * len(norms_N)), uniform)

    def detach(self) -> None:
        """Gives the modules their classes back.

        Raises:
            AttachError: another tool has changed a module's class since, and must take its change back first.
        """
        for module in self._modules:
            module.__dict__.pop(DRAW, None)
            if not isinstance(module, _Sampling):
                continue
            if type(module) is not _sampling_class(module.plain, module.layout):
                raise AttachError(
                    f"cannot detach from a {type(module).__name__}: its class was changed after RGFT was attached (by "
                    "parametrize, fully_shard, …); take that change back first"
                )
            cast("nn.Module", module).__class__ = module.plain
        self._modules.clear()


def drawn(scores_N: Tensor, count: int, uniform: float) -> tuple[Tensor, Tensor]:
    """A systematic sample: `count` of N rows, with probabilities in proportion to scores, and 1 over these.

    Args:
        scores_N: at least 0; if all are 0, all rows are alike.
        count: of draws, at least 1; those of one row that is drawn twice are two.
        uniform: in [0, 1): where the sample begins.

    Returns:
        Indices and factors, each [count].
    """
    largest = scores_N.max()
    # What scores nothing comes last, and not never: what the others leave of the sample is theirs.
    weights_N = torch.where(largest == 0.0, 1.0, scores_N + 1e-6 * largest)
    p_N = weights_N * (count / weights_N.sum())
    for _ in range(_ROUNDS):
        is_sure = p_N >= 1.0
        rest_N = weights_N.masked_fill(is_sure, 0.0)
        scale = (count - is_sure.sum()) / rest_N.sum().clamp_min(torch.finfo(rest_N.dtype).tiny)
        p_N = torch.where(is_sure, 1.0, rest_N * scale)
    p_N = p_N * (count / p_N.sum())
    exact = torch.float32 if p_N.device.type == "mps" else torch.float64
    ends_N = p_N.to(exact).cumsum(0)
    ends_N = ends_N * (count / ends_N[-1])
    places = torch.arange(count, device=p_N.device, dtype=exact) + uniform
    indices = torch.searchsorted(ends_N, places, right=True).clamp_max(len(p_N) - 1)
    return indices, 1.0 / p_N[indices]


def has_positions(x: Tensor) -> bool:
    """Whether a linear layer's input is that of several positions of an example: [B, …, T, I]."""
    return x.dim() >= 3 and x.shape[-2] > 1


def find_sampled(model: nn.Module, partition: Partition, batch: Any, loss: Loss) -> list[str]:
    """Paths of the modules whose dW may be made from a sample: linear ones in the layers that see several positions.

    Runs a forward pass on two rows of a batch, and leaves the model as it was.

    Args:
        model: plain.
        partition, batch, loss: of the run.
    """
    trained = {part.parameter for component in partition for part in component.slices}
    inside = tuple(f"{layer}." for layer in partition.layers)
    candidates = {
        path: module for path, module in model.named_modules()
        if path.startswith(inside) and f"{path}.weight" in trained and isinstance(layout_of(module), Layout)
    }  # fmt: skip
    seen: dict[str, bool] = {}

    def note(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            (x,) = (*args, *kwargs.values())
            seen[path] = seen.get(path, True) and isinstance(x, Tensor) and has_positions(x)

        return hook

    shape = BatchShape.of(batch)
    small = replace(shape, rows=min(shape.rows, TRACE_ROWS))
    handles = [m.register_forward_pre_hook(note(path), with_kwargs=True) for path, m in candidates.items()]
    try:
        with undisturbed(model), torch.no_grad():
            loss(model, shape.resize(batch, small))
    finally:
        for handle in handles:
            handle.remove()
    return [path for path in candidates if seen.get(path)]


class _Sampling(nn.Module):
    """Mixed into the class of plain linear modules."""

    plain: ClassVar[type[nn.Module]]
    layout: ClassVar[Layout]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The plain module's forward, bit for bit."""
        (x,) = (*args, *kwargs.values())
        draw: Draw = self.__dict__[DRAW]
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        if weight is None or not weight.requires_grad or not draw.applies(self, x):
            return super().forward(*args, **kwargs)
        return sampled_linear(x, self.layout, weight, bias, draw)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles, and copies, the plain module, which loads where RGFT is not installed."""
        state = dict(cast("dict[str, Any]", object.__reduce_ex__(self, 4)[2]))
        state.pop(DRAW, None)
        return copyreg._reconstructor, (self.plain, object, None), state  # type: ignore[attr-defined]


@cache
def _sampling_class(plain: type[nn.Module], layout: Layout) -> type[nn.Module]:
    about = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (_Sampling, plain), {**about, "plain": plain, "layout": layout})

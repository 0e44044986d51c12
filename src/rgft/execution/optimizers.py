"""Which optimizers can step slices of a weight: those whose step of an element depends on that element alone."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Container

from torch import nn, optim
from torch.optim import Optimizer

from rgft.errors import OptimizerError, RGFTWarning
from rgft.execution.binding import Binding

#: `torch.optim` classes (and their subclasses) whose step is elementwise.
ELEMENTWISE = (
    optim.SGD, optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam, optim.Adagrad, optim.Adadelta,
    optim.RMSprop, optim.Rprop, optim.ASGD,
)  # fmt: skip

#: Those of them whose fused kernels were found to write where their tensors are, when these are dense and alike.
WITH_FUSED_KERNELS = (optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad)

#: Other packages' classes, by package and name, whose step is elementwise.
ELEMENTWISE_ELSEWHERE = re.compile(r"^(lion_pytorch\.Lion|schedulefree\.(AdamW|SGD|RAdam)ScheduleFree)$")

#: Words in a class's or module's name, and why such an optimizer means something else on a slice.
_REASONS = {
    r"bitsandbytes|8bit|4bit|fp8|blockwise|paged": "writes through raw pointers or quantises its state in blocks",
    r"apex|deepspeed|fused": "writes through raw pointers",
    r"adafactor|came\b|sm3|adam_?mini": "keeps one statistic per row, column or block of the weight",
    r"muon|shampoo|soap|psgd|kfac": "preconditions the weight as a matrix",
    r"galore|apollo|fira|q_?galore": "projects the gradient of the whole matrix",
    r"lamb\b|lars\b": "scales each step by the norm of the whole parameter",
    r"lbfgs": "couples all parameters in one line search",
    r"lomo|badam": "steps outside of optimizer.step()",
}


def check_optimizer(optimizer: Optimizer, binding: Binding) -> None:
    """Refuses an optimizer that would step slices of weights wrongly. Call it at attach and before the first step.

    Whole parameters, and so layer granularity without any slice, go with every optimizer that steps without a closure.

    Args:
        optimizer: may be wrapped (Accelerate).
        binding: what it is to train.

    Raises:
        OptimizerError: `fused=True` of another optimizer than torch's own (`FusedKernels` prepares slices for those);
            one that writes by pointer, or whose step depends on more than the element; one made before the binding,
            which holds whole weights. All problems are in one message. One whose step needs a closure (LBFGS).

    Warns:
        RGFTWarning: the optimizer is not known to be elementwise.
    """
    optimizer = unwrapped(optimizer)
    _refuse_closures(optimizer)
    _refuse_shared_counts(optimizer, binding)
    views = sliced(binding)
    if not views:
        return
    problems = _stale_parameters(optimizer, views)
    problems += unknown_kernels(optimizer, views)
    kind = type(optimizer)
    problems += [
        f"{kind.__name__} {reason}, so that it changes meaning on slices of a weight" for reason in _reasons(kind)
    ]
    if problems:
        example = next(iter(views.values()))
        raise OptimizerError(
            f"the optimizer cannot train slices of weights (there are {len(views)}, e.g. {example!r}):\n  "
            + "\n  ".join(problems)
            + "\nuse torch's AdamW or another elementwise optimizer of torch.optim, or granularity='layer'"
        )
    if not is_elementwise(optimizer):
        warnings.warn(
            f"{kind.__name__} is not known to be elementwise. If the step of an element depends on others (matrix "
            "preconditioning, norms, blocks), it changes meaning on slices: then use granularity='layer'",
            RGFTWarning,
            stacklevel=2,
        )


def is_elementwise(optimizer: Optimizer) -> bool:
    """Whether the step of an element is known to depend on that element alone."""
    kind = type(unwrapped(optimizer))
    if _reasons(kind):
        return False
    is_known = any(ELEMENTWISE_ELSEWHERE.match(name) for name in _qualified(kind))
    return is_known or issubclass(kind, ELEMENTWISE)


def counts_in_groups(optimizer: Optimizer) -> bool:
    """Whether its groups hold running values (schedule-free: steps and sums of weights), not settings alone."""
    return any("train_mode" in group for group in optimizer.param_groups)


def _reasons(kind: type[Optimizer]) -> list[str]:
    """Why such an optimizer means something else on a slice."""
    described = " ".join(_qualified(kind)).lower()
    return [reason for pattern, reason in _REASONS.items() if re.search(pattern, described)]


def _qualified(kind: type[Optimizer]) -> list[str]:
    return [f"{base.__module__.partition('.')[0]}.{base.__qualname__}" for base in kind.__mro__]


def _refuse_closures(optimizer: Optimizer) -> None:
    """A step is made of one backward pass, whose cost was counted; a closure makes any number."""
    kind = type(optimizer)
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise OptimizerError(
            f"optimizer: expected one whose step() needs no closure, found {kind.__name__}, which computes loss and "
            "gradients again as often as it likes within a step, outside of plan and budget; use torch's AdamW or "
            "another optimizer that takes the gradients as they are"
        )


def _refuse_shared_counts(optimizer: Optimizer, binding: Binding) -> None:
    """Counts of steps belong to a component, which may be off while others step."""
    if not counts_in_groups(optimizer):
        return
    for index, group in enumerate(optimizer.param_groups):
        owners = {part for p in group["params"] if (part := binding.part_of(p)) is not None}
        if len(owners) > 1:
            first, second = sorted(owners)[:2]
            raise OptimizerError(
                f"{type(optimizer).__name__} counts steps in its groups, and group {index} holds several components "
                f"({first!r}, {second!r}, …), which need not be on together; use guide.make_optimizer('schedule-free', "
                "…), or groups of guide.param_groups(…, by='component')"
            )


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside its wrappers."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def sliced(binding: Binding) -> dict[nn.Parameter, str]:
    """Parameters that are less than a whole weight, and their names."""
    return {
        parameter: name
        for component, parameters in binding
        for parameter, part, name in zip(parameters, component.slices, binding.names[component.name], strict=True)
        if part.fraction < 1.0
    }


def _stale_parameters(optimizer: Optimizer, views: dict[nn.Parameter, str]) -> list[str]:
    starts = {view.data_ptr() for view in views if view.numel() > 0}  # a whole weight starts where its first view does
    held = [p for group in optimizer.param_groups for p in group["params"]]
    stale = [p for p in held if p not in views and p.numel() > 0 and p.data_ptr() in starts]
    if not stale:
        return []
    return [
        f"it holds {len(stale)} weights whole that are split now (e.g. of shape {tuple(stale[0].shape)}): it was made "
        "before RGFT was attached. Make it afterwards, from the model's parameters as they are then"
    ]


def unknown_kernels(optimizer: Optimizer, views: Container[nn.Parameter]) -> list[str]:
    """What is wrong with fused groups that hold slices, when it is not known where their kernel would write."""
    if isinstance(optimizer, WITH_FUSED_KERNELS):
        return []
    held = [p for group in optimizer.param_groups if group.get("fused") for p in group["params"] if p in views]
    if not held:
        return []
    known = ", ".join(kind.__name__ for kind in WITH_FUSED_KERNELS)
    return [
        f"{type(optimizer).__name__} has fused=True for {len(held)} slices, and may take them for whole weights in "
        f"memory; this is known of torch's {known} only. Pass fused=False"
    ]

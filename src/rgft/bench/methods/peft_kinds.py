"""What PEFT is told of a model: its task, which modules are new on it, and where adapters go."""

from __future__ import annotations

from typing import Any

from torch import nn

#: Modules that are new on a pre-trained model, as models of several families call them.
HEADS = ("classifier", "pooler", "score", "_fc")


def of_model(model: nn.Module) -> dict[str, Any]:
    """`task_type`, `modules_to_save` and `target_modules` of adapters on all products of the body.

    A decoder that generates has nothing new on it. Of a convolutional net the adapters are on the convolutions that
    mix channels: those of one channel each have no rank to be lowered. Of another model of images, which cuts them into
    patches by one convolution, they are on the linear layers below its head.
    """
    from peft import TaskType

    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(model, "generate"):
        task = TaskType.SEQ_2_SEQ_LM if config.is_encoder_decoder else TaskType.CAUSAL_LM
        return {"task_type": task, "target_modules": "all-linear"}
    heads = [name for name in HEADS if any(path.rpartition(".")[2] == name for path, _ in model.named_modules())]
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        mixing = [path for path, module in model.named_modules() if _mixes_channels(module)]
        return {"modules_to_save": heads, "target_modules": mixing or _linear_below(model, heads)}
    return {"task_type": TaskType.SEQ_CLS, "modules_to_save": heads, "target_modules": "all-linear"}


def _mixes_channels(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1 and module.in_channels > 4


def _linear_below(model: nn.Module, heads: list[str]) -> list[str]:
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not set(path.split(".")).intersection(heads)
    ]

"""PEFT modules, told by attributes and names alone, so that the core needs no PEFT."""

from __future__ import annotations

from torch import nn


def adapter_paths(model: nn.Module) -> set[str]:
    """Paths of the modules that carry adapters: PEFT's tuner layers and prompt encoders.

    All tuner layers have the attribute `adapter_layer_names`; a module of one's own becomes an adapter by having it
    too. PEFT's copies of whole modules (`modules_to_save`) have it as well and are no adapters: they stay what they are
    copies of.
    """
    return {
        path
        for path, module in model.named_modules()
        if path.rpartition(".")[2] == "prompt_encoder"
        or tuple(getattr(module, "adapter_layer_names", ("modules_to_save",))) != ("modules_to_save",)
    }


def adapter_of(parameter: str, paths: set[str]) -> tuple[str, str] | None:
    """Path of the innermost carrier whose own parameter this is, and the adapter's name; None for other parameters."""
    segments = parameter.split(".")
    for length in range(len(segments) - 1, 0, -1):
        path = ".".join(segments[:length])
        if path in paths:
            below = segments[length:]
            return None if below[0] == "base_layer" else (path, below[1] if len(below) > 1 else "")
    return None

"""Biases alone, or norms alone, with the classifier: no matrix of the body trains, so that no dW of one is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from rgft.architectures.patterns import find
from rgft.bench.methods.base import HEAD_AT_OWN_RATE, Change, Method
from rgft.bench.methods.peft_kinds import HEADS


def _is_bias(model: nn.Module, name: str) -> bool:
    return name.endswith("bias")


def _is_of_norm(model: nn.Module, name: str) -> bool:
    return "Norm" in type(find(model, name.rpartition(".")[0])).__name__


def training(chosen: Callable[[nn.Module, str], bool]) -> Change:
    """(model, settings) → the model of which only what is chosen by name trains, and its head."""

    def change(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(chosen(model, name) or any(part in HEADS for part in name.split(".")))
        return model

    return change


_COST = "dW of the body's matrices; dX runs to the bottom"

METHODS = (
    Method(
        name="bitfit", title="BitFit: biases alone", source="Ben Zaken et al. 2021 (arXiv:2106.10199)", cost=_COST,
        change=training(_is_bias), config={"preset": "full"}, instead=HEAD_AT_OWN_RATE, revision=2,
    ),
    Method(
        name="norm_tuning", title="norms alone", source="Zhao et al. 2023 (arXiv:2312.11420)", cost=_COST,
        change=training(_is_of_norm), config={"preset": "full"}, instead=HEAD_AT_OWN_RATE, revision=2,
    ),
)  # fmt: skip

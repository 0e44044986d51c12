"""The methods that are compared: how each prepares the model, and which configuration it runs under.

All methods run through the same loop (`rgft.run`), on the same batches, with the same optimizer kernel, schedule and
ledger; where a method cannot save compute, its ledger shows its true cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from torch import nn

from rgft.config import Config
from rgft.errors import ConfigError


def _unchanged(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    return model


def _with_lora(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """LoRA (Hu et al. 2022) on all linear layers of the body; the new classifier trains in full."""
    from peft import LoraConfig, TaskType, get_peft_model

    rank = settings.get("rank", 8)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=settings.get("alpha", 2 * rank), lora_dropout=0.0,
        target_modules="all-linear", modules_to_save=["classifier", "pooler"],
    )  # fmt: skip
    return get_peft_model(model, config)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of a comparison.

    Attributes:
        name: in experiments and tables.
        title: in words.
        config: RGFT settings, without budget and seed.
        prepare: (model, settings) → the model that is trained.
        changes_model: whether `prepare` wraps the model, so that full fine-tuning's FLOPs must come from the plain one.
    """

    name: str
    title: str
    config: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[nn.Module, Mapping[str, Any]], nn.Module] = _unchanged
    changes_model: bool = False

    def configuration(self, *, budget: float, seed: int, settings: Mapping[str, Any]) -> Config:
        """The configuration of one run; `settings["config"]` is laid over the method's own."""
        return Config.from_dict({**self.config, **settings.get("config", {}), "budget": budget, "seed": seed})


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(name="full", title="full fine-tuning", config={"preset": "full"}),
        Method(
            name="lora", title="LoRA", config={"preset": "full", "granularity": "adapter"}, prepare=_with_lora,
            changes_model=True,
        ),
        Method(name="rgft", title="RGFT"),
        Method(name="cut", title="fixed cut", config={"mask": {"name": "budget", "frozen_fraction": 0.5}}),
        Method(name="proposal_a", title="proposal A", config={"preset": "proposal_a"}),
        Method(name="proposal_b", title="proposal B", config={"preset": "proposal_b"}),
        Method(name="lisa", title="LISA", config={"policy": {"name": "lisa"}}),
    )
}  # fmt: skip


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        ConfigError: there is none; the message has the nearest.
    """
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=3) or sorted(METHODS)
        raise ConfigError(f"method: expected one of the bench's methods, found {name!r}; nearest: {', '.join(near)}")
    return METHODS[name]

"""Adapters through PEFT, on all linear layers of the body; pooler and classifier, which are new, train in full.

What an adapter does on weights alone (DoRA's norms of merged weights, the orthogonal matrices of OFT and BOFT) costs
the same for every batch, and is in the ledger once a pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from rgft.bench.methods.base import HEAD_AT_OWN_RATE, Change, Method, variants_of
from rgft.bench.methods.peft_kinds import of_model
from rgft.partition import partition

#: Of LoRA: alpha is twice the rank, and pairs are in all layers, unless it is said otherwise.
LORA = {"rank": 8, "alpha": None, "layers": None}
#: Ranks that LoRA and what is made of it are tuned over beside that.
RANKS = variants_of("rank", 4, 32)

_DW = "dW of the body's own weights; dX runs through it all, and adapters add their own work"


def wrapped(model: nn.Module, kind: str, **options: Any) -> nn.Module:
    """The model with adapters of a kind (the name of PEFT's configuration class, without `Config`)."""
    import peft

    config: Any = getattr(peft, f"{kind}Config")
    return peft.get_peft_model(model, config(**{**of_model(model), **options}))  # type: ignore[arg-type]


def with_lora(model: nn.Module, settings: Mapping[str, Any], **options: Any) -> nn.Module:
    """LoRA of `settings["rank"]` on all linear layers, or on those of the last `settings["layers"]` layers."""
    rank, alpha, layers = (settings[key] for key in LORA)
    where = {} if layers is None else {"target_modules": linear_in_last_layers(model, layers)}
    return wrapped(
        model, "Lora", r=rank, lora_alpha=2 * rank if alpha is None else alpha, lora_dropout=0.0, **where, **options
    )  # fmt: skip


def linear_in_last_layers(model: nn.Module, count: int) -> list[str]:
    """Paths of the linear modules of the last layers."""
    return [
        f"{layer}.{name}"
        for layer in partition(model).layers[-count:]
        for name, module in model.get_submodule(layer).named_modules()
        if isinstance(module, nn.Linear)
    ]


def lora(**options: Any) -> Change:
    """LoRA with PEFT's options."""
    return lambda model, settings: with_lora(model, settings, **options)


def _everywhere(kind: str) -> Change:
    """Adapters of a kind on all linear layers; the method's settings are PEFT's options."""
    return lambda model, settings: wrapped(model, kind, **settings)


def _with_ia3(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    return wrapped(model, "IA3", target_modules=None)  # PEFT's own for the model


def adapter(
    name: str, title: str, source: str, change: Change, *, cost: str = _DW, revision: int = 2, **more: Any
) -> Method:  # fmt: skip
    """A method that trains adapters, and nothing of the body beside."""
    return Method(
        name=name, title=title, source=source, change=change, cost=cost,
        config={"preset": "full", "granularity": "adapter", **more.pop("config", {})}, instead=HEAD_AT_OWN_RATE,
        revision=revision, **more,
    )  # fmt: skip


METHODS = (
    adapter("lora", "LoRA", "Hu et al. 2021 (arXiv:2106.09685)", lora(), settings=LORA, variants=RANKS),
    adapter(
        "rslora", "rsLoRA", "Kalajdzievski 2023 (arXiv:2312.03732)", lora(use_rslora=True), settings=LORA,
        variants=RANKS,
    ),
    adapter(
        "dora", "DoRA", "Liu et al. 2024 (arXiv:2402.09353)", lora(use_dora=True), settings=LORA,
        variants=RANKS,
        cost=f"{_DW}, once a pass the product of each pair for the norms of merged weights",
    ),
    adapter("ia3", "IA3", "Liu et al. 2022 (arXiv:2205.05638)", _with_ia3),
    # Shared random matrices of that rank, and vectors that train.
    adapter(
        "vera", "VeRA", "Kopiczko et al. 2023 (arXiv:2310.11454)", _everywhere("Vera"), settings={"r": 64},
        variants=variants_of("r", 16, 256, name="rank"),
    ),
    adapter(
        "oft", "OFT", "Qiu et al. 2023 (arXiv:2306.07280)", _everywhere("OFT"), settings={"r": 0, "oft_block_size": 32},
        variants=variants_of("oft_block_size", 16, 64, name="block"),
        cost=f"{_DW}, once a pass the orthogonal matrices",
    ),
    adapter(
        "boft", "BOFT", "Liu et al. 2023 (arXiv:2311.06243)", _everywhere("BOFT"),
        settings={"boft_block_size": 8, "boft_n_butterfly_factor": 1},
        variants=variants_of("boft_block_size", 4, 16, name="block"),
        cost=f"{_DW}, once a pass the product of whole weights with orthogonal matrices",
    ),
    # As many entries of each weight as LoRA of that rank has, drawn by lot.
    adapter(
        "shira", "SHiRA", "Bhardwaj et al. 2024 (arXiv:2406.13175)", _everywhere("Shira"), settings={"r": 8},
        variants=variants_of("r", 4, 32, name="rank"),
        cost="nothing: dW is made whole, and its entries are taken from it",
    ),
    adapter(
        "miss", "MiSS", "Kang and Yin 2024 (arXiv:2409.15371)", _everywhere("Miss"), settings={"r": 32},
        variants=variants_of("r", 8, 64, name="rank"),
    ),
    adapter(
        "lokr", "LoKr", "Yeh et al. 2023 (arXiv:2309.14859)", _everywhere("LoKr"), settings={"r": 32, "alpha": 32},
        variants={f"rank-{rank}": {"r": rank, "alpha": rank} for rank in (8, 64)},
    ),
    # What lies below the lowest adapter is a frozen prefix: no backward pass there, its output cached.
    adapter(
        "lora_top", "LoRA on the last layers, prefix cached", "Hu et al. 2021 (arXiv:2106.09685)", lora(),
        settings={**LORA, "layers": 3}, variants=RANKS,
        config={"policy": {"name": "all_on"}, "execution": {"cache": "auto"}},
        cost="dW of the body, dX and (cached) F below the lowest adapter",
    ),
)  # fmt: skip

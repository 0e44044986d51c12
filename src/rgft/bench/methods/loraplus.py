"""LoRA+: LoRA whose B, which begins at zero, has a higher learning rate than A."""

from __future__ import annotations

from torch.optim import Optimizer

from rgft.bench.methods.adapters import LORA, adapter, lora
from rgft.bench.methods.base import Rates, variants_of
from rgft.bench.optimizers.groups import taken_apart
from rgft.guide import Guide
from rgft.optimizer import adamw

#: λ, B's learning rate as a multiple of A's: the paper's 2⁴.
RATIO = 16.0


def _optimizer(guide: Guide, rates: Rates) -> Optimizer:
    ratio = rates.settings["ratio"]
    of_b = {id(p) for name, p in guide.model.named_parameters() if ".lora_B." in name}
    groups = guide.param_groups(lr=rates.lr, weight_decay=rates.weight_decay)
    apart = taken_apart(groups, lambda parameter: id(parameter) in of_b)
    return adamw([{**group, "lr": group["lr"] * (ratio if is_b else 1.0)} for group, is_b in apart], lr=rates.lr)


METHOD = adapter(
    "lora_plus", "LoRA+", "Hayou et al. 2024 (arXiv:2402.12354)", lora(), optimizer=_optimizer,
    settings={**LORA, "ratio": RATIO}, variants=variants_of("ratio", 4.0, 8.0),
)  # fmt: skip

"""GaLore: full fine-tuning with Adam in a low-rank subspace of each matrix's gradient; see `bench.optimizers.galore`.

Scale 4 is what the authors fine-tune encoders with; their 0.25 is for pre-training.
"""

from __future__ import annotations

from torch.optim import Optimizer

from rgft.bench.methods.base import Method, Rates
from rgft.bench.optimizers.galore import GaLoreAdamW
from rgft.guide import Guide


def _optimizer(guide: Guide, rates: Rates) -> Optimizer:
    return GaLoreAdamW(
        guide.param_groups(lr=rates.lr, weight_decay=rates.weight_decay, by="matrix"), lr=rates.lr,
        **rates.settings,
    )  # fmt: skip


METHOD = Method(
    name="galore", title="GaLore", source="Zhao et al. 2024 (arXiv:2403.03507)", config={"preset": "full"},
    settings={"rank": 8, "every": 200, "scale": 4.0}, optimizer=_optimizer,
    cost="nothing: memory alone is saved; projections and decompositions are added",
)  # fmt: skip

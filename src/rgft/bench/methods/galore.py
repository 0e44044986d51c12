"""GaLore: full fine-tuning with Adam in a low-rank subspace of each matrix's gradient; see `bench.optimizers.galore`.

Scale 4 is what the authors fine-tune encoders with; their 0.25 is for pre-training. Their projections are renewed every
some hundred steps of many thousand; short runs renew them five times.
"""

from __future__ import annotations

from torch.optim import Optimizer

from rgft.bench.methods.base import Method, Rates, steps_of, variants_of
from rgft.bench.optimizers.galore import GaLoreAdamW
from rgft.guide import Guide
from rgft.run import Run


def _optimizer(guide: Guide, rates: Rates) -> Optimizer:
    return GaLoreAdamW(
        guide.param_groups(lr=rates.lr, weight_decay=rates.weight_decay, by="matrix"), lr=rates.lr,
        **rates.settings,
    )  # fmt: skip


def _fit(run: Run) -> None:
    assert isinstance(run.optimizer, GaLoreAdamW)
    run.optimizer.over(steps_of(run))


METHOD = Method(
    name="galore", title="GaLore", source="Zhao et al. 2024 (arXiv:2403.03507)", config={"preset": "full"},
    settings={"rank": 8, "every": 0.2, "scale": 4.0}, variants=variants_of("rank", 4, 32),
    optimizer=_optimizer, begin=_fit, revision=2,
    cost="nothing: memory alone is saved; projections and decompositions are added",
)  # fmt: skip

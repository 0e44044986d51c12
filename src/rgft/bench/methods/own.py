"""Full fine-tuning, RGFT, and what RGFT is held against on its own ground."""

from __future__ import annotations

from rgft.bench.methods.base import Method

METHODS = (
    Method(name="full", title="full fine-tuning", config={"preset": "full"}),
    Method(name="rgft", title="RGFT"),
    # RGFT in everything but the choice of the cut.
    Method(name="cut", title="fixed cut", config={"mask": {"name": "budget", "frozen_fraction": 0.5}}),
    # RGFT's probes and its saving ways of acting, but components drawn by lot for a budget of half a step.
    Method(
        name="random",
        title="components by lot",
        config={"scaling": None, "mask": {"name": "random", "by": "flops", "q": 0.5}},
    ),
    Method(name="proposal_a", title="proposal A", config={"preset": "proposal_a"}),
    Method(name="proposal_b", title="proposal B", config={"preset": "proposal_b"}),
)

"""Full fine-tuning, RGFT, and what RGFT is held against on its own ground."""

from __future__ import annotations

from rgft.bench.methods.base import Method, variants_of

#: Of the preset `rgft`.
RGFT_REVISION = 3

METHODS = (
    Method(name="full", title="full fine-tuning", config={"preset": "full"}, cost="nothing: F + dX + dW"),
    Method(name="rgft", title="RGFT", cost="dW, dX and F below the cut; probes are counted", revision=RGFT_REVISION),
    # RGFT in everything but the choice of the cut.
    Method(
        name="cut",
        title="fixed cut",
        config={"mask": {"name": "budget", "frozen_fraction": 0.5}},
        cost="as RGFT",
        variants=variants_of("config.mask.frozen_fraction", 0.25, 0.75, name="frozen"),
        revision=2,
    ),
    # RGFT's saving ways of acting, but half of the components drawn by lot. (A draw by FLOPs is none at layer
    # granularity: within half a step only the last layers fit, whatever the order.)
    Method(
        name="random",
        title="half of the components, by lot",
        config={"scaling": None, "mask": {"name": "random", "q": 0.5, "every": 0.1}},
        cost="dW of what is off, dX below the lowest that is on",
        variants=variants_of("config.mask.q", 0.25, 0.75),
        revision=3,
    ),
    # Its own interval of 100 steps makes it full fine-tuning in a run of fewer.
    Method(
        name="proposal_a",
        title="proposal A",
        config={"preset": "proposal_a"},
        cost="dW of what is off; probes added",
        variants=variants_of("config.probe.interval", 5, 20),
    ),
    Method(
        name="proposal_b",
        title="proposal B",
        config={"preset": "proposal_b"},
        cost="nothing",
        variants=variants_of("config.scaling.alpha", 0.5, 2.0),
    ),
    # One saving way of RGFT's alone: well-learnt examples are skipped, all else is full fine-tuning.
    Method(
        name="example_pruning",
        title="examples skipped, everything trained",
        config={"preset": "full", "examples": {"prune": 0.3}},
        cost="whole rows, from the second epoch on",
        variants=variants_of("config.examples.prune", 0.15, 0.5),
    ),
)

from __future__ import annotations

from typing import Any

import pytest

from rgft.allocation.peers.fixed import AllOn, LastN, LayerWiseDecay, LinearProbe, NormsOrBiasOnly, Static
from rgft.errors import ConfigError
from rgft.plan import UpdatePlan


def test_last_n(make: Any) -> None:
    components = make.model(layers=4)
    for n in range(1, 4):
        plan = LastN(layers=n).decide(make.situation(components))
        assert plan.active() == tuple(c.name for c in components if c.depth > 4 - n)
        assert plan.cut == 5 - n
    assert LastN(layers=4).decide(make.situation(components)).same_effect(AllOn().decide(make.situation(components)))
    with pytest.raises(ConfigError, match="at most the model's 4 layers, found 5"):
        LastN(layers=5).decide(make.situation(components))


def test_linear_probe(make: Any) -> None:
    components = make.model(layers=2)
    plan = LinearProbe().decide(make.situation(components))
    assert plan.active() == ("classifier",)
    assert plan.cut == 3
    with pytest.raises(ConfigError, match="found only"):
        LinearProbe().decide(make.situation(components[:-1]))


def test_norms_or_bias_only(make: Any) -> None:
    components = make.model(layers=2)
    norm = make.component("norm", 3, kind="norm", dims=1)
    plan = NormsOrBiasOnly().decide(make.situation((*components, norm)))
    assert set(plan.active()) == {"layers.0.rest", "layers.1.rest", "norm", "classifier"}
    with pytest.raises(ConfigError, match="granularity='head'"):
        NormsOrBiasOnly().decide(make.situation(tuple(c for c in components if c.kind != "rest")))


def test_layer_wise_decay(make: Any) -> None:
    components = make.model(layers=3)
    plan = LayerWiseDecay(xi=0.5).decide(make.situation(components))
    by_depth = {c.depth: plan.multipliers[c.name] for c in components}
    assert by_depth == {4: 1.0, 3: 0.5, 2: 0.25, 1: 0.125, 0: 0.0625}
    assert plan.cut == 0


def test_static_repeats_its_plan_from_a_file_too(make: Any) -> None:
    components = make.flat(3)
    plan = UpdatePlan(step=3, multipliers={"c0": 0.0, "c1": 0.5, "c2": 1.0}, periods={"c1": 2}, cut=1, reason="x")
    for given in (plan, plan.to_dict()):
        found = Static(plan=given).decide(make.situation(components, [9.0, 1.0, 1.0], step=40))
        assert found.same_effect(plan)
        assert found.step == 40
    with pytest.raises(ConfigError, match=r"missing \['c3'\], unknown \[\]"):
        Static(plan=plan).decide(make.situation(make.flat(4)))

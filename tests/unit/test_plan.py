import json

import pytest

from rgft.errors import ConfigError
from rgft.plan import Budget, RunPlan, UpdatePlan


def test_off_and_periods() -> None:
    plan = UpdatePlan(step=10, multipliers={"a": 1.0, "b": 0.0, "c": 0.5}, periods={"c": 3})
    assert plan.active() == ("a", "c")
    assert [plan.is_on("c", step) for step in range(10, 17)] == [False, False, True, False, False, True, False]
    assert not any(plan.is_on("b", step) for step in range(10, 20))


def test_digest_depends_on_the_effect_alone() -> None:
    plan = UpdatePlan(step=1, multipliers={"a": 1.0, "b": 0.0}, cut=1, reason="x")
    same = UpdatePlan(step=9, multipliers={"b": 0.0, "a": 1.0}, cut=1, reason="y")
    assert plan.digest() == same.digest()
    assert plan.same_effect(same)
    assert plan.digest() != UpdatePlan(step=1, multipliers={"a": 1.0, "b": 0.1}, cut=1).digest()


def test_plans_survive_json() -> None:
    plan = UpdatePlan(step=1, multipliers={"a": 0.1 + 0.2}, periods={"a": 2}, cut=1, reason="x")
    assert UpdatePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    run_plan = RunPlan(steps=7, cut=2, flops=1e12, full_flops=3e12)
    assert RunPlan.from_dict(json.loads(json.dumps(run_plan.to_dict()))) == run_plan


@pytest.mark.parametrize("multiplier", [-0.1, float("nan"), float("inf")])
def test_bad_multipliers(multiplier: float) -> None:
    with pytest.raises(ConfigError, match="finite"):
        UpdatePlan(step=0, multipliers={"a": multiplier})


def test_bad_periods_and_budgets() -> None:
    with pytest.raises(ConfigError, match="periods"):
        UpdatePlan(step=0, multipliers={"a": 1.0}, periods={"a": 0})
    for share in (0.0, 1.5, -1.0):
        with pytest.raises(ConfigError, match=r"budget\.flops"):
            Budget(flops=share)


def test_the_form_of_components_is_part_of_a_plan() -> None:
    dense = UpdatePlan(step=1, multipliers={"a": 1.0, "b": 1.0})
    paired = UpdatePlan(step=1, multipliers={"a": 1.0, "b": 1.0}, low_rank=("b",))
    assert UpdatePlan.from_dict(json.loads(json.dumps(paired.to_dict()))) == paired
    assert not dense.same_effect(paired)
    assert dense.digest() != paired.digest()
    nothing = UpdatePlan(step=1, multipliers={"a": 1.0, "b": 1.0}, low_rank=())
    assert dense.same_effect(nothing)
    assert dense.digest() == nothing.digest() == "540db4bfce29c459"  # as before there were forms
    with pytest.raises(ConfigError, match=r"low_rank must name known components; found \['c'\]"):
        UpdatePlan(step=1, multipliers={"a": 1.0}, low_rank=("c",))


def test_plans_saved_before_there_were_forms_load() -> None:
    data = UpdatePlan(step=3, multipliers={"a": 1.0, "b": 0.0}, cut=1).to_dict()
    del data["low_rank"]
    assert UpdatePlan.from_dict(data).pairs == frozenset()

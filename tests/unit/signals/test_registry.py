from __future__ import annotations

import dataclasses

import pytest

from rgft.errors import ConfigError
from rgft.signals import SIGNALS, GradNorm, ResidualDot, make

NAMES = {
    "residual_dot", "grad_norm", "predicted_decrease", "generalising_decrease", "fisher", "taylor", "grad_over_weight",
    "weight_magnitude", "low_rank_magnitude", "delta", "act_x_grad", "suppression", "router_share", "tuned_lens",
    "random", "uniform",
}  # fmt: skip


def test_every_signal_has_its_name_and_defaults_and_is_immutable() -> None:
    assert set(SIGNALS) == NAMES
    for name in NAMES:
        signal = make(name)
        assert type(signal) is SIGNALS[name]
        assert signal.name == name
        with pytest.raises(dataclasses.FrozenInstanceError):
            signal.name = "other"  # type: ignore[misc]


def test_parameters_arrive() -> None:
    assert make("grad_norm", p=1, normalise="raw") == GradNorm(p=1, normalise="raw")
    assert make("residual_dot", mode="abs") == ResidualDot(mode="abs")


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"found 'gradnorm' \(did you mean 'grad_norm'\?\)"):
        make("gradnorm")


def test_all_wrong_parameters_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        make("grad_norm", normalize="rms", q=2, p=3)
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert "did you mean 'normalise'?" in text
    assert "'q'" in text
    assert "grad_norm.p: expected one of 1, 2; found 3" in text


def test_a_value_of_the_wrong_type_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="suppression"):
        make("suppression", factor="half")

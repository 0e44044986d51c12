"""From names in a configuration to the stages they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rgft import Config
from rgft.allocation.budget import BudgetMask
from rgft.allocation.compose import Composed
from rgft.allocation.exploration import Exploring, Hysteresis
from rgft.allocation.peers.lisa import LISA
from rgft.allocation.scaling import Bounded, DecreaseRatio, MeanPreserved, Normalised
from rgft.allocation.threshold import TargetSparsity
from rgft.assembly import build_cache, build_policy, build_signal
from rgft.errors import CacheError
from rgft.execution.activation_cache import ActivationCache
from rgft.partition import partition
from rgft.signals.decrease import GeneralisingDecrease
from rgft.signals.gradient import GradNorm
from rgft.signals.residual import ResidualDot
from tests.families import FAMILIES


def test_preset_rgft() -> None:
    config = Config().resolved()
    assert build_signal(config) == GeneralisingDecrease()
    policy = build_policy(config)
    assert isinstance(policy, Composed)
    assert isinstance(policy.scaling, MeanPreserved)
    assert policy.scaling.scaling == DecreaseRatio()
    assert isinstance(policy.mask, BudgetMask)
    assert policy.always_on == ("classifier",)
    assert policy.label == "rgft"


def test_proposals() -> None:
    config = Config(preset="proposal_a").resolved()
    assert build_signal(config) == ResidualDot(mode="clamped")
    policy = build_policy(config)
    assert isinstance(policy, Composed)
    assert policy.mask == TargetSparsity(fraction=0.5, scope="layer")
    config = Config(preset="proposal_b").resolved()
    assert build_signal(config) == GradNorm(p=2, normalise="raw")
    assert build_policy(config) == Composed(scaling=Normalised(by="max", alpha=1.0), label="proposal_b")


def test_exploration_turns_with_the_decisions() -> None:
    stability = {"exploration": 0.2}
    config = Config(preset="proposal_a", stability=stability, probe={"interval": 50}).resolved()
    policy = build_policy(config)
    assert isinstance(policy, Composed)
    assert isinstance(policy.mask, Exploring)
    assert policy.mask.every == 50


def test_full_measures_and_decides_nothing() -> None:
    config = Config(preset="full").resolved()
    assert build_signal(config) is None
    assert build_policy(config) is None


def test_settings_arrive() -> None:
    stability = {
        "hysteresis": 0.3,
        "off_multiplier": 0.01,
        "always_on": ("norm",),
        "preserve_mean": False,
        "f_max": 3.0,
    }
    config = Config(mask={"frozen_fraction": 0.25}, scaling="rank", stability=stability)
    policy = build_policy(config.resolved())
    assert isinstance(policy, Composed)
    assert isinstance(policy.mask, Hysteresis)
    assert policy.mask.margin == 0.3
    assert policy.mask.mask == BudgetMask(frozen_fraction=0.25)
    assert policy.off_multiplier == 0.01
    assert policy.always_on == ("norm",)
    assert isinstance(policy.scaling, Bounded)
    assert policy.scaling.f_max == 3.0


def test_a_policy_replaces_the_stages() -> None:
    config = Config(policy={"name": "lisa", "layers": 1, "every": 5}).resolved()
    assert build_policy(config) == LISA(layers=1, every=5)
    assert build_signal(config) is None


def test_caches(tmp_path: Path) -> None:
    model = FAMILIES["bert"].build()
    whole = partition(model, "layer")
    assert build_cache(Config(preset="full"), model, whole) is None
    cache = build_cache(Config(execution={"cache_dtype": "bfloat16", "cache_max_bytes": 77}), model, whole)
    assert isinstance(cache, ActivationCache)
    assert (cache._dtype, cache._required, cache.place) == (torch.bfloat16, False, "memory")
    assert cache._levels._max_bytes == 77
    cache = build_cache(Config(execution={"cache": "memory"}), model, whole)
    assert cache is not None
    assert cache._required
    cache = build_cache(Config(execution={"cache": "disk", "cache_dir": str(tmp_path)}), model, whole)
    assert cache is not None
    assert (cache.place, cache._required) == ("disk", True)
    flat = torch.nn.Linear(3, 2)
    assert build_cache(Config(), flat, partition(flat, "layer")) is None
    with pytest.raises(CacheError, match="needs a model with layers"):
        build_cache(Config(execution={"cache": "memory"}), flat, partition(flat, "layer"))

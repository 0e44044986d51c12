"""From a configuration to the stages it names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from rgft.allocation import Policy, make_mask, make_period, make_policy, make_scaling
from rgft.allocation.compose import Composed
from rgft.allocation.selection import matching
from rgft.components import Partition
from rgft.config import Config
from rgft.errors import ConfigError
from rgft.execution.activation_cache import ActivationCache
from rgft.execution.binding import Binding
from rgft.execution.low_rank import LowRank
from rgft.execution.pair_sites import PairSite, find_sites
from rgft.signals import Signal
from rgft.signals import make as make_signal

#: Signals that look at what weights are, or what becomes of the model when they are scaled.
SIGNALS_OF_WEIGHTS = ("weight_magnitude", "low_rank_magnitude", "delta", "suppression")


def build_signal(config: Config) -> Signal | None:
    """The configured signal; None for full fine-tuning, which measures nothing."""
    return None if config.signal is None else make_signal(config.signal.name, **config.signal.params)


def build_policy(config: Config) -> Policy | None:
    """The configured policy; None for full fine-tuning, which decides nothing."""
    if config.policy is not None:
        return make_policy(config.policy.name, **config.policy.params)
    if config.scaling is None and config.mask is None and config.period is None:
        return None
    stability = config.stability
    stages = {}
    if config.scaling is not None:
        # A scaling with bounds of its own has had stability's filled in when the configuration was resolved.
        bounds = {key: getattr(stability, key) for key in ("f_min", "f_max") if key not in config.scaling.params}
        stages["scaling"] = make_scaling(
            config.scaling.name, preserve_mean=stability.preserve_mean, **bounds, **config.scaling.params
        )
    if config.mask is not None:
        # Exploration counts decisions, and these are made where scores come in.
        interval = config.probe.interval
        stages["mask"] = make_mask(
            config.mask.name, margin=stability.hysteresis, exploration=stability.exploration,
            exploration_every=interval if isinstance(interval, int) and interval > 0 else 1, **config.mask.params,
        )  # fmt: skip
    if config.period is not None:
        stages["period"] = make_period(config.period.name, **config.period.params)
    return Composed(
        **stages, off_multiplier=stability.off_multiplier, always_on=tuple(stability.always_on), label=config.preset
    )


def find_pair_sites(
    config: Config, model: nn.Module, partition: Partition, signal: Signal | None
) -> dict[str, tuple[PairSite, ...]]:
    """Where the configured low-rank pairs go, by component; nowhere without any.

    Args:
        config: of the run.
        model: plain.
        partition: of it.
        signal: of the run.

    Raises:
        ConfigError: no component can take pairs, some component cannot, or the signal is none of pairs.
    """
    settings = config.update.pairs
    if settings is None:
        return {}
    if signal is not None and (signal.needs_initial or signal.name in SIGNALS_OF_WEIGHTS):
        raise ConfigError(
            f"signal: {signal.name!r} looks at the weights themselves, which low-rank pairs leave as they are; choose "
            "a signal of gradients or activations, e.g. 'grad_norm', or leave out update.low_rank"
        )
    wanted = matching(partition, settings.components, setting="update.low_rank.components")
    if not settings.components:
        wanted = frozenset(c.name for c in partition if c.layer is not None)
    return find_sites(model, partition, wanted, rank=settings.rank)


def attach_pairs(
    config: Config, model: nn.Module, binding: Binding, sites: Mapping[str, tuple[PairSite, ...]]
) -> LowRank | None:
    """Gives a bound model the configured low-rank pairs; None without any."""
    settings = config.update.pairs
    if settings is None:
        return None
    return LowRank(
        model, binding, sites, rank=settings.rank, alpha=settings.alpha, freezes_others=settings.others == "frozen",
        seed=config.seed,
    )  # fmt: skip


def build_cache(config: Config, model: nn.Module, partition: Partition) -> ActivationCache | None:
    """The configured activation cache; None where it is off or the model has no layers to skip."""
    settings = config.execution
    if settings.cache == "none" or (settings.cache == "auto" and not partition.layers):
        return None
    return ActivationCache(
        model, partition, dtype=None if settings.cache_dtype == "model" else getattr(torch, settings.cache_dtype),
        max_bytes=settings.cache_max_bytes, required=settings.cache != "auto",
        folder=None if settings.cache_dir is None else Path(settings.cache_dir).expanduser(),
    )  # fmt: skip

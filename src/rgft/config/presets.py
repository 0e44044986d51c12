"""Presets: named sets of defaults, and how a user's settings are laid over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from rgft.config.sections import Section, StageConfig
from rgft.config.stages import Role, looks_at_map

PresetName = Literal["rgft", "proposal_a", "proposal_b", "full"]

#: Settings that name a stage.
STAGES: tuple[Role, ...] = get_args(Role)

#: Preset → what it sets; all else has the default of its field.
PRESETS: Mapping[PresetName, Mapping[str, Any]] = {
    # RGFT's own: trains above the cut that the budget buys, faster where learning carries over to other examples.
    "rgft": {
        "signal": "generalising_decrease",
        "error_map": {"beta": 0.9, "bias_correction": True},
        "scaling": "decrease_ratio",
        "mask": "budget",
        "period": None,
        "stability": {"preserve_mean": True, "always_on": ("classifier",)},
        "probe": {"interval": "auto", "size": "auto", "max_fraction": 0.01, "row_stride": 4},
        "update": {"dropout": "auto", "low_rank": "auto"},
        "execution": {"cache": "auto", "positions": "auto", "padding": "auto"},
        "warmup_fraction": 0.1,
    },
    # Proposal A: residuals of activations, half of each layer's components off, a map every 100 steps.
    "proposal_a": {
        "granularity": "head",
        "signal": {"name": "residual_dot", "mode": "clamped"},
        "error_map": {"beta": 0.9, "bias_correction": True},
        "scaling": {"name": "gradient_normalised", "gamma": 1.0},
        "mask": {"name": "target_sparsity", "fraction": 0.5, "scope": "layer"},
        "period": None,
        "stability": {"always_on": ("embedding", "classifier", "lm_head")},
        "probe": {"interval": 100, "size": "auto"},
        "execution": {"cache": "none"},
        "warmup_fraction": 0.0,
    },
    # Proposal B: gradient norms of the training batches themselves, at every step, smooth scaling and no mask.
    "proposal_b": {
        "signal": {"name": "grad_norm", "p": 2, "normalise": "raw"},
        "error_map": {"beta": 0.9, "bias_correction": False},
        "scaling": {"name": "normalised", "by": "max", "alpha": 1.0},
        "mask": None,
        "period": None,
        "probe": {"interval": 1, "size": 0},
        "execution": {"cache": "none"},
        "warmup_fraction": 0.0,
    },
    # Plain full fine-tuning: nothing is measured, nothing decided.
    "full": {
        "signal": None,
        "scaling": None,
        "mask": None,
        "period": None,
        "execution": {"cache": "none"},
        "warmup_fraction": 0.0,
    },
}

DEFAULT_PRESET: PresetName = "rgft"


def with_preset(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The user's settings laid over the defaults of their preset; nothing is validated yet.

    A policy takes the place of the preset's scaling, mask and period, and trains dense weights; one that does not look
    at the map also of its signal and of the measuring phase.
    """
    preset = PRESETS.get(settings.get("preset", DEFAULT_PRESET), {})
    if settings.get("policy") is not None and "update" in preset:
        preset = {**preset, "update": {key: value for key, value in preset["update"].items() if key != "low_rank"}}
    merged = laid_over(preset, settings)
    merged |= {key: as_stage(merged[key]) for key in STAGES if key in merged}
    policy = merged.get("policy")
    if policy is not None:
        for key in ("scaling", "mask", "period"):
            merged[key] = as_stage(settings.get(key))
        if isinstance(policy, Mapping) and not looks_at_map("policy", policy.get("name")):
            merged["signal"] = as_stage(settings.get("signal"))
            merged["warmup_fraction"] = settings.get("warmup_fraction", 0.0)
    return merged


def laid_over(settings: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others over them; nothing is validated.

    Groups are merged key by key. A stage that names nothing, or what was there, changes the settings that it gives; one
    with another name replaces what was there.
    """
    merged = dict(settings)
    for key, value in others.items():
        merge = _merged_stage if key in STAGES else _merged_group
        merged[key] = merge(settings.get(key), value)
    return merged


def as_stage(value: Any) -> Any:
    """The forms that a stage may be written in, as {"name": …, "params": {…}}; anything else as it is."""
    if value is None or value == "none":
        return None
    if isinstance(value, StageConfig):
        return {"name": value.name, "params": dict(value.params)}
    if isinstance(value, str):
        return {"name": value, "params": {}}
    if not isinstance(value, Mapping):
        return value
    params = {key: item for key, item in value.items() if key not in ("name", "params")}
    nested = value.get("params", {})
    stage = {"params": {**nested, **params} if isinstance(nested, Mapping) else nested}
    return {"name": value["name"], **stage} if "name" in value else stage


def _merged_group(before: Any, given: Any) -> Any:
    if isinstance(given, Section):
        given = {name: getattr(given, name) for name in given.model_fields_set}
    return laid_over(before, given) if isinstance(before, Mapping) and isinstance(given, Mapping) else given


def _merged_stage(before: Any, given: Any) -> Any:
    old, new = as_stage(before), as_stage(given)
    if not (_has_params(old) and _has_params(new)) or new.get("name", old.get("name")) != old.get("name"):
        return given
    params = {**old["params"], **new["params"]}
    return {"name": old["name"], **params} if "name" in old else params


def _has_params(stage: Any) -> bool:
    return isinstance(stage, Mapping) and isinstance(stage["params"], Mapping)

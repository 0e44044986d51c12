"""Settings without effect: said aloud, never silently ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rgft.config.presets import PRESETS, as_stage
from rgft.config.sections import Section
from rgft.config.stages import looks_at_map, registry

if TYPE_CHECKING:
    from rgft.config.tree import Config


def without_effect(config: Config, settings: Mapping[str, Any]) -> list[str]:
    """One sentence for each setting that the user gave and that changes nothing.

    Args:
        config: the validated configuration.
        settings: what the user gave. A value that equals the preset's is not counted as given.
    """
    given = _given(config, settings)
    return [
        *_stages(config, settings, given),
        *_groups(config, given),
        *(
            f"ffn_blocks: has no effect with granularity {config.granularity!r}; it splits at granularity 'head'"
            for _ in given & {"ffn_blocks"}
            if config.granularity != "head"
        ),
    ]


def _stages(config: Config, settings: Mapping[str, Any], given: set[str]) -> list[str]:
    messages: list[str] = []
    if config.policy is not None:
        for key in ("scaling", "mask", "period"):
            if as_stage(settings.get(key)) is not None:
                messages.append(f"{key}: has no effect beside policy {config.policy.name!r}, which decides it all")
    for role in ("scaling", "mask", "period", "policy"):
        stage = getattr(config, role)
        if stage is not None and config.signal is None and looks_at_map(role, stage.name):
            messages.append(f"{role}: {stage.name!r} has no effect without a signal, as it decides from the error map")
    if config.scaling is not None:
        signal = config.signal and registry("signal")[config.signal.name]
        if config.scaling.name == "decrease_ratio" and signal and not getattr(signal, "needs_update", False):
            messages.append(
                f"scaling: 'decrease_ratio' has no effect with signal {signal.name!r}, which has no same-batch "
                "decrease beside it; use signal 'generalising_decrease', or another scaling"
            )
        for key in ("f_min", "f_max"):
            if key in config.scaling.params and getattr(config.stability, key) is not None:
                messages.append(f"scaling.{key}: has no effect beside stability.{key}, which takes its place")
    return messages


def _groups(config: Config, given: set[str]) -> list[str]:
    """Settings of groups that nothing uses."""
    decides = any(getattr(config, key) is not None for key in ("scaling", "mask", "period", "policy"))
    goes_off = any(getattr(config, key) is not None for key in ("mask", "period", "policy"))
    signal = config.signal and registry("signal")[config.signal.name]
    rules: list[tuple[bool, tuple[str, ...], str]] = [
        (config.signal is None, ("error_map.", "probe."), "without a signal"),
        (
            config.mask is None,
            ("stability.hysteresis", "stability.exploration", "stability.off_multiplier", "stability.always_on"),
            "without a mask",
        ),
        (
            config.scaling is None,
            ("stability.preserve_mean", "stability.f_min", "stability.f_max"),
            "without a scaling",
        ),
        (not goes_off, ("update.moments",), "as every component is on at every step"),
        (not decides, ("warmup_fraction",), "as nothing is decided after it"),
        (
            not getattr(signal, "needs_update", False),
            ("probe.row_stride",),
            "with a signal that is not of the optimizer's step",
        ),
        (config.probe.interval == 0, ("probe.size", "probe.max_fraction"), "with probe.interval 0"),
        (
            "auto" not in (config.probe.interval, config.probe.size),
            ("probe.max_fraction",),
            "as probe.interval and probe.size are both given",
        ),
    ]
    caching = ("execution.cache",)
    if config.execution.cache in ("memory", "disk"):
        rules.append((config.mask is None and config.policy is None, caching, "as nothing is ever frozen"))
    else:
        unused = config.execution.cache == "none"
        rules.append((unused, ("execution.cache_dtype", "execution.cache_max_bytes"), "with execution.cache 'none'"))
    messages: dict[str, str] = {}
    for applies, keys, why in rules:
        for key in sorted(given) if applies else ():
            if key.startswith(keys):
                messages.setdefault(key, f"{key}: has no effect {why}")
    return list(messages.values())


def _given(config: Config, settings: Mapping[str, Any]) -> set[str]:
    """Dotted keys that the user gave with a value other than the preset's."""
    preset = PRESETS[config.preset]
    given: set[str] = set()
    for key, value in settings.items():
        field = type(config).model_fields[key]
        section = getattr(config, key)
        if isinstance(section, Section) and key in _SECTIONS:
            names = value.model_fields_set if isinstance(value, Section) else value
            for name in names:
                default = preset.get(key, {}).get(name, type(section).model_fields[name].default)
                if getattr(section, name) != default:
                    given.add(f"{key}.{name}")
        elif section != preset.get(key, field.default):
            given.add(key)
    return given


_SECTIONS = ("error_map", "stability", "probe", "update", "execution", "energy")

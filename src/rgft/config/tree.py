"""`Config`: every setting of RGFT."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self, TypedDict, Unpack, get_args

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from rgft.components import Granularity
from rgft.config.effects import without_effect
from rgft.config.presets import DEFAULT_PRESET, STAGES, PresetName, with_preset
from rgft.config.problems import likely, nearest, problems_of
from rgft.config.sections import (
    EnergyConfig,
    ErrorMapConfig,
    ExamplesConfig,
    ExecutionConfig,
    ProbeConfig,
    Section,
    StabilityConfig,
    StageConfig,
    UpdateConfig,
)
from rgft.config.stages import Role, check_stage, filled
from rgft.errors import ConfigError, RGFTWarning, RunFolderError
from rgft.plan import Budget
from rgft.telemetry.atomic_write import write_bytes

CONFIG_FILE = "rgft_config.json"
SCHEMA = "rgft.config/1"

StageLike = StageConfig | Mapping[str, Any] | str | None


class Settings(TypedDict, total=False):
    """What `Config` takes, in every form that it may be written in."""

    preset: PresetName
    budget: Budget | float | Mapping[str, float | str] | None
    granularity: Granularity | Callable[..., Any]
    ffn_blocks: int
    signal: StageLike
    error_map: ErrorMapConfig | Mapping[str, Any]
    scaling: StageLike
    mask: StageLike
    period: StageLike
    policy: StageLike
    stability: StabilityConfig | Mapping[str, Any]
    probe: ProbeConfig | Mapping[str, Any]
    examples: ExamplesConfig | Mapping[str, Any]
    update: UpdateConfig | Mapping[str, Any]
    execution: ExecutionConfig | Mapping[str, Any]
    energy: EnergyConfig | Mapping[str, Any]
    warmup_fraction: float
    classifier_lr_multiplier: float
    seed: int


def _budget(value: Any) -> Any:
    if value is None or value == "none" or isinstance(value, Budget):
        return None if value == "none" else value
    given = dict(value) if isinstance(value, Mapping) else {"flops": value}
    known = [item.name for item in fields(Budget)]
    problems = [
        f"budget.{key}: there is no such budget (found {item!r}); {nearest(str(key), known)}"
        for key, item in given.items()
        if key not in known
    ]
    problems += [
        f"budget.{key}: expected a number, found {item!r}"
        for key, item in given.items()
        if key in known and key != "memory" and (isinstance(item, bool) or not isinstance(item, (int, float)))
    ]
    if not given:
        problems.append("budget.flops: expected a number, found none")
    if problems:
        raise ConfigError(problems)
    return Budget(**given)


def _granularity(value: Any) -> Any:
    names = get_args(Granularity)
    if callable(value) or value in names:
        return value
    near = likely(value, names) if isinstance(value, str) else ""
    hint = f"; {near}" if near else ""
    if isinstance(value, str) and ":" in value:
        hint = "; a configuration keeps only the name of a function: give granularity=<the function> when reading it"
    raise ValueError(f"expected one of {', '.join(names)}, or a function; found {value!r}{hint}")


def _checked(role: Role, stage: StageConfig | None) -> StageConfig | None:
    if stage is not None:
        check_stage(role, stage)
    return stage


BudgetField = Annotated[Budget | None, BeforeValidator(_budget)]
GranularityField = Annotated[Granularity | Callable[..., Any], BeforeValidator(_granularity)]
Signal = Annotated[StageConfig | None, AfterValidator(partial(_checked, "signal"))]
Scaling = Annotated[StageConfig | None, AfterValidator(partial(_checked, "scaling"))]
Mask = Annotated[StageConfig | None, AfterValidator(partial(_checked, "mask"))]
Period = Annotated[StageConfig | None, AfterValidator(partial(_checked, "period"))]
Policy = Annotated[StageConfig | None, AfterValidator(partial(_checked, "policy"))]


class Config(Section):
    """Every setting of RGFT: a preset, and what is set differently from it.

    Immutable and validated as a whole: all problems are reported at once, each with its key, what was expected, what
    was found and the nearest valid name. Settings without effect warn.

    Example:
        >>> config = Config(preset="proposal_a", mask={"name": "energy", "rho": 0.9}, budget=0.3)
        >>> config.mask.name, config.budget.flops
        ('energy', 0.3)

    Raises:
        ConfigError: any setting is wrong.
    """

    preset: PresetName = Field(default=DEFAULT_PRESET, description="the defaults: rgft, proposal_a, proposal_b or full")
    budget: BudgetField = Field(
        default=None,
        description="what the run may spend, as a share of full fine-tuning's FLOPs on the same data and epochs, in "
        "(0, 1]; a number or {flops: number, seconds: number, joules: number, memory: '8GB'}, any of them; "
        "None: no limit",
    )
    granularity: GranularityField = Field(
        default="layer",
        description="how finely the model is split: layer, block, head, adapter, or a function (see partition)",
    )
    ffn_blocks: int = Field(
        default=1,
        ge=1,
        description="neuron blocks per feed-forward block, and channel blocks per convolution, at granularity head",
    )
    signal: Signal = Field(default=None, description="what is measured; None: nothing")
    error_map: ErrorMapConfig = Field(default_factory=ErrorMapConfig, description="the running scores")
    scaling: Scaling = Field(default=None, description="learning-rate multipliers from the map; None: 1 everywhere")
    mask: Mask = Field(default=None, description="which components are on; None: all")
    period: Period = Field(default=None, description="how often components are updated; None: at every step")
    policy: Policy = Field(
        default=None,
        description="a whole published method (lisa, badam, last_n, …) in place of scaling, mask and period",
    )
    stability: StabilityConfig = Field(default_factory=StabilityConfig, description="against flapping and runaways")
    probe: ProbeConfig = Field(default_factory=ProbeConfig, description="looks at examples that are never trained on")
    examples: ExamplesConfig = Field(
        default_factory=ExamplesConfig, description="what of the data is skipped because it is learnt well"
    )
    update: UpdateConfig = Field(default_factory=UpdateConfig, description="how updates are made")
    execution: ExecutionConfig = Field(default_factory=ExecutionConfig, description="how the plan is carried out")
    energy: EnergyConfig = Field(default_factory=EnergyConfig, description="how the run's energy is found")
    warmup_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the run that measures with everything on before the first decision, if that can decide "
        "anything",
    )
    classifier_lr_multiplier: float = Field(
        default=1.0, gt=0, description="learning rate of a (usually new) classifier, as a multiple of the others'"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="of data order, probes and random policies")

    def __init__(self, **settings: Unpack[Settings]) -> None:
        merged = with_preset(settings)
        try:
            super().__init__(**merged)
            if self.policy is not None:
                # What the user gave beside it was validated above, so that its problems show too.
                super().__init__(**{**merged, "scaling": None, "mask": None, "period": None})
        except ValidationError as error:
            raise ConfigError(problems_of(error, type(self))) from None
        for message in without_effect(self, settings):
            warnings.warn(message, RGFTWarning, stacklevel=2)

    def resolved(self) -> Config:
        """The same configuration with every setting of every stage spelled out, and each in its one place."""
        stages = {role: filled(role, stage) for role in STAGES if (stage := getattr(self, role)) is not None}
        scaling = stages.get("scaling")
        if scaling is not None:
            # stability's bounds are the ones in force where a scaling has bounds of its own.
            own = {
                key for key in ("f_min", "f_max") if getattr(self.stability, key) is not None
            } & scaling.params.keys()
            bounds = {key: getattr(self.stability, key) for key in own}
            stages["scaling"] = StageConfig(name=scaling.name, params={**scaling.params, **bounds})
        return self.model_copy(update=stages)

    # ---------------------------------------------------------------- reading and writing

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON has them; `Config.from_dict` takes it back. Functions become "module:name"."""
        return {key: _plain(getattr(self, key)) for key in type(self).model_fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], **settings: Unpack[Settings]) -> Self:
        """The configuration in a mapping, for example a parsed file.

        Args:
            data: settings; those left out have the preset's defaults.
            settings: take precedence over `data`, whole keys at a time (functions can only be given here).

        Raises:
            ConfigError: any setting is wrong, or `data` is no mapping.
        """
        if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
            raise ConfigError(f"configuration: expected a mapping from settings to values, found {data!r}")
        return cls(**{**data, **settings})  # type: ignore[typeddict-item]

    def save_pretrained(self, folder: Path | str) -> Path:
        """Writes `rgft_config.json` into `folder` (made if missing), atomically; returns the file.

        Raises:
            RunFolderError: it cannot be written.
        """
        path = Path(folder) / CONFIG_FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"{folder}: expected a folder that can be written: {error.strerror}") from error
        text = json.dumps({"schema": SCHEMA, **self.to_dict()}, indent=2, ensure_ascii=False, allow_nan=False)
        write_bytes(path, (text + "\n").encode())
        return path

    @classmethod
    def from_pretrained(cls, folder: Path | str, **settings: Unpack[Settings]) -> Self:
        """Reads what `save_pretrained` wrote.

        Args:
            folder: with an `rgft_config.json` in it, or the path of such a file.
            settings: as in `from_dict`.

        Raises:
            ConfigError: the file is missing, unreadable, of another version, or a setting in it is wrong.
        """
        path = Path(folder) / CONFIG_FILE if Path(folder).is_dir() else Path(folder)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: expected an {CONFIG_FILE}; it could not be read: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{path}: expected JSON: {error}") from error
        schema = data.pop("schema", None) if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise ConfigError(
                f"{path}: expected schema {SCHEMA!r}, found {schema!r}; use the RGFT version that wrote it"
            )
        return cls.from_dict(data, **settings)


def checked(config: Any) -> Config:
    """The configuration that was given, None standing for the defaults.

    Raises:
        ConfigError: it is something else, such as a mapping.
    """
    if config is None:
        return Config()
    if not isinstance(config, Config):
        found = f"{type(config).__name__} ({config!r})"
        instead = "rgft.Config.from_dict(…)" if isinstance(config, Mapping) else "rgft.Config(budget=0.3)"
        raise ConfigError(f"config: expected an rgft.Config or None, found {found}; write {instead}")
    return config


def _plain(value: Any) -> Any:
    if isinstance(value, StageConfig):
        return {"name": value.name, **{key: _plain(item) for key, item in value.params.items()}}
    if isinstance(value, Section):
        return {key: _plain(getattr(value, key)) for key in type(value).model_fields}
    if isinstance(value, Budget):
        return {key: item for key, item in asdict(value).items() if item is not None}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    return f"{value.__module__}:{value.__qualname__}" if callable(value) else value

"""The groups of settings. Every field says what it is, and its unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from rgft.config.problems import problems_of
from rgft.errors import ConfigError
from rgft.telemetry.energy import WORLD_CARBON_INTENSITY


def _integer_or_auto(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError("expected an integer >= 0 or 'auto'")


def _as_tuples(value: Any) -> Any:
    """Lists as tuples, all the way down: files know lists only, and equal settings must be equal."""
    if isinstance(value, (list, tuple)):
        return tuple(_as_tuples(item) for item in value)
    return {key: _as_tuples(item) for key, item in value.items()} if isinstance(value, Mapping) else value


IntegerOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_integer_or_auto)]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuples)]


class Section(BaseModel):
    """A frozen group of settings; unknown keys are errors, and values are not converted."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )


class StageConfig(Section):
    """A signal, scaling, mask, period or policy: its name and its settings.

    Wherever one is expected, a name alone ("rank"), or name and settings in one mapping
    ({"name": "rank", "alpha": 0.3}) will do.
    """

    name: str = Field(description="name in the registry of its kind")
    params: Annotated[Mapping[str, Any], BeforeValidator(_as_tuples)] = Field(
        default_factory=dict, description="its settings; what is left out has the default of its class"
    )


class ErrorMapConfig(Section):
    """The running scores."""

    beta: float = Field(default=0.9, ge=0, lt=1, description="β of the running average, per observation")
    bias_correction: bool = Field(
        default=True, description="divide by 1 − βⁿ after n observations, so that early scores are not too small"
    )


class StabilityConfig(Section):
    """What keeps decisions from flapping and multipliers from running away."""

    hysteresis: float = Field(
        default=0.0, ge=0, description="relative advantage that components already on have when the mask chooses"
    )
    exploration: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of the components left off by the mask that is on nevertheless, in turn",
    )
    f_min: float | None = Field(
        default=None, gt=0, description="smallest learning-rate multiplier; None: the scaling's own"
    )
    f_max: float | None = Field(
        default=None, gt=0, description="largest learning-rate multiplier; None: the scaling's own"
    )
    preserve_mean: bool = Field(
        default=False,
        description="divide multipliers by their mean, so that scaling is not also a higher learning rate",
    )
    off_multiplier: float = Field(
        default=0.0, ge=0, lt=1, description="multiplier of what the mask leaves off; above 0 nothing is saved"
    )
    always_on: Names = Field(
        default=(),
        description="kinds (classifier, embedding, …) or component names that the mask does not decide about",
    )

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        low, high = self.f_min, self.f_max
        if low is not None and high is not None and low > high:
            raise ValueError(f"expected f_min <= f_max, found f_min {low} and f_max {high}")
        if self.preserve_mean and not (low or 1.0) <= 1.0 <= (high or 1.0):
            raise ValueError(f"expected f_min <= 1 <= f_max with preserve_mean, found f_min {low} and f_max {high}")
        return self


class ProbeConfig(Section):
    """Looks at examples that are never trained on."""

    interval: IntegerOrAuto = Field(
        default="auto",
        description="steps between probes; 0: none; 1: scores at every step; auto: from the run's length",
    )
    size: IntegerOrAuto = Field(
        default="auto", description="examples per probe; 0: score training batches instead; auto: from max_fraction"
    )
    max_fraction: float = Field(
        default=0.01,
        gt=0,
        le=1,
        description="share of the run's own FLOPs that all probes may spend, where interval or size is auto",
    )
    row_stride: int = Field(
        default=4,
        ge=1,
        description="signals of the optimizer's step read one row in so many of each large weight, in turn; 1: all",
    )


class LowRankConfig(Section):
    """Low-rank pairs in place of dense weight gradients: W + (alpha / rank) · B A, of which A and B are trained."""

    rank: int = Field(default=8, ge=1, description="inner size of a pair")
    alpha: float = Field(default=16.0, gt=0, description="a pair counts alpha / rank times")
    lr_multiplier: float = Field(
        default=20.0, gt=0, description="learning rate of pairs, as a multiple of what their components have otherwise"
    )
    components: Names = Field(
        default=(), description="kinds (ffn, head, …) or component names that take pairs; none: all in the layers"
    )
    others: Literal["dense", "frozen"] = Field(
        default="dense",
        description="what of such a component is no weight of a linear layer (biases, norms, kernels, tables): trained "
        "as it is, or not at all",
    )


class ExamplesConfig(Section):
    """What of the data is skipped because it is learnt well already, judged by its loss when it was last seen."""

    prune: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="probability that a well-learnt example is skipped; kept ones weigh 1/(1 − prune), so that the "
        "expectation of gradients is unchanged; 0: off",
    )
    threshold: float = Field(
        default=1.0,
        gt=0,
        description="well learnt is a loss below so many times the mean of the known ones (of examples, of tokens)",
    )
    off_for_last: float = Field(
        default=0.125, ge=0, lt=1, description="share of the run, at its end, in which nothing is skipped"
    )
    tokens: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="language models: share of the well-learnt target tokens that the head does not compute; with "
        "select 'top', of all known ones; 0: off",
    )
    select: Literal["unbiased", "top"] = Field(
        default="unbiased",
        description="how tokens are skipped; unbiased: by chance, kept ones weigh 1/(1 − tokens); top: those with the "
        "lowest loss, which is BIASED: it trains another objective than the loss",
    )


def _pairs_or_auto(value: Any) -> Any:
    if value is None or value == "auto" or isinstance(value, LowRankConfig):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a group of settings ({', '.join(LowRankConfig.model_fields)}), 'auto' or nothing")
    try:
        return LowRankConfig.model_validate(value)
    except ValidationError as error:
        raise ConfigError([f"update.low_rank.{problem}" for problem in problems_of(error, LowRankConfig)]) from None


class UpdateConfig(Section):
    """How updates are made."""

    moments: Literal["keep", "decay", "reset", "offload"] = Field(
        default="keep",
        description="optimizer state of what is off: untouched, decayed as if by zero gradients, dropped, or moved to "
        "the CPU's memory",
    )
    average_last: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the run, at its end, over whose steps the weights are averaged; 0: the last step's stay",
    )
    dropout: Literal["model", "auto", "off"] = Field(
        default="model",
        description="model: as the model has it; off; auto: off where the budget ends before an example comes again",
    )
    sample: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of a batch's positions that weight gradients of linear layers are made from, drawn by how "
        "much each adds to them, so that their expectation is unchanged; 1: all",
    )
    low_rank: Annotated[LowRankConfig | Literal["auto"] | None, BeforeValidator(_pairs_or_auto)] = Field(
        default=None,
        description="components that are trained by low-rank pairs, and how; None: none; auto: the layers of a "
        "language model, at rank 8, where they can have pairs",
    )

    @property
    def pairs(self) -> LowRankConfig | None:
        """The low-rank pairs, where they are spelled out; None: there are none, or the model is to say."""
        return self.low_rank if isinstance(self.low_rank, LowRankConfig) else None

    @property
    def pair_multiplier(self) -> float | None:
        """The multiple of the learning rate that low-rank pairs have, where they are spelled out; None: see `pairs`."""
        return None if self.pairs is None else self.pairs.lr_multiplier


class EnergyConfig(Section):
    """How a run's energy is found."""

    watts: float | None = Field(
        default=None,
        gt=0,
        description="power of the training device, for estimates; None: a stated default per type of device",
    )
    counter: Literal["auto", "none"] = Field(
        default="auto", description="auto: NVML's or RAPL's counter where it can be read; none: seconds × watts"
    )
    carbon_intensity: float = Field(
        default=WORLD_CARBON_INTENSITY,
        ge=0,
        description="grams of CO2 equivalent per kWh (default: the world's electricity in 2024, Ember 2025)",
    )


class ExecutionConfig(Section):
    """How the plan is carried out."""

    @model_validator(mode="after")
    def _folder_of_a_disk_cache(self) -> Self:
        has_place = self.cache_dir is not None
        if (self.cache == "disk" and not has_place) or (self.cache in ("none", "memory") and has_place):
            raise ValueError(
                f"expected cache_dir with cache 'disk' (or 'auto'), and only there; found cache {self.cache!r} and "
                f"cache_dir {self.cache_dir!r}"
            )
        return self

    cache: Literal["auto", "none", "memory", "disk"] = Field(
        default="auto",
        description="where the frozen prefix's activations are kept; auto: in memory where the plan has a cut; disk: "
        "in cache_dir, from where other runs with the same frozen weights read them, too",
    )
    cache_dtype: Literal["model", "float32", "bfloat16", "float16", "int8"] = Field(
        default="model",
        description="how cached activations are stored; model: as computed, so that a hit is exact; int8: with a scale "
        "per token",
    )
    cache_max_bytes: int = Field(
        default=4 << 30, ge=0, description="bytes the cache may hold; examples beyond are recomputed each time"
    )
    cache_dir: str | None = Field(
        default=None, description="folder of a cache on disk; with cache 'auto', on disk where the model can be cached"
    )
    positions: Literal["auto", "all"] = Field(
        default="all",
        description="what the last layer, and a language model's head, compute in training steps; auto: only the "
        "positions whose output the loss reads, where the model proves which; all: every position",
    )
    padding: Literal["auto", "all"] = Field(
        default="all",
        description="how a padded batch passes through the model in training steps; auto: in a few groups of rows of "
        "like length, each cut to its longest, where the model proves that this changes nothing; all: as it is",
    )

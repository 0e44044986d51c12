"""What a command is asked to do: one YAML file, flags over it, `--set` over both; all problems reported at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from rgft.config import Config, apply_overrides
from rgft.config.presets import DEFAULT_PRESET
from rgft.config.problems import problems_of
from rgft.config.sections import Names, Section
from rgft.errors import ConfigError
from rgft.optimizer import KINDS, Kind, Name
from rgft.search import are_rates

TaskName = Literal["text-classification", "regression", "language-modelling", "chat", "image-classification"]

#: Settings that only some tasks use; given for another, they are refused, not ignored.
ONLY_FOR: Mapping[str, tuple[TaskName, ...]] = {
    "text": ("text-classification", "regression", "language-modelling"),
    "label": ("text-classification", "regression", "image-classification"),
    "messages": ("chat",),
    "chat_template": ("chat",),
    "loss_on": ("chat",),
    "packing": ("language-modelling",),
    "max_length": ("text-classification", "regression", "language-modelling", "chat"),
    "image": ("image-classification",),
    "flip": ("image-classification",),
}

#: Tokens where `max_length` is not given.
MAX_LENGTH: Mapping[TaskName, int] = {
    "text-classification": 128, "regression": 128, "language-modelling": 512, "chat": 1024
}  # fmt: skip

#: Examples per evaluation batch where `eval_batch_size` is not given. A language model's outputs are a vocabulary wide
#: at each position, gigabytes in a large batch: there, training's own is taken where it is smaller.
EVAL_BATCH_SIZE = 64
LANGUAGE_MODELS: tuple[TaskName, ...] = ("language-modelling", "chat")

#: Key of the file's section that holds RGFT's own configuration.
SECTION = "rgft"

#: What a command-line user has that `Config` does not: a classifier is nearly always new, and learns faster.
NEW_CLASSIFIER: Mapping[str, Any] = {"classifier_lr_multiplier": 10.0}
WITH_CLASSIFIER: tuple[TaskName, ...] = ("text-classification", "regression", "image-classification")

#: Of the preset `rgft`; the others spend what they spend.
DEFAULT_BUDGET = 0.3


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _learning_rates(value: Any) -> Any:
    """A number; a tuple of several, also given as text ("1e-4,3e-4"); "auto" or "search"."""
    if value in ("auto", "search"):
        return value
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    try:
        rates = tuple(float(item) for item in items if not isinstance(item, bool))
    except (TypeError, ValueError):
        rates = ()
    if not are_rates(rates) or len(rates) < len(items):
        raise ValueError("expected a number > 0, several of them, each once, 'auto' or 'search'")
    return rates[0] if len(rates) == 1 else rates


class RunSettings(Section):
    """Everything of a run beside RGFT's own configuration."""

    model: str = Field(min_length=1, description="hub name or folder of a pre-trained model")
    data: str = Field(
        min_length=1,
        description="training examples: a file (.csv, .tsv, .jsonl, .parquet; .txt for language modelling), a folder "
        "of images in folders named like their class, or a hub name",
    )
    task: TaskName = Field(default="text-classification", description="what is learnt")
    text: Annotated[Names, BeforeValidator(_one_or_more)] = Field(
        default=("text",), min_length=1, max_length=2,
        description="columns with texts: one, or two for classification and regression of pairs",
    )  # fmt: skip
    label: str = Field(default="label", min_length=1, description="column with labels, or with numbers (regression)")
    messages: Annotated[Names, BeforeValidator(_one_or_more)] = Field(
        default=("messages",), min_length=1, max_length=2,
        description="chat: the column with conversations (lists of role and content), or two with prompt and answer",
    )  # fmt: skip
    chat_template: str | None = Field(
        default=None, min_length=1, description="chat: file with a Jinja template; None: the tokenizer's own"
    )
    loss_on: Literal["assistant", "all"] = Field(default="assistant", description="chat: tokens that are learnt")
    packing: bool = Field(default=True, description="language modelling: texts are joined and cut into equal blocks")
    image: str = Field(default="image", min_length=1, description="column with images, of a hub data set")
    flip: bool = Field(default=True, description="images: training images are mirrored left to right half the time")
    validation: str | None = Field(default=None, description="examples for validation; None: held_out of the training")
    test: str | None = Field(default=None, description="examples that are evaluated once, at the end")
    held_out: float = Field(default=0.1, gt=0, lt=1, description="share held out where no validation is given")
    max_length: int | None = Field(
        default=None, ge=2, description="tokens; longer inputs are cut (None: 128; 512 and 1024 for language models)"
    )
    optimizer: Name = Field(default="adamw", description="what makes the steps")
    lr: Annotated[float | tuple[float, ...] | Literal["auto", "search"], BeforeValidator(_learning_rates)] = Field(
        default="auto",
        description="learning rate at multiplier 1; auto: what suits the model's width, the optimizer and how often "
        "the run sees its examples; several (1e-4,3e-4): the best is searched for inside the budget; search: among "
        "rates around auto's",
    )
    epochs: float = Field(default=3.0, gt=0, description="of the full fine-tuning that the budget is a share of")
    batch_size: int = Field(default=32, ge=1, description="examples per micro-batch")
    accumulation: int = Field(default=1, ge=1, description="micro-batches per optimizer step")
    weight_decay: float = Field(default=0.01, ge=0, description="decoupled, of weights but not of biases and norms")
    schedule: Literal["linear", "cosine", "constant"] = Field(default="linear", description="of the learning rate")
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the run with a rising learning rate")
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="gradients are clipped to it; None: not")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16: autocast")
    device: str = Field(default="auto", description="auto: an accelerator where there is one, else the CPU")
    checkpoint_every: int = Field(default=100, ge=0, description="steps between checkpoints; 0: at the end only")
    eval_batch_size: int | None = Field(
        default=None, ge=1, description="examples per evaluation batch (None: 64; as in training for language models)"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="of splits, new weights, data order, probes and dropout")

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        problems = [
            f"{key}: expected only with {' or '.join(tasks)}, found {getattr(self, key)!r} with {self.task}"
            for key, tasks in ONLY_FOR.items()
            if self.task not in tasks and getattr(self, key) != type(self).model_fields[key].default
        ]
        if self.task == "language-modelling" and len(self.text) > 1:
            problems.append(f"text: expected one column for language-modelling, found {', '.join(self.text)}")
        if problems:
            raise ValueError("\n".join(problems))
        return self


#: What may differ when a run is resumed: none of it changes what is computed.
FREE_ON_RESUME = frozenset({"checkpoint_every"})


@dataclass(frozen=True, kw_only=True)
class Request:
    """A checked request.

    Attributes:
        settings: of the run.
        rgft: the `rgft` section as given, flags and overrides merged in.
        config: RGFT's configuration that follows from it.
    """

    settings: RunSettings
    rgft: Mapping[str, Any]
    config: Config

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; a YAML file of `settings` and `rgft` asks for the same run."""
        return {
            "settings": self.settings.model_dump(mode="json"),
            SECTION: dict(self.rgft),
            "resolved": self.config.resolved().to_dict(),
        }


def budget_of(flops: float | None, seconds: float | None, joules: float | None = None) -> Any:
    """The budget that flags ask for; None where none is given."""
    given = {"flops": flops, "seconds": seconds, "joules": joules}
    given = {key: value for key, value in given.items() if value is not None}
    return None if not given else flops if set(given) == {"flops"} else given


def read_request(
    *, file: Path | None = None, flags: Mapping[str, Any] | None = None, rgft_flags: Mapping[str, Any] | None = None,
    overrides: Iterable[str] = (), stored: Mapping[str, Any] | None = None,
) -> Request:  # fmt: skip
    """Puts a request together; later sources win: stored, file, flags, overrides.

    Args:
        file: YAML: run settings, and a section `rgft`.
        flags: run settings given as flags; None means not given.
        rgft_flags: settings of the section given as flags.
        overrides: `key.path=value`, of the section (with or without `rgft.` before it) or of run settings.
        stored: `to_dict` of the run that is resumed. Settings that would change what it computes are refused.

    Raises:
        ConfigError: with every problem of every source.
    """
    problems: list[str] = []
    base = stored or {"settings": {}, SECTION: {}}
    settings, rgft = dict(base["settings"]), dict(base[SECTION])
    if file is not None:
        given = read_yaml(file)
        section = given.pop(SECTION, None)
        if section is None:
            section = {}
        if isinstance(section, Mapping) and all(isinstance(key, str) for key in section):
            rgft |= section
        else:
            problems.append(f"{file}: {SECTION}: expected a group of settings, found {section!r}")
        settings |= given
    settings |= {key: value for key, value in (flags or {}).items() if value is not None}
    rgft |= {key: value for key, value in (rgft_flags or {}).items() if value is not None}
    of_run, of_rgft = _split(overrides)
    try:
        settings = apply_overrides(settings, of_run)
    except ConfigError as error:
        problems += error.problems
    try:
        rgft = apply_overrides(rgft, of_rgft)
    except ConfigError as error:
        problems += error.problems
    if stored is None and settings.get("task", WITH_CLASSIFIER[0]) in WITH_CLASSIFIER:
        rgft = {**NEW_CLASSIFIER, **rgft}
    if stored is None and rgft.get("preset", DEFAULT_PRESET) == DEFAULT_PRESET:
        rgft.setdefault("budget", DEFAULT_BUDGET)
        if isinstance(rgft["budget"], Mapping) and set(rgft["budget"]) == {"memory"}:
            rgft["budget"] = {"flops": DEFAULT_BUDGET, **rgft["budget"]}  # memory is a limit, and spends nothing
    if stored is None and (kind := KINDS.get(str(settings.get("optimizer", "adamw")))) is not None:
        _suit_optimizer(kind, settings)
    if "seed" in rgft:
        problems.append(f"{SECTION}.seed: the seed of a run stands outside this section, found it inside; give seed")
    problems += [
        f"{key}: is a setting of the section {SECTION!r}; write it below `{SECTION}:`"
        for key in settings
        if key not in RunSettings.model_fields and key in Config.model_fields
    ]
    settings = {k: v for k, v in settings.items() if k in RunSettings.model_fields or k not in Config.model_fields}
    checked: RunSettings | None = None
    try:
        checked = RunSettings(**settings)
    except ValidationError as error:
        problems += [_with_flag(problem) for problem in problems_of(error, RunSettings)]
    config: Config | None = None
    try:
        config = Config.from_dict({**rgft, "seed": checked.seed if checked else 0})
    except ConfigError as error:
        problems += [f"{SECTION}.{problem}" for problem in error.problems]
    if problems or checked is None or config is None:
        raise ConfigError(problems)
    request = Request(settings=checked, rgft=rgft, config=config)
    if stored is not None:
        _refuse_changes(request, stored)
    return request


def _suit_optimizer(kind: Kind, settings: dict[str, Any]) -> None:
    """What is not given, as it suits the optimizer."""
    if kind.is_schedule_free:  # it averages the iterates itself, in place of a schedule
        settings.setdefault("schedule", "constant")


def _split(overrides: Iterable[str]) -> tuple[list[str], list[str]]:
    """Overrides of run settings, and those of the section."""
    of_run: list[str] = []
    of_rgft: list[str] = []
    for override in overrides:
        first = re.split(r"[.=]", override, maxsplit=1)[0].strip()
        if first in RunSettings.model_fields:
            of_run.append(override)
        else:
            of_rgft.append(override.strip().removeprefix(f"{SECTION}."))
    return of_run, of_rgft


def _with_flag(problem: str) -> str:
    key = problem.partition(":")[0]
    if key in ("model", "data") and problem.endswith("found none"):
        return f"{problem}; give --{key}, or {key} in the file of --config"
    return problem


def _refuse_changes(request: Request, stored: Mapping[str, Any]) -> None:
    now = request.to_dict()
    problems = [
        f"{prefix}{key}: the run was started with {stored[part].get(key)!r}, found {now[part].get(key)!r}; --resume "
        "goes on with the same settings, --overwrite starts anew"
        for part, prefix in (("settings", ""), ("resolved", f"{SECTION}."))
        for key in sorted({*stored[part], *now[part]} - FREE_ON_RESUME)
        if stored[part].get(key) != now[part].get(key) and (part, key) != ("resolved", "seed")
    ]
    if problems:
        raise ConfigError(problems)


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: it is missing, unreadable, no YAML, or no mapping.
    """
    import yaml

    try:
        with file.open(encoding="utf-8") as stream:
            data = yaml.load(stream, Loader=_loader())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{file}: expected a YAML file; it could not be read: {reason}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: expected YAML: {' '.join(str(error).split())}") from error
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{file}: expected settings as `key: value`, found {data!r}")
    return data


def _loader() -> Any:
    """YAML's safe loader, in which `2e-4` is a number (YAML 1.1 wants `2.0e-4`) and no key is given twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            twice = sorted({key for key in keys if isinstance(key, str) and keys.count(key) > 1})
            if twice:
                raise yaml.constructor.ConstructorError(None, None, f"given twice: {', '.join(twice)}", node.start_mark)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    return Loader

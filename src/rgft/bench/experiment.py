"""An experiment: tasks, methods with their grids, and seeds. Its result is a folder with one JSON file per run.

Learning rates and variants are chosen on validation data with seeds of their own (see `tuning`); test data is looked
at by final runs only, once each.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rgft.bench import settings_file
from rgft.bench.measures import Extra
from rgft.bench.methods import METHODS, Followed, method
from rgft.bench.settings_file import Group, MethodSettings, Name, Rates, Seeds, Share, Shares
from rgft.bench.tasks import known_task
from rgft.config.presets import laid_over
from rgft.config.sections import Section
from rgft.errors import ConfigError
from rgft.run import Settings

#: What rates and variants are chosen by; a score is the task's own.
Choosing = Literal["loss", "score"]

#: Where a rate lies among those that were tried.
Edge = Literal["low", "high"]


def _known_method(name: str) -> str:
    return method(name).name


def _of_runs(settings: dict[str, Any]) -> dict[str, Any]:
    known = sorted(set(Settings.__dataclass_fields__) - {"lr"})
    if unknown := sorted(set(settings) - set(known)):
        raise ConfigError(f"run: expected settings of a run ({', '.join(known)}), found {', '.join(unknown)}")
    return settings


def _extra(value: Any) -> Any:
    return Extra.from_dict(value) if isinstance(value, Mapping) else value


class Contender(Section):
    """A method at one budget, with the learning rates and variants that it may choose from.

    Attributes:
        label: its row in tables.
        method: name in `methods.METHODS`.
        budget: share of full fine-tuning's FLOPs.
        lrs: grid of learning rates.
        settings: of the method.
        seeds: seeds of the final runs; None: the experiment's.
        variants: name → settings laid over its own (`laid_over`), that are tried at the best rate; "method": those
            that the method itself names.
        evaluate: what is evaluated of its final runs beside their test split; None: what the experiment asks for.
    """

    label: Name
    method: Annotated[str, AfterValidator(_known_method)]
    budget: Share
    lrs: Rates
    settings: MethodSettings = Field(default_factory=dict)
    seeds: Seeds | None = None
    variants: dict[Name, MethodSettings] = Field(default_factory=dict)
    evaluate: Annotated[Extra | None, BeforeValidator(_extra)] = None

    @model_validator(mode="before")
    @classmethod
    def _of_method(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not isinstance(data.get("variants"), str):
            return data
        if data["variants"] != "method":
            raise ConfigError(f"variants: expected a group of settings or 'method', found {data['variants']!r}")
        if data.get("method") not in METHODS:  # which is told where it is checked
            return {**data, "variants": {}}
        found = METHODS[data["method"]].variants
        if not found:
            raise ConfigError(f"variants: expected none of {data['method']}, which has no key setting; found 'method'")
        return {**data, "variants": found}

    @model_validator(mode="after")
    def _check_variants(self) -> Self:
        problems = [
            f"variants.{name}: expected settings without lr, since rates are chosen before; found {settings['lr']!r}"
            for name, settings in self.variants.items()
            if "lr" in settings
        ]
        if problems:
            raise ConfigError(problems)
        return self

    @property
    def is_tuned(self) -> bool:
        """Whether there is anything to choose."""
        return len(self.lrs) > 1 or bool(self.variants)

    @property
    def has_grid(self) -> bool:
        """Whether its rates go on beyond those that it names; not where runs find theirs themselves."""
        return len(self.lrs) > 1 and self.settings.get("lr") is None

    def rates_beyond(self, count: int) -> dict[Edge, list[float]]:
        """The next rates on each side of the grid, as far apart as its last two there, to three digits."""
        if not self.has_grid:
            return {"low": [], "high": []}
        grid = sorted(self.lrs)

        def beyond(last: float, ratio: float) -> list[float]:
            rates = [last]
            for _ in range(count):
                rates.append(float(f"{rates[-1] * ratio:.3g}"))
            return rates[1:]

        return {"low": beyond(grid[0], grid[0] / grid[1]), "high": beyond(grid[-1], grid[-1] / grid[-2])}

    def settings_of(self, variant: str | None) -> dict[str, Any]:
        """The method's settings in a variant; None: its own."""
        return dict(self.settings) if variant is None else laid_over(self.settings, self.variants[variant])


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a contender's runs are made with.

    Attributes:
        lr: learning rate.
        variant: its name; None: the contender's own settings.
        has_diverged: whether a run diverged at this and at every other choice.
    """

    lr: float
    variant: str | None = None
    has_diverged: bool = False


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: a contender at one learning rate, in one variant, with one seed. See `Choice`."""

    contender: Contender
    lr: float
    seed: int
    is_final: bool
    variant: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Of the method."""
        return self.contender.settings_of(self.variant)

    @property
    def file_name(self) -> str:
        kind = "final" if self.is_final else "tuning"
        variant = "" if self.variant is None else f"--{self.variant}"
        return f"{self.contender.label}--{kind}{variant}--lr{self.lr:g}--seed{self.seed}.json"


class Experiment(Section):
    """What is compared.

    Attributes:
        name: of the result folder.
        task: settings of the task (see `tasks.demo`).
        run: settings of every run (`rgft.run.Settings`), without the learning rate.
        config: RGFT settings that all contenders share.
        contenders: what is compared.
        tuning_seeds, seeds: disjoint.
        evaluate: what is evaluated of final runs beside their test split (see `measures.Extra`): time, no budget.
            Contenders may ask for something else.
        max_extensions: how many rates a contender may try beyond its grid, while the best is at an edge.
        choose: what rates and variants are chosen by: the loss, or the task's own score and, where two are equal in
            that, the loss.
        like: name of the experiment of which this is another choice: what that has run is not run again.
    """

    name: Name
    task: Group
    run: Annotated[Group, AfterValidator(_of_runs)]
    config: Group
    contenders: tuple[Contender, ...]
    tuning_seeds: Seeds
    seeds: Seeds
    evaluate: Annotated[Extra, BeforeValidator(_extra)] = Field(default_factory=Extra)
    max_extensions: int = Field(default=3, ge=0)
    choose: Choosing = "loss"
    like: Name | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        problems = [
            f"{whose}: expected to be disjoint with tuning_seeds, found {', '.join(map(str, sorted(both)))} in both"
            for whose, seeds in [
                ("seeds", self.seeds),
                *((f"{c.label}: seeds", c.seeds or ()) for c in self.contenders),
            ]
            if (both := set(self.tuning_seeds) & set(seeds))
        ]
        labels = [contender.label for contender in self.contenders]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            problems.append(f"contenders: expected labels of their own, found {', '.join(twice)} more than once")
        if not self.tuning_seeds and any(contender.is_tuned for contender in self.contenders):
            problems.append("expected tuning_seeds, since contenders have several rates or variants; found none")
        for extra in dict.fromkeys((self.evaluate, *map(self.evaluate_of, self.contenders))):
            asking = [contender for contender in self.contenders if self.evaluate_of(contender) == extra]
            try:
                extra.check(
                    task=self.task.get("name", "rotten_tomatoes"),
                    searches_rate=any(c.settings.get("lr") not in (None, "auto") for c in asking),
                )
            except ConfigError as error:
                problems += error.problems
        if self.choose == "score":
            problems += self._wrong_choice()
        problems += [problem for contender in self.contenders for problem in self._wrong_settings(contender)]
        if problems:
            raise ConfigError(problems)
        return self

    def _wrong_choice(self) -> list[str]:
        try:
            is_judged = known_task(self.task).is_judged
        except ConfigError as error:
            return error.problems
        why = "choose: expected 'loss', since this task's score is of what a model writes, on the test split alone"
        return [f"{why}; found 'score'"] if is_judged else []

    def _wrong_settings(self, contender: Contender) -> Iterator[str]:
        for variant in (None, *contender.variants):
            settings = self.with_common(contender.method, contender.settings_of(variant))
            where = contender.label if variant is None else f"{contender.label}: variants.{variant}"
            chosen = method(contender.method)
            yield from (f"{where}: {problem}" for problem in chosen.problems_of(contender.settings_of(variant)))
            try:
                chosen.configuration(budget=contender.budget, seed=0, settings=settings, followed=Followed())
            except ConfigError as error:
                yield from (f"{where}: config.{problem}" for problem in error.problems)

    def evaluate_of(self, contender: Contender) -> Extra:
        """What is evaluated of a contender's final runs beside their test split."""
        return self.evaluate if contender.evaluate is None else contender.evaluate

    def with_common(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A method's settings, with those of RGFT that all contenders share where it has none of its own."""
        return laid_over({"config": laid_over(self.config, method(name).instead)}, settings)

    @classmethod
    def load(cls, path: Path) -> Experiment:
        """Reads an experiment file.

        Its contenders may be the name of a file beside it, which several experiments share; with `budgets` each of
        them is there at each of these, as "label-budget". With `like`, the name of a file beside it, it is that
        experiment under a name of its own, with another choice; its contenders are labels of that one's.

        Raises:
            ConfigError: the file cannot be used; all problems at once.
        """
        data, problems = settings_file.read_settings(path, "an experiment"), list[str]()
        if "like" in data:
            return cls._like(path, data)
        budgets: tuple[float | None, ...] = (None,)
        if "budgets" in data:
            spread = settings_file.checked(_Budgets, {"budgets": data.pop("budgets")}, str(path), problems)
            budgets = spread.budgets if spread else ()
        if "contenders" in data:
            data["contenders"] = tuple(_contenders(path, data["contenders"], budgets, problems))
        experiment = settings_file.checked(cls, data, str(path), problems)
        if problems or experiment is None:
            raise ConfigError(list(dict.fromkeys(problems)))  # a contender has the same ones at each budget
        return experiment

    @classmethod
    def _like(cls, path: Path, data: Mapping[str, Any]) -> Experiment:
        problems = list[str]()
        given = settings_file.checked(_Like, data, str(path), problems)
        if given is None:
            raise ConfigError(problems)
        other = cls.load(path.parent / given.like)
        if given.name == other.name:
            raise ConfigError(f"{path}: name: expected another one than that of {given.like}, found {given.name!r}")
        try:
            (named,) = of_contenders([other], given.contenders)
        except ConfigError as error:
            raise ConfigError([f"{path}: contenders: {problem}" for problem in error.problems]) from error
        fields = {**dict(named), "name": given.name, "choose": given.choose, "like": other.name}
        experiment = settings_file.checked(cls, fields, str(path), problems)
        if experiment is None:
            raise ConfigError(problems)
        return experiment

    def tuning_cells(self, contender: Contender, choice: Choice) -> Iterator[Cell]:
        """The runs that a choice is judged by."""
        return self._cells(contender, choice, self.tuning_seeds, is_final=False)

    def final_cells(self, contender: Contender, choice: Choice) -> Iterator[Cell]:
        """A contender's final runs, with what was chosen."""
        seeds = self.seeds if contender.seeds is None else contender.seeds
        return self._cells(contender, choice, seeds, is_final=True)

    def all_cells(self) -> Iterator[Cell]:
        """Every run that may have a result: tuning and final ones of each choice, whichever is made."""
        for contender in self.contenders:
            beyond = contender.rates_beyond(self.max_extensions)
            for lr in (*contender.lrs, *beyond["low"], *beyond["high"]):
                for variant in (None, *contender.variants):
                    if contender.is_tuned:
                        yield from self.tuning_cells(contender, Choice(lr=lr, variant=variant))
                    yield from self.final_cells(contender, Choice(lr=lr, variant=variant))

    @staticmethod
    def _cells(contender: Contender, choice: Choice, seeds: Seeds, *, is_final: bool) -> Iterator[Cell]:
        for seed in seeds:
            yield Cell(contender=contender, lr=choice.lr, seed=seed, is_final=is_final, variant=choice.variant)


def of_contenders(experiments: Sequence[Experiment], labels: Collection[str]) -> list[Experiment]:
    """Experiments with only those of their contenders that have one of these labels, without those that have none.

    Raises:
        ConfigError: a label is no contender's.
    """
    there = [contender.label for experiment in experiments for contender in experiment.contenders]
    if unknown := sorted(set(labels) - set(there)):
        raise ConfigError(
            f"expected labels of contenders ({', '.join(dict.fromkeys(there))}), found {', '.join(unknown)}"
        )
    chosen = (
        experiment.model_copy(update={"contenders": tuple(c for c in experiment.contenders if c.label in labels)})
        for experiment in experiments
    )
    return [experiment for experiment in chosen if experiment.contenders]


class _Like(Section):
    name: Name
    like: Annotated[str, Field(min_length=1)]
    choose: Choosing
    contenders: Annotated[tuple[Name, ...], BeforeValidator(settings_file.as_tuple), Field(min_length=1)]


class _Budgets(Section):
    budgets: Shares


def _contenders(
    path: Path, given: Any, budgets: tuple[float | None, ...], problems: list[str]
) -> Iterator[Contender]:  # fmt: skip
    """The contenders of an experiment file, budget by budget; what is wrong with others is added to the problems."""
    if isinstance(given, str):
        path = path.parent / given
        given = settings_file.read_json(path, "a list of contenders")
    if not isinstance(given, list) or not given or not all(isinstance(item, dict) for item in given):
        problems.append(f"{path}: contenders: expected a list of contenders, found {given!r:.60}")
        return
    for budget in budgets:
        for place, item in enumerate(given):
            where = f"{path}: contenders.{place}" + (f" ({item['label']})" if "label" in item else "")
            if budget is not None and "budget" in item:
                problems.append(f"{where}: budget: expected none beside the experiment's budgets")
            contender = settings_file.checked(Contender, item if budget is None else _at(budget, item), where, problems)
            if contender is not None:
                yield contender


def _at(budget: float, item: Mapping[str, Any]) -> dict[str, Any]:
    label = item.get("label")
    named = {"label": f"{label}-{budget:g}"} if isinstance(label, str) else {}
    return {**item, **named, "budget": budget}

"""Results of final runs, as they are compared: by task and budget, contender and seed."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from rgft.bench.acting import acted
from rgft.bench.figures import figure, is_of
from rgft.bench.fingerprint import require_equal
from rgft.bench.group import Group, canonical, told_apart
from rgft.bench.methods import METHODS
from rgft.bench.outcomes import examples_of_test
from rgft.bench.results import OF_A_FINAL_RUN, read_result, require
from rgft.errors import DataError

log = logging.getLogger("rgft")

#: In a metric's place: the one that each task's tables show.
SCORE = "score"


class Kind(NamedTuple):
    """What makes two contenders the same, on whichever task: their labels do not.

    Attributes:
        method: name in `methods.METHODS`.
        settings: its own, as a text.
        revision: of the method.
    """

    method: str
    settings: str
    revision: int

    @property
    def is_plain(self) -> bool:
        """Whether the method runs with its own settings."""
        return self.settings == "{}"

    @property
    def is_current(self) -> bool:
        """Whether it is of the method's revision of now."""
        known = METHODS.get(self.method)
        return known is not None and known.revision == self.revision


@dataclass(frozen=True, kw_only=True)
class Trials:
    """The runs that a contender's learning rate was chosen by.

    Attributes:
        flops: of all of them, as multiples of one full fine-tuning; 0: there are none.
        rates: that were tried in the contender's own settings or in the variant that was best.
    """

    flops: float = 0.0
    rates: frozenset[float] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Finals:
    """A contender's final runs.

    Attributes:
        label: its row in tables, without its budget; of a row of an earlier revision it says so.
        kind: what it is, whatever its label.
        budget: share of full fine-tuning's FLOPs that it was given.
        by_seed: results.
        diverged: seeds whose runs did, and have no figures.
        tuning: what its learning rate was chosen by.
    """

    label: str
    kind: Kind
    budget: float
    by_seed: Mapping[int, Mapping[str, Any]]
    diverged: tuple[int, ...] = ()
    tuning: Trials = Trials()

    @property
    def is_rate_at_edge(self) -> bool:
        """Whether its rate is the lowest or highest of those that were tried, where there were several."""
        rates, own = self.tuning.rates, {float(result["lr"]) for result in self.by_seed.values()}
        return len(rates) > 1 and bool(own & {min(rates), max(rates)})

    @property
    def seeds(self) -> str:
        """How many there are, or how many of them diverged."""
        count = len(self.by_seed) + len(self.diverged)
        of_all = f"{count} seed{'s' if count != 1 else ''}"
        return f"{len(self.diverged)} of {of_all} diverged" if self.diverged else of_all

    @property
    def title(self) -> str:
        """Its label, with the variant of its settings that was best, if it is one."""
        variant = next((result["variant"] for result in self.by_seed.values() if "variant" in result), "")
        return f"{self.label}, {variant}" if variant else self.label

    @property
    def method(self) -> str:
        return self.kind.method

    @property
    def is_plain(self) -> bool:
        return self.kind.is_plain

    @property
    def is_current(self) -> bool:
        return self.kind.is_current

    @cached_property
    def acted(self) -> bool:
        """Whether it was anything but full fine-tuning under another name, in any run."""
        return not self.by_seed or any(acted(result) for result in self.by_seed.values())

    def metric(self, name: str) -> dict[int, float]:
        """Seed → value (see `figures`), of the runs in which it is defined."""
        values = {seed: figure(result, name) for seed, result in self.by_seed.items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def lacks(self, name: str) -> str:
        """Why a metric of it cannot be shown, in words; empty: it can.

        It is undefined in runs that end badly (`measures.undefined`): the mean of the others would flatter.
        """
        if not self.by_seed:
            return "diverged"
        asked = [result for result in self.by_seed.values() if is_of(result, name)]
        values, seeds = self.metric(name), len(asked)
        if asked and len(values) == seeds:
            return ""
        said = any(name in result.get("undefined_metrics", {}).get("test", {}) for result in asked)
        return f"undefined ({seeds - len(values)} of {seeds} seeds)" if values or said else "not measured"

    @property
    def test_examples(self) -> int | None:
        """How many it was tested on; None: an early result, which does not say."""
        return next((count for result in self.by_seed.values() if (count := examples_of_test(result))), None)

    @property
    def flops(self) -> float:
        """What it spent, as a share of full fine-tuning, in the mean."""
        return mean(float(result["ledger"]["flops"]["fraction_of_full"]) for result in self.by_seed.values())

    @property
    def steps(self) -> float:
        return mean(result["steps"] for result in self.by_seed.values())

    @property
    def rates(self) -> str:
        """Learning rates of the runs: chosen before them, or found in them."""
        rates = sorted({float(result.get("found_lr", result["lr"])) for result in self.by_seed.values()})
        return f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"


class _Key(NamedTuple):
    """What runs of one contender have in common."""

    label: str
    kind: Kind
    budget: float


#: An experiment's folder, and the label of a contender in it.
_Place = tuple[Path, str]


class _Trial(NamedTuple):
    """A run by which a learning rate was chosen."""

    place: _Place
    rate: float
    variant: str | None
    flops: float


def metric_of(group: Group, metric: str) -> str:
    """The metric of a task that is meant: `SCORE` is each task's own."""
    return group.metric if metric == SCORE else metric


def of_another_choice(groups: Collection[Group], metric: str) -> list[Group]:
    """Of tasks whose rates were chosen twice, those where that was not by what is compared: a task's score, or a loss.

    The two are one task: a score is not asked of rates that were chosen by loss where others were chosen by score.
    """
    return [
        group
        for group in groups
        if (group.chosen_by == "score") != (metric_of(group, metric) == group.metric)
        and any(group.is_chosen_otherwise(other) for other in groups)
    ]


def final_results(folder: Path) -> dict[Group, list[Finals]]:
    """All final runs below `folder`.

    Raises:
        DataError: there are none, a file is damaged, a contender has two with one seed, or runs that are compared were
            measured on different data.
    """
    found: dict[Group, dict[_Key, dict[int, Any]]] = {}
    first: dict[tuple[Group, int], tuple[Path, Any]] = {}
    places: dict[tuple[Group, _Key], set[_Place]] = {}
    for path, group, key, result in _results(folder, "final"):
        if "data" in result:
            other, data = first.setdefault((group, result["seed"]), (path, result["data"]))
            require_equal(result["data"], data, str(path), f"{other}, beside which it would stand")
        places.setdefault((group, key), set()).add((path.parent, result["contender"]))
        of_contender = found.setdefault(group, {}).setdefault(key, {})
        if result["seed"] in of_contender:
            rate = of_contender[result["seed"]]["lr"]
            raise DataError(
                f"{path}: expected one final run of {result['contender']!r} with seed {result['seed']}, found another "
                f"at the rate {rate:g}; delete the one that is out of date"
            )
        of_contender[result["seed"]] = result
    if not found:
        raise DataError(f"{folder}: expected results of final runs, found none; run the experiment first")
    trials = _trials(folder)
    titled = told_apart(found)
    groups = {
        group: [
            _finals(label, key, found[group][key], trials=[t for t in trials if t.place in places[group, key]])
            for key, label in _labels(list(found[group])).items()
        ]
        for group in sorted(found, key=lambda group: (titled[group].title, group.fixes_cuts))
    }  # fmt: skip
    return {
        titled[group]: finals + (_beside(group, groups) if group.fixes_cuts else []) for group, finals in groups.items()
    }


def without_superseded(contenders: Sequence[Finals]) -> list[Finals]:
    """Contenders without those of an earlier revision of which the present one has as many runs at that budget."""
    runs = {
        (finals.method, finals.kind.settings, finals.budget): len(finals.by_seed) + len(finals.diverged)
        for finals in contenders
        if finals.is_current
    }
    return [
        finals
        for finals in contenders
        if finals.is_current
        or runs.get((finals.method, finals.kind.settings, finals.budget), 0)
        < len(finals.by_seed) + len(finals.diverged)
    ]


def _finals(
    label: str, key: _Key, results: Mapping[int, Mapping[str, Any]], *, trials: Sequence[_Trial]
) -> Finals:  # fmt: skip
    variants = {result.get("variant") for result in results.values()}
    tuning = Trials(
        flops=sum(trial.flops for trial in trials),
        rates=frozenset(trial.rate for trial in trials if trial.variant in variants | {None}),
    )
    finals = Finals(
        label=label, kind=key.kind, budget=key.budget, tuning=tuning,
        by_seed={seed: result for seed, result in results.items() if "diverged" not in result},
        diverged=tuple(seed for seed, result in results.items() if "diverged" in result),
    )  # fmt: skip
    if finals.diverged:
        log.warning("%s at %g: %s, and are in no mean", label, key.budget, finals.seeds)
    return finals


def _results(folder: Path, kind: str) -> list[tuple[Path, Group, _Key, dict[str, Any]]]:
    found: list[tuple[Path, Group, _Key, dict[str, Any]]] = []
    for path in sorted(folder.glob(f"**/*--{kind}--*.json")):
        result = read_result(path)
        if kind == "final" and "diverged" not in result:
            require(path, result, OF_A_FINAL_RUN)
        try:
            group = Group.of(result)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        found.append((path, group, _key(result), result))
    return found


def _key(result: Mapping[str, Any]) -> _Key:
    # Which variant a method is best in, and which file of RGFT's it follows, is another on each task.
    own = result.get("settings_but_for_it", result.get("settings") or {})
    settings = {key: value for key, value in own.items() if key != "result"}
    kind = Kind(result["method"], canonical(settings), result.get("revision", 1))
    return _Key(_without_budget(result["contender"], result["budget"]), kind, float(result["budget"]))


def _without_budget(label: str, budget: float) -> str:
    """A label without its budget at the end, however that is written: 0.1, 1 or 1.0."""
    name, _, end = label.rpartition("-")
    try:
        return name if name and float(end) == budget else label
    except ValueError:
        return label


def _labels(keys: Sequence[_Key]) -> dict[_Key, str]:
    """Rows of tables: a label of its own for each contender at a budget."""
    labels = {key: key.label for key in keys}
    for key in keys:
        same = [other.kind for other in keys if (other.label, other.budget) == (key.label, key.budget)]
        if len({kind.settings for kind in same}) > 1:
            labels[key] += f" {key.kind.settings}"
        if not key.kind.is_current:
            labels[key] += f", revision {key.kind.revision}"
    return labels


def _trials(folder: Path) -> list[_Trial]:
    """All runs by which rates and variants were chosen. One that diverged has no ledger, and was stopped early."""
    return [
        _Trial(
            place=(path.parent, result["contender"]), rate=float(result["lr"]), variant=result.get("variant"),
            flops=float(result["ledger"]["flops"]["fraction_of_full"]) if "ledger" in result else 0.0,
        )
        for path, _, _, result in _results(folder, "tuning")
    ]  # fmt: skip


def _beside(cuts: Group, groups: Mapping[Group, list[Finals]]) -> list[Finals]:
    """RGFT's own choice, at the budgets of the fixed cuts."""
    budgets = {finals.budget for finals in groups[cuts]}
    return [
        finals
        for finals in groups.get(replace(cuts, fixes_cuts=False), [])
        if finals.method == "rgft" and finals.is_plain and finals.budget in budgets
    ]

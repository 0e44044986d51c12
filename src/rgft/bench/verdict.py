"""Two methods over all tasks: seed by seed on each, and over the tasks together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Literal

from rgft.bench.costs import doubt, source
from rgft.bench.figures import COSTS, is_lower_better, names
from rgft.bench.finals import SCORE, Finals, Kind, final_results, metric_of, of_another_choice
from rgft.bench.group import Group
from rgft.bench.paired import (
    TARGET_MARGIN,
    agreeing,
    at_equal_score,
    difference,
    lacking,
    logarithms,
    target_margin,
    undecided,
)
from rgft.bench.statistics import Comparison, Ratio, counts, over_tasks
from rgft.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a method does beside a baseline at one budget.

    Attributes:
        method, baseline: labels; where one stands for several contenders, with its settings.
        budget: share of full fine-tuning's FLOPs that the method was given.
        baseline_budget: that the baseline was given.
        by_task: each task's comparison.
        left_out: the other tasks, and why.
        together: over tasks; None with fewer than two that are independent and have enough pairs.
        counted: how many tasks that is over.
        ratios: the tasks' costs as multiples, where the metric is one; `together` is None then: seconds of unlike tasks
            have no mean that means anything.
        ratio_together: over tasks, by the same rules.
        sources: of each task's energy, where the metric is of that: "measured", "estimated".
        scores: each task's comparison of scores, where these are to be equal.
    """

    method: str
    baseline: str
    budget: float
    baseline_budget: float
    by_task: Mapping[Group, Comparison]
    left_out: Mapping[Group, str]
    together: Comparison | None
    counted: int
    ratios: Mapping[Group, Ratio] = field(default_factory=dict)
    ratio_together: Ratio | None = None
    sources: Mapping[Group, str] = field(default_factory=dict)
    scores: Mapping[Group, Comparison] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Equal:
    """Asks for what a metric says at equal score.

    Attributes:
        metric: the score; `SCORE`: each task's own.
        margin: within which scores are equal, in the score's unit.
    """

    metric: str = SCORE
    margin: float = TARGET_MARGIN


@dataclass(frozen=True, kw_only=True)
class _Side:
    """A contender to be found on each task: by what it is, its label aside.

    Attributes:
        label: as it was given; of several alike on a task, the one of that label is meant.
        name: for people.
        kind: what it is.
        budget: of the runs.
    """

    label: str
    name: str
    kind: Kind
    budget: float = 1.0

    def at(self, budget: float) -> _Side:
        return replace(self, budget=budget)

    def among(self, rows: Collection[Finals]) -> Finals | str:
        """Its runs on a task, or why there are none to take."""
        alike = [row for row in rows if (row.kind, row.budget) == (self.kind, self.budget)]
        found = [row for row in alike if row.label == self.label] or alike
        if len(found) == 1:
            return found[0]
        if found:
            return f"{self.label} may be {' or '.join(row.label for row in found)}: give one of these labels"
        return f"no final runs of {self.name} at {self.budget:g}"


def verdicts(
    folder: Path, method: str, baseline: str, *, metric: str, margin: float | None = None,
    against_budget: float | None = None, equal: Equal | None = None,
) -> list[Verdict]:  # fmt: skip
    """Compares two contenders at each budget at which both have final runs with common seeds.

    A contender is the same on all tasks that has the same method with the same settings, whatever its label there.

    Args:
        folder: of result files.
        method, baseline: labels.
        metric: of the test split; `SCORE`: each task's own.
        margin: how much worse still counts as non-inferior, in the metric's unit. None: 0, but where RGFT's score is
            held against full fine-tuning's at a higher budget, that of the target.
        against_budget: the baseline's; None: the method's own.
        equal: what is better by the metric must not have a lower score, beyond the margin; None: it may.

    Raises:
        ConfigError: a margin for a cost, whose verdict is its ratio's.
        DataError: a label is unknown, or there is nothing to compare.
    """
    if metric in COSTS and margin:
        raise ConfigError(f"margin: expected none with {metric}, which is judged by ratios; found {margin:g}")
    groups = {group: rows for group, rows in final_results(folder).items() if not group.fixes_cuts}
    ours, theirs = (_sides(groups, label) for label in (method, baseline))
    budgets = sorted({row.budget for rows in groups.values() for row in rows if row.kind in {s.kind for s in ours}})
    tried = [
        _verdict(
            groups,
            our.at(budget),
            their.at(budget if against_budget is None else against_budget),
            metric,
            margin,
            equal,
        )
        for budget, our, their in product(budgets, ours, theirs)
    ]
    if found := [verdict for verdict in tried if verdict.by_task]:
        return found
    for name in (metric, *([equal.metric] if equal else [])):
        _require_metric(groups, name)
    reasons = dict.fromkeys(f"  {group.title}: {why}" for verdict in tried for group, why in verdict.left_out.items())
    raise DataError(
        f"{method} and {baseline}: expected final runs of both on a task, with two common seeds and "
        + ("the same budget" if against_budget is None else f"the baseline at {against_budget:g}")
        + "; found none\n"
        + "\n".join(reasons)
    )


def _sides(groups: Mapping[Group, Collection[Finals]], label: str) -> list[_Side]:
    """What a label stands for: one contender, or several with settings of their own."""
    rows = [row for rows in groups.values() for row in rows]
    kinds = sorted({row.kind for row in rows if row.label == label}, key=lambda kind: (not kind.is_plain, kind))
    if not kinds:
        known = sorted({row.label for row in rows})
        near = get_close_matches(label, known, n=3) or known
        raise DataError(f"expected a contender with final runs, found {label!r}; nearest: {', '.join(near)}")
    return [
        _Side(label=label, kind=kind, name=label if len(kinds) == 1 or kind.is_plain else f"{label} {kind.settings}")
        for kind in kinds
    ]


def _require_metric(groups: Mapping[Group, Collection[Finals]], metric: str) -> None:
    rows = [row for rows in groups.values() for row in rows]
    known = {name for row in rows for result in row.by_seed.values() for name in names(result)}
    if metric not in known | {SCORE}:
        raise DataError(f"expected results with the metric {metric!r}, found {sorted(known)}")


@dataclass(frozen=True, kw_only=True)
class _OnTask:
    """What two contenders' runs on a task say, one comparison each.

    Attributes:
        figure: of the metric.
        logarithm: of it, where it is a cost.
        loss, score: beside which it is heard; None: there is none, or nobody asks. A score that is a loss stands alone.
        source: how energy is known.
        is_doubted: whether it is a cost that says nothing.
    """

    figure: Comparison
    logarithm: Comparison | None
    loss: Comparison | None
    score: Comparison | None
    source: str
    is_doubted: bool

    @property
    def counts(self) -> bool:
        """Whether it has a say over tasks: by all that is said there of it."""
        figure = self.figure if self.logarithm is None else self.logarithm
        return counts(figure) and (self.score is None or counts(self.score)) and not self.is_doubted

    @classmethod
    def of(cls, method: Finals, baseline: Finals, metric: str, margin: float, score: str, within: float) -> _OnTask:
        has_loss = not lacking(method, baseline, "loss") and not (score and is_lower_better(score))
        return cls(
            figure=difference(method, baseline, metric, margin=margin),
            logarithm=logarithms(method, baseline, metric),
            loss=difference(method, baseline, "loss") if has_loss else None,
            score=difference(method, baseline, score, margin=within) if score else None,
            source=source(method, baseline, metric), is_doubted=bool(doubt(method, baseline, metric)),
        )  # fmt: skip


def _verdict(
    groups: Mapping[Group, Collection[Finals]], ours: _Side, theirs: _Side, metric: str, margin: float | None,
    equal: Equal | None,
) -> Verdict:  # fmt: skip
    tasks: dict[Group, _OnTask] = {}
    left_out: dict[Group, str] = {}
    for group, rows in groups.items():
        method, baseline, name = ours.among(rows), theirs.among(rows), metric_of(group, metric)
        score = "" if equal is None else metric_of(group, equal.metric)
        if isinstance(method, str) or isinstance(baseline, str):
            left_out[group] = method if isinstance(method, str) else str(baseline)
        elif lack := lacking(method, baseline, name) or (score and lacking(method, baseline, score)):
            left_out[group] = lack
        else:
            own_margin = target_margin(method, baseline, name) if margin is None else margin
            within = 0.0 if equal is None else equal.margin
            tasks[group] = _OnTask.of(method, baseline, name, own_margin, score, within)
    for group in of_another_choice(tasks, metric):
        left_out[group] = f"its rates were chosen by {group.chosen_by}: the same task with the fitting choice is there"
        del tasks[group]
    counted = {group: task for group, task in tasks.items() if task.counts}
    ratios = {group: Ratio.of(c) for group, task in tasks.items() if (c := _heard(task, task.logarithm)) is not None}
    is_cost = metric in COSTS
    together = _together(counted, "logarithm" if is_cost else "figure")
    return Verdict(
        method=ours.name, baseline=theirs.name, budget=ours.budget, baseline_budget=theirs.budget, left_out=left_out,
        by_task={group: c for group, task in tasks.items() if (c := _heard(task, task.figure)) is not None},
        together=None if is_cost else together, counted=len(counted), ratios=ratios,
        ratio_together=Ratio.of(together) if is_cost and together is not None else None,
        sources={group: task.source for group, task in tasks.items() if task.source},
        scores={group: task.score for group, task in tasks.items() if task.score is not None},
    )  # fmt: skip


def _heard(task: _OnTask, found: Comparison | None) -> Comparison | None:
    """A comparison on a task, with its scores beside it where these are to be equal."""
    return found if found is None or task.score is None else at_equal_score(found, task.score, task.loss)


def _together(counted: Mapping[Group, _OnTask], what: Literal["figure", "logarithm"]) -> Comparison | None:
    """Over tasks; with a margin, what their losses say together must not be worse, nor must their scores."""

    def over(name: str) -> Comparison | None:
        return over_tasks([(g.corpora, c) for g, task in counted.items() if (c := getattr(task, name)) is not None])

    found, loss, score = over(what), over("loss"), over("score")
    if found is None:
        return None
    if found.margin > 0.0:
        found = agreeing(found, loss)
    if all(task.score is None for task in counted.values()):
        return found
    return undecided(found, "too few scores") if score is None else at_equal_score(found, score, loss)

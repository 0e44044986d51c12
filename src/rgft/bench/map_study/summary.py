"""What map studies say: whether maps predict harm and gain, how they change, and whether tasks favour different parts.

Classifiers are left out throughout: a new one learns first and most, and every budget trains it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rgft.bench.cells import heading, line
from rgft.bench.map_study.correlation import Correlation, Values, correlate
from rgft.bench.map_study.likeness import Likeness, likeness
from rgft.bench.map_study.runner import results_by_study

Result = Mapping[str, Any]

#: What is held against what: title → (map of a result and a label, measured).
QUESTIONS: Mapping[str, tuple[Callable[[Result, str], Values], Callable[[Result], Values]]] = {
    "first look, gain alone": (lambda r, label: r["maps"][label][0]["scores"], lambda r: r["gain_alone"]),
    "first look, harm of a reset": (lambda r, label: r["maps"][label][0]["scores"], lambda r: r["harm"]["reset"]),
    "E at the end, harm of a reset": (lambda r, label: r["error_maps"][label], lambda r: r["harm"]["reset"]),
    "E at the end, harm of taking back half": (lambda r, label: r["error_maps"][label], lambda r: r["harm"]["halved"]),
    "E at the end, harm of scaling": (lambda r, label: r["error_maps"][label], lambda r: r["harm"].get("scaled", {})),
}

#: What tables say of intervals that know nothing of seeds.
COMPONENTS_ALONE = "°"

#: A component is favoured that is among so many with the largest values.
TOP = 3


@dataclass(frozen=True, kw_only=True)
class Favoured:
    """A component that is among the `TOP` of a map at the end.

    Attributes:
        component: its name.
        seeds: in how many.
        of: how many there are.
    """

    component: str
    seeds: int
    of: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Of all studies below a folder.

    Attributes:
        answers: study → signal → question → correlation.
        over_time: study → signal → look's step → correlation of that look's scores with the harm of a reset at the end.
        likeness: signal (and "harm of a reset", "gain alone": what was measured) → how alike.
        favoured: study → the same → its components that are favoured in any seed, those of most seeds first.
        components: study → how many there are, but for classifiers.
        seeds: study → how many.
    """

    answers: Mapping[str, Mapping[str, Mapping[str, Correlation]]]
    over_time: Mapping[str, Mapping[str, Mapping[int, Correlation]]]
    likeness: Mapping[str, Likeness]
    favoured: Mapping[str, Mapping[str, Sequence[Favoured]]]
    components: Mapping[str, int]
    seeds: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise(folder: Path) -> Summary:
    """Reads all results of map studies below a folder.

    Raises:
        DataError: there are none.
    """
    by_study = results_by_study(folder)
    labels = {study: _common_labels(results) for study, results in by_study.items()}
    everywhere = [name for name in labels[next(iter(labels))] if all(name in known for known in labels.values())]
    return Summary(
        answers={
            study: {
                label: {
                    title: correlate([(_body(r, of_map(r, label)), _body(r, measured(r))) for r in results])
                    for title, (of_map, measured) in QUESTIONS.items()
                }
                for label in labels[study]
            }
            for study, results in by_study.items()
        },
        over_time={
            study: {label: _over_time(results, label) for label in labels[study]} for study, results in by_study.items()
        },
        likeness={
            name: likeness({study: [_body(r, values(r)) for r in results] for study, results in by_study.items()})
            for name, values in _wanted(everywhere).items()
        },
        favoured={
            study: {
                name: favoured_by([_body(result, of(result)) for result in results])
                for name, of in _wanted(labels[study]).items()
            }
            for study, results in by_study.items()
        },
        components={
            study: sum(not c["is_classifier"] for c in results[0]["components"]) for study, results in by_study.items()
        },
        seeds={study: len(results) for study, results in by_study.items()},
    )  # fmt: skip


def _common_labels(results: Sequence[Result]) -> list[str]:
    return [label for label in results[0]["maps"] if all(label in result["maps"] for result in results)]


def _body(result: Result, values: Values) -> dict[str, float]:
    kept = [component["name"] for component in result["components"] if not component["is_classifier"]]
    return {name: values[name] for name in kept if name in values}


def _over_time(results: Sequence[Result], label: str) -> dict[int, Correlation]:
    looks = [{entry["step"]: entry["scores"] for entry in result["maps"][label]} for result in results]
    steps = sorted(set.intersection(*(set(of_run) for of_run in looks)))
    return {
        step: correlate(
            [(_body(r, look[step]), _body(r, r["harm"]["reset"])) for r, look in zip(results, looks, strict=True)]
        )
        for step in steps
    }


def _wanted(labels: Sequence[str]) -> dict[str, Callable[[Result], Values]]:
    """Maps at the end, and what was measured."""
    return {
        **{label: (lambda result, label=label: result["error_maps"][label]) for label in labels},
        "harm of a reset": lambda result: result["harm"]["reset"],
        "gain alone": lambda result: result["gain_alone"],
    }


def favoured_by(maps: Sequence[Values]) -> list[Favoured]:
    """Those of equally many seeds by their mean place.

    Components that a map has alike share the last place of theirs, so that it favours none of many alike.
    """
    places = [
        {name: sum(other >= value for other in values.values()) - 1 for name, value in values.items()}
        for values in maps
        if len(set(values.values())) > 1
    ]
    counts = {
        name: sum(of_seed.get(name, TOP) < TOP for of_seed in places)
        for name in dict.fromkeys(n for p in places for n in p)
    }
    ranked = sorted(counts, key=lambda name: (-counts[name], sum(of_seed.get(name, 0) for of_seed in places)))
    return [Favoured(component=name, seeds=counts[name], of=len(places)) for name in ranked if counts[name]]


def markdown(summary: Summary) -> str:
    """The summary as Markdown tables."""
    parts = [_answers(study, rows, summary.seeds[study]) for study, rows in summary.answers.items()]
    parts += [_looks(study, rows) for study, rows in summary.over_time.items()]
    parts += [_favourites(summary), _alike(summary)]
    note = (
        "Spearman's ρ over components but classifiers, mean over seeds [95 % bootstrap over seeds and components; few "
        f"seeds make it too narrow; {COMPONENTS_ALONE}: one seed, over components alone: nothing is known of seeds]. "
        "Harm: how much the held-out loss rises when a component gets back its initial weights (a reset), when half of "
        "its update is taken back, or when the component itself is scaled by a half. Gain: how much lower it is after "
        "a component trained beside the classifier than after the classifier alone. p: permutation test, the share of "
        "ways to deal the runs out to studies that tell them apart as well; in brackets the least that so few runs can "
        "give."
    )
    return "\n\n".join([*parts, note])


def _favourites(summary: Summary) -> str:
    by_lot = "; ".join(f"{min(1.0, TOP / count):.2f} in {study}" for study, count in summary.components.items())
    studies, names = list(summary.seeds), dict.fromkeys(name for rows in summary.favoured.values() for name in rows)
    lines = [
        f"**Favoured components: among the {TOP} largest at the end, in how many seeds (by lot, share: {by_lot})**", "",
        *heading(["", *studies]),
        *(
            line([name, *(_top(summary.favoured[study].get(name, ())) for study in studies)])
            for name in names
        ),
    ]  # fmt: skip
    return "\n".join(lines)


def _top(favoured: Sequence[Favoured]) -> str:
    """As many as there can be in one seed; how many more there are in other seeds."""
    more = f" and {len(favoured) - TOP} more" if len(favoured) > TOP else ""
    return ", ".join(f"{one.component} {one.seeds}/{one.of}" for one in favoured[:TOP]) + more


def _alike(summary: Summary) -> str:
    studies = list(summary.seeds)
    lines = [
        "**How alike maps are: mean ρ over pairs of runs**", "",
        *heading(["", *(f"seeds of {study}" for study in studies), "between studies", "within − between", "p"]),
        *(
            line([
                name, *(_number(like.within[study]) for study in studies), _number(like.between),
                _number(like.difference),
                "undefined" if like.p is None else f"{like.p:.3f} (≥ {like.least_p:.3f})",
            ])
            for name, like in summary.likeness.items()
        ),
    ]  # fmt: skip
    return "\n".join(lines)


def _answers(study: str, rows: Mapping[str, Mapping[str, Correlation]], seeds: int) -> str:
    lines = [f"**{study}, {f'{seeds} seeds' if seeds > 1 else 'one seed'}**", "", *heading(["", *QUESTIONS])]
    lines += [line([label, *(_shown(row[title]) for title in QUESTIONS)]) for label, row in rows.items()]
    return "\n".join(lines)


def _looks(study: str, rows: Mapping[str, Mapping[int, Correlation]]) -> str:
    steps = sorted({step for row in rows.values() for step in row})
    lines = [
        f"**{study}: scores of single looks, harm of a reset at the end**", "",
        *heading(["after step", *map(str, steps)]),
    ]  # fmt: skip
    lines += [
        line([label, *(_number(row[step].rho) if step in row else "" for step in steps)]) for label, row in rows.items()
    ]
    return "\n".join(lines)


def _shown(found: Correlation) -> str:
    if found.rho is None:
        return f"undefined: {found.reason}"
    interval = "" if found.low is None or found.high is None else f" [{found.low:+.2f}, {found.high:+.2f}]"
    if found.over == "components":
        interval += COMPONENTS_ALONE
    return f"{found.rho:+.2f}{interval}"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.2f}"

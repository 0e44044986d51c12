"""E over time: of the runs of map studies, and of RGFT's own runs, whose results keep their maps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rgft.bench.cells import heading, line
from rgft.bench.finals import final_results
from rgft.bench.map_study.correlation import Values, correlate
from rgft.bench.map_study.runner import results_by_study
from rgft.error_map import ErrorMap
from rgft.errors import DataError

#: The preset's own.
SIGNAL = "generalising_decrease"

#: E at each look of a run: step → component → value.
_Looks = Sequence[tuple[int, Values]]

_PART = re.compile(r"\.(head|ffn_block|channel_block|expert)\.\d+$")
_OF_LAYER = re.compile(r"(.*\.\d+)(?:\.(.+))?")


@dataclass(frozen=True, kw_only=True)
class History:
    """E over time of runs that differ by their seeds alone.

    Attributes:
        title: what runs.
        seeds: how many.
        steps: made before each look, in the mean over seeds.
        shares: of the run's steps, likewise.
        components: component → look → E of each seed that has it, in forward order.
        likeness: of each look: Spearman's ρ over components between E then and E at the last look, in the mean over
            seeds; None where it is undefined.
    """

    title: str
    seeds: int
    steps: tuple[float, ...]
    shares: tuple[float, ...]
    components: Mapping[str, tuple[tuple[float, ...], ...]]
    likeness: tuple[float | None, ...]

    @property
    def layers(self) -> dict[str, tuple[tuple[float, ...], ...]]:
        """The same of each layer, and of each component outside the layers: the mean over its components."""
        return self._means({name: layer_and_kind(name)[0] for name in self.components})

    @property
    def kinds(self) -> dict[str, tuple[tuple[float, ...], ...]]:
        """The same of each kind of component in layers: the mean over layers."""
        kinds = {name: layer_and_kind(name)[1] for name in self.components}
        return self._means({name: kind for name, kind in kinds.items() if kind})

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "layers": self.layers, "kinds": self.kinds}

    def _means(self, row_of: Mapping[str, str]) -> dict[str, tuple[tuple[float, ...], ...]]:
        """Row → look → mean over its components in each seed."""
        rows: dict[str, list[tuple[tuple[float, ...], ...]]] = {}
        for name, row in row_of.items():
            rows.setdefault(row, []).append(self.components[name])
        return {
            row: tuple(
                tuple(mean(of_seed) for of_seed in zip(*at_look, strict=True)) for at_look in zip(*parts, strict=True)
            )
            for row, parts in rows.items()
        }


def layer_and_kind(component: str) -> tuple[str, str]:
    """The layer and the kind of a component, by its name: "encoder.layer.3.attention.head.5" is of "encoder.layer.3"
    and "attention.head".

    Of one outside the layers the name, and ""; of a layer in one piece the kind is "layer".
    """
    found = _OF_LAYER.fullmatch(_PART.sub(r".\1", component))
    return (component, "") if found is None else (found[1], found[2] or "layer")


def histories(folder: Path, *, signal: str = SIGNAL) -> list[History]:
    """E over time of all map studies and of final runs of the bench below a folder.

    Args:
        folder: of result files.
        signal: of studies the label of a signal; of runs the one that they measured.

    Raises:
        DataError: no result has a map of this signal; a file is damaged.
    """
    found = [*_of_studies(folder, signal), *_of_runs(folder, signal)]
    if not found:
        raise DataError(
            f"{folder}: expected results of map studies, or of final runs that measured, with maps of {signal!r}; "
            "found none"
        )
    return found


def _of_studies(folder: Path, signal: str) -> Iterator[History]:
    if not any(folder.glob("**/map-study--*.json")):
        return
    for study, found in results_by_study(folder).items():
        results = [result for result in found if signal in result["maps"]]
        runs = [_error_maps([c["name"] for c in result["components"]], result["maps"][signal]) for result in results]
        yield from _history(study, runs, [result["settings"]["steps"] for result in results])


def _error_maps(names: Sequence[str], looks: Iterable[Mapping[str, Any]]) -> _Looks:
    """What the scores of single looks make of the map."""
    error_map, found = ErrorMap.empty(names), list[tuple[int, Values]]()
    for look in looks:
        error_map = error_map.observe(look["scores"], step=look["step"])
        found.append((look["step"], error_map.values()))
    return found


def _of_runs(folder: Path, signal: str) -> Iterator[History]:
    if not any(folder.glob("**/*--final--*.json")):
        return
    for group, contenders in final_results(folder).items():
        for finals in contenders:
            if group.fixes_cuts and finals.method != "cut":  # RGFT's own, which stands there for comparison
                continue
            results = [
                result
                for result in finals.by_seed.values()
                if result.get("map_history") and result["config"]["signal"]["name"] == signal
            ]
            title = f"{group.title}: {finals.title} at {finals.budget:g}"
            runs = [[(step, values) for step, values in result["map_history"]] for result in results]
            yield from _history(title, runs, [result["steps"] for result in results])


def _history(title: str, runs: Sequence[_Looks], steps: Sequence[int]) -> Iterator[History]:
    """Of runs with as many looks and the same components: what differs has a history of its own."""
    alike: dict[tuple[int, tuple[str, ...]], list[tuple[_Looks, int]]] = {}
    for looks, of_run in zip(runs, steps, strict=True):
        names = tuple(name for name in looks[-1][1] if all(name in values for _, values in looks))
        alike.setdefault((len(looks), names), []).append((looks, of_run))
    for (count, names), same in alike.items():
        maps = [[values for _, values in looks] for looks, _ in same]
        several = f", {count} looks" if len({looks for looks, _ in alike}) > 1 else ""
        yield History(
            title=title + several,
            seeds=len(same),
            steps=tuple(mean(looks[place][0] for looks, _ in same) for place in range(count)),
            shares=tuple(mean(looks[place][0] / of_run for looks, of_run in same) for place in range(count)),
            components={
                name: tuple(tuple(of_seed[place][name] for of_seed in maps) for place in range(count)) for name in names
            },
            likeness=tuple(
                correlate([(of_seed[place], of_seed[-1]) for of_seed in maps], draws=1).rho for place in range(count)
            ),
        )


def markdown(found: Sequence[History]) -> str:
    """Histories as Markdown tables."""
    note = (
        "E after each look: mean ± standard deviation over seeds. A layer's is the mean over its components, a kind's "
        "that over layers. Last row: Spearman's ρ over all components with E at the last look, in the mean over seeds."
    )
    return "\n\n".join([*(_table(history) for history in found), note])


def _table(history: History) -> str:
    seeds = f"{history.seeds} seeds" if history.seeds > 1 else "one seed"
    columns = [f"step {step:.0f} ({share:.0%})" for step, share in zip(history.steps, history.shares, strict=True)]
    kinds = history.kinds if len(history.kinds) > 1 else {}
    rows = [*history.layers.items(), *((f"all layers: {kind}", values) for kind, values in kinds.items())]
    lines = [
        f"**{history.title}, {seeds}**", "", *heading(["", *columns]),
        *(line([name, *map(_shown, values)]) for name, values in rows),
        line(["ρ with the end", *("undefined" if rho is None else f"{rho:+.2f}" for rho in history.likeness)]),
    ]  # fmt: skip
    return "\n".join(lines)


def _shown(values: Sequence[float]) -> str:
    return f"{mean(values):.2g}" + (f" ± {stdev(values):.1g}" if len(values) > 1 else "")

"""How a contender's learning rate and variant are chosen: by means over the tuning seeds, on validation data."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from math import inf, isinf
from statistics import mean
from typing import Any

from rgft.bench.experiment import Cell, Choice, Contender, Edge, Experiment
from rgft.bench.figures import is_lower_better
from rgft.bench.tasks import known_task

#: What a run is judged by, less being better: its loss, or its score (negative where more is better; infinite where
#: undefined) and then its loss, which is infinite where it diverged.
Standing = tuple[float, ...]

#: Of a run that cannot be made.
LAST: Standing = (inf, inf)


class Tuning:
    """A contender's tuning: its rates, then those beyond an edge at which the best one lies, then its variants, each
    from there to the rate that is best in it.

    Args:
        experiment: whose contender.
        contender: what is tuned.
        standing_of: a run's; None: it has no result yet.
    """

    def __init__(
        self, experiment: Experiment, contender: Contender, standing_of: Callable[[Cell], Standing | None]
    ) -> None:
        self._experiment, self._contender, self._standing_of = experiment, contender, standing_of
        self._choice: Choice | None = None

    def cells(self) -> Generator[Cell, None, Choice | None]:
        """The runs that are known to be needed, done ones among them.

        Returns:
            What is chosen; None while a run has no result.
        """
        if self._choice is None:
            self._choice = yield from self._choose()
        return self._choice

    def _choose(self) -> Generator[Cell, None, Choice | None]:
        if not self._contender.is_tuned:
            return Choice(lr=self._contender.lrs[0])
        found = yield from self._best_rate()
        if found is None or found.has_diverged:
            return found
        own: list[Choice | None] = [found]
        for name in self._contender.variants:
            own.append((yield from self._climbed(Choice(lr=found.lr, variant=name))))
        known = [choice for choice in own if choice is not None]
        return (yield from self._best(known)) if len(known) == len(own) else None

    def _best_rate(self) -> Generator[Cell, None, Choice | None]:
        """The best of the rates, one more of them as long as it is at an edge and the cap allows."""
        left, tried = self._experiment.max_extensions, sorted(self._contender.lrs)
        beyond = self._contender.rates_beyond(left)
        while True:
            best = yield from self._best([Choice(lr=lr) for lr in tried])
            edge = None if best is None or not self._contender.has_grid else _edge(best.lr, tried)
            if best is None or edge is None or not left:
                return best
            left -= 1
            tried = sorted([*tried, beyond[edge].pop(0)])

    def _climbed(self, choice: Choice) -> Generator[Cell, None, Choice | None]:
        """From a choice to neighbouring rates, as long as one is better: a variant's best rate is its own."""
        contender = self._contender
        beyond = contender.rates_beyond(self._experiment.max_extensions)
        rates = sorted({*contender.lrs, *beyond["low"], *beyond["high"]})
        while True:
            place = rates.index(choice.lr)
            around = [*rates[max(0, place - 1) : place], *rates[place + 1 : place + 2]]
            best = yield from self._best([choice, *(replace(choice, lr=lr) for lr in around)])
            if best is None or best.lr == choice.lr:
                return best
            choice = best

    def _best(self, choices: Iterable[Choice]) -> Generator[Cell, None, Choice | None]:
        """The choice that stands first, the first (of rates the lowest) of equals; None while runs are missing."""
        means: dict[Choice, Standing] = {}
        is_complete = True
        for choice in choices:
            cells = list(self._experiment.tuning_cells(self._contender, choice))
            yield from cells
            found = [standing for cell in cells if (standing := self._standing_of(cell)) is not None]
            means[choice] = tuple(map(mean, zip(*found, strict=True))) or LAST
            is_complete = is_complete and len(found) == len(cells)
        best = min(means, key=lambda choice: means[choice])
        return replace(best, has_diverged=isinf(means[best][-1])) if is_complete else None


def standing(experiment: Experiment, result: Mapping[str, Any]) -> Standing:
    """A run's, by what the experiment chooses by."""
    metrics = result["metrics"].get("validation", {})
    loss = float(metrics.get("loss", inf))
    if experiment.choose == "loss":
        return (loss,)
    score = known_task(experiment.task).score(experiment.task)
    if isinf(loss) or score not in metrics:
        return (inf, loss)
    return (metrics[score] if is_lower_better(score) else -metrics[score], loss)


def _edge(rate: float, tried: Sequence[float]) -> Edge | None:
    """Where a rate lies among those that were tried, in order; None: inside."""
    return "low" if rate == tried[0] else "high" if rate == tried[-1] else None

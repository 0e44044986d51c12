"""What is evaluated of a final run beside its test split: the `evaluate` of an experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from rgft.bench.measures.corpus import CORPORA
from rgft.bench.measures.other_domain import SOURCES
from rgft.bench.tasks import TASKS
from rgft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Extra:
    """Evaluations that cost time and no budget; none of them changes the run. Each is off unless it is asked for.

    Attributes:
        at: shares of the run (0…1, of its budget or its epochs, whichever is further) after which the validation split
            is evaluated; the end of the run is, too.
        each_epoch: whether it is evaluated after each epoch, too.
        weights: how far each component is from its initial weights.
        general_texts: texts of a general corpus on which forgetting is measured; 0: it is not.
        general_corpus: which corpus, see `corpus.CORPORA`; one that the task does not train on.
        probe: a task of the bench, on whose texts a linear probe is fitted before and after; None: none is.
        other_domains: labelled texts from elsewhere, by name; see `other_domain.SOURCES`.
    """

    at: tuple[float, ...] = ()
    each_epoch: bool = False
    weights: bool = False
    general_texts: int = 0
    general_corpus: str = "docstrings"
    probe: str | None = None
    other_domains: tuple[str, ...] = ()

    @property
    def follows_run(self) -> bool:
        """Whether something is evaluated before the run is over."""
        return bool(self.at) or self.each_epoch

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Extra:
        """From an experiment's `evaluate`.

        Raises:
            ConfigError: a key or value cannot be used; all problems at once.
        """
        known = [item.name for item in fields(cls)]
        problems = [
            f"evaluate.{key}: there is no such evaluation; {_nearest(key, known)}"
            for key in sorted(set(data) - set(known))
        ]
        at, domains = data.get("at", ()), data.get("other_domains", ())
        if not isinstance(at, (list, tuple)) or not all(_is_number(a) and 0.0 < a < 1.0 for a in at):
            problems.append(f"evaluate.at: expected a list of shares between 0 and 1, found {at!r}")
        problems += [
            f"evaluate.{name}: expected true or false, found {data[name]!r}"
            for name in ("each_epoch", "weights")
            if not isinstance(data.get(name, False), bool)
        ]
        texts = data.get("general_texts", 0)
        if isinstance(texts, bool) or not isinstance(texts, int) or texts < 0 or 0 < texts < 3:
            problems.append(f"evaluate.general_texts: expected 0 or at least 3, found {texts!r}")
        corpus = data.get("general_corpus", "docstrings")
        if corpus not in CORPORA:
            problems.append(
                f"evaluate.general_corpus: expected a general corpus, found {corpus!r}; {_nearest(corpus, CORPORA)}"
            )
        probe = data.get("probe")
        if probe is not None and probe not in TASKS:
            problems.append(f"evaluate.probe: expected a task of the bench, found {probe!r}; {_nearest(probe, TASKS)}")
        if not isinstance(domains, (list, tuple)):
            problems.append(f"evaluate.other_domains: expected a list of names, found {domains!r}")
        else:
            problems += [
                f"evaluate.other_domains: there are no texts named {name!r}; {_nearest(name, SOURCES)}"
                for name in domains
                if name not in SOURCES
            ]
        if problems:
            raise ConfigError(problems)
        return cls(**{**data, "at": tuple(sorted(at)), "other_domains": tuple(domains)})

    def check(self, *, task: str, searches_rate: bool) -> None:
        """Refuses what cannot be measured in an experiment.

        Args:
            task: of the experiment.
            searches_rate: whether a learning rate is searched for inside some contender's budget.

        Raises:
            ConfigError: all problems at once.
        """
        problems = []
        if self.follows_run and searches_rate:
            problems.append(
                "evaluate.at, evaluate.each_epoch: expected one learning rate for each run; while one is searched for "
                "inside the budget, it is not known yet which candidate's weights are the run's"
            )
        if self.probe == task:
            problems.append(f"evaluate.probe: expected another task than the one that is trained ({task})")
        problems += [
            f"evaluate.other_domains: {name!r} is what {task} is trained on"
            for name in self.other_domains
            if name == task
        ]
        if problems:
            raise ConfigError(problems)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _nearest(name: Any, known: Any) -> str:
    near = get_close_matches(str(name), list(known), n=3)
    return f"nearest: {', '.join(near)}" if near else f"known: {', '.join(known)}"

"""ID³, SpIEL, the selections made once, AutoFreeze: their memory is the plan in force."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace
from typing import Any

import pytest

from rgft.allocation.peers.chosen_once import GPS, GRFT, LIFT, SIFT, FIMStatic
from rgft.allocation.peers.drop_and_grow import ID3, SpIEL
from rgft.allocation.peers.freezing import AutoFreeze, percentile
from rgft.error_map import ErrorMap
from rgft.errors import ConfigError


def follow(policy: Any, situations: list[Any]) -> list[frozenset[str]]:
    previous, decisions = None, []
    for situation in situations:
        previous = policy.decide(replace(situation, previous=previous))
        decisions.append(frozenset(previous.active()))
    return decisions


def random_scores(count: int, seed: int) -> list[float]:
    rng = random.Random(seed)
    return [rng.uniform(-1.0, 5.0) for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_id3_against_a_transcription(make: Any, seed: int) -> None:
    components = make.flat(20)
    maps = [random_scores(20, 100 * seed + t) for t in range(12)]
    found = follow(
        ID3(fraction=0.5, unmask_steps=10), [make.situation(components, s, step=t) for t, s in enumerate(maps)]
    )
    unmasked: set[str] = set()
    for step, scores in enumerate(maps):
        target = math.ceil(round(0.5 * min(1.0, (step + 1) / 10) * 20, 9))
        for i in sorted(range(20), key=lambda i: -scores[i]):
            if len(unmasked) < target and f"c{i}" not in unmasked:
                unmasked.add(f"c{i}")
        assert found[step] == unmasked


def test_id3_forgets_the_first_plan_in_which_all_was_on(make: Any) -> None:
    components = make.flat(10)
    decisions = follow(
        ID3(fraction=0.5, unmask_steps=10),
        [make.situation(components, step=0), make.situation(components, [float(i) for i in range(10)], step=5)],
    )
    assert len(decisions[0]) == 10
    assert decisions[1] == {"c7", "c8", "c9"}


@pytest.mark.parametrize("seed", range(5))
def test_spiel_exchanges_at_most_its_share(make: Any, seed: int) -> None:
    components = make.flat(20)
    maps = [random_scores(20, 200 * seed + t) for t in range(11)]
    policy = SpIEL(density=0.5, churn=0.4)
    situations = [make.situation(components, s, step=t, total_steps=10) for t, s in enumerate(maps)]
    found = follow(policy, situations)
    held: set[int] = set(sorted(range(20), key=lambda i: -maps[0][i])[:10])
    for step, scores in enumerate(maps):
        if step:
            allowed = int(0.4 * 10 * 0.5 * (1 + math.cos(math.pi * step / 10)) + 1e-9)
            for _ in range(allowed):
                out, new = min(held, key=scores.__getitem__), max(set(range(20)) - held, key=scores.__getitem__)
                if scores[new] > scores[out]:
                    held = held - {out} | {new}
        assert found[step] == {f"c{i}" for i in held}


@pytest.mark.parametrize("cls", [FIMStatic, SIFT, GPS, GRFT])
def test_chosen_once_stays(make: Any, cls: Any) -> None:
    components = make.model(layers=3, heads=6)
    maps = [random_scores(len(components), t) for t in range(4)]
    situations = [make.situation(components, step=0)]
    situations += [make.situation(components, s, step=t) for t, s in enumerate(maps, start=1)]
    found = follow(cls(fraction=0.25), situations)
    assert len(found[0]) == len(components)
    assert found[1] == found[2] == found[3] == found[4]
    value = {c.name: s for c, s in zip(components, maps[0], strict=True)}
    if cls in (FIMStatic, SIFT):
        assert found[1] == set(sorted(value, key=lambda name: -value[name])[: math.ceil(len(value) / 4)])
    else:
        for layer in range(3):
            members = [c.name for c in components if c.layer == f"layers.{layer}"]
            assert found[1] & set(members) == set(sorted(members, key=lambda name: -value[name])[:2])
        assert {"embeddings", "classifier"} <= found[1]


def test_a_choice_waits_for_the_last_observation(make: Any) -> None:
    components = make.flat(6)
    partly = make.situation(components, {f"c{i}": float(i) for i in range(5)}, step=1)
    later = make.situation(components, [5.0, 4.0, 3.0, 2.0, 1.0, 0.0], step=2)
    assert follow(FIMStatic(fraction=1 / 3), [partly, later]) == [{"c3", "c4", "c5"}, {"c0", "c1"}]


def test_a_partial_choice_is_open_even_when_its_size_is_right(make: Any) -> None:
    components = make.flat(10)
    rising, falling = ({f"c{i}": sign * i for i in range(9)} for sign in (1.0, -1.0))
    situations = [make.situation(components, s, step=t) for t, s in enumerate((rising, falling), start=1)]
    assert [len(on) for on in follow(FIMStatic(fraction=0.85), situations)] == [9, 9]
    assert "c0" not in follow(FIMStatic(fraction=0.85), situations)[0]
    assert "c8" not in follow(FIMStatic(fraction=0.85), situations)[1]


def test_lift_renews_its_choice(make: Any) -> None:
    components = make.model(layers=1, heads=8)
    maps = [random_scores(len(components), t) for t in range(4)]
    situations = [make.situation(components, s, step=50 * t + 10) for t, s in enumerate(maps)]
    found = follow(LIFT(fraction=0.3, every=100), situations)
    assert found[0] == found[1] != found[2] == found[3]


def history(components: Any, scores: dict[str, list[float]], beta: float = 0.5) -> ErrorMap:
    error_map = ErrorMap.empty([c.name for c in components], beta=beta)
    for t in range(len(next(iter(scores.values())))):
        error_map = error_map.observe({name: s[t] for name, s in scores.items()}, step=t)
    return error_map


def test_autofreeze_against_a_transcription(make: Any) -> None:
    components = make.model(layers=6, heads=1)
    rng = random.Random(0)
    policy, frozen, previous = AutoFreeze(percentile=50.0), 0, None
    scores = {c.name: [rng.uniform(1.0, 2.0)] for c in components}
    grown = []
    for step in range(1, 8):
        for series in scores.values():
            series.append(rng.uniform(1.0, 2.0))
        error_map = history(components, scores)
        situation = make.situation(components, step=step, previous=previous)
        previous = policy.decide(replace(situation, error_map=error_map))
        rates = []
        for layer in range(6):
            variance = norm = 0.0
            for c in components:
                if c.layer == f"layers.{layer}":
                    w = [0.5 * 0.5 ** (step - i) / (1 - 0.5 ** (step + 1)) for i in range(step + 1)]
                    mean = sum(a * s for a, s in zip(w, scores[c.name], strict=True))
                    variance += sum(a * (s - mean) ** 2 for a, s in zip(w, scores[c.name], strict=True))
                    norm += mean
            rates.append(variance**0.5 / norm)
        median = statistics.median(rates[frozen:])
        while frozen < 5 and rates[frozen] <= median:
            frozen += 1
        grown.append(frozen)
        assert previous.cut == (frozen + 1 if frozen else 0)
    assert grown[-1] > grown[0]


def test_autofreeze_waits_for_two_observations_and_between_evaluations(make: Any) -> None:
    components = make.model(layers=4)
    once = history(components, {c.name: [1.0] for c in components})
    first = AutoFreeze().decide(replace(make.situation(components, step=10), error_map=once))
    assert first.cut == 0
    steady = history(components, {c.name: [1.0, 1.0] for c in components})
    situation = replace(make.situation(components, step=15, previous=first), error_map=steady)
    assert AutoFreeze(every=10).decide(situation).cut == 0
    assert AutoFreeze(every=10).decide(replace(situation, step=20)).cut == 4


def test_percentile_interpolates() -> None:
    values = [5.0, 1.0, 3.0, 4.0]
    assert percentile(values, 50.0) == statistics.median(values)
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    assert [percentile(values, p) for p in (25.0, 50.0, 75.0)] == quartiles
    assert (percentile(values, 0.0), percentile(values, 100.0)) == (1.0, 5.0)


def test_bad_settings() -> None:
    for make_bad in (
        lambda: ID3(fraction=0.0), lambda: SpIEL(churn=2.0), lambda: AutoFreeze(percentile=101.0),
        lambda: LIFT(every=0), lambda: GPS(scope="neuron"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="expected"):
            make_bad()

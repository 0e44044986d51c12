"""Every method of the bench trains a model within its budget, and only what it says, and its ledger tells the truth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from rgft.bench.experiment import Experiment
from rgft.bench.methods import METHODS, Followed, method
from rgft.cli.app import app
from rgft.errors import ConfigError
from rgft.guide import Guide
from rgft.partition import partition
from rgft.plan import UpdatePlan
from rgft.run import Settings
from tests.families import FAMILIES, WIDTH
from tests.unit.bench.tiny_task import trained

#: The families have two layers.
SMALLER: dict[str, dict[str, Any]] = {
    "last_n": {"config": {"policy": {"name": "last_n", "layers": 1}}},
    "last_n_uncached": {"config": {"policy": {"name": "last_n", "layers": 1}}},
    "lisa": {"config": {"policy": {"name": "lisa", "layers": 1, "every": 0.1}}},
    "badam": {"config": {"policy": {"name": "badam", "every": 2}}},
    "lora_top": {"layers": 1},
    "vera": {"r": 4},
    "oft": {"oft_block_size": 8},
    "boft": {"boft_block_size": 4},
    "lift": {"choice": {"rank": 4, "every": 3}},
    "galore": {"rank": 2, "every": 3},
}
#: At this size what is made once a pass, or for choosing, is most of a pass.
DEAR = {"boft", "oft", "dora", "lift", "galore", "gps", "sift", "grft", "fim_static"}


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_within_its_budget_what_it_says(name: str) -> None:
    budget = 1.0 if name in DEAR else 0.6
    plan = {"policy": {"name": "static", "plan": UpdatePlan.all_on(partition(FAMILIES["bert"].build()).names)}}
    followed = {"uniform_rate": Followed(lr_factor=0.5), "rgft_static": Followed(config=plan)}.get(name)
    tried = trained(name, budget=budget, settings=SMALLER.get(name), followed=followed, epochs=3)
    run, ledger = tried.run, tried.run.guide.ledger
    assert run.guide.step_count >= 3
    assert 0.1 * budget < run.guide.flops_fraction <= budget
    assert ledger.audits
    assert ledger.audit_error == pytest.approx(0.0, abs=0.02)
    updated, moved = tried.updated(), tried.moved()
    assert moved
    assert not [name for name, elements in moved.items() if name not in updated or (elements & ~updated[name]).any()]
    assert all(torch.isfinite(p).all() for p in run.task.model.parameters())


def test_all_say_where_they_come_from_and_what_they_cost() -> None:
    own = {
        "full",
        "rgft",
        "cut",
        "random",
        "proposal_a",
        "proposal_b",
        "example_pruning",
        "rgft_static",
        "uniform_rate",
    }
    assert {name for name, method in METHODS.items() if not method.source} == own
    assert all(method.cost and method.title for method in METHODS.values())
    assert all("arXiv:" in method.source for method in METHODS.values() if method.source)


def test_unknown_settings_are_refused_with_the_nearest() -> None:
    lora, sift, full = method("lora"), method("sift"), method("full")
    assert not lora.problems_of({"rank": 4, "config": {"ffn_blocks": 2}, "lr": "auto"})
    assert not sift.problems_of({"choice": {"fraction": 0.1}})
    unknown = [*lora.problems_of({"rnak": 64}), *sift.problems_of({"choice": {"fractoin": 0.1}})]
    assert [*unknown, *full.problems_of({"rank": 8})] == [
        "settings.rnak: there is no such setting (found 64); nearest: rank",
        "settings.choice.fractoin: there is no such setting (found 0.1); nearest: fraction",
        "settings.rank: there is no such setting (found 8); nearest: config, lr",
    ]


def test_an_unknown_method_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match="lora_plus"):
        method("lora_pluss")


def test_what_follows_rgft_must_be_told_what_to_take() -> None:
    with pytest.raises(ConfigError, match=r"rgft_static: expected what it takes"):
        method("rgft_static").configuration(budget=0.3, seed=0, settings={})


def test_the_last_layers_alone_make_no_gradient_below_them() -> None:
    tried = trained("lora_top", settings={"layers": 1})
    assert tried.run.guide.plan.cut == 2
    assert not any(".layer.0." in name and "lora" in name for name in tried.before)
    assert tried.run.guide.ledger.forward_cached_flops > 0.0


def test_without_a_cache_the_prefix_is_computed_each_time() -> None:
    cached, uncached = (trained(name, settings=SMALLER[name], epochs=3) for name in ("last_n", "last_n_uncached"))
    assert cached.run.guide.ledger.forward_cached_flops > 0.0
    assert uncached.run.guide.ledger.forward_cached_flops == 0.0
    assert uncached.run.guide.ledger.dx_truncated_flops > 0.0
    assert uncached.run.guide.flops_fraction > cached.run.guide.flops_fraction


class Scales(nn.Module):
    """Layers without matrices, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH)) for _ in range(3))
        self.classifier = nn.Linear(WIDTH, 2)


@pytest.mark.parametrize("name", ["fim_static", "gps", "sift", "grft", "id3", "spiel", "lift", "galore"])
def test_a_model_without_matrices_is_refused_by_what_works_on_them(name: str) -> None:
    chosen = method(name)
    guide = Guide(chosen.prepare(Scales(), {}), chosen.configuration(budget=0.5, seed=0, settings={}))
    make = chosen.optimizer_of(Settings(lr=1e-3), {})
    assert make is not None
    with pytest.raises(ConfigError, match="expected matrices in the model's layers that train, found none"):
        make(guide, 1e-3)


@pytest.mark.parametrize("family", ["resnet", "mlp"])
def test_s2ft_is_refused_where_it_knows_no_heads_or_channels(family: str) -> None:
    with pytest.raises(ConfigError, match="s2ft: expected layers with attention heads or feed-forward channels"):
        method("s2ft").prepare(FAMILIES[family].build(), {})


def test_lisa_draws_anew_and_clears_what_goes_off() -> None:
    tried = trained("lisa", settings=SMALLER["lisa"], budget=1.0, epochs=3)
    run = tried.run
    chosen = [frozenset(n for n in plan.active() if "layer." in n) for plan in run.guide.plans]
    assert len(set(chosen)) == 2
    off = next(c for c in run.guide.partition if c.layer is not None and c.name not in run.guide.active)
    assert not any(run.optimizer.state.get(p) for p in run.guide._binding.parts[off.name])
    always = next(c for c in run.guide.partition if c.kind == "embedding")
    steps = {int(run.optimizer.state[p]["step"]) for p in run.guide._binding.parts[always.name]}
    assert steps == {run.guide.step_count}


def test_badam_keeps_state_of_the_block_in_hand_alone() -> None:
    run = trained("badam", settings=SMALLER["badam"], budget=1.0, epochs=3).run
    held = {c.name for c in run.guide.partition for p in run.guide._binding.parts[c.name] if run.optimizer.state.get(p)}
    assert held == set(run.guide.active)
    assert len(held) < len(run.guide.partition)


def test_pruning_skips_examples_and_nothing_else() -> None:
    ledger = trained("example_pruning", budget=1.0, epochs=4).run.guide.ledger
    assert ledger.examples_skipped > 0
    assert ledger.dw_skipped_flops == ledger.dx_truncated_flops == ledger.forward_cached_flops == 0.0


def test_the_document_lists_them_all() -> None:
    text = (Path(__file__).parents[3] / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = [
        f"| `{m.name}` | {m.title} | {m.source or '—'} | {m.cost} | {', '.join(m.variants) or '—'} |"
        for m in METHODS.values()
    ]
    assert [line for line in text.splitlines() if line.startswith("| `")] == rows


def test_the_command_line_lists_them_all() -> None:
    shown = json.loads(CliRunner().invoke(app, ["bench", "list", "--json"]).stdout)
    assert shown.keys() == METHODS.keys()
    assert shown["galore"]["source"] == METHODS["galore"].source
    assert shown["galore"]["variants"] == {"rank-4": {"rank": 4}, "rank-32": {"rank": 32}}
    assert all(m.cost in CliRunner().invoke(app, ["bench", "list"]).stdout for m in METHODS.values())


def test_experiments_name_methods_and_disjoint_labels() -> None:
    for path in [
        p
        for p in (Path(__file__).parents[3] / "benchmarks" / "experiments").rglob("*.json")
        if p.parent.name != "contenders"
    ]:
        labels = [contender.label for contender in Experiment.load(path).contenders]
        assert len(labels) == len(set(labels))

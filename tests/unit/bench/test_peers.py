"""Published methods as the bench runs them: what they look at, how finely and how often they choose."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from rgft.batches import BatchStream
from rgft.bench.methods import METHODS, Followed, method
from rgft.bench.methods.granularities import matrices, tensors
from rgft.bench.optimizers.choices import DropAndGrow, Unmasking
from rgft.bench.optimizers.sparse import INDEX, SparseAdamW
from rgft.config import Config
from rgft.partition import partition
from tests.families import FAMILIES
from tests.unit.bench.tiny_task import prepared, trained


def config_of(name: str) -> Config:
    return method(name).configuration(budget=0.3, seed=0, settings={}, followed=Followed())


@pytest.mark.parametrize(
    ("name", "signal", "granularity", "probe"),
    [
        ("ist", {"name": "suppression", "factor": 0.25}, "layer", (10, 8)),
        ("autofreeze", {"name": "grad_norm", "p": 2, "normalise": "raw"}, "layer", (1, 0)),
        ("greentrainer", {"name": "predicted_decrease"}, tensors, ("auto", "auto")),
        ("hft", None, matrices, None),
        ("lisa", None, "layer", None),
        ("badam", None, "layer", None),
    ],
)
def test_a_selection_runs_on_the_signal_and_granularity_of_its_paper(
    name: str, signal: dict[str, Any] | None, granularity: Any, probe: tuple[Any, Any] | None
) -> None:
    config = config_of(name)
    assert (config.signal and {"name": config.signal.name, **config.signal.params}) == signal
    assert config.granularity == granularity
    assert config.scaling is config.mask is None
    if probe is not None:
        assert (config.probe.interval, config.probe.size) == probe


def test_none_but_rgfts_own_runs_on_its_signal() -> None:
    looking = [(name, config_of(name).signal) for name, m in METHODS.items() if m.follows is None]
    own = {name for name, signal in looking if signal is not None and signal.name == "generalising_decrease"}
    assert own == {"rgft", "cut", "random"}


def test_ist_draws_between_looks_and_leaves_the_embeddings_off() -> None:
    guide = trained("ist", epochs=4, budget=1.0).run.guide
    looks = {step for step, _ in guide.map_history}
    assert {0, 10} <= looks
    drawn = [plan.step for plan in guide.plans]
    assert len(set(drawn) - looks) >= 2
    assert all(plan.cut >= 1 for plan in guide.plans)
    for plan in guide.plans:
        assert sum(guide.partition[name].layer is not None for name in plan.active()) == 1


def test_ist_draws_from_the_start_where_the_run_is_too_short_for_a_look() -> None:
    guide = trained("ist", epochs=1, budget=0.9).run.guide
    assert not guide.map_history
    assert guide.plans[0].step == 0
    assert all(plan.cut >= 1 for plan in guide.plans)


def test_autofreeze_scores_training_and_freezes_for_good() -> None:
    guide = trained("autofreeze", epochs=3).run.guide
    assert guide.ledger.probe_flops == 0.0
    assert guide.error_map.counts["classifier"] == guide.step_count
    cuts = [plan.cut for plan in guide.plans]
    assert cuts[0] == 0
    assert cuts == sorted(cuts)
    assert cuts[-1] == guide.partition.max_cut - 1


def test_greentrainer_chooses_tensors_within_half_a_step() -> None:
    guide = trained("greentrainer", epochs=3, budget=1.0).run.guide
    assert guide.error_map == guide.situation().same_batch_map
    assert any(c.name.endswith(".weight") and len(c.slices) == 1 for c in guide.partition if c.layer is not None)
    costs, rows, tokens = guide.costs, *guide._spending.typical
    assert costs is not None
    full = costs.step_flops(list(guide.partition.names), rows=rows, tokens=tokens).total
    for plan in guide.plans:
        assert costs.step_flops(plan.active(), rows=rows, tokens=tokens).total <= 0.5 * full * (1 + 1e-9)


def test_hft_draws_half_of_each_layers_matrices_anew() -> None:
    guide = trained("hft", epochs=3).run.guide
    assert len({frozenset(plan.active()) for plan in guide.plans}) >= 3
    for plan in guide.plans:
        for layer in guide.partition.layers:
            members = [c for c in guide.partition if c.layer == layer]
            assert len(members) == 6
            assert sum(plan.is_on(c.name) for c in members) == 3
        assert all(plan.is_on(c.name) for c in guide.partition if c.layer is None)


@pytest.mark.parametrize("family", FAMILIES)
def test_finer_splits_of_every_family_are_whole(family: str) -> None:
    model = FAMILIES[family].build()
    trained_tensors = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(partition(model, tensors).names) == sorted(trained_tensors)
    split = partition(model, matrices)
    for layer in split.layers:
        counts = [sum(len(part.shape) > 1 for part in c.slices) for c in split if c.layer == layer]
        assert counts == [1] * len(counts) or counts == [0]


def test_matrices_take_their_biases_and_norms_along() -> None:
    split = partition(FAMILIES["bert"].build(), matrices)
    names = {
        part.parameter.rpartition("layer.0.")[2] for part in split["bert.encoder.layer.0.output.dense.weight"].slices
    }
    assert names == {f"output.{module}.{kind}" for module in ("dense", "LayerNorm") for kind in ("weight", "bias")}
    gpt2 = partition(FAMILIES["gpt2"].build(), matrices)
    first = [part.parameter.rpartition("h.0.")[2] for part in gpt2["transformer.h.0.attn.c_attn.weight"].slices]
    assert {"ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias"} <= set(first)


def test_fisher_information_chooses_single_weights_and_the_classifier_trains() -> None:
    tried = prepared("fim_static", budget=1.0)
    run, model = tried.run, tried.run.task.model
    optimizer = run.optimizer
    assert isinstance(optimizer, SparseAdamW)
    chosen = [optimizer.state[matrix][INDEX].clone() for matrix in optimizer.matrices]
    entries = sum(matrix.numel() for matrix in optimizer.matrices)
    assert sum(map(len, chosen)) == math.ceil(0.005 * entries)
    assert run.guide.ledger.probe_flops > 0.0
    information = [torch.zeros_like(matrix).flatten() for matrix in optimizer.matrices]
    model.eval()
    stream = BatchStream(run.task.train, batch_size=1, collate_fn=run.task.collate, epochs=1, seed=0)
    number = 8 * max(1, min(4, int(0.1 * run.guide.steps_left)))
    for indices, _ in zip(stream.indices(), range(number), strict=False):
        loss = run.loss(model, stream.load(indices)).mean()
        for total, gradient in zip(information, torch.autograd.grad(loss, optimizer.matrices), strict=True):
            total += gradient.flatten().square()
    lowest = min(float(found[index].min()) for found, index in zip(information, chosen, strict=True) if len(index))
    for found, index in zip(information, chosen, strict=True):
        assert float(found.index_fill(0, index, 0.0).max()) <= lowest
    run.train()
    moved = tried.moved()
    assert moved["classifier.weight"].all()
    assert not any("embeddings" in name for name in moved)


@pytest.mark.parametrize("name", ["fim_static", "gps", "sift", "spiel"])
def test_single_entries_of_kernels_train_too(name: str) -> None:
    tried = trained(name, family="resnet", budget=1.0)
    optimizer = tried.run.optimizer
    assert isinstance(optimizer, SparseAdamW)
    assert optimizer.matrices
    assert {matrix.dim() for matrix in optimizer.matrices} == {4}
    chosen = sum(len(optimizer.state[matrix][INDEX]) for matrix in optimizer.matrices)
    moved = tried.moved()
    kernels = sum(int(elements.sum()) for elements in moved.values() if elements.dim() == 4)
    assert 0 < kernels <= chosen < sum(matrix.numel() for matrix in optimizer.matrices)
    assert {elements.dim() for elements in moved.values()} <= {1, 2, 4}
    assert not any("norm" in name for name in moved)


@pytest.mark.parametrize("budget", [0.35, 1.0])
def test_schedules_are_gone_through_however_short_the_run(budget: float) -> None:
    """Runs of about 9 and 24 steps of full fine-tuning."""
    lisa = trained("lisa", settings={"config": {"policy": {"name": "lisa", "layers": 1, "every": 0.1}}}, budget=budget,
                   epochs=3).run.guide  # fmt: skip
    assert sum(a.step != b.step for a, b in pairwise(lisa.plans)) >= 3
    badam = trained("badam", budget=budget, epochs=3).run.guide
    blocks = [{name for name in plan.active() if name != "classifier"} for plan in badam.plans]
    assert set().union(*blocks) == set(badam.partition.names) - {"bert.embeddings", "classifier"}
    assert all("classifier" in plan.active() for plan in badam.plans)
    thawing = trained("gradual_unfreezing", budget=budget, epochs=3).run.guide
    assert [plan.cut for plan in thawing.plans] == [3, 2, 1, 0]
    id3 = trained("id3", budget=budget, epochs=3).run
    assert isinstance(id3.optimizer, SparseAdamW)
    assert isinstance(id3.optimizer.choice, Unmasking)
    assert id3.optimizer.choice.unmask_steps <= 0.5 * id3.guide.step_count + 1
    entries = sum(matrix.numel() for matrix in id3.optimizer.matrices)
    assert sum(len(id3.optimizer.state[m][INDEX]) for m in id3.optimizer.matrices) == math.ceil(0.05 * entries)


def test_spiel_exchanges_along_the_run_and_steps_given_stay() -> None:
    run = trained("spiel", budget=0.35, epochs=3).run
    assert isinstance(run.optimizer, SparseAdamW)
    choice = run.optimizer.choice
    assert isinstance(choice, DropAndGrow)
    assert (choice.every, choice.window) == (2, 1)
    assert choice.every < choice.until < run.guide.step_count
    given = prepared("spiel", settings={"choice": {"every": 7, "until": 9}}).run
    assert isinstance(given.optimizer, SparseAdamW)
    assert given.optimizer.choice == DropAndGrow(every=7, until=9)

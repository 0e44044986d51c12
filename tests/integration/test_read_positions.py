"""Positions that the loss does not read: found by proof, skipped without a change to loss and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rgft import Config, Guide
from rgft.batches import BatchStream
from rgft.execution.read_positions import ReadPositions
from rgft.partition import partition
from rgft.telemetry.flop_counter import count_flops
from tests.families import FAMILIES, WIDTH, Family
from tests.integration.loops import Examples, adamw, collate, guided
from tests.integration.policies import Scripted, steer

#: Those whose classifier reads one position, by a selection.
CLASSIFIERS = ["bert", "roberta", "distilbert", "mpnet", "vit", "peft_lora"]


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def find(model: nn.Module, batch: Any, loss: Any = model_loss) -> ReadPositions | None:
    return ReadPositions.find(model, partition(model), batch, loss)


def without_dropout(family: Family) -> nn.Module:
    model = family.build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return model


def gradients(model: nn.Module, batch: Any) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model_loss(model, batch)
    loss.backward()
    return float(loss), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_loss_and_every_gradient_are_as_without_skipping(name: str) -> None:
    family = FAMILIES[name]
    model = without_dropout(family).double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in family.batch(rows=5).items()}
    expected_loss, expected = gradients(model, batch)
    found = find(model, batch)
    assert found is not None
    assert found.position == 0
    with found.skipping():
        loss, actual = gradients(model, batch)
        skipped = count_flops(lambda: model_loss(model, batch).backward())
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert actual.keys() == expected.keys()
    norms = {parameter: float(gradient.norm()) for parameter, gradient in expected.items()}
    rounding = 1e-16 * max(norms.values())  # all there is of a key's bias, whose gradient is zero
    for parameter, gradient in expected.items():
        assert (actual[parameter] - gradient).norm() <= 1e-12 * norms[parameter] + rounding, parameter
    assert skipped < 0.85 * count_flops(lambda: model_loss(model, batch).backward())


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_finding_and_detaching_leave_no_trace(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    model.train()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    found = find(model, family.batch())
    assert found is not None
    assert len(found.paths) >= 3
    found.detach()
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in CLASSIFIERS])
def test_nothing_is_skipped_where_every_position_may_be_read(name: str) -> None:
    family = FAMILIES[name]
    assert find(family.build(), family.batch()) is None


def mean_loss(model: Any, batch: Any) -> Tensor:
    hidden_BTD = model.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    return nn.functional.cross_entropy(model.classifier(hidden_BTD.mean(1)), batch["labels"])


def first_and_mean_loss(model: Any, batch: Any) -> Tensor:
    return mean_loss(model, batch) + model_loss(model, batch)


def first_and_last_loss(model: Any, batch: Any) -> Tensor:
    hidden_BTD = model.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    return nn.functional.cross_entropy(model.classifier(hidden_BTD[:, 0] + hidden_BTD[:, -1]), batch["labels"])


def last_loss(model: Any, batch: Any) -> Tensor:
    hidden_BTD = model.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    return nn.functional.cross_entropy(model.classifier(hidden_BTD[:, -1]), batch["labels"])


@pytest.mark.parametrize("loss", [mean_loss, first_and_mean_loss, first_and_last_loss, last_loss])
def test_losses_that_read_more_or_elsewhere(loss: Any) -> None:
    """The last position is another one in every batch: nothing that hooks could hold on to."""
    family = FAMILIES["bert"]
    batch = {**family.batch(), "attention_mask": torch.ones(4, 12, dtype=torch.long)}
    assert find(family.build(), batch, loss) is None


def test_examples_of_a_single_token_prove_nothing() -> None:
    """With all else padding, gradients vanish there for keys and values too, which other batches need."""
    family = FAMILIES["bert"]
    batch = family.batch()
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    batch["attention_mask"][:, 0] = 1
    assert find(family.build(), batch) is None


class SideLoss(nn.Module):
    """A feed-forward block whose inner values enter the loss beside its output, as a router's do."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.inner = nn.Linear(WIDTH, 1)
        self.side = torch.zeros(())

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        self.side = self.inner(hidden_BTD).square().mean()
        return self.block(hidden_BTD)


def test_a_block_with_a_loss_of_its_own_is_left_alone() -> None:
    family = FAMILIES["bert"]
    model: Any = family.build()
    layer = model.bert.encoder.layer[-1]
    layer.intermediate = SideLoss(layer.intermediate)

    def loss(model: Any, batch: Any) -> Tensor:
        return model_loss(model, batch) + layer.intermediate.side

    assert find(model, family.batch(), loss) is None


class Normalised(nn.Module):
    """A feed-forward block that normalises over all tokens of a batch in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Linear(8, 2 * WIDTH)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        inner = self.first(hidden_BTD)
        return self.second(self.norm(inner.flatten(0, 1)).view_as(inner))


def test_what_normalises_over_the_batch_is_not_narrowed() -> None:
    family = FAMILIES["bert"]
    model: Any = family.build()
    layer = model.bert.encoder.layer[-1]
    layer.intermediate = Normalised()
    layer.output.dense = nn.Linear(2 * WIDTH, WIDTH)
    found = find(model, family.batch())
    assert found is not None
    # What follows the norm sees each position for itself again.
    inside = [path for path in found.paths if "intermediate" in path]
    assert inside == ["bert.encoder.layer.1.intermediate.second"]


def test_losses_that_also_read_what_the_layer_computes_inside() -> None:
    """With weight zero for now: by numbers nothing would show."""
    family = FAMILIES["bert"]
    model: Any = family.build()
    inner: list[Tensor] = []
    model.bert.encoder.layer[-1].attention.self.query.register_forward_hook(lambda m, a, output: inner.append(output))

    def loss(model: Any, batch: Any) -> Tensor:
        return model_loss(model, batch) + 0.0 * inner[-1].square().mean()

    assert find(model, family.batch(), loss) is None


def test_autocast_inside_the_loss() -> None:
    family = FAMILIES["bert"]

    def loss(model: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model_loss(model, batch)

    found = find(without_dropout(family), family.batch(), loss)
    assert found is not None
    assert len(found.paths) >= 3


def test_a_cut_above_the_last_layer_caches_every_position() -> None:
    family = FAMILIES["bert"]
    outputs = []
    for positions in ("all", "auto"):
        guide = Guide(without_dropout(family), Config(execution={"cache": "memory", "positions": positions}))
        steer(guide, Scripted(lambda s: {"classifier", "bert.pooler"}))
        guided(guide, adamw(guide), Examples(family), epochs=2, collate_fn=collate)
        assert guide.cache is not None
        assert guide.cache.hits > 0
        assert guide.ledger.unread_flops == 0.0
        (level,) = guide.cache.state_dict()["levels"]
        outputs.append(level["states"])
        guide.detach()
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_preparing_twice_leaves_no_hooks() -> None:
    family = FAMILIES["bert"]
    model = family.build()
    guide = Guide(model, Config())
    for _ in range(2):
        guide.prepare(BatchStream(Examples(family), batch_size=4, collate_fn=collate, epochs=1, seed=0))
    guide.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_training_with_and_without_skipping_agree() -> None:
    """The guide's whole run, cut, cache and heads included: the same weights to rounding, for fewer FLOPs."""
    family = FAMILIES["bert"]
    states, ledgers = [], []
    for positions in ("all", "auto"):
        model = without_dropout(family).double()
        settings = {
            "granularity": "head", "ffn_blocks": 2, "mask": {"frozen_fraction": 0.5}, "warmup_fraction": 0.2,
            "probe": {"interval": 4, "size": 2}, "execution": {"positions": positions}, "update": {"average_last": 0.0},
        }  # fmt: skip
        with Guide(model, Config(**settings)) as guide:
            torch.manual_seed(0)
            guided(guide, adamw(guide, lr=1e-3), Examples(family), epochs=3, collate_fn=collate)
            assert guide.plan.cut > 0
            assert guide.run_plan is not None
            assert guide.run_plan.position == (0 if positions == "auto" else None)
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        ledgers.append(guide.ledger)
    plain, skipping = ledgers
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-6, atol=1e-7)
    assert plain.unread_flops == 0.0
    assert skipping.training_flops + skipping.unread_flops == pytest.approx(plain.training_flops)
    assert skipping.reference_flops == plain.reference_flops
    rows = skipping.as_rows()
    assert sum(flops for _, flops, _ in rows[:-1]) == pytest.approx(rows[-1][1])


def test_only_training_steps_skip() -> None:
    """What a user computes between steps is computed at every position."""
    family = FAMILIES["bert"]
    model: Any = without_dropout(family)
    batch = family.batch()
    expected = copy.deepcopy(model).eval().bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    guide = Guide(model, Config())
    optimizer = adamw(guide, lr=0.0)
    for training_batch in guide.batches(Examples(family), batch_size=4, collate_fn=collate):
        guide.loss(training_batch).backward()
        guide.step(optimizer)
        assert guide.ledger.unread_flops > 0
        actual = model.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        torch.testing.assert_close(actual, expected)
        break
    guide.detach()


def test_gradient_checkpointing_runs_the_layer_again_in_the_backward_pass() -> None:
    family = FAMILIES["bert"]
    results = []
    for checkpointed in (False, True):
        model: Any = without_dropout(family)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with Guide(model, Config(warmup_fraction=0.9)) as guide:
            torch.manual_seed(0)
            guided(guide, adamw(guide), Examples(family), steps=3)
            assert guide.ledger.unread_flops > 0
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1])

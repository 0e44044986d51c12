"""Well-learnt examples skipped in the guide's own batches: the same expectation, for the FLOPs that the ledger says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rgft import Config, Guide
from rgft.errors import AttachError, ConfigError, RGFTWarning
from rgft.progress import Course
from rgft.run import Run, Settings
from rgft.tasks.target_loss import TOKEN_LOSS_AT_TARGETS
from rgft.tasks.token_loss import targets_of_rows, token_losses
from rgft.telemetry.run_folder import RunFolder
from tests.families import FAMILIES, loss_of
from tests.integration.limited import FamilyTask, distance, limited
from tests.integration.loops import (
    Examples,
    adamw,
    assert_same_state,
    collate,
    example_losses,
    guided,
    trimmed,
    without_dropout,
)  # fmt: skip
from tests.unit.pruning.sampling import assert_unbiased

FULL = {"preset": "full"}


def decoder_examples(count: int = 24) -> Examples:
    """Texts of several lengths."""
    data = Examples(FAMILIES["llama"], count, 14)
    for place, row in enumerate(data.rows):
        length = 5 + place * 7 % 10
        row["attention_mask"][length:] = 0
        row["labels"][length:] = -100
    return data


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def opened(model: nn.Module, data: Any, loss: Any, *, at_targets: Any = None, **settings: Any) -> Guide:
    """A guide that has seen every example once, and is about to begin the second epoch; its weights as they were."""
    guide = Guide(model, Config(**FULL, **settings), loss=loss, loss_at_targets=at_targets)
    for batch in guide.batches(data, batch_size=6, collate_fn=collate, epochs=9):
        guide.loss(batch)
        if guide._progress.course is not None and guide._progress.course.position == -(-len(data) // 6):
            break
    return guide


class Drawn:
    """What one nominal batch of six, three of its rows learnt well, is in many epochs.

    Attributes:
        ids: of the batch.
        counts: targets of its rows; 1 of classes.
    """

    def __init__(self, guide: Guide, data: Any) -> None:
        assert guide.weighted_loss is not None
        self._guide, self._data, self._weighted = guide, data, guide.weighted_loss
        self.ids = list(range(6))
        examples = self._weighted.examples
        for part in (examples, self._weighted.tokens):
            if part is not None:
                part._progress = lambda: 0.0  # it never ends
        if examples is not None:
            examples.begin_epoch(1)
            is_well = examples._is_well
            self.ids = [*is_well.nonzero()[:3, 0].tolist(), *(~is_well).nonzero()[:3, 0].tolist()]
            assert len(self.ids) == 6
        self.batch = collate([data[i] for i in self.ids])
        labels = self.batch["labels"]
        self.counts = targets_of_rows(self.batch) if labels.dim() == 2 else [1] * 6

    def factors(self, epoch: int) -> tuple[Any, Tensor]:
        """What is kept in that epoch, and what each item (row or target) of the nominal batch weighs."""
        examples, tokens = self._weighted.examples, self._weighted.tokens
        kept, rows, targets = None, torch.ones(6), None
        if examples is not None:
            examples.begin_epoch(epoch)
            kept = examples.kept(self.ids)
            of_id = dict(zip(kept.ids, kept.weights, strict=True))
            rows = torch.tensor([of_id.get(i, 0.0) for i in self.ids])
        if tokens is not None:
            tokens.begin_epoch(epoch)
            targets = tokens.factors(self.ids, self.counts)
        whole = rows.repeat_interleave(torch.tensor(self.counts))
        return kept, whole if targets is None else whole * targets

    def gradient(self, epoch: int, kept: Any) -> Tensor:
        """Of the guide's own pass over what is kept."""
        course: Any = self._guide._progress.course
        course.position = epoch * course.batches_per_epoch + 1
        rows = self.ids if kept is None else list(kept.ids)
        batch = collate([self._data[i] for i in rows])
        self._guide.announce(batch, rows, kept=kept)
        self._guide.model.zero_grad()
        self._guide.loss(batch).backward()
        return gradient(self._guide.model)


def gradients_of_items(model: nn.Module, batch: Any) -> Tensor:
    """Of each row's, or target's, part of the batch's mean loss: [N, P]."""
    if batch["labels"].dim() == 1:
        losses_N = example_losses(model, batch)
    else:
        targets = batch["labels"][:, 1:].flatten()
        logits = (
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].flatten(0, 1)
        )
        losses_N = torch.nn.functional.cross_entropy(
            logits[targets != -100], targets[targets != -100], reduction="none"
        )
    found: list[Tensor] = []
    for loss in losses_N:
        model.zero_grad()
        (loss / len(losses_N)).backward(retain_graph=True)
        found.append(gradient(model).clone())
    return torch.stack(found)


CASES = {
    "classes": ("bert", example_losses, None, {"prune": 0.3}),
    "tokens of a batch": ("llama", token_losses, TOKEN_LOSS_AT_TARGETS, {"prune": 0.3}),
    "target tokens": ("llama", token_losses, TOKEN_LOSS_AT_TARGETS, {"tokens": 0.3}),
    "examples and tokens": ("llama", token_losses, TOKEN_LOSS_AT_TARGETS, {"prune": 0.3, "tokens": 0.3}),
}  # fmt: skip
DRAWS, PASSES = 6000, 25


@pytest.mark.parametrize("positions", ["auto", "all"])
@pytest.mark.parametrize("case", CASES)
def test_expected_gradient_is_the_whole_batchs(case: str, positions: str) -> None:
    """Passes have the gradient that their draw's weights make of items'; over many draws it is unbiased."""
    family, loss, at_targets, examples = CASES[case]
    if positions == "all" and "tokens" in examples:
        pytest.skip("refused")
    model = without_dropout(FAMILIES[family].build())
    data = decoder_examples(12) if family == "llama" else Examples(FAMILIES[family], 12)
    plain = copy.deepcopy(model)
    guide = opened(
        model, data, loss, at_targets=at_targets, examples={**examples, "off_for_last": 0.0},
        execution={"positions": positions},
    )  # fmt: skip
    drawn = Drawn(guide, data)
    items_NP = gradients_of_items(plain, drawn.batch)
    plain.zero_grad()
    loss(plain, drawn.batch).mean().backward()
    whole = gradient(plain)
    assert torch.allclose(items_NP.sum(0), whole, atol=1e-6)
    factors: list[Tensor] = []
    for epoch in range(1, DRAWS + 1):
        kept, factors_N = drawn.factors(epoch)
        factors.append(factors_N)
        if epoch <= PASSES:
            expected, found = factors_N @ items_NP, drawn.gradient(epoch, kept)
            assert float((found - expected).norm()) < 1e-4 * float(expected.norm())
    draws_DN = torch.stack(factors)
    is_skippable = (draws_DN == 0.0).any(0)
    part = items_NP[is_skippable].sum(0)
    # Along the whole gradient, and along what may be skipped, where a wrong weight shows most.
    along = items_NP @ torch.stack([whole / whole.norm(), part / part.norm()]).T
    assert_unbiased(draws_DN @ along, along.sum(0).double(), along[is_skippable].sum(0))


def test_the_first_epoch_is_bit_identical() -> None:
    """There nothing is known to be learnt well."""
    models = []
    for examples in ({"prune": 0.5}, {}):
        model = FAMILIES["bert"].build()
        torch.manual_seed(0)
        guide = Guide(model, Config(**FULL, examples=examples), loss=example_losses)
        assert (guide.weighted_loss is None) == (not examples)
        guided(guide, adamw(guide), Examples(FAMILIES["bert"]), epochs=1)
        guide.detach()
        models.append(model)
    assert_same_state(*models)


def test_the_ledger_tells_what_was_spared() -> None:
    data = Examples(FAMILIES["bert"], 40)
    settings = {"prune": 0.6, "threshold": 1.1}
    guide = Guide(FAMILIES["bert"].build(), Config(**FULL, examples=settings), loss=example_losses)
    rows: list[int] = []
    progress: list[tuple[float, int]] = []
    for batch in guide.batches(data, batch_size=8, collate_fn=collate, epochs=5):
        rows.append(len(batch["labels"]))
        kept = guide._progress.kept
        assert kept is not None
        progress.append((guide.progress, len(kept.skipped)))
        guide.loss(batch).backward()
        guide.step(optimizer := guide.optimizer or adamw(guide))
        optimizer.zero_grad()
    ledger = guide.ledger
    assert len(rows) == 25  # each nominal batch is a step
    assert ledger.examples == sum(rows)
    assert ledger.examples_skipped == 200 - sum(rows) > 20
    assert all(skipped == 0 for share, skipped in progress if share > 1 - 0.125 + 1 / 25)
    assert any(skipped for _, skipped in progress)
    assert guide.costs is not None
    each = guide.costs.full_step(1, 12).total
    assert ledger.reference_flops == pytest.approx(200 * each)  # of all examples of the batches
    assert ledger.examples_flops == pytest.approx(ledger.examples_skipped * each)
    assert ledger.spent_flops == pytest.approx(sum(rows) * each)
    assert ledger.tokens == sum(rows) * 12
    *parts, spent = [flops for _, flops, _ in ledger.as_rows()]
    assert sum(parts) == pytest.approx(spent)
    summary = guide.summary()
    assert summary["flops"]["saved"]["examples_skipped"] == ledger.examples_flops
    assert summary["flops"]["saved"]["net"] == pytest.approx(ledger.examples_flops)
    assert summary["data"]["examples_skipped"] == ledger.examples_skipped
    assert guide.run_plan is not None
    assert guide.run_plan.skips == "well-learnt examples with probability 0.6 (unbiased)"
    assert [entry["epoch"] for entry in guide.skipping_history] == [0, 1, 2, 3, 4]


def test_a_budget_buys_more_batches_and_is_kept() -> None:
    positions: list[int] = []
    for prune in (0.0, 0.7):
        examples = {"prune": prune, "threshold": 1.2} if prune else {}
        guide = Guide(
            FAMILIES["bert"].build(), Config(**FULL, budget=0.35, examples=examples), loss=example_losses
        )  # fmt: skip
        left: list[float] = []
        guided(
            guide, adamw(guide, 1e-4), Examples(FAMILIES["bert"], 40), batch_size=8, epochs=6,
            after_step=lambda guide, left=left: left.append(guide.steps_left),
        )  # fmt: skip
        assert guide.run_plan is not None
        assert 0.9 * guide.run_plan.flops < guide.ledger.spent_flops <= guide.run_plan.flops
        course: Any = guide._progress.course
        positions.append(course.position)
        if prune:  # a step on what comes up costs less
            assert guide.costs is not None
            step = guide.costs.full_step(8, 12).total
            assert guide._spending.kept_rows == 1.0  # the last part is whole
            assert left[8] > (guide.run_plan.flops - 9 * step) / step * 1.2
    assert positions[1] > positions[0] + 2


def test_rewinding_takes_back_what_was_learnt_of_examples() -> None:
    guide = Guide(
        without_dropout(FAMILIES["bert"].build()), Config(**FULL, examples={"prune": 0.5}), loss=example_losses
    )  # fmt: skip
    guide.set_optimizer(adamw(guide))
    data = Examples(FAMILIES["bert"], 16)
    settings: dict[str, Any] = {"batch_size": 4, "collate_fn": collate, "epochs": 6}

    def go(steps: int) -> list[tuple[tuple[int, ...], tuple[float, ...], float]]:
        seen: list[Any] = []
        for batch in guide.batches(data, **settings):
            kept = guide._progress.kept
            assert kept is not None
            loss = guide.loss(batch)
            seen.append((kept.ids, kept.weights, float(loss.detach())))
            loss.backward()
            guide.model.zero_grad()
            guide._step._passes, guide._step.is_open = 1, False  # no step: the weights stay
            if len(seen) == steps:
                break
        return seen

    go(6)
    state = guide.state_dict(cache=False)
    guide.rewind(state)
    first = go(12)
    assert any(weight != 1.0 for _, weights, _ in first for weight in weights)
    guide.rewind(state)
    assert go(12) == first


def test_pieces_of_a_batch_give_its_gradient() -> None:
    """As a memory budget cuts it: rows keep their weights, and what they count in a mean over tokens."""
    for family in ("bert", "llama"):
        task = PerExample(family)
        without_dropout(task.model)
        run = Run(
            task, Config(**FULL, examples={"prune": 0.5, "threshold": 1.02}, seed=1),
            Settings(lr=1e-6, epochs=4, batch_size=8),
        )  # fmt: skip
        run.prepare()
        compared = 0
        for batch in run.guide.batches(task.train, **run._data):
            kept, ids = run.guide._progress.kept, run.guide.announced_ids
            assert kept is not None
            found: list[dict[str, Tensor]] = []
            for rows in (99, 3):
                run.guide.announce(batch, ids, kept=kept)
                type(run)._rows_per_pass = rows  # type: ignore[assignment]
                run._passes(batch)
                found.append({n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None})
                run.optimizer.zero_grad()
            assert distance(found[1], found[0]) < 1e-5
            compared += bool(kept.skipped)
        assert compared > 3
        run.close()


@pytest.fixture(autouse=True)
def _rows_per_pass() -> Any:
    before = Run._rows_per_pass
    yield
    Run._rows_per_pass = before  # type: ignore[method-assign]


class PerExample(FamilyTask):
    """Losses per example; of a language model with what counts their tokens."""

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__(name, **settings)
        if self.is_lm:
            self.train = decoder_examples(24)
            self.loss_at_targets = TOKEN_LOSS_AT_TARGETS  # type: ignore[assignment]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return token_losses(model, batch) if self.is_lm else example_losses(model, batch)


def test_a_searched_learning_rate_skips_from_where_the_run_is() -> None:
    """Losers leave nothing behind: the run is the same whatever they saw."""
    ends = []
    for rates in ((1e-3, 2e-3), (1e-3, 2e-3)):
        torch.manual_seed(0)
        run = Run(
            PerExample("bert", count=60), Config(budget=0.9, examples={"prune": 0.5}, mask={"frozen_fraction": 0.5}),
            Settings(lr=rates, epochs=6, batch_size=6),
        )  # fmt: skip
        run.train()
        assert run.search is not None
        assert run.guide.ledger.examples_skipped > 0
        epochs = [entry["epoch"] for entry in run.guide.skipping_history]
        assert epochs == list(range(len(epochs)))  # each decided once on the winner's way
        ends.append(run.guide.state_dict(cache=False)["weighted"]["examples"])
        run.close()
    assert torch.equal(ends[0]["losses"], ends[1]["losses"])


def test_with_a_memory_budget() -> None:
    run = limited("bert", "1GB", task=PerExample("bert"), examples={"prune": 0.5}, epochs=4)
    run.train()
    assert run.guide.ledger.examples_skipped > 0
    run.close()


def test_accumulation_and_a_set_smaller_than_a_batch() -> None:
    settings = {"prune": 0.8, "threshold": 9.0}
    guide = Guide(FAMILIES["bert"].build(), Config(**FULL, examples=settings), loss=example_losses)
    guide.accumulation = 2
    batches, _ = guided(
        guide, adamw(guide), Examples(FAMILIES["bert"], 5), batch_size=8, epochs=12, accumulation=2
    )  # fmt: skip
    assert len(batches) == 12
    assert all(len(batch["labels"]) >= 1 for batch in batches)
    assert guide.ledger.examples_skipped > 15
    assert guide.step_count == 6


# -------------------------------------------------------------------- language models' tokens


@pytest.mark.parametrize("select", ["unbiased", "top"])
def test_skipped_tokens_are_not_computed_and_are_labelled(tmp_path: Any, select: str) -> None:
    task = PerExample("llama")
    folder = RunFolder.create(tmp_path / "run")
    run = Run(
        task, Config(**FULL, execution={"positions": "auto"}, examples={"tokens": 0.5, "select": select}),
        Settings(lr=1e-3, epochs=4, batch_size=6), folder=folder,
    )  # fmt: skip
    run.train()
    ledger = run.guide.ledger
    assert ledger.audit_error is not None
    assert abs(ledger.audit_error) < 0.02
    targets = sum(sum(targets_of_rows(collate([row]))) for row in task.train.rows)
    assert 0.1 * targets < ledger.targets_skipped < 0.5 * 3 * targets
    assert ledger.targets_flops > 0.0
    assert run.guide.costs is not None
    head = run.guide.costs.full_step(1, 14)
    assert ledger.targets_are_biased == (select == "top")
    summary = run.guide.summary()
    assert summary["data"]["targets_are_biased"] == (select == "top")
    assert summary["flops"]["saved"]["targets_skipped"] == ledger.targets_flops < head.total * 24 * 3
    *parts, spent = [flops for _, flops, _ in ledger.as_rows()]
    assert sum(parts) == pytest.approx(spent)
    assert run.guide.run_plan is not None
    assert ("BIASED" in run.guide.run_plan.skips) == (select == "top")
    records = [record.data for record in folder.read_records() if record.type == "skipping"]
    assert [record["epoch"] for record in records] == [0, 1, 2, 3]
    assert {record["biased"] for record in records} == {select == "top"}
    assert {record["of"] for record in records} == {"tokens"}
    assert any("BIASED" in what for what, *_ in ledger.as_rows()) == (select == "top")
    run.close()


def test_a_pass_with_skipped_tokens_costs_what_the_ledger_says() -> None:
    from rgft.telemetry.flop_counter import count_flops

    data = decoder_examples(12)
    guide = opened(
        FAMILIES["llama"].build(), data, token_losses, at_targets=TOKEN_LOSS_AT_TARGETS,
        execution={"positions": "auto"}, examples={"tokens": 0.6, "prune": 0.4, "off_for_last": 0.0},
    )  # fmt: skip
    optimizer = adamw(guide)
    checked = 0
    for batch in guide.batches(data, batch_size=6, collate_fn=collate, epochs=9):
        before = guide.ledger.spent_flops
        counted = count_flops(lambda batch=batch: guide.loss(batch).backward())
        assert guide.ledger.spent_flops - before == pytest.approx(counted, rel=0.02)
        checked += 1
        guide.step(optimizer)
        optimizer.zero_grad()
    assert checked > 10
    assert guide.ledger.targets_skipped > 0
    assert guide.ledger.examples_skipped > 0


@pytest.mark.parametrize("stop", [5, 6, 11])
def test_a_resumed_run_skips_the_same_tokens(stop: int) -> None:
    """In an epoch and at its end; four steps each."""

    def session(seed: int) -> tuple[Guide, Any]:
        guide = Guide(
            FAMILIES["llama"].build(seed),
            Config(**FULL, execution={"positions": "auto"}, examples={"tokens": 0.5, "prune": 0.3}),
            loss=token_losses, loss_at_targets=TOKEN_LOSS_AT_TARGETS,
        )  # fmt: skip
        guide.set_optimizer(optimizer := adamw(guide))
        return guide, optimizer

    data = decoder_examples(24)
    whole, optimizer = session(0)
    _, losses = guided(whole, optimizer, data, batch_size=6, epochs=4)
    assert whole.ledger.targets_skipped > 50
    first, optimizer = session(0)
    _, before = guided(first, optimizer, data, batch_size=6, epochs=4, steps=stop)
    second, other = session(5)
    second.model.load_state_dict(first.model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    _, after = guided(second, other, data, batch_size=6, epochs=4)
    assert before + after == losses
    assert second.ledger.targets_skipped == whole.ledger.targets_skipped
    assert_same_state(second.model, whole.model)


# -------------------------------------------------------------------- what is refused


def test_the_models_own_mean_is_refused_at_attach() -> None:
    model = FAMILIES["bert"].build()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(AttachError, match=r"own \.loss.*loss\(model, batch\)"):
        Guide(model, Config(examples={"prune": 0.3}))
    assert [name for name, _ in model.named_parameters()] == names
    Guide(model, Config(preset="full")).detach()


@pytest.mark.parametrize(
    ("family", "loss", "batch_size", "message"),
    [
        ("bert", loss_of, 4, r"one loss per example, \[2\], found the shape \[\]"),
        ("llama", token_losses, 4, "each example's own"),
        ("bert", example_losses, 1, "batch_size 1"),
    ],
)
def test_losses_and_batches_that_cannot_be_weighed(family: str, loss: Any, batch_size: int, message: str) -> None:
    guide = Guide(FAMILIES[family].build(), Config(**FULL, examples={"prune": 0.3}), loss=loss)
    data = decoder_examples(8) if family == "llama" else Examples(FAMILIES[family], 8)
    with pytest.raises((AttachError, ConfigError), match=message):
        next(iter(guide.batches(data, batch_size=batch_size, collate_fn=trimmed, epochs=2)))


def test_tokens_without_a_head_at_targets_are_refused() -> None:
    for family, loss in (("bert", example_losses), ("llama", token_losses)):
        guide = Guide(FAMILIES[family].build(), Config(**FULL, examples={"tokens": 0.3}), loss=loss)
        with pytest.raises(ConfigError, match=r"examples\.tokens: expected a language model"):
            next(iter(guide.batches(Examples(FAMILIES[family], 8), batch_size=4, collate_fn=collate)))


def test_a_trainer_that_does_not_skip_is_refused() -> None:
    class Elsewhere(Course):
        position, batches_per_epoch, total_batches, epoch = 0, 4, 8, 0  # type: ignore[assignment]

    guide = Guide(FAMILIES["bert"].build(), Config(**FULL, examples={"prune": 0.3}), loss=example_losses)
    with pytest.raises(ConfigError, match="do not skip"):
        guide.follow(Elsewhere())


def test_settings_without_effect_warn() -> None:
    for settings, message in (
        ({"off_for_last": 0.5}, "as nothing is skipped"),
        ({"prune": 0.2, "select": "top"}, "no token is skipped"),
        ({"tokens": 0.2, "select": "top", "threshold": 2.0}, "takes a share"),
    ):
        with pytest.warns(RGFTWarning, match=message):
            Config(examples=settings)
    for wrong in ({"prune": 1.0}, {"prune": -0.1}, {"tokens": 1.0}, {"threshold": 0.0}, {"select": "bottom"}):
        with pytest.raises(ConfigError, match="examples"):
            Config(examples=wrong)

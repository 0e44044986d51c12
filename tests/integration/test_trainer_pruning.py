"""Well-learnt examples skipped in a Trainer's batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from rgft.config import Config
from rgft.errors import AttachError, ConfigError
from rgft.integrations import RGFTCallback, enable
from rgft.integrations.trainer_examples import counts_of, example_losses, rows_of
from rgft.pruning import KeptRows
from tests.families import FAMILIES, VOCABULARY
from tests.integration.loops import without_dropout
from tests.integration.test_guide_resume import assert_equal as assert_equal_state
from tests.integration.trainers import HALF, Watch, assert_equal, examples, make_trainer, weights

SKIP = {"prune": 0.5, "threshold": 1.05, "off_for_last": 0.2}


def texts(count: int = 40) -> Dataset:
    """Next tokens to learn, of several lengths."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCABULARY, (6 + i % 5,), generator=generator).tolist() for i in range(count)]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows], "labels": rows})


def padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 1, "attention_mask": 0, "labels": -100}
    return {k: torch.tensor([row[k] + [v] * (width - len(row[k])) for row in rows]) for k, v in fill.items()}


def seen_by(trainer: Any, guide: Any) -> list[tuple[Any, float, int]]:
    """What was kept, the loss and the rows, of each training pass."""
    seen: list[Any] = []
    step = trainer.training_step

    def noted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        kept, rows = inputs.get("rgft_kept_rows"), len(inputs["labels"])
        loss = step(model, inputs, *args, **kwargs)
        seen.append((kept, float(loss), rows))
        return loss

    trainer.training_step = noted
    return seen


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"dataloader_num_workers": 1}])
def test_a_run_skips_and_the_ledger_tells(tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, num_train_epochs=5, **settings)
    guide = enable(trainer, preset="full", examples=SKIP)
    seen = seen_by(trainer, guide)
    trainer.train()
    assert len(seen) == 40
    ledger = guide.ledger
    assert ledger.examples == sum(rows for *_, rows in seen)
    assert ledger.examples_skipped == 5 * 64 - ledger.examples > 10
    assert all(kept.is_whole for kept, *_ in seen[:8])  # nothing is known in the first epoch
    assert all(kept.is_whole for kept, *_ in seen[-7:])  # nor is anything skipped in the last part
    assert all(rows == len(kept.ids) for kept, _, rows in seen)
    *parts, spent = [flops for _, flops, _ in ledger.as_rows()]
    assert sum(parts) == pytest.approx(spent)
    assert "compute_loss" not in vars(trainer)


def test_until_something_is_skipped_it_is_the_trainers_own(tmp_path: Path) -> None:
    found = []
    for skips in (SKIP, {}):
        trainer = make_trainer(tmp_path, num_train_epochs=1)
        enable(trainer, preset="full", budget=1.0, examples=skips)
        trainer.train()
        found.append(weights(trainer.model))
    assert_equal(*found)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_pass_is_the_weighted_mean_over_the_nominal_batch(tmp_path: Path, family: str, accumulation: int) -> None:
    model = without_dropout(FAMILIES[family].build())
    dataset: Any = texts() if family == "llama" else examples(40)
    more = {"data_collator": padded} if family == "llama" else {}
    trainer = make_trainer(
        tmp_path, model=model, dataset=dataset, more=more, num_train_epochs=4, learning_rate=1e-9,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    guide = enable(trainer, preset="full", examples=SKIP)
    seen = seen_by(trainer, guide)
    before = weights(model)
    trainer.train()
    model.load_state_dict(before)
    rows = [dataset[i] for i in range(len(dataset))]
    checked = 0
    assert len(seen) == 20
    starts = [epoch + place for epoch in range(0, 20, 5) for place in range(0, 5, accumulation)]
    for start, end in zip(starts, [*starts[1:], 20], strict=True):
        group = seen[start:end]
        # As the Trainer does: a language model's loss is over the tokens of all batches of a step.
        per_batch = [count(rows, kept) for kept, *_ in group]
        for (kept, loss, _), own in zip(group, per_batch, strict=True):
            scaled = 1 if trainer.model_accepts_loss_kwargs else len(group)
            whole = sum(per_batch) if family == "llama" else own * scaled
            total = 0.0
            for example, weight in zip(kept.ids, kept.weights, strict=True):
                one = padded([rows[example]]) if family == "llama" else as_batch(rows[example])
                with torch.no_grad():
                    model.eval()
                    mean = float(model(**one).loss)
                total += weight * mean * counts_of(one["labels"])[0]
            assert loss == pytest.approx(total / whole, rel=1e-4)
            checked += not kept.is_whole
    assert checked > 3


def as_batch(row: dict[str, Any]) -> dict[str, Any]:
    return {key: torch.tensor([value]) for key, value in row.items()}


def count(rows: list[Any], kept: KeptRows) -> int:
    ids = (*kept.ids, *kept.skipped)
    labels = [rows[i]["labels"] for i in ids]
    return sum(len(label) - 1 if isinstance(label, list) else 1 for label in labels)


@pytest.mark.parametrize("stop", [10, 14, 16])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, stop: int) -> None:
    """With a cache and probes, in and at the end of an epoch."""

    def make(name: str, **settings: Any) -> Any:
        trainer = make_trainer(
            tmp_path / name, dataset=examples(64), num_train_epochs=4, save_strategy="steps", save_steps=2, **settings
        )  # fmt: skip
        return trainer, enable(trainer, budget=0.8, mask=HALF, probe={"interval": 5, "size": 2}, examples=SKIP)

    whole, first_guide = make("whole")
    whole.train()
    assert first_guide.ledger.examples_skipped > 3
    assert first_guide.cache.hits > 0
    assert whole.state.global_step > 16
    resumed, guide = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert_equal(weights(resumed.model), weights(whole.model))
    assert guide.ledger.examples_skipped == first_guide.ledger.examples_skipped
    states = [g.state_dict(cache=False)["weighted"] for g in (guide, first_guide)]
    for state in states:  # what is set aside for probes is never visited
        state["examples"]["losses"].nan_to_num_(-1.0)
    assert_equal_state(*states)


def test_a_budget_is_kept(tmp_path: Path) -> None:
    steps = []
    for skips in ({}, {**SKIP, "threshold": 1.5}):
        trainer = make_trainer(tmp_path, num_train_epochs=6)
        guide = enable(trainer, preset="full", budget=0.4, examples=skips)
        watch = Watch(lambda guide=guide: guide.ledger.spent_flops)
        trainer.add_callback(watch)
        trainer.train()
        assert guide.run_plan is not None
        assert 0.9 * guide.run_plan.flops < watch.seen[-1] <= guide.run_plan.flops
        steps.append(len(watch.seen))
    assert steps[1] > steps[0] + 1


# -------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label smoothing"),
        ({"per_device_train_batch_size": 1}, "2 or more examples"),
    ],
)
def test_trainers_that_cannot_skip(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    trainer = make_trainer(tmp_path, **settings)
    with pytest.raises((AttachError, ConfigError), match=message):
        enable(trainer, preset="full", examples=SKIP)
    assert getattr(trainer.model, "_rgft_guide", None) is None
    trainer.train()


def test_tokens_and_callbacks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"examples\.tokens"):
        enable(make_trainer(tmp_path, family="llama"), preset="full", examples={"tokens": 0.3})
    with pytest.raises(ConfigError, match="examples: a callback"):
        RGFTCallback(Config(preset="full", examples={"prune": 0.3}))


# -------------------------------------------------------------------- rows


def test_kept_rows_are_padded_to_their_own_longest() -> None:
    batch: dict[str, Any] = {**padded([texts(5)[i] for i in range(5)]), "name": list("abcde"), "other": 3}
    kept = KeptRows(ids=(7, 9), weights=(1.0, 1.0), skipped=(8, 10, 11))
    rows = rows_of(batch, kept, [7, 8, 9, 10, 11])
    expected = padded([texts(5)[0], texts(5)[2]])
    assert all(torch.equal(rows[key], expected[key]) for key in expected)
    assert (rows["name"], rows["other"]) == (["a", "c"], 3)
    left = {key: value.flip(1) for key, value in batch.items() if isinstance(value, torch.Tensor)}
    assert torch.equal(rows_of(left, kept, [7, 8, 9, 10, 11])["labels"], expected["labels"].flip(1))
    wide = {key: torch.nn.functional.pad(v, (0, 3)) for key, v in batch.items() if isinstance(v, torch.Tensor)}
    assert rows_of(wide, kept, [7, 8, 9, 10, 11])["labels"].shape == (2, 13)  # padded on purpose


def test_forms_of_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(4, 3, generator=generator), torch.tensor([0, 2, 1, 1])
    found = example_losses(logits, labels)
    assert found is not None
    assert found.sums_B.mean() == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)))
    numbers = example_losses(logits[:, :1], torch.ones(4))
    assert numbers is not None
    assert torch.allclose(numbers.sums_B, (logits[:, 0] - 1.0) ** 2)
    assert example_losses(None, labels) is None
    assert example_losses(torch.randn(4, 7, 5), labels) is None

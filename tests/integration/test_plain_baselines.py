"""Full fine-tuning and LoRA as the bench runs them, beside loops of Transformers, PEFT and torch alone."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

from rgft.tasks.base import PreparedTask
from rgft.tasks.metrics import OfWholeSplit, classification

BASELINES = Path(__file__).parents[2] / "benchmarks" / "baselines"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BASELINES))
    return importlib.import_module("check")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    torch.manual_seed(7)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    return tmp_path


def rows() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 9, (48,), generator=draw).tolist()
    return [
        {"input_ids": [1, *torch.randint(2, 40, (n,), generator=draw).tolist()], "labels": number % 2}
        for number, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_bench_makes_the_steps_of_a_plain_loop(
    name: str, check: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "model_folder", lambda: folder)
    plain, data = check.plain_training, rows()

    def task() -> PreparedTask:
        return PreparedTask(
            model=plain.build({"method": "full", "model_folder": str(folder), "classes": 2, "seed": 3}),
            processor=None, train=data, validation=None, test=data[:16], collate=plain.pad,
            loss=lambda model, batch: functional.cross_entropy(
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"],
                reduction="none",
            ),
            metric=lambda: OfWholeSplit(classification), label_names=("a", "b"),
        )  # fmt: skip

    job = check.job_of(name, task(), seed=3)
    assert job["head_lr_multiplier"] == {"full": 10.0, "lora": 1.0}[name]
    expected = plain.train(job)
    found = check.ours(name, task(), seed=3, budget=None)
    assert len(job["batches"]) == len(expected["losses"]) == 3
    assert found["losses"] == pytest.approx(expected["losses"], abs=2e-6)
    assert len(set(expected["losses"])) == 3
    assert found["loss"] == pytest.approx(expected["loss"], abs=2e-6)
    assert found["accuracy"] == expected["accuracy"]
    # At another rate they are not the same, so that equal losses say something.
    other = plain.train({**job, "lr": 10 * job["lr"]})
    assert other["losses"][-1] != pytest.approx(expected["losses"][-1], abs=1e-5)


def test_results_that_would_be_made_otherwise_now_are_left_out_and_made_again(
    check: ModuleType, tmp_path: Path
) -> None:
    run = {"losses": [0.5], "loss": 0.5, "accuracy": 0.7, "seconds": 1.0}
    against = {"ours_by_steps": {"steps": [1, 1], "equal_first_steps": 1, "largest_gap": 0.0}}
    for seed, changes in enumerate([{}, {"revision": 1}, {"settings": {"rank": 4}}]):
        made = {**check.description("bbc", "lora"), "seed": seed, "runs": {"plain": run, "row": run}, **changes}
        (tmp_path / f"bbc--lora--seed{seed}.json").write_text(json.dumps({**made, "plain_against": against}))
    assert [check.is_of_now(tmp_path / f"bbc--lora--seed{seed}.json", "bbc", "lora") for seed in range(4)] == [
        True, False, False, False,
    ]  # fmt: skip
    shown = check.table(tmp_path)
    assert "| bbc, lora | 1 |" in shown
    assert shown.endswith("revision of the method: bbc--lora--seed1.json, bbc--lora--seed2.json.")

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

from rgft.errors import DataError
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


def stored(check: ModuleType, folder: Path, task: str, name: str, seed: int = 0, **changes: Any) -> Path:
    """A result with what is asked of it."""
    metrics = {"loss": 0.5, "accuracy": 0.75, "seconds": 2.0, "losses": [1.0]}
    gaps = {"steps": [1, 1], "equal_first_steps": 1, "largest_gap": 0.0}
    result = {
        **check.identity_of(task, name, seed), "runs": dict.fromkeys(("plain", "ours_by_steps", "row"), metrics),
        "plain_against": dict.fromkeys(("ours_by_steps", "row"), gaps), **changes,
    }  # fmt: skip
    path = folder / f"{task}--{name}--seed{seed}.json"
    path.write_text(json.dumps({key: value for key, value in result.items() if value is not None}))
    return path


def test_what_was_made_with_other_settings_is_stale(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = stored(check, tmp_path, "bbc", "full")
    lora = {key: stored(check, tmp_path, "bbc", "lora", seed, **{key: value}) for seed, (key, value) in enumerate(
        {"revision": 1, "head_lr_multiplier": 10.0, "rank": 4}.items()
    )}  # fmt: skip
    table = check.table(tmp_path)
    assert "| bbc, full | 1 |" in table
    assert "| bbc, lora |" not in table
    for key, path in lora.items():
        assert f"- {path.name} is stale, and not counted: {key} " in table
    asked = {path for path, *_ in check.pending(tmp_path)}
    assert set(lora.values()) < asked
    assert kept not in asked
    assert len(asked) == 11
    monkeypatch.setattr(check, "RUN", {**check.RUN, "weight_decay": 0.1})
    with pytest.raises(
        DataError, match=r"(?s)expected results of now, found none.*bbc--full--seed0.json is stale.*run"
    ):
        check.table(tmp_path)


def test_damaged_results_are_refused(check: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "bbc--full--seed1.json").write_text("{}")
    with pytest.raises(DataError, match=r"bbc--full--seed1.json: .* found a damaged file"):
        list(check.pending(tmp_path))


def test_stale_results_are_made_anew(check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stored(check, tmp_path, "bbc", "lora", revision=1)
    for other, *_ in check.cells(tmp_path):
        if other != path:
            stored(check, tmp_path, *other.stem.split("--")[:2], seed=int(other.stem[-1]))
    made: list[tuple[str, str, int]] = []

    def check_one(task: str, name: str, seed: int) -> dict[str, Any]:
        made.append((task, name, seed))
        return {**json.loads(path.read_text()), **check.identity_of(task, name, seed)}

    monkeypatch.setattr(check, "check", check_one)
    monkeypatch.setattr("sys.argv", ["check.py", "run", "--results", str(tmp_path)])
    check.main()
    assert made == [("bbc", "lora", 0)]
    assert "stale" not in check.table(tmp_path)


def test_the_committed_results_of_full_fine_tuning_are_of_now(check: ModuleType) -> None:
    results, _ = check.stored(check.RESULTS)
    assert {(r["task"]["name"], r["seed"]) for r in results if r["method"] == "full"} >= {
        ("bbc", 0), ("bbc", 1), ("bbc", 2), ("rotten_tomatoes", 0),
    }  # fmt: skip

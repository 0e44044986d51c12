from pathlib import Path
from typing import Any

import yaml

from rgft.cli.model_card import PIPELINES, model_card
from rgft.cli.request import RunSettings, TaskName
from rgft.telemetry.ledger import Ledger

METRICS = {"validation": {"loss": 0.25, "accuracy": 0.875}, "test": {"loss": 0.5, "f1": 0.75}}


def card(model: str, *, pairs: dict[str, Any] | None = None, **settings: Any) -> tuple[dict[str, Any], str]:
    ledger = Ledger()
    ledger.forward_flops = 3e9
    ledger.end_step(seconds=2.0, updated={"layer": 1000})
    text = model_card(
        RunSettings(model=model, data="d.csv", **settings), metrics=METRICS, ledger=ledger.summary(1e10), lr=2e-4,
        pairs=pairs, version="1.2.3",
    )  # fmt: skip
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_front_matter_is_what_hubs_read() -> None:
    front, body = card("org/name")
    assert front == {
        "library_name": "transformers", "pipeline_tag": "text-classification", "tags": ["rgft"],
        "base_model": "org/name", "metrics": ["accuracy", "f1"],
    }  # fmt: skip
    assert "# org/name, fine-tuned with RGFT" in body


def test_scores_and_cost_are_in_the_text() -> None:
    _, body = card("org/name", accumulation=2, batch_size=8)
    for expected in (
        "| validation | accuracy | 0.8750 |", "| test | f1 | 0.7500 |",
        "3e+09 FLOPs of training and scoring, 30.0% of full fine-tuning's 1e+10",
        "1 steps of 16 examples; 1,000 parameters updated per step", "Fine-Tuning 1.2.3",
        'pipeline("text-classification", model="path/of/this/folder")\nmodel("a text", truncation=True)',
    ):  # fmt: skip
        assert expected in body


def test_which_rate_is_whose() -> None:
    _, dense = card("org/name")
    assert "Learning rate 0.0002, seed" in dense
    assert "pairs" not in dense
    _, paired = card("org/name", pairs={"rank": 8, "lr_multiplier": 3.3})
    assert "Learning rate 0.0002 (0.00066 of low-rank pairs), seed" in paired
    assert "layers trained by low-rank pairs of rank 8, merged into the weights" in paired


def test_a_folder_is_no_base_model_and_its_path_is_not_given_away(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    front, body = card(str(tmp_path / "mine"))
    assert "base_model" not in front
    assert str(tmp_path) not in body
    assert "# mine, fine-tuned" in body


def test_every_task_has_a_pipeline() -> None:
    assert set(TaskName.__args__) == set(PIPELINES)

"""`rgft train` and `rgft map` on folders of images, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rgft.run import Run, StepReport
from rgft.telemetry.run_folder import RunFolder
from tests.integration.cli_inputs import invoke, refused, used_as_the_card_says
from tests.unit.tasks.pictures import FAMILIES, SIDE, picture, save_folder, save_model

EPOCHS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    save_folder(folder / "data", {"up": 40, "down": 40})
    save_folder(folder / "test", {"up": 10, "down": 10}, first=1000)
    for family in FAMILIES:
        save_model(folder / family, family)
    return folder


def options(folder: Path, family: str, *more: str) -> list[str]:
    return [
        "--task", "image-classification", "--model", str(folder / family), "--data", str(folder / "data"),
        "--batch-size", "8", "--lr", "2e-3", "--set", f"epochs={EPOCHS}", "--set", "mask.readout=0.0", "--quiet", *more,
    ]  # fmt: skip


def losses(run: RunFolder) -> list[float]:
    return [record.data["loss"] for record in run.read_records() if record.type == "step"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_learns_within_its_budget_and_leaves_everything_behind(
    folder: Path, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    more = ("--test", str(folder / "test"), "--budget", "0.5", "--json", "--output", str(tmp_path / "run"))
    report = json.loads(invoke("train", *options(folder, family, *more)).stdout)
    assert 0.4 < report["flops"]["fraction_of_full"] <= 0.5
    assert abs(report["audit"]["error"]) < 0.02
    run = RunFolder.open(tmp_path / "run")
    steps = losses(run)
    assert len(steps) == report["steps"]
    assert sum(steps[-5:]) < 0.5 * sum(steps[:5])
    assert report["metrics"]["test"]["accuracy"] >= 0.8
    names = {
        "config.json",
        "environment.json",
        "records.jsonl",
        "plans.jsonl",
        "error_map.json",
        "ledger.json",
        "model",
    }
    assert {path.name for path in run.path.iterdir()} == names
    # Nothing but the saved model is needed to classify as the report says.
    model = AutoModelForImageClassification.from_pretrained(run.path / "model")
    processor = AutoImageProcessor.from_pretrained(run.path / "model")
    assert model.config.id2label == {0: "down", 1: "up"}
    cases = [(picture(kind, 1000 + n), 1 - kind) for kind in (0, 1) for n in range(10)]
    with torch.no_grad():
        batch = processor([image for image, _ in cases], return_tensors="pt")
        right = model(**batch).logits.argmax(-1) == torch.tensor([label for _, label in cases])
    assert float(right.float().mean()) == pytest.approx(report["metrics"]["test"]["accuracy"])
    assert "pipeline_tag: image-classification" in (run.path / "model" / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    cases[0][0].save("image.png")
    assert {answer["label"] for answer in used_as_the_card_says(run.path / "model")} == {"down", "up"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stopped_run_goes_on_bit_for_bit(
    folder: Path, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = options(folder, family, "--budget", "0.6", "--set", "probe.size=6")
    invoke("train", *arguments, "--output", str(tmp_path / "whole"))
    stop_at = len(losses(RunFolder.open(tmp_path / "whole"))) // 2
    own = Run._publish

    def publish(self: Run, report: StepReport) -> None:
        own(self, report)
        if self.guide.step_count == stop_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_publish", publish)
    refused(
        "train", *arguments, "--output", str(tmp_path / "run"), "--checkpoint-every", "3", code=130, said="interrupted"
    )
    monkeypatch.setattr(Run, "_publish", own)
    invoke("train", "--resume", "--output", str(tmp_path / "run"), "--quiet")
    found, expected = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole"))
    assert found.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []
    whole, run = (RunFolder.open(tmp_path / name) for name in ("whole", "run"))
    assert losses(run) == losses(whole)
    assert run.read_json("error_map.json") == whole.read_json("error_map.json")


def test_mirroring_can_be_turned_off_and_changes_the_run(folder: Path, tmp_path: Path) -> None:
    steps = []
    for name, flip in (("a", "true"), ("b", "false")):
        invoke("train", *options(folder, "vit", "--set", f"flip={flip}", "--output", str(tmp_path / name)))
        steps.append(losses(RunFolder.open(tmp_path / name)))
    assert steps[0] != steps[1]


def test_dry_run_and_map(folder: Path, tmp_path: Path) -> None:
    output = ("--output", str(tmp_path / "run"), "--dry-run", "--json")
    plan = json.loads(invoke("train", *options(folder, "resnet", *output)).stdout)
    assert plan["run_plan"]["flops"] == pytest.approx(0.3 * plan["run_plan"]["full_flops"])
    assert [c["depth"] for c in plan["components"]] == [0, 1, 2, 3, 4]
    assert list(tmp_path.iterdir()) == []
    arguments = ("--model", str(folder / "resnet"), "--data", str(folder / "data"))
    measured = json.loads(invoke("map", "--task", "image-classification", *arguments, "--json").stdout)
    assert {row["component"] for row in measured["components"]} == {c["name"] for c in plan["components"]}
    assert all(isinstance(row["score"], float) for row in measured["components"])


def test_bad_images_and_folders_leave_nothing_behind(folder: Path, tmp_path: Path) -> None:
    data = save_folder(tmp_path / "data", {"up": 6, "down": 6})
    output = ("--output", str(tmp_path / "run"))
    (data / "up" / "torn.png").write_bytes((data / "up" / "000.png").read_bytes()[:200])
    (data / "down" / "text.jpg").write_text("no image")
    message = refused("train", *options(folder, "vit", "--data", str(data), *output))
    assert "2 of 14 images cannot be read" in message
    assert all(name in message for name in ("torn.png", "text.jpg"))
    message = refused("train", *options(folder, "vit", "--data", str(tmp_path / "nowhere"), *output))
    assert "expected a folder with a folder of images per class" in message
    message = refused("train", *options(folder, "vit", "--text", "x", *output))
    assert "text: expected only with" in message
    message = refused("train", *options(folder, "vit", "--validation", str(data / "up"), *output))
    assert "images, but no folders" in message
    save_model(tmp_path / "small", side=SIDE * 2)
    (tmp_path / "small" / "preprocessor_config.json").write_text(
        (folder / "vit" / "preprocessor_config.json").read_text()
    )
    message = refused("train", *options(folder, "vit", "--model", str(tmp_path / "small"), *output))
    assert "does not take what its image processor makes" in message
    assert not (tmp_path / "run").exists()

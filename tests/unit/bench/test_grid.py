"""The grid has every method, task and budget; what is left out is named here, with its reason."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from torch import nn

from rgft.bench.experiment import Experiment
from rgft.bench.map_study.settings import MapStudy
from rgft.bench.methods import METHODS, Followed
from rgft.bench.tasks import TASKS
from rgft.run import Run, Settings
from rgft.tasks.base import PreparedTask
from rgft.tasks.metrics import OfWholeSplit, classification
from rgft.tasks.sequence_loss import sequence_losses
from rgft.tasks.token_loss import token_losses
from tests.families import CLASSES, FAMILIES, WIDTH, Family
from tests.integration.loops import Examples, collate, example_losses

ROOT = Path(__file__).parents[3]
GRID = ROOT / "benchmarks" / "experiments" / "grid"
SCRIPT = ROOT / "benchmarks" / "gpu" / "grid"

BUDGETS = {0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0}

_PAIRS = "needs pairs of programs; it is in code_pairs.json"
_ENTRIES = "trains entries of linear layers' matrices; what this network has is convolutions"
_LINEAR = "PEFT has it for linear layers only"
#: List of contenders → method → why it is not in it.
OMITTED_METHODS: Mapping[str, Mapping[str, str]] = {
    "text": {"fait": _PAIRS},
    "language": {
        "fait": _PAIRS,
        "bitfit": "LLaMA and T5 have no biases",
        "linear_probe": "a language model's head is tied to its embeddings: there is no new layer to train alone",
        "example_pruning": "a loss that is the mean over a batch's tokens is no example's own where lengths differ",
    },
    "vision": {
        "fait": _PAIRS,
        **dict.fromkeys(("fim_static", "gps", "sift", "grft", "id3", "spiel", "lift", "galore"), _ENTRIES),
        **dict.fromkeys(("vera", "shira", "miss", "lora_top"), _LINEAR),
        "ia3": "PEFT does not know which modules of this network it scales",
        "boft": "its products of whole weights cost more than a pass through a small convolutional net",
        "houlsby": "stands behind attention and feed-forward blocks",
        "pfeiffer": "stands behind feed-forward blocks",
        "s2ft": "trains heads and feed-forward channels",
    },
    "patches": {"fait": _PAIRS, "ia3": "PEFT does not know which modules of a ViT it scales"},
}
#: Task → why no experiment of the default grid has it.
OMITTED_TASKS = {
    name: f"no package carries {what}; grid/hub has it"
    for name, what in (("superglue", "its data"), ("images", "a model"), ("summarisation", "a model or its data"))
}

#: Experiment → why the script, which runs side by side, leaves it out.
ONE_AT_A_TIME = {"wall_clock": "its figures are seconds, of one run at a time; make bench-clock has it"}

EXPERIMENTS = sorted(GRID.glob("*.json"))
OF_HUB = sorted((GRID / "hub").glob("*.json"))


def methods_of(contenders: str) -> dict[str, str]:
    """Label → method of a list."""
    rows = json.loads((GRID / "contenders" / f"{contenders}.json").read_text())
    return {row["label"]: row["method"] for row in rows}


def test_each_list_of_contenders_is_accounted_for() -> None:
    assert {path.stem for path in (GRID / "contenders").glob("*.json")} == set(OMITTED_METHODS)


@pytest.mark.parametrize("contenders", OMITTED_METHODS)
def test_every_method_is_in_a_list_or_left_out_for_a_reason(contenders: str) -> None:
    there, omitted = set(methods_of(contenders).values()), set(OMITTED_METHODS[contenders])
    assert there | omitted == set(METHODS)
    assert not there & omitted


@pytest.mark.parametrize("contenders", OMITTED_METHODS)
def test_rates_by_rule_and_equal_footing_are_in_a_list(contenders: str) -> None:
    rows = {row["label"]: row for row in json.loads((GRID / "contenders" / f"{contenders}.json").read_text())}
    assert rows["rgft-auto"]["settings"] == {"lr": "auto"}
    if contenders in ("text", "language"):  # images are of one length, and have no padding
        for label in ("full", "lora", "lora-top"):
            groups = rows[f"{label}-groups"]
            assert groups["settings"] == {"config": {"execution": {"positions": "auto", "padding": "auto"}}}
            assert {key: groups[key] for key in ("method", "lrs")} == {
                key: rows[label][key] for key in ("method", "lrs")
            }


@pytest.mark.parametrize("contenders", OMITTED_METHODS)
def test_each_method_is_tuned_over_its_key_setting(contenders: str) -> None:
    rows = json.loads((GRID / "contenders" / f"{contenders}.json").read_text())
    assert {row["label"] for row in rows if METHODS[row["method"]].variants} == {
        row["label"] for row in rows if row.get("variants") == "method"
    }


def test_every_task_is_there_or_left_out_for_a_reason() -> None:
    there = {Experiment.load(path).task.get("name", "rotten_tomatoes") for path in EXPERIMENTS}
    assert there | set(OMITTED_TASKS) == set(TASKS)
    assert not there & set(OMITTED_TASKS)
    assert {Experiment.load(path).task["name"] for path in OF_HUB} == set(OMITTED_TASKS)


@pytest.mark.parametrize("path", [*EXPERIMENTS, *OF_HUB], ids=lambda path: path.stem)
def test_every_experiment_has_every_budget_and_settings_that_its_task_knows(path: Path) -> None:
    experiment = Experiment.load(path)
    assert experiment.name == f"grid_{path.stem}"
    settings = {**experiment.task}
    assert set(settings) - {"name"} <= set(
        inspect.signature(TASKS[settings.get("name", "rotten_tomatoes")].prepare).parameters
    )
    labels = {contender.label.removesuffix(f"-{contender.budget:g}") for contender in experiment.contenders}
    assert {(c.label, c.budget) for c in experiment.contenders} == {
        (f"{label}-{budget:g}", budget) for label in labels for budget in BUDGETS
    }


def test_fait_has_an_experiment_beside_what_it_is_held_against() -> None:
    experiment = Experiment.load(GRID / "code_pairs.json")
    assert experiment.task["train_problems"]
    assert {"fait", "full", "rgft", "lora"} <= {contender.method for contender in experiment.contenders}


def test_the_script_runs_every_experiment_and_code_only_where_that_is_allowed() -> None:
    text = SCRIPT.read_text()
    (always,) = re.findall(r"^packaged=\((.*)\)$", text, re.M)
    (executing,) = re.findall(r"^executing=\((.*)\)$", text, re.M)
    runs_code = {
        path.stem for path in EXPERIMENTS if TASKS[Experiment.load(path).task.get("name", "bbc")].executes_code
    }
    assert set(executing.split()) == runs_code
    assert set(always.split()) == {path.stem for path in EXPERIMENTS} - runs_code


def test_the_script_begins_with_every_experiment_that_has_stored_results() -> None:
    (evidence,) = re.findall(r"^evidence=\((.*)\)$", SCRIPT.read_text(), re.M)
    stored = {path.name for path in (ROOT / "benchmarks" / "results").iterdir() if path.is_dir()}
    there = {path.stem for path in GRID.parent.glob("*.json")} - set(ONE_AT_A_TIME)
    assert stored & there <= set(evidence.split()) <= there


def test_map_studies_are_of_tasks_of_the_grid_and_the_script_runs_them() -> None:
    studies = [MapStudy.load(path) for path in sorted((ROOT / "benchmarks" / "map_studies" / "grid").glob("*.json"))]
    tasks = [Experiment.load(path).task for path in EXPERIMENTS]
    assert len(studies) == len({study.name for study in studies}) >= 2  # tasks are held against each other
    assert all(study.task in tasks and len(study.seeds) == 5 for study in studies)


@pytest.mark.parametrize(("minutes", "is_time_left"), [("9", True), ("0.52", False)])
def test_the_script_shares_its_minutes_among_studies_and_experiments(
    tmp_path: Path, minutes: str, is_time_left: bool
) -> None:
    """In place of Python there is a script in which a study takes two seconds, and fails."""
    calls, python = tmp_path / "calls", tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n[ "$4" != map-study ] || {{ sleep 2; exit 1; }}\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "JOBS": "3"}
    done = subprocess.run([SCRIPT, minutes, tmp_path], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    study, *rest = (line for line in calls.read_text().splitlines() if line.startswith("-m rgft"))
    how = f"--device cuda --results {tmp_path} --jobs 3"
    assert study == (
        "-m rgft bench map-study benchmarks/map_studies/grid/bbc.json benchmarks/map_studies/grid/newsgroups.json "
        f"benchmarks/map_studies/grid/rotten_tomatoes.json --minutes {minutes} {how}"
    )
    files = r"(benchmarks/experiments/\w+\.json ){20}(benchmarks/experiments/grid/\w+\.json ){14}"
    run = rf"-m rgft bench run {files}--minutes 8\.9\d* {how}"
    assert [bool(re.fullmatch(run, line)) for line in rest] == [True] * is_time_left
    calls.unlink()
    subprocess.run([SCRIPT, minutes, tmp_path, "own.json"], env=environment, check=True)
    assert "map-study" not in calls.read_text()


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=32, patch_size=8, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=48, num_labels=CLASSES,
        )
    )  # fmt: skip


MODELS: Mapping[str, tuple[str, Family]] = {
    "llama": ("language", FAMILIES["llama"]), "t5": ("language", FAMILIES["t5"]),
    "efficientnet": ("vision", FAMILIES["efficientnet"]), "vit": ("patches", Family("vit", _vit, "image")),
}  # fmt: skip


#: What is tried in the fast suite: models of packaged tasks, and on all others adapters that look for their places.
QUICK, ADAPTERS = {"llama", "efficientnet"}, {"lora", "lora_top", "houlsby"}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        pytest.param(model, name, marks=[] if model in QUICK or name in ADAPTERS else [pytest.mark.slow])
        for model, (contenders, _) in MODELS.items()
        for name in sorted(set(methods_of(contenders).values()))
    ],
)
def test_methods_of_a_list_begin_on_its_models(model: str, name: str) -> None:
    """Those of the list for texts are trained in `test_methods`."""
    family, method = MODELS[model][1], METHODS[name]
    loss = {"lm": token_losses, "seq2seq": sequence_losses}.get(family.kind, example_losses)
    task = PreparedTask(
        model=family.build(), processor=None, train=Examples(family, count=16), validation=None, test=None,
        collate=collate, loss=loss, metric=lambda: OfWholeSplit(classification),
    )  # fmt: skip
    task.model, task.loss = method.prepare(task.model, {}), method.loss_of(task.loss, {})
    settings = Settings(lr=1e-3, epochs=1.0, batch_size=8)
    followed = None if method.follows is None else Followed()
    config = method.configuration(budget=1.0, seed=0, settings={}, followed=followed)
    run = Run(task, config, settings, full_flops=1e12, optimizer=method.optimizer_of(settings, {}))
    try:
        run.prepare()
        method.begin(run)
    finally:
        run.close()
    assert any(parameter.requires_grad for parameter in task.model.parameters())

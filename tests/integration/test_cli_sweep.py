"""`rgft sweep` as a user runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rgft.cli.failures import Interrupted
from rgft.cli.sweep import Dimension
from rgft.errors import ConfigError
from tests.integration.cli_inputs import invoke, refused, save_inputs

#: Half of the layers frozen from the first step on: what trials can share.
FROZEN = ("--set", "mask.frozen_fraction=0.5", "--set", "warmup_fraction=0", "--budget", "0.6", "--epochs", "2")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    given = save_inputs(tmp_path_factory.mktemp("inputs"), rows=120)
    del given[given.index("--lr") : given.index("--lr") + 2]
    return given


def swept(inputs: list[str], output: Path, *more: str) -> dict[str, Any]:
    return json.loads(invoke("sweep", *inputs, "--output", str(output), *more, "--json", "--quiet").stdout)


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr=1e-4:1e-2", Dimension(key="lr", low=1e-4, high=1e-2)),
        (" mask.frozen_fraction = 0.3 , 0.5 ", Dimension(key="mask.frozen_fraction", choices=("0.3", "0.5"))),
        ("preset=rgft", Dimension(key="preset", choices=("rgft",))),
    ],
)
def test_what_is_searched(text: str, expected: Dimension) -> None:
    assert Dimension.parse(text) == expected


def test_scales() -> None:
    assert Dimension(key="lr", low=1e-4, high=1e-3).distribution.log  # type: ignore[attr-defined]
    assert not Dimension(key="warmup", low=0.0, high=0.5).distribution.log  # type: ignore[attr-defined]
    assert not Dimension(key="warmup", low=0.1, high=0.5).distribution.log  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["lr", "lr=", "=1,2", "lr=1,1", "lr=1,", "lr=a:b", "lr=1:2:3", "lr=2:1", "lr=1:1"])
def test_what_cannot_be_searched(text: str) -> None:
    with pytest.raises(ConfigError, match="--search"):
        Dimension.parse(text)


def test_every_combination_of_choices_on_one_cache(inputs: list[str], tmp_path: Path) -> None:
    more = (*FROZEN, "--search", "lr=1e-4,1e-3,3e-3", "--search", "weight_decay=0,0.1")
    report = swept(inputs, tmp_path / "sweep", *more)
    combinations = {(t["searched"]["lr"], t["searched"]["weight_decay"]) for t in report["trials"]}
    assert combinations == {(lr, decay) for lr in ("1e-4", "1e-3", "3e-3") for decay in ("0", "0.1")}
    assert report["best"]["loss"] == min(trial["loss"] for trial in report["trials"])
    # Filled by the first trial: the others compute no prefix, and get further for the same FLOPs.
    first, *others = report["trials"]
    assert all(trial["forward_cached"] > 1.2 * first["forward_cached"] for trial in others)
    assert all(trial["fraction_of_full"] <= 0.6 for trial in report["trials"])
    models = {trial["trial"] for trial in report["trials"] if Path(trial["model"]).exists()}
    assert models == {report["best"]["trial"]}
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text()) == report


def test_a_trial_is_the_run_that_rgft_train_makes_of_it(inputs: list[str], tmp_path: Path) -> None:
    """Bit for bit, where both read the same activations."""
    report = swept(inputs, tmp_path / "sweep", *FROZEN, "--search", "lr=3e-3")
    folder = tmp_path / "sweep"
    cache = ("--set", "execution.cache=disk", "--set", f"execution.cache_dir={folder / 'activations'}")
    shutil.rmtree(folder / "activations")  # the trial found nothing there either
    invoke("train", *inputs, "--output", str(tmp_path / "run"), *FROZEN, *cache, "--lr", "3e-3", "--quiet")
    alone = trained(tmp_path / "run")
    assert all(torch.equal(value, alone[key]) for key, value in trained(Path(report["best"]["output"])).items())


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A signal ends the second trial of a sweep; how many were begun."""
    import rgft.cli.sweep as module

    run, runs = module.run_training, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        if len(runs) == 2:
            raise Interrupted("after step 3", 2)
        return run(*args, **kwargs)

    monkeypatch.setattr(module, "run_training", interrupted)
    return runs


def test_an_interrupted_sweep_goes_on(inputs: list[str], tmp_path: Path, runs: list[int]) -> None:
    more = ("--search", "lr=1e-4:1e-2", "--trials", "3", "--budget", "0.3", "--epochs", "1")
    output = ("--output", str(tmp_path / "parts"))
    refused("sweep", *inputs, *output, *more, code=130, said="interrupted")
    assert len(json.loads((tmp_path / "parts" / "sweep.json").read_text())["trials"]) == 1
    again = json.loads(invoke("sweep", *inputs, *output, *more, "--resume", "--json", "--quiet").stdout)
    assert len(runs) == 4
    whole = swept(inputs, tmp_path / "whole", *more)
    assert len({trial["searched"]["lr"] for trial in whole["trials"]}) == 3
    assert [t["searched"] for t in again["trials"]][:2] == [t["searched"] for t in whole["trials"]][:2]
    assert len(again["trials"]) == 3


def test_a_sweep_does_not_go_on_with_other_data(inputs: list[str], tmp_path: Path, runs: list[int]) -> None:
    place = inputs.index("--data") + 1
    data = Path(shutil.copy(inputs[place], tmp_path))
    mine = (*inputs[:place], str(data), *inputs[place + 1 :])
    more = ("--output", str(tmp_path / "sweep"), "--search", "lr=1e-4,1e-3", "--epochs", "1")
    refused("sweep", *mine, *more, code=130, said="interrupted")
    before = (tmp_path / "sweep" / "sweep.json").read_bytes()
    rows = data.read_text().splitlines()
    data.write_text("\n".join([rows[0], *reversed(rows[1:])]) + "\n")
    assert "training data" in refused("sweep", *mine, *more, "--resume")
    assert len(runs) == 2
    assert (tmp_path / "sweep" / "sweep.json").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--search", "lr=1e-4:1e-2"), "--trials"),
        (("--search", "lrr=1,2"), "lrr"),
        (("--search", "lr=-1,1e-3"), "lr"),
        (("--search", "mask.frozen_fraction=0.5,1.5"), "frozen_fraction"),
        (("--search", "lr=1e-3", "--search", "lr=1e-4"), "once"),
        (("--search", "lr=1e-3", "--set", "test=somewhere.csv"), "test"),
        (("--search", "test=somewhere.csv,elsewhere.csv"), "test"),
        (("--search", "mask.frozen_fraction=0.5", "--search", "rgft.mask.frozen_fraction=0.3"), "once"),
        (("--search", "lr=1e-3", "--resume"), "no sweep"),
    ],
)
def test_bad_input_is_refused_before_the_first_trial(
    inputs: list[str], tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    said = refused("sweep", *inputs, "--output", str(tmp_path / "sweep"), *more)
    assert message in said
    assert not (tmp_path / "sweep" / "trial-000").exists()


def test_a_trial_that_diverges_is_told_so_and_the_others_go_on(inputs: list[str], tmp_path: Path) -> None:
    more = (*FROZEN, "--search", "lr=1e30,1e-3")
    report = swept(inputs, tmp_path / "sweep", *more)
    assert [trial["loss"] is None for trial in report["trials"]] == [True, False]
    assert report["best"]["searched"] == {"lr": "1e-3"}
    table = invoke("sweep", *inputs, "--output", str(tmp_path / "sweep"), *more, "--resume").stdout
    assert "diverged, and not counted: trials 0" in table


def test_all_trials_diverging_is_a_failure(inputs: list[str], tmp_path: Path) -> None:
    output = ("--output", str(tmp_path / "sweep"))
    assert "diverged" in refused("sweep", *inputs, *output, *FROZEN, "--search", "lr=1e30", code=1)


@pytest.mark.parametrize("other", [("--epochs", "3"), ("--search", "batch_size=8,16"), ("--budget", "0.4")])
def test_going_on_with_other_settings_is_refused(inputs: list[str], tmp_path: Path, other: tuple[str, ...]) -> None:
    more = ("--output", str(tmp_path / "sweep"), "--search", "lr=1e-3", "--epochs", "1")
    invoke("sweep", *inputs, *more, "--quiet")
    assert "not be comparable" in refused("sweep", *inputs, *more, *other, "--resume")


def test_whole_numbers_stay_whole_and_grids_are_not_repeated(inputs: list[str], tmp_path: Path) -> None:
    assert Dimension.parse("batch_size=8:16").examples == (8, 16)
    assert Dimension.parse("warmup=0:0.5").examples == (0.0, 0.5)
    short = ("--epochs", "1", "--trials", "3")
    report = swept(inputs, tmp_path / "a", *short, "--search", "lr=1e-4,1e-3", "--search", "weight_decay=0,0.1")
    assert len({tuple(trial["searched"].values()) for trial in report["trials"]}) == 3
    report = swept(inputs, tmp_path / "b", "--epochs", "1", "--trials", "2", "--search", "batch_size=8:16")
    assert all(isinstance(trial["searched"]["batch_size"], int) for trial in report["trials"])


def test_a_file_in_the_place_of_the_folder(inputs: list[str], tmp_path: Path) -> None:
    (tmp_path / "sweep").touch()
    assert "--output" in refused("sweep", *inputs, "--output", str(tmp_path / "sweep"), "--search", "lr=1e-3")


def test_a_sweep_is_not_overwritten(inputs: list[str], tmp_path: Path) -> None:
    more = ("--search", "lr=1e-3", "--epochs", "1")
    swept(inputs, tmp_path / "sweep", *more)
    assert "--resume" in refused("sweep", *inputs, "--output", str(tmp_path / "sweep"), *more)

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rgft.bench.tasks import TASKS, bench_task, shifted_digits
from rgft.bench.tasks.shifted_digits import SHIFTS, ShiftedDigits
from rgft.bench.tasks.vision import Digits
from rgft.errors import DataError
from rgft.tasks.fingerprint import fingerprint

ROWS = [(bytes((place * 7 + number) % 256 for place in range(784)), number % 10) for number in range(120)]


def of(shift: str, rows: Any = ROWS) -> ShiftedDigits:
    return ShiftedDigits(rows, side=32, shift=shift)


def test_noise_is_an_images_own() -> None:
    plain, noisy = Digits(ROWS, side=32), of("noise")
    noise = torch.stack([noisy[i]["pixel_values"][0] - plain[i]["pixel_values"][0] for i in range(40)])
    assert float(noise.std()) == pytest.approx(shifted_digits.NOISE, rel=0.02)
    assert abs(float(noise.mean())) < 0.03
    assert not torch.equal(noise[0], noise[1])
    moved = of("noise", ROWS[::-1])
    assert torch.equal(moved[len(ROWS) - 1]["pixel_values"], noisy[0]["pixel_values"])
    assert noisy[3]["labels"] == 3


def test_patches_change_places_and_nothing_else() -> None:
    plain, moved = Digits(ROWS, side=32), of("patches")
    for index in range(3):
        before, after = plain[index]["pixel_values"][0], moved[index]["pixel_values"][0]
        patches = [
            {tuple(patch.flatten().tolist()) for patch in image.unfold(0, 4, 4).unfold(1, 4, 4).reshape(-1, 4, 4)}
            for image in (before, after)
        ]
        assert patches[0] == patches[1]
        assert not torch.equal(before, after)
    first, second = (plain[i]["pixel_values"][0] for i in (0, 1))
    both = shifted_digits._rearranged(first, 1) + shifted_digits._rearranged(second, 2)
    assert torch.equal(both, shifted_digits._rearranged(first + second, 3))  # one order for all


def test_labels_move_by_one_and_pixels_stay() -> None:
    plain, moved = Digits(ROWS, side=32), of("labels")
    assert [moved[i]["labels"] for i in (0, 8, 9, 19)] == [1, 9, 0, 0]
    assert torch.equal(moved[5]["pixel_values"], plain[5]["pixel_values"])


def test_shifts_are_data_of_their_own() -> None:
    assert len({fingerprint(Digits(ROWS, side=32)), *(fingerprint(of(shift)) for shift in SHIFTS)}) == 4
    assert TASKS["shifted_digits"].variant({"shift": "noise", "train_size": 5}) == "noise"
    assert TASKS["shifted_digits"].corpora({"shift": "noise"}) == TASKS["digits"].corpora({})


@pytest.mark.parametrize("settings", [{"shift": "colour"}, {"shift": "noise", "side": 60}])
def test_what_there_is_not_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="expected one of noise, patches, labels and a multiple of 8"):
        bench_task({"name": "shifted_digits", "train_size": 5, **settings}, seed=0)


def test_the_network_is_taught_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def network(*, classes: int, side: int, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, classes))

    splits = {"train": ROWS[:100], "validation": ROWS[100:110], "test": ROWS[110:]}
    monkeypatch.setenv("RGFT_CACHE", str(tmp_path))
    monkeypatch.setattr(shifted_digits, "efficientnet_lite0", network)
    monkeypatch.setattr(shifted_digits, "digit_splits", lambda: splits)
    taught: list[int] = []
    teach = shifted_digits._teach
    monkeypatch.setattr(shifted_digits, "_teach", lambda model, data: (taught.append(len(data)), teach(model, data)))
    weights: list[torch.Tensor] = []

    def prepare() -> None:
        shifted_digits._weights_of_reader.cache_clear()
        task = bench_task({"name": "shifted_digits", "shift": "labels", "train_size": 20, "side": 32}, seed=1)
        assert len(task.train) == 20
        weights.append(next(task.model.parameters()).detach().clone())

    with caplog.at_level(logging.INFO, logger="rgft"):
        prepare()
        prepare()
    assert taught == [50]  # the half that no task draws from
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], next(network(classes=10, side=32, seed=0).parameters()))
    assert caplog.text.count("once") == 1
    (file,) = (tmp_path / "weights").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    prepare()
    assert taught == [50, 50]
    assert "cannot be read" in caplog.text
    assert torch.equal(weights[0], weights[2])
    shifted_digits._weights_of_reader.cache_clear()

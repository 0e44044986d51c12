import gzip
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rgft.bench.methods import method
from rgft.bench.tasks import bench_task, vision
from rgft.bench.tasks.vision import Digits, image_metrics
from rgft.errors import DataError
from rgft.evaluation import evaluate
from rgft.tasks.fingerprint import data_of, fingerprint
from tests.unit.tasks.pictures import picture, save_folder, save_model


def test_digits_are_split_without_duplicates(tmp_path: Path) -> None:
    rows = [[(number * 7 + i) % 256 for i in range(784)] for number in range(256)]
    lines = [",".join(map(str, [*row, number % 10])) for number, row in enumerate(rows)] * 10
    with gzip.open(tmp_path / "mnist_5k.csv.gz", "wt") as file:
        file.write("\n".join(lines[:2300]))
    splits = vision._digit_splits(tmp_path)
    everything = [pixels for some in splits.values() for pixels, _ in some]
    assert len(everything) == len(set(everything)) == 256
    with gzip.open(tmp_path / "mnist_5k.csv.gz", "wt") as file:
        file.write("1,2,3\n")
    vision._digit_splits.cache_clear()
    with pytest.raises(DataError, match="row 1: expected 784 pixels from 0 to 255 and a digit"):
        vision._digit_splits(tmp_path)


def test_pixels_and_fingerprint() -> None:
    rows = [(bytes([0] * 392 + [254] * 392), 3), (bytes(range(256)) * 3 + bytes(16), 1)]
    data = Digits(rows, side=28)
    values = data[0]["pixel_values"]
    assert values.shape == (3, 28, 28)
    assert values[0, 0, 0] == pytest.approx(-127 / 128)
    assert values[2, -1, -1] == pytest.approx(127 / 128)
    assert Digits(rows, side=56)[1]["pixel_values"].shape == (3, 56, 56)
    assert fingerprint(data) == fingerprint(Digits(rows, side=28))
    assert len({fingerprint(Digits(r, side=s)) for r, s in ((rows, 28), (rows, 56), (rows[::-1], 28))}) == 3


def test_top1_error() -> None:
    found = image_metrics(torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1, 1, 0]))
    assert (found["accuracy"], found["top1_error"]) == (0.75, 0.25)


def test_copies_of_images_are_in_one_split_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = str(save_model(tmp_path / "model"))
    root = tmp_path / "data"
    for split, first, count in (("train", 0, 12), ("val", 100, 4), ("test", 200, 4)):
        save_folder(root / split, {"cat": count, "dog": count}, first=first)
    for split in ("train", "val"):
        picture(0, 200).save(root / split / "cat" / "copy.png")  # of a test image
    settings = {"name": "images", "data": str(root), "model": model}
    task = bench_task(settings, seed=0)
    assert task.validation is not None
    assert task.test is not None
    assert (len(task.train), len(task.validation), len(task.test)) == (24, 8, 8)
    assert "train: 1 of 25 images are copies and are left out" in caplog.text
    found = evaluate(task, task.test, batch_size=4, loss=task.loss)
    assert found["top1_error"] == pytest.approx(1.0 - found["accuracy"])
    few = bench_task({**settings, "train_size": 10}, seed=0)
    assert len(few.train) == 10
    assert few.train.variants == 2  # type: ignore[attr-defined]
    before = data_of(few)
    assert data_of(bench_task({**settings, "train_size": 10}, seed=0)) == before
    picture(1, 999).save(root / "test" / "cat" / "200.png")
    after = data_of(bench_task({**settings, "train_size": 10}, seed=0))
    assert after["test"]["sha256"] != before["test"]["sha256"]


def test_a_test_split_is_needed(tmp_path: Path) -> None:
    model = str(save_model(tmp_path / "model"))
    folder = save_folder(tmp_path / "data", {"cat": 20, "dog": 20})
    with pytest.raises(DataError, match="expected a test split"):
        bench_task({"name": "images", "data": str(folder), "model": model}, seed=0)


@pytest.mark.skipif(find_spec("efficientnet_lite_pytorch") is None, reason="needs requirements/bench.txt")
def test_the_packaged_network_has_its_weights() -> None:
    from efficientnet_lite_pytorch import EfficientNet

    from rgft.bench.tasks.packaged import efficientnet_lite0

    first, again, other = (efficientnet_lite0(classes=5, side=32, seed=seed).eval() for seed in (0, 0, 1))
    image = torch.randn(2, 3, 32, 32)
    assert first(image).shape == (2, 5)
    assert torch.equal(first(image), again(image))
    state, changed = first.state_dict(), other.state_dict()
    assert {name for name in state if not torch.equal(state[name], changed[name])} == {"_fc.weight", "_fc.bias"}
    assert float(state["_conv_stem.weight"].std()) > 0.1  # trained, not drawn
    theirs = EfficientNet.from_name("efficientnet-lite0", num_classes=5, image_size=32).eval()
    theirs.load_state_dict(state)
    assert torch.equal(theirs(image), first(image))
    adapted = method("lora").prepare(first, {"rank": 2})
    assert sum("lora_A" in name for name, p in adapted.named_parameters() if p.requires_grad) > 20

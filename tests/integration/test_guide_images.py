"""Images through the guide: cached training is training, what is frozen stays, and FLOPs are what is executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from rgft import Config, Guide
from rgft.evaluation import evaluate
from rgft.tasks.base import PreparedTask
from rgft.tasks.image_classification import image_classification
from rgft.telemetry.flop_counter import count_flops
from tests.integration.loops import adamw
from tests.integration.policies import Scripted, steer
from tests.unit.tasks.pictures import FAMILIES, save_folder, save_model

CUT = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    save_folder(folder / "data", {"up": 12, "down": 12})
    for family in FAMILIES:
        save_model(folder / family, family)
    return folder


def task_of(folder: Path, family: str) -> PreparedTask:
    return image_classification(model=str(folder / family), train=str(folder / "data"), held_out=0.25, flip=True)


def exact_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"])


def train(task: PreparedTask, *, cache: str, epochs: int = 5) -> tuple[Guide, dict[str, list[float]]]:
    """Trains what lies at or above the cut, in fp64; returns the guide and what was seen on the way.

    In fp32 a prefix of fewer rows rounds differently, and Adam makes much of it where gradients are nearly zero.
    """

    def collate(examples: list[Any]) -> dict[str, torch.Tensor]:
        batch = task.collate(examples)
        return {**batch, "pixel_values": batch["pixel_values"].double()}

    torch.manual_seed(0)
    task.model.double().train()
    guide = Guide(task.model, Config(preset="rgft", execution={"cache": cache}), loss=exact_loss)
    steer(guide, Scripted(lambda s: {c.name for c in guide.partition if c.depth >= CUT}))
    optimizer = adamw(guide, lr=1e-3)
    seen: dict[str, list[float]] = {"modelled": [], "counted": []}
    for batch in guide.batches(task.train, batch_size=4, collate_fn=collate, epochs=epochs):
        before = guide.ledger.spent_flops
        guide.begin_step()
        seen["counted"].append(count_flops(lambda batch=batch: guide.loss(batch).backward()))
        seen["modelled"].append(guide.ledger.spent_flops - before)
        guide.step(optimizer)
        optimizer.zero_grad()
    guide.detach()
    return guide, seen


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_training_on_mirrored_images_is_training(folder: Path, family: str) -> None:
    (cached, _), (plain, _) = (train(task_of(folder, family), cache=c) for c in ("memory", "none"))
    assert cached.cache is not None
    assert plain.cache is None
    # The variants of an example are kept each by itself.
    assert cached.cache.hits > 20
    count = len(task_of(folder, family).train) - cached.probe_examples
    assert any(i in cached.cache and i + count in cached.cache for i in range(count))
    for (key, found), (_, expected) in zip(
        cached.model.state_dict().items(), plain.model.state_dict().items(), strict=True
    ):
        assert torch.allclose(found, expected, rtol=1e-7, atol=1e-9), key
    assert cached.ledger.forward_cached_flops > 0
    assert cached.ledger.spent_flops < plain.ledger.spent_flops


@pytest.mark.parametrize("cache", ["memory", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_modelled_flops_are_executed_flops(folder: Path, family: str, cache: str) -> None:
    _, seen = train(task_of(folder, family), cache=cache)
    assert len(seen["counted"]) > 15
    assert seen["counted"] == pytest.approx(seen["modelled"], rel=0.02)
    if cache == "memory":
        assert len({round(flops) for flops in seen["counted"]}) >= 3  # passes that fill, read, and do neither


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_frozen_keeps_its_buffers_too(folder: Path, family: str) -> None:
    task = task_of(folder, family)
    before = {key: value.clone() for key, value in task.model.double().state_dict().items()}
    guide, _ = train(task, cache="none", epochs=1)
    off = [c for c in guide.partition if c.depth < CUT]
    paths = tuple(sorted({c.name for c in off}))
    frozen = [key for key in before if key.startswith(tuple(f"{path}." for path in paths))]
    moved = [key for key in before if key not in frozen]
    if family != "vit":
        assert any(key.endswith("running_mean") for key in frozen)
        assert any(key.endswith("running_mean") for key in moved)
    after = task.model.state_dict()
    assert [key for key in frozen if not torch.equal(after[key], before[key])] == []
    assert all(not torch.equal(after[key], before[key]) for key in moved if "running" in key or "weight" in key)


def test_an_evaluation_decodes_every_image_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(folder, "vit")
    decoded: list[int] = []
    own = type(task.train).__getitem__

    def counted(self: Any, index: int) -> Any:
        decoded.append(index)
        return own(self, index)

    monkeypatch.setattr(type(task.train), "__getitem__", counted)
    assert task.validation is not None
    found = evaluate(task, task.validation, batch_size=4, loss=task.loss)
    assert decoded == list(range(6))
    batch = task.collate([task.validation[i] for i in range(6)])
    task.model.eval()
    assert found["loss"] == pytest.approx(task.loss(task.model, batch).mean().item(), rel=1e-5)

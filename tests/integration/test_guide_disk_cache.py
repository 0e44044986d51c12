"""The activation cache on disk: shared by runs, found by content, and never the cause of another result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgft import Config, Guide
from rgft.errors import CacheError, ConfigError
from rgft.execution.disk_states import DiskStates
from tests.families import FAMILIES
from tests.integration.loops import Examples, adamw, assert_same_state, trimmed
from tests.integration.policies import Scripted, steer
from tests.unit.execution.disk import threads_that_load

Change = Callable[[int, dict[str, Tensor]], dict[str, Tensor]]


class Changing(Examples):
    """Examples that `change` alters each time they are asked for."""

    def __init__(self, *args: Any, change: Change | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.change, self.asked = change, 0

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.asked += 1
        example = super().__getitem__(index)
        return example if self.change is None else self.change(self.asked, example)


def train(
    name: str = "bert", *, epochs: int = 2, seed: int = 0, lr: float = 1e-3, change: Change | None = None,
    prepare: Callable[[nn.Module], None] = lambda model: None, config: dict[str, Any] | None = None,
    loss: Any = None, **execution: Any,
) -> Guide:  # fmt: skip
    """Trains the layers above the first, from the first step on."""
    family = FAMILIES[name]
    torch.manual_seed(seed)
    model = family.build()
    prepare(model)
    guide = Guide(model, Config(preset="rgft", seed=seed, execution=execution, **(config or {})), loss=loss)
    steer(guide, Scripted(lambda s: {c.name for c in guide.partition if c.depth >= 2}))
    optimizer = adamw(guide, lr=lr)
    data = Changing(family, count=24, change=change)
    collate_fn = trimmed if family.kind in {"text", "lm"} else None
    for batch in guide.batches(data, batch_size=4, collate_fn=collate_fn, epochs=epochs):
        guide.loss(batch).backward()
        guide.step(optimizer)
        optimizer.zero_grad()
    guide.detach()
    return guide


def per_example(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits, batch["labels"], reduction="none")


def disk(folder: Path, **execution: Any) -> dict[str, Any]:
    return {"cache": "disk", "cache_dir": str(folder), **execution}


ALL_BUT_ONE_BATCH = (44, 4)


def counts(guide: Guide) -> tuple[int, int]:
    assert guide.cache is not None
    return guide.cache.hits, guide.cache.misses


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit", "torch_transformer_encoder"])
def test_the_first_run_fills_it_and_others_only_read(name: str, tmp_path: Path) -> None:
    first = train(name, **disk(tmp_path))
    second = train(name, **disk(tmp_path))
    assert counts(first) == (24, 24)
    # A first padded batch is computed for the sake of its gradients, which show that nothing reads padding.
    expected = (48, 0) if name == "vit" else ALL_BUT_ONE_BATCH
    assert counts(second) == expected
    assert second.run_plan is not None
    assert second.run_plan.cache == "disk"
    assert_same_state(second.model, first.model)
    assert_same_state(train(name, cache="memory").model, first.model)
    # What is read need not be paid for.
    share = second.ledger.forward_cached_flops / first.ledger.forward_cached_flops
    assert share == pytest.approx(expected[0] / 24, rel=0.02)  # batches differ in length


def test_other_rates_orders_and_classifiers_share_it(tmp_path: Path) -> None:
    def with_another_classifier(model: Any) -> None:
        nn.init.normal_(model.classifier.weight)

    train(**disk(tmp_path))
    for other in (train(lr=1e-4, **disk(tmp_path)), train(prepare=with_another_classifier, **disk(tmp_path)),
                  train(seed=3, **disk(tmp_path))):  # fmt: skip
        assert counts(other) == ALL_BUT_ONE_BATCH


def test_other_weights_and_ways_of_storing_do_not(tmp_path: Path) -> None:
    def with_another_first_layer(model: Any) -> None:
        with torch.no_grad():
            model.bert.encoder.layer[0].output.dense.bias += 1e-3

    def with_another_last_layer(model: Any) -> None:
        with torch.no_grad():
            model.bert.encoder.layer[1].output.dense.bias += 1e-3

    train(**disk(tmp_path))
    assert counts(train(prepare=with_another_first_layer, **disk(tmp_path))) == (24, 24)
    assert counts(train(**disk(tmp_path, cache_dtype="int8"))) == (24, 24)
    assert counts(train(prepare=with_another_last_layer, **disk(tmp_path))) == ALL_BUT_ONE_BATCH
    assert len(list(tmp_path.iterdir())) == 3


def test_int8_trains_nearly_as_well_and_says_how_far_off_it_is(tmp_path: Path) -> None:
    sizes: list[int] = []
    guides: list[Guide] = []
    for dtype in ("model", "int8"):
        guides.append(train(**disk(tmp_path / dtype, cache_dtype=dtype)))
        sizes.append(sum(path.stat().st_size for path in (tmp_path / dtype).glob("*/*")))
    exact, coarse = guides
    assert exact.cache is not None
    assert coarse.cache is not None
    assert exact.cache.largest_error == 0.0
    assert 0.0 < coarse.cache.largest_error < 0.02
    assert sizes[1] < 0.6 * sizes[0]  # descriptions included, which count in so small a model
    for found, expected in zip(coarse.model.parameters(), exact.model.parameters(), strict=True):
        assert torch.allclose(found, expected, atol=5e-3)


def with_other_tokens(asked: int, example: dict[str, Tensor]) -> dict[str, Tensor]:
    """From the second epoch on, one token of each example is another."""
    if asked <= 24 + 4:  # the first batch is looked at once more, to trace costs
        return example
    ids = example["input_ids"].clone()
    ids[2] = 3 + asked % 50
    return {**example, "input_ids": ids}


def test_examples_that_change_are_found_to_be_others(tmp_path: Path) -> None:
    # Workload scanning asks for every example before the first step: count from there.
    changing = train(change=with_other_tokens, **disk(tmp_path))
    assert_same_state(changing.model, train(change=with_other_tokens, cache="none").model)


def test_examples_that_change_are_refused_in_memory() -> None:
    with pytest.raises(CacheError, match=r"example \d+ is not what it was .* execution.cache='none'"):
        train(change=lambda asked, example: with_other_tokens(asked + 100, example), cache="memory")


def test_examples_that_change_switch_an_automatic_cache_off(caplog: pytest.LogCaptureFixture) -> None:
    def change(asked: int, example: dict[str, Tensor]) -> dict[str, Tensor]:
        return with_other_tokens(asked + 100, example)

    guide = train(change=change)
    assert "is not what it was" in caplog.text
    assert guide.ledger.forward_cached_flops == 0.0
    assert_same_state(guide.model, train(change=change, cache="none").model)


@pytest.mark.parametrize(
    "execution", [{"cache": "disk"}, {"cache": "memory", "cache_dir": "x"}, {"cache": "none", "cache_dir": "x"}]
)
def test_a_folder_goes_with_a_cache_on_disk(execution: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cache_dir"):
        Config(execution=execution)


@pytest.mark.parametrize("prune", [0.0, 0.5])
def test_from_the_second_epoch_on_states_are_read_ahead(
    prune: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = threads_that_load(monkeypatch)
    examples = {"examples": {"prune": prune}} if prune else {}
    ahead = train(**disk(tmp_path / "ahead"), epochs=3, config=examples, loss=per_example)
    assert sum(name.startswith("rgft-read-ahead") for name in threads) >= 0.6 * len(threads) > 10
    monkeypatch.setattr(DiskStates, "read_ahead", lambda self, keys: None)
    threads.clear()
    in_turn = train(**disk(tmp_path / "in_turn"), epochs=3, config=examples, loss=per_example)
    assert set(threads) == {"MainThread"}
    assert_same_state(ahead.model, in_turn.model)

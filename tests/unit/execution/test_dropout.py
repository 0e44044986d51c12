"""Dropout, wherever a model has it: found, turned off, and given back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rgft import Config, Guide
from rgft.errors import ConfigError
from rgft.execution.dropout import Dropout
from tests.families import FAMILIES
from tests.integration.loops import Examples, collate, example_losses


class Hidden(nn.Module):
    """Drops by a function, and by a number under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.attention_dropout, self.p, self.drop_last = nn.Linear(8, 8), 0.3, 0.3, True

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.linear(x), self.attention_dropout, self.training)


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.4), nn.Dropout(0.0)), 1),
        (nn.Sequential(nn.Linear(8, 8), nn.AlphaDropout(0.4)), 1),
        (Hidden(), 1),
        (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True), 4),
        (nn.Linear(8, 8), 0),
    ],
)
def test_everything_that_drops_is_found_and_given_back(model: nn.Module, count: int) -> None:
    dropout, x = Dropout(model), torch.randn(4, 5, 8)
    assert len(dropout) == count
    before = [dict(vars(module)) for module in model.modules()]
    assert torch.equal(model(x), model(x)) == (count == 0)
    dropout.turn(off=True)
    assert torch.equal(model(x), model(x))
    assert model.training
    dropout.turn(off=False)
    assert [dict(vars(module)) for module in model.modules()] == before


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "vit", "roberta"])
def test_models_of_transformers(family: str) -> None:
    case = FAMILIES[family]
    model = case.build()
    model.train()
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(module, nn.Dropout) and name == "p":
                module.p = 0.5
            elif type(value) is float and "drop" in name:
                setattr(module, name, 0.5)
    dropout, batch = Dropout(model), case.batch()
    assert len(dropout) > 0

    def logits() -> Tensor:
        return model(**batch).logits

    assert not torch.equal(logits(), logits())
    dropout.turn(off=True)
    assert torch.equal(logits(), logits())


def trained(setting: str, *, epochs: float, budget: float | None = None) -> list[bool]:
    """Whether dropout was off, step by step, and after the run."""
    model = FAMILIES["bert"].build()
    layers = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    for layer in layers:
        layer.p = 0.1
    seen: list[bool] = []
    settings: dict[str, Any] = {"preset": "full", "update": {"dropout": setting}, "budget": budget}
    with Guide(model, Config(**settings), loss=example_losses) as guide:
        optimizer = torch.optim.AdamW(guide.param_groups(lr=1e-3))
        for batch in guide.batches(
            Examples(FAMILIES["bert"], count=16), batch_size=4, collate_fn=collate, epochs=epochs
        ):
            guide.loss(batch).backward()
            seen.append(all(layer.p == 0.0 for layer in layers))
            guide.step(optimizer)
            assert all(layer.p == 0.1 for layer in layers)  # between steps
            optimizer.zero_grad()
    return [*seen, any(layer.p != 0.1 for layer in layers)]


def test_it_is_off_as_long_as_the_run_is_told() -> None:
    assert trained("auto", epochs=1) == [True] * 4 + [False]
    assert trained("auto", epochs=2) == [False] * 8 + [False]
    assert trained("auto", epochs=3, budget=0.3) == [True] * 3 + [False]
    assert trained("auto", epochs=3, budget=0.6) == [False] * 7 + [False]
    assert trained("auto", epochs=1.25) == [False] * 5 + [False]
    assert trained("off", epochs=1.5) == [True] * 6 + [False]
    assert trained("model", epochs=1) == [False] * 4 + [False]


def test_measuring_does_not_hide_that_examples_will_come_again() -> None:
    """While everything is on, few steps seem left; after the cut there are more than an epoch has."""
    model = FAMILIES["bert"].build()
    layer = next(m for m in model.modules() if isinstance(m, nn.Dropout))
    layer.p = 0.1
    config = Config(
        budget=0.5,
        warmup_fraction=0.2,
        probe={"interval": 2, "size": 2},
        mask={"name": "budget", "frozen_fraction": 1.0},
    )  # type: ignore[arg-type]
    seen: list[float] = []
    with Guide(model, config, loss=example_losses) as guide:
        optimizer = torch.optim.AdamW(guide.param_groups(lr=1e-3))
        for batch in guide.batches(Examples(FAMILIES["bert"], count=32), batch_size=4, collate_fn=collate, epochs=2):
            guide.loss(batch).backward()
            seen.append(layer.p)
            guide.step(optimizer)
            optimizer.zero_grad()
        assert guide.plan.cut > 0
    assert len(seen) > 8
    assert set(seen) == {0.1}


def test_a_compiled_model_keeps_its_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    assert Dropout(model).may_change
    model.compile()
    assert not Dropout(model).may_change


def test_presets() -> None:
    assert Config().resolved().update.dropout == "auto"
    assert Config(preset="full").resolved().update.dropout == "model"
    with pytest.raises(ConfigError, match="dropout"):
        Config(update={"dropout": 0.1})  # type: ignore[arg-type]

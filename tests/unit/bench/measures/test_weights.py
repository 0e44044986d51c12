"""Cosines to the initial weights, against one line of torch; adapters count as what they add to the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rgft.bench.measures.weights import StartingPoint
from rgft.bench.methods import METHODS
from tests.families import FAMILIES
from tests.unit.bench.tiny_task import CODE


def moved(model: nn.Module, part: str, *, by: float) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(torch.randn_like(parameter), alpha=by)
    return model


def test_against_flat_vectors() -> None:
    model = FAMILIES["bert"].build()
    start, before = StartingPoint.of(model), copy.deepcopy(model)
    found = start.compare(moved(model, "layer.1.", by=0.1))
    one, other = (torch.cat([p.detach().flatten() for p in m.parameters()]).double() for m in (before, model))
    assert found["overall"]["cosine"] == pytest.approx(float(torch.cosine_similarity(one, other, dim=0)), abs=1e-12)
    assert found["overall"]["relative_change"] == pytest.approx(float((other - one).norm() / one.norm()))
    still = {name: values for name, values in found["components"].items() if "layer.1" not in name}
    assert len(still) >= 3
    assert all(values["relative_change"] == 0.0 for values in still.values())
    assert all(values["cosine"] in (None, pytest.approx(1.0, abs=1e-12)) for values in still.values())
    (changed,) = (values for name, values in found["components"].items() if "layer.1" in name)
    assert changed["cosine"] < 0.999
    assert found["new_parameters"] == 0


def test_a_component_without_weights_says_so() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    nn.init.zeros_(model[1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(model[1].bias)  # type: ignore[arg-type]
    start = StartingPoint.of(model)
    nn.init.ones_(model[1].weight)  # type: ignore[arg-type]
    found = start.compare(model)["components"]
    undefined = [values for values in found.values() if values["cosine"] is None]
    assert [values["reason"] for values in undefined] == ["the initial weights are zero"]


@pytest.mark.parametrize("name", ["lora", "rslora", "ia3", "adalora", "lora_top"])
def test_adapters_are_merged_and_the_model_is_left_alone(name: str) -> None:
    plain = FAMILIES["bert"].build()
    start = StartingPoint.of(plain)
    wrapped = METHODS[name].prepare(plain, {"rank": 2, "layers": 1} if name == "lora_top" else {"rank": 2})
    untrained = start.compare(wrapped)
    assert untrained["overall"]["relative_change"] == pytest.approx(0.0, abs=1e-6)
    moved(wrapped, "ia3_" if name == "ia3" else "lora_", by=0.1)
    kept = copy.deepcopy(wrapped.state_dict())
    trained = start.compare(wrapped)
    assert trained["overall"]["relative_change"] > 1e-3
    assert trained["new_parameters"] == 0
    assert all(torch.equal(value, kept[key]) for key, value in wrapped.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_compared_by_the_names_of_the_plain_model(name: str) -> None:
    plain = FAMILIES["llama" if name in CODE else "bert"].build()
    start = StartingPoint.of(plain)
    prepared = METHODS[name].prepare(plain, {})
    known = sum(p.numel() for p in prepared.parameters())
    untrained = start.compare(prepared)
    assert untrained["overall"]["relative_change"] == pytest.approx(0.0, abs=1e-6)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in prepared.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    trained = start.compare(prepared)
    assert trained["overall"]["relative_change"] > 1e-4
    assert trained["overall"]["cosine"] < 1.0
    # What bottlenecks add stands in no weight of the plain model.
    of_plain = sum(weight.numel() for weight in start.weights.values())
    assert trained["new_parameters"] == (known - of_plain if name in ("houlsby", "pfeiffer") else 0)

"""NaN and infinity stop a run before anything is updated, and the message says where they came from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from rgft import Config, Guide
from rgft.errors import AttachError, ConfigError, DataError, NonFiniteError, OptimizerError
from tests.families import FAMILIES, loss_of
from tests.integration.loops import Examples, adamw, assert_same_state, collate, guided


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict())


def assert_same(found: Any, expected: Any) -> None:
    assert set(found["state"]) == set(expected["state"])
    for key, state in expected["state"].items():
        for name, value in state.items():
            assert torch.equal(found["state"][key][name], value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_names_its_component(value: float, clip: float | None) -> None:
    family = FAMILIES["bert"]
    model = family.build()
    guide = Guide(model, Config(granularity="head"))
    optimizer = adamw(guide, weight_decay=0.1)
    guided(guide, optimizer, Examples(family), steps=2)
    before, moments = copy.deepcopy(model.state_dict()), snapshot(optimizer)
    name = "bert.encoder.layer.1.attention.head.2"
    (first, *_) = guide._binding.parameters[name]
    guide.loss(family.batch()).backward()
    assert first.grad is not None
    first.grad.view(-1)[3] = value
    with pytest.raises(NonFiniteError) as caught:
        guide.step(optimizer, max_grad_norm=clip)
    message = str(caught.value)
    assert message.startswith(f"step 2: the gradient of '{name}' is not finite (loss 1.")
    assert "nothing was updated" in message
    assert guide.step_count == 2
    guide.detach()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert_same(optimizer.state_dict(), moments)


def test_a_nan_loss_stops_at_its_step_and_the_next_good_batch_may_follow() -> None:
    family = FAMILIES["llama"]
    model = family.build()
    plain = copy.deepcopy(model)
    poisoned = False

    def loss(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return loss_of(net, batch) * (float("nan") if poisoned else 1.0)

    guide = Guide(model, Config(preset="full"), loss=loss)
    optimizer = adamw(guide)
    expected = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    for seed in range(3):
        poisoned = seed == 1
        guide.loss(family.batch(seed=seed)).backward()
        if poisoned:
            with pytest.raises(NonFiniteError, match=r"step 1: the gradient of .* \(loss nan\)"):
                guide.step(optimizer)
        else:
            guide.step(optimizer)
            loss_of(plain, family.batch(seed=seed)).backward()
            expected.step()
            expected.zero_grad()
        optimizer.zero_grad()
    assert_same_state(model, plain)
    assert guide.step_count == 2


def test_a_probe_that_is_not_finite_moves_nothing() -> None:
    family = FAMILIES["bert"]
    model = family.build()

    def loss(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return loss_of(net, batch) * (1.0 if net.training else float("nan"))

    guide = Guide(model, Config(probe={"interval": 2, "size": 2}), loss=loss)
    optimizer = adamw(guide)
    states = []
    with pytest.raises(NonFiniteError, match="the loss of the probe before step 2 is nan"):
        guided(
            guide, optimizer, Examples(family), after_step=lambda g: states.append(copy.deepcopy(model.state_dict()))
        )
    guide.detach()
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, states[-1][key]), key


def test_an_optimizer_that_cannot_work_on_slices_is_refused_before_it_steps() -> None:
    family = FAMILIES["bert"]
    model = family.build()
    guide = Guide(model, Config(granularity="head"))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adafactor(guide.param_groups(lr=1e-2), lr=1e-2)
    with pytest.raises(OptimizerError, match="granularity='layer'"):
        guided(guide, optimizer, Examples(family))
    guide.detach()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_an_optimizer_made_before_the_guide_is_refused() -> None:
    family = FAMILIES["bert"]
    model = family.build()
    early = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guide = Guide(model, Config(granularity="head"))
    with pytest.raises(OptimizerError, match="made before RGFT was attached"):
        guided(guide, early, Examples(family))


def test_an_optimizer_with_a_closure_is_refused_before_it_steps() -> None:
    family = FAMILIES["bert"]
    guide = Guide(family.build(), Config())
    optimizer = torch.optim.LBFGS(guide.model.parameters())
    with pytest.raises(OptimizerError, match="needs no closure, found LBFGS"):
        guided(guide, optimizer, Examples(family))
    assert guide.step_count == 0


def test_a_scheduler_that_needs_a_metric_is_refused_before_anything_is_updated() -> None:
    family = FAMILIES["bert"]
    guide = Guide(family.build(), Config())
    optimizer = adamw(guide)
    before = copy.deepcopy(guide.model.state_dict())
    guide.loss(family.batch()).backward()
    with pytest.raises(ConfigError, match="expected one that steps without a metric, found ReduceLROnPlateau"):
        guide.step(optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))
    assert all(torch.equal(tensor, before[name]) for name, tensor in guide.model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "instead"),
    [({"budget": 0.3}, r"found dict \(\{'budget': 0.3\}\); write rgft.Config.from_dict"), ({}, "found dict"),
     (0.3, r"found float \(0.3\); write rgft.Config\(budget=0.3\)")],
)  # fmt: skip
def test_a_configuration_of_another_type_is_refused_and_the_model_left_alone(config: Any, instead: str) -> None:
    model = FAMILIES["bert"].build()
    with pytest.raises(ConfigError, match=rf"expected an rgft.Config or None, {instead}"):
        Guide(model, config)
    Guide(model).detach()


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from Examples(FAMILIES["bert"])


class StreamedOfKnownLength(Streamed):
    def __len__(self) -> int:
        return len(Examples(FAMILIES["bert"]))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [(Streamed(), "found Streamed .* give a list of its examples"), (StreamedOfKnownLength(), "found StreamedOf"),
     (DataLoader(Examples(FAMILIES["bert"])), "found a DataLoader without __getitem__: .* give its dataset")],
)  # fmt: skip
def test_a_dataset_that_is_not_map_style_is_refused(dataset: Any, message: str) -> None:
    guide = Guide(FAMILIES["bert"].build(), Config(budget=0.5))
    with pytest.raises(DataError, match=message):
        next(iter(guide.batches(dataset, batch_size=4, collate_fn=collate)))


@pytest.mark.parametrize("count", [1, 5, 19])
def test_tiny_data_sets_run_without_probes_or_with_small_ones(count: int) -> None:
    """A tenth of the data is all that probes may take."""
    family = FAMILIES["bert"]
    guide = Guide(family.build(), Config(probe={"interval": 1, "size": 8}))
    batches, _ = guided(guide, adamw(guide), Examples(family, count=count), epochs=2)
    assert guide.step_count == len(batches) > 0
    assert guide.ledger.probes == 0


def test_small_data_sets_have_smaller_probes() -> None:
    family = FAMILIES["bert"]
    guide = Guide(family.build(), Config(probe={"interval": 2, "size": 8}))
    seen: set[tuple[int, ...]] = set()
    for batch in guide.batches(Examples(family, count=40), batch_size=6, collate_fn=collate):
        guide.loss(batch).backward()
        guide.step(optimizer := getattr(guide, "_test_optimizer", None) or adamw(guide))
        guide._test_optimizer = optimizer  # type: ignore[attr-defined]
        optimizer.zero_grad()
        seen |= {tuple(row.tolist()) for row in batch["input_ids"]}
    assert guide.ledger.probes == 2
    assert guide.run_plan is not None
    assert guide.run_plan.probe_size == 4
    assert len(seen) == 36


def test_a_step_whose_cost_is_not_seen_is_refused() -> None:
    def of_a_submodule(model: Any, batch: Any) -> Tensor:
        pooled = model.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
        return torch.nn.functional.cross_entropy(model.classifier(pooled), batch["labels"])

    family = FAMILIES["bert"]
    guide = Guide(family.build(), Config(), loss=of_a_submodule)
    before = {name: value.clone() for name, value in guide.model.state_dict().items()}
    batch = next(iter(guide.batches(Examples(family), batch_size=4, collate_fn=collate)))
    guide.loss(batch).backward()
    with pytest.raises(AttachError, match=r"Call the model itself, not a submodule of it, and in training mode"):
        guide.step(adamw(guide))
    assert all(torch.equal(value, before[name]) for name, value in guide.model.state_dict().items())

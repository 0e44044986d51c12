"""Training on cached prefixes is training: the same weights, whatever way the model is called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgft import Config, Guide
from rgft.errors import CacheError, NonFiniteError
from rgft.telemetry.flop_counter import flop_counter
from tests.families import FAMILIES, loss_of
from tests.integration.loops import Examples, adamw, collate, trimmed
from tests.integration.policies import Scripted, steer

Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]


def positional(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"])


def without_mask(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Padding is attended to, so that states depend on how far the batch is padded."""
    return F.cross_entropy(model(input_ids=batch["input_ids"]).logits, batch["labels"])


def with_padding(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Reads the last layer's states at padding, too, which a cache of tokens alone does not have."""
    states: list[Tensor] = []
    handle = model.bert.encoder.register_forward_hook(lambda module, args, output: states.append(output[0]))
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    handle.remove()
    return F.cross_entropy(
        logits + states[0].mean((1, 2)).unsqueeze(1) * torch.tensor([1.0, -1.0, 0.0]), batch["labels"]
    )


def train(name: str, loss: Loss, *, cache: str, epochs: int = 3) -> Guide:
    family = FAMILIES[name]
    torch.manual_seed(0)
    guide = Guide(family.build(), Config(preset="rgft", execution={"cache": cache}), loss=loss)
    steer(guide, Scripted(lambda s: {c.name for c in guide.partition if c.depth >= 2}))
    # Dropout above the cut draws the same random numbers with and without the cache: the prefix draws none.
    optimizer = adamw(guide, lr=1e-3)
    data = Examples(family, count=48)
    data.rows = data.rows[1::2]  # of 10 and of 8 tokens, so that batches are of different lengths
    lengths = set()
    for batch in guide.batches(data, batch_size=2, collate_fn=trimmed, epochs=epochs):
        lengths.add(batch["input_ids"].shape[1])
        guide.loss(batch).backward()
        guide.step(optimizer)
        optimizer.zero_grad()
    assert lengths == {8, 10}
    guide.detach()
    return guide


@pytest.mark.parametrize("loss", [loss_of, positional, without_mask])
@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_cached_training_is_training(name: str, loss: Any) -> None:
    cached, plain = train(name, loss, cache="memory"), train(name, loss, cache="none")
    assert cached.cache is not None
    for (key, found), expected in zip(cached.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(found, expected, atol=2e-5), key
    if loss is not without_mask:
        assert cached.cache.hits >= 40
        assert cached.ledger.forward_cached_flops > 0


def test_a_loss_that_reads_padding_gets_no_cache(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CacheError, match="states of padding"):
        train("bert", with_padding, cache="memory")
    guide, plain = train("bert", with_padding, cache="auto"), train("bert", with_padding, cache="none")
    assert "states of padding" in caplog.text
    assert guide.cache is not None
    assert guide.cache.hits <= 10  # rows of batches without padding, read before a padded one came
    for (key, found), expected in zip(guide.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(found, expected, atol=2e-5), key


def test_a_gradient_that_is_zero_everywhere_proves_nothing() -> None:
    """A classifier that starts at zero passes none on in the first step."""

    def zeroed(cache: str) -> Guide:
        family = FAMILIES["bert"]
        torch.manual_seed(0)
        model: Any = family.build()
        nn.init.zeros_(model.classifier.weight)
        guide = Guide(model, Config(preset="rgft", execution={"cache": cache}), loss=with_padding_in_the_classifier)
        steer(guide, Scripted(lambda s: {c.name for c in guide.partition if c.depth >= 2}))
        optimizer = adamw(guide, lr=1e-2)
        data = Examples(family, count=48)
        data.rows = data.rows[1::2]
        for batch in guide.batches(data, batch_size=2, collate_fn=trimmed, epochs=3):
            guide.loss(batch).backward()
            guide.step(optimizer)
            optimizer.zero_grad()
        guide.detach()
        return guide

    guide, plain = zeroed("auto"), zeroed("none")
    for (key, found), expected in zip(guide.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(found, expected, atol=2e-5), key


def with_padding_in_the_classifier(model: Any, batch: dict[str, Tensor]) -> Tensor:
    states: list[Tensor] = []
    handle = model.bert.encoder.register_forward_hook(lambda module, args, output: states.append(output[0]))
    unused = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    handle.remove()
    return F.cross_entropy(model.classifier(states[0].mean(1)) + 0.0 * unused, batch["labels"])


def test_a_loss_that_is_not_finite_says_nothing_of_padding() -> None:
    with pytest.raises(NonFiniteError):
        train("bert", lambda model, batch: loss_of(model, batch) * float("nan"), cache="memory")


def test_a_mask_that_is_written_to_after_it_was_looked_at() -> None:
    """Under a budget the batch is looked at before the loop has it."""

    def run(cache: str) -> Guide:
        family = FAMILIES["bert"]
        torch.manual_seed(0)
        guide = Guide(family.build(), Config(preset="rgft", budget=0.9, execution={"cache": cache}, seed=1))
        steer(guide, Scripted(lambda s: {c.name for c in guide.partition if c.depth >= 2}))
        optimizer = adamw(guide, lr=1e-3)
        data = Examples(family, count=24)
        for row in data.rows:
            row["attention_mask"][6:] = 0
        for batch in guide.batches(data, batch_size=4, collate_fn=collate, epochs=3):
            batch["attention_mask"][:, 6:8] = 1
            guide.loss(batch).backward()
            guide.step(optimizer)
            optimizer.zero_grad()
            if guide.step_count == 12:
                break
        guide.detach()
        return guide

    cached, plain = run("memory"), run("none")
    assert cached.cache is not None
    assert cached.cache.hits > 0
    for (key, found), expected in zip(cached.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(found, expected, atol=2e-5), key


@pytest.mark.parametrize("wanted", ["output_hidden_states", "output_attentions"])
def test_what_all_layers_give_cannot_be_had_from_those_that_do_not_run(wanted: str) -> None:
    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        model.set_attn_implementation("eager")
        setattr(model.config, wanted, True)
        return loss_of(model, batch)

    with pytest.raises(CacheError, match=wanted):
        train("bert", loss, cache="memory")


def test_a_deep_copy_books_nothing_on_the_original() -> None:
    family = FAMILIES["bert"]
    guide = Guide(family.build(), Config(preset="full"))
    optimizer = adamw(guide)
    batch = next(iter(guide.batches(Examples(family), batch_size=4, collate_fn=trimmed)))
    guide.loss(batch).backward()
    before = guide.ledger.spent_flops
    loss_of(copy.deepcopy(guide.model), batch)
    assert guide.ledger.spent_flops == before
    guide.step(optimizer)


def deepened(cache: str, *, audits: list[tuple[float, float]] | None = None, tokens: int = 12) -> Guide:
    """Three epochs of examples in two lengths; from the second on, one layer more is frozen."""
    family = FAMILIES["bert"]
    torch.manual_seed(0)
    guide = Guide(family.build(), Config(preset="rgft", execution={"cache": cache}), loss=loss_of)
    depth = {c.name: c.depth for c in guide.partition}
    steer(guide, Scripted(lambda s: {name for name in depth if depth[name] >= (2 if s.step < 4 else 3)}))
    optimizer = adamw(guide, lr=1e-3)
    data = Examples(family, count=16, tokens=tokens)
    for batch in guide.batches(data, batch_size=4, collate_fn=trimmed, epochs=3):
        before = guide.ledger.spent_flops
        with flop_counter() as counter:
            guide.loss(batch).backward()
        if audits is not None:
            audits.append((float(counter.get_total_flops()), guide.ledger.spent_flops - before))
        guide.step(optimizer)
        optimizer.zero_grad()
    guide.detach()
    return guide


def test_a_cut_that_is_moved_up_goes_on_from_what_is_known() -> None:
    audits: list[tuple[float, float]] = []
    cached, plain = deepened("memory", audits=audits), deepened("none")
    for (key, found), expected in zip(cached.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(found, expected, atol=2e-5), key
    assert cached.cache is not None
    assert (cached.cache.misses, cached.cache.upgrades, cached.cache.hits) == (16, 16, 16)
    for counted, modelled in audits:
        assert modelled == pytest.approx(counted, rel=0.02)
    # The first epoch computes one frozen layer, the second the next one alone, the third none.
    first, second, third = (counted for counted, _ in audits[::4])
    assert first > second > third


def test_a_run_resumed_where_all_states_are_of_the_old_cut_still_has_them() -> None:
    """There was no room for the first batch at the new one: the cache is empty there, and not below."""
    data = Examples(FAMILIES["bert"], 8)

    def session() -> Guide:
        config = Config(preset="full", policy={"name": "all_on"}, execution={"cache": "memory"})
        guide = Guide(FAMILIES["bert"].build(), config, loss=loss_of)
        depths = {component.name: component.depth for component in guide.partition}
        steer(guide, Scripted(lambda s: [name for name, depth in depths.items() if depth >= 2 + (s.step > 0)]))
        guide.set_optimizer(adamw(guide))
        return guide

    def step(guide: Guide, ids: list[int]) -> None:
        batch = collate([{k: v for k, v in data[i].items() if k != "attention_mask"} for i in ids])
        assert guide.optimizer is not None
        guide.announce(batch, ids)
        guide.loss(batch).backward()
        guide.step(guide.optimizer)

    whole, resumed = session(), session()
    assert whole.cache is not None
    assert resumed.cache is not None
    step(whole, [0, 1, 2, 3])
    whole.cache.limit(whole.cache.bytes)
    step(whole, [4, 5, 6, 7])
    assert len(whole.cache) == 0
    resumed.model.load_state_dict(whole.model.state_dict())
    resumed.load_state_dict(whole.state_dict())
    for guide in (whole, resumed):
        step(guide, [0, 1, 2, 3])
    assert resumed.cache.upgrades == whole.cache.upgrades == 4


def test_a_cache_that_stayed_out_stays_out_of_the_resumed_run() -> None:
    def session() -> Guide:
        config = Config(preset="full", policy={"name": "all_on"}, execution={"cache": "auto"})
        guide = Guide(FAMILIES["bert"].build(), config, loss=with_padding)
        steer(guide, Scripted(lambda _: [c.name for c in guide.partition if c.depth >= 2]))
        guide.set_optimizer(adamw(guide))
        return guide

    whole, resumed = session(), session()
    for batch in whole.batches(Examples(FAMILIES["bert"], 8), batch_size=4, collate_fn=collate):
        whole.loss(batch).backward()
        assert whole.optimizer is not None
        whole.step(whole.optimizer)
    resumed.load_state_dict(whole.state_dict())
    for guide in (whole, resumed):
        assert guide.cache is not None
        guide.cache.set_cut(3)
        assert "forward" not in guide.model.get_submodule(guide.partition.layers[0]).__dict__

"""Low-rank pairs under every optimizer that is known by name."""

from __future__ import annotations

import io

import pytest
import torch
from torch.optim import Optimizer

from rgft import Config, Guide
from tests.families import FAMILIES, loss_of
from tests.integration.loops import Examples, assert_same_state, guided, trimmed, without_dropout
from tests.integration.policies import steer
from tests.integration.test_guide_low_rank import Forms, everything, pairs_of
from tests.integration.test_optimizers import NAMES, optimizer_of

BERT = FAMILIES["bert"]


def paired_guide() -> Guide:
    torch.manual_seed(0)
    return Guide(
        BERT.build(),
        Config(preset="full", update={"average_last": 0.0, "low_rank": {"rank": 2, "lr_multiplier": 1.0}}),
        loss=loss_of,
    )


@pytest.mark.parametrize("name", NAMES)
def test_pairs_are_trained_and_merged_and_weights_beside_them_are_not(name: str) -> None:
    guide = paired_guide()
    optimizer, before = optimizer_of(guide, name), everything(guide)
    guided(guide, optimizer, Examples(BERT), steps=4, collate_fn=trimmed)
    pairs, after = pairs_of(guide), everything(guide)
    for component, sites in pairs.sites.items():
        for site in sites:
            assert torch.equal(after[component][site.position], before[component][site.position])
        first = len(after[component]) - len(pairs.pairs[component])
        assert all(
            not torch.equal(new, old)
            for new, old in zip(after[component][first:], before[component][first:], strict=True)
        )
    with torch.no_grad():
        guide.model.eval()
        batch = BERT.batch()
        with guide.evaluating():
            expected = loss_of(guide.model, batch)
        guide.finish()  # a schedule-free optimizer's mean stays
        guide.detach()
        assert loss_of(guide.model, batch) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_goes_on_bit_for_bit(name: str) -> None:
    data, whole = Examples(BERT), paired_guide()
    optimizer = optimizer_of(whole, name)
    saved = io.BytesIO()

    def save(guide: Guide) -> None:
        if guide.step_count == 2:
            state = [guide.model.state_dict(), optimizer.state_dict(), guide.state_dict()]
            torch.save(state, saved)

    guided(whole, optimizer, data, steps=5, collate_fn=trimmed, after_step=save)
    saved.seek(0)
    model_state, optimizer_state, guide_state = torch.load(saved, weights_only=False)
    resumed = paired_guide()
    again = optimizer_of(resumed, name)
    resumed.model.load_state_dict(model_state)
    again.load_state_dict(optimizer_state)
    resumed.load_state_dict(guide_state)
    guided(resumed, again, data, steps=5, collate_fn=trimmed)
    assert all(
        torch.equal(found, expected)
        for name, held in everything(resumed).items()
        for found, expected in zip(held, everything(whole)[name], strict=True)
    )
    assert_same_state(resumed.model, whole.model)


@pytest.mark.parametrize("name", ["lion", "schedule-free"])
def test_a_run_resumed_while_measuring_scores_the_same_steps(name: str) -> None:
    """The last step is kept where the optimizer's state does not tell it, of pairs as of weights."""

    def measuring() -> tuple[Guide, Optimizer]:
        torch.manual_seed(0)
        settings = {"average_last": 0.0, "low_rank": {"rank": 2, "lr_multiplier": 1.0}}
        model = without_dropout(BERT.build())
        guide = Guide(model, Config(granularity="layer", warmup_fraction=0.9, update=settings), loss=loss_of)
        return guide, optimizer_of(guide, name)

    data = Examples(BERT)
    (whole, optimizer), (first, stopped), (second, again) = measuring(), measuring(), measuring()
    guided(whole, optimizer, data, steps=3, collate_fn=trimmed)
    guided(first, stopped, data, steps=2, collate_fn=trimmed)
    assert first.is_measuring
    second.model.load_state_dict(first.model.state_dict())
    again.load_state_dict(stopped.state_dict())
    second.load_state_dict(first.state_dict())
    guided(second, again, data, steps=3, collate_fn=trimmed)
    assert whole.error_map.observed
    assert second.error_map.values() == whole.error_map.values()


def test_a_schedule_free_mean_goes_with_the_form() -> None:
    """Counts, steps and mean are those of what is trained: weights that became frozen beside pairs keep every bit, the
    first step of a pair is a first step, and a merge moves the point that steps lead to with the weights."""
    rate, guide = 3e-3, paired_guide()
    pairs, layer = pairs_of(guide), "bert.encoder.layer.0"
    steer(guide, Forms(lambda step: guide.partition.names, lambda step: {layer} if 3 <= step < 6 else set()))
    pytest.importorskip("schedulefree")
    optimizer = guide.make_optimizer("schedule-free", lr=rate, weight_decay=0.0)
    weight = pairs.parts[pairs.weight_part(layer)][0]
    _, b, *_ = pairs.pairs[layer]
    first: list[float] = []

    def look(guide: Guide) -> None:
        if guide.step_count == 4:
            first.append(float(b.detach().abs().max()))

    guided(guide, optimizer, Examples(BERT, count=32), steps=6, collate_fn=trimmed, after_step=look)
    assert first == [pytest.approx(rate, rel=1e-2)]
    before, to_z = weight.detach().clone(), weight.detach() - optimizer.state[weight]["z"]
    with guide.evaluating():
        assert torch.equal(weight, before)
        assert not torch.equal(b, optimizer.state[b]["z"])
    guide.begin_step()
    assert not torch.equal(weight, before)
    torch.testing.assert_close(weight.detach() - optimizer.state[weight]["z"], to_z, rtol=0, atol=1e-6)
    assert not b.detach().any()
    assert not optimizer.state[b]["z"].any()

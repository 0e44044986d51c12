"""The readout: what layers tell of the targets before anything is trained, and what is decided by it."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rgft import Config, Guide
from rgft.batches import BatchStream
from rgft.errors import BudgetError
from rgft.readout import FEWEST_EXAMPLES, MOST_EXAMPLES, Readout, _first, _one_of_each_row, _unexplained
from rgft.signals.targets import IGNORED, Targets
from rgft.telemetry.flop_counter import count_flops
from tests.families import FAMILIES
from tests.integration.loops import Examples, adamw, assert_same_state, example_losses, guided, trimmed
from tests.unit.signals.test_passes import refitted

BERT = FAMILIES["bert"]
LAYERS = [f"bert.encoder.layer.{number}" for number in range(2)]


class Labelled(Examples):
    """Examples whose labels a linear map of what a model's last layer makes of them tells, or chance alone."""

    def __init__(self, model: Any, count: int, *, by: str) -> None:
        super().__init__(BERT, count)
        torch.manual_seed(7)
        direction = torch.randn(model.config.hidden_size)
        for row in self.rows:
            if by == "chance":
                row["labels"] = torch.randint(2, ())
                continue
            with torch.no_grad():
                states = model(**{k: v[None] for k, v in row.items()}, output_hidden_states=True).hidden_states[-1]
            row["score"] = pooled(states, row["attention_mask"][None])[0] @ direction
        if by == "layer":
            middle = torch.stack([row["score"] for row in self.rows]).median()
            for row in self.rows:
                row["labels"] = (row.pop("score") > middle).long()


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    return (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


def model_of_two_classes() -> nn.Module:
    torch.manual_seed(0)
    return BERT.build().eval()


def opened(model: nn.Module, data: Examples, **settings: Any) -> Guide:
    config = {"budget": 0.5, "warmup_fraction": 0.0, "mask": {"readout": 0.3}, **settings}
    guide = Guide(model, Config(**config), loss=example_losses)
    guide.model.train()
    guide.set_optimizer(adamw(guide))
    guide.open(data, batch_size=8, collate_fn=trimmed, epochs=2)
    return guide


def test_shares_are_those_of_regressions_refitted_without_each_example() -> None:
    model = model_of_two_classes()
    data = Labelled(model, 80, by="layer")
    guide = opened(copy.deepcopy(model), data)
    readout = guide.readout
    assert readout is not None
    assert readout.targets == MOST_EXAMPLES
    first = BatchStream(data, batch_size=8, seed=guide.config.seed).order(0)[:MOST_EXAMPLES]
    rows = [data[index] for index in first]
    labels = torch.stack([row["labels"] for row in rows])
    targets = torch.nn.functional.one_hot(labels).double()
    without = (targets.sum(0) - targets) / (len(rows) - 1)
    of_mean = (targets - without).square().sum(-1)
    for position, layer in enumerate(LAYERS, start=1):
        states = []
        for row in rows:
            inputs = {key: value[None] for key, value in row.items() if key != "labels"}
            with torch.no_grad():
                hidden = model(**inputs, output_hidden_states=True).hidden_states[position]
            states.append(pooled(hidden, inputs["attention_mask"])[0])
        left = torch.tensor(refitted(torch.stack(states).double(), targets, 1.0))
        share = float(left.sum() / of_mean.sum())
        assert readout.unexplained[layer] == pytest.approx(share, rel=1e-4)
        error = (left - share * of_mean).std() / len(rows) ** 0.5 / of_mean.mean()
        assert readout.standard_errors[layer] == pytest.approx(float(error), rel=1e-3)


def test_labels_that_the_layers_tell_are_told_from_chance() -> None:
    model = model_of_two_classes()
    told, chance = (opened(copy.deepcopy(model), Labelled(model, 80, by=by)) for by in ("layer", "chance"))
    assert told.readout is not None
    assert chance.readout is not None
    assert told.readout.unexplained[LAYERS[-1]] < 0.7 < 0.9 < chance.readout.unexplained[LAYERS[-1]]
    assert chance.readout.at_most(LAYERS[-1]) == 1.0
    assert chance.readout.at_most("another") == 1.0
    for guide in (told, chance):
        guide.model.train()
        guide.begin_step()
    assert told.plan.cut > chance.plan.cut
    assert told.situation().unexplained == {
        depth: told.readout.at_most(layer) for depth, layer in enumerate(LAYERS, start=1)
    }


def test_several_labels_an_example_are_read_as_one_label_is() -> None:
    """Where just one of the labels holds, a regression leaves what it leaves of classes."""
    model = model_of_two_classes()
    one, several = Labelled(model, 80, by="layer"), Labelled(model, 80, by="layer")
    for row in several.rows:
        row["labels"] = torch.nn.functional.one_hot(row["labels"], 3).float()
    of_one = opened(copy.deepcopy(model), one).readout
    model.config.problem_type = "multi_label_classification"
    guide = Guide(model, Config(budget=0.5, warmup_fraction=0.0, mask={"readout": 0.3}))
    guide.set_optimizer(adamw(guide))
    guide.open(several, batch_size=8, collate_fn=trimmed, epochs=2)
    assert of_one is not None
    assert guide.readout is not None
    assert guide.readout.targets == of_one.targets
    assert guide.readout.unexplained == pytest.approx(of_one.unexplained, rel=1e-4)


def test_it_moves_nothing_and_books_what_it_computes() -> None:
    model = model_of_two_classes()
    data = Labelled(model, 80, by="layer")
    expected, passes = copy.deepcopy(model), []
    model.train()
    guide = Guide(model, Config(budget=0.5, warmup_fraction=0.0, mask={"readout": 0.3}), loss=example_losses)
    guide.set_optimizer(adamw(guide))
    states = guide._reader._states

    def counted(batch: Any) -> Any:
        found: list[Any] = []
        passes.append(count_flops(lambda: found.append(states(batch))))
        return found[0]

    guide._reader._states = counted  # type: ignore[method-assign]
    random_state = torch.get_rng_state()
    guide.open(data, batch_size=8, collate_fn=trimmed, epochs=2)
    assert guide.readout is not None
    assert len(passes) == MOST_EXAMPLES / 8
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert guide.ledger.spent_flops == guide.ledger.readout_flops == sum(passes)
    assert guide.ledger.probe_flops == 0.0
    guide.detach()
    assert_same_state(model, expected)


@pytest.mark.parametrize(
    ("count", "settings", "said"),
    [
        (FEWEST_EXAMPLES - 1, {}, "are too few"),
        (80, {"mask": {"readout": 0.001}}, "are too few"),
        (80, {"mask": {"readout": 0.0}}, ""),
        (80, {"mask": {"frozen_fraction": 0.5}}, ""),
        (80, {"preset": "full", "mask": None}, ""),
    ],
)
def test_nothing_is_read_where_it_is_not_wanted_or_not_paid_for(
    count: int, settings: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of_two_classes()
    with caplog.at_level(logging.INFO, logger="rgft"):
        guide = opened(model, Labelled(model, count, by="layer"), **settings)
    assert guide.readout is None
    assert guide.ledger.readout_flops == 0.0
    assert guide.situation().unexplained == {}
    assert ("readout" in caplog.text) == bool(said)
    assert said in caplog.text


def test_targets_that_cannot_be_read_leave_the_decision_to_costs(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of_two_classes()
    data = Labelled(model, 80, by="layer")
    for row in data.rows:
        row["labels"] = torch.tensor(1)
    with caplog.at_level(logging.INFO, logger="rgft"):
        alike = opened(copy.deepcopy(model), data)
    assert alike.readout is None
    assert "all targets are alike: decided by costs" in caplog.text
    for row in data.rows:
        row["wanted"] = row.pop("labels")

    def losses(model: nn.Module, batch: Any) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return torch.nn.functional.cross_entropy(logits, batch["wanted"], reduction="none")

    guide = Guide(model.train(), Config(budget=0.5, warmup_fraction=0.0, mask={"readout": 0.3}), loss=losses)
    guide.set_optimizer(adamw(guide))
    with caplog.at_level(logging.INFO, logger="rgft"):
        guide.open(data, batch_size=8, collate_fn=trimmed, epochs=2)
    assert guide.readout is None
    assert "expected labels as batch['labels']" in caplog.text


def test_layers_that_do_not_match_or_are_not_finite_are_left_out() -> None:
    torch.manual_seed(0)
    targets = torch.arange(20) % 2
    whole = torch.randn(20, 3)
    broken = whole.clone()
    broken[7, 1] = float("inf")
    states = {"whole": whole, "broken": broken, "wider": torch.randn(20, 3)}
    seen = [(targets, states), (targets, {**states, "wider": torch.randn(20, 4), "late": whole})]
    assert list(_unexplained(seen).unexplained) == ["whole"]


def test_a_resumed_run_knows_it() -> None:
    model = model_of_two_classes()
    data = Labelled(model, 80, by="layer")
    guide = opened(copy.deepcopy(model), data)
    state = guide.state_dict()
    other = opened(copy.deepcopy(model), data)
    other._decisions.readout = None
    other.load_state_dict(state)
    assert guide.readout is not None
    assert other.readout == guide.readout == Readout.from_dict(guide.readout.to_dict())


def test_a_language_model_is_not_read() -> None:
    """What its layers tell of the next token, its own head uses already."""
    family = FAMILIES["llama"]
    guide = Guide(family.build().train(), Config(budget=0.5, warmup_fraction=0.0))
    guided(guide, adamw(guide), Examples(family, 40), steps=1)
    assert guide.readout is None
    wanted = Guide(family.build().train(), Config(budget=0.9, warmup_fraction=0.0, mask={"readout": 0.3}))
    guided(wanted, adamw(wanted), Examples(family, 80, tokens=24), steps=1)
    assert wanted.readout is not None
    assert wanted.readout.targets == MOST_EXAMPLES


def test_tokens_of_one_text_do_not_tell_each_other() -> None:
    """Three texts: 4 targets that count, none, and 1; the middle one of each is read."""
    labels = torch.full((3, 6), IGNORED)
    labels[0, 1:5] = torch.tensor([5, 6, 7, 8])
    labels[2, 0] = 9
    targets = Targets(task="language_model", logits=torch.zeros(3, 6, 10), labels=labels)
    assert targets.counting[_one_of_each_row(targets)].tolist() == [7, 9]
    single = Targets(task="classification", logits=torch.zeros(3, 4), labels=torch.tensor([2, IGNORED, 1]))
    assert single.counting[_one_of_each_row(single)].tolist() == [2, 1]
    floats = Targets(task="regression", logits=torch.zeros(3, 2), labels=torch.zeros(3, 2))
    assert _one_of_each_row(floats).tolist() == [0, 1, 2]


def test_no_example_is_read_twice() -> None:
    class Wrapping(BatchStream):
        """Goes on with examples of the same epoch, as samplers with replacement do."""

        def indices(self, start: int = 0) -> Any:
            yield from ([0, 1, 2, 3], [2, 3, 4, 5], [6, 6, 0, 7], [8, 9, 10, 11])

    stream = Wrapping(Examples(BERT, 12), batch_size=4)
    assert stream.batches_per_epoch == 3
    assert _first(stream, 5) == [0, 1, 2, 3, 4]
    assert _first(stream, 100) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_layers_that_are_frozen_by_the_user_are_read_too() -> None:
    model = model_of_two_classes()
    data = Labelled(model, 80, by="layer")
    model.get_submodule(LAYERS[0]).requires_grad_(False)
    guide = opened(model, data)
    guide.begin_step()
    assert guide.readout is not None
    assert set(guide.situation().unexplained) == {1, 2}


def test_what_is_read_leaves_the_first_step_paid_for() -> None:
    """The smallest budget, as the error names it, trains with the readout as without."""
    data = Labelled(model_of_two_classes(), 64, by="layer")

    def steps(budget: float) -> int:
        guide = Guide(model_of_two_classes().train(), Config(budget=budget, mask={"readout": 0.9}), loss=example_losses)
        guided(guide, adamw(guide), data, batch_size=64, epochs=8)
        return guide.step_count

    with pytest.raises(BudgetError) as refused:
        steps(1e-4)
    smallest = float(str(refused.value).rpartition(" ")[2])
    assert steps(smallest) >= 1

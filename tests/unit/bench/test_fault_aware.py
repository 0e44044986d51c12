"""FAIT: what error-sensitive tokens weigh, and that other tasks are refused."""

from __future__ import annotations

import pytest
import torch

from rgft.bench.methods import METHODS
from rgft.bench.methods.fault_aware import fault_aware_losses
from rgft.bench.tasks.pairs import SENSITIVE
from rgft.errors import DataError
from rgft.tasks.token_loss import token_losses
from tests.families import FAMILIES
from tests.unit.bench.tiny_task import tiny_task


def test_sensitive_tokens_weigh_more_and_the_mean_stays_a_mean() -> None:
    model, batch = FAMILIES["llama"].build().eval(), FAMILIES["llama"].batch(rows=4)
    marks = torch.zeros_like(batch["labels"], dtype=torch.bool)
    plain = token_losses(model, batch)
    torch.testing.assert_close(fault_aware_losses(model, {**batch, SENSITIVE: marks}), plain)
    torch.testing.assert_close(fault_aware_losses(model, {**batch, SENSITIVE: ~marks}), plain)
    marks[0, 1] = True
    weighted = fault_aware_losses(model, {**batch, SENSITIVE: marks}, weight=3.0)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    of_token = torch.nn.functional.cross_entropy(logits[0, :1].float(), batch["labels"][0, 1:2])
    targets = int((batch["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(weighted.mean(), (plain.mean() * targets + 2 * of_token) / (targets + 2))


def test_it_is_evaluated_by_the_plain_loss_and_refuses_other_tasks() -> None:
    task = tiny_task("llama")
    loss = METHODS["fait"].loss_of(task.loss, {})
    batch = task.collate([task.train[0], task.train[1]])
    assert not torch.equal(loss(task.model.train(), batch), task.loss(task.model, batch))
    assert torch.equal(loss(task.model.eval(), batch), task.loss(task.model, batch))
    heavier = METHODS["fait"].loss_of(task.loss, {"weight": 4.0})(task.model.train(), batch)
    torch.testing.assert_close(heavier, fault_aware_losses(task.model, batch, weight=4.0))
    assert not torch.equal(heavier, loss(task.model, batch))
    other = tiny_task("bert")
    with pytest.raises(DataError, match=r"FAIT: expected batches of programs[\s\S]*no other task"):
        METHODS["fait"].loss_of(other.loss, {})(other.model, other.collate([other.train[0]]))

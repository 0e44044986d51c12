import math

import pytest
import torch

from rgft.tasks.token_loss import IGNORED, TokenCollator, TokenMetric, number_of_targets, token_losses
from tests.families import FAMILIES

EXAMPLES = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9]},
    {"input_ids": [5, 6, 7], "labels": [IGNORED, IGNORED, 7]},
    {"input_ids": [8, 9], "labels": [8, IGNORED]},
]


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return FAMILIES["llama"].build().eval()


def test_the_mean_is_the_models_own_loss(model: torch.nn.Module) -> None:
    batch = TokenCollator(0)(EXAMPLES)
    expected = model(**batch).loss
    torch.testing.assert_close(token_losses(model, batch).mean(), expected)


def test_each_example_has_its_own_share(model: torch.nn.Module) -> None:
    batch = TokenCollator(0)(EXAMPLES)
    assert number_of_targets(batch) == 5
    losses = token_losses(model, batch)
    for row, example in enumerate(EXAMPLES):
        ids = torch.tensor([example["input_ids"]])
        probabilities = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.log_softmax(-1)
        targets = [(t, y) for t, y in enumerate(example["labels"]) if t > 0 and y != IGNORED]
        alone = -sum(probabilities[0, t - 1, y] for t, y in targets)
        torch.testing.assert_close(losses[row], torch.as_tensor(alone) * 3 / 5, rtol=1e-4, atol=1e-6)


def test_a_batch_without_targets_has_no_loss_and_no_gradient(model: torch.nn.Module) -> None:
    batch = TokenCollator(0)([EXAMPLES[2]])
    assert number_of_targets(batch) == 0
    loss = token_losses(model, batch).mean()
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_padding_is_neither_attended_to_nor_learnt() -> None:
    batch = TokenCollator(1)(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, 1, 1], [8, 9, 1, 1, 1]]
    assert batch["attention_mask"].sum(1).tolist() == [5, 3, 2]
    assert batch["labels"][2].tolist() == [8, IGNORED, IGNORED, IGNORED, IGNORED]


def test_metrics_over_batches_equal_those_of_all_targets(model: torch.nn.Module) -> None:
    metric, nll, right = TokenMetric(), [], []
    for examples in (EXAMPLES[:2], EXAMPLES[2:]):
        batch = TokenCollator(0)(examples)
        logits = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits.detach()
        metric.update(logits, batch)
        for row, labels in enumerate(batch["labels"]):
            for t in range(1, len(labels)):
                if labels[t] != IGNORED:
                    nll.append(-float(logits[row, t - 1].log_softmax(-1)[labels[t]]))
                    right.append(int(logits[row, t - 1].argmax()) == int(labels[t]))
    assert metric.compute() == {
        "perplexity": pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5),
        "token_accuracy": pytest.approx(sum(right) / len(right)),
    }
    assert TokenMetric().compute() == {}

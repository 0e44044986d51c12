"""What is kept of each test example, and what it brings to a metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rgft.bench.finals import Finals, final_results
from rgft.bench.outcomes import Outcomes, by_example, examples_of_test
from rgft.bench.paired import difference, said
from rgft.evaluation import evaluate
from rgft.tasks.base import PreparedTask
from rgft.tasks.metrics import OfWholeSplit, classification
from rgft.tasks.token_loss import IGNORED, TokenMetric, number_of_targets, token_losses
from tests.unit.bench.test_table import write

OF_40 = {split: {"examples": 40, "sha256": split} for split in ("train", "test")}


class Classes(nn.Module):
    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.stack([input_ids.sum(1), input_ids[:, 0] * 2.0], 1).float()


def texts(count: int) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 5, (count,), generator=draw).tolist()
    return [
        {"input_ids": torch.randint(0, 3, (n,), generator=draw).tolist(), "labels": number % 2}
        for number, n in enumerate(lengths)
    ]


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "labels": torch.tensor([row["labels"] for row in rows])}


def of_classes(rows: list[dict[str, Any]]) -> PreparedTask:
    return PreparedTask(
        model=Classes(), processor=None, train=rows, validation=None, test=rows, collate=padded,
        loss=lambda model, batch: nn.functional.cross_entropy(
            model(batch["input_ids"]), batch["labels"], reduction="none"
        ),
        metric=lambda: OfWholeSplit(classification),
    )  # fmt: skip


def test_values_by_example_have_the_metrics_of_the_split_as_their_means() -> None:
    rows = texts(23)
    task = of_classes(rows)
    outcomes = Outcomes(task, rows)
    metrics = evaluate(task, rows, batch_size=4, loss=task.loss, observer=outcomes.observe)
    metrics["top1_error"] = 1 - metrics["accuracy"]
    result = {"outcomes": outcomes.to_dict(), "metrics": {"test": metrics}}
    assert set(result["outcomes"]) == {"loss", "predicted", "label"}
    values = {name: by_example(result, name) for name in ("loss", "accuracy", "top1_error", "f1", "matthews")}
    means = {name: float(found.mean()) for name, found in values.items() if found is not None}
    assert means["loss"] == pytest.approx(metrics["loss"], rel=1e-3)
    assert means["accuracy"] == pytest.approx(metrics["accuracy"])
    assert means["top1_error"] == pytest.approx(metrics["top1_error"])
    assert means["f1"] == pytest.approx(metrics["f1"], abs=0.03)  # but for the jackknife's correction of its bias
    assert means["matthews"] == pytest.approx(metrics["matthews"], abs=0.03)
    alone = [
        float(task.loss(task.model, padded([row]))[0]) for row in rows
    ]  # in the split's order, whatever that of evaluation
    assert values["loss"] is not None
    assert values["loss"].tolist() == pytest.approx(alone, rel=1e-3, abs=1e-3)
    assert by_example(result, "pass@1") is None
    judged = {"samples": 4, "problems": [{"passed": count} for count in (0, 1, 4)]}
    rates = {k: by_example({"judged": judged}, f"pass@{k}") for k in (1, 2)}
    assert {k: values.tolist() for k, values in rates.items() if values is not None} == {
        1: [0.0, 0.25, 1.0], 2: [0.0, 0.5, 1.0],
    }  # fmt: skip
    of_one_class = {**result, "metrics": {"test": {**metrics, "f1": 0.5}}}
    assert by_example(of_one_class, "f1") is None
    assert by_example(of_one_class, "accuracy") is not None
    assert by_example({}, "loss") is None


def test_the_jackknife_s_values_are_those_of_leaving_out_each_example() -> None:
    rows = texts(15)
    task = of_classes(rows)
    outcomes = Outcomes(task, rows)
    whole = evaluate(task, rows, batch_size=15, loss=task.loss, observer=outcomes.observe)["matthews"]
    without = [
        evaluate(task, rest, batch_size=15, loss=task.loss)["matthews"]
        for rest in (rows[:place] + rows[place + 1 :] for place in range(15))
    ]
    result = {"outcomes": outcomes.to_dict(), "metrics": {"test": {"matthews": whole}}}
    found = by_example(result, "matthews")
    assert found is not None
    assert found.tolist() == pytest.approx([15 * whole - 14 * value for value in without])


class Tokens(nn.Module):
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Tokens.Output:
        return self.Output(nn.functional.one_hot(input_ids * 2 % 5, 5) * 1.7)


def weighed(task: PreparedTask, rows: list[dict[str, Any]], batch_size: int) -> tuple[dict[str, str], Tensor, float]:
    """What is stored where examples weigh unalike, what each brings to the split's loss, and this loss."""
    outcomes = Outcomes(task, rows)
    loss = evaluate(task, rows, batch_size=batch_size, loss=task.loss, observer=outcomes.observe)["loss"]
    stored = outcomes.to_dict()
    assert set(stored) == {"loss", "weight"}
    values = by_example({"outcomes": stored}, "loss")
    assert values is not None
    assert float(values.mean()) == pytest.approx(loss, rel=1e-3)
    return stored, values, loss


def test_of_tokens_each_text_counts_for_what_it_predicts() -> None:
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in texts(9)]

    def collate(some: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in some)
        ids, labels = (
            torch.tensor([row["input_ids"] + [fill] * (longest - len(row["input_ids"])) for row in some])
            for fill in (0, IGNORED)
        )
        return {"input_ids": ids, "labels": labels, "attention_mask": (labels != IGNORED).long()}

    task = PreparedTask(
        model=Tokens(), processor=None, train=rows, validation=None, test=rows, collate=collate, loss=token_losses,
        metric=TokenMetric, weight=number_of_targets, primary_metric="loss",
    )  # fmt: skip
    _, values, _ = weighed(task, rows, batch_size=2)
    assert len(values) == 9
    assert len(set(values.tolist())) > 1


def test_rows_of_one_question_are_one_example() -> None:
    rows = texts(6)
    task = of_classes(rows)
    groups = [7, -1, 2, 7, 7, 2]

    def collate(some: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {**padded(some), "groups": torch.tensor([groups[rows.index(row)] for row in some])}

    task.collate = collate
    stored, values, loss = weighed(task, rows, batch_size=4)
    alone = [float(task.loss(task.model, padded([row]))[0]) for row in rows]
    deviations = torch.tensor([alone[row] - loss for row in range(6)], dtype=torch.float64)
    by_question = torch.stack([deviations[[1]].sum(), deviations[[2, 5]].sum(), deviations[[0, 3, 4]].sum()])
    assert values.tolist() == pytest.approx((loss + by_question * 3 / 6).tolist(), rel=1e-2, abs=1e-3)
    # Six rows, but three questions, by which the least error of a score goes.
    assert examples_of_test({"outcomes": stored, "data": {"test": {"examples": 6}}}) == 3
    assert examples_of_test({"data": {"test": {"examples": 6}}}) == 6
    assert examples_of_test({}) is None


def test_rows_that_are_each_alone_are_examples() -> None:
    rows = texts(6)
    task = of_classes(rows)
    plain, told = Outcomes(task, rows), Outcomes(task, rows)
    evaluate(task, rows, batch_size=4, loss=task.loss, observer=plain.observe)
    task.collate = lambda some: {**padded(some), "groups": torch.full((len(some),), -1)}
    evaluate(task, rows, batch_size=4, loss=task.loss, observer=told.observe)
    assert told.to_dict() == plain.to_dict()
    assert set(told.to_dict()) == {"loss", "predicted", "label"}


def packed(hits: list[int]) -> dict[str, str]:
    rows = [{"input_ids": [0, 1] if hit else [1, 0], "labels": 0} for hit in hits]
    task = of_classes(rows)
    outcomes = Outcomes(task, rows)
    evaluate(task, rows, batch_size=8, loss=task.loss, observer=outcomes.observe)
    return {name: text for name, text in outcomes.to_dict().items() if name != "loss"}


def two(folder: Path) -> tuple[Finals, Finals]:
    rows = {row.label: row for rows in final_results(folder).values() for row in rows}
    return rows["rgft"], rows["full"]


def test_what_few_test_examples_say_is_undecided_whatever_seeds_agree_on(tmp_path: Path) -> None:
    hits = {"rgft": [1] * 30 + [0] * 10, "full": [1] * 24 + [0] * 10 + [1, 1, 1, 1, 0, 0]}
    for label, of_label in hits.items():
        for seed in range(5):
            mine = [*of_label[:39], seed % 2]
            metrics = {"test": {"loss": 1 - sum(mine) / 40, "accuracy": sum(mine) / 40}}
            write(tmp_path, label, seed, 0.0, outcomes=packed(mine), data=OF_40, metrics=metrics)
    found = difference(*two(tmp_path), "accuracy")
    # Ten of forty fell out differently, six in favour: each seed says the same of them.
    differing = torch.tensor([0.0] * 24 + [1.0] * 6 + [0.0] * 4 + [-1.0] * 4 + [0.0, 0.0], dtype=torch.float64)
    assert found.difference == pytest.approx(float(differing.mean()))
    assert found.standard_error == pytest.approx(float(differing.std()) / 40**0.5)
    assert (found.verdict, found.over_seeds_alone) == ("undecided", False)
    write(tmp_path, "full", 4, 0.275, data=OF_40)  # one run that does not say
    assert difference(*two(tmp_path), "accuracy").over_seeds_alone


def test_without_outcomes_it_is_said_that_seeds_alone_decide(tmp_path: Path) -> None:
    for seed in range(5):
        write(tmp_path, "rgft", seed, 0.4 + seed / 900, data=OF_40)
        write(tmp_path, "full", seed, 0.5 + seed / 500, data=OF_40, outcomes=packed([1] * 40))
    assert said(difference(*two(tmp_path), "loss")) == "better (over seeds alone)"
    assert difference(*two(tmp_path), "accuracy").over_seeds_alone

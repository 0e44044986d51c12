from pathlib import Path
from typing import Any

import pytest

from rgft.bench.finals import final_results
from rgft.bench.table import markdown
from tests.unit.bench.test_table import write


def row(table: str, start: str) -> str:
    return next(line for line in table.splitlines() if line.startswith(f"| {start}"))


def data(test: int) -> dict[str, Any]:
    return {split: {"examples": test, "sha256": split} for split in ("train", "test")}


def test_a_metric_that_one_task_lacks_is_no_trouble_to_the_others(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path / "a", "rgft", seed, 0.4 + seed / 50)
        write(tmp_path / "b", "rgft", seed, 0.4, task={"name": "superglue", "task": "stsb", "train_size": 8},
              metrics={"test": {"loss": 1.0, "pearson": 0.8}})  # fmt: skip
        write(tmp_path / "c", "rgft", seed, 0.4, task={"name": "language", "train_size": 8},
              metrics={"test": {"loss": 1.0, "perplexity": 2.7}})  # fmt: skip
    table = markdown(tmp_path)
    assert "| pearson | held-out loss |" in table
    assert "| 0.800 ± 0.000 | 1.000 ± 0.000 |" in table
    assert "| not measured | 1.000 ± 0.000 |" in table
    assert "| 0.580 ± 0.020 | 0.420 ± 0.020 |" in table


def test_a_mean_over_the_runs_in_which_a_metric_is_defined_would_flatter(tmp_path: Path) -> None:
    for seed in range(3):
        for label in ("rgft", "lora", "last_n"):
            scores = {"matthews": 0.3 + seed / 100} if label == "rgft" or seed == 0 else {}
            loss = 0.4 + seed / 100 + (label != "rgft") * (0.1 + seed / 90)
            undefined = {"test": {"matthews": "fewer than two classes"}} if not scores else {}
            scores = {} if label == "last_n" else scores
            write(tmp_path, label, seed, 0.4, task="cola", metrics={"test": {"loss": loss, **scores}},
                  undefined_metrics=undefined if label == "lora" else {})  # fmt: skip
    table = markdown(tmp_path)
    assert "| 0.310 ± 0.010 |" in row(table, "rgft")
    assert "| undefined (2 of 3 seeds) |" in row(table, "lora")
    assert "| not measured |" in row(table, "last_n")
    for label in ("lora", "last_n"):
        assert row(table, label).endswith("| better° |")  # by the loss, which is there
        assert row(table, label).count("[") == 1


def test_the_number_of_pairs_is_there_where_it_is_not_that_of_the_row_s_seeds(tmp_path: Path) -> None:
    for seed in range(5):
        write(tmp_path, "rgft", seed, 0.4 + seed / 50)
        write(tmp_path, "lora", seed, 0.5 + seed / 40)
    for seed in range(3, 9):
        write(tmp_path, "last_n", seed, 0.5 + seed / 40)
    table = markdown(tmp_path)
    assert "pairs" not in row(table, "lora")
    assert row(table, "last_n (6 seeds)").count("(2 pairs)") == 2


def test_two_models_in_one_folder_are_two_comparisons(tmp_path: Path) -> None:
    for model, size in (("smollm2", 10), ("gpt2", 12)):
        for seed in range(2):
            task = {"name": "language", "train_size": 8, "model": model}
            write(tmp_path / model, "rgft", seed, 0.4, task=task, data=data(size))
    for seed in range(2):
        write(tmp_path / "small", "rgft", seed, 0.4, task={"name": "language", "train_size": 8}, data=data(10),
              run={"epochs": 3.0, "batch_size": 4})  # fmt: skip
    found = final_results(tmp_path)
    assert [group.title for group in found] == [
        "language modelling (python), 8 examples, 3 epochs, batch_size 32",
        "language modelling (python), 8 examples, 3 epochs, batch_size 4",
        "language modelling (python), gpt2, 8 examples, 3 epochs",
    ]
    assert [len(rows) for rows in found.values()] == [1, 1, 1]
    assert [rows[0].test_examples for rows in found.values()] == [10, 10, 12]


@pytest.mark.parametrize(
    ("label", "budget", "shown"),
    [("rgft-1.0", 1.0, "rgft"), ("rgft-1", 1.0, "rgft"), ("rgft-0.1", 0.1, "rgft"), ("rgft-0.10", 0.1, "rgft"),
     ("full-stopped-2e-4", 0.3, "full-stopped-2e-4"), ("rgft-0.1", 0.3, "rgft-0.1"), ("full-whole", 1.0, "full-whole"),
     ("0.3", 0.3, "0.3"), ("rgft-1e-1", 0.1, "rgft-1e-1")],
)  # fmt: skip
def test_a_row_s_label_is_without_its_budget(tmp_path: Path, label: str, budget: float, shown: str) -> None:
    write(tmp_path, label, 0, 0.4, method="rgft", budget=budget)
    ((finals,),) = final_results(tmp_path).values()
    assert (finals.label, finals.budget) == (shown, budget)


def test_one_label_with_two_settings_is_two_rows(tmp_path: Path) -> None:
    for folder, rank in (("a", 8), ("b", 16)):
        write(tmp_path / folder, "lora", 0, 0.4, settings={"rank": rank})
        write(tmp_path / folder, "lora", 100, 0.4, settings={"rank": rank}, kind="tuning", budget=0.3)
    write(tmp_path / "b", "lora", 101, 0.4, settings={"rank": 16}, kind="tuning")
    (rows,) = final_results(tmp_path).values()
    assert {finals.label: round(finals.tuning.flops, 6) for finals in rows} == {
        'lora {"rank": 8}': 0.3, 'lora {"rank": 16}': 0.6,
    }  # fmt: skip


def test_tuning_of_a_contender_without_any_is_nothing(tmp_path: Path) -> None:
    for seed in (100, 101, 102):
        write(tmp_path, "rgft", seed, 0.4, kind="tuning", ledger={"flops": {"fraction_of_full": 0.29}})
    write(tmp_path, "rgft", 0, 0.4)
    write(tmp_path, "rgft-auto", 0, 0.4, method="rgft", settings={"lr": "auto"})
    table = markdown(tmp_path)
    assert row(table, "rgft (1 seed)").startswith("| rgft (1 seed) | 0.0001 | 0.9 | 0.30 |")
    assert row(table, "rgft-auto").startswith("| rgft-auto (1 seed) | 0.0001 | 0.0 | 0.30 |")


def test_a_rate_at_the_edge_of_what_was_tried_is_marked(tmp_path: Path) -> None:
    for label, rates in (("rgft", (5e-5, 1e-4, 2e-4)), ("lora", (1e-4, 2e-4)), ("last_n", (1e-4,))):
        for rate in rates:
            write(tmp_path, label, 100, 0.4, kind="tuning", lr=rate)
        write(tmp_path, label, 0, 0.4, lr=1e-4)
    table = markdown(tmp_path)
    assert "| 0.0001 |" in row(table, "rgft")
    assert "| 0.0001 ‡ |" in row(table, "lora")
    assert "| 0.0001 |" in row(table, "last_n")


def test_a_variant_that_won_on_one_task_is_the_same_contender_as_on_others(tmp_path: Path) -> None:
    won = {"variant": "rank-32", "settings": {"rank": 32}, "settings_but_for_it": {}}
    for seed in range(3):
        write(tmp_path / "a", "lora", seed, 0.4 + seed / 50, **won)
        write(tmp_path / "b", "lora", seed, 0.4 + seed / 50, task="cola")
    first, second = (rows[0] for rows in final_results(tmp_path).values())
    assert first.kind == second.kind
    assert {first.title, second.title} == {"lora", "lora, rank-32"}
    assert "| lora, rank-32 (3 seeds) |" in markdown(tmp_path)

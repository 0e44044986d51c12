import json
from pathlib import Path
from typing import Any

import pytest

from rgft.bench.finals import final_results
from rgft.bench.frontier import frontiers
from rgft.bench.methods import METHODS
from rgft.bench.table import END, START, markdown, update
from rgft.errors import DataError


def write(
    folder: Path, label: str, seed: int, loss: float, *, kind: str = "final", task: str | dict[str, Any] = "sst2",
    method: str = "", budget: float = 0.3, **more: Any,
) -> None:  # fmt: skip
    """A result of a task, by name or by settings; `more` is laid over it."""
    folder.mkdir(exist_ok=True, parents=True)
    known = METHODS.get(method or label)
    result = {
        "method": method or label, "revision": known.revision if known else 1, "contender": label, "seed": seed,
        "task": {"name": task, "train_size": 2000} if isinstance(task, str) else task, "run": {"epochs": 3.0},
        "lr": 1e-4, "budget": budget, "steps": 10 if label == "full" else 25, "seconds": 100 * budget, "settings": {},
        "metrics": {"test": {"loss": loss, "accuracy": 1 - loss}}, "ledger": {"flops": {"fraction_of_full": budget}},
        **more,
    }  # fmt: skip
    (folder / f"{label}--{kind}--lr{result['lr']:g}--seed{seed}.json").write_text(json.dumps(result))


def test_table_compares_seed_by_seed_and_ignores_tuning_runs(tmp_path: Path) -> None:
    for seed, (rgft, full) in enumerate([(0.40, 0.45), (0.50, 0.56), (0.30, 0.34)]):
        write(tmp_path, "rgft", seed, rgft)
        write(tmp_path, "full", seed, full)
    for number in range(8):
        write(tmp_path, "rgft", 100 + number, 9.0, kind="tuning")
    write(tmp_path, "rgft", 200, 9.0, kind="tuning", metrics={}, diverged="too high")
    diverged = tmp_path / "rgft--tuning--lr0.0001--seed200.json"
    without = {key: value for key, value in json.loads(diverged.read_text()).items() if key != "ledger"}
    diverged.write_text(json.dumps(without))
    table = markdown(tmp_path)
    rgft, full = (line for line in table.splitlines() if "3 seeds" in line)
    assert rgft.startswith("| rgft (3 seeds) | 0.0001 | 2.4 | 0.30 | 25 | 0.600 ± 0.100 | 0.400 ± 0.100 |")
    assert full.count("+0.050 [+0.025, +0.075]") == 2
    assert full.endswith("| better° |")


def test_seeds_that_diverged_are_counted_and_in_no_mean(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for seed in range(3):
        write(tmp_path, "rgft", seed, 0.4)
        write(tmp_path, "full", seed, 0.5)
        write(tmp_path, "lora", seed, 0.5)
    for path in (tmp_path / "full--final--lr0.0001--seed1.json", *tmp_path.glob("lora--*.json")):
        result = json.loads(path.read_text())
        diverged = {key: result[key] for key in result if key not in ("steps", "seconds", "ledger")}
        path.write_text(json.dumps({**diverged, "metrics": {}, "diverged": "step 3: loss is nan"}))
    rows = markdown(tmp_path).splitlines()
    (full,) = (
        row for row in rows if row.startswith("| full (1 of 3 seeds diverged) | 0.0001 | 0.0 | 0.30 | 10 | 0.500 ")
    )
    (lora,) = (row for row in rows if row.startswith("| lora (3 of 3 seeds diverged) |"))
    assert full.count("+0.100 [+0.100, +0.100]") == 2
    assert full.endswith("| undecided |")
    assert full.count("|") == lora.count("|")
    assert "lora at 0.3: 3 of 3 seeds diverged" in caplog.text
    (frontier,) = frontiers(tmp_path, metric="loss").values()
    assert [(point.label, point.seeds) for point in frontier.points] == [("full", 2), ("rgft", 3)]
    assert frontier.left_out == {"lora at 0.3": "loss diverged"}


def test_rows_of_an_earlier_revision_say_so_until_the_present_one_has_as_many_runs(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path, "rgft", seed, 0.4)
    for path in tmp_path.glob("rgft*.json"):
        result = json.loads(path.read_text())
        del result["revision"]  # as the first had none
        path.write_text(json.dumps(result))
    assert METHODS["rgft"].revision > 1
    write(tmp_path, "full", 0, 0.4)
    write(tmp_path, "full", 1, 0.41)
    write(tmp_path / "anew", "rgft", 0, 0.3)  # beside it, and what others are compared with
    write(tmp_path / "anew", "rgft", 1, 0.3)
    table = markdown(tmp_path)
    assert "| rgft, revision 1 (3 seeds) |" in table
    assert "| rgft (2 seeds) |" in table
    full = next(line for line in table.splitlines() if line.startswith("| full (2 seeds) |"))
    assert full.count("+0.105 [+0.041, +0.169]") == 2
    assert full.endswith("| undecided |")  # two seeds are too few
    write(tmp_path / "anew", "rgft", 2, 0.3)
    table = markdown(tmp_path)
    assert "| rgft (3 seeds) |" in table
    assert "revision" not in table


def test_tasks_are_kept_apart_and_cuts_stand_beside_rgft(tmp_path: Path) -> None:
    for seed in range(2):
        write(tmp_path, "rgft", seed, 0.4 + seed / 10)
        write(tmp_path, "frozen-1", seed, 0.42 + seed / 9, method="cut")
        write(tmp_path / "other", "rgft", seed, 0.6, task="rotten_tomatoes")
    found = final_results(tmp_path)
    assert {(group.title, group.fixes_cuts): {row.label for row in rows} for group, rows in found.items()} == {
        ("SST-2, 2,000 examples, 3 epochs", False): {"rgft"},
        ("SST-2, 2,000 examples, 3 epochs", True): {"rgft", "frozen-1"},
        ("Rotten Tomatoes, 2,000 examples, 3 epochs", False): {"rgft"},
    }
    assert markdown(tmp_path).count("**") == 6


def test_budgets_have_tables_of_their_own_and_rgft_at_the_same_one_as_reference(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path, "rgft", seed, 0.40 + seed / 100)
        write(tmp_path, "rgft-0.1", seed, 0.50 + seed / 50, method="rgft", budget=0.1)
        write(
            tmp_path, "lora-0.1", seed, 0.53 + seed / 50 + abs(seed - 1) / 1000 - 0.002 / 3, method="lora", budget=0.1
        )
        write(tmp_path, "full", seed, 0.41 + seed / 80, budget=1.0)
    low, middle, high = markdown(tmp_path).split("**SST-2")[1:]
    assert "0.1 of full" in low
    lora = next(line for line in low.splitlines() if line.startswith("| lora"))
    assert lora.count("+0.030 [+0.029, +0.031]") == 2
    assert "| rgft (3 seeds)" in middle
    assert "| full (3 seeds)" in high
    assert "RGFT's at 0.3: accuracy higher by" in high  # the highest budget that it has
    interval = "+0.012 [+0.006, +0.019]"
    assert f"| {interval} | {interval} | undecided (fewer than 5 pairs, margin 0.005) |" in high


def test_update_replaces_what_is_between_the_markers_only(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text(f"a\n{START}\nold\n{END}\nb\n")
    update(document, "| new |")
    assert document.read_text() == f"a\n{START}\n\n| new |\n\n{END}\nb\n"
    document.write_text("no markers")
    with pytest.raises(DataError, match="markers"):
        update(document, "x")
    assert document.read_text() == "no markers"


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run the experiment first"):
        final_results(tmp_path)

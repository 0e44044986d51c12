from pathlib import Path

from typer.testing import CliRunner

from rgft.bench.overview import COLUMNS, overview
from rgft.cli.app import app
from tests.unit.bench.test_table import write


def rows(text: str) -> dict[str, dict[str, str]]:
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {cells[0]: dict(zip(found[0][1:], cells[1:], strict=True)) for cells in found[2:]}


def test_a_row_for_each_task_and_budget_at_which_rgft_has_runs(tmp_path: Path) -> None:
    for seed in range(3):
        off = seed / 100
        write(tmp_path, "rgft", seed, 0.40 + off)
        write(tmp_path, "rgft-auto", seed, 0.40 + 1.1 * off, method="rgft", settings={"lr": "auto"})
        write(tmp_path, "full", seed, 0.50 + 1.1 * off)
        layers = {"config": {"policy": {"layers": 6}}}
        write(tmp_path, "last-n", seed, 0.30 + 1.1 * off, method="last_n", settings=layers)
        uncached = {"config": {"policy": {"layers": 6}, "execution": {"cache": "none"}}}
        write(tmp_path, "last-n-plain", seed, 0.20, method="last_n", settings=uncached)
        write(tmp_path, "lora", seed, 0.30, settings={"rank": 64})  # not as it is compared by default
        groups = {"config": {"execution": {"positions": "auto", "padding": "auto"}}}
        write(tmp_path, "lora-groups", seed, 0.47 + 1.1 * off, method="lora", settings=groups)
        write(tmp_path, "full-1.0", seed, 0.35, method="full", budget=1.0)
        write(tmp_path, "rgft-0.1", seed, 0.60, method="rgft", budget=0.1)  # with nothing beside it
    ((title, cells),) = rows(overview(tmp_path)).items()
    assert title == "SST-2, 2,000 examples, 3 epochs, 0.3"
    assert cells.keys() < COLUMNS.keys()  # of columns that would be empty there are none
    assert cells == {
        "RGFT": "0.590, 0.410 (3)", "RGFT, untuned": "0.589, 0.411 (3)",
        "full fine-tuning, stopped": "0.489\\*°, 0.511\\*° (3)",
        "LoRA, no padding": "0.519\\*°, 0.481\\*° (3)", "last layers": "0.689†°, 0.311†° (3)",
    }  # fmt: skip


def test_untuned_runs_stand_for_rgft_where_there_are_no_others(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path, "rgft", seed, 0.40 + seed / 100, settings={"lr": "auto"})
        write(tmp_path, "full", seed, 0.50 + 1.1 * seed / 100)
    (cells,) = rows(overview(tmp_path)).values()
    assert "RGFT" not in cells
    assert cells["RGFT, untuned"] == "0.590, 0.410 (3)"
    assert cells["full fine-tuning, stopped"] == "0.489\\*°, 0.511\\*° (3)"


def test_two_seeds_have_no_mark_and_a_missing_score_says_so(tmp_path: Path) -> None:
    for seed in range(2):
        write(tmp_path, "rgft", seed, 0.4 + seed / 50)
        write(tmp_path, "full", seed, 0.9 + seed / 40, metrics={"test": {"loss": 0.9 + seed / 40}})
    (cells,) = rows(overview(tmp_path)).values()
    assert cells["full fine-tuning, stopped"] == "not measured, 0.913 (2)"


def test_the_command_line_puts_it_into_a_document(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path / "results", "rgft", seed, 0.4)
        write(tmp_path / "results", "full", seed, 0.5)
    document = tmp_path / "README.md"
    document.write_text("a\n<!-- results -->\nold\n<!-- /results -->\nb\n")
    given = ["bench", "table", str(tmp_path / "results"), "--overview", "--update", str(document)]
    assert CliRunner().invoke(app, given).exit_code == 0
    text = document.read_text()
    assert text.startswith("a\n<!-- results -->\n\n| ")
    assert text.endswith("<!-- /results -->\nb\n")
    assert "0.600, 0.400 (3)" in text
    assert "old" not in text

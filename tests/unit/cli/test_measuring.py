"""`rgft bench reach`, `engine-table`, `map-study` and `map-summary` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rgft.bench.engine.runner import SCHEMA
from rgft.bench.map_study import runner
from rgft.bench.table import END, START
from tests.integration.cli_inputs import invoke, refused
from tests.unit.bench.test_convergence import CURVE, write
from tests.unit.bench.tiny_texts import in_place_of_bench_task


def test_reach(tmp_path: Path) -> None:
    write(tmp_path, "a", 0, {"along": CURVE})
    write(tmp_path, "b", 0, {"along": CURVE[:1]})
    for seed in (1, 2):
        write(tmp_path, "a", seed, {"along": CURVE[1:]})
        write(tmp_path, "b", seed, {"along": CURVE[:1]})
    write(tmp_path, "c", 0, {"along": CURVE[:1]}, jobs=2)
    write(tmp_path, "c", 1, {"along": CURVE}, jobs=2)
    write(tmp_path, "c", 2, {"along": CURVE[2:]}, jobs=2)
    shown = invoke("bench", "reach", str(tmp_path), "--target", "0.5", "--baseline", "b").stdout.splitlines()
    assert (
        "  a at 0.3 (3 of 3 runs): 0.200 of full fine-tuning's FLOPs, 200 steps, 0.60 epochs, 20 s; best loss 0.400"
        in shown
    )
    assert any(line.startswith("  b at 0.3 (0 of 3 runs): not reached; > 0.100 of full") for line in shown)
    assert any("0.300 (0.200 … not reached) of full" in line and "30 (20 … not reached) s (run with" in line
               for line in shown)  # fmt: skip
    assert "      FLOPs: at most 2.000 times the baseline's [2.000, 2.000], 3 pairs: undecided (no spread)" in shown
    assert "      not comparable with the baseline: both did not get there with some seeds (1 and 3 of 3)" in shown
    rows = json.loads(invoke("bench", "reach", str(tmp_path), "--of", "a", "--json").stdout)
    assert [[row["label"], row["reached"], row["flops"]["median"]] for row in next(iter(rows.values()))] == [
        ["a", 3, 0.2], ["c", 2, 0.3], ["b", 0, None],
    ]  # fmt: skip
    refused("bench", "reach", str(tmp_path), "--target", "0.5", "--metric", "f1")
    assert not any("held against nothing" in line for line in shown)
    for seed in (0, 1):  # on another task, and with cuts fixed by hand: neither has the baseline
        write(tmp_path / "bbc", "a", seed, {"along": CURVE}, task={"name": "bbc"})
        write(tmp_path / "cuts", "a", seed, {"along": CURVE}, method="cut", settings={"frozen": seed})
    shown = invoke("bench", "reach", str(tmp_path), "--target", "0.5", "--baseline", "b").stdout.splitlines()
    alone = [place for place, line in enumerate(shown) if "held against nothing: no run of b here" in line]
    titles = [place for place, line in enumerate(shown) if line.endswith(": loss 0.500")]
    assert len(titles) == 3
    assert [max(title for title in titles if title < place) for place in alone] == titles[1:]
    by_title = json.loads(invoke("bench", "reach", str(tmp_path), "--target", "0.5", "--json").stdout)
    assert [len(rows) for rows in by_title.values()] == [3, 2, 1]
    assert "the cut fixed by hand" in list(by_title)[1]
    refused("bench", "reach", str(tmp_path), "--target", "0.5", "--baseline", "d")


def test_tables_of_the_engine_bench(tmp_path: Path) -> None:
    environment = {"cpu": {"usable_cores": 2, "model": "Z80"}, "accelerators": [{"type": "cuda", "name": "K1"}]}
    for device, time in (("cpu", 0.5), ("cuda", 0.25)):
        result = {
            "schema": SCHEMA, "workload": "w", "device": device, "rows": 4, "dtype": "float32", "cell": f"c{device}",
            "flops_of_full": 0.4, "time_of_full": time, "seconds_of_predicted": 1.1,
            "memory": {"total": 5 << 20, "weights": 2 << 20}, "environment": environment,
        }  # fmt: skip
        (tmp_path / f"w-{device}").mkdir()
        (tmp_path / f"w-{device}" / "c.json").write_text(json.dumps(result))
    overhead = {"schema": "rgft.overheads/1", "overhead": "o", "measured_on": "cpu", "figures": {"f": 0.5},
                "targets": [{"figure": "f", "at_least": None, "at_most": 1.0, "is_met": True}]}  # fmt: skip
    (tmp_path / "o.json").write_text(json.dumps(overhead))
    page = tmp_path / "page.md"
    page.write_text("Before\n<!-- results -->\nold\n<!-- /results -->\nAfter")
    invoke("bench", "engine-table", str(tmp_path), "--update", str(page))
    shown = page.read_text().splitlines()
    assert (shown[0], shown[-1], shown.count("old")) == ("Before", "After", 0)
    for line in (
        "**w, 4 rows, float32, 2 cores, Z80**", "| w | ccpu | 0.40 | 0.50 | 3 MiB | 1.10 |",
        "**w, 4 rows, float32, K1**", "| w | ccuda | 0.40 | 0.25 | 3 MiB | 1.10 |", "| o | cpu | f | 0.5 | ≤ 1 | yes |",
    ):  # fmt: skip
        assert line in shown
    refused("bench", "engine-table", str(tmp_path / "nothing"))


def test_a_map_study_and_its_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "bench_task", in_place_of_bench_task([]))
    study = {"name": "s", "task": {}, "seeds": [0], "steps": 2, "alone_steps": 1, "batch_size": 8, "looks": 2,
             "probe_size": 8, "examples": 8, "signals": {"taylor": {"name": "taylor"}}}  # fmt: skip
    (tmp_path / "study.json").write_text(json.dumps(study))
    command = ["bench", "map-study", str(tmp_path / "study.json"), "--results", str(tmp_path / "results")]
    invoke(*command, "--device", "cpu", "--minutes", "-1")
    path = tmp_path / "results" / "s" / "map-study--seed0.json"
    assert not path.exists()
    assert str(path) in invoke(*command, "--device", "cpu", "--minutes", "9", "--jobs", "1").stdout
    assert json.loads(path.read_text())["device"] == "cpu"
    refused(*command, "--jobs", "0")
    refused(*command, "--device", "no_such_device")
    assert "| taylor |" in invoke("bench", "map-summary", str(tmp_path / "results")).stdout
    refused("bench", "map-summary", str(tmp_path / "nothing"))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    invoke("bench", "map-summary", str(tmp_path / "results"), "--update", str(page))
    assert "| taylor |" in page.read_text()
    assert "old" not in page.read_text()
    shown = invoke(
        "bench", "map-history", str(tmp_path / "results"), "--signal", "taylor", "--picture", str(tmp_path / "e.svg")
    ).stdout
    assert "**s, one seed**\n\n|  | step 0 (0%) | step 2 (100%) |" in shown
    assert (tmp_path / "e.svg").read_text().startswith("<?xml")
    (history,) = json.loads(
        invoke("bench", "map-history", str(tmp_path / "results"), "--signal", "taylor", "--json").stdout
    )
    stored = json.loads(path.read_text())["error_maps"]["taylor"]
    assert {name: values[-1] for name, values in history["components"].items()} == {
        name: [pytest.approx(value)] for name, value in stored.items()
    }
    refused(
        "bench", "map-history", str(tmp_path / "results"), "--signal", "taylor", "--picture", str(tmp_path / "e.pdf")
    )
    refused("bench", "map-history", str(tmp_path / "results"), "--signal", "suppression")
    (tmp_path / "study.json").write_text("{}")
    refused("bench", "map-study", str(tmp_path / "study.json"))

"""`rgft bench reach`, `engine-table`, `map-study` and `map-summary` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rgft.bench.engine.runner import SCHEMA
from rgft.bench.map_study import runner
from tests.integration.cli_inputs import invoke, refused
from tests.unit.bench.test_convergence import CURVE, write
from tests.unit.bench.tiny_texts import in_place_of_bench_task


def test_reach(tmp_path: Path) -> None:
    write(tmp_path, "a", 0, {"along": CURVE})
    write(tmp_path, "b", 0, {"along": CURVE[:1]})
    shown = invoke("bench", "reach", str(tmp_path), "--target", "0.5").stdout
    assert "a (1 of 1 runs): 0.200 of full fine-tuning's FLOPs, 0.60 epochs, 20 s" in shown
    assert "b (0 of 1 runs): not reached" in shown
    (rows,) = json.loads(invoke("bench", "reach", str(tmp_path), "--of", "a", "--json").stdout).values()
    assert [row["reached"] for row in rows] == [1, 0]
    refused("bench", "reach", str(tmp_path), "--target", "0.5", "--metric", "f1")


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
    invoke("bench", "map-study", str(tmp_path / "study.json"), "--results", str(tmp_path / "results"))
    assert (tmp_path / "results" / "s" / "map-study--seed0.json").exists()
    assert "| taylor |" in invoke("bench", "map-summary", str(tmp_path / "results")).stdout
    refused("bench", "map-summary", str(tmp_path / "nothing"))
    (tmp_path / "study.json").write_text("{}")
    refused("bench", "map-study", str(tmp_path / "study.json"))

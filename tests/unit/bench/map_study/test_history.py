"""E over time, of studies and of runs that kept their maps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rgft.bench.map_study.history import histories, layer_and_kind, markdown
from rgft.bench.map_study.history_picture import draw
from rgft.errors import DataError
from tests.unit.bench.test_convergence import write

PARTS = ("emb", "layer.0.attention", "layer.0.ffn", "layer.1.attention", "layer.1.ffn", "classifier")


def scores(*values: float) -> dict[str, float]:
    return dict(zip(PARTS, values, strict=True))


def write_study(folder: Path, seed: int, *looks: Mapping[str, float]) -> None:
    folder.mkdir(exist_ok=True)
    result = {
        "schema": "rgft.map_study/1", "study": "s", "seed": seed, "settings": {"steps": 10},
        "components": [{"name": name} for name in PARTS],
        "maps": {"taylor": [{"step": 10 * place, "scores": look} for place, look in enumerate(looks)]},
        "error_maps": {}, "harm": {}, "gain_alone": {},
    }  # fmt: skip
    (folder / f"map-study--seed{seed}.json").write_text(json.dumps(result))


def test_names_say_layer_and_kind() -> None:
    assert layer_and_kind("bert.encoder.layer.3.attention.head.5") == ("bert.encoder.layer.3", "attention.head")
    assert layer_and_kind("bert.encoder.layer.3.ffn") == ("bert.encoder.layer.3", "ffn")
    assert layer_and_kind("blocks.2.1") == ("blocks.2.1", "layer")
    assert layer_and_kind("model.layers.0.mlp.expert.7") == ("model.layers.0", "mlp.expert")
    assert layer_and_kind("bert.embeddings") == ("bert.embeddings", "")


def test_a_study_s_map_after_each_look_by_layer_and_by_kind(tmp_path: Path) -> None:
    write_study(tmp_path, 0, scores(0, 1, 3, 5, 7, 9), scores(0, 1, 3, 5, 7, 9))
    write_study(tmp_path, 1, scores(0, 3, 5, 7, 9, 1), scores(6, 0, 0, 0, 0, 0))
    (history,) = histories(tmp_path, signal="taylor")
    assert (history.seeds, history.steps, history.shares) == (2, (0, 10), (0.0, 1.0))
    assert history.layers["layer.0"][0] == (pytest.approx(2.0), pytest.approx(4.0))
    assert history.layers["classifier"][0] == (pytest.approx(9.0), pytest.approx(1.0))
    assert history.kinds["attention"][0] == (pytest.approx(3.0), pytest.approx(5.0))
    # E = (0.9 · 0.1 · first + 0.1 · second) / (1 − 0.81)
    assert history.layers["emb"][1] == (0.0, pytest.approx(0.6 / 0.19))
    assert history.kinds["ffn"][1] == (pytest.approx(5.0), pytest.approx(0.09 * 7.0 / 0.19))
    # In seed 1 the embeddings go from the last place to the third: past three that lose a place each.
    assert history.likeness == (pytest.approx((1.0 + 1.0 - 6 * (9 + 3) / 210) / 2), pytest.approx(1.0))
    shown = markdown([history])
    assert "| all layers: ffn | 6 ± 1 |" in shown
    assert "**s, 2 seeds**" in shown


def test_runs_with_another_number_of_looks_stand_apart(tmp_path: Path) -> None:
    def run(seed: int, *values: float) -> None:
        history: list[Any] = [
            [10 * place, {"layer.0": value, "layer.1": 1.0, "c": 0.0}] for place, value in enumerate(values)
        ]
        write(tmp_path, "rgft", seed, {})
        path = next(tmp_path.glob(f"**/rgft--final--*seed{seed}.json"))
        config = {"signal": {"name": "generalising_decrease"}}
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "map_history": history, "config": config, "steps": 40})
        )

    run(0, 2.0, 4.0)
    run(1, 4.0, 0.5)
    run(2, 1.0, 2.0, 3.0)
    write(tmp_path, "full", 0, {})  # which measures nothing
    two, three = histories(tmp_path)
    assert two.title.endswith(", 2 looks")
    assert (two.seeds, two.shares, two.layers["layer.0"]) == (2, (0.0, 0.25), ((2.0, 4.0), (4.0, 0.5)))
    assert two.likeness[0] == pytest.approx((1.0 + 0.5) / 2)
    assert (three.seeds, len(three.steps)) == (1, 3)
    assert "± " not in markdown([three]).splitlines()[4]
    with pytest.raises(DataError, match="maps of 'taylor'; found none"):
        histories(tmp_path, signal="taylor")


def test_the_picture_has_a_panel_for_each(tmp_path: Path) -> None:
    write_study(tmp_path, 0, scores(0, 1, 3, 5, 7, 9), scores(0, 1, 3, 5, 7, 9))
    found = histories(tmp_path, signal="taylor")
    text = draw(found * 2, tmp_path / "maps" / "e.svg").read_text()
    assert text.count("<!-- layer.0.attention -->") == 2
    with pytest.raises(DataError, match=r"ends in .svg or .png"):
        draw(found, tmp_path / "e.pdf")


def test_committed_runs_of_rgft_have_one() -> None:
    (history,) = histories(Path("benchmarks/results/earlier/before_the_readout/mrpc"))
    assert history.seeds == 5
    assert [len(values) for values in history.components["bert.encoder.layer.0"]] == [5, 5]

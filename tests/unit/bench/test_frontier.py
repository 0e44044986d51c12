from pathlib import Path

import pytest

from rgft.bench.frontier import frontiers
from rgft.bench.frontier_picture import draw
from rgft.errors import DataError
from tests.unit.bench.test_table import write


def results(folder: Path) -> None:
    for seed in range(2):
        write(folder, "rgft", seed, 0.40 + seed / 100)
        write(folder, "lora", seed, 0.45 + seed / 100, budget=0.299)  # as dear, but for the last step
        write(folder, "rgft-0.1", seed, 0.50 + seed / 100, method="rgft", budget=0.1)
        write(folder, "full", seed, 0.41 + seed / 100, budget=1.0)


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
@pytest.mark.parametrize("against", ["flops", "seconds"])
def test_what_nothing_beats_at_its_cost_is_on_the_frontier(tmp_path: Path, metric: str, against: str) -> None:
    results(tmp_path)
    (frontier,) = frontiers(tmp_path, metric=metric, against=against).values()  # type: ignore[arg-type]
    points = frontier.points
    assert [point.label for point in points] == ["rgft", "lora", "rgft", "full"]
    assert [point.is_on_frontier for point in points] == [True, False, True, False]
    assert points[0].error == pytest.approx(0.005)


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_a_picture(tmp_path: Path, ending: str) -> None:
    results(tmp_path)
    found = frontiers(tmp_path, metric="loss")
    path = draw(found, tmp_path / f"out/frontier.{ending}", against="flops")
    content = path.read_bytes()
    assert content.startswith(b"<?xml" if ending == "svg" else b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(DataError, match=r"ends in \.svg or \.png"):
        draw(found, tmp_path / "frontier.txt", against="flops")

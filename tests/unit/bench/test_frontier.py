from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex
from typer.testing import CliRunner

from rgft.bench.costs import Cost
from rgft.bench.finals import Kind
from rgft.bench.frontier import Frontier, frontiers
from rgft.bench.frontier_picture import COLUMNS, draw, figure, styles
from rgft.bench.methods import METHODS
from rgft.cli.app import app
from rgft.errors import DataError
from tests.unit.bench.test_table import write


def results(folder: Path, **more: Any) -> None:
    for seed in range(2):
        write(folder, "rgft", seed, 0.40 + seed / 100, **more)
        write(folder, "lora", seed, 0.45 + seed / 100, budget=0.299, **more)  # as dear, but for the last step
        write(folder, "rgft-0.1", seed, 0.50 + seed / 100, method="rgft", budget=0.1, **more)
        write(folder, "full", seed, 0.41 + seed / 100, budget=1.0, **more)


def only(found: dict[Any, Frontier]) -> Frontier:
    (frontier,) = found.values()
    return frontier


def kind(method: str, settings: str = "{}") -> Kind:
    return Kind(method, settings, METHODS[method].revision)


@pytest.mark.parametrize("metric", ["loss", "accuracy", "score"])
@pytest.mark.parametrize("against", ["flops", "seconds"])
def test_what_nothing_beats_at_its_cost_is_on_the_frontier(tmp_path: Path, metric: str, against: str) -> None:
    results(tmp_path)
    frontier = only(frontiers(tmp_path, metric=metric, against=against))  # type: ignore[arg-type]
    assert frontier.metric == ("loss" if metric == "loss" else "accuracy")
    assert [point.label for point in frontier.points] == ["rgft", "lora", "rgft", "full"]
    assert [point.is_on_frontier for point in frontier.points] == [True, False, True, False]
    assert frontier.points[0].error == pytest.approx(0.005)
    assert frontier.left_out == {}


def test_contenders_and_tasks_without_the_metric_are_left_out_and_named(tmp_path: Path) -> None:
    results(tmp_path / "a")
    write(tmp_path / "a", "last_n", 0, 0.4, metrics={"test": {"loss": 0.4}})
    write(tmp_path / "b", "rgft", 0, 0.4, task={"name": "language", "train_size": 8}, metrics={"test": {"loss": 0.4}})
    found = {group.title.split(",")[0]: frontier for group, frontier in frontiers(tmp_path, metric="accuracy").items()}
    assert found["SST-2"].left_out == {"last_n at 0.3": "accuracy not measured"}
    assert len(found["SST-2"].points) == 4
    assert (found["language modelling (python)"].points, len(found["language modelling (python)"].left_out)) == ([], 1)
    shown = CliRunner().invoke(app, ["bench", "frontier", str(tmp_path), "--metric", "accuracy"])
    assert shown.exit_code == 0, shown.output
    assert "left out: SST-2, 2,000 examples, 3 epochs: last_n at 0.3: accuracy not measured\n" in shown.output
    assert "left out: language modelling (python), 8 examples, 3 epochs: accuracy not measured\n" in shown.output
    with pytest.raises(DataError, match="expected results with the metric 'bleu'"):
        frontiers(tmp_path, metric="bleu")


def test_seconds_are_compared_of_runs_alone_on_one_machine(tmp_path: Path) -> None:
    here, there = ({"cpu": {"model": name}, "torch": {"threads": 2}} for name in ("here", "there"))
    results(tmp_path, environment=here, jobs=1)
    write(tmp_path, "last_n", 0, 0.4, environment=there, jobs=1)
    write(tmp_path, "lisa", 0, 0.4, environment=here, jobs=2)
    write(tmp_path, "lisa", 1, 0.4, environment=there)
    write(tmp_path, "badam", 0, 0.4, environment=here, jobs=2)
    write(tmp_path, "hft", 0, 0.2, environment=here, jobs=2)
    write(tmp_path, "hft", 1, 0.6, environment=here, jobs=1)
    write(tmp_path, "ist", 0, 0.4, environment=here, jobs=1, device="cuda")
    frontier = only(frontiers(tmp_path, metric="loss", against="seconds"))
    assert frontier.left_out == {
        "last_n at 0.3": "run on another machine", "ist at 0.3": "run on another machine",
        "lisa at 0.3": "run on another machine", "badam at 0.3": "run with others beside it",
    }  # fmt: skip
    assert len(frontier.points) == 5
    (alone,) = (point for point in frontier.points if point.label == "hft")
    assert (alone.quality, alone.seeds) == (0.6, 1)
    assert len(only(frontiers(tmp_path, metric="loss")).points) == 9  # FLOPs are FLOPs everywhere


def test_each_contender_has_a_colour_and_marker_of_its_own() -> None:
    kinds = [*map(kind, METHODS), kind("rgft", '{"lr": "auto"}'), kind("lora", '{"rank": 16}')]
    found = styles([kinds])
    pairs = {(style.colour, style.marker) for style in found.values()}
    assert len(pairs) == len(found) == len(kinds) > 40
    strong = {k: style for k, style in found.items() if style.is_strong}
    assert list(strong) == [*list(found)[:2], kind("full"), kind("lora")]
    assert strong[kind("rgft")].colour == strong[kind("rgft", '{"lr": "auto"}')].colour
    assert [k for k, style in strong.items() if style.is_dashed] == [kind("rgft", '{"lr": "auto"}')]
    assert len({style.colour for style in strong.values()}) == 3
    assert not {style.colour for style in strong.values()} & {
        style.colour for style in found.values() if not style.is_strong
    }
    with pytest.raises(DataError, match="found more"):
        styles([[kind("lora", f'{{"rank": {rank}}}') for rank in range(100)]])


def test_what_was_changed_in_rgft_on_one_of_many_tasks_does_not_stand_out() -> None:
    changed = [kind("rgft", f'{{"config": {{"beta": {number}}}}}') for number in range(40)]
    both = [kind("rgft"), kind("rgft", '{"lr": "auto"}')]
    found = styles([[*both, *changed, kind("lora")], both])
    assert [k for k, style in found.items() if style.is_strong] == [*both, kind("lora")]
    # On the only task they do, as long as there are markers.
    alone = styles([[*both, *changed]])
    assert [style.is_strong for style in alone.values()].count(True) == 15
    assert len({(style.colour, style.marker) for style in alone.values()}) == 42


def lines_of(axes: Any) -> dict[str, Any]:
    handles, names = axes.get_legend_handles_labels()
    return dict(zip(names, (handle.lines[0] for handle in handles), strict=True))


def test_what_is_drawn(tmp_path: Path) -> None:
    results(tmp_path)
    for seed in range(2):
        write(tmp_path, "last_n-0.1", seed, 0.49 + seed / 100, method="last_n", budget=0.1)
    write(tmp_path / "alone", "full", 0, 0.4, task="cola", budget=1.0)
    made = figure(frontiers(tmp_path, metric="loss"), against="flops")
    (axes,) = made.axes  # CoLA's would have one point
    assert axes.get_title() == "SST-2\n2,000 examples, 3 epochs"
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("test loss", "share of full fine-tuning's FLOPs")
    lines = lines_of(axes)
    assert set(lines) == {"rgft", "full", "lora", "last_n"}
    assert list(lines["rgft"].get_xdata()) == [0.1, 0.3]
    assert list(lines["rgft"].get_ydata()) == pytest.approx([0.505, 0.405])
    assert len({to_hex(line.get_color()) for line in lines.values()}) == 4
    assert {name for name, line in lines.items() if line.get_linewidth() > 1} == {"rgft", "full", "lora"}
    assert [text.get_text() for text in axes.texts] == ["last_n", "rgft"]
    (legend,) = made.legends
    assert [text.get_text() for text in legend.get_texts()] == ["rgft", "full", "lora", "last_n"]
    low, high = axes.get_xlim()
    assert low < 0.1 < 1.0 < high


@pytest.mark.parametrize(("against", "label"), [("seconds", "seconds of training"), ("joules", "joules of training")])
def test_a_frontier_is_drawn_against_time_and_energy(tmp_path: Path, against: Cost, label: str) -> None:
    for name, cost in (("rgft", 10.0), ("full", 40.0)):
        ledger = {"flops": {"fraction_of_full": 0.3}, "energy": {"joules": {"total": cost}, "source": "measured"}}
        write(tmp_path, name, 0, 0.4, seconds=cost, ledger=ledger)
    (axes,) = figure(frontiers(tmp_path, metric="loss", against=against), against=against).axes
    assert axes.get_xlabel() == label
    assert {name: list(line.get_xdata()) for name, line in lines_of(axes).items()} == {"rgft": [10.0], "full": [40.0]}


def test_what_is_far_behind_is_counted_not_shown(tmp_path: Path) -> None:
    results(tmp_path)
    others = ("last_n", "lisa", "badam", "hft", "ist", "random")
    for place, label in enumerate(others):
        write(tmp_path, label, 0, 0.45 + place / 100)
    write(tmp_path, "boft", 0, 5.0)
    (axes,) = figure(frontiers(tmp_path, metric="loss"), against="flops").axes
    assert axes.get_ylim()[1] < 1.0
    assert "1 more above" in [text.get_text() for text in axes.texts]


def test_panels_stand_in_rows_of_three(tmp_path: Path) -> None:
    for task in ("sst2", "mrpc", "bbc", "imdb", "newsgroups"):
        results(tmp_path / task, task=task)
    made = figure(frontiers(tmp_path, metric="loss"), against="flops")
    assert len(made.axes) == 5
    made.canvas.draw()
    places = [axes.get_position() for axes in made.axes]
    assert len({round(place.x0, 2) for place in places}) == COLUMNS == 3
    assert len({round(place.y0, 2) for place in places}) == 2
    assert made.get_figwidth() * made.dpi == 1200


@pytest.mark.parametrize(
    ("ending", "is_right"),
    [("svg", lambda content: content.startswith(b"<?xml")), ("png", lambda content: content[1:4] == b"PNG")],
)
def test_a_picture(tmp_path: Path, ending: str, is_right: Callable[[bytes], bool]) -> None:
    results(tmp_path)
    found = frontiers(tmp_path, metric="loss")
    path = draw(found, tmp_path / f"out/frontier.{ending}", against="flops")
    assert is_right(path.read_bytes())
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(DataError, match=r"ends in \.svg or \.png"):
        draw(found, tmp_path / "frontier.txt", against="flops")
    write(tmp_path / "alone", "full", 0, 0.4)
    with pytest.raises(DataError, match="expected a task with two contenders"):
        draw(frontiers(tmp_path / "alone", metric="loss"), tmp_path / "one.svg", against="flops")

import json
from pathlib import Path
from typing import Any

import pytest

from rgft.cli.request import Request, read_request, read_yaml
from rgft.errors import ConfigError

GIVEN = {"model": "m", "data": "d.csv"}


def problems(**arguments: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_request(**arguments)
    return caught.value.problems


def yaml(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return file


def test_later_sources_win(tmp_path: Path) -> None:
    file = yaml(tmp_path, "lr: 1e-3\nepochs: 2\nseed: 4\nrgft: {budget: 0.5, probe: {size: 8}, granularity: block}")
    request = read_request(
        file=file, flags={**GIVEN, "epochs": 5.0, "seed": None}, rgft_flags={"budget": 0.4, "granularity": None},
        overrides=["lr=3e-3", "rgft.probe.size=16", "probe.interval=7"],
    )  # fmt: skip
    settings, config = request.settings, request.config
    assert (settings.lr, settings.epochs, settings.seed) == (3e-3, 5.0, 4)
    assert config.budget is not None
    assert (config.budget.flops, config.granularity, config.seed) == (0.4, "block", 4)
    assert (config.probe.size, config.probe.interval) == (16, 7)


@pytest.mark.parametrize(("rgft", "budget"), [({}, 0.3), ({"preset": "full"}, None), ({"budget": "none"}, None)])
def test_the_preset_rgft_has_a_budget_unless_told_otherwise(rgft: dict[str, Any], budget: float | None) -> None:
    config = read_request(flags=GIVEN, rgft_flags=rgft).config
    assert (config.budget.flops if config.budget else None) == budget


def test_problems_of_all_sources_are_reported_at_once(tmp_path: Path) -> None:
    file = yaml(tmp_path, "learnrate: 3\nbatch_size: 0\nbudget: 0.3\nrgft: {seed: 3, prob: {size: 4}, mask: enrgy}")
    found = "\n".join(problems(file=file, flags={"lr": -1.0}, rgft_flags={"budget": 2.0}, overrides=["nonsense"]))
    for expected in (
        "model: expected a value, found none; give --model", "data: expected a value",
        "learnrate: there is no such setting", "batch_size: expected a number greater than or equal to 1, found 0",
        "lr: expected a number > 0, several of them, each once, 'auto' or 'search', found -1.0",
        "budget: is a setting of the section 'rgft'",
        "rgft.seed: the seed of a run stands outside", "rgft.prob: there is no such setting",
        "did you mean 'probe'?", "did you mean 'energy'?", "rgft.budget.flops: expected a share",
        "'nonsense': expected",
    ):  # fmt: skip
        assert expected in found


def test_an_unknown_task_names_the_nearest() -> None:
    (problem,) = problems(flags={**GIVEN, "task": "text-clasification"})
    assert problem.startswith("task: expected")
    assert problem.endswith("did you mean 'text-classification'?")


def test_a_text_column_may_be_one_or_two(tmp_path: Path) -> None:
    assert read_request(file=yaml(tmp_path, "text: a"), flags=GIVEN).settings.text == ("a",)
    assert read_request(file=yaml(tmp_path, "text: [a, b]"), flags=GIVEN).settings.text == ("a", "b")
    assert problems(flags={**GIVEN, "text": ("a", "b", "c")})[0].startswith("text: expected")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: [1", "expected YAML"), ("- a\n- b", "expected settings as `key: value`"), ("lr: 1\nlr: 2", "twice: lr"),
        ("3: 4", "expected settings"), ("rgft: 3", "rgft: expected a group of settings, found 3"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    assert any(message in problem for problem in problems(file=yaml(tmp_path, text), flags=GIVEN))


def test_missing_and_binary_files(tmp_path: Path) -> None:
    assert "No such file" in problems(file=tmp_path / "none.yaml")[0]
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "could not be read" in problems(file=tmp_path / "binary.yaml")[0]


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    file = yaml(tmp_path, "a: 2e-4\nb: 1E3\nc: .5\nd: 3\ne: 1.5e-3\nf: e4\n")
    assert read_yaml(file) == {"a": 2e-4, "b": 1000.0, "c": 0.5, "d": 3, "e": 1.5e-3, "f": "e4"}


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert read_yaml(yaml(tmp_path, "# only a comment")) == {}


class TestResuming:
    @staticmethod
    def stored() -> dict[str, Any]:
        return read_request(flags={**GIVEN, "seed": 3}, overrides=["probe.size=4"]).to_dict()

    def test_nothing_has_to_be_given_again(self) -> None:
        request = read_request(stored=self.stored())
        assert isinstance(request, Request)
        assert request.to_dict() == self.stored()

    def test_the_same_may_be_given_again_and_checkpoints_may_change(self) -> None:
        request = read_request(
            stored=self.stored(), flags={"seed": 3, "checkpoint_every": 7}, overrides=["probe.size=4"]
        )
        assert request.settings.checkpoint_every == 7

    def test_changes_are_refused_together(self) -> None:
        found = problems(stored=self.stored(), flags={"lr": 1.0}, rgft_flags={"budget": 0.9})
        assert len(found) == 2
        assert found[0].startswith("lr: the run was started with 'auto', found 1.0")
        assert found[1].startswith("rgft.budget: the run was started with {'flops': 0.3}, found {'flops': 0.9}")

    def test_another_seed_is_one_problem(self) -> None:
        assert [p.partition(":")[0] for p in problems(stored=self.stored(), flags={"seed": 9})] == ["seed"]


def test_the_example_is_valid() -> None:
    request = read_request(file=Path(__file__).parents[3] / "examples" / "config.yaml")
    assert request.settings.lr == "auto"
    assert request.config.budget is not None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (3, 3.0), ("3e-4", 3e-4), ("1e-4, 3e-4", (1e-4, 3e-4)), ([1e-4, "3e-4"], (1e-4, 3e-4)), ([2e-4], 2e-4),
        ("auto", "auto"), ("search", "search"),
    ],
)  # fmt: skip
def test_learning_rates_to_search(given: Any, expected: Any) -> None:
    request = read_request(flags={"model": "m", "data": "d.csv", "lr": given})
    assert request.settings.lr == expected
    again = read_request(stored=json.loads(json.dumps(request.to_dict())))
    assert again.settings.lr == expected


@pytest.mark.parametrize("given", ["", "best", "1e-4,", "1e-4,1e-4", [], True, [True, 1e-3], -1.0, "nan", "inf,1"])
def test_what_is_no_learning_rate_is_refused(given: Any) -> None:
    (problem,) = problems(flags={"model": "m", "data": "d.csv", "lr": given})
    assert problem.startswith("lr: expected a number > 0, several of them, each once, 'auto' or 'search', found")

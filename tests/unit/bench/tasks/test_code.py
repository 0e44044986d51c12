import json
from pathlib import Path
from typing import Any

import pytest

from rgft.bench.experiment import Experiment
from rgft.bench.fingerprint import require_equal
from rgft.bench.tasks import bench_task, code, problems
from rgft.errors import ConfigError, DataError
from rgft.tasks.fingerprint import SPLITS, Data, data_of
from rgft.tasks.token_loss import IGNORED
from tests.decoders import save_decoder
from tests.unit.bench.tasks.test_problems import HUMANEVAL, written


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_decoder(tmp_path_factory.mktemp("decoder"))


def settings(folder: Path, decoder: str, **more: Any) -> dict[str, Any]:
    # "b" is the problem's own solution, but for white space.
    rows = [{"prompt": f"{a} {b}", "completion": b} for a in "abcdefghij" for b in ("c", "yes", "d")]
    train = folder / "train.jsonl"
    train.write_text("\n".join(json.dumps(row) for row in [*rows, {"prompt": "a", "completion": " return 2 *  x"}]))
    return {
        "name": "code", "train_size": 10, "data": str(train), "model": decoder,
        "problems": written(folder / "p.jsonl", HUMANEVAL), **more,
    }  # fmt: skip


def test_nothing_is_run_unless_it_is_allowed(tmp_path: Path, decoder: str) -> None:
    with pytest.raises(ConfigError, match="give --allow-code-execution"):
        bench_task(settings(tmp_path, decoder), seed=0)
    # An experiment's file cannot allow it.
    with pytest.raises(ConfigError, match="code has no setting 'allow_code_execution'"):
        bench_task(settings(tmp_path, decoder, allow_code_execution=True), seed=0)
    with pytest.raises(ConfigError) as caught:
        bench_task(settings(tmp_path, decoder, samples=2, k=[3]), seed=0)
    assert len(caught.value.problems) == 3


def test_continuations_alone_are_learnt_and_no_solution_is(tmp_path: Path, decoder: str) -> None:
    task = bench_task(settings(tmp_path, decoder, train_size=27), seed=0, allow_code_execution=True)
    example = task.train[0]
    learnt = [label for label in example["labels"] if label != IGNORED]
    assert learnt[-1] == task.processor.eos_token_id
    assert learnt == example["input_ids"][-len(learnt) :]
    assert len(learnt) < len(example["input_ids"])
    with pytest.raises(DataError, match="expected 1 to 27 functions of at most 128 tokens, found 28"):
        bench_task(settings(tmp_path, decoder, train_size=28), seed=0, allow_code_execution=True)


def test_what_is_written_is_run_and_counted(tmp_path: Path, decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = bench_task(
        settings(tmp_path, decoder, samples=4, temperature=0.5, k=[1, 2]), seed=0, allow_code_execution=True
    )
    right, wrong = "return x + x\nprint(1)", "return x + 1"
    monkeypatch.setattr(code, "completions", lambda *_, **__: [[wrong, right, "while True: pass", wrong]])
    monkeypatch.setitem(task.judge.keywords, "limits", code.Limits(seconds=1.0))  # type: ignore[union-attr]
    assert task.judge is not None
    assert task.judge(task.model) == {"pass@1": 0.25, "pass@2": 0.5}
    failures = {"wrong answer": 2, "time": 1}
    name = HUMANEVAL["task_id"]
    assert task.judged_details == {
        "samples": 4, "problems": [{"name": name, "passed": 1, "failures": failures}], "failures": failures,
    }  # fmt: skip
    json.dumps(task.judged_details)


def test_what_a_program_is_run_on_is_part_of_the_data(
    tmp_path: Path, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def data(**changes: Any) -> Data:
        given = settings(tmp_path, decoder, test_tokens=60)
        return data_of(bench_task({**given, **changes}, seed=0, allow_code_execution=True))

    def source(*rows: Any) -> str:
        return written(tmp_path / "q.jsonl", *rows)

    long = {**HUMANEVAL, "prompt": f"{HUMANEVAL['prompt']}    # {'x ' * 400}\n"}
    before = data(problems=source(HUMANEVAL, long))
    assert (before["test"]["examples"], before["judged_on"]["examples"]) == (1, 2)
    for rows in (
        (HUMANEVAL, {**long, "test": "def check(candidate):\n    pass\n"}),
        ({**HUMANEVAL, "test": "def check(candidate):\n    pass\n"}, long),
        (HUMANEVAL, {**long, "prompt": f"{long['prompt']}    # y\n"}),
    ):
        after = data(problems=source(*rows))
        assert after["test"] == before["test"]
        with pytest.raises(DataError, match=r"\(judged_on: 2 examples \w+ there, 2 examples \w+ now\)"):
            require_equal(before, after, "here", "the data of now")
        # Results from before do not say it.
        require_equal({split: before[split] for split in SPLITS}, after, "here", "the data of now")
    assert data(problems=source(HUMANEVAL, long)) == before
    monkeypatch.setattr(problems, "HUMANEVAL_STOPS", ("\ndef ",))
    assert data(problems=source(HUMANEVAL, long))["judged_on"] != before["judged_on"]


def test_a_model_s_own_words_are_run(tmp_path: Path, decoder: str) -> None:
    task = bench_task(settings(tmp_path, decoder, new_tokens=4), seed=0, allow_code_execution=True)
    assert task.judge is not None
    assert task.judge(task.model) == {"pass@1": 0.0}


def test_an_experiment_draws_several_samples() -> None:
    path = Path(__file__).parents[4] / "benchmarks" / "experiments" / "code_samples.json"
    settings = Experiment.load(path).task
    assert max(settings["k"]) > 1
    given = {key: settings[key] for key in ("samples", "temperature", "k")}
    assert given["samples"] >= max(given["k"])
    code._check(True, data=None, train_problems=None, **given)

import pytest

from rgft.cli.preparing import run_settings
from rgft.cli.request import RunSettings, TaskName


@pytest.mark.parametrize(
    ("task", "given", "batch_size", "expected"),
    [
        ("text-classification", None, 4, 64),
        ("image-classification", None, 128, 64),
        ("language-modelling", None, 4, 4),  # outputs as wide as the vocabulary: what training could hold
        ("chat", None, 128, 64),
        ("chat", 16, 4, 16),
    ],
)
def test_the_evaluation_batch(task: TaskName, given: int | None, batch_size: int, expected: int) -> None:
    settings = RunSettings(
        model="m", data="d", task=task, eval_batch_size=given, batch_size=batch_size, device="cpu"
    )  # fmt: skip
    assert run_settings(settings).eval_batch_size == expected
    assert run_settings(settings).batch_size == batch_size

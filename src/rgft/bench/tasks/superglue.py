"""GLUE (Wang et al. 2018) and SuperGLUE (Wang et al. 2019) as the hub has them, with their standard metrics.

Their test labels are not public: what they validate on is the test split here, and validation data are held out of the
training split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rgft.bench.tasks import glue_metrics
from rgft.bench.tasks.labelled import Labelled, Scores, labelled_task
from rgft.bench.tasks.splits import apart
from rgft.errors import ConfigError, DataError
from rgft.tasks.base import PreparedTask
from rgft.tasks.split import stratified

Row = Mapping[str, Any]
#: One or two texts, their label, and what they are worth as an answer (see `Labelled`).
Part = tuple[tuple[str, ...], Any, float]

GLUE, SUPERGLUE = "nyu-mll/glue", "aps/super_glue"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A task of the two.

    Attributes:
        hub: name of the data set.
        parts: what a row stands for, several with COPA's alternatives; None: its columns' texts, with its label.
        group: what its parts are scored together by; None: each alone.
        names: of the classes; none: numbers are predicted.
        scores: its standard metrics.
        primary: the metric that is quoted first.
        test: the split with public labels.
        columns: that a row has, beside its label.
        label: the column that has it.
    """

    hub: str
    columns: tuple[str, ...]
    names: tuple[str, ...]
    scores: Scores = glue_metrics.classes
    primary: str = "accuracy"
    test: str = "validation"
    label: str = "label"
    parts: Callable[[Row], Sequence[Part]] | None = None
    group: Callable[[Row], Any] | None = None


def _copa(row: Row) -> list[Part]:
    asked, right = f"{row['premise']} What was the {row['question']}?", row["label"]
    return [((asked, str(row[f"choice{n + 1}"])), int(right == n), 0.0) for n in (0, 1)]


def _multirc(row: Row) -> list[Part]:
    return [((str(row["paragraph"]), f"{row['question']} {row['answer']}"), row["label"], 0.0)]


def _record(row: Row) -> list[Part]:
    """The query with each name of the passage in the gap: right if it is an answer, up to how it is written."""
    answers = list(row["answers"])
    right = {glue_metrics.normalised(answer) for answer in answers}
    names = {glue_metrics.normalised(name): name for name in reversed(row["entities"])}
    return [
        (
            (str(row["passage"]), str(row["query"]).replace("@placeholder", name)), int(key in right),
            glue_metrics.overlap(name, answers),
        )
        for key, name in reversed(names.items())
    ]  # fmt: skip


def _wic(row: Row) -> list[Part]:
    return [((f"{row['word']}: {row['sentence1']}", str(row["sentence2"])), row["label"], 0.0)]


def _wsc(row: Row) -> list[Part]:
    return [((str(row["text"]), f"{row['span2_text']} is {row['span1_text']}"), row["label"], 0.0)]


_YES = ("no", "yes")
_ENTAILMENT = ("entailment", "not_entailment")
_MNLI = ("entailment", "neutral", "contradiction")

SOURCES: Mapping[str, Source] = {
    "cola": Source(hub=GLUE, columns=("sentence",), names=("unacceptable", "acceptable"), primary="matthews"),
    "sst2": Source(hub=GLUE, columns=("sentence",), names=("negative", "positive")),
    "mrpc": Source(hub=GLUE, columns=("sentence1", "sentence2"), names=_YES, scores=glue_metrics.binary, primary="f1"),
    "qqp": Source(hub=GLUE, columns=("question1", "question2"), names=_YES, scores=glue_metrics.binary, primary="f1"),
    "stsb": Source(
        hub=GLUE, columns=("sentence1", "sentence2"), names=(), scores=glue_metrics.numbers, primary="pearson"
    ),
    "mnli": Source(hub=GLUE, columns=("premise", "hypothesis"), names=_MNLI, test="validation_matched"),
    "mnli_mismatched": Source(hub=GLUE, columns=("premise", "hypothesis"), names=_MNLI, test="validation_mismatched"),
    "qnli": Source(hub=GLUE, columns=("question", "sentence"), names=_ENTAILMENT),
    "rte": Source(hub=GLUE, columns=("sentence1", "sentence2"), names=_ENTAILMENT),
    "wnli": Source(hub=GLUE, columns=("sentence1", "sentence2"), names=_ENTAILMENT[::-1]),
    "boolq": Source(hub=SUPERGLUE, columns=("question", "passage"), names=_YES),
    "cb": Source(
        hub=SUPERGLUE, columns=("premise", "hypothesis"), names=("entailment", "contradiction", "neutral"), primary="f1"
    ),
    "copa": Source(
        hub=SUPERGLUE, columns=("premise", "question", "choice1", "choice2"), names=_YES, scores=glue_metrics.choices,
        parts=_copa, group=lambda row: (row["premise"], row["question"], row["choice1"], row["choice2"]),
    ),
    "multirc": Source(
        hub=SUPERGLUE, columns=("paragraph", "question", "answer"), names=_YES, scores=glue_metrics.answers,
        primary="f1", parts=_multirc, group=lambda row: (row["paragraph"], row["question"]),
    ),
    "record": Source(
        hub=SUPERGLUE, columns=("passage", "query", "entities"), names=_YES, scores=glue_metrics.named, primary="f1",
        label="answers", parts=_record, group=lambda row: (row["passage"], row["query"]),
    ),
    "super_rte": Source(hub=SUPERGLUE, columns=("premise", "hypothesis"), names=_ENTAILMENT),
    "wic": Source(hub=SUPERGLUE, columns=("word", "sentence1", "sentence2"), names=_YES, parts=_wic),
    "wsc": Source(hub=SUPERGLUE, columns=("text", "span1_text", "span2_text"), names=_YES, parts=_wsc),
}  # fmt: skip


def superglue(
    *, task: str, train_size: int, seed: int, model: str | None = None, data: str | None = None, max_tokens: int = 128,
    held_out: float = 0.1,
) -> PreparedTask:  # fmt: skip
    """A task of GLUE or SuperGLUE.

    Equal texts are in one split only, and the rows of one question on one side.

    Args:
        task: a key of `SOURCES`: cola, mnli, boolq, ….
        train_size: rows, drawn from what is not held out.
        seed: of the draw and of the new classifier.
        model: hub name or folder of an encoder; None: the packaged one.
        data: another hub name, or a folder with a `.parquet` or `.jsonl` file for each split; None: the usual name.
        max_tokens: of a text or pair; longer ones are cut.
        held_out: share of the training split for validation, the same for all seeds.

    Raises:
        ConfigError: there is no such task; the message has the nearest.
        DataError: the data or the model cannot be loaded, rows have no label, or there are fewer than `train_size`.
    """
    if task not in SOURCES:
        near = get_close_matches(task, SOURCES, n=3) or list(SOURCES)
        raise ConfigError(
            f"task.task: expected a task of GLUE or SuperGLUE, found {task!r}; nearest: {', '.join(near)}"
        )
    source = SOURCES[task]
    splits = _splits(task, source, data, held_out)
    return labelled_task(
        splits, names=source.names, scores=source.scores, train_size=train_size, seed=seed, model=model,
        max_tokens=max_tokens, primary_metric=source.primary,
    )  # fmt: skip


def _splits(task: str, source: Source, data: str | None, held_out: float) -> dict[str, list[Labelled]]:
    groups: dict[Any, int] = {}
    known = [_labelled(task, source, row, groups) for row in _rows(task, source, data, "train")]
    tested = [_labelled(task, source, row, groups) for row in _rows(task, source, data, source.test)]
    # A question and a sentence with all that belongs to it are one thing to split.
    train, validation = stratified(
        known, key=lambda rows: rows[0].group if rows[0].group >= 0 else rows[0].texts,
        label=lambda rows: rows[0].label if source.names else 0, held_out=held_out, seed=0,
    )  # fmt: skip
    held = {row.group for rows in tested for row in rows} - {-1}
    return apart(
        {
            "test": [row for rows in tested for row in rows],
            "validation": [row for rows in validation for row in rows if row.group not in held],
            "train": [row for rows in train for row in rows if row.group not in held],
        },
        key=lambda row: row.texts,
    )


def _labelled(task: str, source: Source, row: Row, groups: dict[Any, int]) -> list[Labelled]:
    label = row[source.label]
    if source.label == "label" and not _is_known(source, label):
        expected = f"0 to {len(source.names) - 1}" if source.names else "a number"
        raise DataError(f"{task}: expected a label of {expected}, found {label!r}; the test labels are not public")
    if source.label == "answers" and not label:
        raise DataError(f"{task}: expected answers, found none; those of the test split are not public")
    group = -1 if source.group is None else groups.setdefault(source.group(row), len(groups))
    plain: Part = (tuple(str(row[column]) for column in source.columns), label, 0.0)
    parts = [plain] if source.parts is None else source.parts(row)
    if not parts:
        raise DataError(f"{task}: expected something to choose among, found nothing in {dict(row)!r:.200}")
    return [Labelled(texts=texts, label=float(value), group=group, worth=worth) for texts, value, worth in parts]


def _is_known(source: Source, label: Any) -> bool:
    return not (label is None or isinstance(label, str) or (source.names and not 0 <= label < len(source.names)))


def _rows(task: str, source: Source, data: str | None, split: str) -> list[Row]:
    from rgft.tasks.files import read_hub, read_rows

    columns = [*source.columns, source.label]
    folder = None if data is None else Path(data).expanduser()
    if folder is not None and (folder.exists() or str(data).startswith((".", "/", "~"))):
        found = [path for ending in ("parquet", "jsonl") if (path := folder / f"{split}.{ending}").is_file()]
        if not found:
            raise DataError(f"{folder}: expected {split}.parquet or {split}.jsonl in it, found neither")
        return list(read_rows(str(found[0]), columns))
    name, configuration = data or source.hub, task.removeprefix("super_").removesuffix("_mismatched")
    return list(read_hub(name, columns, split, configuration=configuration, instead="data a folder with its files"))

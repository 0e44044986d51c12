from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest

from rgft.errors import RGFTWarning, RunFolderError
from rgft.telemetry.records import TYPES, VERSION, RecordWriter, read_records
from tests.unit.telemetry.faults import die, die_after_writing, fill_disk_after, in_child


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.jsonl"


def steps(path: Path) -> list[int | None]:
    return [record.step for record in read_records(path)]


def written(path: Path, count: int) -> bytes:
    with RecordWriter(path) as writer:
        for step in range(count):
            writer.append("step", {"step": step, "loss": 0.5})
    return path.read_bytes()


def test_records_come_back_as_they_were(path: Path) -> None:
    data = {
        "step": 3, "loss": 0.1 + 0.2, "name": "ε — line\nbreak \"quoted\"", "none": None, "flag": True,
        "nested": {"list": [1, -2.5e-300, [True]]}, "top": (("a", 1.0),), "huge": 10**30, "lone": "\udc80",
    }  # fmt: skip
    before = time.time()
    with RecordWriter(path) as writer:
        writer.append("step", data)
    (record,) = read_records(path)
    assert record.type == "step"
    assert before - 1 <= record.time <= time.time() + 1
    assert record.data == {**data, "top": [["a", 1.0]]}


def test_not_a_number_and_infinities_are_valid_json(path: Path) -> None:
    with RecordWriter(path) as writer:
        writer.append("step", {"step": 0, "loss": math.nan, "scores": [math.inf, -math.inf, 1.0]})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    (record,) = read_records(path)
    assert math.isnan(record.data["loss"])
    assert record.data["scores"] == [math.inf, -math.inf, 1.0]


def test_the_first_line_names_schema_and_version(path: Path) -> None:
    written(path, 1)
    assert json.loads(path.read_text().splitlines()[0]) == {"schema": "rgft.records", "version": VERSION}


def test_every_type_can_be_written(path: Path) -> None:
    with RecordWriter(path) as writer:
        for kind in TYPES:
            writer.append(kind, {"step": 1})
        writer.append("warning", {"message": "no step"})
    assert [record.type for record in read_records(path)] == [*TYPES, "warning"]


@pytest.mark.parametrize(("kind", "data", "error", "part"), [
    ("stpe", {"step": 1}, ValueError, "expected a type of step, probe"),
    ("step", {"loss": 1.0}, ValueError, "integer 'step'"),
    ("plan", {"step": 1.0}, ValueError, "found 1.0"),
    ("end", {"time": 3}, ValueError, "time"),
    ("step", {"step": 1, "a": {"b": [object()]}}, TypeError, r"record\.a\.b\[0\].*object"),
    ("step", {"step": 1, "a": {1: 2}}, TypeError, r"record\.a: expected text as keys, found 1"),
])  # fmt: skip
def test_bad_records_are_refused_and_leave_no_trace(
    path: Path, kind: str, data: Any, error: type[Exception], part: str
) -> None:
    before = written(path, 2)
    with RecordWriter(path) as writer, pytest.raises(error, match=part):
        writer.append(kind, data)
    assert path.read_bytes() == before


def test_records_are_on_their_way_to_disk_at_once(path: Path) -> None:
    writer = RecordWriter(path)
    writer.append("step", {"step": 0})
    assert steps(path) == [0], "another process sees it without a flush or close"
    writer.close()
    writer.close()
    with pytest.raises(RunFolderError, match="closed"):
        writer.append("step", {"step": 1})


@pytest.mark.parametrize("sync", [False, True])
def test_sync_says_how_often_the_disk_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool) -> None:
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    writer = RecordWriter(path, sync=sync)
    for step in range(3):
        writer.append("step", {"step": step})
    assert len(calls) == (4 if sync else 0)  # the header is a line too
    writer.close()
    assert len(calls) == (5 if sync else 1)


# -------------------------------------------------------------------- crashes


def test_a_line_torn_at_any_byte_is_dropped_and_cut_off(path: Path) -> None:
    before = written(path, 2)
    whole = written(path, 1)  # appends one more
    for length in range(len(before) + 1, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.warns(RGFTWarning, match="last line is incomplete"):
            assert steps(path) == [0, 1]
        with pytest.warns(RGFTWarning, match="cut off"):
            writer = RecordWriter(path)
        writer.append("step", {"step": 9})
        writer.close()
        assert steps(path) == [0, 1, 9]


def test_a_torn_header_is_written_again(path: Path) -> None:
    whole = written(path, 0)
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.warns(RGFTWarning):
            assert read_records(path) == []
        with pytest.warns(RGFTWarning):
            RecordWriter(path).close()
        assert path.read_bytes() == whole


def test_zeros_left_by_a_power_cut_are_torn_too(path: Path) -> None:
    whole = written(path, 2)
    for tail in (b"\0" * 20, b"\0" * 20 + b"\n"):
        path.write_bytes(whole + tail)
        with pytest.warns(RGFTWarning):
            assert steps(path) == [0, 1]
        with pytest.warns(RGFTWarning):
            RecordWriter(path).close()
        assert path.read_bytes() == whole


@pytest.mark.parametrize("count", [1, 30, 61])
def test_killed_in_the_middle_of_a_line(path: Path, count: int) -> None:
    written(path, 2)

    def work() -> None:
        writer = RecordWriter(path)
        die_after_writing(count)
        writer.append("step", {"step": 2, "text": "x" * 100})

    assert in_child(work) == -9
    with pytest.warns(RGFTWarning):
        assert steps(path) == [0, 1]
    with pytest.warns(RGFTWarning), RecordWriter(path) as writer:
        writer.append("step", {"step": 2})
    assert steps(path) == [0, 1, 2]


def test_killed_after_a_whole_line_nothing_is_lost(path: Path) -> None:
    def work() -> None:
        writer = RecordWriter(path)
        for step in range(500):
            writer.append("step", {"step": step})
        die()

    assert in_child(work) == -9
    assert steps(path) == list(range(500))


@pytest.mark.parametrize("count", [0, 1, 40])
def test_a_full_disk_leaves_whole_lines(path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    before = written(path, 2)
    writer = RecordWriter(path)
    fill_disk_after(monkeypatch, count)
    with pytest.raises(RunFolderError, match="disk is full"):
        writer.append("step", {"step": 2, "text": "x" * 100})
    assert path.read_bytes() == before
    monkeypatch.undo()
    writer.append("step", {"step": 2})
    writer.close()
    assert steps(path) == [0, 1, 2]


# -------------------------------------------------------------------- files that are not right


@pytest.mark.parametrize(("content", "part"), [
    (b'{"schema": "rgft.records", "version": 99}\n', "expected schema 'rgft.records' version 1, found .* version 99"),
    (b'{"schema": "something", "version": 1}\n', "found 'something'"),
    (b'{"a": 1}\n', "no record file"),
    (b'[1]\n', "no record file"),
    (b'text\n{"a": 1}\n', "line 1"),
])  # fmt: skip
def test_other_files_are_refused_and_left_alone(path: Path, content: bytes, part: str) -> None:
    path.write_bytes(content)
    for take in (read_records, RecordWriter):
        with pytest.raises(RunFolderError, match=part):
            take(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", [b"{broken", b"[1]", b'{"type": "step"}', b"\xff\xfe", b"{}"])
def test_damage_before_the_last_line_is_an_error(path: Path, line: bytes) -> None:
    lines = written(path, 3).split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1], line, lines[3], b""]))
    with pytest.raises(RunFolderError, match="line 3"):
        read_records(path)


def test_missing_file_and_missing_folder(path: Path) -> None:
    with pytest.raises(RunFolderError, match="could not be read"):
        read_records(path)
    with pytest.raises(RunFolderError, match="could not be written"):
        RecordWriter(path.parent / "no" / "records.jsonl")


# -------------------------------------------------------------------- resuming


def test_rewind_cuts_what_a_resumed_run_writes_again(path: Path) -> None:
    with RecordWriter(path) as writer:
        for step in range(1, 6):
            writer.append("step", {"step": step})
            writer.append("warning", {"message": f"after {step}"})
        assert writer.rewind(3) == 4
        writer.append("step", {"step": 4})
        assert writer.rewind(9) == 0
    assert [record.data.get("step", record.data.get("message")) for record in read_records(path)] == [
        1, "after 1", 2, "after 2", 3, "after 3", 4,
    ]  # fmt: skip

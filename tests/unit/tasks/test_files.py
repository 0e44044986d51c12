import json
from pathlib import Path

import pytest

from rgft.errors import DataError
from rgft.tasks.files import hub_split, read_rows

ROWS = [{"text": 'a "quoted", comma', "label": "x"}, {"text": "two\nlines", "label": "y"}]


def write(path: Path) -> Path:
    import csv

    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({**row, "more": 1}) + "\n" for row in ROWS))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["label", "text"], delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet"])
def test_every_kind_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert read_rows(str(write(tmp_path / name)), ["text", "label"]) == ROWS


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet"])
def test_a_missing_column_names_the_nearest(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"'lable'; did you mean 'label'\?"):
        read_rows(str(write(tmp_path / name)), ["text", "lable"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", r"a\.csv: expected rows, found an empty file"),
        ("a.jsonl", b"", "found an empty file"),
        ("a.csv", b"text;label\na;b\n", "expected columns separated by ',', found the header 'text;label'"),
        ("a.tsv", b"text,label\na,b\n", r"expected columns separated by '\\t', found the header 'text,label'"),
        ("a.parquet", b"", "found an empty file"),
        ("a.txt", b"", "found an empty file"),
        ("a.csv", b"\n\n", "expected a header with the names of the columns, found an empty line"),
        ("a.csv", b"\xef\xbb\xbf", "expected a header with the names of the columns"),
        ("a.csv", b"text,label\n", "expected at least one row"),
        ("a.csv", b"text,label\na\n", "line 2: expected as many fields"),
        ("a.csv", b"text,label\na,b,c\n", "line 2: expected as many fields"),
        ("a.csv", b'text,label\n"a\na",b\na,b,c\n', "line 4: expected as many fields"),
        ("a.csv", b"text,label\n\xff\xfe,b\n", "expected UTF-8, found byte 0xff at 11; save the file as UTF-8"),
        ("a.csv", b'text,label\n"a,b\n', "cannot be read"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text"\n', "line 2: expected JSON"),
        ("a.jsonl", b"[1]\n", "line 1: expected an object"),
        ("a.parquet", b"nonsense", "cannot be read"),
        ("a.txt", b"x", "holds texts alone, expected one column, found text, label"),
        ("a.doc", b"x", "expected a file ending in"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(str(path), ["text", "label"])


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="found nothing there"):
        read_rows(str(tmp_path / "missing.csv"), ["text"])
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *args, **kwargs: (_ for _ in ()).throw(ConnectionError("offline"))
    )
    with pytest.raises(DataError, match=r"could not be loaded from the hub \(ConnectionError: offline\)") as caught:
        read_rows("some/name", ["text"])
    assert str(caught.value).startswith("'some/name' (train) is not here")
    assert "Give the path of a file ending in .csv, " in str(caught.value)
    with pytest.raises(DataError, match=r"'some/name' \(part, test\) is not here.* Give it up, or check the name"):
        hub_split("some/name", "test", instead="it up", configuration="part")


def test_hub_names_go_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, configuration: None, *, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list([{**row, "more": 1} for row in ROWS])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert read_rows("some/name", ["text", "label"], split="test") == ROWS
    assert asked == [("some/name", "test")]


def test_paragraphs_of_a_text_file_are_its_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\ufeffone\nmore\n\n \n\ntwo  \n", encoding="utf-8")
    assert read_rows(str(path), ["anything"]) == [{"anything": "one\nmore"}, {"anything": "two  "}]


def test_a_field_may_be_as_long_as_a_book(tmp_path: Path) -> None:
    import csv

    limit, book = csv.field_size_limit(), "a" * 200_000
    path = write(tmp_path / "a.csv")
    with path.open("a", newline="") as file:
        csv.writer(file).writerow(["1", book])
    assert read_rows(str(path), ["text"])[-1] == {"text": book}
    assert csv.field_size_limit() == limit

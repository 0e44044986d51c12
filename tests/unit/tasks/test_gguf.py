from pathlib import Path

import pytest

from rgft.errors import DataError
from rgft.tasks import gguf


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RGFT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    return path


def test_a_file_is_converted_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def convert(path: Path, folder: Path) -> None:
        calls.append(folder)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "_convert", convert)
    first = gguf.converted(file)
    assert gguf.converted(file) == first
    assert len(calls) == 1
    assert calls[0] != first  # made aside
    assert [p.name for p in first.parent.iterdir()] == [first.name]
    file.write_bytes(b"GGUF" + bytes(101))
    assert gguf.converted(file) != first


def test_a_failed_conversion_leaves_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(path: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("no space left on device")

    monkeypatch.setattr(gguf, "_convert", convert)
    with pytest.raises(DataError, match="cannot be converted: OSError: no space left"):
        gguf.converted(file)
    assert list((file.parent / "cache" / "models").iterdir()) == []


def test_what_is_no_file_or_no_gguf(file: Path) -> None:
    with pytest.raises(DataError, match="expected a GGUF file, found nothing"):
        gguf.converted(file.parent / "other.gguf")
    with pytest.raises(DataError, match="cannot be converted"):
        gguf.converted(file)

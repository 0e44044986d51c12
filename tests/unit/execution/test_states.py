"""What is stored of an example, in memory and on disk."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rgft.errors import CacheError
from rgft.execution import disk_states
from rgft.execution.disk_states import DiskStates
from rgft.execution.states import CachedState, MemoryStates
from tests.unit.execution.disk import threads_that_load

OLD = "0" * 32


def states(tokens: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def stored(seed: int = 0, dtype: torch.dtype | None = None) -> CachedState:
    return CachedState.of(states(seed=seed), dtype, offset=2, tokens=None)


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def on_disk(folder: Path, fingerprint: str = "a" * 32, max_bytes: int = 10_000) -> DiskStates:
    found = DiskStates(folder, max_bytes)
    found.open(fingerprint)
    return found


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.states"))


@pytest.mark.parametrize(
    ("dtype", "bound"), [(None, 0.0), (torch.float32, 0.0), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
def test_floating_point_types_are_exact_to_their_rounding(dtype: torch.dtype | None, bound: float) -> None:
    exact = states()
    state = CachedState.of(exact, dtype, offset=0, tokens=None)
    assert state.decoded(exact).dtype == exact.dtype
    assert state.error(exact) <= bound
    assert ((state.decoded(exact) - exact).abs() <= bound * exact.abs()).all()


def test_int8_has_a_scale_per_token() -> None:
    exact = states() * torch.tensor([1e-3, 1.0, 1e3, 0.0, 7.0])[:, None]
    state = CachedState.of(exact, torch.int8, offset=0, tokens=None)
    assert state.nbytes == 5 * 8 + 5 * 4
    largest = exact.abs().amax(1, keepdim=True)
    assert ((state.decoded(exact) - exact).abs() <= largest / 254 * (1 + 1e-6)).all()
    assert 0.0 < state.error(exact) < 0.02
    assert torch.equal(state.decoded(exact)[3], torch.zeros(8))


def test_memory_keeps_what_fits_and_replaces_in_place() -> None:
    store = MemoryStates(2 * stored().nbytes)
    assert [store.put(i, stored(i)) for i in range(3)] == [True, True, False]
    assert store.put(0, stored(9))
    assert torch.equal(store.get(0).values, stored(9).values)  # type: ignore[union-attr]
    assert store.bytes == 2 * stored().nbytes
    store.open("another")
    assert len(store) == store.bytes == 0


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
def test_disk_gives_back_the_same_bytes_also_to_another_run(dtype: torch.dtype | None, tmp_path: Path) -> None:
    first = on_disk(tmp_path)
    assert all(first.put(key(i), stored(i, dtype)) for i in range(3))
    second = on_disk(tmp_path)  # while the first is still open
    assert second.put(key(7), stored(7, dtype))
    for store, known in ((first, [0, 1, 2]), (second, [0, 1, 2, 7]), (on_disk(tmp_path), [0, 1, 2, 7])):
        assert len(store) == len(known)
        assert store.bytes == len(known) * stored(0, dtype).nbytes
        for number in known:
            found, expected = store.get(key(number)), stored(number, dtype)
            assert found is not None
            assert torch.equal(found.values, expected.values)
            assert (found.offset, found.tokens) == (2, None)
            assert dtype is not torch.int8 or torch.equal(found.scale_T1, expected.scale_T1)  # type: ignore[arg-type]
    assert len(on_disk(tmp_path, "b" * 32)) == 0
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("cut", [1, 30, 60, 100])
def test_a_record_that_a_crash_tore_off_is_left_out(cut: int, tmp_path: Path) -> None:
    store = on_disk(tmp_path)
    for i in range(2):
        store.put(key(i), stored(i))
    store.close()
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = on_disk(tmp_path)
    assert key(0) in again
    assert key(1) not in again
    assert again.get(key(1)) is None
    assert again.put(key(1), stored(1))
    assert len(on_disk(tmp_path)) == 2


@pytest.mark.parametrize("where", [-1, -40])
def test_a_damaged_record_is_never_read(where: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = on_disk(tmp_path)
    store.put(key(0), stored())
    store.close()
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(bytes(data))
    again = on_disk(tmp_path)
    assert again.get(key(0)) is None
    assert key(0) not in again
    assert again.bytes == 0
    assert str(path) in caplog.text


def damage(path: Path, record: int, records: int) -> None:
    """Changes a byte in the content of one of a file's records, all of one size."""
    data = bytearray(path.read_bytes())
    data[(record + 1) * len(data) // records - 3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("is_writable", [True, False])
def test_damage_is_said_once_a_file_and_healed_for_later_runs(
    is_writable: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = on_disk(tmp_path)
    for i in range(4):
        store.put(key(i), stored(i))
    store.close()
    (path,) = files(tmp_path)
    late = path.rename(path.with_name("zzz.states"))  # by name, it comes after all that later runs write
    for i in (1, 2):
        damage(late, i, 4)
    os.utime(late, (1, 1))
    if not is_writable:
        monkeypatch.setattr(disk_states, "_mark", lambda *args: late.joinpath("refused").open("r+b"))
    again = on_disk(tmp_path)
    for i in range(4):
        assert (again.get(key(i)) is None) == (i in (1, 2))
    assert [record.message.partition(f" records of {late} are damaged")[0] for record in caplog.records] == [
        "activation cache: 2 of 4"
    ]
    assert len(again) == 2
    assert again.bytes == 2 * stored().nbytes
    for i in (1, 2):
        assert again.put(key(i), stored(i))
    again.close()
    caplog.clear()
    later = on_disk(tmp_path)
    assert all(torch.equal(later.get(key(i)).values, stored(i).values) for i in range(4))  # type: ignore[union-attr]
    assert not caplog.records
    assert len(files(tmp_path)) == 2


def test_of_a_damaged_and_a_whole_record_the_whole_one_is_read(tmp_path: Path) -> None:
    first, second = on_disk(tmp_path), on_disk(tmp_path)
    for number, store in enumerate((first, second)):
        store.put(key(0), stored())
        store.close()
        new = next(path for path in files(tmp_path) if path.stat().st_mtime > 100)
        os.utime(new, (number + 1, number + 1))
    newest = max(files(tmp_path), key=lambda path: path.stat().st_mtime)
    damage(newest, 0, 1)
    os.utime(newest, (3, 3))
    found = on_disk(tmp_path)
    for _ in range(2):
        assert torch.equal(found.get(key(0)).values, stored().values)  # type: ignore[union-attr]
        assert found.bytes == stored().nbytes
    found.read_ahead([key(0)])
    assert found.get(key(0)) is not None


def test_another_run_may_go_on_writing_to_a_file_in_which_damage_was_marked(tmp_path: Path) -> None:
    writing = on_disk(tmp_path)
    for i in range(2):
        writing.put(key(i), stored(i))
    (path,) = files(tmp_path)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2 - 3)
        file.write(b"!?!")
    assert on_disk(tmp_path).get(key(0)) is None
    assert writing.put(key(2), stored(2))
    assert writing.get(key(0)) is None
    assert writing.put(key(0), stored(0))
    found = on_disk(tmp_path)
    assert all(torch.equal(found.get(key(i)).values, stored(i).values) for i in range(3))  # type: ignore[union-attr]


def test_a_file_of_something_else_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / ("a" * 32)).mkdir()
    (tmp_path / ("a" * 32) / "x.states").write_bytes(b"no states at all, but long enough to be taken for a header")
    store = on_disk(tmp_path)
    assert len(store) == 0
    assert store.put(key(0), stored())
    assert len(on_disk(tmp_path)) == 1


def test_old_fingerprints_give_way_and_then_nothing_more_is_stored(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.states").write_text("not of the cache's making")
    old = on_disk(tmp_path, OLD)
    assert all(old.put(key(i), stored(i)) for i in range(3))
    old.close()
    taken = sum(path.stat().st_size for path in (tmp_path / OLD).iterdir())
    new = on_disk(tmp_path, "e" * 32, max_bytes=taken + taken // 3)
    assert new.put(key(0), stored())
    assert (tmp_path / OLD).exists()
    assert all(new.put(key(i), stored(i)) for i in range(1, 3))
    assert not (tmp_path / OLD).exists()
    small = on_disk(tmp_path, "e" * 32, max_bytes=taken)
    assert not small.put(key(9), stored(9))
    assert len(small) == 3
    assert (tmp_path / "thesis" / "chapter.states").exists()


def test_what_is_replaced_still_counts_until_its_file_is_gone(tmp_path: Path) -> None:
    store = on_disk(tmp_path, max_bytes=2_000)
    assert not all(store.put(key(0), stored(i)) for i in range(20))
    assert len(store) == 1
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 2_000


def test_rows_without_tokens_can_be_stored(tmp_path: Path) -> None:
    empty = CachedState.of(torch.zeros(0, 8), torch.int8, offset=0, tokens=None)
    store = on_disk(tmp_path)
    assert store.put(key(0), empty)
    found = store.get(key(0))
    assert found is not None
    assert found.decoded(torch.zeros(0, 8)).shape == (0, 8)
    assert found.error(torch.zeros(0, 8)) == 0.0


def test_a_full_disk_stops_storing_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = on_disk(tmp_path)
    store.put(key(0), stored())

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    monkeypatch.setattr(store, "_writer", Full(store._writer))
    assert not store.put(key(1), stored(1))
    assert not store.put(key(2), stored(2))
    assert caplog.text.count("No space left") == 1
    assert torch.equal(store.get(key(0)).values, stored().values)  # type: ignore[union-attr]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="cache_dir"):
        DiskStates(tmp_path / "file" / "below", 100)


def test_what_is_read_ahead_is_read_in_another_thread_and_no_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = on_disk(tmp_path)
    for number in range(4):
        first.put(key(number), stored(number))
    found = on_disk(tmp_path)
    threads = threads_that_load(monkeypatch)
    found.read_ahead([key(0), key(1), key(1), key(9)])
    found.read_ahead([key(1), key(2)])  # 0 is let go
    for number in (0, 1, 2, 3):
        state = found.get(key(number))
        assert state is not None
        assert torch.equal(state.values, states(seed=number))
    assert found.get(key(9)) is None
    in_hand = [name for name in threads if name == "MainThread"]
    assert len(in_hand) == 2
    assert all(name.startswith("rgft-read-ahead") for name in threads if name not in in_hand)
    found.close()
    assert not any(thread.name.startswith("rgft-read-ahead") for thread in threading.enumerate())


def test_damage_that_is_found_while_reading_ahead_is_said_when_it_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = on_disk(tmp_path)
    first.put(key(0), stored())
    first.close()
    (file,) = files(tmp_path)
    found = on_disk(tmp_path)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    found.read_ahead([key(0)])
    assert found.get(key(0)) is None
    assert "the checksum is another" in caplog.text
    assert key(0) not in found
    found.close()

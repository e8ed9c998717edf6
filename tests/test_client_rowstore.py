"""The row store: a dict on disk that survives kills, cuts and flipped bits."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.rowstore import RowStore, open_as_bytes
from common.errors import CacheError

PLAIN = np.dtype(("<f2", (3,)))
SCALAR = np.dtype("<i4")
STRUCTURED = np.dtype([("pixels", "u1", (2, 3)), ("kind", "<u2")])
RECORD_BYTES = 40


def keys_of(*numbers: int) -> np.ndarray:
    joined = b"".join(hashlib.sha256(bytes([number])).digest() for number in numbers)
    return np.frombuffer(joined, "V32")


def rows_of(dtype: np.dtype[Any], *numbers: int) -> np.ndarray:
    """One recognisable row a number, without a zero byte: bytes that are not there read as zeros."""
    content = b"".join(hashlib.shake_128(bytes([number, 7])).digest(dtype.itemsize) for number in numbers)
    content = bytes(1 + byte % 60 for byte in content)
    return np.frombuffer(content, dtype.base).reshape(len(numbers), *dtype.shape)


def holds(store: RowStore, *numbers: int) -> bool:
    """Tell whether the store finds exactly these of the first hundred keys, with the right rows."""
    found = np.flatnonzero(store.find(keys_of(*range(100))) >= 0)
    places = store.find(keys_of(*numbers))
    equal = store.take(places).tobytes() == rows_of(store.row, *numbers).tobytes()
    return found.tolist() == sorted(numbers) and len(store) == len(numbers) and equal


def filled(folder: Path, dtype: np.dtype[Any], *batches: tuple[int, ...]) -> RowStore:
    store = RowStore(folder, dtype)
    for numbers in batches:
        store.append(keys_of(*numbers), rows_of(dtype, *numbers))
    return store


steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.integers(0, 20), unique=True, max_size=6)),
        st.tuples(st.just("find"), st.lists(st.integers(0, 25), max_size=8)),
        st.tuples(st.just("reopen"), st.just([])),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(dtype=st.sampled_from([PLAIN, SCALAR, STRUCTURED]), steps=steps)
def test_behaves_like_a_dict(dtype: np.dtype[Any], steps: list[tuple[str, list[int]]]) -> None:
    known: set[int] = set()
    with tempfile.TemporaryDirectory() as folder:
        store = RowStore(Path(folder), dtype)
        for action, numbers in steps:
            if action == "append":
                store.append(keys_of(*numbers), rows_of(dtype, *numbers))
                known |= set(numbers)
            elif action == "find":
                assert (store.find(keys_of(*numbers)) >= 0).tolist() == [number in known for number in numbers]
            else:
                store = RowStore(Path(folder), dtype)
            assert len(store) == len(known)
            assert store.damaged == 0
        assert holds(store, *sorted(known))


def test_rows_come_back_in_the_order_asked_and_with_the_shape_of_the_dtype(tmp_path: Path) -> None:
    store = filled(tmp_path, PLAIN, (1, 2), (3,))
    places = store.find(keys_of(3, 1, 1, 2))
    taken = store.take(places)
    assert (taken.shape, taken.dtype) == ((4, 3), np.float16)
    np.testing.assert_array_equal(taken, rows_of(PLAIN, 3, 1, 1, 2))
    structured = filled(tmp_path / "structured", STRUCTURED, (4, 5))
    taken = structured.take(structured.find(keys_of(5, 4)))
    assert (taken.dtype, taken["pixels"].shape) == (STRUCTURED, (2, 2, 3))
    np.testing.assert_array_equal(taken, rows_of(STRUCTURED, 5, 4))


def test_taken_rows_are_copies(tmp_path: Path) -> None:
    store = filled(tmp_path, PLAIN, (1,))
    taken = store.take(np.array([0]))
    taken[:] = 0
    assert holds(store, 1)
    assert type(taken) is np.ndarray


@pytest.mark.parametrize("dtype", [PLAIN, SCALAR, STRUCTURED])
def test_an_empty_store_and_empty_batches(tmp_path: Path, dtype: np.dtype[Any]) -> None:
    store = RowStore(tmp_path, dtype)
    store.append(keys_of(), np.zeros((0, *dtype.shape), dtype.base))
    assert len(store) == 0
    assert store.take(np.zeros(0, np.int64)).shape == (0, *dtype.shape)
    assert store.find(keys_of()).shape == (0,)
    assert holds(RowStore(tmp_path, dtype))


def test_rows_of_another_precision_are_converted(tmp_path: Path) -> None:
    store = RowStore(tmp_path, PLAIN)
    store.append(keys_of(1), np.array([[0.1, 2.0, 3.0]], np.float64))
    np.testing.assert_array_equal(store.take(np.array([0])), np.array([[0.1, 2.0, 3.0]], np.float16))


@pytest.mark.parametrize("dtype", [PLAIN, STRUCTURED])
@pytest.mark.parametrize("name", ["rows.bin", "index.bin"])
def test_a_cut_at_any_byte_of_the_last_append_costs_the_rows_behind_it_alone(
    tmp_path: Path, dtype: np.dtype[Any], name: str
) -> None:
    filled(tmp_path / "whole", dtype, (1, 2), (3, 4, 5))
    size = RECORD_BYTES if name == "index.bin" else dtype.itemsize
    borders = {border + near for border in range(2 * size, 5 * size + 1, size) for near in (0, 1, size - 1)}
    for length in sorted({*range(2 * size, 5 * size, 1 if size < 10 else 11), *borders} - {5 * size + 1, 6 * size - 1}):
        folder = tmp_path / "cut"
        shutil.copytree(tmp_path / "whole", folder)
        os.truncate(folder / name, length)
        store = RowStore(folder, dtype)
        assert holds(store, *range(1, 1 + length // size))
        store.append(keys_of(3, 4, 5, 6), rows_of(dtype, 3, 4, 5, 6))
        assert holds(store, 1, 2, 3, 4, 5, 6)
        reopened = RowStore(folder, dtype)
        assert holds(reopened, 1, 2, 3, 4, 5, 6)
        assert reopened.damaged == 0
        assert (folder / "rows.bin").stat().st_size == 6 * dtype.itemsize
        assert (folder / "index.bin").stat().st_size == 6 * RECORD_BYTES
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["rows.bin", "index.bin"])
def test_what_is_left_of_a_cut_append_goes_with_the_next_one(tmp_path: Path, name: str) -> None:
    """Records of rows that are gone, or rows without a record, must not meet later ones."""
    filled(tmp_path, PLAIN, (1, 2), (3, 4, 5))
    os.truncate(tmp_path / name, 2 * (PLAIN.itemsize if name == "rows.bin" else RECORD_BYTES))
    RowStore(tmp_path, PLAIN).append(keys_of(9), rows_of(PLAIN, 9))
    assert (tmp_path / "rows.bin").stat().st_size == 3 * PLAIN.itemsize
    assert (tmp_path / "index.bin").stat().st_size == 3 * RECORD_BYTES
    store = RowStore(tmp_path, PLAIN)
    assert store.damaged == 0
    assert holds(store, 1, 2, 9)


@pytest.mark.parametrize("name", ["rows.bin", "index.bin"])
def test_a_flipped_bit_in_any_byte_costs_its_row_alone_and_the_row_can_be_written_anew(
    tmp_path: Path, name: str
) -> None:
    filled(tmp_path / "whole", PLAIN, (1, 2, 3))
    size = RECORD_BYTES if name == "index.bin" else PLAIN.itemsize
    for place in range(0, 3 * size, 1 if size < 10 else 3):  # 3: keys, both checksums and every bit get their turn
        folder = tmp_path / "flipped"
        shutil.copytree(tmp_path / "whole", folder)
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 1 << place % 8
        (folder / name).write_bytes(content)
        store = RowStore(folder, PLAIN)
        lost = 1 + place // size
        assert store.damaged == 1
        assert holds(store, *({1, 2, 3} - {lost}))
        store.append(keys_of(lost), rows_of(PLAIN, lost))
        assert holds(store, 1, 2, 3)
        assert holds(RowStore(folder, PLAIN), 1, 2, 3)
        shutil.rmtree(folder)


def test_zeros_behind_the_index_are_no_rows(tmp_path: Path) -> None:
    """What some file systems leave of a write when the power fails."""
    filled(tmp_path, PLAIN, (1,))
    for name, size in (("rows.bin", PLAIN.itemsize), ("index.bin", RECORD_BYTES)):
        with (tmp_path / name).open("ab") as file:
            file.write(bytes(2 * size))
    store = RowStore(tmp_path, PLAIN)
    assert len(store) == 1
    assert holds(store, 1)
    store.append(keys_of(2), rows_of(PLAIN, 2))
    assert holds(RowStore(tmp_path, PLAIN), 1, 2)


def test_two_stores_on_one_folder_see_each_other_and_write_nothing_twice(tmp_path: Path) -> None:
    one, two = RowStore(tmp_path, PLAIN), RowStore(tmp_path, PLAIN)
    one.append(keys_of(1, 2), rows_of(PLAIN, 1, 2))
    two.append(keys_of(2, 3), rows_of(PLAIN, 2, 3))
    assert holds(two, 1, 2, 3)
    one.append(keys_of(1, 3, 4), rows_of(PLAIN, 1, 3, 4))
    assert holds(one, 1, 2, 3, 4)
    two.append(keys_of(), rows_of(PLAIN))
    assert holds(two, 1, 2, 3, 4)
    assert (tmp_path / "rows.bin").stat().st_size == 4 * PLAIN.itemsize
    assert (tmp_path / "index.bin").stat().st_size == 4 * RECORD_BYTES


def test_a_key_that_is_held_keeps_its_first_row(tmp_path: Path) -> None:
    store = filled(tmp_path, PLAIN, (1,))
    store.append(keys_of(1), rows_of(PLAIN, 9))
    assert holds(store, 1)


WRITER = """
import sys
from pathlib import Path
import numpy as np
from client.rowstore import RowStore
store = RowStore(Path(sys.argv[1]), np.dtype(("<i8", (50,))))
print("ready", flush=True)
for number in range(len(store), 100_000, 10):
    keys = np.frombuffer(b"".join(n.to_bytes(32, "big") for n in range(number, number + 10)), "V32")
    store.append(keys, np.repeat(np.arange(number, number + 10), 50).reshape(10, 50))
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_whole_rows_in_order(tmp_path: Path) -> None:
    dtype = np.dtype(("<i8", (50,)))
    known = 0
    for delay in (0.0, 0.013, 0.031, 0.057):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
        store = RowStore(tmp_path, dtype)
        assert store.damaged == 0
        assert len(store) >= known
        known = len(store)
        keys = np.frombuffer(b"".join(number.to_bytes(32, "big") for number in range(known + 1)), "V32")
        assert store.find(keys).tolist() == [*range(known), -1]
        np.testing.assert_array_equal(store.take(np.arange(known)), np.arange(known)[:, None].repeat(50, 1))
    assert known > 0


CROWDED = """
import resource, sys
from pathlib import Path
import numpy as np
from client.rowstore import RowStore
from common.errors import CacheError
store = RowStore(Path(sys.argv[1]), np.dtype(("<f2", (3,))))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
keys = np.frombuffer(b"".join(n.to_bytes(32, "big") for n in range(1000)), "V32")
try:
    store.append(keys, np.ones((1000, 3)))
except CacheError as error:
    sys.exit(3 if len(store) == 0 else 4)
"""


@pytest.mark.parametrize("limit", [100, 6_000 + 30_000 - 1])  # in the middle of the rows, in the middle of the index
def test_a_full_disk_is_an_error_and_the_store_goes_on(tmp_path: Path, limit: int) -> None:
    command = [sys.executable, "-c", CROWDED, str(tmp_path), str(limit)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (3, b"")
    whole = limit // RECORD_BYTES if limit > 6_000 else 0  # rows whose record was written before the disk was full
    store = RowStore(tmp_path, PLAIN)
    assert (len(store), store.damaged) == (whole, 0)
    store.append(keys_of(1, 2), rows_of(PLAIN, 1, 2))
    assert len(RowStore(tmp_path, PLAIN)) == whole + 2


def test_a_folder_that_cannot_be_made_is_a_cache_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="cannot be written"):
        RowStore(tmp_path / "file" / "store", PLAIN)


def test_a_folder_that_went_away_is_a_cache_error(tmp_path: Path) -> None:
    store = filled(tmp_path / "store", PLAIN, (1,))
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(CacheError, match="cannot be written"):
        store.append(keys_of(2), rows_of(PLAIN, 2))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_a_cache_error(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir(mode=0o500)
    with pytest.raises(CacheError, match="cannot be written"):
        RowStore(tmp_path / "store", PLAIN)


def test_what_is_taken_out_is_overwritten_and_can_be_added_anew(tmp_path: Path) -> None:
    filled(tmp_path, PLAIN, (1, 2, 3))
    before = (tmp_path / "rows.bin").read_bytes()
    store = RowStore(tmp_path, PLAIN)
    assert store.remove(keys_of(2, 9)) == 1
    after = (tmp_path / "rows.bin").read_bytes()
    size = PLAIN.itemsize
    assert after[size : 2 * size] == bytes(size)
    assert (after[:size], after[2 * size :]) == (before[:size], before[2 * size :])
    again = RowStore(tmp_path, PLAIN)
    assert holds(again, 1, 3) and len(again) == 2 and again.damaged == 0
    again.append(keys_of(2), rows_of(PLAIN, 2))
    assert holds(RowStore(tmp_path, PLAIN), 1, 2, 3)


def test_a_removal_that_was_cut_short_can_be_repeated(tmp_path: Path) -> None:
    filled(tmp_path, PLAIN, (1, 2))
    content = bytearray((tmp_path / "rows.bin").read_bytes())
    content[: PLAIN.itemsize] = bytes(PLAIN.itemsize)  # the row is gone, its record is not
    (tmp_path / "rows.bin").write_bytes(content)
    store = RowStore(tmp_path, PLAIN, verify=False)
    assert store.remove(keys_of(1)) == 1
    assert len(RowStore(tmp_path, PLAIN)) == 1


def test_a_store_is_opened_without_knowing_its_rows(tmp_path: Path) -> None:
    assert open_as_bytes(tmp_path / "none") is None
    filled(tmp_path, PLAIN, (1, 2))
    store = open_as_bytes(tmp_path)
    assert store is not None and len(store) == 2 and store.row.itemsize == PLAIN.itemsize
    assert store.remove(keys_of(1)) == 1
    assert holds(RowStore(tmp_path, PLAIN), 2)

"""Tensors on disk: golden bytes, one hash for one content, and nothing but safetensors is read."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.checkpoint import from_bytes, read_tensors, sha256, to_bytes, write_tensors
from common.errors import CheckpointError

GOLDEN = (
    b"\x70\x00\x00\x00\x00\x00\x00\x00"
    b'{"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"U8","shape":[1,3],"data_offsets":[8,11]}}'
    b"   "
    b"\x00\x00\x80\x3f\x00\x00\x00\xc0\x01\x02\xff"
)
TINY = {"a": np.array([[1, 2, 255]], np.uint8), "b": np.float32([1.0, -2.0])}
DTYPES = [np.uint8, np.uint16, np.int64, np.float16, np.float32, np.float64, np.bool_]
law = settings(deadline=None)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """A few tensors of any name, dtype, shape (scalars and empty ones too) and values."""
    names = st.text(st.characters(exclude_categories=["Cs"]), max_size=4).filter(lambda name: name != "__metadata__")
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
    return draw(st.dictionaries(names, st.sampled_from(DTYPES).flatmap(lambda d: hnp.arrays(d, shapes)), max_size=4))


def encoded(header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[Any], *offsets: int) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}}


def test_golden_bytes() -> None:
    assert to_bytes(TINY) == GOLDEN
    assert sha256(GOLDEN) == hashlib.sha256(GOLDEN).hexdigest()
    back = from_bytes(GOLDEN)
    assert back["a"].tolist() == [[1, 2, 255]]
    assert back["b"].tolist() == [1.0, -2.0]


@law
@given(tensors())
def test_every_name_dtype_shape_and_bit_comes_back(values: dict[str, np.ndarray]) -> None:
    back = from_bytes(to_bytes(values))
    assert back.keys() == values.keys()
    for name, value in values.items():
        assert (back[name].dtype, back[name].shape) == (value.dtype, value.shape)
        assert back[name].tobytes() == value.tobytes()


@law
@given(tensors(), st.randoms(use_true_random=False))
def test_the_bytes_do_not_depend_on_the_order_of_the_names(values: dict[str, np.ndarray], order: Any) -> None:
    names = list(values)
    order.shuffle(names)
    assert to_bytes({name: values[name] for name in names}) == to_bytes(values)


def test_the_bytes_do_not_depend_on_the_layout_in_memory() -> None:
    grid = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert to_bytes({"x": np.asfortranarray(grid)}) == to_bytes({"x": grid}) == to_bytes({"x": grid.T.copy().T})


@pytest.mark.parametrize(
    "other",
    [
        {"b": TINY["b"]},
        {**TINY, "c": np.zeros(0, np.float32)},
        {**TINY, "a": TINY["a"].reshape(3)},
        {**TINY, "a": TINY["a"].astype(np.int8)},
        {**TINY, "b": np.float32([1.0, -1.9999999])},
        {"a": TINY["a"], "B": TINY["b"]},
    ],
)
def test_another_name_dtype_shape_or_value_is_another_hash(other: dict[str, np.ndarray]) -> None:
    assert sha256(to_bytes(other)) != sha256(GOLDEN)


@pytest.mark.parametrize("length", range(len(GOLDEN)))
def test_a_truncated_content_is_refused(length: int) -> None:
    with pytest.raises(CheckpointError, match="not a readable safetensors content"):
        from_bytes(GOLDEN[:length])


@law
@given(st.binary(max_size=200))
def test_garbage_is_refused(content: bytes) -> None:
    with pytest.raises(CheckpointError):
        from_bytes(b"\x93" + content)


@law
@given(st.integers(0, len(GOLDEN) - 1), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_read_as_other_tensors_but_never_a_traceback(place: int, flip: int) -> None:
    damaged = bytearray(GOLDEN)
    damaged[place] ^= flip
    try:
        back = from_bytes(bytes(damaged))
    except CheckpointError:
        return
    assert all(isinstance(value, np.ndarray) for value in back.values())


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        encoded([1]),
        encoded(entry("F32", [2], 0, 4), b"1234"),
        encoded(entry("F32", [1], 4, 8), b"12345678"),
        encoded(entry("F32", [1], 0, 4), b"12345678"),
        encoded(entry("F32", [1.5], 0, 4), b"1234"),
        encoded(entry("F32", [-1], 0, 4), b"1234"),
        encoded(entry("F32", [2**62, 4], 0, 0)),
        encoded(entry("F32", [0, 2**62], 0, 0)),
        encoded(entry("F32", [1] * 70, 0, 4), b"1234"),
        encoded(entry("BF16", [1], 0, 2), b"12"),
        encoded(entry("OBJECT", [1], 0, 8), b"12345678"),
        encoded({**entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)["a"]}, b"123"),
    ],
)
def test_hostile_headers_are_refused(content: bytes) -> None:
    with pytest.raises(CheckpointError) as caught:
        from_bytes(content)
    assert "\n" not in str(caught.value)


class Trap:
    """Tells when it is unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was loaded",))


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(pickle.dumps(Trap()))
    np.save(tmp_path / "array", np.array([Trap()], dtype=object), allow_pickle=True)
    torch.save({"w": torch.ones(2)}, tmp_path / "torch")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    for path in files:
        with pytest.raises(CheckpointError):
            read_tensors(path)


def test_writing_returns_the_hash_that_reading_checks(tmp_path: Path) -> None:
    path = tmp_path / "upper.safetensors"
    digest = write_tensors(path, TINY)
    assert path.read_bytes() == GOLDEN
    assert digest == sha256(GOLDEN)
    assert read_tensors(path, digest).keys() == read_tensors(path).keys() == TINY.keys()


def test_a_file_that_is_not_the_one_recorded_is_damaged_even_where_it_reads(tmp_path: Path) -> None:
    path = tmp_path / "upper.safetensors"
    digest = write_tensors(path, TINY)
    write_tensors(path, {**TINY, "b": np.float32([1.0, -2.5])})
    assert read_tensors(path)["b"][1] == -2.5
    with pytest.raises(CheckpointError, match="damaged: its SHA-256 is not the one recorded; start the run anew"):
        read_tensors(path, digest)


def test_a_missing_file_or_a_folder_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_tensors(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="Is a directory"):
        read_tensors(tmp_path)

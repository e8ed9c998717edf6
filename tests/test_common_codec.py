"""The wire: exact where it must be, rounded as PyTorch and NumPy round where it is not, and golden bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.codec import WIRE_DTYPES, decode, encode, shapes_of, through
from common.run_config import WireType

WIRES: list[WireType] = ["float32", "bfloat16", "float16"]
law = settings(deadline=None)
any_bits = hnp.arrays(np.uint32, st.integers(0, 40), elements=st.integers(0, 2**32 - 1))


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Parameters of any names, shapes and bit patterns."""
    shapes = draw(st.dictionaries(st.text(max_size=3), hnp.array_shapes(min_dims=0, max_side=3), max_size=4))
    bits = st.integers(0, 2**32 - 1)
    return {name: draw(hnp.arrays(np.uint32, shape, elements=bits)).view(np.float32) for name, shape in shapes.items()}


@law
@given(parameters())
def test_float32_comes_back_to_the_last_bit_whatever_the_shapes(values: dict[str, np.ndarray]) -> None:
    back = through(values, "float32")
    assert list(back) == list(values)
    for name, value in values.items():
        assert back[name].shape == value.shape
        assert back[name].dtype == np.float32
        assert back[name].tobytes() == value.tobytes()


def upper_halves(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


@law
@given(any_bits)
def test_bfloat16_rounds_every_bit_pattern_as_pytorch_does(bits: np.ndarray) -> None:
    values = bits.view(np.float32)
    ours, theirs = encode({"w": values}, "bfloat16"), upper_halves(values)
    nan = np.isnan(values)
    np.testing.assert_array_equal(ours[~nan], theirs[~nan])
    assert np.isnan(through({"w": values}, "bfloat16")["w"][nan]).all()  # which NaN is PyTorch's own affair


def test_bfloat16_agrees_on_every_upper_half_with_every_kind_of_remainder() -> None:
    halves = np.arange(2**16, dtype=np.uint32) << 16
    for remainder in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (halves | np.uint32(remainder)).view(np.float32)
        finite = ~np.isnan(values)
        np.testing.assert_array_equal(encode({"w": values[finite]}, "bfloat16"), upper_halves(values[finite]))
        assert np.isnan(through({"w": values[~finite]}, "bfloat16")["w"]).all()


@pytest.mark.parametrize(
    ("bits", "half"),
    [
        (0x3F808000, 0x3F80),  # halfway: to the even one, below
        (0x3F818000, 0x3F82),  # halfway: to the even one, above
        (0x3F808001, 0x3F81),  # just over halfway
        (0x7F7FFFFF, 0x7F80),  # the largest number rounds to infinity
        (0xFF800000, 0xFF80),  # minus infinity
        (0x7F800001, 0x7FC0),  # a NaN whose payload is all in the lower half
        (0xFFFFFFFF, 0x7FC0),  # a NaN that would carry over to zero
        (0x80000001, 0x8000),  # the smallest subnormal, negative: minus zero
        (0x00008001, 0x0001),  # a subnormal that rounds to one
    ],
)
def test_bfloat16_known_roundings(bits: int, half: int) -> None:
    assert encode({"w": np.array([bits], np.uint32).view(np.float32)}, "bfloat16").tolist() == [half]


@law
@given(any_bits)
def test_float16_rounds_as_numpy_does_and_overflows_to_infinity_without_a_warning(bits: np.ndarray) -> None:
    values = bits.view(np.float32)
    with np.errstate(all="ignore"):
        expected = values.astype(np.float16)
    np.testing.assert_array_equal(encode({"w": values}, "float16"), expected)
    np.testing.assert_array_equal(through({"w": values}, "float16")["w"], expected.astype(np.float32))


def test_a_value_beyond_float16_becomes_infinite() -> None:
    assert through({"w": np.float32([65520, -1e30])}, "float16")["w"].tolist() == [np.inf, -np.inf]


@law
@given(parameters(), st.sampled_from(WIRES))
def test_what_went_through_once_goes_through_unchanged(values: dict[str, np.ndarray], wire: WireType) -> None:
    once = through(values, wire)
    twice = through(once, wire)
    for name in once:
        np.testing.assert_array_equal(twice[name], once[name])


@pytest.mark.parametrize(
    ("wire", "golden"),
    [
        ("float32", "0000803f 000000c0 cdcccc3d 01000000"),
        ("bfloat16", "803f 00c0 cd3d 0000"),
        ("float16", "003c 00c0 662e 0000"),
    ],
)
def test_golden_bytes(wire: WireType, golden: str) -> None:
    smallest = np.array(1, np.uint32).view(np.float32)
    vector = encode({"b": np.float32([[1.0], [-2.0]]), "a": np.float32([0.1]), "c": smallest}, wire)
    assert vector.dtype == WIRE_DTYPES[wire]
    assert vector.tobytes() == bytes.fromhex(golden)


@pytest.mark.parametrize("wire", WIRES)
def test_the_order_is_that_of_the_names_given_and_views_of_any_layout_count_in_row_order(wire: WireType) -> None:
    grid = np.arange(6, dtype=np.float32).reshape(2, 3)
    values = {"z": grid.T, "a": np.float32([9.0])}
    assert decode(encode(values, wire), {"all": (7,)}, wire)["all"].tolist() == [0, 3, 1, 4, 2, 5, 9]
    np.testing.assert_array_equal(through(values, wire)["z"], grid.T)


@pytest.mark.parametrize("wire", WIRES)
def test_no_parameters_are_no_bytes(wire: WireType) -> None:
    assert encode({}, wire).tobytes() == b""
    assert through({}, wire) == {}
    assert through({"none": np.zeros((0, 3), np.float32)}, wire)["none"].shape == (0, 3)


@pytest.mark.parametrize("wire", WIRES)
def test_another_dtype_or_length_is_refused(wire: WireType) -> None:
    values = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(1, np.float32)}
    vector, shapes = encode(values, wire), shapes_of(values)
    others = [
        np.dtype(kind) for kind in ("<f4", "<f2", "<u2", "<i2", "<f8", ">f4", "O") if np.dtype(kind) != vector.dtype
    ]
    hostile = [vector[:-1], np.append(vector, vector[:1]), vector[None], vector[:0], vector.reshape(7, 1)]
    for bad in [*hostile, *(vector.astype(kind) for kind in others)]:
        with pytest.raises(ValueError, match=f"expected 7 values of {wire}, got"):
            decode(bad, shapes, wire)


@pytest.mark.parametrize("wire", WIRES)
def test_decoding_gives_values_of_its_own(wire: WireType) -> None:
    values = {"a": np.ones(3, np.float32)}
    vector = encode(values, wire)
    decode(vector, shapes_of(values), wire)["a"][:] = 7
    encode(values, wire)[:] = 0
    assert decode(vector, shapes_of(values), wire)["a"].tolist() == [1, 1, 1]
    assert values["a"].tolist() == [1, 1, 1]

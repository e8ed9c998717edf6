"""What stored values stand for: tables, windows and padding that contradict themselves, each in closed form."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.display import Shown, Stored, shown
from client.image import Unreadable

EVERY = np.arange(256, dtype=np.float32)


def of(header: dict[str, Any], bits: int = 12, values: np.ndarray = EVERY, **kind: Any) -> Shown:
    stored = Stored(**{"bits": bits, "signed": False, "photometric": "MONOCHROME2", "modality": "DX", **kind})
    return shown(values, stored, header, little=True)


def table(descriptor: Any, data: Any) -> list[Any]:
    return [SimpleNamespace(LUTDescriptor=descriptor, LUTData=data)]


# --- windows ----------------------------------------------------------------------------------------------------


@given(st.floats(-1000, 5000), st.floats(1, 5000))
def test_a_linear_window_has_the_ends_of_the_standard(centre: float, width: float) -> None:
    found = of({"WindowCenter": centre, "WindowWidth": width}).window
    assert found is not None
    assert found == pytest.approx((centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2))


@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=5))
def test_the_window_is_a_pair_of_the_file_that_is_possible(pairs: list[tuple[float, float]]) -> None:
    header = {"WindowCenter": [c for c, _ in pairs], "WindowWidth": [w for _, w in pairs]}
    possible = [(c, w) for c, w in pairs if abs(c) <= 1e12 and 1 <= w <= 1e12]
    found = of(header).window
    if not possible:
        assert found is None
    else:
        centre, width = possible[0]
        assert found == pytest.approx((centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2))


def test_a_number_that_is_none_does_not_shift_the_others() -> None:
    header = {"WindowCenter": ["nan", 50.0], "WindowWidth": [11.0, 21.0]}
    assert of(header).window == (39.5, 59.5)


@pytest.mark.parametrize(
    "header", [{"WindowCenter": 5.0}, {"WindowWidth": 5.0}, {"WindowCenter": "x", "WindowWidth": 9}]
)
def test_half_a_window_is_none(header: dict[str, Any]) -> None:
    assert of(header).window is None


@given(st.integers(1, 16), st.booleans())
def test_inverted_twice_is_the_same(bits: int, signed: bool) -> None:
    low, _ = Stored(bits, signed, "MONOCHROME2", "").nominal
    values = np.arange(2**bits, dtype=np.float32) + np.float32(low)
    inverse = of({}, bits, values, signed=signed, photometric="MONOCHROME1").values
    np.testing.assert_array_equal(inverse[::-1], values)
    np.testing.assert_array_equal(of({}, bits, inverse, signed=signed, photometric="MONOCHROME1").values, values)


def test_floating_point_is_inverted_about_zero() -> None:
    values = np.array([-0.25, 0.0, 0.125, 3.5], np.float32)
    np.testing.assert_array_equal(of({}, 0, values, photometric="MONOCHROME1").values, -values)


# --- tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [[5, 6, 7], np.array([5, 6, 7], "<u2").tobytes(), b"\5\6\7", b"\5\6\7\0"])
def test_tables_as_words_and_as_bytes(data: Any) -> None:
    found = of({"ModalityLUTSequence": table([3, 10, 8], data)}, values=np.array([0, 10, 11, 12, 99], np.float32))
    np.testing.assert_array_equal(found.values, [5, 5, 6, 7, 7])


def test_a_table_of_all_values_is_written_as_one_of_none() -> None:
    data = np.arange(2**16)[::-1].tolist()
    found = of({"VOILUTSequence": table([0, 0, 16], data)}, 16, np.array([0, 65535], np.float32))
    np.testing.assert_array_equal(found.values, [65535, 0])


def test_a_count_of_entries_that_was_read_as_signed() -> None:
    data = np.arange(40_000).tolist()
    found = of({"VOILUTSequence": table([40_000 - 2**16, 0, 16], data)}, 16, np.array([39_999, 50_000], np.float32))
    np.testing.assert_array_equal(found.values, [39_999, 39_999])


def test_a_first_value_that_was_written_as_unsigned() -> None:
    found = of(
        {"VOILUTSequence": table([3, 2**16 - 1, 8], [1, 2, 3])}, 8, np.array([-5, -1, 0, 1, 2], np.float32), signed=True
    )
    np.testing.assert_array_equal(found.values, [1, 1, 2, 3, 3])


def test_a_table_that_holds_more_than_it_says_is_shown_whole() -> None:
    found = of({"VOILUTSequence": table([3, 0, 8], [0, 2000, 4000])}, values=np.arange(3, dtype=np.float32))
    assert found.window == (0.0, 4095.0)


def test_a_table_that_is_cut_short_ends_with_its_last_entry() -> None:
    found = of({"VOILUTSequence": table([256, 0, 8], [9, 8])}, values=np.arange(4, dtype=np.float32))
    np.testing.assert_array_equal(found.values, [9, 8, 8, 8])


@pytest.mark.parametrize(
    ("descriptor", "data"),
    [([3, 0], [1, 2, 3]), ([3, 0, 8], []), ([3, 0, 0], [1, 2, 3]), ([3, 0, 17], [1, 2, 3]), ("x", [1]), (None, [1])],
)
def test_tables_that_contradict_themselves(descriptor: Any, data: Any) -> None:
    with pytest.raises(Unreadable, match="damaged"):
        of({"ModalityLUTSequence": table(descriptor, data)})


def test_an_item_without_a_table_is_damage() -> None:
    with pytest.raises(Unreadable, match="damaged"):
        of({"VOILUTSequence": [SimpleNamespace(LUTDescriptor=[3, 0, 8])]})


# --- rescale, Hounsfield units, padding -------------------------------------------------------------------------


@pytest.mark.parametrize("slope", ["", None, 0, "0", float("nan"), "inf", "x"])
@pytest.mark.parametrize("intercept", ["", None, float("inf"), "x"])
def test_a_rescale_that_is_none(slope: Any, intercept: Any) -> None:
    np.testing.assert_array_equal(of({"RescaleSlope": slope, "RescaleIntercept": intercept}).values, EVERY)


@pytest.mark.parametrize(
    ("header", "kind", "expected"),
    [
        ({"RescaleIntercept": -1024}, {"modality": "CT"}, True),
        ({"RescaleIntercept": 0}, {"modality": "CT"}, True),
        ({"RescaleIntercept": -1024}, {"modality": "MR"}, False),
        ({"RescaleIntercept": "x"}, {"modality": "CT"}, False),
        ({}, {"modality": "CT"}, False),
        ({"RescaleIntercept": 0}, {"modality": "CT", "bits": 8}, False),  # a screenshot
        ({"RescaleIntercept": 0}, {"modality": "CT", "photometric": "MONOCHROME1"}, False),
    ],
)
def test_what_counts_as_hounsfield_units(header: dict[str, Any], kind: dict[str, Any], expected: bool) -> None:
    assert of(header, **kind).hounsfield is expected


@given(st.integers(0, 255), st.one_of(st.none(), st.integers(0, 255)))
def test_padding_is_one_value_or_a_range_in_either_order(value: int, limit: int | None) -> None:
    found = of({"PixelPaddingValue": value, "PixelPaddingRangeLimit": limit}).values
    ends = sorted((value, value if limit is None else limit))
    np.testing.assert_array_equal(np.isnan(found), (ends[0] <= EVERY) & (ends[1] >= EVERY))


def test_padding_of_signed_values_that_was_written_as_unsigned() -> None:
    values = np.arange(-2048, 2048, dtype=np.float32)
    found = of({"PixelPaddingValue": 2**16 - 2000}, 12, values, signed=True).values
    np.testing.assert_array_equal(values[np.isnan(found)], [-2000])


@pytest.mark.parametrize("value", ["", None, "x", float("nan"), float("inf")])
def test_padding_that_is_none(value: Any) -> None:
    assert not np.isnan(of({"PixelPaddingValue": value, "PixelPaddingRangeLimit": 9}).values).any()

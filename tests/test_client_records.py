"""Records between processes: what is packed comes back, and nothing but closed words is believed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.image import CODES, IGNORED, KEY_KINDS, Header
from client.records import RECORD, Entry, pack, unpack

digests = st.binary(min_size=16, max_size=16).filter(any)
entries = st.builds(
    Entry,
    code=st.sampled_from(["", *CODES, *IGNORED]),
    header=st.builds(
        Header,
        syntax=st.sampled_from(["", "PNG", "RLELossless", "other"]),
        modality=st.sampled_from(["", "CT", "other"]),
        view=st.sampled_from(["", "PA", "other"]),
        vendor=st.sampled_from(["", "GE", "other"]),
        burned_in=st.sampled_from(["", "yes", "no"]),
        intent=st.sampled_from(["", "presentation", "processing"]),
        month=st.one_of(st.just(0), st.builds(lambda y, m: 100 * y + m, st.integers(1900, 2099), st.integers(1, 12))),
        person=st.one_of(st.just(b""), digests),
        keys=st.dictionaries(st.sampled_from(KEY_KINDS), digests),
        rows=st.integers(0, 2**31),
        frames=st.integers(1, 2**31),
    ),
    kind=st.sampled_from(["grey", "colour"]),
    dhash=st.integers(0, 2**64 - 1),
)


@settings(max_examples=80, deadline=None)
@given(entries)
def test_what_is_packed_comes_back(entry: Entry) -> None:
    row = pack(entry)
    assert unpack(np.frombuffer(row.tobytes(), RECORD)[0]) == entry


@settings(max_examples=80, deadline=None)
@given(st.binary(min_size=RECORD.itemsize, max_size=RECORD.itemsize))
def test_any_bytes_are_closed_words_or_refused(content: bytes) -> None:
    try:
        entry = unpack(np.frombuffer(content, RECORD)[0])
    except ValueError:
        return
    assert entry.code in {"", *CODES, *IGNORED}


def test_a_word_of_the_writers_own_is_refused() -> None:
    row = pack(Entry(""))
    row["vendor"] = b"<b>"
    with pytest.raises(ValueError, match="vendor"):
        unpack(np.frombuffer(row.tobytes(), RECORD)[0])
    row = pack(Entry(""))
    row["seconds"] = np.nan
    with pytest.raises(ValueError, match="seconds"):
        unpack(np.frombuffer(row.tobytes(), RECORD)[0])


@pytest.mark.parametrize(("field", "value"), [("seconds", np.nan), ("seconds", np.inf), ("seconds", -1.0)])
@pytest.mark.parametrize("month", [1, 189500, 202013, 202000, 210101, 2**32 - 1])
def test_numbers_that_cannot_be_are_refused(field: str, value: float, month: int) -> None:
    for name, number in ((field, value), ("month", month)):
        row = pack(Entry(""))
        row[name] = number
        with pytest.raises(ValueError, match=name):
            unpack(np.frombuffer(row.tobytes(), RECORD)[0])

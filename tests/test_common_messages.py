"""Every message as Flower's records and back, and everything that is not exactly a message of the closed set."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any, get_args

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import SiteRefusal
from common.messages import (
    KINDS,
    REFUSALS,
    REQUEST_OF,
    Collect,
    Describe,
    Description,
    Done,
    Evaluate,
    Evaluated,
    Finish,
    Freeze,
    InstallTrunk,
    MalformedMessage,
    Pending,
    Prepare,
    PrivateStatistics,
    PrivateSums,
    Reply,
    Request,
    Statistics,
    Summed,
    Train,
    Trained,
    count_bytes,
    from_bytes,
    from_record,
    pending,
    refusal,
    ticket,
    to_bytes,
    to_record,
)

RAW = "consilium.raw"
COUNTS = np.arange(6, dtype=np.int64).reshape(2, 3)
FLOATS = np.array([[0.5, -1.0, np.inf]])
ONE = np.array([0.25])
EVALUATION = (COUNTS, COUNTS, COUNTS, FLOATS, ONE, ONE)
EXAMPLES: list[Any] = [
    Describe(run="seed = 0\n"),
    Description(site="north", support=COUNTS, trunk_sha256=""),
    InstallTrunk("f" * 64, "0" * 64, np.frombuffer(b"\x00\xff\x10", np.uint8)),
    Prepare("f" * 64),
    Statistics("f" * 64, ONE, gram=True),
    Summed(ONE, ONE, ONE, ONE, ONE, ONE, np.zeros(0), np.zeros((0, 0))),
    PrivateStatistics("f" * 64, gram=False),
    PrivateSums(np.zeros(0), ONE, FLOATS, 2.0, 0.5, 1),
    Freeze("f" * 64, np.float32([1, 2]), np.float32([3, 4]), ONE),
    Done(),
    Train("f" * 64, 3, np.float32([1.5, np.nan]), FLOATS),
    Train("f" * 64, 3, np.uint16([1, 2, 65535]), FLOATS),
    Trained(np.float16([1.5]), 12, 0.5, *EVALUATION),
    Evaluate("f" * 64, "test", np.float32([1.5]), FLOATS),
    Evaluated(*EVALUATION),
    Finish("f" * 64, "completed"),
    Collect("0" * 64),
    Pending("0" * 64, "features", 3, 0),
]
law = settings(deadline=None, max_examples=50)


def same(one: Any, other: Any) -> bool:
    if not isinstance(one, np.ndarray):
        return type(one) is type(other) and one == other
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    assert all(same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))


def records(weights: Any = None, arrays: Any = None, facts: Any = None) -> RecordDict:
    """Records as a hostile peer might make them; None leaves the record out."""
    given = {"weights": weights, "arrays": arrays, "facts": facts}
    kinds: dict[str, Callable[[Any], Any]] = {"weights": ArrayRecord, "arrays": ArrayRecord, "facts": ConfigRecord}
    return RecordDict({name: kinds[name](value) for name, value in given.items() if value is not None})


def install(array: Array) -> RecordDict:
    return records({}, {"content": array}, {"fingerprint": "f", "sha256": "s"})


# ---------------------------------------------------------------------------------------------------- the closed set


def test_every_request_and_reply_is_in_the_examples_and_every_request_has_a_kind() -> None:
    requests, replies = set(get_args(Request)), {*get_args(Reply), Pending}
    assert {type(example) for example in EXAMPLES} == requests | replies
    assert set(KINDS) == set(REQUEST_OF.values()) == requests
    assert {reply for _, reply in KINDS.values()} == replies
    assert len(REQUEST_OF) == len(KINDS)
    assert {kind.split(".")[0] for kind in REQUEST_OF} == {"query", "train", "evaluate"}
    assert all(is_dataclass(kind) for kind in requests | replies)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_equal_in_type_dtype_shape_and_bits(message: Any) -> None:
    assert_same(from_record(to_record(message), type(message)), message)


@law
@given(
    st.sampled_from([np.float32, np.float16, np.uint16]).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(max_dims=2, min_side=0, max_side=4))
    ),
    st.integers(-(2**63), 2**63 - 1),
)
def test_weights_of_any_wire_type_and_any_round_come_back(weights: np.ndarray, number: int) -> None:
    message = Train("f", number, weights, np.zeros((1, 3)))
    assert_same(from_record(to_record(message), Train), message)


def test_a_big_endian_or_strided_array_travels_as_its_values() -> None:
    edges = np.arange(12, dtype=">f8").reshape(3, 4)[:, ::2]
    back = from_record(to_record(Evaluate("f", "test", np.float32([1]), edges)), Evaluate)
    assert back.edges.dtype == np.dtype("<f8")
    np.testing.assert_array_equal(back.edges, edges)


def test_no_two_types_are_read_as_each_other() -> None:
    for message in EXAMPLES:
        for other in {type(example) for example in EXAMPLES} - {type(message)}:
            with pytest.raises(MalformedMessage):
                from_record(to_record(message), other)


# --------------------------------------------------------------------------------------------------------- malformed


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_any_missing_field_is_malformed(message: Any) -> None:
    for field in fields(message):
        record = to_record(message)
        for part in record.values():
            part.pop(field.name, None)
        with pytest.raises(MalformedMessage, match="other fields than expected"):
            from_record(record, type(message))


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_any_extra_field_is_malformed(message: Any) -> None:
    with_fact, with_array = to_record(message), to_record(message)
    with_fact.config_records["facts"]["another"] = 1.0
    with_array.array_records["arrays"]["more"] = Array("uint8", (1,), RAW, b"x")
    for record in (with_fact, with_array):
        with pytest.raises(MalformedMessage, match="other fields than expected"):
            from_record(record, type(message))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("round", 1.0), ("round", True), ("round", "1"), ("round", [1]),
        ("fingerprint", b"f"), ("fingerprint", 7), ("fingerprint", ["f"]),
        ("edges", 0.5), ("edges", [0.5, 1.0]), ("weights", "none"),
    ],
)  # fmt: skip
def test_a_fact_of_another_type_is_malformed(name: str, value: Any) -> None:
    record = to_record(Train("f", 1, np.float32([1]), FLOATS))
    for part in record.values():
        part.pop(name, None)
    record.config_records["facts"][name] = value
    with pytest.raises(MalformedMessage, match=rf"Train\.{name}: not "):
        from_record(record, Train)


def test_a_whole_number_for_a_loss_or_an_array_for_a_fact_is_malformed() -> None:
    record = to_record(Trained(np.float16([1.5]), 12, 0.5, *EVALUATION))
    record.config_records["facts"]["train_loss"] = 1
    with pytest.raises(MalformedMessage, match=r"Trained\.train_loss: not a fact of type float"):
        from_record(record, Trained)
    hidden = records({}, {"fingerprint": Array("uint8", (1,), RAW, b"f")}, {})
    with pytest.raises(MalformedMessage, match=r"Prepare\.fingerprint: not a fact of type str"):
        from_record(hidden, Prepare)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_every_array_of_another_dtype_is_malformed_where_the_message_fixes_one(message: Any) -> None:
    for field in fields(message):
        value = getattr(message, field.name)
        if not isinstance(value, np.ndarray) or field.name == "weights":
            continue
        for dtype in {"uint8", "int64", "float32", "float64"} - {value.dtype.name}:
            with np.errstate(all="ignore"):
                changed = value.astype(dtype)
            record = to_record(message)
            record.array_records["arrays"][field.name] = Array(dtype, changed.shape, RAW, changed.tobytes())
            with pytest.raises(MalformedMessage, match=rf"{field.name}: not an array of type"):
                from_record(record, type(message))


@pytest.mark.parametrize(
    "array",
    [
        Array("uint8", (4,), RAW, b"123"),
        Array("uint8", (2,), RAW, b"123"),
        Array("uint8", (), RAW, b""),
        Array("uint8", (0,), RAW, b"1"),
        Array("uint8", (-1,), RAW, b"1"),
        Array("uint8", (-1, -3), RAW, b"123"),
        Array("uint8", (2**62, 4), RAW, b""),
        Array("uint8", (0, 2**62, 2**62), RAW, b""),
        Array("uint8", (1,) * 70, RAW, b"1"),
        Array("uint16", (3,), RAW, b"123"),
        Array("object", (1,), RAW, b"12345678"),
        Array("complex64", (1,), RAW, b"12345678"),
        Array("", (1,), RAW, b"1"),
        Array("<u1", (1,), RAW, b"1"),
        Array("uint8", (3,), "numpy.ndarray", b"123"),
        Array("uint8", (3,), "", b"123"),
    ],
    ids=lambda array: f"{array.dtype}{array.shape[:4]}{array.stype}{len(array.data)}",
)
def test_an_array_that_is_not_its_shape_dtype_and_encoding_is_malformed(array: Array) -> None:
    with pytest.raises(MalformedMessage, match=r"^an array|InstallTrunk\.content"):
        from_record(install(array), InstallTrunk)


def test_flowers_own_serialisation_is_never_loaded() -> None:
    with pytest.raises(MalformedMessage, match="an array of unknown encoding"):
        from_record(install(Array(np.zeros(3, np.uint8))), InstallTrunk)


@pytest.mark.parametrize(
    "record",
    [
        RecordDict(),
        records(weights={}, arrays={}),
        RecordDict({"facts": ArrayRecord()}),
        RecordDict({"weights": ConfigRecord(), "facts": ConfigRecord()}),
        records({}, {}, {}),
    ],
)
def test_records_of_other_names_or_kinds_are_malformed(record: RecordDict) -> None:
    with pytest.raises(MalformedMessage):
        from_record(record, Prepare)


def test_what_is_received_cannot_change_what_was_sent() -> None:
    message = Freeze("f", np.float32([1, 2]), np.float32([3, 4]), ONE)
    back = from_record(to_record(message), Freeze)
    with pytest.raises(ValueError, match="read-only"):
        back.mean[0] = 9


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("code", REFUSALS)
@pytest.mark.parametrize("expected", [reply for _, reply in KINDS.values()])
def test_a_refusal_answers_any_request_with_its_code(code: str, expected: type[Any]) -> None:
    with pytest.raises(SiteRefusal) as caught:
        from_record(refusal(code), expected)
    assert caught.value.code == code


@pytest.mark.parametrize("text", ["", "/data/MRN-1234/ct.dcm not found", "Internal", "internal\n", "not_prepared "])
def test_no_other_text_leaves_or_enters_as_a_code(text: str) -> None:
    assert dict(refusal(text)["facts"]) == {"refused": "internal"}
    hostile = records(facts={"refused": text})
    with pytest.raises(SiteRefusal) as caught:
        from_record(hostile, Done)
    assert str(caught.value) == "internal"


@pytest.mark.parametrize("value", [1, 0.5, b"malformed", ["malformed"], True])
def test_a_code_that_is_no_text_is_internal(value: Any) -> None:
    with pytest.raises(SiteRefusal, match=r"^internal$"):
        from_record(records(facts={"refused": value}), Done)


def test_a_refusal_with_anything_beside_it_is_malformed() -> None:
    with pytest.raises(MalformedMessage):
        from_record(records(facts={"refused": "internal", "why": "see /data"}), Done)


# ----------------------------------------------------------------------------------------------------------- tickets


def test_equal_requests_are_called_alike_and_others_are_not() -> None:
    requests = [message for message in EXAMPLES if isinstance(message, get_args(Request))]
    called = [ticket(request) for request in requests]
    assert len(set(called)) == len(requests)
    assert all(re.fullmatch("[0-9a-f]{64}", name) for name in called)
    assert [ticket(from_record(to_record(request), type(request))) for request in requests] == called


def test_one_field_is_enough_to_be_called_differently() -> None:
    assert ticket(Train("f", 1, np.float32([1]), FLOATS)) != ticket(Train("f", 2, np.float32([1]), FLOATS))
    assert ticket(PrivateStatistics("f", gram=True)) != ticket(PrivateStatistics("f", gram=False))


# ------------------------------------------------------------------------------------------------------------- bytes


def test_bytes_of_weights_are_counted_apart() -> None:
    # facts: "fingerprint" + 64, "round" + 8; arrays: three float64
    assert count_bytes(to_record(Train("f" * 64, 3, np.uint16([1, 2, 3]), FLOATS))) == (6, 11 + 64 + 5 + 8 + 24)
    assert count_bytes(to_record(Statistics("ab", ONE, gram=True))) == (0, 11 + 2 + 4 + 1 + 8)
    assert count_bytes(to_record(Done())) == (0, 0)
    assert count_bytes(refusal("internal")) == (0, 7 + 8)


@law
@given(st.integers(0, 50), st.sampled_from([np.float32, np.float16, np.uint16]))
def test_half_the_precision_is_half_the_bytes_of_weights_and_changes_nothing_else(size: int, dtype: Any) -> None:
    def bytes_of(kind: Any) -> tuple[int, int]:
        return count_bytes(to_record(Evaluate("f", "test", np.zeros(size, kind), FLOATS)))

    assert bytes_of(dtype)[0] == size * np.dtype(dtype).itemsize
    assert bytes_of(dtype)[1] == bytes_of(np.float64)[1]


def test_an_empty_text_and_one_beyond_ascii_are_counted() -> None:
    assert count_bytes(to_record(Description("", np.zeros((3, 0), np.int64), ""))) == (
        0,
        sum(len(field.name) for field in fields(Description) if field.name != "support") + 9 * 8,
    )
    assert count_bytes(to_record(Describe("ü")))[1] == len("run" + "version" + "ended") + 2


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_equal_as_bytes(message: Any) -> None:
    assert_same(from_record(from_bytes(to_bytes(to_record(message))), type(message)), message)


@law
@given(st.binary(max_size=200), st.integers(0, 2**32))
def test_bytes_that_are_no_records_are_malformed(noise: bytes, place: int) -> None:
    whole = to_bytes(to_record(EXAMPLES[1]))
    spoiled = bytearray(whole)
    spoiled[place % len(whole)] ^= 1 + place % 255
    for content in (noise, bytes(spoiled), whole[: place % len(whole)]):
        with suppress(MalformedMessage):
            assert isinstance(from_bytes(content), RecordDict)


def test_only_an_answer_that_waits_is_pending() -> None:
    found = {type(example) for example in EXAMPLES if pending(to_record(example)) is not None}
    assert found == {Pending}
    assert pending(refusal("busy")) is None

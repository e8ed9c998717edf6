"""What was made once leaves as it was made, whatever a crash does; and what it holds is shown before it leaves."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from client.outbox import Outbox, describe
from common import codec
from common.errors import CheckpointError, UsageError
from common.messages import Summed, packed, to_bytes, to_record

FACTS = {"run": "aa" * 32, "round": 3}


@pytest.fixture
def box(tmp_path: Path) -> Outbox:
    return Outbox.at(tmp_path)


def summed() -> Summed:
    return Summed(*(np.full(3, float(k)) for k in range(8)))


def test_what_was_put_comes_back_byte_for_byte(box: Outbox, tmp_path: Path) -> None:
    content = os.urandom(5000) + b"\n{}\n" + bytes(9)
    assert box.get("t") is None
    path = box.put("t", "train", content, FACTS)
    assert path.parent == tmp_path / "outbox"
    assert [stat.S_IMODE(one.stat().st_mode) for one in (path.parent, path)] == [0o700, 0o600]
    assert box.get("t") == Outbox.at(tmp_path).get("t") == content
    (letter,) = box.letters()
    assert (letter.ticket, letter.kind, letter.run, letter.nbytes) == ("t", "train", FACTS["run"], len(content))
    assert (letter.sha256, letter.facts) == (hashlib.sha256(content).hexdigest(), FACTS)
    assert box.put("t", "train", content, FACTS) == path  # the same again is nothing new
    assert len(box.letters()) == 1


def test_there_is_one_answer_to_a_question(box: Outbox) -> None:
    box.put("t", "train", b"one", FACTS)
    with pytest.raises(CheckpointError, match="another reply to the same request"):
        box.put("t", "train", b"two", FACTS)
    assert box.get("t") == b"one"


@pytest.mark.parametrize("empty", [b"", b"\n"])
def test_replies_of_any_content(empty: bytes, box: Outbox) -> None:
    box.put("../../etc\n\udcff", "", empty, {})
    assert box.get("../../etc\n\udcff") == empty


def test_the_newest_of_each_run_are_kept(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "box", kept=2)
    for number in range(5):
        for name in ("aa", "bb"):
            box.put(f"{name}{number}", "train", bytes([number]), {"run": name})
            box.mark_sent(f"{name}{number}")
    assert [letter.ticket for letter in box.letters()] == ["aa3", "bb3", "aa4", "bb4"]
    assert box.get("aa0") is None
    box.mark_sent("aa0")  # of long ago
    assert box.drop("aa") == 2
    assert [letter.ticket for letter in box.letters()] == ["bb3", "bb4"]
    assert len(list((tmp_path / "box").iterdir())) == 4  # each with its mark


def test_held_released_sent(box: Outbox, tmp_path: Path) -> None:
    for ticket in ("one", "two"):
        box.put(ticket, "train", ticket.encode(), FACTS)
    assert [letter.ticket for letter in box.held()] == ["one", "two"]
    assert not box.is_released("one")
    box.release("one")
    box.release("one")
    assert Outbox.at(tmp_path).is_released("one")
    assert [letter.ticket for letter in box.held()] == ["two"]
    box.mark_sent("two")
    assert box.held() == ()
    assert [(letter.released, letter.sent) for letter in box.letters()] == [(True, False), (False, True)]
    with pytest.raises(UsageError, match="there is no reply to 'three'"):
        box.release("three")
    assert not box.is_released("three")


def damage(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(change(path.read_bytes())), None)[1]


@pytest.mark.parametrize(
    "harm",
    [
        damage(lambda content: content[:-1]),
        damage(lambda content: content + b"x"),
        damage(lambda content: content[:-1] + b"!"),
        damage(lambda content: b""),
        damage(lambda content: b"[" * 10000),
        damage(lambda content: b"\xff" + content),
        damage(lambda content: content.replace(b'"ticket"', b'"tick"')),
        damage(lambda content: content.replace(b'"facts": {', b'"facts": 1, "x": {')),
    ],
)
def test_what_is_damaged_is_not_sent_and_not_made_again(harm: Callable[[Path], None], box: Outbox) -> None:
    path = box.put("t", "train", b"content", FACTS)
    harm(path)
    with pytest.raises(CheckpointError, match="damaged, so it is not sent"):
        box.get("t")
    with pytest.raises(CheckpointError):
        box.put("t", "train", b"content", FACTS)
    box.put("u", "train", b"other", FACTS)
    assert box.get("u") == b"other"
    box.drop(FACTS["run"])


def test_a_link_is_no_reply(box: Outbox, tmp_path: Path) -> None:
    path = box.put("t", "train", b"content", FACTS)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError):
        box.get("t")


KILLED = """
import os, signal, sys
from pathlib import Path
import client.outbox as outbox
def dies(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "before": Path.replace = dies
elif sys.argv[2] == "after": outbox.Outbox._sync = dies
else: outbox.Outbox._prune = dies
outbox.Outbox.at(Path(sys.argv[1])).put("t", "train", b"made" * 9999, {"run": "aa"})
"""


@pytest.mark.parametrize(("when", "there"), [("before", False), ("after", True), ("pruning", True)])
def test_a_crash_leaves_the_whole_reply_or_none(when: str, there: bool, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), when], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    box = Outbox.at(tmp_path)
    assert box.get("t") == (b"made" * 9999 if there else None)
    box.put("t", "train", b"made" * 9999, {"run": "aa"})
    assert box.get("t") == b"made" * 9999
    assert len(box.letters()) == 1


def test_every_array_and_every_fact_is_shown() -> None:
    content = to_bytes(to_record(summed()))
    shown = describe(content)
    assert (shown["bytes"], shown["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert shown["readable"]
    assert {one["name"] for one in shown["arrays"]} == set(vars(summed()))
    (gram,) = (one for one in shown["arrays"] if one["name"] == "gram")
    assert (gram["dtype"], gram["shape"], gram["bytes"]) == ("float64", [3], 24)
    assert gram["norm"] == pytest.approx(6 * 3**0.5)
    assert gram["sha256"] == hashlib.sha256(np.full(3, 6.0).tobytes()).hexdigest()
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown


@pytest.mark.parametrize("wire", ["float32", "float16", "bfloat16"])
def test_a_vector_of_weights_is_shown_tensor_by_tensor(wire: Any) -> None:
    parameters = {"head.weight": np.float32([[3, 4], [0, 0]]), "head.bias": np.float32([2])}
    vector = codec.encode(parameters, wire)
    array = Array(dtype=vector.dtype.name, shape=vector.shape, stype="consilium.raw", data=vector.tobytes())
    record = RecordDict(
        {"weights": ArrayRecord({"weights": array}), "facts": ConfigRecord({"train_loss": 0.5, "n": 7})}
    )
    shown = describe(to_bytes(packed(to_bytes(record))), codec.shapes_of(parameters))
    (weights,) = shown["arrays"]
    assert (weights["dtype"], weights["norm"]) == (wire, pytest.approx(29**0.5))
    assert [(one["name"], one["shape"], one["norm"]) for one in weights["parts"]] == [
        ("head.weight", [2, 2], 5.0),
        ("head.bias", [1], 2.0),
    ]
    assert sum(one["bytes"] for one in weights["parts"]) == weights["bytes"]
    assert weights["parts"][1]["sha256"] == hashlib.sha256(vector[4:].tobytes()).hexdigest()
    assert {one["name"]: one["value"] for one in shown["facts"]} == {"train_loss": 0.5, "n": 7}
    assert "parts" not in describe(to_bytes(record), {"head.weight": (9,)})["arrays"][0]  # of another model


def record_of(array: Array) -> bytes:
    return to_bytes(RecordDict({"weights\x1b[31m": ArrayRecord({"w" * 999: array})}))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 99,
        os.urandom(300),
        record_of(Array(dtype="float32", shape=(3,), stype="consilium.raw", data=b"1234")),
        record_of(Array(dtype="float32", shape=(2**30, 2**30), stype="consilium.raw", data=b"")),
        record_of(Array(dtype="float32", shape=(-1,), stype="consilium.raw", data=b"")),
        record_of(Array(dtype="object", shape=(1,), stype="numpy.ndarray", data=b"\x80\x04")),
        record_of(Array(dtype="float32", shape=(2,), stype="consilium.raw", data=np.float32([np.nan, 1]).tobytes())),
        record_of(Array(dtype="float64", shape=(1,), stype="consilium.raw", data=np.float64([1e300]).tobytes())),
        to_bytes(RecordDict({"packed": ConfigRecord({"packed": b"\xff" * 99})})),
        to_bytes(RecordDict({"m": MetricRecord({"loss": float("nan")}), "c": ConfigRecord({"t": "\x07\n" * 999})})),
        to_bytes(RecordDict({"c": ConfigRecord({"b": b"\x00" * 999, "l": [1] * 999, "e": ""})})),
    ],
)
def test_hostile_bytes_are_shown_as_what_they_are(content: bytes) -> None:
    for names in (None, {"a": (1,)}):
        shown = describe(content, names)
        text = json.dumps(shown, allow_nan=False)
        assert shown["bytes"] == len(content)
        assert len(text) < 3000
        assert all(letter.isprintable() for one in shown["arrays"] + shown["facts"] for letter in str(one))


@given(st.binary(max_size=300))
def test_any_bytes_can_be_shown(content: bytes) -> None:
    json.dumps(describe(content), allow_nan=False)


@given(st.integers(0, 400), st.integers(0, 255))
def test_bytes_that_were_changed_can_be_shown(place: int, value: int) -> None:
    content = bytearray(to_bytes(to_record(summed())))
    content[place % len(content)] = value
    json.dumps(describe(bytes(content)), allow_nan=False)

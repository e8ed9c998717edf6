"""The true Flower app of a site: every request is answered, and nothing but a code leaves when something fails."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.serde import message_to_proto

from client.app import Handle, make_app
from client.cohort import Cohort
from client.memory import Memory
from client.site import Site
from client.workshop import Workshop, threads
from common import checkpoint, codec, metrics, model
from common.errors import CacheError, SiteRefusal
from common.messages import (
    KINDS,
    REFUSALS,
    REQUEST_OF,
    Collect,
    Describe,
    Done,
    Evaluate,
    Finish,
    Freeze,
    InstallTrunk,
    MalformedMessage,
    Prepare,
    PrivateStatistics,
    Request,
    Statistics,
    Train,
    from_record,
    to_record,
)
from common.run_config import RunConfig
from simulations.grid import InProcessGrid
from simulations.hospitals import guard_of

CANARIES = ("Doe^Jane", "19470113", "/srv/pacs/oncology/ward-7/0001.dcm")
SIZES = (12, 6, 6)


@pytest.fixture(autouse=True)
def _one_core(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small batches gain nothing from threads, which wait for each other where the machine is busy."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {0})
    with threads(1):
        yield


def noise(source: Callable[[np.ndarray], np.ndarray] | None = None) -> Cohort:
    count = sum(SIZES)
    images = np.random.default_rng(7).integers(0, 256, (count, 1, 32, 32), np.uint8)
    digests = b"".join(hashlib.sha256(image).digest() for image in images)
    return Cohort(
        source=source or (lambda rows: images[rows]),
        rows=np.arange(count),
        digests=np.frombuffer(digests, np.uint8).reshape(count, 32),
        labels=np.arange(count) % 2,
        splits=np.repeat(np.arange(3), SIZES).astype(np.int8),
        patients=np.arange(count),
        label_names=("dark", "bright"),
        preprocessing="noise",
    )


def requests(**changes: Any) -> list[Request]:
    """One request of each kind, in an order that a site can follow."""
    values: dict[str, Any] = {
        "task": {"name": "noise", "labels": ("dark", "bright")},
        "data": {"preset": "generic", "image_size": 32, "views": 1, "preprocessing": "noise"},
        "model": {"backbone": "test_efficientnet", "weights": "none"},
        "training": {"batch_size": 8},
    }
    run = RunConfig.model_validate({**values, **{name: {**values.get(name, {}), **v} for name, v in changes.items()}})
    built = model.pretrained(run)
    content = model.frozen_content(built, run)
    sha256 = checkpoint.sha256(content)
    run = run.model_copy(update={"model": run.model.model_copy(update={"trunk_sha256": sha256})})
    name, weights = run.fingerprint(), codec.encode(model.trainable_values(built.upper), "float32")
    width, edges = built.upper.head.linear.in_features, metrics.coarse_edges(2, bins=16)
    return [
        Describe(run.to_toml()),
        InstallTrunk(name, sha256, np.frombuffer(content, np.uint8)),
        Prepare(name),
        Statistics(name, np.ones(2), gram=True),
        PrivateStatistics(name, gram=False),
        Freeze(name, np.zeros(width, np.float32), np.ones(width, np.float32), np.ones(2)),
        Train(name, 1, weights, edges),
        Evaluate(name, "test", weights, edges),
        Finish(name, "completed"),
        Collect("0" * 64),
    ]


@pytest.fixture(scope="module")
def conversation() -> list[Request]:
    """The requests of a run without privacy, and one that such a run does not need."""
    return requests()


@pytest.fixture(scope="module")
def private_conversation() -> list[Request]:
    """The same of a private run."""
    return requests(privacy={"noise_multiplier": 2.0}, model={"scaling": "stages"}, training={"draw": "patients"})


def ask(handle: Handle, record: RecordDict, kind: str) -> Message:
    """Send a record through Flower to a site of one function and return the message that comes back."""
    grid = InProcessGrid(make_app(lambda _node: handle), ["north"])
    (reply,) = grid.send_and_receive([Message(record, dst_node_id=1, message_type=kind)])
    return reply


def refused(reply: Message) -> str:
    """Return the code of a refusal that holds a code and nothing else."""
    assert not reply.has_error()
    assert {name: dict(record) for name, record in reply.content.items()} == {
        "facts": {"refused": reply.content.config_records["facts"]["refused"]}
    }
    with pytest.raises(SiteRefusal) as refusal:
        from_record(reply.content, Done)
    return refusal.value.code


def kind_of(request: Request) -> str:
    return KINDS[type(request)][0]


def site_of(folder: Path, cohort: Cohort | None = None) -> Handle:
    memory = Memory.at(folder, "north")
    guard = guard_of(folder / "ledgers", memory, "north")
    return Site("north", cohort or noise(), Workshop(folder / "cache", "cpu"), memory, guard=guard).handle


def answers_all(handle: Handle, conversation: list[Request], superfluous: type[Request]) -> None:
    """Expect a reply of its kind to each request but the one that the run has no use for."""
    assert {type(request) for request in conversation} == set(KINDS)
    for request in conversation[:-1]:
        kind, expected = KINDS[type(request)]
        reply = ask(handle, to_record(request), kind)
        assert not reply.has_error()
        assert reply.metadata.message_type == kind
        if isinstance(request, superfluous):
            assert refused(reply) == "malformed"
        else:
            assert isinstance(from_record(reply.content, expected), expected)
    collect = conversation[-1]
    assert refused(ask(handle, to_record(collect), kind_of(collect))) == "unknown_ticket"  # nothing waits in a process


def test_every_kind_of_message_is_answered(conversation: list[Request], tmp_path: Path) -> None:
    answers_all(site_of(tmp_path), conversation, PrivateStatistics)


def test_a_private_run_gets_no_exact_sums(private_conversation: list[Request], tmp_path: Path) -> None:
    answers_all(site_of(tmp_path), private_conversation, Statistics)


def test_answers_are_those_of_the_site(conversation: list[Request], tmp_path: Path) -> None:
    through, straight = site_of(tmp_path / "through"), site_of(tmp_path / "straight")
    for request in conversation[:-1]:
        if isinstance(request, PrivateStatistics):
            continue  # refused, as above
        reply = ask(through, to_record(request), kind_of(request)).content
        assert reply == to_record(straight(request))


def test_each_node_finds_its_own_site(conversation: list[Request]) -> None:
    asked: list[int] = []

    def open_site(node: Mapping[str, Any]) -> Handle:
        asked.append(int(node["partition-id"]))
        return lambda _request: Done()

    grid = InProcessGrid(make_app(open_site), ["north", "south", "west"])
    prepare = conversation[2]
    for node in (3, 1):
        list(grid.send_and_receive([Message(to_record(prepare), dst_node_id=node, message_type=kind_of(prepare))]))
    assert asked == [2, 0]


# What goes wrong inside

ERRORS = [
    RuntimeError(*CANARIES),
    KeyError(CANARIES[0]),
    FileNotFoundError(2, "No such file", CANARIES[2]),
    CacheError(" ".join(CANARIES)),
    MalformedMessage(" ".join(CANARIES)),
    ValueError(f"could not convert {CANARIES[0]!r} to float"),
    MemoryError(CANARIES[1]),
    SiteRefusal(" ".join(CANARIES)),  # a code that is not of the list
    AssertionError(),
    UnicodeDecodeError("utf-8", CANARIES[0].encode() + b"\xff", 0, 1, CANARIES[2]),
]


def bytes_of(reply: Message) -> bytes:
    return message_to_proto(reply).SerializeToString()


def tells_nothing(reply: Message) -> bool:
    content = bytes_of(reply)
    parts = [part for canary in CANARIES for part in (canary, canary.split("/")[-1], canary.split("^")[0])]
    return not any(part.encode() in content for part in parts)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("position", range(len(KINDS)), ids=[request.__name__ for request in KINDS])
def test_an_error_inside_leaves_as_a_code(
    conversation: list[Request], error: Exception, position: int, caplog: pytest.LogCaptureFixture
) -> None:
    request = next(request for request in conversation if isinstance(request, list(KINDS)[position]))

    def fail(_request: Request) -> Done:
        raise error

    with caplog.at_level(logging.CRITICAL + 1):
        reply = ask(fail, to_record(request), kind_of(request))
    assert refused(reply) == "internal"
    assert tells_nothing(reply)


def test_a_site_that_cannot_be_opened_leaves_as_a_code(conversation: list[Request]) -> None:
    def open_site(_node: Mapping[str, Any]) -> Handle:
        raise PermissionError(13, "Permission denied", CANARIES[2])

    grid = InProcessGrid(make_app(open_site), ["north"])
    request = conversation[0]
    (reply,) = grid.send_and_receive([Message(to_record(request), dst_node_id=1, message_type=kind_of(request))])
    assert refused(reply) == "internal"
    assert tells_nothing(reply)


def test_images_that_cannot_be_read_leave_as_a_code(conversation: list[Request], tmp_path: Path) -> None:
    """The real site, and a reader that fails."""

    def source(rows: np.ndarray) -> np.ndarray:
        raise OSError(5, f"Input/output error, patient {CANARIES[0]}", CANARIES[2])

    handle = site_of(tmp_path, noise(source))
    answers = {type(request): ask(handle, to_record(request), kind_of(request)) for request in conversation}
    assert refused(answers[Prepare]) == "internal"
    assert [refused(answers[kind]) for kind in (Statistics, Train, Evaluate)] == ["not_prepared"] * 3
    assert all(tells_nothing(answer) for answer in answers.values())


def test_an_answer_that_is_none_of_the_replies_leaves_as_a_code(conversation: list[Request]) -> None:
    for answer in (None, CANARIES[0], {"patient": CANARIES[0]}):
        reply = ask(lambda _request, answer=answer: answer, to_record(conversation[2]), kind_of(conversation[2]))
        assert refused(reply) == "internal"
        assert tells_nothing(reply)


def test_the_sites_own_log_says_why(conversation: list[Request], caplog: pytest.LogCaptureFixture) -> None:
    def fail(_request: Request) -> Done:
        raise KeyError(CANARIES[0])

    with caplog.at_level(logging.ERROR, logger="consilium.site"):
        ask(fail, to_record(conversation[2]), kind_of(conversation[2]))
    assert CANARIES[0] in caplog.text


@pytest.mark.parametrize("code", REFUSALS)
def test_a_refusal_keeps_its_code(conversation: list[Request], code: str) -> None:
    def refuse(_request: Request) -> Done:
        raise SiteRefusal(code)

    assert refused(ask(refuse, to_record(conversation[2]), kind_of(conversation[2]))) == code


# What cannot be read


def never(request: Request) -> Done:
    raise AssertionError(f"a {type(request).__name__} reached the site")


def changed(record: RecordDict, **facts: Any) -> RecordDict:
    return RecordDict({**record, "facts": ConfigRecord({**record.config_records["facts"], **facts})})


@pytest.mark.parametrize("kind", sorted(REQUEST_OF))
def test_records_of_another_kind_are_malformed(conversation: list[Request], kind: str) -> None:
    every = [to_record(request) for request in conversation if kind_of(request) != kind]
    hostile = [
        RecordDict(),
        RecordDict({"facts": ConfigRecord()}),
        RecordDict({"facts": ConfigRecord({"refused": "internal"})}),
        RecordDict({"facts": ConfigRecord({"refused": "labels_differ"})}),
        RecordDict({"other": ConfigRecord({"run": ""})}),
        RecordDict({"weights": ArrayRecord(), "arrays": ArrayRecord()}),
    ]
    for record in (*every, *hostile):
        assert refused(ask(never, record, kind)) == "malformed"


def test_fields_too_few_too_many_or_of_another_type_are_malformed(conversation: list[Request]) -> None:
    for request in conversation:
        record = to_record(request)
        names = list(record.config_records["facts"])
        without = RecordDict({**record, "facts": ConfigRecord(dict.fromkeys(names[1:], "x"))})
        wrong = [
            without,
            changed(record, extra=1),
            changed(record, **{names[0]: 7}),
            changed(record, **{names[0]: b""}),
        ]
        for content in wrong:
            assert refused(ask(never, content, kind_of(request))) == "malformed"


@pytest.mark.parametrize(
    "array",
    [
        Array(dtype="float64", shape=(2,), stype="consilium.raw", data=bytes(15)),
        Array(dtype="float64", shape=(2**62, 2**62), stype="consilium.raw", data=bytes(16)),
        Array(dtype="float64", shape=(-2,), stype="consilium.raw", data=bytes(16)),
        Array(dtype="object", shape=(2,), stype="consilium.raw", data=bytes(16)),
        Array(dtype="float64", shape=(2,), stype="numpy.ndarray", data=b"\x93NUMPY"),
        Array(dtype="float64", shape=(0, 2**63), stype="consilium.raw", data=b""),
        Array(dtype="float64", shape=(1,) * 80, stype="consilium.raw", data=bytes(8)),
    ],
    ids=["short", "huge", "negative", "object", "pickled", "empty", "deep"],
)
def test_arrays_that_lie_are_malformed(conversation: list[Request], array: Array) -> None:
    record = to_record(conversation[3])
    lying = RecordDict({**record, "arrays": ArrayRecord({**record.array_records["arrays"], "class_weights": array})})
    assert refused(ask(never, lying, kind_of(conversation[3]))) == "malformed"


def test_the_refusals_of_the_site_come_through(conversation: list[Request], tmp_path: Path) -> None:
    handle = site_of(tmp_path)
    describe, install, prepare, *_, train, evaluate, _, _ = conversation
    assert refused(ask(handle, to_record(prepare), kind_of(prepare))) == "unknown_run"
    ask(handle, to_record(describe), kind_of(describe))
    assert isinstance(install, InstallTrunk)
    wrong = replace(install, sha256="0" * 64)
    assert refused(ask(handle, to_record(wrong), kind_of(wrong))) == "unknown_trunk"
    ask(handle, to_record(install), kind_of(install))
    assert refused(ask(handle, to_record(train), kind_of(train))) == "not_prepared"
    assert isinstance(evaluate, Evaluate)
    wrong_split = replace(evaluate, split="all")
    assert refused(ask(handle, to_record(wrong_split), kind_of(wrong_split))) == "malformed"

"""The daemon of a site, spoken to as its link does: through the gate, by gRPC, with the true records of messages."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tomli_w
from flwr.app import ConfigRecord, Message, RecordDict

from client import audit, erasure, features, founding, optout
from client.app import make_relay
from client.cohort import Cohort
from client.daemon import Daemon
from client.desk import Progress
from client.identity import Identity
from client.relay import LIMITS, SERVICE, Relay, address
from client.secret import read_secret
from client.site_config import SiteConfig, read_site
from client.workshop import threads
from common import checkpoint, codec, metrics, model
from common.errors import SiteRefusal, UsageError
from common.messages import (
    KINDS,
    Collect,
    Describe,
    Description,
    Done,
    Evaluate,
    Finish,
    Freeze,
    InstallTrunk,
    Pending,
    Prepare,
    Request,
    Statistics,
    Train,
    from_bytes,
    from_record,
    pending,
    ticket,
    to_bytes,
    to_record,
    unpacked,
)
from common.run_config import RunConfig
from simulations.grid import InProcessGrid

ROOT = Path(__file__).parents[1]
VERSION = importlib.metadata.version("consilium")
CANARIES = ("Doe^Jane", "19470113", "/srv/pacs/oncology/ward-7/0001.dcm")
SIZES = (12, 6, 6)


@pytest.fixture(autouse=True)
def _one_core(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {0})
    with threads(1):
        yield


def noise(count: int = sum(SIZES), source: Callable[[np.ndarray], np.ndarray] | None = None) -> Cohort:
    images = np.random.default_rng(7).integers(0, 256, (count, 1, 32, 32), np.uint8)
    digests = b"".join(hashlib.sha256(image).digest() for image in images)
    return Cohort(
        source=source or (lambda rows: images[rows]),
        rows=np.arange(count),
        digests=np.frombuffer(digests, np.uint8).reshape(count, 32),
        labels=np.arange(count) % 2,
        splits=(np.arange(count) % 4 // 2 * (np.arange(count) % 4 - 1)).astype(np.int8),
        patients=np.arange(count),
        label_names=("dark", "bright"),
        preprocessing="noise",
    )


def conversation_of(preprocessing: str, labels: tuple[str, ...] = ("dark", "bright"), seed: int = 0) -> list[Request]:
    """Return one request of each kind in the order of a run."""
    run = RunConfig.model_validate(
        {
            "task": {"name": "noise", "labels": labels},
            "data": {"preset": "generic", "image_size": 32, "views": 1, "preprocessing": preprocessing},
            "model": {"backbone": "test_efficientnet", "weights": "none"},
            "training": {"batch_size": 8},
            "seed": seed,
        }
    )
    built = model.pretrained(run)
    content = model.frozen_content(built, run)
    sha256 = checkpoint.sha256(content)
    run = run.model_copy(update={"model": run.model.model_copy(update={"trunk_sha256": sha256})})
    name, weights = run.fingerprint(), codec.encode(model.trainable_values(built.upper), "float32")
    width, edges = built.upper.head.linear.in_features, metrics.coarse_edges(2, bins=16)
    return [
        Describe(run.to_toml(), VERSION),
        InstallTrunk(name, sha256, np.frombuffer(content, np.uint8)),
        Prepare(name),
        Statistics(name, np.ones(2), gram=True),
        Freeze(name, np.zeros(width, np.float32), np.ones(width, np.float32), np.ones(2)),
        Train(name, 1, weights, edges),
        Evaluate(name, "test", weights, edges),
        Finish(name, "completed"),
    ]


@pytest.fixture(scope="module")
def conversation() -> list[Request]:
    return conversation_of("noise")


@pytest.fixture(scope="module")
def other() -> Describe:
    describe = conversation_of("noise", seed=1)[0]
    assert isinstance(describe, Describe)
    return describe


def founded(folder: Path, **site: Any) -> SiteConfig:
    """Make a site without data of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    values = {"site": {"name": "north", **site}, "data": {"images": "images"}, "compute": {"device": "cpu"}}
    (folder / "site.toml").write_text(tomli_w.dumps(values))
    config = read_site(folder / "site.toml")
    founding.found_state(config.state)
    return config


class Link:
    """Speaks to a daemon as a coordinator does by way of the link."""

    def __init__(self, socket: Path) -> None:
        self.relay = Relay(socket, "north")
        self.waited: list[Pending] = []

    def once(self, request: Request) -> RecordDict:
        return self.relay.answer(KINDS[type(request)][0], to_record(request))

    def record(self, request: Request) -> RecordDict:
        answer = self.once(request)
        while waiting := pending(answer):
            self.waited.append(waiting)
            answer = self.once(Collect(waiting.ticket))
        return answer

    def ask(self, request: Request) -> Any:
        return from_record(self.record(request), KINDS[type(request)][1])

    def refused(self, request: Request) -> str:
        with pytest.raises(SiteRefusal) as raised:
            self.ask(request)
        return raised.value.code


@contextmanager
def running(config: SiteConfig, source: Any = None, patience_s: float = 2.0) -> Iterator[tuple[Daemon, Link]]:
    before = threading.active_count()
    daemon = Daemon(config, source or (lambda _progress: noise()), patience_s)
    try:
        yield daemon, Link(config.socket)
    finally:
        assert daemon.close(20)
    assert not config.socket.exists()
    assert not list(config.socket.parent.glob(".*"))
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)  # gRPC's own threads end a moment later
    assert threading.active_count() <= before


def test_a_run_from_its_beginning_to_its_end(conversation: list[Request], tmp_path: Path) -> None:
    config = founded(tmp_path / "s")
    with running(config) as (_, link):
        for request in conversation:
            answer = link.ask(request)
            assert isinstance(answer, KINDS[type(request)][1])
        assert link.refused(conversation[5]) == "unknown_run"  # it is over
        status = link.relay.status()
    events = [(entry.event, entry.facts) for entry in audit.read(config.audit)]
    assert [event for event, _ in events] == [
        "init",
        *["request", "decision", "run", "reply"],
        *["request", "reply"] * 6,
        *["request", "run", "reply"],
        *["request", "refused"],
    ]
    assert [facts["sha256"] for event, facts in events if event == "request"] == [
        ticket(request) for request in (*conversation, conversation[5])
    ]
    assert events[-1][1] == {"kind": {"train": 1}, "code": {"unknown_run": 1}}
    assert status["state"] == "ready"
    assert status["run"] is None
    assert sum(status["examples"].values()) == sum(SIZES)
    assert status["refused"]["code"] == "unknown_run"
    assert status["device"] == "cpu"
    assert status["versions"]["consilium"] == VERSION


def test_what_left_is_in_the_audit_trail(conversation: list[Request], tmp_path: Path) -> None:
    config = founded(tmp_path / "s")
    with running(config) as (_, link):
        content = to_bytes(link.record(conversation[0]))
        assert to_bytes(link.record(conversation[0])) == content
    entries = [entry for entry in audit.read(config.audit) if entry.event == "reply"]
    support = from_record(from_bytes(content), Description).support
    counts = {
        "shape": list(support.shape),
        "norm": float(np.linalg.norm(support)),
        "sha256": hashlib.sha256(support.tobytes()).hexdigest(),
    }
    assert [entry.facts for entry in entries] == [
        {
            "kind": {"describe": 1},
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "tensors": {"support": counts},
        }
    ]


def test_two_runs_at_once(conversation: list[Request], other: Describe, tmp_path: Path) -> None:
    config = founded(tmp_path / "s")
    describe, *_, finish = conversation
    first = getattr(finish, "fingerprint", "")
    with running(config) as (_, link):
        assert isinstance(link.ask(describe), Description)
        for _ in range(2):
            assert link.refused(other) == "busy"
        assert isinstance(link.ask(replace(describe, ended="x")), Description)
    refusals = [entry for entry in audit.read(config.audit) if entry.event == "refused"]
    assert [entry.facts for entry in refusals] == [{"kind": {"describe": 1}, "code": {"busy": 1}}]
    with running(config) as (_, link):  # it knows after a restart
        assert link.refused(other) == "busy"
        assert link.relay.status()["run"]["fingerprint"] == first
        assert isinstance(link.ask(replace(other, ended=f"{'0' * 64} {first}")), Description)
        assert link.refused(describe) == "busy"
        assert link.refused(conversation[2]) == "unknown_run"
        link.ask(Finish(first, "failed"))  # not whose the site is
        assert link.refused(describe) == "busy"


def test_a_run_outside_of_the_policy(
    conversation: list[Request], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = founded(tmp_path / "s")
    with running(config) as (_, link):
        for request in conversation[:5]:
            link.ask(request)
    text = (tmp_path / "s" / "site.toml").read_text()
    (tmp_path / "s" / "site.toml").write_text(text + "[policy]\nmax_rounds = 2\n")
    with running(read_site(tmp_path / "s" / "site.toml")) as (_, link):  # changed in the middle of a run
        assert link.refused(conversation[5]) == "policy"
        assert link.refused(conversation[0]) == "policy"
        link.ask(conversation[7])
        assert link.relay.status()["run"] is None
    assert "max_rounds" in caplog.text


@pytest.mark.slow
def test_a_silent_run_is_let_go(conversation: list[Request], other: Describe, tmp_path: Path) -> None:
    config = founded(tmp_path / "s")
    describe = conversation[0]
    assert isinstance(describe, Describe)
    run = RunConfig.from_toml(describe.run)
    short = run.model_copy(update={"sites": run.sites.model_copy(update={"deadline_s": 0.5})})
    with running(config) as (_, link):
        link.ask(replace(describe, run=short.to_toml()))
        assert link.refused(other) == "busy"
        time.sleep(0.6)
        assert isinstance(link.ask(other), Description)


@pytest.mark.parametrize("version", ["", "0.0.1", f"{VERSION}0", "nonsense", f" {VERSION}"])
def test_another_version_is_refused(version: str, conversation: list[Request], tmp_path: Path) -> None:
    with running(founded(tmp_path / "s")) as (_, link):
        describe = conversation[0]
        assert isinstance(describe, Describe)
        assert link.refused(replace(describe, version=version)) == "version_differs"
        assert isinstance(link.ask(replace(describe, version=f"{VERSION}.dev3+local")), Description)


@pytest.mark.slow
def test_a_long_pass_is_pending_with_rising_progress(
    conversation: list[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "FLUSH_ROWS", 16)
    cohort = noise(96)
    images = cohort.pixels(np.arange(96))

    def slow(rows: np.ndarray) -> np.ndarray:
        time.sleep(0.15)
        return images[rows]

    config = founded(tmp_path / "s")
    with running(config, lambda _: noise(96, slow), patience_s=0.1) as (_, link):
        link.ask(conversation[0])
        link.ask(conversation[1])
        link.waited.clear()
        times = []
        answer = link.once(conversation[2])
        while waiting := pending(answer):
            link.waited.append(waiting)
            begin = time.monotonic()
            answer = link.once(Collect(waiting.ticket))
            times.append(time.monotonic() - begin)
        assert from_record(answer, Done) == Done()
    assert max(times) < 1.5
    done = [waiting.done for waiting in link.waited if waiting.phase == "features"]
    assert done == sorted(done)
    assert len(set(done)) >= 3
    assert {waiting.total for waiting in link.waited if waiting.done} == {96}
    assert len({waiting.ticket for waiting in link.waited}) == 1


def test_a_ticket_of_before_the_restart_is_unknown(conversation: list[Request], tmp_path: Path) -> None:
    with running(founded(tmp_path / "s")) as (_, link):
        assert link.refused(Collect("0" * 64)) == "unknown_ticket"


def test_what_goes_wrong_inside_leaves_as_a_code(
    conversation: list[Request], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def source(rows: np.ndarray) -> np.ndarray:
        raise OSError(5, f"Input/output error, patient {CANARIES[0]}", CANARIES[2])

    config = founded(tmp_path / "s")
    with running(config, lambda _: noise(24, source)) as (_, link):
        link.ask(conversation[0])
        link.ask(conversation[1])
        record = link.record(conversation[2])
        assert dict(record.config_records["facts"]) == {"refused": "internal"}
        assert link.refused(conversation[5]) == "not_prepared"
        status = json.dumps(link.relay.status())
    assert CANARIES[0] in caplog.text  # on the site's own side
    for content in (to_bytes(record), status.encode(), config.audit.read_bytes()):
        assert not any(canary.encode() in content for canary in CANARIES)


def test_a_cohort_that_cannot_be_opened_is_tried_again(conversation: list[Request], tmp_path: Path) -> None:
    broken = [True]

    def source(progress: Progress) -> Cohort:
        if broken:
            raise FileNotFoundError(2, "No such file", CANARIES[2])
        return noise()

    with running(founded(tmp_path / "s"), source) as (_, link):
        assert link.refused(conversation[0]) == "no_cohort"
        status = link.relay.status()
        assert (status["state"], status["code"], status["examples"]) == ("unusable", "no_cohort", {})
        broken.clear()
        assert isinstance(link.ask(conversation[0]), Description)
        status = link.relay.status()
        assert (status["state"], status["code"]) == ("ready", "")


def raw(socket: Path, method: str, content: bytes, kind: str | None) -> bytes:
    with grpc.insecure_channel(address(socket), LIMITS) as channel:
        metadata = () if kind is None else (("kind", kind),)
        answer: bytes = channel.unary_unary(f"/{SERVICE}/{method}")(content, timeout=20, metadata=metadata)
    return answer


def test_bytes_that_are_no_message_are_malformed(conversation: list[Request], tmp_path: Path) -> None:
    config = founded(tmp_path / "s")
    random = np.random.default_rng(5)
    whole = to_bytes(to_record(conversation[3]))
    malformed = to_bytes(RecordDict({"facts": ConfigRecord({"refused": "malformed"})}))
    hostile = [b"", b"\x00", b"\xff" * 64, malformed, whole[:-1], whole[: len(whole) // 2], whole + b"\x07"]
    hostile += [random.bytes(int(random.integers(1, 400))) for _ in range(60)]
    for _ in range(60):
        changed = bytearray(whole)
        changed[int(random.integers(len(changed)))] ^= int(random.integers(1, 256))
        hostile.append(bytes(changed))
    with running(config) as (_, link):
        for content in hostile:
            answer = raw(config.socket, "Answer", content, "query.describe")
            assert answer == malformed
        for kind in (None, "", "query", "query.shell", "train.x"):
            assert raw(config.socket, "Answer", whole, kind) == malformed
        with pytest.raises(grpc.RpcError) as raised:
            raw(config.socket, "Shell", b"", None)
        assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert isinstance(link.ask(conversation[0]), Description)
    assert "refused" not in {entry.event for entry in audit.read(config.audit)}  # noise fills no trail


def test_a_socket_in_use_and_a_stale_one(tmp_path: Path) -> None:
    config = founded(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(config.socket))
    with running(config), pytest.raises(UsageError, match="a daemon of site north runs already, as process [0-9]+"):
        Daemon(config, lambda _: noise())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(config.socket))
        listener.listen()
        with pytest.raises(UsageError, match="another daemon answers"):
            Daemon(config, lambda _: noise())
    with running(config) as (_, link):
        assert link.relay.status()["site"] == "north"


# ------------------------------------------------------------------------------------------------ patients who go


def take_out(config: SiteConfig, name: str) -> None:
    identity = Identity(read_secret(config.secret))
    optout.take_out(config, {identity.person(name)})


def test_a_patient_who_is_taken_out_in_a_run_is_used_no_more(conversation: list[Request], tmp_path: Path) -> None:
    """The cohort is opened anew, and nobody joins the run."""
    config = founded(tmp_path / "s")
    whole, opened = noise(28), []

    def source(_: Progress) -> Cohort:
        opened.append(1)
        return whole.subset(np.arange(24) if len(opened) == 1 else np.arange(1, 28))  # four new ones, one gone

    with running(config, source) as (_, link):
        for request in conversation[:5]:
            link.ask(request)
        before = link.ask(conversation[5]).num_examples
        take_out(config, "7")
        after = link.ask(conversation[5]).num_examples  # the same request, and not the answer that was kept
        status = link.relay.status()
        assert (before, after) == (12, 11)
        assert sum(status["examples"].values()) == 23
        assert len(opened) == 2
        link.ask(conversation[7])
        link.ask(conversation[0])  # a new run has everybody
        assert sum(link.relay.status()["examples"].values()) == 27


def test_nobody_joins_a_run_by_a_restart(conversation: list[Request], tmp_path: Path) -> None:
    """Images that came in the night: the run goes on with those that it began with, and so do its bytes."""
    config = founded(tmp_path / "s")
    answers = []
    for count in (24, 28):
        with running(config, lambda _, count=count: noise(28).subset(np.arange(count))) as (_, link):
            for request in conversation[:5] if count == 24 else ():
                link.ask(request)
            answers.append(to_bytes(link.record(conversation[5])))
            assert sum(link.relay.status()["examples"].values()) == 24
    assert answers[0] == answers[1]


def test_a_run_that_takes_the_place_of_another_has_everybody(
    conversation: list[Request], other: Describe, tmp_path: Path
) -> None:
    config = founded(tmp_path / "s")
    finish = conversation[7]
    assert isinstance(finish, Finish)
    for count in (24, 28):
        with running(config, lambda _, count=count: noise(28).subset(np.arange(count))) as (_, link):
            if count == 24:
                link.ask(conversation[0])
            else:
                link.ask(replace(other, ended=finish.fingerprint))
            assert sum(link.relay.status()["examples"].values()) == count


def test_rows_that_were_deleted_are_noticed(conversation: list[Request], tmp_path: Path) -> None:
    config = founded(tmp_path / "s")
    opened: list[int] = []
    with running(config, lambda _: opened.append(1) or noise()) as (_, link):
        for request in conversation[:6]:
            link.ask(request)
        assert len(opened) == 1
        erasure._renew_mark(config.cache)
        link.ask(conversation[6])
        assert len(opened) == 2
        assert (config.cache / erasure.MEMBERS).stat().st_size == 32 + 32 * sum(SIZES)


def test_a_pass_ends_when_a_patient_is_taken_out(
    conversation: list[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "FLUSH_ROWS", 16)
    config = founded(tmp_path / "s")
    opened: list[int] = []
    whole = noise(64)
    images = whole.pixels(np.arange(64))
    read: list[int] = []

    def pixels(rows: np.ndarray) -> np.ndarray:
        read.extend(rows.tolist())
        if 20 in rows and len(opened) == 1:
            take_out(config, "7")
        return images[rows]

    def source(_: Progress) -> Cohort:
        opened.append(1)
        return noise(64, pixels).subset(np.arange(64) if len(opened) == 1 else np.arange(0, 60))

    with running(config, source) as (_, link):
        for request in conversation[:3]:
            link.ask(request)
        assert len(opened) == 2
        assert not {60, 61, 62, 63} & set(read)  # the first pass ended before them


# -------------------------------------------------------------------------------------------------- the relay's app


def test_the_app_of_the_link_passes_records_on(conversation: list[Request], tmp_path: Path) -> None:
    with running(founded(tmp_path / "s")) as (_, link):
        grid = InProcessGrid(make_relay(link.relay), ["north"])

        def send(record: RecordDict, kind: str) -> RecordDict:
            (reply,) = grid.send_and_receive([Message(record, dst_node_id=1, message_type=kind)])
            assert not reply.has_error()
            return unpacked(reply.content)

        answer = send(to_record(conversation[0]), "query.describe")
        while waiting := pending(answer):
            answer = send(to_record(Collect(waiting.ticket)), "query.collect")
        assert from_record(answer, Description).site == "north"
        for kind in ("query", "query.shell", "train.describe", "evaluate.x"):
            facts = send(to_record(conversation[0]), kind).config_records["facts"]
            assert dict(facts) == {"refused": "malformed"}


# ---------------------------------------------------------------------------------------------------- true processes

HELD_TRAIN = """
import sys, time
from pathlib import Path
from client import daemon, training
fit = training.fit
def slow(*arguments, **options):
    mark = Path(sys.argv[2])
    if not mark.exists():
        mark.touch()
        time.sleep(600)
    return fit(*arguments, **options)
training.fit = slow
sys.exit(daemon.main(sys.argv[1:2]))
"""


@contextmanager
def process(site: Path, script: str | None = None, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    code = ["-c", script] if script else ["-m", "client.daemon"]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(site.parent)}
    started = subprocess.Popen(
        [sys.executable, "-P", *code, str(site), *map(str, arguments)],
        env=environment | {"PYTHONDONTWRITEBYTECODE": "1"},
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield started
    finally:
        if started.poll() is None:
            started.kill()
        started.communicate()


def hospital(folder: Path, number: int = 24) -> SiteConfig:
    """Make a site with pictures of its own."""
    from PIL import Image

    config = founded(folder)
    for place in range(number):
        path = config.images / ("dark", "bright")[place % 2] / f"{place}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(place).integers(0, 256, (40, 40), np.uint8)
        Image.fromarray(pixels).save(path)
    text = (folder / "site.toml").read_text().replace("[data]", "[data]\nimage_size = 32")
    (folder / "site.toml").write_text(text)
    return read_site(folder / "site.toml")


def until(found: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def up(link: Link) -> dict[str, Any]:
    """Return a daemon's first status after its cohort was opened."""
    found = [link.relay.status()]
    until(lambda: found.append(link.relay.status()) or found[-1]["state"] in ("ready", "unusable"))
    assert {status["state"] for status in found} <= {"unavailable", "starting", "examining", "working", "ready"}
    return found[-1]


def real_conversation(config: SiteConfig) -> list[Request]:
    from client import intake

    cohort = intake.cohort(config, lambda *_: None)
    return conversation_of(cohort.preprocessing, cohort.label_names)


@pytest.mark.slow
@pytest.mark.faults
def test_a_daemon_that_is_killed_in_a_round_gives_the_same_bytes(tmp_path: Path) -> None:
    config = hospital(tmp_path / "s")
    conversation = real_conversation(config)
    link = Link(config.socket)
    with process(tmp_path / "s" / "site.toml", HELD_TRAIN, tmp_path / "held") as first:
        assert up(link)["state"] == "ready"
        for request in conversation[:5]:
            link.ask(request)
        waiting = pending(link.once(conversation[5]))
        assert waiting is not None
        until((tmp_path / "held").exists)
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert link.once(conversation[5]).config_records["facts"]["refused"] == "unavailable"
    assert config.socket.exists()  # as kill -9 leaves it
    with process(tmp_path / "s" / "site.toml") as second:
        up(link)
        assert link.refused(Collect(waiting.ticket)) == "unknown_ticket"
        answers = [to_bytes(link.record(request)) for request in conversation[5:7]]
        second.terminate()
        assert second.wait(30) == 0
        assert second.stderr is not None
        assert "stopped" in second.stderr.read()
    assert not config.socket.exists()
    assert not list(config.state.glob(".*"))
    (config.state / "federation").rename(tmp_path / "gone")
    with process(tmp_path / "s" / "site.toml"):
        up(link)
        for request in conversation[:5]:
            link.ask(request)
        assert [to_bytes(link.record(request)) for request in conversation[5:7]] == answers
    assert audit.verify(config.audit)


@pytest.mark.slow
def test_a_process_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    config = hospital(tmp_path / "s")
    site = tmp_path / "s" / "site.toml"
    with process(site) as first:
        up(Link(config.socket))
        with process(site) as second:
            out, err = second.communicate(timeout=60)
            assert (second.returncode, out, err.count("\n")) == (2, "", 1)
            assert f"runs already, as process {first.pid}" in err
        first.send_signal(signal.SIGTERM)
        assert first.wait(30) == 0
    (tmp_path / "s" / "site.toml").write_text("[site]\nname = 3\n")
    with process(site) as third:
        out, err = third.communicate(timeout=60)
        assert (third.returncode, out, err.count("\n")) == (2, "", 1)


@pytest.mark.slow
def test_work_that_cannot_be_ended_does_not_hold_up_a_stop(tmp_path: Path) -> None:
    config = hospital(tmp_path / "s")
    conversation = real_conversation(config)
    link = Link(config.socket)
    with process(tmp_path / "s" / "site.toml", HELD_TRAIN, tmp_path / "held") as started:
        up(link)
        for request in conversation[:5]:
            link.ask(request)
        link.once(conversation[5])
        until((tmp_path / "held").exists)
        started.terminate()
        assert started.wait(30) == 0
        assert started.stderr is not None
        assert "abandoned" in started.stderr.read()
    assert not config.socket.exists()


@pytest.mark.slow
def test_forgetting_a_patient_while_the_daemon_is_up(tmp_path: Path) -> None:
    """The true commands beside the true daemon: neither blocks the other, and the patient is gone."""
    config = hospital(tmp_path / "s", 30)
    rows = "".join(f"{('dark', 'bright')[n % 2]}/{n}.png,{('dark', 'bright')[n % 2]},P{n}\n" for n in range(30))
    (tmp_path / "s" / "labels.csv").write_text("path,label,patient\n" + rows)
    text = (tmp_path / "s" / "site.toml").read_text()
    text = text.replace("[data]", '[data]\nlabels = "labels.csv"\npatient = "patient"')
    (tmp_path / "s" / "site.toml").write_text(text)
    config = read_site(tmp_path / "s" / "site.toml")
    conversation = real_conversation(config)
    link = Link(config.socket)
    with process(tmp_path / "s" / "site.toml"):
        before = sum(up(link)["examples"].values())
        for request in conversation[:6]:
            link.ask(request)
        (tmp_path / "s" / "out.csv").write_text("PatientID\nP4\nP5\n")
        done = subprocess.run(
            [sys.executable, "-P", "-c", "from common.cli import main; main()", "site", "forget", "out.csv", "--json"],
            cwd=tmp_path / "s",
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        counts = json.loads(done.stdout)
        assert counts["images"] == 2
        assert counts["features"] == 2
        link.ask(conversation[5])
        link.ask(conversation[6])
        assert sum(link.relay.status()["examples"].values()) == before - 2
    assert not (config.state / "daemon.log").read_text().count("ERROR")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_another_user_is_turned_away_by_the_daemon(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o011)
    shared = tmp_path / "run"
    shared.mkdir(mode=0o755)
    config = founded(tmp_path / "s", socket=str(shared / "x.sock"), peers=[54321])
    script = (
        "import os, sys, json\nfrom pathlib import Path\nfrom client.relay import Relay\n"
        "import common.messages\n"  # which the other user may not be able to read
        "os.setgroups([]); os.setgid(54321); os.setuid(int(sys.argv[2]))\n"
        "print(json.dumps(Relay(Path(sys.argv[1]), 'north').status()))\n"
    )
    with running(config) as (daemon, _):
        found = []
        for user in (54321, 54322):
            with process(config.socket, script, user) as caller:
                out, err = caller.communicate(timeout=60)
                found.append(json.loads(out)["state"] if out else err)
        assert found[0] in ("ready", "starting", "examining", "working")
        assert found[1] == "unavailable"
        assert daemon.status()["turned_away"] >= 1

"""What a site's policy does not allow, asked for by a real peer: each key of `[policy]`, over the socket.

The peer is the link's own relay, the daemon the true one behind its gate. Of each refusal: the code, that no pixel was
read for it, the key that decided in the audit trail, and the reason in `daemon.log`, which stays at the site.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from client import approval, audit, gate, oversight, policy, selftest, site_log
from client.daemon import Daemon
from client.founding import found_state
from client.relay import SERVICE, Relay
from client.site_config import PolicySection, SiteConfig, read_site
from client.status import ask as ask_status
from client.workshop import threads
from common import checkpoint, codec, metrics, model
from common.errors import SiteRefusal
from common.messages import (
    KINDS,
    REFUSALS,
    Collect,
    Describe,
    Description,
    Done,
    Evaluate,
    Finish,
    Freeze,
    InstallTrunk,
    Prepare,
    Request,
    Statistics,
    Train,
    Trained,
    from_record,
    pending,
    to_bytes,
    to_record,
)
from common.run_config import RunConfig

pytestmark = pytest.mark.slow

VERSION = importlib.metadata.version("consilium")
BARE = {"noise_multiplier": None, "delta": None, "clip": None}
EDGES = metrics.coarse_edges(2, bins=16)
_BUILT: dict[str, Any] = {}


@pytest.fixture(autouse=True, scope="module")
def _one_core() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, threads(1):
        patch.setattr(os, "sched_getaffinity", lambda _process: {0})
        yield


def settled(**sections: Any) -> tuple[RunConfig, bytes, dict[str, Any]]:
    """Return a small run, its trunk and its first weights; without privacy unless sections say so."""
    plan = selftest.drawn_run("test_efficientnet", "head").model_dump()
    for section, changes in {"privacy": BARE, **sections}.items():
        plan[section] = {**plan[section], **changes} if isinstance(changes, dict) else changes
    run = RunConfig.model_validate(plan)
    if "trunk" not in _BUILT:
        built = model.skeleton(run)
        _BUILT.update(trunk=model.frozen_content(built, run), weights=model.trainable_values(built.upper))
    digest = plan["model"]["trunk_sha256"] or checkpoint.sha256(_BUILT["trunk"])
    named = run.model.model_copy(update={"trunk_sha256": digest})
    return run.model_copy(update={"model": named}), _BUILT["trunk"], _BUILT["weights"]


@dataclass
class Peer:
    """A coordinator's part, spoken through the socket by the relay of a link."""

    config: SiteConfig
    daemon: Daemon
    touched: list[int] = field(default_factory=list)  # pixels that were read, by request

    def once(self, request: Request) -> Any:
        return Relay(self.config.socket, "selftest").answer(KINDS[type(request)][0], to_record(request))

    def say(self, request: Request) -> Any:
        """Return the reply to a request, or the code of its refusal."""
        answer = self.once(request)
        while waiting := pending(answer):
            answer = self.once(Collect(waiting.ticket))
        try:
            return from_record(answer, KINDS[type(request)][1])
        except SiteRefusal as error:
            return error.code

    def begin(self, run: RunConfig) -> Any:
        """Take a site to where round 1 can begin, or return the first refusal."""
        _, trunk, weights = settled()
        name, width = run.fingerprint(), int(weights["head.linear.weight"].shape[1])
        for request in (
            Describe(run.to_toml(), VERSION),
            InstallTrunk(name, run.model.trunk_sha256, np.frombuffer(trunk, np.uint8)),
            Prepare(name),
            Freeze(name, np.zeros(width, np.float32), np.ones(width, np.float32), np.ones(2)),
        ):
            if isinstance(found := self.say(request), str):
                return found
        return "begun"

    def train(self, run: RunConfig, number: int = 1) -> Any:
        vector = codec.encode(settled()[2], run.wire.dtype)
        return self.say(Train(run.fingerprint(), number, vector, EDGES))

    def rules(self) -> list[tuple[str, int]]:
        """Return the decisions of the trail: which key, and whether it allowed."""
        entries = [entry.facts for entry in audit.read(self.config.audit) if entry.event == "decision"]
        return [(next(iter(facts["rule"])), facts["allowed"]) for facts in entries]

    def log(self) -> str:
        return (self.config.state / site_log.NAME).read_text()


@contextmanager
def open_site(folder: Path, limits: Mapping[str, Any], **section: Any) -> Iterator[Peer]:
    """Run a daemon under a policy, over drawn patients whose pixels tell when they are read."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "site": {"name": "selftest", **section},
        "data": {"images": "images"},
        "compute": {"device": "cpu"},
        "policy": dict(limits),
        "coordinator": {"address": "fl.example.org:9443"},
    }
    (folder / "site.toml").write_text(tomli_w.dumps(values))
    config = read_site(folder / "site.toml")
    if not config.secret.exists():
        found_state(config.state)
    drawn = selftest.drawn_cohort(settled()[0])
    touched: list[int] = []

    def pixels(rows: np.ndarray) -> np.ndarray:
        touched.append(len(rows))
        return drawn.source(rows)

    with logged(config), ExitStack() as stack:
        daemon = Daemon(config, lambda _progress: replace(drawn, source=pixels))
        stack.callback(daemon.close)
        yield Peer(config, daemon, touched)


@contextmanager
def logged(config: SiteConfig) -> Iterator[None]:
    """Write daemon.log as the daemon's process does, and leave the logging of this one as it was."""
    root, ours = logging.getLogger(), logging.getLogger("consilium")
    before, raising, hook = (root.handlers[:], ours.handlers[:]), logging.raiseExceptions, threading.excepthook
    site_log.set_up(config.state)
    try:
        yield
    finally:
        for logger, kept in zip((root, ours), before, strict=True):
            for handler in set(logger.handlers) - set(kept):
                logger.removeHandler(handler)
                handler.close()
        logging.captureWarnings(False)
        logging.raiseExceptions, threading.excepthook = raising, hook


# ---------------------------------------------------------------------------------------------------- the whole table

PRIVATE: dict[str, Any] = {"noise_multiplier": None, "epsilon": 3.0, "delta": 1e-3, "clip": 1.0}
EARLIER = f"{datetime.now() - timedelta(hours=3):%H:00}-{datetime.now() - timedelta(hours=2):%H:00}"


@dataclass(frozen=True)
class Case:
    """A value of a key, a run that it refuses, and what the refusal looks like."""

    key: str
    value: Any
    outside: Mapping[str, Any] = field(default_factory=dict)
    code: str = "policy"
    rule: str = ""  # that decided; empty: the key itself
    more: Mapping[str, Any] = field(default_factory=dict)  # of the policy


CASES = (
    Case("tasks", ["chest"]),
    Case("backbones", ["resnet18"]),
    Case("trunks", ["ab" * 32]),
    Case("trunks", ["ab" * 32], {"model": {"trunk_sha256": "cd" * 32}}),
    Case("strategies", ["fedprox"], {"training": {"strategy": "krum"}}),
    Case("strategies", ["fedprox"], {"training": {"strategy": "fedavg"}}),
    Case("coordinators", ["AB:" * 31 + "AB"]),
    Case("coordinators", ["fl.example.org:443"]),
    Case("metrics", ["confusion"]),
    Case("closed", True, rule="tasks"),
    Case(
        "closed",
        True,
        rule="coordinators",
        more={
            "tasks": ["selftest"],
            "backbones": ["test_efficientnet"],
            "strategies": ["fedavg"],
            "trunks": ["TRUNK"],
            "metrics": ["confusion", "histograms", "calibration", "losses"],
        },
    ),
    Case("max_rounds", 2),
    Case("max_local_steps", 1, {"training": {"local_steps": 2}}),
    Case("max_local_steps", 1, {"training": {"local_steps": None, "local_epochs": 1, "batch_size": 8}}),
    Case("max_local_epochs", 1, {"training": {"local_steps": None, "local_epochs": 2}}),
    Case("max_local_epochs", 1, {"training": {"local_steps": 9, "batch_size": 8}}),
    Case("min_patients", 17),
    Case("min_per_label", 9),
    Case("min_batch", 2, {"training": {"batch_size": 1}}),
    Case("min_batch", 17),
    Case("min_sites", 2),
    Case("round_counts", 2),
    Case("privacy", "required"),
    Case("max_epsilon", 2.0),
    Case("max_epsilon", 2.0, {"privacy": PRIVATE}),
    Case(
        "max_epsilon",
        5.0,
        {"privacy": {**PRIVATE, "histogram_epsilon": 6.0}, "evaluation": {"metrics": ("confusion", "histograms")}},
    ),
    Case("max_delta", 1e-4, {"privacy": PRIVATE}),
    Case("allow_exact", True, {"privacy": {**PRIVATE, "epsilon": 9.0}}, rule="max_epsilon", more={"max_epsilon": 2.0}),
    Case("hours", [EARLIER]),
    Case("approval", True, code="approval"),
)
OTHERWISE = {"max_bytes_out", "min_cell", "review"}
"""Keys that refuse no run: what they keep from leaving is tried below, each by a test of its own."""


def test_every_key_of_the_policy_is_tried() -> None:
    """A new key without a case fails here: the list is the code's own."""
    assert {case.key for case in CASES} | OTHERWISE == set(PolicySection.model_fields)
    judged = {key for key, _ in (*policy.OF_THE_RUN, *policy.OF_THE_MOMENT, *policy.OF_THE_DATA)}
    assert judged <= {case.rule or case.key for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=[f"{number}-{case.key}" for number, case in enumerate(CASES)])
def test_a_run_outside_of_a_limit_is_refused_over_the_socket(case: Case, tmp_path: Path) -> None:
    run, trunk, _ = settled(**case.outside)
    limits = {name: value if value != ["TRUNK"] else [checkpoint.sha256(trunk)] for name, value in case.more.items()}
    with open_site(tmp_path, {**limits, case.key: case.value}) as peer:
        code, rule = peer.say(Describe(run.to_toml(), VERSION)), case.rule or case.key
        assert (code, code in REFUSALS) == (case.code, True)
        assert peer.train(run) == "unknown_run"  # nothing of it is known to the site either
        assert not peer.touched
        assert not (peer.config.cache / "features").exists()
        assert peer.rules() == [(rule, 0)]
        assert f"a run was refused: [policy] {rule}: " in peer.log()
        refused = [entry.facts for entry in audit.read(peer.config.audit) if entry.event == "refused"]
        assert {"kind": {"describe": 1}, "code": {case.code: 1}} in refused
        assert audit.verify(peer.config.audit) > 0


def test_the_same_runs_pass_without_the_limit(tmp_path: Path) -> None:
    """Or the table above could refuse them for anything."""
    for number, case in enumerate({repr(case.outside): case for case in CASES}.values()):
        if "trunk_sha256" in case.outside.get("model", {}) or case.outside.get("training", {}).get("batch_size") == 1:
            continue  # a batch of one is refused without any line; no site has a trunk of that hash
        run, _, _ = settled(**case.outside)
        with open_site(tmp_path / str(number), {}) as peer:
            assert isinstance(peer.say(Describe(run.to_toml(), VERSION)), Description)
            assert peer.rules() == [("allowed", 1)]


# ------------------------------------------------------------------------------------- what is kept from what leaves


def test_a_reply_above_max_bytes_out_stays_and_the_trail_says_by_which_key(tmp_path: Path) -> None:
    run, _, _ = settled()
    with open_site(tmp_path, {"max_bytes_out": 2000}) as peer:
        assert peer.begin(run) == "begun"
        assert peer.train(run) == "policy"
        sent = [entry.facts["kind"] for entry in audit.read(peer.config.audit) if entry.event == "reply"]
        assert {"train": 1} not in sent
        assert ("max_bytes_out", 0) in peer.rules()
        assert "[policy] max_bytes_out: a reply has " in peer.log()


def test_counts_below_min_cell_do_not_leave(tmp_path: Path) -> None:
    run, _, _ = settled()
    with open_site(tmp_path, {"min_cell": 3}) as peer:
        described = peer.say(Describe(run.to_toml(), VERSION))
        assert described.support[0].all() and not described.support[1:].any()


def test_a_reply_under_review_leaves_when_a_person_lets_it(tmp_path: Path) -> None:
    run, _, _ = settled()
    with open_site(tmp_path, {"review": True}) as peer:
        waiting = pending(peer.once(Describe(run.to_toml(), VERSION)))
        assert waiting is not None and waiting.phase in ("", "review")
        while (held := oversight.upcoming(peer.config)) is None:
            time.sleep(0.05)
        for _ in range(2):  # asking again does not help
            assert (found := pending(peer.once(Collect(waiting.ticket)))) is not None and found.phase == "review"
        oversight.release(peer.config, held["sha256"])
        assert isinstance(collected(peer, waiting.ticket), Description)


def collected(peer: Peer, ticket: str) -> Any:
    answer = peer.once(Collect(ticket))
    while pending(answer):
        answer = peer.once(Collect(ticket))
    return from_record(answer, Description)


# ------------------------------------------------------------------------------------------- requests that do not fit


def test_what_does_not_fit_the_run_is_refused_and_trains_nothing(tmp_path: Path) -> None:
    """Tensors that the run has not, too many of them, of another kind; another's run; rounds it has not."""
    run, trunk, weights = settled()
    vector = codec.encode(weights, run.wire.dtype)
    name, width = run.fingerprint(), int(weights["head.linear.weight"].shape[1])
    ones = np.ones(2)
    attempts: dict[str, tuple[Request, str]] = {
        "a trunk of another hash": (InstallTrunk(name, "ab" * 32, np.frombuffer(trunk, np.uint8)), "unknown_trunk"),
        "a trunk that is not its hash": (
            InstallTrunk(name, run.model.trunk_sha256, np.zeros(9, np.uint8)),
            "unknown_trunk",
        ),
        "part of a trunk beyond its end": (
            InstallTrunk(name, run.model.trunk_sha256, np.zeros(9, np.uint8), offset=2**40, size=2**41),
            "malformed",
        ),
        "a weight more": (Train(name, 1, np.append(vector, vector[:1]), EDGES), "malformed"),
        "a weight less": (Train(name, 1, vector[:-1], EDGES), "malformed"),
        "weights of another kind": (Train(name, 1, vector.astype(np.float64), EDGES), "malformed"),
        "a round before the first": (Train(name, 0, vector, EDGES), "malformed"),
        "a round after the last": (Train(name, run.training.rounds + 1, vector, EDGES), "malformed"),
        "a round of another run": (Train("ab" * 32, 1, vector, EDGES), "unknown_run"),
        "a run by a part of its name": (Train(name[:12], 1, vector, EDGES), "unknown_run"),
        "a split that is none": (Evaluate(name, "../images", vector, EDGES), "malformed"),
        "class weights of other labels": (Statistics(name, np.ones(3), gram=False), "malformed"),
        "class weights that are no numbers": (Statistics(name, np.full(2, np.nan), gram=False), "malformed"),
        "a mean of another width": (
            Freeze(name, np.zeros(width + 1, np.float32), np.ones(width, np.float32), ones),
            "malformed",
        ),
        "a rate that is none": (
            Freeze(name, np.zeros(width, np.float32), np.ones(width, np.float32), ones, np.full(1, np.inf)),
            "malformed",
        ),
        "a run that is no TOML": (Describe("]" * 99, VERSION), "malformed"),
        "a run with a key more": (Describe(run.to_toml() + '\n[extra]\ncode = "import os"\n', VERSION), "malformed"),
        "a run that asks for steps without end": (
            Describe(run.to_toml().replace("local_steps = 1\n", "local_steps = 99999999999999999999\n"), VERSION),
            "malformed",
        ),
    }
    with open_site(tmp_path, {}) as peer:
        assert peer.begin(run) == "begun"
        touched = len(peer.touched)
        found = {what: peer.say(request) for what, (request, _) in attempts.items()}
        assert found == {what: code for what, (_, code) in attempts.items()}
        assert len(peer.touched) == touched
        assert isinstance(peer.train(run), Trained)  # and the run goes on


def test_a_replayed_request_tells_nothing_new(tmp_path: Path) -> None:
    """The same bytes get the same bytes; after the end of the run nothing at all."""
    run, _, _ = settled()
    with open_site(tmp_path, {}) as peer:
        assert peer.begin(run) == "begun"
        first, again = (peer.train(run) for _ in range(2))
        assert to_bytes(to_record(first)) == to_bytes(to_record(again))
        assert peer.say(Finish(run.fingerprint(), "completed")) == Done()
        assert peer.train(run) == "unknown_run"
        assert peer.say(Finish(run.fingerprint(), "completed")) == Done()


def test_a_rejected_run_stays_rejected_whatever_is_asked(tmp_path: Path) -> None:
    run, _, _ = settled()
    with open_site(tmp_path, {"approval": True}) as peer:
        describe = Describe(run.to_toml(), VERSION)
        assert peer.say(describe) == "approval"
        approval.reject(peer.config, run.fingerprint()[:12], "dpo")
        for _ in range(3):
            assert peer.say(describe) == "policy"
        assert peer.rules() == [("approval", 0), ("rejected", 0)]
        assert not peer.touched


# ------------------------------------------------------------------------------------------------- bytes and patience


def frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
    """Return a frame of HTTP/2 (RFC 9113, 4.1)."""
    return struct.pack(">I", len(content))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + content


def header(name: bytes, value: bytes) -> bytes:
    """Return a header as a literal (RFC 7541, 6.2.2)."""
    return b"\x00" + bytes((len(name),)) + name + bytes((len(value),)) + value


GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0)
CALL = b"".join(
    header(name, value)
    for name, value in (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", f"/{SERVICE}/Answer".encode()),
        (b":authority", b"x"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
        (b"kind", b"train"),
    )
)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_message_that_is_announced_larger_than_any_is_not_taken_in(tmp_path: Path) -> None:
    """A peer that announces 4 GB and begins to send them is cut off or ignored: the daemon does not grow by them."""
    with open_site(tmp_path, {}) as peer, socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(5)
        caller.connect(os.fspath(peer.config.socket))
        caller.sendall(GREETING + frame(1, 4, 1, CALL) + frame(0, 0, 1, b"\x00" + b"\xff" * 4))
        before = resident()
        with suppress(OSError):
            for _ in range(8000):
                caller.sendall(frame(0, 0, 1, bytes(16_000)))
        assert resident() - before < 32 * 2**20, "of 128 MB"
        assert ask_status(peer.config)["state"] in ("ready", "starting", "examining")


def idle(path: Path, count: int, said: bytes = b"") -> ExitStack:
    """Open connections that say something, and then nothing more."""
    held = ExitStack()
    for _ in range(count):
        caller = held.enter_context(socket.socket(socket.AF_UNIX))
        caller.connect(os.fspath(path))
        with suppress(OSError):
            caller.sendall(said)
    return held


@pytest.mark.parametrize(
    "said", [b"", GREETING[:9], GREETING + frame(1, 0, 1, CALL[:20])], ids=["mute", "half", "open"]
)
def test_connections_that_say_nothing_keep_nobody_away(said: bytes, tmp_path: Path) -> None:
    """All that a peer may have, held open: the other user is answered, and the peer again once it lets go."""
    run, _, _ = settled()
    with open_site(tmp_path, {}) as peer:
        with idle(peer.config.socket, gate.CONNECTIONS - 1, said):
            assert isinstance(peer.say(Describe(run.to_toml(), VERSION)), Description)
        with idle(peer.config.socket, gate.CONNECTIONS, said):
            pass
        end = time.monotonic() + 20
        while isinstance(peer.say(Describe(run.to_toml(), VERSION)), str):
            assert time.monotonic() < end


HOLD = """
import os, socket, sys
os.setgroups([]); os.setgid(54321); os.setuid(54321)
held = [socket.socket(socket.AF_UNIX) for _ in range(int(sys.argv[2]))]
for caller in held:
    caller.connect(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_a_peer_that_holds_all_its_connections_does_not_shut_the_owner_out(tmp_path: Path) -> None:
    """Whoever owns the site asks after it also while a link that was taken over holds all that it may have."""
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o011)
    public = tmp_path / "run" / "site.sock"
    public.parent.mkdir(mode=0o755)
    with open_site(tmp_path / "s", {}, socket=str(public), peers=[54321]) as peer:
        command = [sys.executable, "-I", "-c", HOLD, str(public), str(gate.CONNECTIONS)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
            time.sleep(0.2)  # all are accepted by then
            assert ask_status(peer.config)["state"] in ("ready", "starting", "examining")

"""An enrolled site that means harm: what it says is never markup, it fills no memory, and the others' run goes on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from client import founding, joining, link
from client.app import make_relay
from client.site_config import SiteConfig, read_site
from common import model
from common.invitation import write_document
from common.messages import (
    Description,
    Pending,
    Reply,
    Train,
    Trained,
    content_of,
    from_bytes,
    packed,
    refusal,
    to_bytes,
    to_record,
)
from common.run_config import RunConfig
from server import board, enrolment, roll, runs
from server.plan import settled
from simulations import stage
from simulations.light_sites import LABELS, LightSite

pytestmark = [pytest.mark.slow, pytest.mark.faults]

ROOT = Path(__file__).parents[1]
MARKUP = "<script>alert('zzharm')</script>\x1b[31mzzharm\x1b]0;zzharm\x07{{ 7 * 7 }}[bold]zzharm[/bold]"
LARGE = 200_000_000
"""Bytes of a reply where a few hundred are expected."""


class Hostile(LightSite):
    """A site that answers as it is told, and honestly where it is told nothing."""

    def __init__(self, name: str, width: int, answer: Callable[[LightSite, str, Any], Any]) -> None:
        super().__init__(name, width)
        object.__setattr__(self, "_harm", answer)

    def pass_on(self, kind: str, record: Any) -> Any:
        found = self._harm(self, kind, record)  # type: ignore[attr-defined]
        return super().pass_on(kind, record) if found is None else packed(to_bytes(found))


def said(message: Reply | Pending) -> Any:
    return to_record(message)


def phases(_site: LightSite, kind: str, record: Any, asked: set[str] = set()) -> Any:  # noqa: B006  once for all calls
    """Say a phase that is markup, of numbers that are no counts, before each answer."""
    if kind in asked or kind == "query.collect":
        return None
    asked.add(kind)
    return said(Pending("0" * 64, MARKUP, -(2**62), 2**63 - 1))


def named(site: LightSite, kind: str, record: Any) -> Any:
    """Say to be called what no site can be called."""
    support = np.tile(np.bincount(LABELS), (3, 1)).astype(np.int64)
    return said(Description(MARKUP, support, MARKUP)) if kind == "query.describe" else None


def coded(_site: LightSite, _kind: str, _record: Any) -> Any:
    """Refuse with a code that is none."""
    found = refusal("internal")
    found.config_records["facts"]["refused"] = MARKUP
    return found


def counted(site: LightSite, kind: str, _record: Any) -> Any:
    """Say to have more examples than there are atoms."""
    support = np.full((3, 2), 2**62, np.int64)
    return said(Description(site.name, support, "", examples=2**62)) if kind == "query.describe" else None


def trained(site: LightSite, kind: str, record: Any, **changes: Any) -> Any:
    """Change what an honest answer to a round would be."""
    if kind != "train":
        return None
    from common.messages import REQUEST_OF, from_record

    request: Train = from_record(from_bytes(content_of(record)), REQUEST_OF[kind])
    honest = site.answer(request)
    assert isinstance(honest, Trained)
    return said(replace(honest, **changes))


def private(site: LightSite, kind: str, _record: Any) -> Any:
    """Tell figures of privacy that are no numbers, in a run that has none."""
    if kind != "query.describe":
        return None
    support = np.tile(np.bincount(LABELS), (3, 1)).astype(np.int64)
    odd = {name: float("nan") for name in ("delta", "epsilon", "spent", "noise_multiplier", "sampling_rate")}
    return said(Description(site.name, support, "", unit=MARKUP, steps=2**63 - 1, steps_done=-1, **odd))


def large(_site: LightSite, kind: str, _record: Any) -> Any:
    """Answer the first question with far more than was asked for, no part like another: equal ones travel once."""
    if kind != "query.describe":
        return None
    return said(Description("large", np.arange(LARGE // 8), ""))


HARM: dict[str, Callable[[LightSite, str, Any], Any]] = {
    "phases": phases,
    "named": named,
    "coded": coded,
    "counted": counted,
    "private": private,
    "huge-loss": partial(trained, train_loss=1e308),
    "nan-score": partial(trained, brier=np.full(1, np.nan), log_loss=np.full(1, np.inf)),
}


@dataclass
class Arena:
    """A coordinator that is up."""

    root: Path
    stage: stage.Stage
    width: int

    def enrol(self, name: str) -> SiteConfig:
        place = self.root / "sites" / name
        place.mkdir(parents=True)
        made = founding.found(place, name, place, None)
        invitation, answer = place / "invitation.json", place / "enrolment.json"
        write_document(invitation, enrolment.invite(self.stage.config, name))
        joining.join(made.config, invitation, answer)
        enrolment.enrol(self.stage.config, answer)
        roll.call(self.stage.config, 60.0)
        return read_site(made.config)

    @contextmanager
    def linked(self, apps: dict[str, ClientApp]) -> Iterator[None]:
        """Keep sites linked by true links, each with an app of its own."""
        stop, threads = threading.Event(), []
        for name, app in apps.items():
            place = self.root / "sites" / name / "site.toml"
            config = read_site(place) if place.exists() else self.enrol(name)
            threads.append(threading.Thread(target=link.run, args=(link.settings_of(config), app, stop)))
            threads[-1].start()
        try:
            self.stage.await_connected([*apps])
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)

    def honest(self, *names: str) -> dict[str, ClientApp]:
        return {name: make_relay(LightSite(name, self.width)) for name in names}

    @contextmanager
    def run(
        self, name: str, names: Sequence[str], quorum: int, patience_s: float = 60.0
    ) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
        run = run_of(names, quorum, patience_s)
        folder = runs.make_folder(self.stage.config, run, self.root / "runs" / name)
        engine = runs.launch(self.stage.config, folder, bound=True)
        try:
            yield folder, engine
        finally:
            engine.kill()
            engine.wait()

    def superlink(self) -> int:
        return self.stage.pids(stage.COORDINATOR)["superlink"]


def run_of(names: Sequence[str], quorum: int, patience_s: float = 60.0) -> RunConfig:
    values = {
        "task": {"name": "arena", "labels": ["no", "yes"]},
        "data": {"preset": "generic", "image_size": 32, "views": 1},
        "model": {"backbone": "test_efficientnet", "weights": "none", "init": "zero"},
        "training": {"rounds": 3, "local_epochs": 1, "batch_size": 8},
        "sites": {"names": tuple(names), "quorum": quorum, "deadline_s": patience_s, "patience_s": patience_s},
    }
    plan = RunConfig.model_validate(values)
    return settled(plan, plan.task, names, "generic").run


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    root = tmp_path_factory.mktemp("arena")
    width = int(model.skeleton(run_of(["a"], 1)).upper.head.linear.in_features)
    found = stage.Stage(stage.coordinator(root), {})
    try:
        found.start(stage.COORDINATOR)
        found.await_connected([])
        end = time.monotonic() + stage.PATIENCE_S
        while not found.pids(stage.COORDINATOR).get("superlink") or not answering(found):
            assert time.monotonic() < end
            time.sleep(0.2)
        yield Arena(root, found, width)
    finally:
        found.end()


def answering(found: stage.Stage) -> bool:
    from server.control import Control

    with Control(found.config.endpoints) as control:
        return control.is_up()


def strict(path: Path) -> Any:
    """Return a document of JSON as the standard has it: without NaN and infinities."""

    def refuse(word: str) -> Any:
        raise ValueError(word)

    return json.loads(path.read_text(), parse_constant=refuse)


def test_nothing_that_a_site_says_is_markup_or_no_number(arena: Arena) -> None:
    """Seven kinds of harm at once beside two honest sites: in report, result, board, logs and on the terminal."""
    apps = {name: make_relay(Hostile(name, arena.width, harm)) for name, harm in HARM.items()}
    shown: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(arena.linked({**apps, **arena.honest("good-1", "good-2")}))
        folder, engine = stack.enter_context(arena.run("markup", [*apps, "good-1", "good-2"], 2))
        while engine.poll() is None:
            facts = board.read(folder)
            shown.append(json.dumps(facts, allow_nan=False))
            time.sleep(0.1)
        status = [sys.executable, "-P", "-c", "from common.cli import main; main()", "server", "status"]
        for more in ([], ["--json"]):
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "FORCE_COLOR": ""}
            command = [*status, "--server", str(arena.stage.config.path), *more]
            shown.append(subprocess.run(command, env=environment, capture_output=True, text=True).stdout)
    result = strict(folder / "result.json")
    assert result["status"] == "completed_partial"
    statuses = {name: entry["status"] for name, entry in result["sites"].items()}
    assert {name: statuses[name] for name in ("named", "coded", "good-1", "good-2")} == {
        "named": "quarantined(identity)",
        "coded": "refused(internal)",
        "good-1": "contributed",
        "good-2": "contributed",
    }
    for name in ("nan-score", "counted"):
        assert statuses[name].startswith("quarantined("), name
    for line in (folder / "rounds.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    texts = {path.name: path.read_text(errors="replace") for path in folder.iterdir() if path.is_file()}
    texts |= {path.name: path.read_text(errors="replace") for path in arena.stage.config.state.rglob("*.log")}
    texts |= {f"shown {number}": text for number, text in enumerate(shown)}
    for name, text in texts.items():
        assert "zzharm" not in text, name
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text), name


def peak(pid: int) -> int:
    """Return the most memory that a process ever had in use, in bytes."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]


def test_a_reply_far_larger_than_expected_fills_no_memory(arena: Arena) -> None:
    names = ("good-1", "good-2", "large")
    apps = {**arena.honest("good-1", "good-2"), "large": make_relay(Hostile("large", arena.width, large))}
    before, most = peak(arena.superlink()), 0
    with arena.linked(apps), arena.run("large", names, 2) as (folder, engine):
        while engine.poll() is None:
            with suppress(FileNotFoundError, TypeError):  # it has ended since
                most = max(most, peak(engine.pid))
            time.sleep(0.05)
        grown = peak(arena.superlink()) - before
    result = strict(folder / "result.json")
    assert result["sites"]["good-1"]["rounds"] == 3
    assert result["sites"]["large"]["status"] == "quarantined(too_large)"
    assert grown < 200e6
    assert most < 300e6


FLOOD = """
import sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from client.site_config import read_site
from client.authority import read_authority
from client.link_session import Client, Session
from client.link_status import StatusFile
from common.node_key import read_key
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import Message, PushObjectRequest
from flwr.proto.message_pb2 import Metadata

config = read_site(Path(sys.argv[1]))
there = config.coordinator()
key, tls = read_key(there.private_key), read_authority(there.ca_certificate)
status = StatusFile(config.link_folder, config.name, str(there.address))
client = Client(there, key, tls, status)
session = Session(client, config.link_folder / "node_id").__enter__()
node = session.node
print("flooding", flush=True)

def hammer():
    own = Client(there, key, tls, status)
    junk = bytes(1_000_000)
    while True:
        for send in (
            lambda: own.PullMessages(PullMessagesRequest(node=node)),
            lambda: own.PushMessages(PushMessagesRequest(node=node, messages_list=[
                Message(metadata=Metadata(run_id=1, src_node_id=node.node_id, dst_node_id=1, message_type="train",
                                          reply_to_message_id="ab" * 32, ttl=100.0))])),
            lambda: own.PushObject(PushObjectRequest(node=node, run_id=1, object_id="ab" * 32, object_content=junk)),
        ):
            try:
                send()
            except Exception:
                pass

threads = [threading.Thread(target=hammer, daemon=True) for _ in range(8)]
for thread in threads:
    thread.start()
time.sleep(600)
"""


def test_a_flood_of_an_enrolled_site_does_not_stop_the_run_of_the_others(arena: Arena) -> None:
    def played(name: str) -> float:
        begin = time.monotonic()
        with arena.run(name, ("good-1", "good-2"), 2) as (folder, engine):
            engine.wait(300)
        assert strict(folder / "result.json")["status"] == "completed"
        return time.monotonic() - begin

    config = arena.enrol("flood")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with arena.linked(arena.honest("good-1", "good-2")):
        calm, before = played("calm"), peak(arena.superlink())
        command = [sys.executable, "-P", "-c", FLOOD, str(config.path), str(ROOT)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as flood:
            try:
                assert flood.stdout is not None and flood.stdout.readline() == b"flooding\n"
                stormy = played("stormy")
            finally:
                flood.kill()
        grown = peak(arena.superlink()) - before
    assert stormy < 60 + 10 * calm
    assert grown < 300e6

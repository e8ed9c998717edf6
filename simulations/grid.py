"""Flower's `Grid` without a network: the sites of a simulation in this process, or on Flower's own Ray engine.

Messages wait in a queue, and a pull runs the next one: answers come one at a time, as from a network, so a thousand
sites need no more memory than ten. Faults are injected here, between coordinator and sites, where a network would.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from common.errors import ConfigError, ConsiliumError, unknown_value

COORDINATOR = "coordinator"
FAULT_KINDS = ("drop", "slow", "nan", "crash")
_LOST = 0  # Flower's code for an unknown error


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong once, on purpose."""

    kind: str
    site: str
    round: int
    seconds: float = 0.0

    @staticmethod
    def parse(text: str) -> Fault:
        """Read `drop:SITE@ROUND`, `slow:SITE@ROUND:SECONDS`, `nan:SITE@ROUND` or `crash:coordinator@ROUND`.

        Raises:
            ConfigError: another form.

        Examples:
            >>> Fault.parse("slow:site-2@3:0.5")
            Fault(kind='slow', site='site-2', round=3, seconds=0.5)
        """
        kind, _, rest = text.partition(":")
        if kind not in FAULT_KINDS:
            unknown_value("--fault", kind, list(FAULT_KINDS))
        site, _, when = rest.partition("@")
        number, _, seconds = when.partition(":")
        if not site or not number.isdecimal() or int(number) < 1 or bool(seconds) != (kind == "slow"):
            raise ConfigError(f"--fault: got {text!r}, expected {_form(kind)} with a round from 1")
        if (kind == "crash") != (site == COORDINATOR):
            raise ConfigError(f"--fault: got {text!r}, expected {_form(kind)}")
        return Fault(kind, site, int(number), _duration(text, seconds) if seconds else 0.0)


def _form(kind: str) -> str:
    return {"slow": "slow:SITE@ROUND:SECONDS", "crash": f"crash:{COORDINATOR}@ROUND"}.get(kind, f"{kind}:SITE@ROUND")


def _duration(text: str, seconds: str) -> float:
    try:
        value = float(seconds)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"--fault: got {text!r}, expected seconds as a number from 0")
    return value


class InProcessGrid(Grid):
    """A grid whose nodes are calls of a ClientApp.

    Args:
        app: the sites' app.
        sites: their names; node i + 1 is the i-th.
        faults: what goes wrong.
        once: a folder that remembers which crashes have happened, so that a resumed run gets past them.
    """

    def __init__(
        self, app: ClientApp, sites: Sequence[str], faults: Sequence[Fault] = (), once: Path | None = None
    ) -> None:
        # The runtime sets these for a process of its own; a Message reads them.
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        self._app = app
        self._sites = {number: name for number, name in enumerate(sites, start=1)}  # noqa: C416  typed for mypy
        self._contexts = {number: _context(number, {"partition-id": number - 1}) for number in self._sites}
        self._faults = list(faults)
        self._once = once
        self._queue: dict[str, Message] = {}
        self._late: dict[str, tuple[float, Message]] = {}

    def set_run(self, run: Run) -> None:
        """Nothing to keep: there is one run."""

    @property
    def run(self) -> Run:
        """Not known in a process of one run."""
        raise NotImplementedError

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message; deprecated in Flower, here for completeness."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes."""
        return list(self._sites)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages."""
        ids = []
        for message in messages:
            identity = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = identity  # Flower's own in-memory grid does the same
            self._queue[identity] = message
            ids.append(identity)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return late answers that are due, or run the next queued message."""
        wanted = list(message_ids)
        due = [
            identity for identity in wanted if identity in self._late and self._late[identity][0] <= time.monotonic()
        ]
        if due:
            return [self._late.pop(identity)[1] for identity in due]
        for identity in wanted:
            if identity in self._queue:
                reply = self._run_one(identity, self._queue.pop(identity))
                return [reply] if reply is not None else []
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push messages and pull their answers."""
        end = time.monotonic() + (timeout if timeout is not None else float("inf"))
        waiting = list(self.push_messages(messages))
        replies: list[Message] = []
        while waiting and time.monotonic() < end:
            arrived = list(self.pull_messages(waiting))
            replies.extend(arrived)
            waiting = [identity for identity in waiting if identity in self._queue or identity in self._late]
            if not arrived:
                time.sleep(0.01)
        return replies

    def _run_one(self, identity: str, message: Message) -> Message | None:
        """Return a site's answer, as the faults leave it; None if it comes later."""
        node = message.metadata.dst_node_id
        faults = self._faults_of(message, self._sites[node])
        if "crash" in faults:
            self._crash(faults["crash"])
        if "drop" in faults:
            return Message(Error(code=_LOST, reason="dropped"), reply_to=message)
        reply = self._app(message, self._contexts[node])
        if "nan" in faults:
            reply = _poisoned(reply, message)
        if "slow" in faults:
            self._late[identity] = (time.monotonic() + faults["slow"].seconds, reply)
            return None
        return reply

    def _faults_of(self, message: Message, site: str) -> dict[str, Fault]:
        if not self._faults or message.metadata.message_type != "train":
            return {}
        facts = message.content.config_records.get("facts", ConfigRecord())  # another app's messages have none
        number = facts.get("round")
        last = site == list(self._sites.values())[-1]
        return {
            fault.kind: fault
            for fault in self._faults
            if fault.round == number and (fault.site == site or (fault.kind == "crash" and last))
        }

    def _crash(self, fault: Fault) -> None:
        """End this process as `kill -9` does, once a run."""
        marker = (self._once or Path()) / f"crashed-{fault.round}"
        if self._once is None or not marker.exists():
            if self._once is not None:
                marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def check_faults(faults: Sequence[Fault], sites: Sequence[str], rounds: int) -> None:
    """Check that every fault can happen.

    Raises:
        ConfigError: a site or a round that the run does not have.
    """
    for fault in faults:
        if fault.kind != "crash" and fault.site not in sites:
            unknown_value("--fault site", fault.site, list(sites))
        if fault.round > rounds:
            raise ConfigError(f"--fault {fault.kind}: round {fault.round} is beyond the run's {rounds} rounds")


def _poisoned(reply: Message, request: Message) -> Message:
    """Return the reply with every weight a NaN; a refusal has none."""
    if "weights" not in reply.content.array_records:
        return reply
    weights = {
        name: Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=_nans(array))
        for name, array in reply.content.array_records["weights"].items()
    }
    records = {name: record for name, record in reply.content.items() if name != "weights"}
    return Message(RecordDict({**records, "weights": ArrayRecord(weights)}), reply_to=request)


def _nans(array: Array) -> bytes:
    count = int(np.prod(array.shape))
    bfloat16 = array.dtype == "uint16"
    return (np.full(count, 0x7FC0, "<u2") if bfloat16 else np.full(count, np.nan, array.dtype)).tobytes()


def _context(node: int, config: dict[str, int]) -> Context:
    return Context(run_id=1, node_id=node, node_config=dict(config), state=RecordDict(), run_config={})


def run_in_process(app: ServerApp, grid: InProcessGrid) -> None:
    """Call a ServerApp as Flower would."""
    app(grid, _context(0, {}))


def run_on_ray(server: ServerApp, client: ClientApp, sites: int, cpus: int, gpu_share: float) -> None:
    """Run the two apps on Flower's Ray engine.

    Raises:
        ConsiliumError: the engine is not installed.
    """
    try:
        import ray  # noqa: F401
        from flwr.simulation import run_simulation
    except ImportError:
        raise ConsiliumError("--backend ray: Ray is not installed; pip install 'consilium[simulation]'") from None
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": gpu_share}, "init_args": {"num_cpus": cpus}}
    run_simulation(server_app=server, client_app=client, num_supernodes=sites, backend_config=resources)  # type: ignore[arg-type]

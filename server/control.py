"""The coordinator's hand on its own SuperLink: who is registered, which runs there are, and a run's messages.

Everything goes to the loopback listener, signed with the operator's secret; taking the task of a run needs the
SuperExec secret besides. Whatever goes wrong is one line: Flower's own clients try again for ever, or end the process.

Source: flwr 1.41, `flwr.supercore.superexec.run_superexec` and `flwr.superlink.runtime.run_serverapp`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, Self

import httpx
import tomli_w
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import Status, SubStatus
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.serverapp import Grid
from flwr.supercore.constant import NodeStatus, TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from common.errors import ConfigError, ConsiliumError
from server.bounded_grid import BoundedGrid
from server.control_http import CALL_SECONDS, Client, NoAnswer, Operator, Refused, RunEnded, is_final, opened
from server.endpoints import Endpoints, read_secret
from server.federation import Present

_log = logging.getLogger("consilium.control")
_BEAT_SECONDS = 10.0
_PATIENCE_SECONDS = 60.0  # a SuperLink that is being restarted is back within seconds
_OTHERS_SECONDS = 30.0  # an engine takes its task at once; one that has not by then is dead
_LARGEST = 2**31  # bytes of a reply where nobody knows better
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_FAILED = "the engine ended before the run was complete; its own log says why"
_STUB = '''"""Nothing in this bundle is executed by a hospital.

Flower asks for a bundle with every run. consilium runs the package that is installed at both ends, so this one only
names the run: sites do not fetch it, unpack it or import it, and the coordinator's engine does not either.
"""

server = None
client = None
'''


@dataclass(frozen=True)
class NodeFacts:
    """What the SuperLink knows of a registered site."""

    name: str
    node_id: int
    public_key: str  # OpenSSH form without a comment
    status: str  # registered (was never there), online or offline
    last_activated_at: str  # ISO 8601, empty for never
    online_until: float  # seconds since the epoch, 0 for never


@dataclass(frozen=True)
class RunFacts:
    """What the SuperLink knows of a run."""

    run_id: int
    status: str  # pending, starting, running or finished
    sub_status: str  # of a finished one: completed, failed or stopped
    pending_at: str
    finished_at: str


class Control:
    """The operator's and the engine's way to the SuperLink; a context manager.

    Args:
        endpoints: where it listens, and the secrets.
        patience: how long the messages of a run wait for a SuperLink that does not answer, in seconds.

    Raises:
        ConfigError: a secret cannot be read.
    """

    def __init__(self, endpoints: Endpoints, *, patience: float = _PATIENCE_SECONDS) -> None:
        self._where = f"127.0.0.1:{endpoints.operator_port}"
        self._operator = Operator(read_secret(endpoints.operator_secret))
        self._superexec = SuperExecAuthHttpInterceptor(
            master_secret=read_secret(endpoints.superexec_secret), protected_methods=[_ACQUIRE]
        )
        self._patience = patience
        self._client = self._open(ControlHttpClient, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def is_up(self) -> bool:
        """Return whether the SuperLink answers to this operator's secret.

        Raises:
            ConsiliumError: something answers, but not to this secret.
        """
        try:
            self.nodes()
        except NoAnswer:
            return False
        return True

    def nodes(self) -> tuple[NodeFacts, ...]:
        """Return the registered sites by name.

        Raises:
            ConsiliumError: the SuperLink does not answer, or refuses.
        """
        found = self._client.ListNodes(ListNodesRequest()).nodes_info
        facts = (_node_facts(node) for node in found if node.status != NodeStatus.UNREGISTERED)
        return tuple(sorted(facts, key=lambda node: (node.name, node.node_id)))

    def register(self, name: str, public_key: str) -> int:
        """Let a site in by its key, in OpenSSH form, and return its node; another key of that name is let out first.

        Raises:
            ConfigError: the key is none of the elliptic curves that Flower takes.
            ConsiliumError: the key is another site's or was withdrawn before, or the SuperLink does not answer.
        """
        key = _parse_key(name, public_key)
        wanted = _key_text(key)
        nodes = self.nodes()
        for node in nodes:
            if node.public_key == wanted:
                if node.name == name:
                    return node.node_id
                raise ConsiliumError(
                    f"{name}: its key is registered as {node.name!r}; each site needs a key of its own"
                )
        for node in nodes:
            if node.name == name:
                self._client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
        return self._register(name, key)

    def unregister(self, name: str) -> None:
        """Let a site in no more; nothing happens where there is none of that name. Its key is spent.

        Raises:
            ConsiliumError: the SuperLink does not answer, or refuses.
        """
        for node in self.nodes():
            if node.name == name:
                self._client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))

    def runs(self) -> tuple[RunFacts, ...]:
        """Return the latest 20 runs, the newest first.

        Raises:
            ConsiliumError: the SuperLink does not answer, or refuses.
        """
        return self._runs()[0]

    def start_run(self, content: bytes) -> int:
        """Open a run under a bundle, and return its number; `grid` takes it up.

        Raises:
            ConsiliumError: the SuperLink does not answer, or refuses the bundle.
        """
        fab = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
        run_id = int(self._client.StartRun(StartRunRequest(fab=fab)).run_id)
        if not run_id:
            raise ConsiliumError(f"the SuperLink at {self._where} takes no bundle of {len(content)} bytes")
        return run_id

    def stop_run(self, run_id: int) -> None:
        """End a run; nothing happens where it has ended.

        Raises:
            ConsiliumError: there is no such run, or the SuperLink does not answer.
        """
        try:
            self._client.StopRun(StopRunRequest(run_id=run_id))
        except Refused as error:
            if error.code != ApiErrorCode.RUN_ALREADY_FINISHED:
                raise

    @contextlib.contextmanager
    def grid(self, run_id: int, largest: int = _LARGEST) -> Iterator[HttpGrid]:
        """Take the run's task and yield its grid; one at a time in a process, for messages are made in its name.

        The run ends with the block: completed, or failed where the block raises.

        Args:
            run_id: the run.
            largest: bytes that the arrays of a reply may have; a larger one is not fetched.

        Raises:
            ConsiliumError: the run's task cannot be had, or the SuperLink stays away for longer than the patience.
            RunEnded: inside the block, after somebody stopped the run.
        """
        token = self._take(run_id)
        with contextlib.ExitStack() as stack:
            client = self._open(RuntimeHttpClient, self._patience, token=token)
            grid = BoundedGrid(self._where, token, client, largest)
            stack.callback(grid.close)
            sub_status = SubStatus.FAILED
            stack.callback(lambda: self._finish(token, sub_status))
            stack.enter_context(self._heartbeats(token))
            _begin(grid)
            yield grid
            sub_status = SubStatus.COMPLETED

    def _register(self, name: str, key: ec.EllipticCurvePublicKey) -> int:
        request = RegisterNodeRequest(public_key=public_key_to_bytes(key), name=name)
        try:
            return int(self._client.RegisterNode(request).node_id)
        except Refused as error:
            if error.code != ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
                raise
            raise ConsiliumError(
                f"{name}: its key was withdrawn before and is not taken again; the site makes a new key pair and enrols"
            ) from None

    def _runs(self) -> tuple[tuple[RunFacts, ...], datetime]:
        """Return the latest runs and the SuperLink's time."""
        response = self._client.ListRuns(ListRunsRequest())
        facts = (
            RunFacts(run.run_id, run.status.status, run.status.sub_status, run.pending_at, run.finished_at)
            for run in response.run_dict.values()
        )
        ordered = tuple(sorted(facts, key=lambda run: run.pending_at, reverse=True))
        return ordered, datetime.fromisoformat(response.now)

    def _take(self, run_id: int) -> str:
        """Return the token of the run's task."""
        self._let_others_go_first(run_id)
        with self._open(RuntimeHttpClient, self._patience, taking=True) as client:
            while True:
                try:
                    taken = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
                except RunEnded:  # Flower's one word for all that it does not believe
                    raise ConsiliumError(
                        f"the SuperLink at {self._where} does not take this SuperExec secret; was the file changed "
                        "after it was started?"
                    ) from None
                if not taken.token:
                    raise ConsiliumError(f"run {run_id}: has no task to take; it was taken before or has ended")
                token = str(taken.token)
                if taken.task.run_id == run_id:
                    return token
                self._finish(token, SubStatus.FAILED)  # its engine died before it took it

    def _let_others_go_first(self, run_id: int) -> None:
        """Wait while an older run waits for an engine that is alive: tasks are handed out by age, to whoever asks."""
        while True:
            runs, now = self._runs()
            pending = {
                run.run_id: datetime.fromisoformat(run.pending_at) for run in runs if run.status == Status.PENDING
            }
            own = pending.pop(run_id, None)
            if own is None or not any(
                at < own and (now - at).total_seconds() < _OTHERS_SECONDS for at in pending.values()
            ):
                return
            time.sleep(0.2)

    @contextlib.contextmanager
    def _heartbeats(self, token: str) -> Iterator[None]:
        with self._open(RuntimeHttpClient, None, token=token, seconds=_BEAT_SECONDS) as client:
            sender = HeartbeatSender(lambda: _beat(client))
            sender.start()
            try:
                yield
            finally:
                sender.stop()

    def _finish(self, token: str, sub_status: str) -> None:
        """Say how a task ended; a SuperLink that does not hear it counts the task as failed by itself."""
        details = "" if sub_status == SubStatus.COMPLETED else _FAILED
        with self._open(RuntimeHttpClient, 0, token=token) as client:
            try:
                client.PushTaskOutput(PushTaskOutputRequest(sub_status=sub_status, details=details))
            except ConsiliumError as error:
                _log.warning("the SuperLink was not told that the run is %s: %s", sub_status, error)

    def _open(
        self,
        kind: type[Client],
        patience: float | None,
        *,
        token: str = "",
        taking: bool = False,
        seconds: float = CALL_SECONDS,
    ) -> Client:
        interceptors: list[Any] = [self._operator]
        if token:
            interceptors.append(RuntimeTokenHttpInterceptor(token))
        if taking:
            interceptors.append(self._superexec)
        return opened(kind, self._where, interceptors, patience, seconds)


def bundle() -> bytes:
    """Return what Flower calls a FAB: a name and a version, and a stub that says that it does nothing."""
    config = {
        "project": {
            "name": "consilium",
            "version": importlib.metadata.version("consilium"),
            "description": "Names a run; nothing in it is executed",
            "license": "Apache-2.0",
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "consilium",
                    "components": {"serverapp": "stub:server", "clientapp": "stub:client"},
                }
            }
        },
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "GitWildMatchPattern", DeprecationWarning)  # flwr 1.41 under pathspec 1
        content, _ = build_fab_from_files({"pyproject.toml": tomli_w.dumps(config).encode(), "stub.py": _STUB.encode()})
    return content


def roster(grid: Grid) -> dict[str, Present]:
    """Return the sites that are online, by name.

    Raises:
        ConsiliumError: the SuperLink does not answer.
    """
    nodes: list[NodeInfo] = sorted(grid.get_nodes(), key=lambda node: node.last_activated_at)
    return {node.name: Present(node.node_id, node.last_activated_at) for node in nodes if node.name}


def _begin(grid: HttpGrid) -> None:
    """Start the task, and make messages bear its run."""
    task = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
    TaskIdentity.task_id = task.task_id
    TaskIdentity.run_id = task.run.run_id
    TaskIdentity.node_id = task.context.node_id
    grid.set_run(run_from_proto(task.run))


def _beat(client: RuntimeHttpClient) -> bool:
    """Return whether a heartbeat arrived; that the run has ended shows at its next message, so nothing is done here."""
    try:
        client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
    except httpx.HTTPStatusError as error:
        return is_final(error)
    except httpx.HTTPError:
        return False
    return True


def _node_facts(node: NodeInfo) -> NodeFacts:
    return NodeFacts(
        name=node.name,
        node_id=node.node_id,
        public_key=_key_text(bytes_to_public_key(node.public_key)),
        status=node.status,
        last_activated_at=node.last_activated_at,
        online_until=node.online_until,
    )


def _parse_key(name: str, text: str) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{name}: its key is no public key on a NIST curve in OpenSSH form (ecdsa-sha2-nistp384 …)")
    return key


def _key_text(key: ec.EllipticCurvePublicKey) -> str:
    form = serialization.PublicFormat.OpenSSH
    return key.public_bytes(serialization.Encoding.OpenSSH, form).decode()

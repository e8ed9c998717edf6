"""The site's daemon: the one process that sees a hospital's data and answers a coordinator.

It listens on a unix socket and nowhere else. Three methods, bytes in and bytes out:

    Hello   JSON of `client.relay.hello`, both ways
    Answer  metadata `kind`, and the bytes of a request's records -> those of the reply's, of `Pending` or of a refusal
    Status  nothing -> JSON: what the site is doing

Nothing is answered later than `PATIENCE_S` after its work could have begun: what takes longer goes on at the desk
(`client.desk`), and is collected. All that is needed to go on after `kill -9` is on disk before it is answered.

    python -P -m client.daemon SITE.TOML
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc

from client import examination, gate, site_log
from client.desk import Desk, Finished, Underway
from client.hospital import Hospital, OpenCohort
from client.relay import KIND, LIMITS, PATIENCE_S, PROTOCOL, SERVICE, address, hello
from client.site_config import SOCKET_BYTES, SiteConfig, read_site
from common.errors import ConfigError, ConsiliumError, SiteRefusal, UsageError
from common.locks import exclusive
from common.logs import tell_end
from common.messages import (
    REQUEST_OF,
    Collect,
    MalformedMessage,
    Pending,
    Request,
    from_bytes,
    from_record,
    refusal,
    to_bytes,
    to_record,
)

THREADS = 2 * gate.CONNECTIONS
CLOSING_S = 10.0
"""Seconds that work has to come to an end when the daemon is stopped; then it is abandoned, and done again later."""

OPENING = "opening"
_INNER = "s"
_log = logging.getLogger("consilium.site")


class Daemon:
    """The daemon, from its start to `close`.

    Args:
        config: the site; its state is there.
        open_cohort: where its examples come from; None: from its own data.
        patience_s: seconds after which an answer is `Pending`.

    Raises:
        UsageError: the socket cannot be used, or another daemon serves the site.
        ConfigError: the state, the socket, the peers or the device are not as they must be.
    """

    def __init__(
        self, config: SiteConfig, open_cohort: OpenCohort | None = None, patience_s: float = PATIENCE_S
    ) -> None:
        self.config = config
        self._patience_s = patience_s
        with ExitStack() as stack:
            stack.enter_context(_only_one(config))
            gate.check_free(config.socket)
            self._hospital = Hospital(config, open_cohort)
            folder = stack.enter_context(_private_folder(config.socket))
            listener = stack.enter_context(gate.listening(config.socket, folder, config.peers - {os.geteuid(), 0}))
            self._desk = Desk()
            self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="daemon")
            self._server = self._serving(folder)
            allowed = frozenset({os.geteuid(), 0, *config.peers})
            self._gate = gate.Gate(listener, folder / _INNER, allowed)
            self._held = stack.pop_all()
        self._submit_opening()

    def close(self, patience_s: float = CLOSING_S) -> bool:
        """Stop, and return whether the work came to an end; what did not is as if the process had been killed."""
        with self._held:
            ended = self._desk.close(patience_s)
            self._server.stop(1.0).wait()
            self._gate.close()
            self._threads.shutdown()
        return ended

    def _serving(self, folder: Path) -> Any:
        server = grpc.server(self._threads, options=LIMITS)
        methods = {"Hello": self._hello, "Answer": self._answer, "Status": self._status}
        handlers = {name: grpc.unary_unary_rpc_method_handler(method) for name, method in methods.items()}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        server.add_insecure_port(address(folder / _INNER))
        server.start()
        return server

    def _submit_opening(self) -> None:
        """Open the cohort, before anybody asks."""
        try:
            self._desk.ask(OPENING, self._hospital.open, 0)
        except SiteRefusal:  # at once: the next request tries again
            _log.warning("the cohort is not open yet")

    def _hello(self, content: bytes, context: Any) -> bytes:  # noqa: ARG002
        return json.dumps(hello(self.config.name)).encode()

    def _answer(self, content: bytes, context: Any) -> bytes:
        """Return the bytes of an answer, whatever happens: gRPC would send the text of an exception."""
        try:
            return self._asked(str(dict(context.invocation_metadata()).get(KIND, "")), content)
        except SiteRefusal as error:
            self._hospital.refuse(error.code)
            return to_bytes(refusal(error.code))
        except Exception:  # noqa: BLE001
            _log.exception("a request failed")
            self._hospital.refuse("internal")
            return to_bytes(refusal("internal"))

    def _asked(self, kind: str, content: bytes) -> bytes:
        request = _decoded(kind, content)
        if self._hospital.changed():
            self._desk.forget()  # what was computed with patients who were taken out since
        if isinstance(request, Collect):
            self._hospital.heard(request.ticket)
            return _bytes(self._desk.collect(request.ticket, self._patience_s))
        ticket = hashlib.sha256(kind.encode() + content).hexdigest()
        self._hospital.expect(ticket, request)
        return _bytes(self._desk.ask(ticket, lambda progress: self._hospital.work(request, progress), self._patience_s))

    def _status(self, content: bytes, context: Any) -> bytes:  # noqa: ARG002
        try:
            return json.dumps(self.status()).encode()
        except Exception:  # noqa: BLE001
            _log.exception("the status cannot be told")
            return json.dumps({"state": "unusable", "code": "internal", "site": self.config.name}).encode()

    def status(self) -> dict[str, Any]:
        """Return what the site is doing: words, counts and the name of the run."""
        working, phase, done, total, since = self._desk.status()
        last = self._desk.last
        health = self._hospital.health()
        held, refused = health.tenure, health.refused
        return {
            "protocol": PROTOCOL,
            "site": self.config.name,
            "state": _state(health.opened, health.code, working, phase),
            "code": "" if health.opened else health.code,
            "run": held.model_dump() if held else None,
            "phase": phase,
            "done": done,
            "total": total,
            "since": since,
            "last": {"phase": last[0], "seconds": last[1]} if last else None,
            "examples": health.examples,
            "device": health.device,
            "memory": _memory(health.device),
            "refused": {"code": refused[0], "at": refused[1]} if refused else None,
            "turned_away": self._gate.turned_away,
            "versions": _versions(),
        }


def serve(config: SiteConfig, open_cohort: OpenCohort | None = None) -> bool:
    """Serve a site until SIGTERM or SIGINT, and return whether all work came to an end.

    Args:
        config: the site.
        open_cohort: where its examples come from; None: from its own data.

    Raises:
        UsageError: the socket cannot be used, or another daemon serves the site.
        ConfigError: the state, the socket, the peers or the device are not as they must be.
    """
    if open_cohort is None:
        examination.ready(config, None)
    _check_device(config)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    try:
        site_log.set_up(config.state, config.toml.logs.format, config.name)
        daemon = Daemon(config, open_cohort)
    except OSError as error:
        raise ConfigError(f"{config.state}: the site's state cannot be written ({error.strerror})") from None
    _log.info("site %s listens on its socket", config.name)
    stop.wait()
    _log.info("stopping")
    ended = daemon.close()
    _log.info("stopped" if ended else "stopped; work was abandoned and will be done again")
    return ended


@contextmanager
def _only_one(config: SiteConfig) -> Iterator[None]:
    """Hold the site's state: two daemons would spend one memory in two runs."""
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(config.state / "daemon.lock", f"a daemon of site {config.name}"))
        except ConsiliumError as error:
            raise UsageError(str(error)) from None
        yield


@contextmanager
def _private_folder(socket: Path) -> Iterator[Path]:
    """Make a folder beside a socket that nobody else can enter; those of daemons that were killed are taken away."""
    prefix = f".{hashlib.sha256(os.fsencode(socket)).hexdigest()[:4]}-"
    try:
        for left in socket.parent.glob(f"{prefix}*"):
            shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=socket.parent))
    except OSError as error:
        raise UsageError(f"{socket}: no socket can be made there ({error.strerror}); see [site] socket") from None
    try:
        if len(os.fsencode(folder / _INNER)) > SOCKET_BYTES:
            raise ConfigError(
                f"[site] socket: {socket.parent} is too long a folder for sockets, whose paths have at most "
                f'{SOCKET_BYTES} bytes; name a shorter one, such as socket = "/run/consilium/site.sock"'
            )
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _decoded(kind: str, content: bytes) -> Request:
    expected = REQUEST_OF.get(kind)
    if expected is None:
        raise SiteRefusal("malformed")
    try:
        request: Request = from_record(from_bytes(content), expected)
    except (MalformedMessage, SiteRefusal):  # a refusal is no request
        raise SiteRefusal("malformed") from None
    return request


def _bytes(outcome: Finished | Underway) -> bytes:
    if isinstance(outcome, Finished):
        return outcome.content
    return to_bytes(to_record(Pending(outcome.ticket, outcome.phase, outcome.done, outcome.total)))


def _state(opened: bool, code: str, working: bool, phase: str) -> str:
    """Return the state in a word."""
    if opened:
        return "working" if working else "ready"
    if working and phase:
        return "examining"
    return "unusable" if code else "starting"


def _memory(device: str) -> dict[str, int]:
    """Return bytes in use: of the process, and on the GPU if the site uses one."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    gpu = sys.modules["torch"].cuda.memory_reserved() if device == "cuda" else 0
    return {"resident": pages * os.sysconf("SC_PAGE_SIZE"), "gpu": gpu}


def _versions() -> dict[str, str]:
    names = ("consilium", "flwr", "torch", "grpcio")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def _check_device(config: SiteConfig) -> None:
    """Refuse at once a GPU that is not there; only the wish for one needs torch to be asked."""
    if config.toml.compute.device == "cuda":
        from client.workshop import choose_device

        choose_device("cuda")


def main(arguments: list[str]) -> int:
    """Serve the site of a `site.toml`, and return the exit code."""
    form = "text"
    try:
        if len(arguments) != 1:
            raise UsageError("usage: python -P -m client.daemon SITE.TOML")
        config = read_site(Path(arguments[0]))
        form = config.toml.logs.format
        ended = serve(config)
    except ConsiliumError as error:
        return tell_end(form, "daemon", error)
    if not ended:
        sys.stderr.flush()
        os._exit(0)  # a thread is inside torch: Python's own way out would pull the ground from under it
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

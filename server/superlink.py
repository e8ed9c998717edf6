"""Flower's SuperLink as the coordinator runs it: one process, one application, two listeners.

Flower serves hospitals (Fleet), runs (Runtime) and operators (Control) on one port and asks operators for no
credential: whoever reaches it may send code to every site. Here the port for hospitals passes Fleet routes only, the
other two live on the loopback interface behind a secret that other users of the machine do not have, and a run's task
goes to nobody without the SuperExec secret. Nothing else is started: no SuperExec, no gRPC server, no installation of
what a bundle names, no telemetry.

A flood of connections is not held off here: where the open internet reaches the coordinator, a proxy goes before it
(`deploy/nginx.conf`).

Source: flwr 1.41, `flwr.superlink.main.create_app` and `flwr.superlink.cli.flower_superlink`.
"""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import ssl
import sys
from base64 import b64decode
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from common.errors import ConfigError, ConsiliumError
from common.logs import set_up
from server.database import compact
from server.endpoints import QUIET, Endpoints, read_secret
from server.gates import App, FleetGate, Headers, OperatorGate

if TYPE_CHECKING:
    from fastapi import FastAPI

_log = logging.getLogger("consilium.superlink")
_BACKLOG = 128
_GRACE_SECONDS = 2
_CACHE = "-4000"  # KiB of the database that a connection keeps in memory
_IDLE_SECONDS = 75  # longer than a proxy keeps a connection for its next request, so that it never meets a closed one
_RENEWAL_SECONDS = 5.0


def serve(endpoints: Endpoints, ready: Callable[[], None] | None = None) -> None:
    """Answer requests until SIGTERM or SIGINT; for the main thread of a process of its own.

    Args:
        endpoints: where, and with what.
        ready: called once, in a thread, as soon as requests are answered.

    Raises:
        ConfigError: a secret, the certificate or its key cannot be used.
        ConsiliumError: an address cannot be listened at, or the database cannot be opened.
    """
    host, port = endpoints.public()
    operator, superexec = read_secret(endpoints.operator_secret), read_secret(endpoints.superexec_secret)
    context = _tls(endpoints) if endpoints.tls else None
    with _bind("127.0.0.1", endpoints.operator_port) as inner, _bind(host, port) as public:
        compact(endpoints.database)
        app = _application(endpoints.database, superexec)
        gates = (OperatorGate(app, operator), FleetGate(app, _site_check(app), _is_own))
        servers = (_server(gates[0], None), _server(gates[1], context))
        asyncio.run(_run(app, servers, (inner, public), _renewal(endpoints, context), ready))


def check_free(endpoints: Endpoints) -> None:
    """Check that both listeners can be had now.

    Raises:
        ConfigError: an address that is none of this machine.
        ConsiliumError: a port is in use.
    """
    with _bind("127.0.0.1", endpoints.operator_port), _bind(*endpoints.public()):
        pass


def prepare_process(form: str = "text") -> None:
    """Set what a process of its own needs: where its log goes, silence of dependencies, files for nobody else.

    Args:
        form: of the log, `text` or `json`.
    """
    set_up(form, "superlink", "%(asctime)s %(levelname)s %(name)s %(message)s", level=logging.WARNING)
    os.environ.update(QUIET)
    os.umask(0o077)


def main() -> None:
    """Run the SuperLink of an endpoints file."""
    prepare_process()
    try:
        if len(sys.argv) != 2:
            raise ConfigError("expected one argument, the file of the endpoints that `consilium server up` writes")
        serve(Endpoints.read(Path(sys.argv[1])))
    except ConsiliumError as error:
        sys.stderr.write(f"consilium: {error}\n")
        sys.exit(error.exit_code)


def _application(database: Path, superexec: bytes) -> FastAPI:
    """Return Flower's application over a database."""
    from alembic.util import CommandError
    from flwr.common.constant import ISOLATION_MODE_PROCESS, TRANSPORT_TYPE_GRPC_RERE
    from flwr.supercore import sql_mixin
    from flwr.supercore.constant import SQLITE_PRAGMAS
    from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
    from flwr.superlink.config_loader import SuperLinkLifespanConfig
    from flwr.superlink.main import create_app
    from sqlalchemy.exc import SQLAlchemyError

    flower = logging.getLogger("flwr")
    flower.handlers.clear()  # a console of colours, beside the root's handlers
    flower.setLevel(logging.ERROR)
    # Each of a dozen connections would hold 64 MB of objects that are read once.
    kept = tuple(pair for pair in SQLITE_PRAGMAS if pair[0] != "cache_size")
    vars(sql_mixin)["SQLITE_PRAGMAS"] = (*kept, ("cache_size", _CACHE))
    config = SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host="127.0.0.1",
        port=0,
        insecure=True,
        certificates=None,
        superexec_auth_secret=superexec,
        authn_plugin=NoOpControlAuthnPlugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=str(database),
        isolation=ISOLATION_MODE_PROCESS,
        runtime_dependency_install=False,
    )
    try:
        return _slimmed(create_app(config, _NothingElse))  # type: ignore[arg-type]
    except (SQLAlchemyError, CommandError, OSError) as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise ConsiliumError(
            f"{database}: cannot be used as the SuperLink's database ({reason}); "
            "bring it back from your backup, or move it away to begin with an empty one"
        ) from None


def _slimmed(app: FastAPI) -> FastAPI:
    """Take out what would stand in the way of every request and do nothing: logs of events, licences, traces.

    Each of Flower's layers costs a task of its own, and together these are a tenth of what a request costs.
    """
    from flwr.supercore.routers.runtime.tracing import RuntimeTracingMiddleware
    from flwr.superlink.routers.control.middlewares import ControlEventLogMiddleware, ControlLicenseMiddleware
    from flwr.superlink.routers.fleet.middlewares import FleetEventLogMiddleware

    idle: list[object] = [
        ControlEventLogMiddleware,
        ControlLicenseMiddleware,
        FleetEventLogMiddleware,
        RuntimeTracingMiddleware,
    ]
    app.user_middleware = [layer for layer in app.user_middleware if layer.cls not in idle]
    return app


class _NothingElse:
    """Flower's own lifespan would start a SuperExec and gRPC servers."""

    def __init__(self, config: object, state_factory: object) -> None:
        pass

    def startup(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


def _site_check(app: FastAPI) -> Callable[[Headers], Awaitable[bool]]:
    """Return the test whether headers are signed with the key of a registered site.

    Flower's own, by the same rule, comes after the body was read, and compares with what the body claims.
    """
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
    from flwr.supercore.date import now
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

    names = [name.lower().encode() for name in (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER)]
    time_name = TIMESTAMP_HEADER.lower().encode()
    state = app.state.linkstate_factory.state()

    def check(headers: Headers) -> bool:
        try:
            key, signature = (b64decode(headers[name], validate=True) for name in names)
            stamp = headers[time_name]
            age = (now() - datetime.fromisoformat(stamp.decode("ascii"))).total_seconds()
            if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
                return False
            if state.get_node_id_by_public_key(key) is None:
                return False
            return verify_signature(bytes_to_public_key(key), stamp, signature)
        except (KeyError, ValueError, TypeError, binascii.Error):
            return False

    async def is_site(headers: Headers) -> bool:
        return await asyncio.to_thread(check, headers)

    return is_site


def _is_own(body: bytes) -> bool:
    """Return whether replies bear the name of the site that says it sends them."""
    from flwr.proto.fleet_pb2 import PushMessagesRequest
    from google.protobuf.message import DecodeError

    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError:
        return False
    return all(message.metadata.src_node_id == request.node.node_id for message in request.messages_list)


class _Server(uvicorn.Server):
    """A server that leaves the process's signals to whoever runs it beside another."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _server(gate: App, context: ssl.SSLContext | None) -> _Server:
    config = uvicorn.Config(
        gate,
        http="h11",  # the strictest reader of requests
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        ssl_context_factory=None if context is None else lambda _config, _default: context,
    )
    return _Server(config)


async def _run(
    app: FastAPI,
    servers: tuple[_Server, _Server],
    sockets: tuple[socket.socket, socket.socket],
    renewal: Any,
    ready: Callable[[], None] | None,
) -> None:
    def stop() -> None:
        for server in servers:
            server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    async with app.router.lifespan_context(app), asyncio.TaskGroup() as group:
        watch = group.create_task(renewal)
        if ready is not None:
            group.create_task(asyncio.to_thread(ready))
        await asyncio.gather(*(server.serve([sock]) for server, sock in zip(servers, sockets, strict=True)))
        watch.cancel()


@contextlib.contextmanager
def _bind(host: str, port: int) -> Iterator[socket.socket]:
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except ValueError:
        raise ConfigError(f"listen: got {host!r}, expected an address of this machine, such as 0.0.0.0") from None
    except OSError as error:
        raise ConsiliumError(
            f"{host}:{port}: cannot be listened at ({os.strerror(error.errno or 0)}); stop what uses it, "
            "or name another port in server.toml"
        ) from None
    with listener:
        yield listener


def _tls(endpoints: Endpoints) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    _load(context, endpoints)
    return context


def _load(context: ssl.SSLContext, endpoints: Endpoints) -> None:
    try:
        # A key under a password would make OpenSSL ask at a terminal that a service does not have.
        context.load_cert_chain(endpoints.certificate, endpoints.private_key, password=lambda: b"")
    except OSError as error:  # ssl.SSLError among them
        reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
        raise ConfigError(
            f"{endpoints.certificate}, {endpoints.private_key}: cannot be used ({reason}); "
            "expected a certificate and its private key as PEM"
        ) from None


async def _renewal(endpoints: Endpoints, context: ssl.SSLContext | None) -> None:
    """Take up a certificate that was renewed on disk; connections from then on see it."""
    if context is None:
        return
    seen = _stamp(endpoints)
    while True:
        await asyncio.sleep(_RENEWAL_SECONDS)
        found = _stamp(endpoints)
        if found == seen:
            continue
        seen = found
        try:
            _tls(endpoints)  # a pair that does not fit must not touch the one in use
            _load(context, endpoints)
        except ConfigError as error:
            _log.error("the renewed certificate is not in use: %s", error)


def _stamp(endpoints: Endpoints) -> tuple[tuple[int, int], ...]:
    """Return what tells that the files were replaced."""
    stamps = []
    for path in (endpoints.certificate, endpoints.private_key):
        try:
            found = path.stat()
            stamps.append((found.st_mtime_ns, found.st_ino))
        except OSError:
            stamps.append((0, 0))
    return tuple(stamps)


if __name__ == "__main__":
    main()

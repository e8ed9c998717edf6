"""Who has no enrolled key gets nothing, and nobody gets anything but the Fleet routes: past TLS and past nginx.

Each attempt goes to two true fronts: the superlink's own TLS listener, and Debian's nginx with deploy/nginx.conf before
a superlink. What is tried against routes is read from Flower's own application.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import re
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from server.control import Control, bundle
from server.endpoints import OPERATOR_HEADER, sign
from server.gates import FLEET_ROUTES
from tests import test_deploy_nginx as shipped
from tests.conftest import Link, SuperLink, free_port, write_certificate

pytestmark = [pytest.mark.slow, pytest.mark.faults]

needs_nginx = pytest.mark.skipif(
    shipped.NGINX is None, reason="no nginx (Debian: apt-get install --no-install-recommends nginx-light)"
)
FRONTS = ["direct", pytest.param("nginx", marks=needs_nginx)]


@dataclass
class Front:
    """Where strangers knock: an address, and whom to trust there."""

    superlink: SuperLink
    port: int
    root: Path

    def link(self, key: ec.EllipticCurvePrivateKey | None = None) -> Link:
        return Link(f"127.0.0.1:{self.port}", self.root, key)

    def raw(self, request: bytes, wait: float = 10.0) -> bytes:
        """Return all that is answered to bytes until the front is silent, or closes."""
        context = ssl.create_default_context(cafile=str(self.root))
        answer = b""
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=wait) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as peer,
            contextlib.suppress(OSError),
        ):
            peer.sendall(request)
            while part := peer.recv(65536):
                answer += part
                peer.settimeout(0.3)
        return answer

    def post(self, route: str, body: bytes, headers: dict[str, str]) -> int:
        context = ssl.create_default_context(cafile=str(self.root))
        with httpx.Client(verify=context, trust_env=False) as client:
            return client.post(
                f"https://127.0.0.1:{self.port}{route}",
                content=body,
                headers={"content-type": PROTOBUF_MEDIA_TYPE, **headers},
            ).status_code


@contextlib.contextmanager
def nginx_before(port_behind: str, certificate: Path, private_key: Path, port: int | None = None) -> Iterator[int]:
    """Run the shipped nginx before an address, and yield its port."""

    @dataclass
    class Endpoints:
        listen: str
        certificate: Path
        private_key: Path

    port = port or free_port()
    with tempfile.TemporaryDirectory(prefix="nginx-") as name:
        folder = Path(name)
        shipped.lay_out(folder, Endpoints(port_behind, certificate, private_key), port)  # type: ignore[arg-type]
        text = (folder / "consilium.conf").read_text()
        (folder / "consilium.conf").write_text(shipped.adapted(text, {"rate=100r/s": "rate=10000r/s"}))  # no flood here
        command = [str(shipped.NGINX), "-p", name, "-c", f"{name}/nginx.conf", "-e", "stderr"]
        process = subprocess.Popen(command, **shipped.unprivileged(folder))
        try:
            shipped.await_port(port, process)
            yield port
        finally:
            process.terminate()
            process.wait(10)


@pytest.fixture(scope="module")
def fronts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Front]]:
    made: dict[str, Front] = {}
    with contextlib.ExitStack() as stack:

        def make(name: str) -> Front:
            if name not in made:
                superlink = SuperLink(tmp_path_factory.mktemp(name), tls=name == "direct").start()
                stack.callback(superlink.end)
                there = superlink.endpoints
                port = there.public()[1]
                if name == "nginx":
                    port = stack.enter_context(nginx_before(there.listen, there.certificate, there.private_key))
                made[name] = Front(superlink, port, there.certificate)
            return made[name]

        yield make


# ------------------------------------------------------------------------------------------------------------- routes

HIDDEN = {"/v1/control": 41, "/v1/runtime": 22, "/docs": 2, "/openapi.json": 1, "/health": 1}
"""Families of Flower's routes that hospitals have no business with, and how many paths each has in this version."""


def offered(folder: Path) -> set[str]:
    """Return the paths of all routes of Flower's application, also of those that its document leaves out."""
    from server.superlink import _application

    def paths(router: Any) -> Iterator[str]:
        for route in router.routes:
            if hasattr(route, "path"):
                yield route.path
            if hasattr(route, "original_router"):
                yield from paths(route.original_router)

    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # alembic's, of Flower's own settings
        return set(paths(_application(folder / "x.db", b"s" * 32)))


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    return offered(tmp_path_factory.mktemp("flower"))


def test_a_new_route_of_flowers_has_to_be_thought_about(routes: set[str]) -> None:
    fleet = {path for path in routes if path.startswith("/v1/fleet/")}
    assert fleet == {route.decode() for route in FLEET_ROUTES} | {
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
    }
    others = routes - fleet
    counts = {family: sum(path.startswith(family) for path in others) for family in HIDDEN}
    assert counts == HIDDEN
    assert sum(counts.values()) == len(others), sorted(others)


def reached(answer: bytes) -> bool:
    """Whether Flower's application had a part in an answer: the gate's have no body, nginx's are its own pages.

    An answer to the upgrade of a connection, or one that sends the asker elsewhere, would be no less.
    """
    statuses = [part[:3] for part in re.split(rb"HTTP/1\.[01] ", answer)[1:]]
    told = any(mark in answer for mark in (b"application/json", PROTOBUF_MEDIA_TYPE.encode(), b"uvicorn", b"swagger"))
    return told or any(not status.startswith(b"4") and status not in (b"501", b"505") for status in statuses)


def asked(target: str, version: str = "1.1", method: str = "POST", more: str = "", secret: bytes = b"") -> bytes:
    """Return a request as bytes, signed as an operator's."""
    claim = sign(secret, int(time.time()), target, b"") if secret else ""
    head = (
        f"{method} {target} HTTP/{version}\nHost: x\n{OPERATOR_HEADER}: {claim}\nContent-Type: {PROTOBUF_MEDIA_TYPE}\n"
    )
    return f"{head}Connection: close\n{more or 'Content-Length: 0'}\n\n".replace("\n", "\r\n").encode("latin-1")


@pytest.mark.parametrize("name", FRONTS)
def test_no_other_route_of_flowers_is_answered(name: str, fronts: Any, routes: set[str]) -> None:
    """Not even to whoever has the operator's secret."""
    front = fronts(name)
    secret = front.superlink.endpoints.operator_secret.read_bytes()
    open_routes = {route.decode() for route in FLEET_ROUTES}
    for path in sorted(routes - open_routes):
        for method in ("POST", "GET"):
            answer = front.raw(asked(path, method=method, secret=secret))
            assert answer and not reached(answer), (path, method, answer)
    for path in sorted(open_routes):
        for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "CONNECT", "PROPFIND", "post"):
            answer = front.raw(asked(path, method=method))
            assert answer and not reached(answer), (path, method, answer)


HIDDEN_PATHS = (
    "/v1/control/list-nodes",
    "/v1/runtime/acquire-task",
    "/v1/fleet/register-node",
    "/docs",
    "/openapi.json",
)
FLEET = "/v1/fleet/pull-messages"
SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda path: f"/{path}",
    lambda path: f"//x{path}",
    lambda path: f"/v1/fleet/../..{path}",
    lambda path: f"/v1/fleet/%2e%2e/%2e%2e{path}",
    lambda path: f"/v1/fleet/.%2E/.%2E{path}",
    lambda path: f"/v1/fleet/..%2f..%2f{path[1:]}",
    lambda path: f"/v1/fleet/..;/..;{path}",
    lambda path: f"/v1/fleet/..%5c..%5c{path[1:]}",
    lambda path: f"/v1/fleet/..\\..\\{path[1:]}",
    lambda path: f"{FLEET}/../../..{path}",
    lambda path: f"{FLEET};{path}",
    lambda path: f"{FLEET}?{path}",
    lambda path: f"{FLEET}#{path}",
    lambda path: f"{FLEET}%00{path}",
    lambda path: f"{FLEET}%0d%0aX:%20{path}",
    lambda path: f"{path};x",
    lambda path: f"{path}/",
    lambda path: f"{path}?x=/v1/fleet/",
    lambda path: path.upper(),
    lambda path: path.replace("v1", "V1"),
    lambda path: path.replace("o", "%6f").replace("r", "%72"),
    lambda path: path.replace("/", "%2f"),
    lambda path: path.replace("/", "/./"),
    lambda path: f"http://127.0.0.1{path}",
    lambda path: f"https://127.0.0.1{path}",
    lambda path: f"http://127.0.0.1/v1/fleet/..{path}",
    lambda path: f"http://x@127.0.0.1{path}",
    lambda path: path[1:],
)


@pytest.mark.parametrize("name", FRONTS)
@pytest.mark.parametrize("path", HIDDEN_PATHS)
def test_no_way_of_writing_a_path_leads_to_a_hidden_route(path: str, name: str, fronts: Any) -> None:
    front = fronts(name)
    for spell in SPELLINGS:
        for version in ("1.1", "1.0"):
            request = asked(spell(path), version)
            answer = front.raw(request)
            assert not reached(answer), (request, answer)


def framed(head: str, body: bytes = b"") -> bytes:
    return f"POST {FLEET} HTTP/1.1\nHost: x\n{head}\n\n".replace("\n", "\r\n").encode("latin-1") + body


INSIDE = asked("/v1/control/list-nodes")
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(INSIDE), INSIDE)
FRAMES: dict[str, bytes] = {
    "two lengths": framed(f"Content-Length: 0\nContent-Length: {len(INSIDE)}", INSIDE),
    "a list of lengths": framed(f"Content-Length: 0, {len(INSIDE)}", INSIDE),
    "length and chunks": framed("Content-Length: 4\nTransfer-Encoding: chunked", CHUNKED),
    "chunks and length": framed("Transfer-Encoding: chunked\nContent-Length: 5", b"0\r\n\r\n" + INSIDE),
    "chunks that are spaced": framed("Transfer-Encoding : chunked\nContent-Length: 5", b"0\r\n\r\n" + INSIDE),
    "chunks by another name": framed("Transfer-Encoding: xchunked\nContent-Length: 5", b"0\r\n\r\n" + INSIDE),
    "chunks twice": framed("Transfer-Encoding: chunked\nTransfer-Encoding: identity", b"0\r\n\r\n" + INSIDE),
    "chunks on a folded line": framed("Transfer-Encoding:\n chunked", b"0\r\n\r\n" + INSIDE),
    "chunks alone": framed("Transfer-Encoding: chunked", b"0\r\n\r\n" + INSIDE),
    "a length with a sign": framed("Content-Length: +0", INSIDE),
    "a length in hexadecimal": framed("Content-Length: 0x0", INSIDE),
    "a length below zero": framed("Content-Length: -1", INSIDE),
    "no length": framed("X: y", INSIDE),
    "two hosts": framed("Host: 127.0.0.1:9444\nContent-Length: 0"),
    "a host that is a path": asked(FLEET).replace(b"Host: x", b"Host: x/v1/control/list-nodes?"),
    "h2c": framed("Connection: Upgrade, HTTP2-Settings\nUpgrade: h2c\nHTTP2-Settings: AAMAAABkAAQ\nContent-Length: 0"),
    "http2 at once": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "websocket": framed("Connection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Version: 13\nSec-WebSocket-Key: "
        + "A" * 22 + "==\nContent-Length: 0"),
    "a header that ends early": framed("X: a\n\rY: b\nContent-Length: 0\n" + INSIDE.decode()),
    "a line of its own": framed("X: a\rTransfer-Encoding: chunked\nContent-Length: 0"),
    "another path asked for": framed("X-Original-URL: /v1/control/list-nodes\nX-Rewrite-URL: /v1/control/list-nodes\n"
        "X-Forwarded-Prefix: /v1/control\nX-HTTP-Method-Override: GET\nContent-Length: 0"),
    "headers to be dropped": framed("Connection: content-length, flwr-signature, host\nContent-Length: 0"),
    "http 0.9": b"POST /v1/control/list-nodes\r\n\r\n",
    "http 2.0": asked("/v1/control/list-nodes").replace(b"HTTP/1.1", b"HTTP/2.0"),
    "wait for it": framed(f"Expect: 100-continue\nContent-Length: {len(INSIDE)}", INSIDE),
    "a second request behind the first": framed("Content-Length: 0") + INSIDE,
}  # fmt: skip


@pytest.mark.parametrize("name", FRONTS)
@pytest.mark.parametrize("what", FRAMES)
def test_no_framing_brings_a_second_request_past_the_front(what: str, name: str, fronts: Any) -> None:
    answer = fronts(name).raw(FRAMES[what]).replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    assert not reached(answer), answer


class Upstream:
    """Stands where the superlink does, and reads requests as its server does: what nginx would have brought it."""

    def __init__(self) -> None:
        self.requests: list[tuple[bytes, bytes]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._serve, args=(caller,)))
                self._threads[-1].start()

    def _serve(self, caller: socket.socket) -> None:
        reader = h11.Connection(h11.SERVER)
        caller.settimeout(5)
        with caller, contextlib.suppress(OSError, h11.RemoteProtocolError):
            while True:
                event = reader.next_event()
                if event is h11.NEED_DATA:
                    reader.receive_data(caller.recv(65536))
                elif isinstance(event, h11.Request):
                    self.requests.append((event.method, event.target))
                elif isinstance(event, h11.EndOfMessage):
                    caller.sendall(reader.send(h11.Response(status_code=204, headers=[])) or b"")
                    caller.sendall(reader.send(h11.EndOfMessage()) or b"")
                    reader.start_next_cycle()
                elif isinstance(event, h11.ConnectionClosed):
                    return


@needs_nginx
def test_nginx_passes_on_fleet_requests_and_nothing_that_hides_in_them(tmp_path: Path) -> None:
    write_certificate(tmp_path / "a.pem", tmp_path / "a.key")
    upstream = Upstream()
    try:
        with nginx_before(f"127.0.0.1:{upstream.port}", tmp_path / "a.pem", tmp_path / "a.key") as port:
            front = Front(None, port, tmp_path / "a.pem")  # type: ignore[arg-type]
            for request in FRAMES.values():
                front.raw(request, 3)
            for path in HIDDEN_PATHS:
                for spell in SPELLINGS:
                    front.raw(asked(spell(path)), 3)
    finally:
        upstream.close()
    methods, targets = ({pair[k] for pair in upstream.requests} for k in (0, 1))
    assert methods == {b"POST"}, "and some did come through"
    assert all(target.startswith(b"/v1/fleet/") for target in targets)
    assert not any(
        name in target for target in targets for name in (b"/v1/control/list-nodes\r", b"register-node HTTP")
    )
    assert not targets & {b"/v1/fleet/register-node", b"/v1/fleet/unregister-node"}


# ---------------------------------------------------------------------------------------------------------- strangers


def bodies(node: Node, key: ec.EllipticCurvePrivateKey) -> dict[str, bytes]:
    """Return a request for each route, in a site's name."""
    made = {
        "activate-node": ActivateNodeRequest(public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=30),
        "deactivate-node": DeactivateNodeRequest(node_id=node.node_id),
        "send-node-heartbeat": SendNodeHeartbeatRequest(node=node, heartbeat_interval=30),
        "pull-messages": PullMessagesRequest(node=node),
        "push-messages": PushMessagesRequest(node=node),
        "pull-object": PullObjectRequest(node=node, run_id=1, object_id="ab" * 32),
        "push-object": PushObjectRequest(node=node, run_id=1, object_id="ab" * 32, object_content=b"x"),
        "confirm-message-received": ConfirmMessageReceivedRequest(node=node, run_id=1, message_object_id="ab" * 32),
        "get-run": GetRunRequest(node=node, run_id=1),
        "get-fab": GetFabRequest(node=node, run_id=1, hash_str="ab" * 32),
    }
    assert {f"/v1/fleet/{name}".encode() for name in made} == FLEET_ROUTES
    return {f"/v1/fleet/{name}": request.SerializeToString() for name, request in made.items()}


def signature(
    key: ec.EllipticCurvePrivateKey, shown: ec.EllipticCurvePrivateKey | None = None, seconds: float = 0.0
) -> dict[str, str]:
    """Return the headers of a signature made at another time, or shown with another's key."""
    stamp = (now() + datetime.timedelta(seconds=seconds)).isoformat()
    public = public_key_to_bytes((shown or key).public_key())
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(public).decode(),
        TIMESTAMP_HEADER: stamp,
        FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(sign_message(key, stamp.encode())).decode(),
    }


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


@pytest.mark.parametrize("name", FRONTS)
def test_no_route_tells_a_stranger_anything(name: str, fronts: Any) -> None:
    front = fronts(name)
    site, stranger, gone = (front.link(new_key()) for _ in range(3))
    with Control(front.superlink.endpoints) as control, site, stranger, gone:
        control.register("north", site.public_key)
        control.register("gone", gone.public_key)
        node = Node(node_id=site.activate())
        gone.activate()
        control.unregister("gone")
        right = signature(site.key)
        credentials: dict[str, tuple[dict[str, str], ec.EllipticCurvePrivateKey]] = {
            "nothing": ({}, site.key),
            "a key that is not enrolled": (signature(stranger.key), stranger.key),
            "a key that was withdrawn": (signature(gone.key), gone.key),
            "a site's key, signed with another": (signature(stranger.key, site.key), site.key),
            "a signature of ten minutes ago": (signature(site.key, seconds=-600), site.key),
            "a signature of the next minute": (signature(site.key, seconds=60), site.key),
            "an old signature under a new time": ({**signature(site.key, seconds=-600),
                TIMESTAMP_HEADER: right[TIMESTAMP_HEADER]}, site.key),
            "no time": ({k: v for k, v in right.items() if k != TIMESTAMP_HEADER}, site.key),
            "no signature": ({k: v for k, v in right.items() if k != FLEET_HTTP_SIGNATURE_HEADER}, site.key),
        }  # fmt: skip
        for what, (headers, key) in credentials.items():
            for route, body in bodies(node, key).items():
                status = front.post(route, body, headers)
                allowed = (401, 412) if route.endswith("activate-node") else (401,)
                assert status in allowed, (what, route, status)
        statuses = {route: front.post(route, body, right) for route, body in bodies(node, site.key).items()
                    if "activate" not in route}  # fmt: skip
        assert statuses["/v1/fleet/pull-messages"] == 200 and 401 not in statuses.values(), "the site itself is known"


@pytest.mark.parametrize("name", FRONTS)
def test_an_enrolled_key_does_nothing_in_another_sites_name(name: str, fronts: Any) -> None:
    """Neither takes its messages, nor answers them, nor lets its lease end; and its message still reaches it."""
    front = fronts(name)
    site, rival = front.link(new_key()), front.link(new_key())
    with Control(front.superlink.endpoints) as control, site, rival:
        node = Node(node_id=control.register("south", site.public_key))
        control.register("rival", rival.public_key)
        site.activate(), rival.activate()
        with control.grid(control.start_run(bundle())) as grid:
            (sent,) = grid.push_messages([Message(secret_content(), node.node_id, "query.describe")])
            for route, body in bodies(node, rival.key).items():
                if not route.endswith("/activate-node"):
                    assert front.post(route, body, signature(rival.key)) in (401, 403), route
            assert not rival.client.PullMessages(PullMessagesRequest(node=rival.node)).messages_list
            assert site.answer(lambda message: message.content)
            assert [reply.content for reply in grid.pull_messages([sent])] == [secret_content()]


def secret_content() -> RecordDict:
    return RecordDict({"facts": ConfigRecord({"only": "for the south"})})


@pytest.mark.parametrize("name", FRONTS)
def test_a_signature_that_was_overheard_is_good_for_minutes_and_only_in_its_own_name(name: str, fronts: Any) -> None:
    """Flower signs a time, nothing else: what TLS keeps from being overheard. This says how far it would reach."""
    front = fronts(name)
    site, other = front.link(new_key()), front.link(new_key())
    with Control(front.superlink.endpoints) as control, site, other:
        control.register("west", site.public_key)
        control.register("east", other.public_key)
        node, foreign = Node(node_id=site.activate()), Node(node_id=other.activate())
        overheard = signature(site.key, seconds=-100)
        assert front.post(FLEET, PullMessagesRequest(node=node).SerializeToString(), overheard) == 200
        assert front.post(FLEET, PullMessagesRequest(node=foreign).SerializeToString(), overheard) == 401
        late = signature(site.key, seconds=-TIMESTAMP_TOLERANCE - SYSTEM_TIME_TOLERANCE - 1)
        assert front.post(FLEET, PullMessagesRequest(node=node).SerializeToString(), late) == 401

from __future__ import annotations

import re
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.fleet_pb2 import PullMessagesRequest, RegisterNodeFleetRequest, UnregisterNodeFleetRequest
from flwr.proto.message_pb2 import PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import FlowerError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from server.control import Control, bundle
from server.endpoints import OPERATOR_HEADER, sign
from server.gates import FLEET_ROUTES

pytestmark = pytest.mark.slow


def raw(superlink: Any, head: str, body: bytes = b"") -> bytes:
    """Return what the public listener answers to bytes that no client library would send."""
    host, port = superlink.endpoints.public()
    with socket.create_connection((host, port), timeout=10) as plain, wrapped(superlink, plain) as peer:
        peer.sendall(head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n" + body)
        parts = []
        while part := peer.recv(65536):
            parts.append(part)
            if b"\r\n\r\n" in b"".join(parts):
                break
        return b"".join(parts)


def wrapped(superlink: Any, plain: socket.socket) -> Any:
    if not superlink.endpoints.tls:
        return plain
    context = ssl.create_default_context(cafile=str(superlink.endpoints.certificate))
    return context.wrap_socket(plain, server_hostname="127.0.0.1")


def no_route(answer: bytes) -> bool:
    """Whether an answer is the gate's or the parser's: Flower's own, also of what is not found, has a body of JSON."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b" ")[1]
    return (status, body) == (b"404", b"") or (status == b"400" and body.startswith(b"Invalid HTTP"))


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/health",
        "/docs",
        "/openapi.json",
        "/v1/responses",
        "/v1/control/list-nodes",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "//v1/fleet/../control/list-nodes",
        "//v1/fleet/pull-messages",
        "/v1/fleet/../control/list-nodes",
        "/v1/fleet/%2e%2e/control/list-nodes",
        "/v1/fleet/%2E%2E%2fcontrol%2flist-nodes",
        "/v1/fleet/..\\control\\list-nodes",
        "/v1/fleet/pull%2Dmessages",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages?x",
        "/V1/FLEET/PULL-MESSAGES",
        "http://127.0.0.1/v1/control/list-nodes",
        "http://127.0.0.1/v1/fleet/pull-messages",
        "/v1/fleet/pull-messages#/v1/control/list-nodes",
    ],
)
def test_the_public_listener_answers_none_of_these(superlink: Any, target: str) -> None:
    secret = superlink.endpoints.operator_secret.read_bytes()
    claim = sign(secret, int(time.time()), target, b"")  # not even with the operator's secret
    for method in ("POST", "GET"):
        head = f"{method} {target} HTTP/1.1\nHost: x\n{OPERATOR_HEADER}: {claim}\nContent-Length: 0"
        assert no_route(raw(superlink, f"{head}\nContent-Type: {PROTOBUF_MEDIA_TYPE}"))


@pytest.mark.parametrize("host", ["x/v1/control/list-nodes?", "x/v1/runtime/pull-object?", "x#", "x@y", ""])
def test_a_made_up_host_gets_nobody_past_the_keys(superlink: Any, host: str) -> None:
    for path in sorted(FLEET_ROUTES):
        answer = raw(superlink, f"POST {path.decode()} HTTP/1.1\nHost: {host}\nContent-Length: 0")
        if path.endswith(b"activate-node"):
            assert b"200" not in answer.split(b"\r\n")[0]
        else:
            assert b" 401 " in answer and answer.endswith(b"\r\n\r\n")


def test_an_upgrade_is_not_taken(superlink: Any) -> None:
    head = "Upgrade: websocket\nConnection: Upgrade\nSec-WebSocket-Version: 13\nSec-WebSocket-Key: " + "A" * 22 + "=="
    for path in ("/v1/fleet/pull-messages", "/v1/control/stream-logs"):
        assert no_route(raw(superlink, f"GET {path} HTTP/1.1\nHost: x\n{head}"))


def test_a_body_that_is_no_body_does_not_pass(superlink: Any) -> None:
    path = "/v1/fleet/activate-node"
    assert b" 411 " in raw(superlink, f"POST {path} HTTP/1.1\nHost: x\nTransfer-Encoding: chunked")
    assert b" 413 " in raw(superlink, f"POST {path} HTTP/1.1\nHost: x\nContent-Length: 99999999999")
    both = f"POST {path} HTTP/1.1\nHost: x\nContent-Length: 5\nTransfer-Encoding: chunked"
    assert b"HTTP/1.1 4" in raw(superlink, both, b"0\r\n\r\n")


def test_the_operator_listener_wants_its_secret(superlink: Any) -> None:
    where = f"http://127.0.0.1:{superlink.endpoints.operator_port}"
    secret = superlink.endpoints.operator_secret.read_bytes()
    with httpx.Client(base_url=where, trust_env=False) as client:

        def status(path: str, *, signed: bool, method: str = "POST") -> int:
            claim = {OPERATOR_HEADER: sign(secret, int(time.time()), path, b"")} if signed else {}
            headers = {**claim, "content-type": PROTOBUF_MEDIA_TYPE, "content-length": "0"}
            return client.request(method, path, headers=headers).status_code

        others = ("/docs", "/openapi.json", "/health", "/v1/fleet/pull-messages", "/v1/responses", "/")
        for method in ("POST", "GET"):
            for path in ("/v1/control/list-nodes", "/v1/runtime/acquire-task", *others):
                assert status(path, signed=False, method=method) == 401
            for path in others:
                assert status(path, signed=True, method=method) == 404
        assert status("/v1/control/list-nodes", signed=True) == 200
        assert status("/v1/runtime/acquire-task", signed=True) in (400, 401, 403)  # no SuperExec secret


@pytest.mark.parametrize("tls", [True, False])
def test_only_a_registered_key_is_a_site_with_or_without_tls(
    tls: bool, superlinks: Callable[..., Any], links: Callable[..., Any]
) -> None:
    superlink = superlinks(tls=tls).start()
    site, other, stranger = links(superlink), links(superlink), links(superlink)
    with Control(superlink.endpoints) as control:
        control.register("north", site.public_key)
        control.register("south", other.public_key)
        assert site.activate() != other.activate()
        assert site.client.PullMessages(PullMessagesRequest(node=site.node)) is not None
        with pytest.raises(httpx.HTTPStatusError) as declined:
            stranger.activate()
        told = FlowerError.from_json(declined.value.response.text)
        assert declined.value.response.status_code == 412 and told is not None
        for node in (site.node, Node(node_id=1)):
            with pytest.raises(httpx.HTTPStatusError, match="401"):
                stranger.client.PullMessages(PullMessagesRequest(node=node))
            with pytest.raises(httpx.HTTPStatusError, match="401"):
                stranger.client.PullObject(PullObjectRequest(node=node, run_id=1, object_id="a"))
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            other.client.PullMessages(PullMessagesRequest(node=site.node))  # a site in another's name
        key = public_key_to_bytes(stranger.key.public_key())
        with pytest.raises(httpx.HTTPStatusError, match="404"):
            stranger.client.RegisterNode(RegisterNodeFleetRequest(public_key=key))
        with pytest.raises(httpx.HTTPStatusError, match="404"):
            site.client.UnregisterNode(UnregisterNodeFleetRequest(node_id=site.node.node_id))
        statuses = {node.name: node.status for node in control.nodes()}
        assert statuses == {"north": "online", "south": "online"}
        control.unregister("south")
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            other.client.PullMessages(PullMessagesRequest(node=other.node))


def test_a_site_cannot_answer_in_anothers_name(superlink: Any, links: Callable[..., Any]) -> None:
    site, rival = links(superlink), links(superlink)
    with Control(superlink.endpoints) as control:
        node_id = control.register("west", site.public_key)
        control.register("rival", rival.public_key)
        site.activate(), rival.activate()
        with control.grid(control.start_run(bundle())) as grid:
            (sent,) = grid.push_messages([Message(RecordDict(), node_id, "query.describe")])
            stolen: list[Any] = []

            def forge(message: Message) -> RecordDict:
                """Answer first with the rival's key, then honestly."""
                poisoned = Message(RecordDict({"facts": ConfigRecord({"poison": 1})}), reply_to=message)
                with pytest.raises(httpx.HTTPStatusError, match="403") as refusal:
                    rival._push(poisoned)
                stolen.append(refusal)
                return RecordDict()

            assert site.answer(forge) and stolen
            (reply,) = grid.pull_messages([sent])
            assert reply.content == RecordDict()


def signed(link: Any) -> dict[str, str]:
    """Return the headers of a hospital's signature."""
    context = ProtobufRequestContext("", PullMessagesRequest(), httpx.Request("POST", "http://x/"))
    link.client._interceptors[0].intercept(context, lambda _: httpx.Response(200))
    return {name: value for name, value in context.request.headers.items() if name.startswith("flwr-")}


def test_a_signature_of_another_time_or_key_is_none(superlink: Any, links: Callable[..., Any]) -> None:
    site, stranger = links(superlink), links(superlink)
    with Control(superlink.endpoints) as control:
        control.register("east", site.public_key)
        site.activate()
    good, foreign = signed(site), signed(stranger)

    def status(**changes: str) -> int:
        headers = {**good, **{name.replace("_", "-"): value for name, value in changes.items()}}
        address, root = superlink.endpoints.listen, str(superlink.endpoints.certificate)
        body = PullMessagesRequest(node=site.node).SerializeToString()
        headers["content-type"] = PROTOBUF_MEDIA_TYPE
        with httpx.Client(verify=ssl.create_default_context(cafile=root), trust_env=False) as client:
            return client.post(f"https://{address}/v1/fleet/pull-messages", content=body, headers=headers).status_code

    assert status() == 200
    assert status(flwr_timestamp="2020-01-01T00:00:00+00:00") == 401
    assert status(flwr_timestamp="2020-01-01T00:00:00") == 401  # of no time zone
    assert status(flwr_timestamp="now") == 401
    assert status(flwr_signature=foreign["flwr-signature"]) == 401
    assert status(flwr_public_key=foreign["flwr-public-key"]) == 401
    assert status(flwr_signature="?") == status(flwr_public_key="AAAA") == 401


def test_sigterm_ends_it_in_time_under_peers_that_do_not_go(superlinks: Callable[..., Any]) -> None:
    superlink = superlinks(tls=False).start()
    host, port = superlink.endpoints.public()
    with socket.create_connection((host, port)) as idle, socket.create_connection((host, port)) as slow:
        slow.sendall(b"POST /v1/fleet/activate-node HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n1")
        idle.sendall(b"POST /v1")
        time.sleep(0.3)
        begun = time.monotonic()
        assert superlink.end(signal.SIGTERM) == 0
        assert time.monotonic() - begun < 5


def seen_certificate(superlink: Any) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(superlink.endpoints.public()) as plain, context.wrap_socket(plain) as peer:
        found = peer.getpeercert(binary_form=True)
    assert found is not None
    return found


def test_a_renewed_certificate_is_taken_up_and_a_broken_one_is_not(superlinks: Callable[..., Any]) -> None:
    superlink, donor = superlinks(), superlinks()
    superlink.start()
    before = seen_certificate(superlink)
    superlink.endpoints.private_key.write_text("half a fi")
    time.sleep(6)
    assert seen_certificate(superlink) == before
    superlink.endpoints.certificate.write_bytes(donor.endpoints.certificate.read_bytes())
    superlink.endpoints.private_key.write_bytes(donor.endpoints.private_key.read_bytes())
    end = time.monotonic() + 10
    while seen_certificate(superlink) == before:
        assert time.monotonic() < end
        time.sleep(0.2)
    pem = ssl.DER_cert_to_PEM_cert(seen_certificate(superlink))
    assert pem.split() == donor.endpoints.certificate.read_text().split()


def taken_port(superlink: Any) -> None:
    superlink.taken = socket.create_server(("127.0.0.1", superlink.endpoints.operator_port))


@pytest.mark.parametrize(
    ("spoil", "code", "line"),
    [
        (lambda s: s.endpoints.operator_secret.unlink(), 2, "operator.secret: missing"),
        (lambda s: s.endpoints.superexec_secret.chmod(0o644), 2, "superexec.secret: mode 0644 opens a secret"),
        (lambda s: s.endpoints.certificate.unlink(), 2, "server.pem, .*server.key: cannot be used"),
        (lambda s: s.endpoints.private_key.write_text("x"), 2, "server.key: cannot be used"),
        (lambda s: s.endpoints.database.write_text("no database " * 100), 1, "cannot be used as the SuperLink's data"),
        (lambda s: s.endpoints.database.mkdir(), 1, "cannot be used as the SuperLink's database"),
        (taken_port, 1, "127.0.0.1:[0-9]+: cannot be listened at .*Address already in use"),
    ],
)
def test_what_keeps_it_from_starting_is_one_line(
    spoil: Callable[[Any], None], code: int, line: str, superlinks: Callable[..., Any]
) -> None:
    superlink = superlinks()
    spoil(superlink)
    process = superlink.launch(stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    if hasattr(superlink, "taken"):
        superlink.taken.close()
    assert process.returncode == code, err
    assert out == b"" and err.count(b"\n") == 1, err
    assert re.search(line, err.decode()), err


def test_the_database_is_for_its_owner_alone(superlink: Any) -> None:
    files = list(Path(superlink.folder).glob("superlink.db*"))
    assert files and all(path.stat().st_mode & 0o077 == 0 for path in files)

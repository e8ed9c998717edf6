from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import gates
from server.endpoints import OPERATOR_HEADER, sign
from server.gates import (
    ACTIVATE,
    ACTIVATION_BYTES,
    FLEET_ROUTES,
    OPERATOR_BYTES,
    PUBLIC_BYTES,
    PUSH,
    FleetGate,
    OperatorGate,
)

SECRET = bytes(range(32))
PULL = b"/v1/fleet/pull-messages"


class Flower:
    """Stands where the application is, and remembers what reached it."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, Any], bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        event = await receive()
        assert event["more_body"] is False
        self.seen.append((scope, event["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"reached"})


def ask(
    gate: Any,
    path: bytes,
    *,
    method: str = "POST",
    query: bytes = b"",
    headers: list[tuple[bytes, bytes]] | None = None,
    body: tuple[bytes, ...] = (b"",),
    gone: bool = False,
) -> int | None:
    """Return the status of an answer; None for no answer."""
    length = [(b"content-length", str(sum(map(len, body))).encode())]
    scope = {
        "type": "http",
        "method": method,
        "path": path.decode("latin-1"),
        "raw_path": path,
        "query_string": query,
        "headers": length if headers is None else headers,
    }
    events = [{"type": "http.request", "body": part, "more_body": at < len(body) - 1} for at, part in enumerate(body)]
    if gone:
        events = [*events[:-1], {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> Any:
        return events.pop(0) if events else await asyncio.Event().wait()

    async def send(event: Any) -> None:
        sent.append(event)

    asyncio.run(gate(scope, receive, send))
    if not sent:
        return None
    if sent[0]["status"] != 200:
        assert (b"connection", b"close") in sent[0]["headers"] and sent[1]["body"] == b""
    status: int = sent[0]["status"]
    return status


async def nobody(headers: Any) -> bool:
    return False


async def anybody(headers: Any) -> bool:
    return True


def own(body: bytes) -> bool:
    return body != b"foreign"


def test_replies_in_anothers_name_are_refused_and_nothing_else_is_asked() -> None:
    flower = Flower()
    assert ask(FleetGate(flower, anybody, own), PUSH, body=(b"fore", b"ign")) == 403
    assert not flower.seen
    assert ask(FleetGate(flower, anybody, own), PUSH, body=(b"mine",)) == 200
    assert ask(FleetGate(flower, anybody, own), PULL, body=(b"foreign",)) == 200


def test_exactly_the_fleet_routes_without_registration_pass() -> None:
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

    offered = {path.encode() for _, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
    assert offered - FLEET_ROUTES == {b"/v1/fleet/register-node", b"/v1/fleet/unregister-node"}
    assert offered >= FLEET_ROUTES
    for path in offered:
        flower = Flower()
        assert ask(FleetGate(flower, anybody, own), path) == (200 if path in FLEET_ROUTES else 404)
        assert len(flower.seen) == (path in FLEET_ROUTES)


@pytest.mark.parametrize(
    "path",
    [
        b"/",
        b"//v1/fleet/pull-messages",
        b"/v1/fleet/",
        b"/v1/fleet/pull-messages/",
        b"/v1/fleet//pull-messages",
        b"/v1/fleet/./pull-messages",
        b"/v1/fleet/../control/list-nodes",
        b"/v1/fleet/%2e%2e/control/list-nodes",
        b"/v1/fleet/..%2fcontrol/list-nodes",
        b"/v1/fleet/pull%2dmessages",
        b"/v1/fleet/pull-messages;x",
        b"/v1/fleet/pull-messages%00",
        b"/v1/FLEET/pull-messages",
        b"/V1/fleet/pull-messages",
        b"http://x/v1/fleet/pull-messages",
        b"/v1/control/list-nodes",
        b"/v1/runtime/acquire-task",
        b"/v1/responses",
        b"/health",
        b"/docs",
        b"/openapi.json",
        b"*",
    ],
)
def test_no_other_way_of_writing_a_path_leads_anywhere(path: bytes) -> None:
    flower = Flower()
    assert ask(FleetGate(flower, anybody, own), path) == 404
    assert not flower.seen


@given(st.binary(max_size=60))
def test_only_the_closed_list_passes(path: bytes) -> None:
    flower = Flower()
    status = ask(FleetGate(flower, anybody, own), path)
    assert (status == 200) == (path in FLEET_ROUTES) == bool(flower.seen)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "OPTIONS", "CONNECT", "post"])
def test_another_method_or_a_query_is_no_route(method: str) -> None:
    flower = Flower()
    assert ask(FleetGate(flower, anybody, own), PULL, method=method) == 404
    assert ask(FleetGate(flower, anybody, own), PULL, query=b"a=1") == 404
    assert not flower.seen


def test_of_a_stranger_nothing_but_a_short_activation_is_read() -> None:
    flower = Flower()
    for path in FLEET_ROUTES - {ACTIVATE}:
        assert ask(FleetGate(flower, nobody, own), path) == 401
    assert not flower.seen
    assert ask(FleetGate(flower, nobody, own), ACTIVATE, body=(b"x" * ACTIVATION_BYTES,)) == 200
    assert ask(FleetGate(flower, nobody, own), ACTIVATE, body=(b"x" * (ACTIVATION_BYTES + 1),)) == 413
    assert len(flower.seen) == 1


def test_a_body_arrives_whole_and_without_the_host_that_a_peer_made_up() -> None:
    flower = Flower()
    headers = [(b"host", b"x/v1/control/list-nodes?"), (b"content-length", b"6"), (b"flwr-signature", b"s")]
    assert ask(FleetGate(flower, anybody, own), PULL, headers=headers, body=(b"ab", b"", b"cdef")) == 200
    scope, body = flower.seen[0]
    assert body == b"abcdef"
    assert scope["headers"] == headers[1:]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], 411),
        ([(b"content-length", b"-1")], 411),
        ([(b"content-length", b"1e3")], 411),
        ([(b"content-length", b"10"), (b"transfer-encoding", b"chunked")], 411),
        ([(b"content-length", str(PUBLIC_BYTES + 1).encode())], 413),
    ],
)
def test_a_body_of_no_length_or_too_long_is_not_read(headers: list[tuple[bytes, bytes]], status: int) -> None:
    flower = Flower()
    assert ask(FleetGate(flower, anybody, own), PULL, headers=headers) == status
    assert not flower.seen


def test_a_peer_that_goes_away_gets_no_answer() -> None:
    flower = Flower()
    assert ask(FleetGate(flower, anybody, own), PULL, body=(b"a", b"b"), gone=True) is None
    assert not flower.seen


def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "_BODY_SECONDS", 0.05)
    flower = Flower()
    assert ask(FleetGate(flower, anybody, own), PULL, headers=[(b"content-length", b"5")], body=()) == 408
    assert not flower.seen


def operate(
    flower: Flower, path: bytes, claim: str | bytes | None, body: bytes = b"", query: bytes = b""
) -> int | None:
    """Ask the operator's gate under a claim."""
    headers = [(b"content-length", str(len(body)).encode())]
    if claim is not None:
        headers.append((OPERATOR_HEADER.encode(), claim.encode() if isinstance(claim, str) else claim))
    return ask(OperatorGate(flower, SECRET), path, headers=headers, body=(body,), query=query)


LIST = "/v1/control/list-nodes"
# What a claim made now might be; made when the test runs, for an old one is refused for its age.
CLAIMS: dict[str, Callable[[int], str | bytes | None]] = {
    "none": lambda _now: None,
    "empty": lambda _now: b"",
    "no text": lambda _now: b"\xff",
    "the secret": lambda _now: SECRET,
    "the secret in hex": lambda _now: SECRET.hex(),
    "the time": lambda now: f"{now}",
    "the time and nothing": lambda now: f"{now}.",
    "the time and the secret": lambda now: f"{now}.{SECRET.hex()}",
    "by another secret": lambda now: sign(bytes(32), now, LIST, b"body"),
    "of another body": lambda now: sign(SECRET, now, LIST, b"other"),
    "of another path": lambda now: sign(SECRET, now, "/v1/control/start-run", b"body"),
    "and more": lambda now: sign(SECRET, now, LIST, b"body") + "0",
    "in capitals": lambda now: sign(SECRET, now, LIST, b"body").upper() + "A",
    "an hour old": lambda now: sign(SECRET, now - 3600, LIST, b"body"),
    "of an hour from now": lambda now: sign(SECRET, now + 3600, LIST, b"body"),
    "of another second": lambda now: sign(SECRET, now, LIST, b"body").replace(str(now), str(now + 1)),
    "before time": lambda now: f"-{sign(SECRET, now, LIST, b'body')}",
    "endless": lambda _now: "9" * 5000 + ".0",
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_without_the_secret_nothing_reaches_flower(claim: str) -> None:
    flower = Flower()
    assert operate(flower, LIST.encode(), CLAIMS[claim](int(time.time())), b"body") == 401
    assert not flower.seen


@given(st.binary(max_size=90))
def test_no_made_up_claim_passes(claim: bytes) -> None:
    flower = Flower()
    assert operate(flower, LIST.encode(), claim) == 401


def test_the_secret_opens_control_and_runtime_and_no_more() -> None:
    flower = Flower()

    def status(path: str, body: bytes = b"", query: bytes = b"") -> int | None:
        return operate(flower, path.encode(), sign(SECRET, int(time.time()), path, body), body, query)

    assert status(LIST, b"body") == status("/v1/runtime/acquire-task") == 200
    for path in ("/docs", "/openapi.json", "/health", "/v1/responses", PULL.decode(), "/v1/fleet/register-node"):
        assert status(path) == 404
    assert status(LIST, query=b"a") == 404
    assert status("/v1/control/start-run", bytes(OPERATOR_BYTES + 1)) == 413
    assert [body for _, body in flower.seen] == [b"body", b""]

"""What stands before Flower's application at each of the coordinator's two listeners.

One application answers hospitals, runs and operators alike, and asks operators for nothing. So the inner listener
wants a signature, and the public one lets through a closed list of routes, compared byte by byte with what came: no
form of writing a path leads anywhere else. Of a stranger from outside nothing is read but the head of the request and
the few bytes of an activation, which Flower itself refuses.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from server.endpoints import OPERATOR_HEADER, sign

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Mapping[bytes, bytes]

_FLEET = b"/v1/fleet/"
ACTIVATE = _FLEET + b"activate-node"
PUSH = _FLEET + b"push-messages"
OBJECTS = frozenset({_FLEET + b"push-object", _FLEET + b"pull-object"})
# All of Flower's but register-node and unregister-node: sites come and go by the coordinator's hand alone.
FLEET_ROUTES = frozenset(
    _FLEET + name
    for name in (
        b"activate-node",
        b"confirm-message-received",
        b"deactivate-node",
        b"get-fab",
        b"get-run",
        b"pull-messages",
        b"pull-object",
        b"push-messages",
        b"push-object",
        b"send-node-heartbeat",
    )
)
_INNER = ("/v1/control/", "/v1/runtime/")
PUBLIC_BYTES = 8 * 2**20  # Flower cuts arrays into objects of 5 MiB
OPERATOR_BYTES = 16 * 2**20  # a bundle may have 10 MB
ACTIVATION_BYTES = 4096
_CLAIM_SECONDS = 60  # both ends share one clock
KEY_HEADER = b"flwr-public-key"
REQUESTS_AT_ONCE = 16  # of one site, whose bodies are in memory: a link has five, and some that broke off may linger
_OBJECTS_AT_ONCE = 4  # parts of messages at work in the application: each is there in several copies
_BODY_SECONDS = 300.0  # 8 MiB at 250 kbit/s


class OperatorGate:
    """Let requests that are signed with the operator's secret reach the Control and the Runtime API."""

    def __init__(self, app: App, secret: bytes) -> None:
        self._app = app
        self._secret = secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        claim = dict(scope["headers"]).get(OPERATOR_HEADER.encode(), b"")
        seconds = claim.partition(b".")[0]
        path: str = scope["path"]
        if not seconds.isdigit() or len(seconds) > 12 or abs(time.time() - int(seconds)) > _CLAIM_SECONDS:
            await _refuse(send, 401)
            return

        def judge(body: bytes) -> int:
            if not hmac.compare_digest(claim, sign(self._secret, int(seconds), path, body).encode()):
                return 401
            return 0 if path.startswith(_INNER) and not scope["query_string"] else 404

        await _pass_on(self._app, scope, receive, send, OPERATOR_BYTES, judge)


class FleetGate:
    """Let a hospital's requests reach the Fleet API.

    Args:
        app: Flower's application.
        is_site: whether headers are signed with the key of a registered site.
        is_own: whether the replies in a body bear the name of the site that says it sends them; Flower checks that
            name against the key, and the replies against neither.
    """

    def __init__(
        self, app: App, is_site: Callable[[Headers], Awaitable[bool]], is_own: Callable[[bytes], bool]
    ) -> None:
        self._app = app
        self._is_site = is_site
        self._is_own = is_own
        self._turns = asyncio.Semaphore(_OBJECTS_AT_ONCE)
        self._in_hand: Counter[bytes] = Counter()  # requests by key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        route = scope.get("raw_path")
        if scope["method"] != "POST" or route not in FLEET_ROUTES or scope["query_string"]:
            await _refuse(send, 404)
        elif route == ACTIVATE:
            await _pass_on(self._app, scope, receive, send, ACTIVATION_BYTES)
        elif not await self._is_site(dict(scope["headers"])):
            await _refuse(send, 401)
        else:
            await self._serve_site(route, scope, receive, send)

    async def _serve_site(self, route: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a site, if it has not too many requests in hand already: of each the body is held in memory."""
        key = b64decode(dict(scope["headers"]).get(KEY_HEADER, b""))
        if self._in_hand[key] >= REQUESTS_AT_ONCE:
            await _refuse(send, 429)
            return
        self._in_hand[key] += 1
        try:
            judge = self._judge_replies if route == PUSH else None
            app = self._in_turn if route in OBJECTS else self._app
            await _pass_on(app, scope, receive, send, PUBLIC_BYTES, judge)
        finally:
            self._in_hand[key] -= 1
            if not self._in_hand[key]:
                del self._in_hand[key]

    async def _in_turn(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request wait for those before it; a site that is slow to send or to take keeps nobody waiting."""
        answer: list[Event] = []

        async def keep(event: Event) -> None:
            answer.append(event)

        async with self._turns:
            await self._app(scope, receive, keep)
        while answer:
            await send(answer.pop(0))

    def _judge_replies(self, body: bytes) -> int:
        return 0 if self._is_own(body) else 403


async def _pass_on(
    app: App, scope: Scope, receive: Receive, send: Send, limit: int, judge: Callable[[bytes], int] | None = None
) -> None:
    """Read a body of at most `limit` bytes, then let the application answer, unless `judge` gives a status."""
    status = _judge_length(dict(scope["headers"]), limit)
    if status:
        await _refuse(send, status)
        return
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            body = await _read(receive)
    except TimeoutError:
        await _refuse(send, 408)
        return
    if body is None:
        return
    if judge is not None and (status := judge(body)):
        await _refuse(send, status)
        return
    # Some of Flower's checks see the path as a URL made with this header, its router sees the path alone.
    headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
    await app({**scope, "headers": headers}, _replay(body, receive), send)


def _judge_length(headers: Headers, limit: int) -> int:
    """Return the status that refuses a body by its announced length, 0 for none; the server holds a peer to it."""
    length = headers.get(b"content-length", b"")
    if not length.isdigit() or b"transfer-encoding" in headers:  # which would overrule the length
        return 411
    return 413 if int(length) > limit else 0


async def _read(receive: Receive) -> bytes | None:
    """Return the body, None where the peer went away."""
    parts: list[bytes] = []
    while True:
        event = await receive()
        if event["type"] != "http.request":
            return None
        parts.append(event.get("body", b""))
        if not event.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    waiting = [body]

    async def replay() -> Event:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay


async def _refuse(send: Send, status: int) -> None:
    headers = [(b"content-length", b"0"), (b"connection", b"close")]  # what follows of the request stays unread
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})

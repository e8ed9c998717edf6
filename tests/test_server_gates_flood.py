"""One enrolled site cannot fill the coordinator's memory by asking for everything at once."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

from server.gates import KEY_HEADER, REQUESTS_AT_ONCE, FleetGate

OBJECT = b"/v1/fleet/push-object"


class Slow:
    """Requests whose bodies do not come, and what is answered to each."""

    def __init__(self) -> None:
        self.reading = 0
        self.statuses: list[int] = []
        self.go = asyncio.Event()

    async def receive(self) -> Any:
        self.reading += 1
        await self.go.wait()
        return {"type": "http.request", "body": b"x", "more_body": False}

    async def send(self, event: Any) -> None:
        if "status" in event:
            self.statuses.append(event["status"])


async def flower(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def anybody(headers: Any) -> bool:
    return True


def request(key: bytes) -> Any:
    headers = [(b"content-length", b"1"), (KEY_HEADER, base64.b64encode(key))]
    return {
        "type": "http",
        "method": "POST",
        "raw_path": OBJECT,
        "path": OBJECT.decode(),
        "query_string": b"",
        "headers": headers,
    }


def test_what_one_site_has_in_hand_is_bounded_and_others_do_not_wait() -> None:
    async def play() -> None:
        gate, flood, other = FleetGate(flower, anybody, lambda _body: True), Slow(), Slow()
        asked = [asyncio.create_task(gate(request(b"a"), flood.receive, flood.send)) for _ in range(200)]
        await asyncio.sleep(0.05)
        assert flood.reading == REQUESTS_AT_ONCE
        assert flood.statuses == [429] * (200 - REQUESTS_AT_ONCE)
        other.go.set()
        await gate(request(b"b"), other.receive, other.send)
        assert other.statuses == [200]
        flood.go.set()
        await asyncio.gather(*asked)
        flood.statuses.clear()
        await gate(request(b"a"), flood.receive, flood.send)
        assert flood.statuses == [200], "and once they are through, it is served again"

    asyncio.run(play())


def test_the_same_key_written_in_another_way_is_the_same_site() -> None:
    """Base64 has bits that mean nothing at its end."""

    async def play() -> None:
        gate, flood = FleetGate(flower, anybody, lambda _body: True), Slow()
        ways = [base64.b64encode(b"a")[:1] + bytes((last,)) + b"==" for last in b"QRSTUVWXYZabcdef"]
        assert {base64.b64decode(way) for way in ways} == {b"a"}
        asked = []
        for number in range(100):
            scope = request(b"a")
            scope["headers"] = [(b"content-length", b"1"), (KEY_HEADER, ways[number % len(ways)])]
            asked.append(asyncio.create_task(gate(scope, flood.receive, flood.send)))
        await asyncio.sleep(0.05)
        assert flood.reading == REQUESTS_AT_ONCE
        flood.go.set()
        await asyncio.gather(*asked)

    asyncio.run(play())


def test_the_name_of_the_header_is_flowers() -> None:
    assert FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode() == KEY_HEADER

"""Metrics that Prometheus' own parser reads, and pages on 127.0.0.1 for nobody else, in bounded time."""

from __future__ import annotations

import http.client
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from common.errors import ConsiliumError
from common.exposition import OTHER, Family, exposed, one_of, sample
from common.loopback import CONNECTIONS, Latest, Loopback, Page
from common.watch import pages, room

FAMILIES = (
    Family("consilium_x_state", 'Of "x", in\nwords \\.', ("site", "state")),
    Family("consilium_x_bytes_total", "Bytes.", ("site",)),
    Family("consilium_x_seconds", "Seconds."),
)
Found = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read(content: bytes) -> Found:
    """Return what a scrape says: name and labels -> value."""
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(content.decode())
        for one in family.samples
    }


@given(st.lists(st.tuples(st.text(), st.floats()), unique_by=lambda pair: pair[0].encode("utf-8", "backslashreplace")))
def test_what_is_told_is_read_whatever_sites_are_called(values: list[tuple[str, float]]) -> None:
    content = exposed(FAMILIES, (one for name, value in values for one in sample(FAMILIES[1].name, value, name)))
    kept = {name: value for name, value in values if math.isfinite(value)}
    assert read(content) == {
        ("consilium_x_bytes_total", (("site", name.encode("utf-8", "backslashreplace").decode()),)): value
        for name, value in kept.items()
    }


def test_one_of_a_closed_list_holds_and_what_is_not_known_is_left_out() -> None:
    states = [list(one_of("consilium_x_state", ("a", "b"), now, "north")) for now in ("a", "new", "", None)]
    assert [[one.value for one in found] for found in states] == [[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert [one.labels for one in states[0]] == [("north", "a"), ("north", "b"), ("north", OTHER)]
    assert [list(sample("consilium_x_seconds", value)) for value in (None, "1", math.nan, math.inf)] == [[]] * 4
    assert exposed(FAMILIES, ()) == b""
    with pytest.raises(KeyError):
        exposed(FAMILIES, sample("consilium_y", 1))


# ------------------------------------------------------------------------------------------------------------ the pages


def broken() -> Page:
    raise ValueError("Doe^Jane")


@pytest.fixture
def served() -> Iterator[Loopback]:
    made = pages(FAMILIES, lambda: sample("consilium_x_seconds", 2.5), lambda: ["daemon_unavailable"])
    with Loopback(0, {**made, "/broken": broken}) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def asked(
    server: Loopback, path: str, method: str = "GET", host: str | None = None
) -> tuple[int, dict[str, str], bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection:
        connection.request(method, path, headers={} if host is None else {"Host": host})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


def test_three_pages_and_no_other(served: Loopback) -> None:
    code, headers, content = asked(served, "/metrics?x=1")
    assert (code, headers["Content-Type"].split(";")[0]) == (200, "text/plain")
    assert read(content) == {("consilium_x_seconds", ()): 2.5}
    assert json.loads(asked(served, "/healthz")[2]) == {"alive": True}
    code, _, content = asked(served, "/readyz")
    assert (code, json.loads(content)) == (503, {"ready": False, "codes": ["daemon_unavailable"]})
    assert [asked(served, path)[0] for path in ("/", "/metrics/", "/../metrics", "*")] == [404] * 4
    assert asked(served, "http://evil.example/metrics")[0] == 421


def test_an_error_says_nothing_of_itself(served: Loopback) -> None:
    code, headers, content = asked(served, "/broken")
    assert (code, content) == (500, b"Internal Server Error\n")
    assert headers["Server"] == "consilium"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "CONNECT", "<script>"])
def test_it_is_only_read(method: str, served: Loopback) -> None:
    code, headers, content = asked(served, "/metrics", method)
    assert (code, headers["Allow"]) == (405, "GET") and b"script" not in content


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:{port}", 200),
        ("LOCALHOST:{port}", 200),
        ("localhost", 200),
        ("evil.example", 421),
        ("evil.example:{port}", 421),
        ("127.0.0.1:1", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
    ],
)
def test_a_page_of_the_internet_cannot_read_it(host: str, status: int, served: Loopback) -> None:
    assert asked(served, "/metrics", host=host.format(port=served.port))[0] == status


def raw(server: Loopback, content: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as file:
            return file.read()


@pytest.mark.parametrize(
    "content",
    [
        b"GET /metrics HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET /metrics\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % number for number in range(200)) + b"\r\n",
    ],
)
def test_what_is_no_request_gets_no_page(content: bytes, served: Loopback) -> None:
    assert b"consilium_x" not in raw(served, content)
    assert asked(served, "/healthz")[0] == 200


def test_it_listens_on_loopback_alone_and_says_when_it_cannot(served: Loopback) -> None:
    assert served.socket.getsockname()[0] == "127.0.0.1"
    with pytest.raises(
        ConsiliumError, match=rf"^127\.0\.0\.1:{served.port}: cannot be listened at \(Address already in"
    ):
        Loopback(served.port, {})


def test_connections_beyond_the_limit_are_closed_and_none_for_ever(
    served: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.loopback.WHOLE_S", 1.0)
    idle = [socket.create_connection(("127.0.0.1", served.port), timeout=10) for _ in range(CONNECTIONS)]
    try:
        time.sleep(0.3)
        assert raw(served, b"") == b""
        for one in idle:
            assert one.recv(1) == b""
        end = time.monotonic() + 5
        while True:  # the last of them is being put away
            try:
                assert asked(served, "/healthz")[0] == 200
                break
            except (OSError, http.client.HTTPException):
                assert time.monotonic() < end
    finally:
        for one in idle:
            one.close()


# ----------------------------------------------------------------------------------------------------- what is gathered


def many(latest: Latest[int], count: int = 20) -> list[int | None]:
    found: list[int | None] = []
    threads = [threading.Thread(target=lambda: found.append(latest.get())) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def counting(then: Callable[[], None] = lambda: None) -> tuple[list[int], Callable[[], int]]:
    calls: list[int] = []

    def gather() -> int:
        calls.append(1)
        then()
        return len(calls)

    return calls, gather


def test_however_many_ask_it_is_gathered_once_a_while() -> None:
    calls, gather = counting(lambda: time.sleep(0.05))
    latest = Latest(gather, 5.0, fresh=0.4)
    assert many(latest) == [1] * 20 and latest.get() == 1
    time.sleep(0.45)
    assert many(latest) == [2] * 20 and len(calls) == 2


def test_what_takes_too_long_is_not_waited_for_nor_asked_again_meanwhile() -> None:
    gate = threading.Event()
    calls, gather = counting(lambda: bool(gate.wait()) and None)
    latest = Latest(gather, 0.1)
    begin = time.monotonic()
    assert many(latest) == [None] * 20
    assert time.monotonic() - begin < 2 and len(calls) == 1
    gate.set()
    assert Latest.get(latest) in (1, None)
    time.sleep(0.1)
    assert latest.get() == 1


def test_what_fails_is_not_known(caplog: pytest.LogCaptureFixture) -> None:
    latest: Latest[Page] = Latest(broken, 5.0)
    assert latest.get() is None
    assert "nothing can be gathered" in caplog.text


def test_room_of_what_is_not_there_is_not_known(tmp_path: object) -> None:
    from pathlib import Path

    assert room(Path(str(tmp_path)) / "no") is None
    assert (room(Path(str(tmp_path))) or 0) > 0

"""The link's side of the socket: whatever is at the other end, an answer comes, in time, and it is a record."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from flwr.app import RecordDict

from client import relay
from client.relay import LIMITS, SERVICE, Relay, address, hello
from common.messages import Done, Prepare, from_record, refusal, to_bytes, to_record

RECORD = to_record(Prepare("f" * 64))
ROOT = Path(__file__).parents[1]


class End:
    """Something that answers on a socket, as it is told."""

    def __init__(self, path: Path, hello: Any, answer: Any) -> None:
        self._pool = ThreadPoolExecutor(4)
        self._server = grpc.server(self._pool, options=LIMITS)
        methods = {"Hello": hello, "Answer": answer, "Status": answer}
        handlers = {name: grpc.unary_unary_rpc_method_handler(method) for name, method in methods.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self._server.add_insecure_port(address(path))
        self._server.start()

    def close(self) -> None:
        self._server.stop(0).wait()
        self._pool.shutdown()


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Any]:
    made: list[End] = []

    def make(answer: Any = None, **facts: Any) -> Relay:
        said = json.dumps(hello("north") | facts).encode()
        path = tmp_path / "s o%2fck#?\u00e9"  # what a URI would take for something else
        made.append(End(path, lambda _content, _context: said, answer or (lambda _content, _context: b"")))
        return Relay(path, "north")

    yield make
    for end in made:
        end.close()


def code(record: RecordDict) -> str:
    facts = dict(record.config_records["facts"])
    assert set(facts) == {"refused"}
    return str(facts["refused"])


def test_records_come_back_as_they_went(ends: Any) -> None:
    seen = []

    def answer(content: bytes, context: Any) -> bytes:
        seen.append((content, dict(context.invocation_metadata())["kind"]))
        return content

    assert ends(answer).answer("query.prepare", RECORD) == RECORD
    assert seen == [(to_bytes(RECORD), "query.prepare")]


def test_a_large_record_is_no_matter(ends: Any) -> None:
    from common.messages import InstallTrunk

    record = to_record(InstallTrunk("f" * 64, "a" * 64, np.zeros(40_000_000, np.uint8)))
    assert ends(lambda content, _: content).answer("query.install_trunk", record) == record


def test_a_daemon_that_is_not_there_is_unavailable_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "HELLO_S", 0.3)
    begin = time.monotonic()
    link = Relay(tmp_path / "none", "north")
    assert code(link.answer("query.prepare", RECORD)) == "unavailable"
    assert link.status()["state"] == "unavailable"
    assert time.monotonic() - begin < 3


@pytest.mark.slow
def test_a_daemon_that_comes_up_late_is_waited_for(tmp_path: Path) -> None:
    made = []

    def start() -> None:
        time.sleep(0.7)
        said = json.dumps(hello("north")).encode()
        made.append(End(tmp_path / "s", lambda *_: said, lambda *_: to_bytes(to_record(Done()))))

    thread = threading.Thread(target=start)
    thread.start()
    record = Relay(tmp_path / "s", "north").answer("query.prepare", RECORD)
    thread.join()
    made[0].close()
    assert from_record(record, Done) == Done()


def test_a_socket_that_says_nothing_is_unavailable_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "HELLO_S", 0.3)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        begin = time.monotonic()
        assert code(Relay(tmp_path / "s", "north").answer("query.prepare", RECORD)) == "unavailable"
        assert time.monotonic() - begin < 3


def test_a_daemon_that_hangs_is_unavailable_in_time(ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "ANSWER_S", 0.3)
    go = threading.Event()
    link = ends(lambda *_: bytes(go.wait(20)))
    begin = time.monotonic()
    assert code(link.answer("query.prepare", RECORD)) == "unavailable"
    assert time.monotonic() - begin < 3
    go.set()


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"version": "9.9.9"}, "version_differs"),
        ({"protocol": 2}, "version_differs"),
        ({"site": "south"}, "unavailable"),
    ],
)
def test_another_end_is_refused_before_anything_is_sent(facts: dict[str, Any], expected: str, ends: Any) -> None:
    asked = []
    link = ends(lambda content, _: asked.append(content) or b"", **facts)
    assert code(link.answer("query.prepare", RECORD)) == expected
    assert not asked


@pytest.mark.parametrize("said", [b"", b"\xff", b"[]", b"{}", b'{"protocol": 1}'])
def test_an_end_that_talks_nonsense_raises_nothing(said: bytes, tmp_path: Path) -> None:
    end = End(tmp_path / "s", lambda *_: said, lambda *_: b"\xff\xff")
    link = Relay(tmp_path / "s", "north")
    assert code(link.answer("query.prepare", RECORD)) == "internal"
    assert link.status()["state"] == "unavailable"
    end.close()


def test_an_answer_that_is_no_record_is_internal(ends: Any) -> None:
    assert code(ends(lambda *_: b"\xff\xff").answer("query.prepare", RECORD)) == "internal"


def test_an_end_that_raises_is_unavailable(ends: Any) -> None:
    def fail(_content: bytes, _context: Any) -> bytes:
        raise RuntimeError("Doe^Jane")

    assert code(ends(fail).answer("query.prepare", RECORD)) == "unavailable"


def test_a_refusal_comes_through(ends: Any) -> None:
    record = ends(lambda *_: to_bytes(refusal("busy"))).answer("query.prepare", RECORD)
    assert code(record) == "busy"


@pytest.mark.parametrize("record", [None, "text", object()])
def test_what_is_no_record_is_malformed(record: Any, tmp_path: Path) -> None:
    assert code(Relay(tmp_path / "none", "north").answer("query.prepare", record)) == "malformed"


def test_the_link_can_reach_no_data() -> None:
    """Whoever relays has neither the model nor a reader of images in the process."""
    script = (
        "import sys\nimport client.app, client.relay\n"
        "ours = sorted(name for name in sys.modules if name.startswith('client'))\n"
        "heavy = {'torch', 'timm', 'torchvision', 'pydicom', 'PIL'}\n"
        "print(ours, sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", script],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "['client', 'client.app', 'client.relay'] []\n"

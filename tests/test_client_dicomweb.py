"""A DICOMweb server that misbehaves, and what becomes of it: real connections to real servers on the loopback."""

from __future__ import annotations

import json
import logging
import socket
import ssl
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dicomweb_client", reason="the extra `pacs` is not installed")

from client.dicomweb import GONE_AFTER, Server, discreet
from client.pacs_answers import Failed, Gone, Missing, Rejected
from client.pacs_config import Credentials, DicomWeb
from common.errors import ConfigError, ConsiliumError

pytestmark = pytest.mark.slow

STUDY, SERIES, INSTANCE = "1.2.3.4", "1.2.3.4.5", "1.2.3.4.5.6"
DICOM = bytes(128) + b"DICM" + bytes(range(256)) * 20
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: multipart/related; boundary=b\r\n"
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: application/dicom\r\n"
Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answers: list[Answer]  # one a request; the last again and again
    asked: list[tuple[str, dict[str, str]]]

    def do_GET(self) -> None:
        self.asked.append((self.path, dict(self.headers.items())))
        self.answers[min(len(self.asked), len(self.answers)) - 1](self)

    def say(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client hung up, as it should."""


class Quiet6(Quiet):
    address_family = socket.AF_INET6


class Desk:
    """A server's address, what it was asked, and the client that asks."""

    def __init__(self, port: int, asked: list[tuple[str, dict[str, str]]], scheme: str = "http") -> None:
        self.port, self.asked, self.slept = port, asked, list[float]()
        self.url = f"{scheme}://localhost:{port}/dicom-web"

    def client(self, credentials: Credentials | None = None, certificate: Path | None = None, **values: Any) -> Server:
        config = {
            "url": self.url,
            "studies": "x",
            "retries": 2,
            "timeout_s": 2.0,
            "requests_per_second": 1000,
            **values,
        }
        return Server(DicomWeb.model_validate(config), credentials, certificate, sleep=self.slept.append)


@contextmanager
def serve(*answers: Answer, context: ssl.SSLContext | None = None) -> Iterator[Desk]:
    asked: list[tuple[str, dict[str, str]]] = []
    handler = type("Bound", (Handler,), {"answers": list(answers), "asked": asked})
    with Quiet(("127.0.0.1", 0), handler) as server:
        if context:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield Desk(server.server_address[1], asked, "https" if context else "http")
        finally:
            server.shutdown()
            thread.join()


def status(code: int, **headers: str) -> Answer:
    return lambda handler: handler.say(code, b"an error about CANARY", **headers)


def search(*results: dict[str, str]) -> Answer:
    found = [{tag: {"vr": "UI", "Value": [value]} for tag, value in result.items()} for result in results]
    return lambda handler: handler.say(200, json.dumps(found).encode(), Content_Type="application/dicom+json")


def instance(content: bytes = DICOM, kind: str = "multipart/related; type=application/dicom; boundary=b") -> Answer:
    part = b"--b\r\nContent-Type: application/dicom\r\n\r\n" + content + b"\r\n--b--\r\n"
    return lambda handler: handler.say(200, part, Content_Type=kind)


def raw(*pieces: bytes, every: float = 0.0) -> Answer:
    def answer(handler: Handler) -> None:
        handler.close_connection = True
        for piece in pieces:
            handler.wfile.write(piece)
            time.sleep(every)

    return answer


def fetch(server: Server) -> bytes:
    with discreet():
        try:
            return server.retrieve(STUDY, SERIES, INSTANCE, b"".join)
        finally:
            server.close()


def test_an_instance_is_asked_for_as_it_is_stored() -> None:
    with serve(instance()) as desk:
        assert fetch(desk.client(Credentials(user="puller", password="pa:ß"))) == DICOM
    path, headers = desk.asked[0]
    assert path == f"/dicom-web/studies/{STUDY}/series/{SERIES}/instances/{INSTANCE}"
    assert headers["Accept"] == 'multipart/related; type="application/dicom"; transfer-syntax=*'
    assert headers["Accept-Encoding"] == "identity"
    assert headers["Authorization"] == "Basic cHVsbGVyOnBhOsOf"
    assert headers["Host"] == f"localhost:{desk.port}"


def test_a_token_is_shown() -> None:
    with serve(search()) as desk:
        assert desk.client(Credentials(token="abc")).series(STUDY) == []
    assert desk.asked[0][1]["Authorization"] == "Bearer abc"
    assert desk.asked[0][1]["Host"] == f"localhost:{desk.port}"


def test_the_environment_has_no_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine localhost login someone password hunter2\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with serve(instance()) as desk:
        assert fetch(desk.client()) == DICOM
    assert "Authorization" not in desk.asked[0][1]


def test_a_proxy_of_the_configuration_is_used() -> None:
    with serve(instance()) as desk:
        server = desk.client(
            proxy=f"http://127.0.0.1:{desk.port}", url="http://pacs.invalid/dicom-web", allow_http=True
        )
        assert fetch(server) == DICOM
    assert desk.asked[0][0].startswith("http://pacs.invalid/dicom-web/studies/")


def test_a_file_without_multipart_around_it_will_do() -> None:
    with serve(lambda handler: handler.say(200, DICOM, Content_Type="application/dicom")) as desk:
        assert fetch(desk.client()) == DICOM


def test_one_connection_serves_many_requests() -> None:
    peers = set()

    def answer(handler: Handler) -> None:
        peers.add(handler.client_address)
        instance()(handler)

    with serve(answer) as desk, discreet():
        server = desk.client()
        for _ in range(5):
            server.retrieve(STUDY, SERIES, INSTANCE, b"".join)
        server.close()
    assert len(peers) == 1


def test_every_request_keeps_the_pace() -> None:
    with serve(search(), status(503), instance()) as desk:
        server = desk.client(requests_per_second=0.25)
        server.series(STUDY)
        assert fetch(server) == DICOM
    waits = [seconds for seconds in desk.slept if seconds > 1]  # a clock that stands still next to these four seconds
    assert waits == [pytest.approx(4, abs=1), pytest.approx(8, abs=1)]


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(code: int) -> None:
    with serve(status(code), status(code, Retry_After="17"), instance()) as desk:
        assert fetch(desk.client()) == DICOM
    assert [len(desk.asked), desk.slept[1]] == [3, 17.0]
    assert 0.5 <= desk.slept[0] <= 1


@pytest.mark.parametrize(
    "broken",
    [
        raw(),
        raw(b"garbage\r\n\r\n"),
        raw(HEAD + b"Content-Length: 9999\r\n\r\n--b\r\n\r\n" + DICOM),
        raw(PLAIN + b"Content-Length: 9999\r\n\r\n" + DICOM),
        raw(PLAIN + b"Transfer-Encoding: chunked\r\n\r\nfff\r\n" + DICOM[:4000]),
        raw(PLAIN + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + DICOM),
        raw(PLAIN + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n" + DICOM),
        raw(HEAD + b"\r\n--b\r\n\r\n" + DICOM),
    ],
    ids=["nothing", "garbage", "multipart cut", "plain cut", "chunk cut", "no chunk", "negative chunk", "closed, cut"],
)  # fmt: skip
def test_a_transfer_that_breaks_off_is_begun_anew(broken: Answer) -> None:
    with serve(broken, instance()) as desk:
        assert fetch(desk.client()) == DICOM
    assert len(desk.slept) == 1


def test_patience_ends() -> None:
    with serve(status(503)) as desk:
        server = desk.client()
        for expected in [Failed] * (GONE_AFTER - 1) + [Gone]:
            with pytest.raises(expected):
                fetch(server)
    assert len(desk.asked) == 3 * GONE_AFTER


def test_a_server_that_answers_now_and_then_is_not_gone() -> None:
    with serve(*([status(503)] * 3 * (GONE_AFTER - 1)), status(404), status(503)) as desk:
        server = desk.client()
        for expected in [Failed] * (GONE_AFTER - 1) + [Missing] + [Failed] * (GONE_AFTER - 1) + [Gone]:
            with pytest.raises(expected):
                fetch(server)


def test_an_error_of_one_instance_is_no_sign_of_the_end() -> None:
    with serve(status(500)) as desk:
        server = desk.client()
        for _ in range(GONE_AFTER + 1):
            with pytest.raises(Failed):
                fetch(server)


def test_no_server_at_all() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    server = Desk(port, []).client(retries=0)
    for expected in [Failed] * (GONE_AFTER - 1) + [Gone]:
        with pytest.raises(expected):
            fetch(server)


@pytest.mark.parametrize(("code", "hint"), [(401, "credentials"), (403, "let it search"), (407, "proxy")])
def test_a_refusal_stops_at_once(code: int, hint: str) -> None:
    with serve(status(code)) as desk, pytest.raises(ConsiliumError, match=hint) as error:
        fetch(desk.client(Credentials(user="someone", password="hunter2")))
    assert len(desk.asked) == 1
    assert not any(word in str(error.value) for word in ("CANARY", "hunter2", "someone", STUDY, "\n"))


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("what", [fetch, lambda server: server.series(STUDY), lambda server: server.studies("7")])
def test_a_redirect_is_not_followed(code: int, what: Callable[[Server], object]) -> None:
    with (
        serve(instance()) as other,
        serve(status(code, Location=f"http://127.0.0.1:{other.port}/CANARY")) as desk,
        pytest.raises(ConsiliumError, match="the final address") as error,
    ):
        what(desk.client(Credentials(token="hunter2")))
    assert other.asked == []
    assert len(desk.asked) == 1
    assert not any(word in str(error.value) for word in ("CANARY", "hunter2", STUDY))


@pytest.mark.parametrize("code", [404, 410])
def test_what_is_not_there_is_missing(code: int) -> None:
    with serve(status(code)) as desk:
        with pytest.raises(Missing):
            fetch(desk.client())
        with pytest.raises(Missing):
            desk.client().series(STUDY)


@pytest.mark.parametrize(
    "answer",
    [
        status(200, Content_Type="text/html"),
        status(200, Content_Type="multipart/related"),
        status(200),
        status(204),
        instance(b"no DICOM" * 100),
        instance(b""),
        raw(PLAIN + b"\r\n" + DICOM),
    ],
)
def test_what_is_no_dicom_is_rejected_and_not_asked_for_again(answer: Answer) -> None:
    with serve(answer) as desk, pytest.raises(Rejected):
        fetch(desk.client())
    assert len(desk.asked) == 1


@pytest.mark.parametrize("answer", [status(400), status(406), status(200, Content_Encoding="gzip"), status(206)])
def test_other_answers_fail_without_a_second_try(answer: Answer) -> None:
    with serve(answer) as desk, pytest.raises(Failed):
        fetch(desk.client())
    assert len(desk.asked) == 1


def endless(handler: Handler) -> None:
    handler.close_connection = True
    head = b"HTTP/1.1 200 OK\r\nContent-Type: multipart/related; boundary=b\r\n\r\n--b\r\n\r\n" + DICOM
    handler.wfile.write(head)
    while True:
        handler.wfile.write(bytes(1 << 16))


def test_an_endless_body_is_rejected_at_the_cap() -> None:
    seen: list[int] = []

    def save(chunks: Iterator[bytes]) -> None:
        seen.extend(len(chunk) for chunk in chunks)

    with serve(endless) as desk, discreet(), pytest.raises(Rejected):
        desk.client(max_file_mb=3).retrieve(STUDY, SERIES, INSTANCE, save)
    assert 2 << 20 < sum(seen) <= 3 << 20


def test_a_body_announced_as_too_long_is_not_even_read() -> None:
    with serve(raw(HEAD + b"Content-Length: 3000001\r\n\r\n--b\r\n\r\n", *[b"x"] * 50, every=0.1)) as desk:
        began = time.monotonic()
        with pytest.raises(Rejected):
            fetch(desk.client(max_file_mb=2))
        assert time.monotonic() - began < 1


def test_an_address_may_be_ipv6() -> None:
    try:
        server = Quiet6(("::1", 0), type("Bound", (Handler,), {"answers": [search(), instance()], "asked": []}))
    except OSError:
        pytest.skip("this machine has no ::1")
    with server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        client = Desk(0, []).client(url=f"http://[::1]:{server.server_address[1]}/dicom-web")
        assert client.series(STUDY) == []
        assert fetch(client) == DICOM
        server.shutdown()


def test_an_endless_search_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.dicomweb._SEARCH_BYTES", 1 << 20)
    with serve(endless) as desk, pytest.raises(Failed):
        desk.client().series(STUDY)


def test_sixty_megabytes_pass_through_two() -> None:
    def answer(handler: Handler) -> None:
        size = 60 << 20
        handler.wfile.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: multipart/related; boundary=b\r\n"
            + f"Content-Length: {size + len(DICOM) + 14}\r\n\r\n".encode()
        )
        handler.wfile.write(b"--b\r\n\r\n" + DICOM)
        for _ in range(size >> 16):
            handler.wfile.write(bytes(1 << 16))
        handler.wfile.write(b"\r\n--b--")

    with serve(answer) as desk, discreet():
        server = desk.client()
        tracemalloc.start()
        got = server.retrieve(STUDY, SERIES, INSTANCE, lambda chunks: sum(len(chunk) for chunk in chunks))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        server.close()
    assert got == (60 << 20) + len(DICOM)
    assert peak < 3 << 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer",
    [
        raw(*(bytes([letter]) for letter in HEAD * 3), every=0.2),
        raw(
            HEAD + b"Content-Length: 99999\r\n\r\n--b\r\n\r\n", *(bytes([letter]) for letter in DICOM[:200]), every=0.1
        ),
        lambda handler: time.sleep(20),
    ],
    ids=["headers", "body", "silence"],
)
def test_a_server_that_only_pretends_to_send_is_given_up(answer: Answer) -> None:
    began = time.monotonic()
    with serve(answer) as desk, pytest.raises(Failed):
        fetch(desk.client(timeout_s=1.0, retries=1))
    assert len(desk.asked) == 2
    assert time.monotonic() - began < 8


# Searches


def test_a_search_asks_for_pages_until_nothing_new_comes() -> None:
    pages = [
        search({"0020000E": "1.1"}, {"0020000E": "1.2"}),
        search({"0020000E": "1.2"}, {"0020000E": "1.3"}),
        search(),
    ]
    with serve(*pages) as desk:
        assert desk.client().series(STUDY) == ["1.1", "1.2", "1.3"]
    assert [path.partition("?")[2] for path, _ in desk.asked] == [f"limit=200&offset={n}" for n in (0, 2, 4)]


def test_a_server_that_knows_no_offset_is_asked_twice() -> None:
    with serve(search({"00080018": "1.1"})) as desk:
        assert desk.client().instances(STUDY, SERIES) == ["1.1"]
    assert len(desk.asked) == 2


def test_results_without_end_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.dicomweb._MOST_RESULTS", 50)
    with (
        serve(lambda handler: search({"00080018": f"1.{time.monotonic_ns()}"})(handler)) as desk,
        pytest.raises(Failed),
    ):
        desk.client().instances(STUDY, SERIES)
    assert len(desk.asked) == 50


def test_an_order_is_matched_exactly() -> None:
    """A server that ignores the search key answers with everything it has."""
    found = [{"0020000D": f"1.{n}", "00080050": value} for n, value in enumerate(["A&7 ", "A&70", "a&7", "", "A&7*"])]
    with serve(search(*found, {"0020000D": "1.9"})) as desk:
        assert desk.client().studies("A&7") == ["1.0"]
    assert (
        desk.asked[0][0] == "/dicom-web/studies?AccessionNumber=A%267&includefield=AccessionNumber&limit=200&offset=0"
    )


def test_series_of_another_study_are_left_out() -> None:
    found = [{"0020000E": "1.1", "0020000D": STUDY}, {"0020000E": "1.2", "0020000D": "9.9"}, {"0020000E": "1.3"}]
    with serve(search(*found)) as desk:
        assert desk.client().series(STUDY) == ["1.1", "1.3"]


@pytest.mark.parametrize(
    "content",
    [b"<html>", b"null", b"7", b'"x"', b"[1]", b"[[]]", b"{", b"[" * 100_000, b"\xff", b'[{"0020000E": []}', b"NaN"],
)
def test_what_is_no_search_result_fails(content: bytes) -> None:
    with serve(lambda handler: handler.say(200, content)) as desk, discreet(), pytest.raises(Failed):
        desk.client().series(STUDY)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"[{}]", b'[{"0020000E": 7}]', b'[{"0020000E": {"Value": []}}]', b'[{"0020000E": {"Value": [7]}}]',
     b'[{"0020000E": {"Value": "1.2"}}]', b'[{"0020000E": {"Value": [null]}}]'],
)  # fmt: skip
def test_results_without_a_name_are_none(content: bytes) -> None:
    with serve(lambda handler: handler.say(200, content)) as desk:
        assert desk.client().series(STUDY) == []


# TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a certificate for localhost that signed itself; its key lies beside it."""
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    command += " -addext subjectAltName=DNS:localhost -keyout key.pem -out ca.pem"
    try:
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return folder / "ca.pem"


@pytest.fixture
def tls(authority: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority, authority.with_name("key.pem"))
    return context


def test_a_certificate_of_the_hospital_is_trusted_when_named(authority: Path, tls: ssl.SSLContext) -> None:
    with serve(instance(), context=tls) as desk:
        assert fetch(desk.client(certificate=authority)) == DICOM


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_certificate_that_is_not_trusted_stops_at_once(host: str, authority: Path, tls: ssl.SSLContext) -> None:
    with serve(instance(), context=tls) as desk:
        certificate = authority if host == "127.0.0.1" else None  # trusted, but of another host
        server = desk.client(url=desk.url.replace("localhost", host), certificate=certificate)
        with pytest.raises(ConsiliumError, match="not trusted here - set .data.dicomweb. ca_certificate"):
            fetch(server)
    assert desk.slept == desk.asked == []


def test_https_to_a_server_without_stops_at_once() -> None:
    with serve(instance()) as desk, pytest.raises(ConsiliumError, match="check scheme and port"):
        fetch(desk.client(url=desk.url.replace("http:", "https:")))
    assert desk.slept == []


def test_a_trickle_of_headers_is_cut_off_over_tls_as_well(authority: Path, tls: ssl.SSLContext) -> None:
    with serve(raw(*([b"H"] * 50), every=0.1), context=tls) as desk, pytest.raises(Failed):
        fetch(desk.client(certificate=authority, timeout_s=0.5, retries=0))
    assert len(desk.asked) == 1


@pytest.mark.parametrize("content", [None, b"", b"no PEM"])
def test_a_certificate_that_is_none_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="ca_certificate .*: cannot be used"):
        Desk(1, []).client(certificate=path)


def test_no_logger_repeats_an_address(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("urllib3", "urllib3.connectionpool", "dicomweb_client.web"):
        logging.getLogger(name).setLevel(logging.DEBUG)
    with serve(search({"0020000E": SERIES}), search(), status(503), instance()) as desk, discreet():
        server = desk.client()
        server.series(STUDY)
        server.retrieve(STUDY, SERIES, INSTANCE, b"".join)
        server.close()
    assert caplog.text == ""
    with serve(search()) as desk:
        desk.client().series(STUDY)
    assert STUDY in caplog.text  # so that silence above meant something

"""The link against a true SuperLink over TLS on this machine's loopback."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import ipaddress
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest, UnregisterNodeRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from client.authority import read_authority
from client.link import LONGEST_PAUSE, SHORTEST_PAUSE, LinkSettings, pause
from client.link_status import WORDS, LinkStatus, StatusFile, read_status
from client.link_trouble import Trouble, code_of
from client.site_config import Coordinator
from common.address import parse_address
from common.errors import ConfigError

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
DAY = datetime.timedelta(days=1)
SECRET = b"s" * 48
FAB = """
[project]
name = "stub"
version = "1.0.0"
description = "nothing"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "nobody"
[tool.flwr.app.components]
serverapp = "stub:server"
clientapp = "stub:client"
"""
LINK = """
import json, logging, os, signal, sys
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from client import link
from client.site_config import Coordinator
from common.address import parse_address
from common.errors import ConsiliumError

app = ClientApp()

@app.query("echo")
def echo(message, context):
    content = message.content
    content["who"] = ConfigRecord({"pid": os.getpid(), **context.node_config})
    return Message(content, reply_to=message)

@app.query("fail")
def fail(message, context):
    raise ValueError("patient 1234")

@app.query("modules")
def modules(message, context):
    rss = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return Message(RecordDict({"m": ConfigRecord({"names": sorted(sys.modules), "rss": rss})}), reply_to=message)

logging.basicConfig(level=logging.INFO)
signal.signal(signal.SIGTERM, link._end)
site, address, proxy, *paths = json.loads(sys.argv[1])
certificate, key, folder = map(Path, paths)
coordinator = Coordinator(parse_address(address), certificate, key, proxy)
settings = link.LinkSettings(site, coordinator, folder)
try:
    link.run(settings, app)
except ConsiliumError as error:
    print(f"consilium: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


def until(truth: Callable[[], object], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not truth():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def certificate(
    name: str,
    signer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None = None,
    days: tuple[float, float] = (-1, 100),
    host: str = "127.0.0.1",
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A certificate and its key, of an authority where nobody signs."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    issuer, signing = (signer[0].subject, signer[1]) if signer else (subject, key)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + days[0] * DAY)
        .not_valid_after(now + days[1] * DAY)
        .add_extension(x509.BasicConstraints(ca=signer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))]), critical=False)
    )
    return builder.sign(signing, hashes.SHA256()), key


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_pem(key: ec.EllipticCurvePrivateKey, openssh: bool = False) -> bytes:
    form = serialization.PrivateFormat.OpenSSH if openssh else serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


@dataclass
class SuperLink:
    """Flower's own server on loopback."""

    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.ca = certificate("authority")
        self.use(certificate("server", self.ca))
        (self.folder / "ca.pem").write_bytes(pem(self.ca[0]))
        (self.folder / "secret").write_bytes(SECRET)

    def use(self, pair: tuple[x509.Certificate, ec.EllipticCurvePrivateKey]) -> None:
        (self.folder / "server.pem").write_bytes(pem(pair[0]))
        (self.folder / "server.key").write_bytes(key_pem(pair[1]))

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self, wait: bool = True) -> None:
        at = self.folder
        options = ["--ssl-certfile", at / "server.pem", "--ssl-keyfile", at / "server.key"]
        options += ["--ssl-ca-certfile", at / "ca.pem", "--superexec-auth-secret-file", at / "secret"]
        options += ["--isolation", "process", "--database", at / "superlink.db", "--enable-supernode-auth"]
        options += ["--disable-runtime-dependency-installation", "--host", "127.0.0.1", "--port", str(self.port)]
        env = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        env |= {"FLWR_HOME": str(at / "home"), "PATH": f"{BIN}:{os.environ['PATH']}"}
        with (at / "superlink.log").open("ab") as log:
            self.process = subprocess.Popen(
                [BIN / "flower-superlink", *options], env=env, stdout=log, stderr=log, start_new_session=True
            )
        until(self.listens, 60)

    def listens(self) -> bool:
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def control(self) -> ControlHttpClient:
        return ControlHttpClient.from_server_address(self.address, False, pem(self.ca[0]), [])

    def register(self, key: ec.EllipticCurvePrivateKey, name: str = "st-anna") -> int:
        with self.control() as client:
            request = RegisterNodeRequest(public_key=public_key_to_bytes(key.public_key()), name=name)
            return int(client.RegisterNode(request).node_id)

    def unregister(self, node_id: int) -> None:
        with self.control() as client:
            client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    @contextlib.contextmanager
    def grid(self) -> Iterator[HttpGrid]:
        """A run, and the grid of its one task."""
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # Flower's use of pathspec
            content, _ = build_fab_from_files({"pyproject.toml": FAB.encode(), "stub.py": b"server = client = None\n"})
        fab = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
        with self.control() as client:
            run_id = client.StartRun(StartRunRequest(fab=fab)).run_id
        auth = SuperExecAuthHttpInterceptor(master_secret=SECRET, protected_methods={"/flwr.proto.Runtime/AcquireTask"})
        ca = pem(self.ca[0])
        with RuntimeHttpClient.from_server_address(self.address, False, ca, [auth]) as client:
            while True:
                taken = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
                if taken.task.run_id == run_id:
                    break
        grid = HttpGrid(self.address, root_certificates=ca, token=taken.token)
        task = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run.run_id
        TaskIdentity.node_id = task.context.node_id
        grid.set_run(run_from_proto(task.run))
        over = threading.Event()

        def beat() -> None:
            while not over.wait(15):
                grid._runtime_client.SendTaskHeartbeat(SendTaskHeartbeatRequest())

        heart = threading.Thread(target=beat)
        heart.start()
        try:
            yield grid
        finally:
            over.set()
            heart.join()
            grid.close()


def ask(grid: HttpGrid, node: int, kind: str, content: RecordDict, seconds: float = 20.0) -> tuple[Message, float]:
    """Send a message, again if Flower answers with an error, and return the reply and how long it took."""
    begin = time.monotonic()
    ids = list(grid.push_messages([Message(content, node, kind)]))
    while time.monotonic() - begin < seconds:
        for reply in grid.pull_messages(ids):
            if reply.has_content():
                return reply, time.monotonic() - begin
            ids = list(grid.push_messages([Message(content, node, kind)]))  # the site was away
        time.sleep(0.01)
    raise AssertionError("no reply")


def empty() -> RecordDict:
    return RecordDict({"facts": ConfigRecord({"n": 1})})


@dataclass
class Links:
    """Links of one site, each a process of its own."""

    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, settings: LinkSettings) -> subprocess.Popen[bytes]:
        there = settings.coordinator
        values = [settings.site, str(there.address), there.proxy]
        values += map(str, (there.ca_certificate, there.private_key, settings.folder))
        env = {**os.environ, "PYTHONPATH": str(ROOT), "FLWR_TELEMETRY_ENABLED": "0"}
        env |= {"https_proxy": "http://127.0.0.1:9", "ALL_PROXY": "http://127.0.0.1:9"}  # nobody may heed them
        with (self.folder / "link.log").open("ab") as log:
            process = subprocess.Popen([sys.executable, "-P", "-c", LINK, json.dumps(values)], env=env, stderr=log)
        self.processes.append(process)
        return process

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def make_settings(folder: Path, superlink: SuperLink, key: ec.EllipticCurvePrivateKey) -> LinkSettings:
    folder.mkdir(mode=0o700)
    (folder / "node.key").write_bytes(key_pem(key, openssh=True))
    (folder / "node.key").chmod(0o600)
    (folder / "ca.pem").write_bytes(pem(superlink.ca[0]))
    there = Coordinator(parse_address(superlink.address), folder / "ca.pem", folder / "node.key", None)
    return LinkSettings("st-anna", there, folder)


def elsewhere(settings: LinkSettings, **changes: Any) -> LinkSettings:
    return replace(settings, coordinator=replace(settings.coordinator, **changes))


def says(settings: LinkSettings, code: str) -> Callable[[], bool]:
    def truth() -> bool:
        status = read_status(settings.folder)
        return status is not None and status.code == code

    return truth


def told(settings: LinkSettings) -> LinkStatus:
    status = read_status(settings.folder)
    assert status is not None
    return status


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    one = SuperLink(tmp_path_factory.mktemp("superlink"))
    one.start()
    yield one
    one.stop()


@pytest.fixture
def links(tmp_path: Path) -> Iterator[Links]:
    some = Links(tmp_path)
    yield some
    some.stop()


@dataclass
class Enrolled:
    """A site whose key is registered."""

    settings: LinkSettings
    node: int


@pytest.fixture
def site(tmp_path: Path, superlink: SuperLink) -> Iterator[Enrolled]:
    key = ec.generate_private_key(ec.SECP384R1())
    node = superlink.register(key)
    yield Enrolled(make_settings(tmp_path / "link", superlink, key), node)
    with contextlib.suppress(httpx.HTTPStatusError):
        superlink.unregister(node)


@pytest.mark.slow
def test_messages_are_answered_in_one_process_that_knows_no_torch(
    superlink: SuperLink, site: Enrolled, links: Links
) -> None:
    process = links.start(site.settings)
    until(says(site.settings, "connected"))
    with superlink.grid() as grid:
        values = np.arange(3_000_000, dtype=np.float32)
        big = RecordDict({"weights": ArrayRecord({"w": Array(values)}), "facts": ConfigRecord({"text": "x"})})
        reply, _ = ask(grid, site.node, "query.echo", big)
        assert reply.content["who"] == ConfigRecord({"pid": process.pid, "site": "st-anna"})
        assert np.array_equal(reply.content["weights"]["w"].numpy(), values)
        assert reply.metadata.src_node_id == site.node
        for _ in range(3):
            reply, _ = ask(grid, site.node, "query.echo", empty())
            assert reply.content["who"]["pid"] == process.pid
        names = ask(grid, site.node, "query.modules", empty())[0].content["m"]["names"]
        assert not {"torch", "pydicom", "timm", "PIL", "pandas", "client.cohort", "client.site"} & set(names)
        assert not os.path.lexists(site.settings.folder / "apps")
    process.terminate()
    assert process.wait(10) == 0
    status = told(site.settings)
    assert (status.code, status.messages, status.pid) == ("stopped", 5, process.pid)
    assert min(status.bytes_in, status.bytes_out) > 12_000_000
    assert status.certificate_ends is not None
    assert abs(status.certificate_ends - time.time() - 100 * 86400) < 3600


@pytest.mark.slow
def test_what_fails_is_a_code_and_never_a_text(superlink: SuperLink, site: Enrolled, links: Links) -> None:
    links.start(site.settings)
    until(says(site.settings, "connected"))
    with superlink.grid() as grid:
        for kind in ("query.fail", "query.unheard_of", "train"):
            reply, _ = ask(grid, site.node, kind, empty())
            assert reply.has_content()
            assert reply.content["facts"] == ConfigRecord({"refused": "internal"})
        message = Message(RecordDict(), site.node, "query.echo")
        message.__dict__["_content"] = ConfigRecord({"n": 1})  # records that are none
        (number,) = grid.push_messages([message])
        replies: list[Message] = []
        until(lambda: replies.extend(grid.pull_messages([number])) or replies)
        assert replies[0].content["facts"] == ConfigRecord({"refused": "malformed"})
        assert ask(grid, site.node, "query.echo", empty())[0].has_content()
    assert "patient 1234" in (links.folder / "link.log").read_text()  # the site's own log says why


@pytest.mark.slow
def test_a_killed_link_is_back_in_seconds(superlink: SuperLink, site: Enrolled, links: Links) -> None:
    first = links.start(site.settings)
    until(says(site.settings, "connected"))
    with superlink.grid() as grid:
        ask(grid, site.node, "query.echo", empty())
        first.kill()
        first.wait()
        begin = time.monotonic()
        second = links.start(site.settings)
        reply, _ = ask(grid, site.node, "query.echo", empty(), 20)
        assert reply.content["who"]["pid"] == second.pid
        assert time.monotonic() - begin < 20  # the lease of the first lasts a minute


@pytest.mark.slow
def test_a_superlink_that_goes_away_for_ten_seconds_is_waited_for(tmp_path: Path, links: Links) -> None:
    superlink = SuperLink(tmp_path)
    superlink.start()
    try:
        key = ec.generate_private_key(ec.SECP384R1())
        node = superlink.register(key)
        settings = make_settings(tmp_path / "link", superlink, key)
        process = links.start(settings)
        until(says(settings, "connected"))
        superlink.stop()
        until(says(settings, "refused"))
        assert told(settings).state == "unreachable"
        time.sleep(10)
        superlink.start()
        begin = time.monotonic()
        until(says(settings, "connected"), 25)
        assert time.monotonic() - begin < 22
        assert process.poll() is None
        with superlink.grid() as grid:
            ask(grid, node, "query.echo", empty())
    finally:
        superlink.stop()


@pytest.mark.slow
def test_a_key_that_is_not_enrolled_yet_is_waited_for(superlink: SuperLink, tmp_path: Path, links: Links) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    settings = make_settings(tmp_path / "link", superlink, key)
    links.start(settings)
    until(says(settings, "not_enrolled"))
    assert "enrolment" in told(settings).remedy
    node = superlink.register(key, "late")
    until(says(settings, "connected"), 25)
    superlink.unregister(node)
    until(says(settings, "withdrawn"), 10)


@pytest.mark.slow
def test_a_link_says_what_is_wrong_with_a_certificate(
    superlink: SuperLink, site: Enrolled, tmp_path: Path, links: Links
) -> None:
    foreign = certificate("authority")  # of the same name: only the key tells them apart
    site.settings.coordinator.ca_certificate.write_bytes(pem(foreign[0]))
    links.start(site.settings)
    until(says(site.settings, "untrusted"))
    assert told(site.settings).state == "certificate"
    assert told(site.settings).last_contact is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("days", "host", "code"),
    [
        ((-9.0, -1.0), "127.0.0.1", "expired"),
        ((1.0, 9.0), "127.0.0.1", "expired"),
        ((-1, 9), "127.0.0.2", "wrong_host"),
    ],
)
def test_a_certificate_that_does_not_hold(
    tmp_path: Path, links: Links, days: tuple[float, float], host: str, code: str
) -> None:
    superlink = SuperLink(tmp_path)
    superlink.use(certificate("server", superlink.ca, days, host))
    superlink.start()
    try:
        settings = make_settings(tmp_path / "link", superlink, ec.generate_private_key(ec.SECP384R1()))
        links.start(settings)
        until(says(settings, code))
    finally:
        superlink.stop()


class Proxy:
    """A tiny CONNECT proxy, one thread a connection."""

    def __init__(self, answer: bytes = b"HTTP/1.1 200 OK\r\n\r\n") -> None:
        self.asked: list[bytes] = []
        self.carried = 0
        self._answer = answer
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._open: list[socket.socket] = []
        self._threads[0].start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for one in self._open:
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                self._open.append(client)
                self._threads.append(threading.Thread(target=self._serve, args=(client,)))
                self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                got = client.recv(65536)
                if not got:
                    return
                head += got
            line = head.split(b"\r\n")[0]
            self.asked.append(line)
            if b" 200 " not in self._answer:
                client.sendall(self._answer)
                client.shutdown(socket.SHUT_RDWR)
                return
            host, _, port = line.split()[1].decode().rpartition(":")
            there = socket.create_connection((host, int(port)))
            self._open.append(there)
            client.sendall(self._answer)
            self._carry(client, there)

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        while True:
            for ready in select.select([one, other], [], [])[0]:
                got = ready.recv(65536)
                if not got:
                    one.shutdown(socket.SHUT_RDWR)
                    other.shutdown(socket.SHUT_RDWR)
                    return
                self.carried += len(got)
                (other if ready is one else one).sendall(got)


@pytest.mark.slow
def test_a_proxy_carries_everything(superlink: SuperLink, site: Enrolled, links: Links) -> None:
    proxy = Proxy()
    try:
        settings = elsewhere(site.settings, proxy=f"http://127.0.0.1:{proxy.port}")
        process = links.start(settings)
        until(says(settings, "connected"))
        with superlink.grid() as grid:
            ask(grid, site.node, "query.echo", empty())
        assert told(settings).certificate_ends is not None
        process.terminate()
        process.wait(10)
        assert set(proxy.asked) == {f"CONNECT {superlink.address} HTTP/1.1".encode()}
        assert proxy.carried > 5000
    finally:
        proxy.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 403 Forbidden\r\n\r\n", b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"]
)
def test_a_proxy_that_refuses(site: Enrolled, links: Links, answer: bytes) -> None:
    proxy = Proxy(answer)
    try:
        settings = elsewhere(site.settings, proxy=f"http://127.0.0.1:{proxy.port}")
        links.start(settings)
        until(says(settings, "proxy_refuses"))
    finally:
        proxy.close()


@pytest.mark.slow
def test_places_that_lead_nowhere(tmp_path: Path, links: Links, superlink: SuperLink) -> None:
    settings = make_settings(tmp_path / "link", superlink, ec.generate_private_key(ec.SECP384R1()))
    for changed, code in (
        (elsewhere(settings, address=parse_address(f"127.0.0.1:{free_port()}")), "refused"),
        (elsewhere(settings, address=parse_address("nowhere.invalid:443")), "unknown_host"),
        (elsewhere(settings, proxy=f"http://127.0.0.1:{free_port()}"), "proxy_unreachable"),
    ):
        process = links.start(changed)
        until(says(changed, code))
        process.terminate()
        assert process.wait(10) == 0


@pytest.mark.slow
def test_an_answer_that_is_no_coordinators_is_not_followed(tmp_path: Path, links: Links) -> None:
    """A server of the right certificate that redirects elsewhere, and one that is only a page."""
    import http.server
    import ssl

    other = socket.create_server(("127.0.0.1", 0))
    other.setblocking(False)

    class Redirect(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(307)
            self.send_header("location", f"https://127.0.0.1:{other.getsockname()[1]}/v1/fleet/activate-node")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    superlink = SuperLink(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    with http.server.HTTPServer(("127.0.0.1", superlink.port), Redirect) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            settings = make_settings(tmp_path / "link", superlink, ec.generate_private_key(ec.SECP384R1()))
            links.start(settings)
            until(says(settings, "foreign"))
            with pytest.raises(BlockingIOError):
                other.accept()
        finally:
            server.shutdown()
            thread.join()
            other.close()


@pytest.mark.slow
def test_a_second_link_of_a_site_does_not_start(superlink: SuperLink, site: Enrolled, links: Links) -> None:
    first = links.start(site.settings)
    until(says(site.settings, "connected"))
    second = links.start(site.settings)
    assert second.wait(15) == 1
    said = (links.folder / "link.log").read_text()
    assert f"a link of st-anna runs already, as process {first.pid}" in said


@pytest.fixture
def settings(tmp_path: Path) -> LinkSettings:
    return make_settings(tmp_path / "link", SuperLink(tmp_path), ec.generate_private_key(ec.SECP384R1()))


def test_pauses_grow_with_the_time_since_the_last_message() -> None:
    times = [0.1 * step for step in range(1000)]
    pauses = [pause(seconds) for seconds in times]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (SHORTEST_PAUSE, LONGEST_PAUSE)
    assert all(found <= max(SHORTEST_PAUSE, 0.1 * seconds) for found, seconds in zip(pauses, times, strict=True))


def test_a_coordinator_that_answers_slowly_is_asked_less() -> None:
    assert pause(0, 0.01) == SHORTEST_PAUSE
    for took in (0.05, 0.1, 0.5, 1.0, 30.0):
        assert pause(0, took) == min(4 * took, LONGEST_PAUSE)


def test_an_authority_that_cannot_be_used_is_one_line(settings: LinkSettings) -> None:
    path = settings.coordinator.ca_certificate
    read_authority(path)
    for content in (b"", b"nonsense", b"\xff", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="not a certificate"):
            read_authority(path)
    path.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        read_authority(path)


@pytest.mark.slow
def test_wrong_configuration_ends_with_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text('[site]\nname = "a"\n[data]\nimages = "."\n[coordinator]\naddress = "h:1"\n')
    for arguments, said in (
        ([str(tmp_path / "site.toml")], r"node\.key: missing, expected the site's private key"),
        ([str(tmp_path / "none.toml")], "cannot be read"),
        ([], "usage"),
    ):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "client.link", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert re.fullmatch(rf"consilium: [^\n]*{said}[^\n]*\n", done.stderr)


def answer(status: int, seconds: float = 0.0, text: str = "") -> httpx.HTTPStatusError:
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + seconds))
    request = httpx.Request("POST", "https://host:1/")
    response = httpx.Response(status, headers={"date": date}, text=text, request=request)
    return httpx.HTTPStatusError("x", request=request, response=response)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (lambda: answer(401), "withdrawn"),
        (lambda: answer(401, 200), "withdrawn"),  # behind, but not too far
        (lambda: answer(401, 400), "clock"),
        (lambda: answer(401, -60), "clock"),  # ahead
        (lambda: answer(412, text='{"code": 1001, "detail": "x"}'), "version"),
        (lambda: answer(502), "gateway"),
        (lambda: answer(500, text="[" * 100000), "gateway"),
        (lambda: answer(429), "gateway"),
        (lambda: answer(404), "foreign"),
        (lambda: answer(302), "foreign"),
        (ValueError("Invalid protobuf response payload"), "foreign"),
        (Trouble("version"), "version"),
        (httpx.ReadTimeout("x"), "timeout"),
        (httpx.RemoteProtocolError("x"), "broken"),
        (KeyError("x"), "failed"),
    ],
)
def test_trouble_has_a_code(error: Exception | Callable[[], Exception], code: str) -> None:
    assert code_of(error if isinstance(error, Exception) else error(), proxied=False) == code
    assert code in WORDS


def test_a_full_disk_does_not_stop_a_status(tmp_path: Path) -> None:
    status = StatusFile(tmp_path / "gone", "a", "h:1")
    status.say("connected")
    status.count(1, 2)


def test_a_status_is_written_at_once_when_it_changes(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    status = StatusFile(tmp_path, "a", "h:1")
    for code, words in WORDS.items():
        status.say("connecting")
        status.say(code)
        found = read_status(tmp_path)
        assert found is not None
        assert (found.code, found.state, found.sentence) == (code, words.state, words.sentence)
        assert words.remedy or code in ("connecting", "connected", "working")
    (tmp_path / "status.json").write_text("{}")
    with pytest.raises(OSError, match="damaged"):
        read_status(tmp_path)


def test_a_trouble_that_lasts_is_written_again_so_that_the_link_does_not_look_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1e9
    monkeypatch.setattr("client.link_status.time.time", lambda: now)
    file = StatusFile(tmp_path, "north", "host:1")
    file.say("refused")
    for _ in range(20):
        now += 20.0
        file.say("refused")
    found = read_status(tmp_path)
    assert found is not None
    assert (found.code, found.since, found.written) == ("refused", 1e9, 1e9 + 400.0)

"""The doctor of a site: each thing that it looks at, broken for real, and what it then says."""

from __future__ import annotations

import http.server
import json
import os
import re
import select
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from click.testing import CliRunner

from client import audit, doctor, doctor_checks, doctor_network, doctor_training, founding, up
from client.cli import site
from client.doctor import CHECKS, Case
from client.examination import write
from client.joining import fill
from client.link_status import GOOD, LOCK, WORDS, StatusFile
from client.site_config import SiteConfig, read_any_site
from common import certificates, machine, node_key
from common.doctor import Result, examine
from common.files import write_json
from common.locks import exclusive
from server.control import Control

MANUAL = Path(__file__).parents[1] / "docs" / "doctor.md"
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user, or mount a file system")


def look(config: SiteConfig, name: str, **options: Any) -> Result:
    """Return what one check says of a site."""
    (result,) = examine({name: CHECKS[name]}, Case(config.path, **options))
    assert bool(result.remedy) == (result.level in ("warn", "fail"))
    assert "\n" not in result.said + result.remedy
    return result


def level(config: SiteConfig, name: str, **options: Any) -> str:
    return look(config, name, **options).level


def changed(config: SiteConfig, section: str, **values: Any) -> SiteConfig:
    """Return the site with other values in its site.toml."""
    held = tomllib.loads(config.path.read_text())
    held.setdefault(section, {}).update(values)
    config.path.write_text(tomli_w.dumps(held))
    return read_any_site(config.path)


@pytest.fixture
def config(tmp_path: Path) -> SiteConfig:
    """A site that has joined nobody."""
    images = tmp_path / "images"
    images.mkdir()
    (images / "one.png").write_bytes(b"x")
    made = founding.found(tmp_path / "site", "st-anna", images)
    return read_any_site(made.config)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A folder that other users can enter; those that pytest makes are closed to them."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def moved(config: SiteConfig, folder: Path) -> SiteConfig:
    """Return the site in a folder that other users can enter; its images are beside it."""
    shutil.copytree(config.path.parent, folder / "site")
    shutil.copytree(config.images, folder / "images")
    config = read_any_site(folder / "site" / config.path.name)
    return changed(config, "data", images=str(folder / "images"))


def given(user: int, *paths: Path) -> None:
    for path in paths:
        for one in (path, *path.rglob("*")):
            os.chown(one, user, user)


# -------------------------------------------------------------------------------------- a coordinator that can be odd


class Coordinator:
    """What a hospital dials: TLS of an authority, and one answer to everything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.status, self.body = 401, b""
        self.headers: dict[str, str] = {}
        self.skew: float | None = 0.0  # seconds by which its clock is ahead; None: it tells no date
        self._now: datetime | None = None
        self._server: http.server.ThreadingHTTPServer | None = None
        self.make()

    def make(self, now: datetime | None = None, hosts: tuple[str, ...] = ("127.0.0.1", "localhost")) -> None:
        """Make an authority and a certificate."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        at = self.folder
        for key in ("ca.key", "server.key"):
            certificates.make_key(at / key)
        (at / "ca.pem").write_bytes(certificates.make_ca(at / "ca.key", "chest", now))
        signed = certificates.make_server(at / "ca.pem", at / "ca.key", at / "server.key", hosts, now)
        (at / "server.pem").write_bytes(signed)

    def known(self) -> None:
        """Answer as Flower does behind the gate, to a key that is enrolled."""
        self.status, self.body = 415, b'{"code": 1002, "message": "no"}'

    @contextmanager
    def running(self, tls: bool = True) -> Iterator[int]:
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.send_response_only(outer.status)
                if outer.skew is not None:
                    self.send_header("date", formatdate(time.time() + outer.skew, usegmt=True))
                for name, value in {**outer.headers, "content-length": str(len(outer.body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(outer.body)

            def log_message(self, *_: Any) -> None:
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                pass  # a client that does not trust us goes away

        with Quiet(("127.0.0.1", 0), Handler) as server:
            if tls:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(self.folder / "server.pem", self.folder / "server.key")
                server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
            thread = threading.Thread(target=server.serve_forever, args=(0.02,))
            thread.start()
            try:
                yield server.server_address[1]
            finally:
                server.shutdown()
                thread.join()


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator(tmp_path / "coordinator")


def joined(config: SiteConfig, authority: Path, address: str, proxy: str = "") -> SiteConfig:
    """Return the site having joined a coordinator."""
    link = config.path.parent / "link"
    link.mkdir(mode=0o700, exist_ok=True)
    if not (link / "node.key").exists():
        node_key.make_key(link / "node.key")
    shutil.copy(authority, link / "ca.pem")
    values = {"address": address, "proxy": proxy}
    config.path.write_text(fill(config.path.read_text(), values))
    return read_any_site(config.path)


def steps(config: SiteConfig, **options: Any) -> dict[str, Result]:
    """Return what is said of every step on the way to the coordinator."""
    found = examine({name: CHECKS[name] for name in doctor_network.STEPS}, Case(config.path, **options))
    return {result.check: result for result in found}


def at_step(found: dict[str, Result], failing: str, code: str) -> None:
    """Check that one step fails in the words of a code, none before it, and none after it was reached."""
    names = list(doctor_network.STEPS)
    place = names.index(failing)
    assert (found[failing].level, found[failing].said) == ("fail", WORDS[code].sentence)
    assert found[failing].remedy == WORDS[code].remedy
    assert {found[name].level for name in names[:place]} <= {"pass", "skip"}
    assert {found[name].level for name in names[place + 1 :]} - {"skip"} <= {"pass"}  # its clock may be known


def test_a_coordinator_that_knows_the_key(config: SiteConfig, coordinator: Coordinator) -> None:
    coordinator.known()
    with coordinator.running() as port:
        site = joined(config, coordinator.folder / "ca.pem", f"127.0.0.1:{port}")
        found = steps(site)
    levels = {name: one.level for name, one in found.items()}
    assert levels == {**dict.fromkeys(doctor_network.STEPS, "pass"), "proxy": "skip"}
    assert not (site.link_folder / "status.json").exists()  # that is the link's
    end = certificates.describe(certificates.read_certificates(coordinator.folder / "server.pem")[0]).expires
    assert found["certificate"].said == f"of the site's authority, for 127.0.0.1, until {end:%Y-%m-%d}"


def test_a_coordinator_that_does_not_know_the_key(config: SiteConfig, coordinator: Coordinator) -> None:
    with coordinator.running() as port:
        site = joined(config, coordinator.folder / "ca.pem", f"127.0.0.1:{port}")
        stranger = steps(site)
        (site.link_folder / "node_id").write_text("1 x\n")  # of an earlier connection
        withdrawn = steps(site)
    assert stranger["coordinator"].level == stranger["clock"].level == "pass"
    assert stranger["enrolment"].level == "fail" and "enrolment file" in stranger["enrolment"].remedy
    at_step(withdrawn, "enrolment", "withdrawn")


@pytest.mark.parametrize(
    ("status", "headers", "code"),
    [
        (404, {}, "foreign"),
        (200, {}, "foreign"),
        (307, {"location": "https://127.0.0.1:1/"}, "foreign"),
        (401, {"www-authenticate": 'Basic realm="x"'}, "foreign"),
        (502, {}, "gateway"),
        (503, {}, "gateway"),
    ],
)
def test_what_answers_may_be_no_coordinator(
    config: SiteConfig, coordinator: Coordinator, status: int, headers: dict[str, str], code: str
) -> None:
    coordinator.status, coordinator.headers = status, headers
    with coordinator.running() as port:
        at_step(steps(joined(config, coordinator.folder / "ca.pem", f"127.0.0.1:{port}")), "coordinator", code)


def ago(**duration: float) -> datetime:
    return datetime.now(UTC) - timedelta(**duration)


def test_a_certificate_that_has_ended(config: SiteConfig, coordinator: Coordinator) -> None:
    coordinator.make(ago(days=certificates.SERVER_DAYS + 1))
    with coordinator.running() as port:
        at_step(steps(joined(config, coordinator.folder / "ca.pem", f"127.0.0.1:{port}")), "certificate", "expired")


def test_a_certificate_that_ends_soon(config: SiteConfig, coordinator: Coordinator) -> None:
    coordinator.make(ago(days=certificates.SERVER_DAYS - 10))
    coordinator.known()
    with coordinator.running() as port:
        found = steps(joined(config, coordinator.folder / "ca.pem", f"127.0.0.1:{port}"))
    assert found["certificate"].level == "warn" and "but it ends on" in found["certificate"].said
    assert found["enrolment"].level == "pass"


def test_a_certificate_of_another_authority_and_for_another_name(
    config: SiteConfig, coordinator: Coordinator, tmp_path: Path
) -> None:
    foreign = Coordinator(tmp_path / "foreign").folder / "ca.pem"
    with coordinator.running() as port:
        at_step(steps(joined(config, foreign, f"127.0.0.1:{port}")), "certificate", "untrusted")
    coordinator.make(hosts=("elsewhere.example",))
    with coordinator.running() as port:
        here = joined(config, coordinator.folder / "ca.pem", f"127.0.0.1:{port}")
        at_step(steps(here), "certificate", "wrong_host")


def test_a_server_without_tls(config: SiteConfig, coordinator: Coordinator) -> None:
    with coordinator.running(tls=False) as port:
        at_step(steps(joined(config, coordinator.folder / "ca.pem", f"127.0.0.1:{port}")), "certificate", "no_tls")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


@pytest.mark.parametrize(("host", "code"), [("127.0.0.1", "refused"), ("nowhere.invalid", "unknown_host")])
def test_an_address_that_leads_nowhere(config: SiteConfig, coordinator: Coordinator, host: str, code: str) -> None:
    here = joined(config, coordinator.folder / "ca.pem", f"{host}:{free_port()}")
    at_step(steps(here), "connection", code)


@pytest.mark.parametrize(
    ("skew", "status", "level", "words"),
    [
        (0.0, 415, "pass", "within 2 seconds"),
        (-20.0, 401, "fail", "seconds ahead of"),  # this machine's is ahead
        (-7.0, 415, "fail", "seconds ahead of"),
        (30.0, 415, "pass", "seconds behind"),
        (200.0, 415, "warn", "seconds behind"),
        (400.0, 401, "fail", "seconds behind"),
        (None, 415, "skip", "has no date"),
    ],
)
def test_clocks_are_compared(
    config: SiteConfig, coordinator: Coordinator, skew: float | None, status: int, level: str, words: str
) -> None:
    coordinator.known()
    coordinator.skew, coordinator.status = skew, status
    coordinator.body = coordinator.body if status == 415 else b""
    with coordinator.running() as port:
        found = steps(joined(config, coordinator.folder / "ca.pem", f"127.0.0.1:{port}"))
    assert found["coordinator"].level == "pass"
    assert found["clock"].level == level and words in found["clock"].said
    assert found["clock"].remedy in ("", WORDS["clock"].remedy)
    assert found["enrolment"].level == ("pass" if status == 415 else "skip")


class Proxy:
    """A small CONNECT proxy: it carries, or it refuses."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self.asked: list[bytes] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(10)

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                with client:
                    self._answer_one(client)

    def _answer_one(self, client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(65536)
        self.asked.append(head.split(b"\r\n")[0])
        client.sendall(self._answer)
        if b" 200 " not in self._answer:
            return
        host, _, port = head.split()[1].decode().rpartition(":")
        with socket.create_connection((host, int(port))) as there, suppress(OSError):
            while True:
                for ready in select.select([client, there], [], [])[0]:
                    content = ready.recv(65536)
                    if not content:
                        return
                    (there if ready is client else client).sendall(content)


def test_the_way_leads_through_the_hospitals_proxy(config: SiteConfig, coordinator: Coordinator) -> None:
    coordinator.known()
    with coordinator.running() as port, Proxy(b"HTTP/1.1 200 OK\r\n\r\n") as proxy:
        found = steps(joined(config, coordinator.folder / "ca.pem", f"127.0.0.1:{port}", proxy.url))
    assert {one.level for one in found.values()} == {"pass"}
    assert proxy.asked == [f"CONNECT 127.0.0.1:{port} HTTP/1.1".encode()]


def test_a_proxy_that_refuses_and_one_that_is_not_there(config: SiteConfig, coordinator: Coordinator) -> None:
    with coordinator.running() as port:
        with Proxy(b"HTTP/1.1 403 Forbidden\r\n\r\n") as proxy:
            here = joined(config, coordinator.folder / "ca.pem", f"127.0.0.1:{port}", proxy.url)
            at_step(steps(here), "proxy", "proxy_refuses")
        at_step(steps(here), "proxy", "proxy_unreachable")


def test_offline_nothing_is_dialled(config: SiteConfig, coordinator: Coordinator) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = joined(config, coordinator.folder / "ca.pem", f"127.0.0.1:{listener.getsockname()[1]}")
        found = steps(here, offline=True)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert {(one.level, one.said) for one in found.values()} == {("skip", "--offline")}


def test_a_site_that_has_joined_nobody_is_not_led_anywhere(config: SiteConfig) -> None:
    names = [*doctor_network.STEPS, "key", "authority", "separation", "link"]
    assert {look(config, name).said for name in names} == {"the site has joined no coordinator"}
    assert {level(config, name) for name in names} == {"skip"}


@pytest.mark.slow
def test_a_true_superlink_does_not_notice(superlink: Any, links: Callable[..., Any], config: SiteConfig) -> None:
    here = joined(config, superlink.endpoints.certificate, superlink.endpoints.listen)
    assert steps(here)["enrolment"].level == "fail"
    key = node_key.read_key(here.private_key)
    link = links(superlink, key=key)
    with Control(superlink.endpoints) as control:
        control.register("st-anna", node_key.public_text(key))
        assert {one.level for one in steps(here).values()} == {"pass", "skip", "warn"}  # its certificate lasts a day
        assert [node.status for node in control.nodes()] == ["registered"]  # nobody was made to come online
        link.activate()
        (before,) = control.nodes()
        assert steps(here)["enrolment"].level == "pass"
        assert control.nodes() == (before,)
        control.unregister("st-anna")
    assert steps(here)["enrolment"].level == "fail"


# ------------------------------------------------------------------------------------------ files and rights of a site


def test_without_a_configuration_only_the_machine_is_looked_at(config: SiteConfig) -> None:
    config.path.write_text('[site]\nname = "st-anna"\nstat = "x"\n')
    assert "did you mean 'state'?" in look(config, "configuration").said
    of_site = [name for name in CHECKS if name not in ("configuration", *MACHINE)]
    assert {look(config, name).said for name in of_site} == {"not reached, see configuration"}
    assert level(config, "randomness") == "pass"


MACHINE = {"versions", "memory", "shared_memory", "open_files", "randomness"}


def test_state_and_secret(config: SiteConfig) -> None:
    assert [level(config, name) for name in ("configuration", "state", "secret")] == ["pass"] * 3
    config.secret.chmod(0o644)
    assert "mode 0644 opens the site's secret to others" in look(config, "secret").said
    config.secret.unlink()
    assert "missing" in look(config, "secret").said
    config.state.chmod(0o755)
    assert "mode 0755 opens it to others" in look(config, "state").said
    shutil.rmtree(config.state)
    assert "site check" in look(config, "state").remedy


def test_key_and_authority(config: SiteConfig, coordinator: Coordinator) -> None:
    here = joined(config, coordinator.folder / "ca.pem", "127.0.0.1:1")
    assert (level(here, "key"), level(here, "authority")) == ("pass", "pass")
    here.private_key.chmod(0o640)
    assert look(here, "key").said.endswith(f"run: chmod 600 {here.private_key}")
    coordinator.make(ago(days=certificates.CA_DAYS - certificates.SERVER_DAYS))
    for days, found in ((10, "warn"), (-1, "fail")):
        made = certificates.make_ca(coordinator.folder / "ca.key", "chest", ago(days=certificates.CA_DAYS - days))
        here.ca_certificate.write_bytes(made)
        assert level(here, "authority") == found
    here.ca_certificate.write_text("nonsense")
    assert look(here, "authority").said.count("not a certificate") == 1
    assert look(here, "connection").said == "not reached, see authority and key"


@as_root
def test_a_user_to_whom_all_is_closed_is_sent_to_root(
    config: SiteConfig, coordinator: Coordinator, shared: Path
) -> None:
    config = joined(moved(config, shared), coordinator.folder / "ca.pem", "127.0.0.1:1")
    os.seteuid(NOBODY)
    try:
        assert [level(config, name) for name in ("key", "authority", "link", "separation")] == ["skip"] * 4
        of_state = [look(config, name).said for name in ("secret", "disk", "cohort", "trail", "ledger")]
        others = [level(config, name) for name in ("socket", "daemon", "supervisor", "data")]
        state = look(config, "state")
    finally:
        os.seteuid(0)
    assert set(of_state) == {"not reached, see state"} and others == ["skip", "skip", "skip", "pass"]
    assert (state.level, state.remedy) == ("fail", "Ask as root.")


@as_root
def test_the_link_says_who_it_is_where_the_key_is_closed(
    config: SiteConfig, coordinator: Coordinator, shared: Path
) -> None:
    coordinator.known()
    with coordinator.running() as port:
        here = joined(moved(config, shared), coordinator.folder / "ca.pem", f"127.0.0.1:{port}")
        exchange = doctor_network.Exchange("withdrawn", own_key=False)
        assert doctor_network.look("enrolment", here, exchange).level == "skip"
        StatusFile(here.link_folder, here.name, "host:1").say("connected")
        assert doctor_network.look("enrolment", here, exchange).said.startswith("as the link last wrote: The link is")
        here.ca_certificate.rename(shared / "ca.pem")
        here = changed(here, "coordinator", ca_certificate=str(shared / "ca.pem"))
        os.seteuid(NOBODY)
        try:
            found = steps(here)
        finally:
            os.seteuid(0)
    assert found["coordinator"].level == "pass" and "closed to this user" in found["enrolment"].said


@as_root
def test_images_that_the_daemons_user_cannot_read(config: SiteConfig, shared: Path) -> None:
    config = moved(config, shared)
    assert look(config, "data").said == f"1 files below {config.images}, readable by root"
    given(NOBODY, config.state)
    assert level(config, "data") == "pass"
    config.images.chmod(0o700)
    found = look(config, "data")
    assert (found.level, found.said) == ("fail", f"{config.images}: nobody cannot read it")
    os.seteuid(NOBODY)  # and they would be told the same
    try:
        assert look(config, "data").said == found.said
    finally:
        os.seteuid(0)
    config.images.chmod(0o755)
    (config.images / "one.png").chmod(0o600)
    found = look(config, "data")
    assert found.level == "fail" and found.said.endswith("and nobody cannot read the first of them")
    (config.images / "one.png").chmod(0o644)
    labels = shared / "labels.csv"
    labels.touch(mode=0o600)
    assert look(changed(config, "data", labels=str(labels)), "data").said == f"{labels}: nobody cannot read it"


def test_images_that_are_not_there(config: SiteConfig) -> None:
    (config.images / "one.png").unlink()
    assert look(config, "data").said.endswith("no files in it")
    config.images.rmdir()
    assert look(config, "data").said.endswith("no such file or folder")
    assert look(changed(config, "data", images=""), "data").said == "no images are named"


def test_files_are_counted_as_long_as_there_is_time(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "file").touch()
    found = doctor_checks.counted(tmp_path)
    assert (found.files, found.whole) == (3, True)
    assert doctor_checks.counted(tmp_path, -1.0) == doctor_checks.Counted(0, None, tmp_path.stat().st_mtime, False)


@pytest.fixture
def checked(ward: Any) -> SiteConfig:
    """A site whose data were checked."""
    for number in range(12):
        ward.picture(f"{number}.png", number)
    ward.table([{"path": f"{number}.png", "label": "ab"[number % 2]} for number in range(12)])
    config: SiteConfig = ward.site()
    write(config, ward.examine(), None)
    return config


def test_a_cohort_is_what_the_last_check_found(checked: SiteConfig) -> None:
    found = look(checked, "cohort")
    assert found.level == "pass" and found.said.startswith("12 images in use (")
    path = checked.state / doctor_checks.REPORT
    os.utime(path, (1e9, 1e9))
    assert look(checked, "cohort").said == "since the last check, the table of labels was changed"
    os.utime(checked.labels or path, (1, 1))
    assert look(checked, "cohort").said == "since the last check, files came, went or were renamed"
    os.utime(checked.images, (1, 1))
    assert level(checked, "cohort") == "pass"
    text = checked.path.read_text()
    checked.path.write_text(text.replace("image_size = 32", "image_size = 64"))
    assert look(checked, "cohort").said == "since the last check, [data] preset or image_size were changed"
    checked.path.write_text(text)
    write_json(path, {**json.loads(path.read_text()), "stop": "ANON everywhere"})
    assert (level(checked, "cohort"), "ANON" in look(checked, "cohort").said) == ("fail", False)
    path.write_text("{")
    assert look(checked, "cohort").said == "the check itself failed (JSONDecodeError)"
    path.unlink()
    assert look(checked, "cohort").remedy == f"Run: consilium site check {checked.path}"


def test_the_disk_needs_what_the_images_need(checked: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the caches of 12 images may take 1.0 GB" in look(checked, "disk").said
    monkeypatch.setattr(doctor_checks, "FEATURES", 10**15)
    found = look(checked, "disk")
    assert found.level == "warn" and "may take 12000.0 TB" in found.said


@as_root
def test_a_full_disk_below_the_caches(checked: SiteConfig) -> None:
    shutil.rmtree(checked.cache)
    checked.cache.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(checked.cache)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this container may not mount a tmpfs")
    try:
        assert level(checked, "disk") == "fail"
    finally:
        subprocess.run(["umount", str(checked.cache)], check=True)
    shutil.rmtree(checked.state)
    assert level(checked, "disk") == "skip"


@as_root
def test_a_link_of_its_own_user_is_kept_from_the_data(
    config: SiteConfig, coordinator: Coordinator, shared: Path
) -> None:
    here = joined(moved(config, shared), coordinator.folder / "ca.pem", "127.0.0.1:1")
    assert look(here, "separation").said.startswith("daemon and link are both root's")
    given(NOBODY, here.link_folder)
    found = look(here, "separation")
    assert (found.level, found.said) == ("warn", f"nobody, who runs the link, can read {here.images}")
    here.images.chmod(0o700)
    assert look(here, "separation").said == "nobody, who runs the link, can read neither data nor state"


# ------------------------------------------------------------------------------------------------ socket and processes


def test_a_socket_that_cannot_be(config: SiteConfig) -> None:
    assert look(config, "socket").said.startswith(f"{config.socket}, for ")
    config.socket.touch()
    assert look(config, "socket").said.endswith("holds something else than a socket")
    config.socket.unlink()
    assert "knows no user 'nobody-here'" in look(changed(config, "site", peers=["nobody-here"]), "socket").said
    assert level(changed(config, "site", peers=[], socket="/run/none/site.sock"), "socket") == "warn"
    assert "a socket's path at most 107" in look(changed(config, "site", socket=f"{'x' * 99}.sock"), "socket").said


@as_root
def test_a_socket_that_its_peers_cannot_reach(config: SiteConfig, shared: Path) -> None:
    place = shared / "run"
    place.mkdir(mode=0o755)
    here = changed(config, "site", socket=str(place / "site.sock"), peers=[NOBODY])
    assert look(here, "socket").said == f"{place}/site.sock, for root and nobody"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(here.socket))
        here.socket.chmod(0o600)
        assert look(here, "socket").said == f"{here.socket}: nobody, a peer, may not speak to it"
        here.socket.chmod(0o666)
        assert level(here, "socket") == "pass"
    place.chmod(0o700)
    assert look(here, "socket").said == f"{place}: nobody, a peer, cannot enter it"
    given(NOBODY, config.state)  # the daemon's user
    assert look(here, "socket").said == f"{place}: nobody cannot make a socket there"
    os.seteuid(NOBODY)
    try:
        assert level(here, "socket") == "skip"  # the folder is closed to them
    finally:
        os.seteuid(0)


def test_processes_that_are_not_started_are_no_failure_and_others_are(
    config: SiteConfig, coordinator: Coordinator
) -> None:
    here = joined(config, coordinator.folder / "ca.pem", "127.0.0.1:1")
    assert [level(here, name) for name in ("supervisor", "daemon", "link")] == ["skip", "warn", "warn"]
    with exclusive(here.link_folder / LOCK, "a link"):
        for code in ("refused", "connected"):
            StatusFile(here.link_folder, here.name, "host:1").say(code)
            found = look(here, "link")
            assert (found.level, found.said) == ("pass" if code in GOOD else "fail", WORDS[code].sentence)
    folder = up.logs(here)
    folder.mkdir()
    child = {"pid": None, "started": 0.0, "restarts": 1, "last_exit": -9}
    write_json(folder / "supervisor.json", {"pid": 1, "started": 0.0, "children": {"daemon": child}})
    with exclusive(folder / "supervisor.lock", "a supervisor"):
        assert look(here, "supervisor").said == "The daemon ended with exit code -9."
        assert level(here, "daemon") == "fail"  # it should be there


def test_records_that_do_not_hold(config: SiteConfig) -> None:
    assert look(config, "trail").said == "1 events hold"
    assert look(config, "ledger").said == "no run with privacy has drawn on it yet"
    audit.append(config.audit, "check", {"accepted": 3})
    whole = config.audit.read_bytes()
    config.audit.write_bytes(whole[:-9])
    assert level(config, "trail") == "warn"  # as a crash leaves it
    config.audit.write_bytes(whole.replace(b'"accepted":3', b'"accepted":4'))
    assert level(config, "trail") == "fail"
    config.audit.unlink()
    assert level(config, "trail") == "fail"
    (config.state / "ledger.jsonl").write_text("nonsense\n")
    assert level(config, "ledger") == "fail"


def test_records_that_are_long_are_left_to_their_own_commands(
    config: SiteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_checks, "LONGEST", 1)
    (config.state / "ledger.jsonl").write_text("nonsense\n")
    assert {level(config, name) for name in ("trail", "ledger")} == {"skip"}


# ------------------------------------------------------------------------------------------------------ what computes


def test_a_device_that_is_not_there(config: SiteConfig, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert look(changed(config, "compute", device="cpu"), "device").said == "the CPU, as [compute] device says"
    assert "torch sees no GPU" in look(changed(config, "compute", device="cuda"), "device").said
    assert look(changed(config, "compute", device="auto"), "device").said.startswith("the CPU")
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "vendor").write_text("0x10de\n")
    assert doctor_checks._has_nvidia(tmp_path)
    (tmp_path / "card" / "vendor").write_text("0x1234\n")
    assert not doctor_checks._has_nvidia(tmp_path)


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the two that take seconds, which have tests of their own."""
    quick = {name: check for name, check in CHECKS.items() if name not in ("versions", "training")}
    monkeypatch.setattr(doctor, "CHECKS", quick)


def invoke(*arguments: str) -> tuple[Any, str]:
    done = CliRunner().invoke(site, ["doctor", *arguments], standalone_mode=False)
    return done.return_value if done.exception is None else done.exception, done.stdout


def test_the_command_prints_a_line_a_check_and_ends_with_1_where_one_fails(config: SiteConfig, light: None) -> None:
    code, text = invoke(str(config.path), "--offline")
    printed = text.splitlines()
    assert code == 0, text
    assert [line.split()[1] for line in printed if line[:4].strip()][:-1] == list(doctor.CHECKS)
    assert re.fullmatch(r"\d+ pass, \d+ warn, 0 fail, \d+ skip", printed[-1])
    config.state.chmod(0o755)
    code, text = invoke(str(config.path), "--offline", "--json")
    value = json.loads(text)
    assert (code, value["healthy"], value["config"]) == (1, False, str(config.path))
    assert [one["check"] for one in value["checks"]] == list(doctor.CHECKS)
    assert [one["check"] for one in value["checks"] if one["level"] == "fail"] == ["state"]
    error, _ = invoke(str(config.path.parent / "none.toml"))
    assert error.exit_code == 2 and "no such file" in str(error)


def test_a_check_that_breaks_stops_no_other(config: SiteConfig, light: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(*_: object) -> None:
        raise RuntimeError(f"{config.images}/meier.dcm")

    for module, name in ((machine, "randomness"), (doctor_checks, "counted"), (doctor_network, "ask")):
        monkeypatch.setattr(module, name, odd)
    code, text = invoke(str(config.path), "--json")
    found = {one["check"]: one for one in json.loads(text)["checks"]}
    assert code == 1 and list(found) == list(doctor.CHECKS)
    assert found["data"]["said"] == "the check itself failed (RuntimeError)"
    assert "meier" not in text


@pytest.mark.slow
def test_all_of_it_on_a_site_that_is_well(
    checked: SiteConfig, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_training, "SECONDS", 0.05)
    most = {name: check for name, check in CHECKS.items() if name != "versions"}  # which has a test of its own
    monkeypatch.setattr(doctor, "CHECKS", most)
    coordinator.known()
    audit.append(checked.audit, "init", {})
    here = changed(checked, "policy", backbones=["test_efficientnet"])
    with coordinator.running() as port:
        here = joined(here, coordinator.folder / "ca.pem", f"127.0.0.1:{port}")
        code, text = invoke(str(here.path))
    assert code == 0, text
    assert re.search(
        r"^pass  training +\d+ ms a step on c\w+, \d+ images a second \(test_efficientnet, last", text, re.M
    )
    assert {line.split()[1] for line in text.splitlines() if line.startswith("warn")} <= {
        *("daemon", "link"),  # not started
        *("memory", "shared_memory", "open_files", "disk", "device"),  # of this machine
    }
    found = look(changed(here, "policy", backbones=["no_such"]), "training")
    assert found.level == "fail" and "no_such" in found.said


# --------------------------------------------------------------------------------------------------------- the manual


def rows(heading: str) -> list[tuple[str, ...]]:
    """Return the rows of the table below a heading of docs/doctor.md."""
    section = MANUAL.read_text(encoding="utf-8").split(f"## {heading}")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [tuple(cell.strip().strip("`") for cell in line.strip("|").split(" | ")) for line in lines]


def test_the_manual_has_every_check() -> None:
    assert rows("A site") == [(name, check.meaning, check.remedy) for name, check in CHECKS.items()]
    assert set(doctor_network._STEP_OF) <= set(WORDS)
    assert set(doctor_network._STEP_OF.values()) <= set(doctor_network.STEPS) <= set(doctor.CHECKS)

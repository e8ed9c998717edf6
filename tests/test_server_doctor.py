"""The doctor of a coordinator: each thing that it looks at, broken for real, and what it then says."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import shutil
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from common import certificates, node_key
from common.doctor import Found, Result, examine
from common.files import write_atomic, write_json
from common.locks import exclusive
from common.run_config import RunConfig
from server import doctor, doctor_database, doctor_public, enrolment, founding, runs, tls, up
from server.board import Board
from server.cli import server
from server.doctor import CHECKS, Case
from server.server_config import ServerConfig, read_server

ROOT = Path(__file__).parent.parent
MANUAL = ROOT / "docs" / "doctor.md"


def look(config: ServerConfig, name: str) -> Result:
    """Return what one check says of a coordinator."""
    (result,) = examine({name: CHECKS[name]}, Case(config.path))
    assert bool(result.remedy) == (result.level in ("warn", "fail"))
    assert "\n" not in result.said + result.remedy
    return result


def level(config: ServerConfig, name: str) -> str:
    return look(config, name).level


def replaced(config: ServerConfig, old: str, new: str) -> ServerConfig:
    text = config.path.read_text()
    assert old in text
    config.path.write_text(text.replace(old, new))
    return read_server(config.path)


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        public, operator = (listener.getsockname()[1] for listener in (one, other))
    made = founding.found(tmp_path / "chest", f"127.0.0.1:{public}", "chest", f"127.0.0.1:{public}")
    made.config.write_text(made.config.read_text().replace("operator_port = 9444", f"operator_port = {operator}"))
    return read_server(made.config)


# ------------------------------------------------------------------------------------------------------------- files


def test_a_coordinator_that_was_just_made(config: ServerConfig) -> None:
    well = ("configuration", "state", "secrets", "authority", "certificate", "ports", "runs", "interrupted")
    assert {level(config, name) for name in well} == {"pass"}
    assert {name: level(config, name) for name in ("supervisor", "superlink", "sites")} == {
        "supervisor": "warn",
        "superlink": "warn",
        "sites": "warn",
    }
    assert {level(config, name) for name in ("public", "closed", "database")} == {"skip"}


def test_without_a_configuration_only_the_machine_is_looked_at(config: ServerConfig) -> None:
    config.path.write_text('[server]\nnane = "chest"\n')
    assert "did you mean 'name'?" in look(config, "configuration").said
    alone = {"configuration", "versions", "shared_memory", "open_files", "clock"}
    assert {look(config, name).said for name in set(CHECKS) - alone} == {"not reached, see configuration"}


def test_state_and_secrets(config: ServerConfig) -> None:
    (config.state / "operator.secret").chmod(0o640)
    assert "mode 0640 opens" in look(config, "secrets").said
    (config.state / "operator.secret").chmod(0o600)
    config.key.chmod(0o644)
    assert f"chmod 600 {config.key}" in look(config, "secrets").said
    config.state.chmod(0o711)
    assert "mode 0711" in look(config, "state").said
    shutil.rmtree(config.state)
    assert (level(config, "state"), level(config, "secrets"), level(config, "authority")) == ("fail",) * 3
    assert look(config, "public").said == "not reached, see authority"


def sign(config: ServerConfig, now: datetime, host: str = "127.0.0.1") -> None:
    made = certificates.make_server(config.ca_certificate, config.ca_key, config.key, [host], now)
    write_atomic(config.certificate, made)


def soon(days: int, of: int = certificates.SERVER_DAYS) -> datetime:
    return datetime.now(UTC) - timedelta(days=of - days)


@pytest.mark.parametrize(("days", "found"), [(60, "pass"), (10, "warn"), (-1, "fail")])
def test_certificates_that_end(config: ServerConfig, days: int, found: str) -> None:
    write_atomic(config.ca_certificate, certificates.make_ca(config.ca_key, "chest", soon(days, certificates.CA_DAYS)))
    assert level(config, "authority") == found
    write_atomic(config.ca_certificate, certificates.make_ca(config.ca_key, "chest", soon(900, certificates.CA_DAYS)))
    sign(config, soon(days))
    assert level(config, "certificate") == found
    tls.renew(config)
    assert level(config, "certificate") == "pass"


def test_a_certificate_for_another_address_or_of_another_authority(config: ServerConfig) -> None:
    elsewhere = replaced(config, f'address = "{config.address}"', 'address = "chest.example:443"')
    found = look(elsewhere, "certificate")
    assert found.level == "fail" and "does not stand for chest.example" in found.said and "renew" in found.said
    certificates.make_key(config.state / "other.key")
    write_atomic(config.ca_certificate, certificates.make_ca(config.state / "other.key", "other"))
    assert "not signed by the authority" in look(config, "certificate").said


def test_behind_a_proxy_the_certificate_may_be_the_proxys(config: ServerConfig) -> None:
    behind = replaced(config, "[network]", '[network]\ntls = "proxy"')
    assert level(behind, "certificate") == "pass"
    for path in (config.certificate, config.key):
        path.unlink()
    assert (level(behind, "certificate"), level(behind, "secrets")) == ("skip", "pass")


# ---------------------------------------------------------------------------------------------------- ports, processes


def test_a_port_that_somebody_else_has(config: ServerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PATIENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", config.operator_port)):  # and says nothing
        found = look(config, "ports")
        assert "does not answer, or is no superlink" in look(config, "superlink").said
    assert found.level == "fail" and f"127.0.0.1:{config.operator_port}: cannot be listened at" in found.said
    away = replaced(config, f'listen = "{config.listen}"', 'listen = "192.0.2.1:9443"')
    assert level(away, "ports") == "fail"


def test_processes_that_end(config: ServerConfig) -> None:
    folder = up.logs(config)
    folder.mkdir()
    for child, found in (
        ({"pid": 1, "started": 0.0, "restarts": 3, "last_exit": 1}, "pass"),
        ({"pid": 1, "started": time.time(), "restarts": 3, "last_exit": 1}, "warn"),
        ({"pid": None, "started": 0.0, "restarts": 3, "last_exit": 1}, "fail"),
    ):
        write_json(folder / "supervisor.json", {"pid": 1, "started": 0.0, "children": {"superlink": child}})
        with exclusive(folder / "supervisor.lock", "it"):
            assert level(config, "supervisor") == found
            assert level(config, "superlink") == "fail"  # it should answer
    assert level(config, "supervisor") == "warn"


@contextmanager
def running(config: ServerConfig) -> Iterator[None]:
    """Run a coordinator with all its processes."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "server.up", "up", str(config.path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 60
        while Case(config.path).nodes is None:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(30)


def enrol(config: ServerConfig, folder: Path, name: str) -> None:
    from common.invitation import enrolment as answer
    from common.invitation import write_document

    write_document(folder / name, answer(enrolment.invite(config, name), node_key.make_key(folder / f"{name}.key")))
    enrolment.enrol(config, folder / name)


@pytest.mark.slow
def test_a_coordinator_that_is_up(config: ServerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {
        name: check for name, check in CHECKS.items() if name not in ("versions", "weights")
    }  # which have their own
    monkeypatch.setattr(doctor, "CHECKS", quick)
    enrol(config, tmp_path, "north")
    with running(config):
        done = CliRunner().invoke(server, ["doctor", "--server", str(config.path)], standalone_mode=False)
        text = done.stdout
        assert done.return_value == 0, text
        found = {line.split()[1]: line for line in text.splitlines() if line[:4].strip()}
        assert list(found)[:-1] == list(quick)
        for name in ("supervisor", "ports", "superlink", "public", "closed", "database", "runs"):
            assert found[name].startswith("pass "), found[name]
        assert "held by this coordinator's superlink" in found["ports"]
        assert found["sites"].startswith("warn  sites") and "0 of 1 connected; not: north" in found["sites"]
        # A name that does not lead back here, as behind an address translation, is no failure of the listener.
        away = replaced(config, f'address = "{config.address}"', f'address = "localhost:{free_port()}"')
        found_away = look(away, "public")
        assert found_away.level == "warn" and "(Connection refused); the listener is well" in found_away.said
        assert level(away, "closed") == "pass"
        other = replaced(away, str(away.address), "other.example.invalid:1")
        assert "Hostname mismatch" in look(other, "public").said
        # The secret of another coordinator.
        write_atomic(config.operator_secret, os.urandom(32), mode=0o600)
        assert "does not take this operator's secret" in look(config, "superlink").said


# ---------------------------------------------------------------------------------------------------------- in public


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def answering(config: ServerConfig, statuses: dict[str, int]) -> Iterator[None]:
    """Answer at the public address with the coordinator's certificate, and a status a route."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline(65537)
            if not self.raw_requestline or not self.parse_request():
                self.close_connection = True
                return
            status = statuses.get(f"{self.command} {self.path}", 404)
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            pass  # a client that does not trust us goes away

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(config.certificate, config.key)
    with Quiet(("127.0.0.1", config.address.port), Handler) as front:
        front.socket = context.wrap_socket(front.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=front.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield
        finally:
            front.shutdown()
            thread.join()


WELL = {f"POST {doctor_public.OPEN}": 401}


def dialled(config: ServerConfig, up: bool = True) -> tuple[Found, Found]:
    answer = doctor_public.dial(config)
    return doctor_public.listener(config, answer, up=up), doctor_public.routes(answer)


def test_what_answers_in_public_is_what_hospitals_need_and_no_more(config: ServerConfig) -> None:
    with answering(config, WELL):
        assert [found.level for found in dialled(config)] == ["pass", "pass"]


@pytest.mark.parametrize("route", doctor_public.CLOSED)
@pytest.mark.parametrize("status", [200, 405, 415])
def test_a_route_that_must_not_answer_fails(config: ServerConfig, route: str, status: int) -> None:
    with answering(config, {**WELL, f"POST {route}": status}):
        public, closed = dialled(config)
    assert public.level == "pass"
    assert (closed.level, closed.said) == ("fail", f"{config.address} answers POST {route} (status {status})")


@pytest.mark.parametrize(("status", "words"), [(502, "does not reach the superlink"), (200, "no coordinator's")])
def test_something_else_answers_in_public(config: ServerConfig, status: int, words: str) -> None:
    with answering(config, {f"POST {doctor_public.OPEN}": status}):
        public, _ = dialled(config)
        stopped, _ = dialled(config, up=False)
    assert public.level == "fail" and words in public.said
    assert stopped.level == ("skip" if status == 502 else "fail")


def test_a_certificate_that_no_hospital_trusts(config: ServerConfig) -> None:
    sign(config, soon(-1))
    with answering(config, WELL):
        public, closed = dialled(config)
    assert public.level == "fail" and "no hospital would trust what answers (certificate has expired)" in public.said
    assert closed.level == "skip"
    sign(config, datetime.now(UTC))
    certificates.make_key(config.state / "other.key")
    with answering(config, WELL):
        write_atomic(config.ca_certificate, certificates.make_ca(config.state / "other.key", "consilium chest CA"))
        public, _ = dialled(config)
    assert public.level == "fail" and "no hospital would trust" in public.said


def test_a_proxy_that_was_not_given_the_renewed_certificate(config: ServerConfig) -> None:
    with answering(config, WELL):
        tls.renew(config)
        public, _ = dialled(config)
    assert public.level == "warn" and "shows another certificate than" in public.said


def test_what_does_not_speak_tls_or_does_not_answer(config: ServerConfig) -> None:
    public, closed = dialled(config)
    assert public.level == "fail" and "(Connection refused)" in public.said and closed.level == "skip"
    assert dialled(config, up=False)[0].level == "skip"
    plain = http.server.HTTPServer(("127.0.0.1", config.address.port), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=plain.handle_request)
    with contextlib.redirect_stderr(None):
        thread.start()
        public, _ = dialled(config)
        thread.join()
    plain.server_close()
    assert public.level == "fail" and "no TLS (" in public.said


# ------------------------------------------------------------------------------------------------ database, runs, room


def database(path: Path, rows: int = 2000) -> None:
    with contextlib.closing(sqlite3.connect(path)) as made, made:
        made.execute("PRAGMA journal_mode=WAL")
        made.execute("CREATE TABLE message (id INTEGER PRIMARY KEY, content TEXT UNIQUE)")
        made.executemany("INSERT INTO message (content) VALUES (?)", ((f"{number:0200}",) for number in range(rows)))


def test_a_database_is_checked_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "superlink.db"
    assert doctor_database.look(path, 5.0).level == "skip"
    database(path)
    before = path.read_bytes()
    assert doctor_database.look(path, 5.0).level == "pass"
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before
    assert "too large to be checked" in doctor_database.look(path, -1.0).said


def test_a_database_that_is_written_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "superlink.db"
    database(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("INSERT INTO message (content) VALUES ('x')")
        assert doctor_database.look(path, 5.0).level == "pass"
        writer.execute("COMMIT")


@pytest.mark.parametrize("place", [0, 5000, 60_000])
def test_a_damaged_database_fails(tmp_path: Path, place: int) -> None:
    path = tmp_path / "superlink.db"
    database(path)
    content = bytearray(path.read_bytes())
    content[place : place + 3000] = os.urandom(3000)
    path.write_bytes(content)
    assert doctor_database.look(path, 5.0).level == "fail"


def a_run(config: ServerConfig, seed: int = 0) -> Path:
    values = {"task": {"name": "blobs", "labels": ("a", "b")}, "seed": seed}
    return runs.make_folder(config, RunConfig.model_validate(values), None)


def test_runs_that_are_damaged_or_interrupted(config: ServerConfig) -> None:
    folder = a_run(config)
    Board(folder, ("north",), 5)
    assert look(config, "runs").said == "1, all readable"
    facts = json.loads((folder / "progress.json").read_text())
    (folder / "progress.json").write_text(json.dumps({**facts, "process": "1"}))
    found = look(config, "interrupted")
    assert found.level == "warn" and str(folder) in found.said
    (folder / "progress.json").write_text("{")
    assert look(config, "runs").said == f"of 1, not readable: {folder}"
    (config.state / runs.LIST).write_text("{")
    assert level(config, "runs") == "fail" and "damaged" in look(config, "runs").said


def test_room_is_judged_by_the_largest_run_and_weights(config: ServerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(config, "disk").said.endswith("runs may take 2.0 GB")
    folder = a_run(config)
    (folder / "model").mkdir()
    with (folder / "model" / "final.safetensors").open("wb") as file:
        file.truncate(10**13)  # a hole
    assert look(config, "disk").level == "warn" and "may take 20.0 TB" in look(config, "disk").said
    assert level(config, "memory") == "warn"
    monkeypatch.setattr(doctor, "LEAST_MEMORY", 10**15)
    assert level(config, "memory") == "fail"


def test_weights_that_are_not_installed(config: ServerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from common import weights

    monkeypatch.setattr(weights, "EMBEDDED_PACKAGE", "nothing_of_the_kind")
    found = look(config, "weights")
    assert found.level == "warn" and "consilium[embedded]" in found.said


@pytest.mark.slow
def test_weights_that_are(config: ServerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from common import weights

    assert level(config, "weights") == "pass"
    monkeypatch.setattr(weights, "EMBEDDED_SHA256", "0" * 64)
    assert level(config, "weights") == "warn"


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_ends_with_1_where_a_check_fails_and_breaks_at_none(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(*_: object) -> None:
        raise RuntimeError("/data/meier")

    left_out = ("versions", "weights", "ports")
    monkeypatch.setattr(doctor, "CHECKS", {name: one for name, one in CHECKS.items() if name not in left_out})
    ask = ["doctor", "--server", str(config.path)]
    done = CliRunner().invoke(server, ask, standalone_mode=False)
    assert done.return_value == 0, done.stdout
    assert re.fullmatch(r"\d+ pass, \d+ warn, 0 fail, \d+ skip", done.stdout.splitlines()[-1])
    monkeypatch.setattr(runs, "runs", odd)
    done = CliRunner().invoke(server, [*ask, "--json"], standalone_mode=False)
    value = json.loads(done.stdout)
    found = {one["check"]: one for one in value["checks"]}
    assert (done.return_value, value["healthy"], list(found)) == (1, False, list(doctor.CHECKS))
    broken = {"memory", "disk", "runs", "interrupted"}
    assert {name for name, one in found.items() if one["level"] == "fail"} == broken
    assert {found[name]["said"] for name in broken} == {"the check itself failed (RuntimeError)"}
    done = CliRunner().invoke(server, ["doctor", "--server", "none.toml"], standalone_mode=False)
    assert getattr(done.exception, "exit_code", None) == 2


def test_the_manual_has_every_check() -> None:
    section = MANUAL.read_text(encoding="utf-8").split("## A coordinator")[1]
    lines = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    rows = [tuple(cell.strip().strip("`") for cell in line) for line in lines]
    assert [row[0] for row in rows] == list(CHECKS)
    told = [tuple(cell.strip().strip("`") for cell in (one.meaning, one.remedy)) for one in CHECKS.values()]
    assert [row[1:] for row in rows] == told

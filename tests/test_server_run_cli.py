"""`consilium server up, run, status, stop, resume, report`: whatever is wrong is one line, and nothing is half made."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common import certificates, cli
from common.files import write_atomic
from server import founding, runs
from server.board import process_start
from server.cli import server
from server.server_config import ServerConfig, read_server

Result = tuple[int, str, str]
Run = Callable[..., Result]
ROOT = Path(__file__).parent.parent
NAMES = ("north", "south")
COMMANDS = (("up",), ("run", "plan.toml"), ("status",), ("stop",), ("resume",), ("report",))


def free_ports(count: int) -> list[int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return [listener.getsockname()[1] for listener in (one, other)][:count]


def public_key() -> str:
    form = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(*form).decode()


def found(folder: Path, names: tuple[str, ...] = NAMES) -> ServerConfig:
    """Make a coordinator whose sites are enrolled; nobody listens at its ports."""
    public, operator = free_ports(2)
    founding.found(folder, f"127.0.0.1:{public}", "chest", f"127.0.0.1:{public}")
    toml = folder / "server.toml"
    toml.write_text(toml.read_text().replace("operator_port = 9444", f"operator_port = {operator}"))
    config = read_server(toml)
    sites = [{"name": name, "public_key": public_key(), "enrolled_at": "2026-01-02T03:04:05Z"} for name in names]
    write_atomic(config.sites, json.dumps({"version": 1, "sites": sites}).encode(), mode=0o600)
    return config


def plan(**sections: dict[str, Any]) -> dict[str, Any]:
    """Return a run that is quickly settled; sections that are given win."""
    values: dict[str, Any] = {
        "task": {"name": "blobs", "labels": ["dark", "bright"]},
        "data": {"preset": "generic", "image_size": 32, "views": 1},
        "model": {"backbone": "test_efficientnet", "weights": "none"},
        "training": {"rounds": 2},
        "sites": {"patience_s": 120.0},
    }
    return {**values, **{name: {**values.get(name, {}), **change} for name, change in sections.items()}}


def write_plan(path: Path, **sections: dict[str, Any]) -> Path:
    path.write_text(tomli_w.dumps(plan(**sections)))
    return path


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Return what lies in a folder: sizes and times of all that a user would miss or find."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items() if not path.is_dir()}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run `consilium server ...` as the installed command would, and return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    class Entry:
        name = "server"

        def load(self) -> Any:
            return server

    def invoke(*arguments: object) -> Result:
        with monkeypatch.context() as patch:
            patch.setattr(importlib.metadata, "entry_points", lambda **_: [Entry()])
            patch.setattr(sys, "argv", ["consilium", "server", *map(str, arguments)])
            with pytest.raises(SystemExit) as ended:
                cli.main()
        printed = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, printed.out, printed.err

    return invoke


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    return found(tmp_path / "chest")


def fails(result: Result, code: int, *parts: str) -> None:
    """Check that a command failed in one line, which holds all these parts."""
    got, out, err = result
    assert (got, out) == (code, ""), err
    assert err.startswith("consilium: ") and err.count("\n") == 1 and err.endswith("\n")
    for part in parts:
        assert part in err, err


# server.toml


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_without_a_server_toml_there_is_one_line(run: Run, tmp_path: Path, command: tuple[str, ...]) -> None:
    write_plan(tmp_path / "plan.toml")
    before = listing(tmp_path)
    fails(run(*command), 2, "server.toml: cannot be read (No such file or directory)")
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[network]", "[network", "server.toml: not TOML"),
        ('name = "chest"', "name = 3", "[server] name: got 3"),
        ('name = "chest"', "", "[server] name: missing"),
        ('name = "chest"', 'name = "chest"\nstat = "x"', "[server] stat: unknown key (did you mean 'state'?)"),
        ('name = "chest"', 'name = "chest"\nstate = "~nobody-of-that-name/x"', "which leads nowhere"),
        ("address = ", "adress = ", "[network] adress: unknown key (did you mean 'address'?)"),
        ("[network]", '[network]\ntls = "none"', "[network] tls"),
        ("operator_port = ", "operator_port = 7", "[network] operator_port"),
        ("[network]", '[certificates]\nca = "x.pem"\n[network]', "expected certificate, key and ca, or none of them"),
        ('listen = "127.0.0.1', 'tls = "proxy"\nlisten = "0.0.0.0', "expected a loopback address"),
    ],
)
def test_a_server_toml_that_is_wrong(run: Run, config: ServerConfig, old: str, new: str, message: str) -> None:
    text = config.path.read_text()
    assert old in text
    config.path.write_text(text.replace(old, new, 1))
    before = listing(config.path.parent)
    for command in ("up", "status", "stop"):
        fails(run(command, "--server", config.path), 2, "server.toml: ", message)
    assert listing(config.path.parent) == before


def test_a_server_toml_that_is_no_text(run: Run, config: ServerConfig) -> None:
    config.path.write_bytes(b"\xff\xfe\x00")
    fails(run("status", "--server", config.path), 2, "server.toml: cannot be read (not UTF-8 text)")


# What `server up` looks at before it starts anything


def test_no_state(run: Run, config: ServerConfig, tmp_path: Path) -> None:
    config.state.rename(tmp_path / "moved")
    write_plan(tmp_path / "plan.toml")
    before = listing(tmp_path)
    fails(run("up", "--server", config.path), 2, "chest/state: there is no such folder; `consilium server init`")
    fails(run("stop", "--server", config.path), 2, "no run is going on")
    fails(run("run", "plan.toml", "--server", config.path), 2, "no site is enrolled yet")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", ["operator.secret", "superexec.secret"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.chmod(0o644), "mode 0644 opens a secret of the coordinator to others; run: chmod 600"),
        (lambda path: path.unlink(), "missing, expected a secret of the coordinator; `consilium server init` makes it"),
        (lambda path: path.write_bytes(b"short"), "5 bytes, expected 32; bring it back from your backup"),
        (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
        (lambda path: path.rename(path.with_name("x")) and path.symlink_to("x"), "a symbolic link"),
    ],
)
def test_a_secret_that_cannot_be_used(
    run: Run, config: ServerConfig, tmp_path: Path, name: str, spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(config.state / name)
    write_plan(tmp_path / "plan.toml")
    before = listing(tmp_path)
    fails(run("up", "--server", config.path), 2, name, message)
    fails(run("run", "plan.toml", "--server", config.path), 2, name, message)
    code, out, err = run("status", "--server", config.path, "--json")
    assert (code, err) == (1, "") and name in " ".join(json.loads(out)["warnings"])
    assert listing(tmp_path) == before


def sign(config: ServerConfig, now: datetime | None = None, host: str = "127.0.0.1") -> None:
    content = certificates.make_server(config.ca_certificate, config.ca_key, config.key, [host], now)
    write_atomic(config.certificate, content)


def foreign(config: ServerConfig) -> None:
    for name in ("other.key", "other.pem"):
        (config.state / name).unlink(missing_ok=True)
    certificates.make_key(config.state / "other.key")
    write_atomic(config.ca_certificate, certificates.make_ca(config.state / "other.key", "other"))


def other_key(config: ServerConfig) -> None:
    config.key.unlink()
    certificates.make_key(config.key)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: sign(c, datetime.now(UTC) - timedelta(days=500)), "server.pem: expired on 20"),
        (lambda c: sign(c, datetime.now(UTC) + timedelta(days=9)), "server.pem: not valid before 20"),
        (foreign, "server.pem: not signed by the authority in"),
        (other_key, "server.key: does not belong to"),
        (lambda c: sign(c, host="fl.example.org"), "server.pem: does not stand for 127.0.0.1, but for fl.example.org"),
        (lambda c: c.certificate.unlink(), "server.pem: cannot be read (No such file or directory)"),
        (lambda c: c.certificate.write_text("no certificate"), "server.pem: not a certificate (PEM)"),
        (lambda c: c.key.unlink(), "server.key: missing, expected a private key for TLS"),
        (lambda c: c.key.chmod(0o640), "server.key: mode 0640 opens a private key for TLS (PEM) to others"),
        (lambda c: c.ca_certificate.unlink(), "ca.pem: cannot be read"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_certificate_that_no_hospital_trusts(
    run: Run, config: ServerConfig, spoil: Callable[[ServerConfig], Any], message: str
) -> None:
    spoil(config)
    before = listing(config.path.parent)
    fails(run("up", "--server", config.path), 2, message)
    code, out, err = run("status", "--server", config.path, "--json")
    assert (code, err) == (1, "")
    assert any(message in warning for warning in json.loads(out)["warnings"])
    assert listing(config.path.parent) == before


@pytest.mark.parametrize("place", ["listen", "operator_port"])
def test_a_port_that_is_in_use(run: Run, config: ServerConfig, place: str) -> None:
    port = config.listen.port if place == "listen" else config.operator_port
    before = listing(config.path.parent)
    with socket.create_server(("127.0.0.1", port)):
        fails(run("up", "--server", config.path), 1, f"127.0.0.1:{port}: cannot be listened at (Address already in")
    assert listing(config.path.parent) == before


# run.toml


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"labels": []}}, "[task] labels: got [], expected the labels that all sites use, at least 2"),
        ({"task": {"labels": ["sick"]}}, "[task] labels: got ['sick']"),
        ({"task": {"labels": ["sick", "sick"]}}, "each once"),
        ({"task": {"labels": ["sick", ""]}}, "[task] labels"),
        ({"task": {"labels": "sick"}}, "[task] labels: got 'sick'"),
        ({"task": {"labels": [], "kind": "multi-label"}}, "at least 1"),
        ({"task": {"kind": "multi"}}, "[task] kind: got 'multi'"),
        ({"task": {"name": "../../elsewhere"}}, "[task] name: got '../../elsewhere'"),
        ({"task": {"lables": []}}, "[task] lables: unknown key (did you mean 'labels'?)"),
        ({"training": {"rounds": "ten"}}, "[training] rounds: got 'ten'"),
        ({"training": {"strategy": "fedagv"}}, "did you mean 'fedavg'?"),
        ({"training": {"local_epochs": 1, "local_steps": 5}}, "local_epochs and local_steps exclude each other"),
        ({"sites": {"names": ["north", "west"]}}, "[sites] names: west not enrolled; see `consilium server sites`"),
        ({"sites": {"names": ["north", "north"]}}, "[sites] names: got north, north, expected every name once"),
        ({"sites": {"quorum": 3}}, "[sites] quorum: got 3, expected at most 2"),
        ({"sites": {"quorum": 0}}, "[sites] quorum: got 0"),
        ({"privacy": {"epsilon": 0.0}}, "[privacy] epsilon: got 0.0, input should be greater than 0"),
        ({"privacy": {"epsilon": 3.0, "noise_multiplier": 1.0}}, "epsilon and noise_multiplier exclude each other"),
        ({"privacy": {"delta": 1e-5}}, "delta without epsilon or noise_multiplier"),
        ({"data": {"image_size": 8}}, "[data] image_size: got 8"),
    ],
)
def test_a_plan_that_is_wrong(
    run: Run, config: ServerConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_plan(tmp_path / "plan.toml", **changes)
    before = listing(tmp_path)
    fails(run("run", "plan.toml", "--server", config.path), 2, "plan.toml: ", message)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"[task", "not TOML"), (b"\xff", "cannot be read (not UTF-8 text)"), (None, "cannot be read (No such file")],
)
def test_a_plan_that_cannot_be_read(
    run: Run, config: ServerConfig, tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "plan.toml").write_bytes(content)
    fails(run("run", "plan.toml", "--server", config.path), 2, f"plan.toml: {message}")


def test_a_plan_without_sites(run: Run, tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.toml")
    nobody = found(tmp_path / "empty", ())
    fails(run("run", "plan.toml", "--server", nobody.path), 2, "no site is enrolled yet; invite one with")


# Without a SuperLink


def test_nothing_runs_where_the_coordinator_is_not_up(run: Run, config: ServerConfig, tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.toml")
    before = listing(tmp_path)
    message = f"the coordinator is not up (nothing answers at 127.0.0.1:{config.operator_port}); start it with"
    fails(run("run", "plan.toml", "--server", config.path), 1, message)
    fails(run("stop", "--server", config.path), 2, "no run is going on; see `consilium server status`")
    fails(run("resume", "--server", config.path), 2, "chest/runs: holds no run of this coordinator")
    fails(run("report", "--server", config.path), 2, "chest/runs: holds no run of this coordinator")
    fails(run("report", tmp_path, "--server", config.path), 2, "holds no result.json of a run that has ended")
    assert listing(tmp_path) == before


def settled_folder(config: ServerConfig, status: str = "") -> Path:
    """Make the folder of a run that nobody drives."""
    run = runs.RunConfig.model_validate({**plan(), "sites": {"names": NAMES, "quorum": 2}})
    folder = runs.make_folder(config, run, None)
    if status:
        facts = {"status": status, "pid": 1, "process": "0", "phase": "ended", "done": 0, "total": 0}
        facts |= {"round": 0, "rounds": 2, "sites": {}, "since": 1.0, "updated": 2.0}
        (folder / "progress.json").write_text(json.dumps(facts))
    return folder


def test_what_cannot_be_resumed(run: Run, config: ServerConfig, tmp_path: Path) -> None:
    folder = settled_folder(config, "completed_partial")
    fails(run("resume", "--server", config.path), 2, f"{folder}: the run is completed partial: nothing to resume")
    fails(run("resume", folder, "--server", config.path), 2, "nothing to resume")
    fails(run("resume", tmp_path / "x", "--server", config.path), 2, "x: holds no run of this coordinator")
    again = settled_folder(config, "failed")
    before = listing(tmp_path)
    fails(run("resume", "--server", config.path), 1, "the coordinator is not up")  # the later one could be
    fails(run("report", again), 2, "holds no result.json")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"schema": 1}', '"x"'])
def test_a_result_that_is_damaged(run: Run, config: ServerConfig, content: str) -> None:
    folder = settled_folder(config, "completed")
    (folder / "result.json").write_text(content)
    fails(run("report", folder), 2, "holds no result.json of a run that has ended")
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("content", ["{", "{}", "[3]", '"x"'])
def test_a_list_of_runs_that_is_damaged(run: Run, config: ServerConfig, tmp_path: Path, content: str) -> None:
    folder = settled_folder(config, "failed")
    (config.state / "runs.json").write_text(content)
    write_plan(tmp_path / "plan.toml")
    before = listing(tmp_path)
    for command in (("stop",), ("resume",), ("report",)):
        fails(run(*command, "--server", config.path), 1, "runs.json: damaged, expected a list of folders; remove it")
    code, out, err = run("status", "--server", config.path, "--json")
    assert (code, err) == (1, "") and "runs.json: damaged" in " ".join(json.loads(out)["warnings"])
    assert listing(tmp_path) == before
    (config.state / "runs.json").unlink()
    fails(run("resume", "--server", config.path), 1, "the coordinator is not up")  # found without the list
    assert [one.folder for one in runs.runs(config)] == [folder]


# With one: nobody is connected, so a run waits for its sites


class Coordinator:
    """`consilium server up` in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.config = found(folder)
        self.folder = folder

    def command(self, *arguments: object, group: bool = False) -> subprocess.Popen[str]:
        line = [sys.executable, "-P", "-c", "from common.cli import main; main()", "server", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [*line, "--server", str(self.config.path)],
            env=environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=group,
            # A shell that runs these tests in the background lets its children ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def call(self, *arguments: object) -> Result:
        with self.command(*arguments) as process:
            out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def status(self) -> dict[str, Any]:
        code, out, err = self.call("status", "--json")
        found: dict[str, Any] = json.loads(out)
        assert err == "" and code == (0 if found["up"] and not found["warnings"] else 1)
        return found

    def await_status(self, **wanted: Any) -> dict[str, Any]:
        end = time.monotonic() + 60
        while True:
            found = self.status()
            if found["run"] and all(found["run"][key] == value for key, value in wanted.items()):
                return found
            assert time.monotonic() < end, found

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[str]]:
        process = self.command("up")
        assert process.stderr is not None
        try:
            assert "hospitals reach it at" in process.stderr.readline()
            end = time.monotonic() + 60
            while not self.status()["up"]:
                assert process.poll() is None and time.monotonic() < end
            yield process
        finally:
            active = runs.active(self.config)
            if active is not None:
                os.kill(int(active.facts["pid"]), signal.SIGKILL)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=30)


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    """A coordinator that the slow tests share."""
    made = Coordinator(tmp_path_factory.mktemp("coordinator") / "chest")
    with made.running() as process:
        yield made
    assert process.returncode == 0


def gone(facts: dict[str, Any]) -> bool:
    return process_start(int(facts["pid"])) == ""


@pytest.mark.slow
def test_up_twice(coordinator: Coordinator) -> None:
    before = listing(coordinator.folder)
    fails(coordinator.call("up"), 1, "the coordinator is up already, as process ")
    after = listing(coordinator.folder)
    assert before.keys() == after.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"preset": "chest"}}, "plan.toml: preset: got 'chest', expected"),
        ({"model": {"backbone": "resnet1"}}, "plan.toml: --backbone: got 'resnet1', expected"),
        ({"model": {"weights": "best"}}, "plan.toml: --weights: got 'best'"),
        ({"training": {"strategy": "krum"}}, "plan.toml: --strategy krum: needs at least"),
    ],
)
def test_a_plan_that_cannot_be_settled(coordinator: Coordinator, changes: dict[str, Any], message: str) -> None:
    write_plan(coordinator.folder / "plan.toml", **changes)
    fails(coordinator.call("run", "plan.toml"), 2, message)
    assert list(coordinator.config.runs.iterdir()) == []


@pytest.mark.faults
def test_a_run_goes_on_whatever_becomes_of_who_looks_on(coordinator: Coordinator) -> None:
    write_plan(coordinator.folder / "plan.toml")
    with coordinator.command("run", "plan.toml", group=True) as process:
        started = coordinator.await_status(status="running")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "goes on; see `consilium server status`" in err and "Traceback" not in err and out == ""
    folder = Path(started["run"]["folder"])
    with coordinator.command("resume", folder, group=True) as process:  # it is looked on at
        time.sleep(3)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGHUP)  # as a terminal that is closed does
        process.communicate(timeout=30)

    found = coordinator.status()
    end = time.monotonic() + 60
    while any(site["at"]["at"] != "awaited" for site in found["sites"].values()):
        assert time.monotonic() < end
        found = coordinator.status()
    assert set(found) == {"schema", "name", "address", "up", "certificate", "sites", "run", "runs", "warnings"}
    assert (found["schema"], found["name"], found["up"], found["warnings"]) == (1, "chest", True, [])
    assert found["certificate"]["days_left"] > 390
    for site in found["sites"].values():
        assert {"connected", "state", "since", "at", "trouble"} < set(site)
        assert (site["connected"], site["state"], site["since"], site["trouble"]) == (False, "never seen", "", "")
    facts = {key: found["run"][key] for key in ("folder", "status", "pid", "round", "rounds", "done", "error")}
    expected = {"folder": str(folder), "status": "running", "pid": started["run"]["pid"], "round": 0, "rounds": 2}
    assert facts == {**expected, "done": 0, "error": ""}
    assert folder == coordinator.config.runs / "blobs-fedavg-1"
    code, out, err = coordinator.call("status")
    assert (code, err) == (0, "")
    assert "coordinator chest at 127.0.0.1:" in out and ": up; certificate good for " in out
    assert f"run {folder}: running, round 0 of 2" in out and "awaited" in out

    before = set(listing(coordinator.config.runs))
    fails(coordinator.call("run", "plan.toml"), 1, f"{folder}: this run is being driven; wait for its end")
    assert set(listing(coordinator.config.runs)) == before

    code, out, err = coordinator.call("stop", "--json")
    assert (code, err, json.loads(out)) == (0, "", {"folder": str(folder), "status": "stopped"})
    assert gone(found["run"])
    fails(coordinator.call("stop"), 2, "no run is going on")
    assert coordinator.status()["run"]["status"] == "stopped"
    code, out, err = coordinator.call("report")
    assert (code, err) == (0, "") and out.startswith("failed: stopped by the coordinator; ")

    used = coordinator.call("run", "plan.toml", "--output", folder)
    fails(used, 2, f"{folder}: the folder is in use; name another, or go on with `consilium server resume`")
    with coordinator.command("resume") as process:
        coordinator.await_status(status="running")
        assert coordinator.call("stop")[0] == 0
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.endswith("consilium: stopped by the coordinator; `consilium server resume` goes on where it was\n")
    log = (folder / "engine.log").read_text()
    assert "flwr" not in log and "Traceback" not in log
    assert log.count(" ERROR ") == 2 and str(coordinator.config.state) not in log


@pytest.mark.slow
@pytest.mark.faults
def test_a_folder_that_is_deleted_under_way(coordinator: Coordinator) -> None:
    write_plan(coordinator.folder / "plan.toml", sites={"patience_s": 4.0})
    folder = coordinator.folder / "deleted"
    with coordinator.command("run", "plan.toml", "--output", folder, "--quiet") as process:
        started = coordinator.await_status(folder=str(folder), status="running")["run"]
        for path in sorted(folder.iterdir()):
            path.unlink()
        folder.rmdir()
        out, err = process.communicate(timeout=60)
    fails((process.returncode, out, err), 1, "deleted: the run's folder is gone, so nothing of the run can be kept")
    end = time.monotonic() + 60
    while not gone(started):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert not folder.exists()


@pytest.mark.slow
def test_a_quorum_that_is_missed_names_who_and_why(coordinator: Coordinator) -> None:
    write_plan(coordinator.folder / "plan.toml", sites={"patience_s": 0.5})
    folder = coordinator.folder / "missed"
    result = coordinator.call("run", "plan.toml", "--output", folder, "--quiet")
    fails(result, 1, "setup: 0 of 2 sites gave a usable answer, the quorum is 2; north: lost: it is not connected; ask")
    assert "; south: lost: it is not connected; " in result[2] and "`consilium server resume` goes on" in result[2]
    document = json.loads((folder / "result.json").read_text())
    told = [warning["message"] for warning in document["warnings"] if warning["code"] == "site"]
    assert [text.partition(";")[0] for text in told] == [f"{name}: lost: it is not connected" for name in NAMES]
    found = coordinator.status()
    assert found["run"]["status"] == "failed" and found["run"]["error"] == document["error"]
    assert found["sites"]["north"]["trouble"].startswith("lost: it is not connected; ask the hospital")
    code, out, _ = coordinator.call("status")
    assert code == 0 and "north lost: it is not connected; " in out
    assert "it is not connected; ask the hospital" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_who_comes_late_is_let_in_at_once_and_what_is_recorded_stands(coordinator: Coordinator) -> None:
    from server.control import Control
    from server.enrolment import enrolled

    with Control(coordinator.config.endpoints) as control:
        end = time.monotonic() + 30
        while {node.name for node in control.nodes()} != set(NAMES):
            assert time.monotonic() < end
            time.sleep(0.1)
        code, _, err = coordinator.call("remove", "south")
        assert (code, err) == (0, "")
        assert {node.name for node in control.nodes()} == {"north"}
    assert [site.name for site in enrolled(coordinator.config)] == ["north"]

"""A site's monitor tells what the site's own documents say, whoever of its processes is gone; nothing of patients."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from client import audit, founding, monitor, status, up
from client.link_status import LOCK, WORDS, StatusFile
from client.site_config import SiteConfig, read_site
from common.exposition import OTHER, Sample, exposed
from common.files import write_json
from common.locks import exclusive
from common.messages import REFUSALS

ROOT = Path(__file__).parents[1]
DOES = {
    "state": "working",
    "phase": "features",
    "done": 3,
    "total": 12,
    "run": {"fingerprint": "f" * 64, "name": "Doe^Jane", "deadline_s": 9.0, "heard": 5.0, "round": 4},
    "refused": {"code": "budget", "at": 7.0},
    "memory": {"resident": 100, "gpu": 0},
    "turned_away": 2,
    "examples": {"train": 913},
}
Found = dict[str, dict[tuple[str, ...], float]]


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def config(tmp_path: Path) -> SiteConfig:
    (tmp_path / "images").mkdir()
    made = founding.found(tmp_path / "site", "st-anna", tmp_path / "images")
    (tmp_path / "site" / "link").mkdir()
    text = made.config.read_text() + f'\n[coordinator]\naddress = "127.0.0.1:1"\n[monitor]\nport = {free_port()}\n'
    made.config.write_text(text + "[policy]\nmax_epsilon = 8.0\n")
    return read_site(made.config)


def read(content: bytes) -> Found:
    found: Found = {}
    for family in text_string_to_metric_families(content.decode()):
        for one in family.samples:
            found.setdefault(one.name, {})[tuple(one.labels.values())] = one.value
    return found


def told(samples: Iterator[Sample]) -> Found:
    return read(exposed(monitor.FAMILIES, samples))


def holds(found: Found, name: str) -> list[str]:
    return [labels[-1] for labels, value in found[name].items() if value == 1]


def test_a_site_of_which_nothing_runs(config: SiteConfig) -> None:
    watch = monitor.Watch(config)
    found = told(watch.samples())
    assert found["consilium_site_daemon_up"] == {(): 0} and found["consilium_site_link_up"] == {(): 0}
    assert holds(found, "consilium_site_daemon_state") == ["unavailable"]
    assert holds(found, "consilium_site_link_state") == ["not_running"]
    assert found["consilium_site_epsilon_limit"] == {(): 8}
    assert found["consilium_site_audit_ok"] == found["consilium_site_ledger_ok"] == {(): 1}
    assert not {"consilium_site_run_active", "consilium_site_child_up", "consilium_site_run_epsilon"} & set(found)
    assert list(watch.missing()) == ["daemon_unavailable", "link_not_running"]


def test_a_site_at_work(config: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {**DOES, "since": time.time() - 60}
    monkeypatch.setattr(monitor, "ask", lambda _config: said)
    file = StatusFile(config.link_folder, config.name, "127.0.0.1:1")
    file.certificate(time.time() + 99)
    file.count(7, 9)
    file.say("connected")
    write_json_of_supervisor(config)
    with exclusive(config.link_folder / LOCK, "a link"), exclusive(up.logs(config) / "supervisor.lock", "it"):
        watch = monitor.Watch(config)
        found = told(watch.samples())
        assert list(watch.missing()) == []
    assert holds(found, "consilium_site_daemon_state") == ["working"]
    assert holds(found, "consilium_site_phase") == ["features"]
    assert holds(found, "consilium_site_refusal") == ["budget"]
    assert holds(found, "consilium_site_link_state") == ["connected"]
    expected = {
        "refusal_timestamp_seconds": 7,
        "run_active": 1,
        "run_round": 4,
        "run_heard_timestamp_seconds": 5,
        "phase_ratio": 0.25,
        "turned_away_total": 2,
        "daemon_resident_memory_bytes": 100,
        "daemon_gpu_memory_bytes": 0,
        "received_bytes_total": 9,
        "sent_bytes_total": 7,
    }
    assert {name: found[f"consilium_site_{name}"][()] for name in expected} == expected
    assert 60 <= found["consilium_site_phase_seconds"][()] < 70
    assert found["consilium_site_child_up"] == {("daemon",): 1, ("link",): 0}
    assert found["consilium_site_child_restarts_total"] == {("daemon",): 0, ("link",): 3}


def write_json_of_supervisor(config: SiteConfig) -> None:
    up.logs(config).mkdir()
    child = {"pid": 1, "started": 1.0, "restarts": 0, "last_exit": None}
    children = {"daemon": child, "link": {**child, "pid": None, "restarts": 3}}
    write_json(up.logs(config) / "supervisor.json", {"pid": 1, "started": 1.0, "children": children})


def test_nothing_tells_of_patients_or_texts(config: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {**DOES, "state": "Doe^Jane", "phase": "Doe^Jane", "refused": {"code": "Doe^Jane", "at": 1.0}}
    monkeypatch.setattr(monitor, "ask", lambda _config: said)
    watch = monitor.Watch(config)
    assert "Doe" not in exposed(monitor.FAMILIES, watch.samples()).decode()
    assert not [code for code in watch.missing() if code not in monitor.READY]
    content = exposed(monitor.FAMILIES, monitor._of_daemon({**said, "state": "working"})).decode()
    assert "Doe" not in content and "913" not in content
    assert holds(read(content.encode()), "consilium_site_refusal") == [OTHER]


def test_the_lists_are_those_of_daemon_and_link(config: SiteConfig) -> None:
    assert {*monitor.REFUSALS} == {*REFUSALS} - {"unavailable"}  # which the link says, not the daemon
    assert {*monitor.LINK} == {*WORDS, "not_joined", "unreadable", "not_running", "stuck"}
    source = (ROOT / "client" / "daemon.py").read_text().partition("def _state(")[2].partition("\ndef ")[0]
    assert {*re.findall(r'"([a-z]+)"', source)} | {"unavailable"} == {*monitor.DAEMON}


def test_how_a_link_is(config: SiteConfig) -> None:
    file = StatusFile(config.link_folder, config.name, "127.0.0.1:1")
    file.say("untrusted")
    found = status.status(config, {}).link
    assert monitor.link_state(config, found) == "not_running"
    with exclusive(config.link_folder / LOCK, "a link"):
        assert monitor.link_state(config, found) == "untrusted"
        path = config.link_folder / "status.json"
        write_json(path, {**json.loads(path.read_text()), "written": time.time() - 121})
        assert monitor.link_state(config, status.status(config, {}).link) == "stuck"
    (config.link_folder / LOCK).unlink()
    (config.link_folder / LOCK).symlink_to("nowhere")
    assert monitor.link_state(config, found) == "unreadable"


def test_a_damaged_trail_is_seen_and_what_a_run_spent(config: SiteConfig) -> None:
    audit.append(config.audit, "reply", {"epsilon": 1.5, "ledger_entries": 0})
    assert monitor.read_trail(config) == monitor.Trail(True, True, 1.5)
    config.audit.write_bytes(config.audit.read_bytes()[:-9])
    (config.state / "ledger.jsonl").write_text("x\n")
    assert monitor.read_trail(config) == monitor.Trail(False, False, None)
    config.audit.unlink()
    assert monitor.read_trail(config) == monitor.Trail(None, None, None)


def test_it_runs_beside_the_others_where_a_port_is_named(config: SiteConfig) -> None:
    assert [child.name for child in up.children(config)] == [*monitor.CHILDREN]
    config.path.write_text(re.sub("\nport = [0-9]+", "", config.path.read_text()))
    assert [child.name for child in up.children(read_site(config.path))] == ["daemon", "link"]


def test_it_needs_neither_torch_nor_flower() -> None:
    code = "import sys, client.monitor; print([name for name in ('torch', 'flwr', 'pydicom') if name in sys.modules])"
    command = [sys.executable, "-P", "-c", code]
    assert subprocess.check_output(command, env={"PYTHONPATH": str(ROOT)}, text=True) == "[]\n"


def test_a_monitor_without_a_port_says_so(config: SiteConfig, capfd: pytest.CaptureFixture[str]) -> None:
    config.path.write_text(re.sub("\nport = [0-9]+", "", config.path.read_text()))
    assert monitor.main([str(config.path)]) == 2
    assert "[monitor] port: missing or 0, expected a port such as 9464" in capfd.readouterr().err
    assert monitor.main([]) == 2


# ---------------------------------------------------------------------------------------------------- true processes


@contextmanager
def process(module: str, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(path.parent)}
    started = subprocess.Popen(
        [sys.executable, "-P", "-m", module, str(path)],
        env={**environment, "OMP_NUM_THREADS": "1"},
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        yield started
    finally:
        if started.poll() is None:
            started.kill()
        started.communicate()


def page(config: SiteConfig, path: str) -> tuple[int, bytes]:
    where = f"http://127.0.0.1:{config.toml.monitor.port}{path}"
    try:
        with urllib.request.urlopen(where, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except OSError:
        return 0, b""


def until(config: SiteConfig, state: str, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while holds(read(page(config, "/metrics")[1]) or {"consilium_site_daemon_state": {}}, _STATE) != [state]:
        assert time.monotonic() < end
        time.sleep(0.2)


_STATE = "consilium_site_daemon_state"


def lines(process: subprocess.Popen[bytes], number: int) -> list[dict[str, Any]]:
    """End a process, and return its lines."""
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    return [json.loads(line) for line in out.decode("ascii").splitlines()]


@pytest.mark.slow
@pytest.mark.faults
def test_a_daemon_that_hangs_or_dies_is_seen_in_time(config: SiteConfig) -> None:
    config.path.write_text(config.path.read_text() + '[logs]\nformat = "json"\n')
    with process("client.monitor", config.path) as watching, process("client.daemon", config.path) as daemon:
        until(config, "unusable")  # it has no images
        code, content = page(config, "/readyz")
        assert (code, json.loads(content)["codes"]) == (503, ["daemon_unusable", "link_not_running"])
        daemon.send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        while read(page(config, "/metrics")[1])["consilium_site_daemon_up"] != {(): 0}:
            assert time.monotonic() - begin < 20
        assert page(config, "/healthz")[0] == 200
        daemon.send_signal(signal.SIGCONT)
        until(config, "unusable")
        said = lines(daemon, signal.SIGTERM)
        assert {one["role"] for one in said} == {"daemon"} and {one["site"] for one in said} == {"st-anna"}
        until(config, "unavailable")
        said = lines(watching, signal.SIGTERM)
        assert watching.returncode == 0 and said[0]["role"] == "monitor" and len(said) == 1

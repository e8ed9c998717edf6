"""A coordinator's monitor tells what its status and the finished rounds say, also while its SuperLink hangs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from client import monitor as site_monitor
from client.link_status import WORDS
from common.errors import ConfigError
from common.exposition import OTHER, Sample, exposed
from common.files import write_atomic, write_json
from common.locks import exclusive
from common.run_config import RunConfig
from common.supervisor import SupervisorState, read_state
from server import founding, monitor, runs, up
from server.board import Board
from server.enrolment import Enrolled
from server.server_config import ServerConfig, read_server

ROOT = Path(__file__).parents[1]
Found = dict[str, dict[tuple[str, ...], float]]


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    public, operator, port = free_ports(3)
    where = f"127.0.0.1:{public}"
    made = founding.found(tmp_path / "chest", where, "chest", where, operator)
    made.config.write_text(made.config.read_text() + f'\n[monitor]\nport = {port}\n[logs]\nformat = "json"\n')
    return read_server(made.config)


def a_run(config: ServerConfig, name: str = "blobs") -> Path:
    values = {"task": {"name": name, "labels": ("a", "b")}, "sites": {"names": ("north", "south")}}
    return runs.make_folder(config, RunConfig.model_validate(values), None)


def entry(number: int, **sites: str) -> dict[str, Any]:
    """Return a finished round: status or status(code) by site."""
    told = {}
    for name, text in sites.items():
        status, _, code = text.rstrip(")").partition("(")
        told[name] = {"status": status, **({"reason": code} if code else {})}
    return {"round": number, "sites": told}


def add(folder: Path, *entries: dict[str, Any]) -> None:
    with (folder / "rounds.jsonl").open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in entries)


def read(content: bytes) -> Found:
    found: Found = {}
    for family in text_string_to_metric_families(content.decode()):
        for one in family.samples:
            found.setdefault(one.name, {})[tuple(one.labels.values())] = one.value
    return found


def told(samples: Iterable[Sample]) -> Found:
    return read(exposed(monitor.FAMILIES, samples))


def holds(found: Found, name: str) -> list[tuple[str, ...]]:
    return [labels for labels, value in found[name].items() if value]


def test_a_coordinator_that_is_not_up(config: ServerConfig) -> None:
    watch = monitor.Watch(config)
    found = told(watch.samples())
    assert found["consilium_coordinator_up"] == {(): 0}
    assert found["consilium_coordinator_sites_enrolled"] == {(): 0}
    assert holds(found, "consilium_coordinator_runs") == [] and "consilium_run_status" not in found
    assert found["consilium_coordinator_certificate_end_timestamp_seconds"][()] > time.time() + 86400 * 300
    assert set(found["consilium_coordinator_free_bytes"]) == {("state",), ("runs",)}
    assert list(watch.missing()) == ["superlink_unavailable"]
    config.certificate.unlink()
    (config.state / "sites.json").write_text("{")
    codes = list(monitor.Watch(config).missing())
    assert codes == ["superlink_unavailable", "certificate_unusable", "sites_unreadable"]
    assert {*codes} <= {*monitor.READY}


def test_a_run_as_board_and_rounds_have_it(config: ServerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.status.enrolled", lambda _config: tuple(map(enrolled_site, ("north", "south"))))
    folder = a_run(config)
    board = Board(folder, ("north", "south"), 5, 2)
    board.moved("north", 100, 40)
    board.progress("rounds", 2, 5)
    board.ended_round(7.5)
    board.judged("south", "lost", "absent", None)
    add(folder, entry(0, north="contributed"), entry(1, north="contributed", south="lost(absent)"))
    found = told(monitor.Watch(config).samples())
    name = folder.name
    assert holds(found, "consilium_run_status") == [(name, "running")]
    assert {labels[::-1] for labels in holds(found, "consilium_run_phase")} == {(name, "rounds")}
    expected = {"round": 3, "rounds": 5, "round_seconds": 7.5, "starts_total": 1, "quorum": 2, "sites_usable": 1}
    assert {key: found[f"consilium_run_{key}"][(name,)] for key in expected} == expected
    assert found["consilium_run_site_sent_bytes_total"] == {(name, "north"): 100, (name, "south"): 0}
    assert found["consilium_run_site_received_bytes_total"] == {(name, "north"): 40, (name, "south"): 0}
    assert {labels: value for labels, value in found["consilium_run_answers_total"].items() if value} == {
        ("", name, "contributed"): 1,
        ("absent", name, "lost"): 1,
    }
    assert found["consilium_coordinator_process_open_fds"][("engine",)] > 0  # this process stands for it
    assert found["consilium_coordinator_process_resident_memory_bytes"][("engine",)] > 1e6
    assert holds(found, "consilium_coordinator_site_state") == [("north", "never_seen"), ("south", "never_seen")]


def enrolled_site(name: str) -> Enrolled:
    return Enrolled.model_construct(name=name, public_key="", enrolled_at="")


def test_an_engine_that_is_gone_and_a_folder_of_any_name(config: ServerConfig) -> None:
    folder = a_run(config)
    Board(folder, ("north",), 5)
    facts = json.loads((folder / "progress.json").read_text())
    (folder / "progress.json").write_text(json.dumps({**facts, "process": "1", "phase": "Doe^Jane"}))
    folder.rename(config.runs / os.fsdecode(b'b"\n\xff'))
    found = told(monitor.Watch(config).samples())
    assert holds(found, "consilium_run_status") == [('b"\n\\udcff', "interrupted")]
    assert [labels[0] for labels in holds(found, "consilium_run_phase")] == [OTHER]
    assert "consilium_coordinator_process_open_fds" not in found


def test_children_of_the_supervisor(config: ServerConfig) -> None:
    up.logs(config).mkdir()
    child = {"pid": os.getpid(), "started": 1.0, "restarts": 4, "last_exit": -9}
    children = {"superlink": child, "keeper": {**child, "pid": None, "restarts": 0}}
    write_json(up.logs(config) / "supervisor.json", {"pid": 1, "started": 1.0, "children": children})
    with exclusive(up.logs(config) / "supervisor.lock", "it"):
        found = told(monitor.Watch(config).samples())
    assert found["consilium_coordinator_child_up"] == {("superlink",): 1, ("keeper",): 0}
    assert found["consilium_coordinator_child_restarts_total"] == {("superlink",): 4, ("keeper",): 0}
    assert found["consilium_coordinator_process_open_fds"][("superlink",)] > 0
    assert "consilium_coordinator_child_up" not in told(monitor.Watch(config).samples())


texts = st.sampled_from(
    ["contributed", "lost(absent)", "refused(budget)", "quarantined(not_finite)", "lost(new)", "new(busy)"]
)


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.lists(texts, max_size=3), max_size=6), cut=st.integers(0, 5))
def test_reading_what_was_added_counts_as_reading_all(
    parts: list[list[str]], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    one = monitor.Rounds()
    number = 0
    for part in parts:
        for text in part:
            number += 1
            add(folder, entry(number, north=text))
        assert one.answers(folder) == monitor.Rounds().answers(folder)
        if number % 3 == cut % 3 and (folder / "rounds.jsonl").exists():  # a resume cuts it back, in another file
            kept = (folder / "rounds.jsonl").read_bytes().splitlines(keepends=True)[:cut]
            write_atomic(folder / "rounds.jsonl", b"".join(kept))
            assert one.answers(folder) == monitor.Rounds().answers(folder)
    assert all(status in (*monitor.ANSWERS, "new") for status, _ in one.answers(folder))


def test_damaged_and_unfinished_rounds_are_left_out(tmp_path: Path) -> None:
    add(tmp_path, entry(1, north="contributed"))
    with (tmp_path / "rounds.jsonl").open("ab") as file:
        file.write(b'{}\nx\n[1]\n{"round": 2, "sites": {"north": 1}}\n{"round": 2, "sites": {"north": {"status": "lo')
    one = monitor.Rounds()
    assert one.answers(tmp_path) == {("contributed", ""): 1}
    with (tmp_path / "rounds.jsonl").open("ab") as file:
        file.write(b'st", "reason": "deadline"}}}\n')
    assert one.answers(tmp_path) == {("contributed", ""): 1, ("lost", "deadline"): 1}
    assert one.answers(tmp_path / "no") == {}


def test_it_runs_beside_the_others_where_a_port_is_named(config: ServerConfig) -> None:
    assert [child.name for child in up._children(config)] == [*monitor.CHILDREN]
    config.path.write_text(re.sub("\nport = [0-9]+", "\nport = 0", config.path.read_text()))
    assert [child.name for child in up._children(read_server(config.path))] == ["superlink", "keeper"]
    assert monitor.main([str(config.path)]) == monitor.main([]) == 2


def test_a_port_that_the_superlink_has_is_refused(config: ServerConfig) -> None:
    text = re.sub("\nport = [0-9]+", f"\nport = {config.operator_port}", config.path.read_text())
    config.path.write_text(text)
    with pytest.raises(ConfigError, match=r"^server\.toml: \[monitor\] port: got .*, the port of \[network\] operator"):
        read_server(config.path)


# ------------------------------------------------------------------------------------------------------ what is written


FAMILIES = (*site_monitor.FAMILIES, *monitor.FAMILIES)


def test_names_follow_the_conventions() -> None:
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    for family in FAMILIES:
        assert re.fullmatch(r"consilium_(site|coordinator|run)_[a-z_]+", family.name)
        assert family.help.endswith(".") and "\n" not in family.help
        for word in ("milli", "_kb", "_mb", "_ms", "minutes", "percent"):
            assert word not in family.name


def test_the_manual_lists_every_metric_as_the_code_has_it() -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `consilium_")]
    listed = [(cells[0].strip("`"), tuple(re.findall("`([a-z]+)`", cells[1])), cells[2]) for cells in rows]
    assert listed == [(family.name, family.labels, family.help) for family in FAMILIES]


@pytest.mark.parametrize(("role", "codes"), [("hospital", site_monitor.READY), ("coordinator", monitor.READY)])
def test_the_manual_lists_every_code_of_readiness(role: str, codes: tuple[str, ...]) -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text()
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {role} |"))
    listed = re.findall("`([a-z_]+)`", row.rpartition("|")[0].rpartition("|")[2])
    own = [code for code in codes if code.removeprefix("link_") not in WORDS]  # what a link says has a table of its own
    assert listed == own


def test_alerts_ask_for_metrics_and_labels_that_are_told() -> None:
    known = {family.name: {*family.labels} for family in FAMILIES}
    groups = yaml.safe_load((ROOT / "deploy" / "prometheus-alerts.yaml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 15
    for rule in rules:
        assert (
            {"alert", "expr", "labels", "annotations"} <= set(rule) <= {"alert", "expr", "labels", "annotations", "for"}
        )
        assert set(rule["annotations"]) == {"summary", "remedy"}
        asked = re.findall(r"\b(consilium_[a-z_]+|up)\b(?:\{([^}]*)\})?", rule["expr"])
        assert asked, rule
        for name, selector in asked:
            if name != "up":
                assert {*re.findall(r"([a-z]+)(?:=|!)", selector)} <= known[name], rule
        shown = {*re.findall(r"\$labels\.([a-z]+)", str(rule["annotations"]))}
        assert shown <= {"instance", "job"}.union(*(known.get(name, set()) for name, _ in asked)), rule
        assert rule["expr"].count("(") == rule["expr"].count(")")


def test_alerts_ask_for_states_that_there_are() -> None:
    states = {
        *("state", "code", "status"),
        *(site_monitor.DAEMON + site_monitor.LINK + site_monitor.REFUSALS + monitor.SITE + monitor.RUN),
        *monitor.ANSWERS,
    }
    text = (ROOT / "deploy" / "prometheus-alerts.yaml").read_text()
    for values in re.findall(r'(?:state|code|status)!?=~?"([^"]*)"', text):
        assert {*values.split("|")} <= states, values


def test_the_jobs_are_those_that_alerts_name() -> None:
    found = yaml.safe_load((ROOT / "deploy" / "prometheus.yaml").read_text())
    jobs = [job["job_name"] for job in found["scrape_configs"]]
    assert jobs == ["consilium-site", "consilium-coordinator"]
    for job in found["scrape_configs"]:
        assert [target.split(":")[0] for one in job["static_configs"] for target in one["targets"]] == ["127.0.0.1"]


# ------------------------------------------------------------------------------------------------------ true processes


def page(config: ServerConfig, path: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{config.toml.monitor.port}{path}", timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except OSError:
        return 0, b""


def until(config: ServerConfig, name: str, labels: tuple[str, ...], value: float, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while read(page(config, "/metrics")[1]).get(name, {}).get(labels) != value:
        assert time.monotonic() < end
        time.sleep(0.2)


HOSTILE = (b"\x16\x03\x01\n\xff\r\n\r\n", b"GET /\x1b[31m\x85 HTTP/1.1\r\n\r\n", b"\n" * 9, b"{\n" * 9)


def shout(config: ServerConfig) -> None:
    """Send what is no request to the SuperLink."""
    for content in HOSTILE:
        with socket.create_connection(("127.0.0.1", config.operator_port), timeout=10) as one:
            one.sendall(content)


@contextmanager
def running(config: ServerConfig) -> Iterator[SupervisorState]:
    """Run a coordinator, and read all that its processes said."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "server.up", "up", str(config.path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        until(config, "consilium_coordinator_up", (), 1)
        state = read_state(up.logs(config))
        assert state is not None
        yield state
    finally:
        process.terminate()
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    logs = {path.stem: path.read_bytes() for path in up.logs(config).glob("*.log")}
    for role, content in {**logs, "supervisor": out}.items():
        assert {json.loads(line)["role"] for line in content.decode("ascii").splitlines()} <= {role}
    assert b"consilium.supervisor" in out and b"metrics and health" in logs["monitor"]


@pytest.mark.slow
def test_a_real_coordinator_is_watched_and_every_line_is_json(config: ServerConfig) -> None:
    with running(config) as state:
        assert set(state.children) == {"superlink", "keeper", "monitor"}
        assert page(config, "/readyz") == (200, b'{"ready": true, "codes": []}\n')
        shout(config)
    assert b"Invalid HTTP request" in (up.logs(config) / "superlink.log").read_bytes()


@pytest.mark.slow
@pytest.mark.faults
def test_a_superlink_that_hangs_or_dies_is_seen_in_time(config: ServerConfig) -> None:
    with running(config) as state:
        superlink = state.children["superlink"].pid
        assert superlink is not None
        os.kill(superlink, signal.SIGSTOP)
        begin = time.monotonic()
        until(config, "consilium_coordinator_up", (), 0, 25)
        code, content = page(config, "/readyz")
        assert (code, json.loads(content)["codes"]) == (503, ["superlink_unavailable"])
        assert time.monotonic() - begin < 40
        os.kill(superlink, signal.SIGCONT)
        until(config, "consilium_coordinator_up", (), 1)
        os.kill(superlink, signal.SIGKILL)
        until(config, "consilium_coordinator_child_restarts_total", ("superlink",), 1)
        until(config, "consilium_coordinator_up", (), 1)

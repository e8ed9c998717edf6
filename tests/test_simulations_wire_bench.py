"""The bench of the wire: the tap counts every byte, and the tables say what was measured."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from common.messages import Describe, Evaluate, Freeze, Statistics, Train, Trained
from common.run_config import RunConfig, Sites, Task
from server.admission import Declared, Expectation, admit_evaluation, admit_sums, admit_update
from simulations import wire_bench
from simulations.compare import Findings, Row
from simulations.light_sites import LightSite
from simulations.observed import Held, Sample, held, watched
from simulations.tap import Counts, tapped
from simulations.wire_stage import Journey, Mark

ROOT = Path(__file__).parents[1]


@pytest.fixture
def echo():
    """The port of a server that sends back twice what it is sent, and then closes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    while data := connection.recv(65536):
                        connection.sendall(2 * data)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def exchange(port, content):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        received = []

        def read():
            while data := connection.recv(65536):
                received.append(data)

        reader = threading.Thread(target=read)
        reader.start()
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        reader.join()
    return b"".join(received)


@pytest.mark.slow
def test_a_tap_counts_every_byte_both_ways_and_changes_none(echo):
    content = np.random.default_rng(0).bytes(3_000_001)
    with tapped(echo) as tap:
        assert tap.counts == Counts(0, 0, 0)
        assert sorted(exchange(tap.port, content)) == sorted(2 * content)
        assert tap.counts == Counts(3_000_001, 6_000_002, 1)
        assert exchange(tap.port, b"x") == b"xx"
        assert tap.counts == Counts(3_000_002, 6_000_004, 2)


def test_a_tap_before_nobody_closes_and_counts_nothing():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tapped(port) as tap, socket.create_connection(("127.0.0.1", tap.port)) as connection:
        assert connection.recv(1) == b""
        assert tap.counts == Counts(0, 0, 1)


def test_a_tap_ends_also_while_a_connection_is_open(echo):
    before = threading.active_count()
    with tapped(echo) as tap:
        connection = socket.create_connection(("127.0.0.1", tap.port))
        connection.sendall(b"abc")
        assert connection.recv(6)
    with connection:
        connection.settimeout(5)
        while connection.recv(100):
            pass
    assert threading.active_count() == before


def test_what_this_process_holds_is_read_and_a_missing_one_is_none():
    code = "import threading; f = [open('/dev/null') for _ in range(20)]; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        found = held(other.pid)
        other.communicate(b"\n")
    assert found.rss > 2e6 and 0 < found.pss <= found.rss
    assert (found.files, found.threads) == (23, 1)
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    assert held(child.pid) is None


def test_processes_are_sampled_until_the_block_ends():
    with watched(lambda: {"me": os.getpid(), "gone": 2**22 + 1}, 0.01) as samples:
        end = time.monotonic() + 20
        while len(samples) < 3 and time.monotonic() < end:
            time.sleep(0.01)
    count = len(samples)
    assert count >= 3 and set(samples[0].held) == {"me"}
    assert samples[0].total == samples[0].held["me"]
    time.sleep(0.05)
    assert len(samples) == count


def journey(up=100, down=200, missed=()):
    """Two rounds of two sites, each of which passes `up` and `down` a phase, half of it in the set-up."""
    steps = [("starting", 0), ("trunk", 0), ("statistics", 0), ("rounds", 0), ("rounds", 1), ("rounds", 2), ("test", 0)]
    marks = [
        Mark(phase, done, float(at), {"a": Counts(at * up, at * down, 1), "b": Counts(at * up, 2 * at * down, 1)})
        for at, (phase, done) in enumerate(steps)
    ]
    return Journey(tuple(mark for mark in marks if (mark.phase, mark.done) not in missed), 2, Path())


def test_bytes_are_those_between_the_marks():
    found = wire_bench.round_bytes(journey(), 400)
    assert found == [{"down": 200, "up": 100, "ratio": 0.75}, {"down": 400, "up": 100, "ratio": 1.25}]
    assert wire_bench.set_up_bytes(journey()) == [600, 1000]
    assert wire_bench.phase_bytes(journey()) == {
        "starting": 800, "trunk": 800, "statistics": 800, "rounds": 2400,
    }  # fmt: skip
    assert journey().round_seconds() == [1.0, 1.0]
    assert journey(missed=[("rounds", 2)]).round_seconds() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("ratio", "second", "met"),
    [
        (1.01, 500, [True, True, True, True]),
        (1.04, 500, [False, False, True, True]),
        (0.7, 500, [False, True, True, True]),  # less than the weights: something was not sent
        (1.01, 500_000, [True, True, True, False]),  # the trunk came again
    ],
)
def test_rows_of_bytes(ratio, second, met):
    facts = {
        "payload_bytes": 1_000_000,
        "trunk_bytes": 600_000,
        "rounds": [[{"ratio": 1.005}], [{"ratio": ratio}]],
        "set_up_bytes": [[610_000], [second]],
    }
    assert [row.met for row in wire_bench.bytes_rows(facts)] == met


@pytest.mark.parametrize(("ours", "met"), [([9.0, 1.0, 1.0], True), ([1.0, 4.0, 4.0], False)])
def test_the_first_round_does_not_count(ours, met):
    rows = wire_bench.round_rows({"ours": ours, "plain": [9.0, 6.0, 6.0]})
    assert rows[-1].met is met


def test_peaks_are_those_of_each_round():
    samples = [
        Sample(at, {"engine": Held(rss, rss // 2, 1, 1), "superlink": Held(100, 50, 1, 1)})
        for at, rss in ((2.9, 900), (3.1, 10), (3.9, 30), (4.5, 20), (5.5, 800))
    ]
    found = wire_bench.peaks(samples, journey())
    assert found == [
        {"engine": 30, "superlink": 100, "sum": 130, "sum_pss": 65},
        {"engine": 20, "superlink": 100, "sum": 120, "sum_pss": 60},
    ]
    facts = {"rounds": found, "sites": 2, "upper_bytes": 40, "seconds": [1.0]}
    assert [row.met for row in wire_bench.coordinator_rows(facts)] == [True, True, None]
    grown = [*found, {**found[0], "sum": 2_000_000_000}]
    assert [row.met for row in wire_bench.coordinator_rows({**facts, "rounds": grown})] == [False, False, None]


def test_a_leak_of_one_site_is_seen():
    def process(grows):
        return [{"rss": 1000 + grows * n, "files": 9 + grows * n, "threads": 4} for n in range(50)]

    facts = {"rounds": 50, "processes": {f"{kind} {site}": process(0) for kind in ("daemon", "link") for site in "ab"}}
    assert [row.met for row in wire_bench.site_rows(facts)] == [True] * 6
    facts["processes"]["daemon b"] = process(5)
    assert [row.met for row in wire_bench.site_rows(facts)] == [False, False, True, True, True, True]


def test_what_a_site_held_is_taken_as_each_round_ends():
    samples = [Sample(at, {"daemon a": Held(int(at * 10), 0, 1, 1)}) for at in (3.0, 4.1, 4.9)]
    found = wire_bench.over_rounds(samples, journey())
    assert [entry["rss"] for entry in found["daemon a"]] == [41, 49]


def test_answers_of_a_light_site_are_admitted_and_differ_between_sites_and_rounds():
    run = RunConfig(task=Task(labels=("no", "yes")), sites=Sites(names=("a",)))
    first, second = LightSite("a", 6), LightSite("b", 6)
    support = first.answer(Describe(run.to_toml())).support
    request = Statistics("f", np.ones(2), gram=True)
    admit_sums(first.answer(request), request, support[0], 6)
    edges = np.linspace(-3, 3, 9)[None]
    admit_evaluation(first.answer(Evaluate("f", "test", np.zeros(50, np.float32), edges)), Declared(support[2]), edges)
    examples = int(support[0].sum())
    updates = [
        admit_update(
            site.answer(Train("f", number, np.zeros(50, np.float32), edges)),
            Expectation({"w": (5, 10)}, "float32", examples, round=number),
        )["w"].tobytes()
        for site in (first, second)
        for number in (1, 2)
    ]
    assert len(set(updates)) == 4
    assert isinstance(first.answer(Train("f", 1, np.zeros(50, np.float32), edges)), Trained)
    assert type(first.answer(Freeze("f", np.zeros(6), np.ones(6), np.ones(2)))).__name__ == "Done"


def test_the_command_writes_every_figure(tmp_path, monkeypatch):
    made = Findings({"figure": 1.5}, [Row("figure", "1.5", "at most 2", True)])
    monkeypatch.setattr(wire_bench, "SECTIONS", {"site": lambda bench: made})
    path = tmp_path / "found.json"
    done = CliRunner().invoke(wire_bench.main, ["--section", "site", "--json", str(path)], catch_exceptions=False)
    assert done.exit_code == 0 and "met" in done.output
    assert json.loads(path.read_bytes())["site"]["figure"] == 1.5


@pytest.mark.parametrize("options", [["--rounds", "1"], ["--sites", "0"], ["--section", "nothing"]])
def test_what_cannot_be_measured_is_refused(options):
    assert CliRunner().invoke(wire_bench.main, options).exit_code


@pytest.mark.slow
@pytest.mark.faults
def test_a_small_run_of_the_site_section_ends_with_its_figures_and_leaves_nothing():
    with tempfile.TemporaryDirectory(prefix="wire-") as name:  # short: the path of a socket has 107 bytes
        path = Path(name, "found.json")
        command = [sys.executable, "-P", "-m", "simulations.wire_bench", "--section", "site", "--rounds", "3"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": name}
        done = subprocess.run([*command, "--json", str(path)], env=environment, capture_output=True, timeout=600)
        assert done.returncode == 0, done.stderr
        processes = json.loads(path.read_bytes())["site"]["processes"]
        assert len(processes) == 4 and all(len(rounds) == 3 for rounds in processes.values())
        assert not list(Path(name).glob("consilium*"))  # torch may keep a folder of its own there
        marked = f"TMPDIR={name}".encode()
        assert not [place for place in Path("/proc").glob("[0-9]*/environ") if marked in _read(place)]


def _read(path):
    try:
        return path.read_bytes().split(b"\0")
    except OSError:
        return []

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common import locks
from common.rotated import Rotated
from common.supervisor import read_state

ROOT = Path(__file__).parent.parent
SCRIPT = """
import sys, json
from pathlib import Path
from common.errors import ConsiliumError
from common.supervisor import Child, supervise
children = [Child(name, (sys.executable, "-c", code)) for name, code in json.loads(sys.argv[2]).items()]
try:
    supervise(children, Path(sys.argv[1]), patience=float(sys.argv[3]), report=lambda line: print(line, flush=True))
except ConsiliumError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""
SLEEP = "import time; print('here', flush=True); time.sleep(600)"
Start = Callable[..., "subprocess.Popen[str]"]


def until(truth: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not truth():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pid_of(logs: Path, name: str = "a") -> int:
    state = None
    until(lambda: (logs / "supervisor.json").exists())
    until(lambda: (state := read_state(logs)) and name in state.children and state.children[name].pid)
    state = read_state(logs)
    assert state is not None
    pid = state.children[name].pid
    assert pid is not None
    return pid


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    processes = []

    def run(children: dict[str, str], logs: Path = tmp_path / "logs", patience: float = 10.0) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(logs), json.dumps(children), str(patience)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def test_what_children_write_is_kept_and_a_signal_ends_all(tmp_path: Path, start: Start) -> None:
    process = start({"a": SLEEP, "b": SLEEP})
    logs = tmp_path / "logs"
    pids = [pid_of(logs, "a"), pid_of(logs, "b")]
    until(lambda: all((logs / f"{name}.log").exists() for name in "ab"))
    until(lambda: (logs / "a.log").read_text() == "here\n")
    state = read_state(logs)
    assert state is not None
    assert state.running
    assert state.pid == process.pid
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert not any(alive(pid) for pid in pids)
    state = read_state(logs)
    assert state is not None
    assert not state.running
    assert {child.last_exit for child in state.children.values()} == {-signal.SIGTERM}
    assert (logs / "a.log").stat().st_mode & 0o777 == 0o600
    assert logs.stat().st_mode & 0o777 == 0o700


def test_an_interrupt_ends_all_as_well(tmp_path: Path, start: Start) -> None:
    process = start({"a": SLEEP})
    pid = pid_of(tmp_path / "logs")
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
    assert not alive(pid)


def test_children_do_not_outlive_a_killed_supervisor(tmp_path: Path, start: Start) -> None:
    process = start({"a": "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"})
    pid = pid_of(tmp_path / "logs")
    process.kill()
    process.wait()
    until(lambda: not alive(pid), 5)


@pytest.mark.slow
def test_what_dies_is_started_again_with_a_growing_delay(tmp_path: Path, start: Start) -> None:
    process = start({"a": "import sys; sys.exit(1)", "b": SLEEP})
    logs = tmp_path / "logs"
    other = pid_of(logs, "b")
    begin = time.monotonic()

    def restarts() -> int:
        state = read_state(logs)
        return state.children["a"].restarts if state else 0

    until(lambda: restarts() >= 2, 10)
    assert 2.5 < time.monotonic() - begin < 8  # 1 s, then 2 s
    state = read_state(logs)
    assert state is not None
    assert state.children["a"].last_exit == 1
    assert pid_of(logs, "b") == other
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=10)
    assert "a: ended with exit code 1; starts again in 2 s" in said


@pytest.mark.slow
def test_a_child_that_does_not_end_is_killed_with_its_own_children(tmp_path: Path, start: Start) -> None:
    stubborn = (
        "import signal,subprocess,sys,time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True)\n"
        "time.sleep(600)"
    )
    process = start({"a": stubborn}, patience=1.0)
    log = tmp_path / "logs" / "a.log"
    until(lambda: log.exists() and log.read_text().strip())
    grandchild = int(log.read_text())
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert 0.9 < time.monotonic() - begin < 4
    until(lambda: not alive(grandchild), 5)


def test_what_a_dead_child_left_behind_is_ended(tmp_path: Path, start: Start) -> None:
    leaves = (
        "import subprocess,sys,os,time\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True)\n"
        "os._exit(1)"
    )
    start({"a": leaves})
    log = tmp_path / "logs" / "a.log"
    until(lambda: log.exists() and log.read_text().strip())
    until(lambda: not alive(int(log.read_text().split()[0])), 5)


def test_a_wrong_configuration_ends_all_with_its_words(tmp_path: Path, start: Start) -> None:
    wrong = (
        "import sys; print('noise', file=sys.stderr); print('consilium: node.key: missing', file=sys.stderr); exit(2)"
    )
    process = start({"b": SLEEP, "a": wrong})
    _, said = process.communicate(timeout=10)
    assert process.returncode == 2
    assert said == "a cannot run as configured: node.key: missing\n"
    state = read_state(tmp_path / "logs")
    assert state is not None
    assert state.children["b"].pid is None


def test_two_supervisors_of_one_folder_cannot_run(tmp_path: Path, start: Start) -> None:
    first = start({"a": SLEEP})
    pid_of(tmp_path / "logs")
    second = start({"a": SLEEP})
    _, said = second.communicate(timeout=10)
    assert second.returncode == 1
    assert said == f"a supervisor of a runs already, as process {first.pid}; stop that one first: kill {first.pid}\n"


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert locks.holder(path) is None
    with locks.exclusive(path, "this"):
        assert locks.holder(path) == str(os.getpid())
    assert locks.holder(path) is None


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_log_is_bounded_and_keeps_its_end(tmp_path: Path, kept: int) -> None:
    log = Rotated(tmp_path / "x.log", limit=100, kept=kept)
    for number in range(200):
        log.write(f"{number:08}\n".encode())
    log.write(b"z" * 250)
    log.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == kept + 1
    assert all(file.stat().st_size <= 100 for file in files)
    assert (tmp_path / "x.log").read_bytes() == b"z" * 50


def test_a_state_that_is_damaged_is_said_to_be(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None
    for content in ("", "[]", "{}", '{"pid": 1, "started": 0, "children": {"a": {}}}', "\ud800"):
        (tmp_path / "supervisor.json").write_bytes(content.encode("utf-8", "surrogatepass"))
        with pytest.raises(OSError, match="damaged"):
            read_state(tmp_path)

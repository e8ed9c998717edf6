"""Decoding processes that are stopped, killed and starved: every file has one outcome, and the asking process lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.identity import Identity
from client.image import CODES, IGNORED
from client.pool import Limits, Pool
from client.worker import Task
from common.presets import GENERIC

pytestmark = pytest.mark.slow

TASK = Task(Identity(b"s" * 32), GENERIC, 32, frozenset())


def pictures(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(np.full((40, 40), number, np.uint8)).save(path)
    return paths


def test_a_task_is_read_as_it_was_written() -> None:
    task = Task(Identity(b"k" * 32), GENERIC, 64, frozenset({b"a" * 16, b"b" * 16}))
    assert Task.parse(task.text()) == task


def test_every_file_has_one_outcome_whatever_it_is(tmp_path: Path) -> None:
    paths = pictures(tmp_path, 6)
    names = [b"\xff\xfe.png", b"line\nbreak.png", b"x" * 250]
    for number, name in enumerate(names):
        odd = tmp_path / os.fsdecode(name)
        odd.write_bytes(paths[number].read_bytes())
        paths.append(odd)
    broken = [tmp_path / "absent", tmp_path / "empty", tmp_path / "text"]
    broken[1].write_bytes(b"")
    broken[2].write_bytes(b"no image")
    with Pool(TASK, workers=2) as pool:
        found = {read.number: read for read in pool.read([*paths, *broken])}
    assert sorted(found) == list(range(len(paths) + len(broken)))
    assert [found[number].entry.code for number in range(len(paths))] == [""] * len(paths)
    assert [found[len(paths) + n].entry.code for n in range(3)] == ["missing", "empty", "not_an_image"]
    assert all((read.pixels is None) == (read.entry.code in {**CODES, **IGNORED}) for read in found.values())


@pytest.mark.parametrize(("sign", "lost"), [(signal.SIGKILL, 0), (signal.SIGSTOP, 1)])
def test_a_process_that_dies_or_hangs_costs_at_most_its_file(tmp_path: Path, sign: signal.Signals, lost: int) -> None:
    paths = pictures(tmp_path, 30)
    with Pool(TASK, workers=1, limits=Limits(base_s=1.0)) as pool:
        results = pool.read(paths)
        found = [next(results)]
        os.kill(pool._workers[0].process.pid, sign)  # a process that this pool started
        found += results
        assert pool.started == 2
    assert sorted(read.number for read in found) == list(range(30))
    codes = [read.entry.code for read in found if read.entry.code]
    assert codes == ["timeout"] * lost


def test_memory_beyond_the_limit_is_a_code_and_not_a_death(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((9000, 9000), np.uint8)).save(tmp_path / "big.png", compress_level=1)
    small = pictures(tmp_path, 2)
    with Pool(TASK, workers=1, limits=Limits(memory=600 * 2**20)) as pool:
        found = {read.number: read.entry.code for read in pool.read([tmp_path / "big.png", *small])}
    assert found[1] == found[2] == ""
    assert found[0] in ("", "too_large", "crashed")


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    script = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from client.pool import Pool; from client.worker import Task\n"
        "from client.identity import Identity; from common.presets import GENERIC\n"
        "pool = Pool(Task(Identity(bytes(32)), GENERIC, 16, frozenset()), workers=1)\n"
        "list(pool.read([Path(sys.argv[1]) / '0.png']))\n"
        "print(pool._workers[0].process.pid, flush=True); time.sleep(60)\n"
    )
    root = str(Path(__file__).parents[1])
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path), root], stdout=subprocess.PIPE) as asking:
        assert asking.stdout is not None
        child = int(asking.stdout.readline())
        asking.kill()
        asking.wait()
    end = time.monotonic() + 10
    while Path(f"/proc/{child}/stat").exists() and time.monotonic() < end:
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break  # dead, and waiting for whoever inherited it
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{child}/stat").exists()

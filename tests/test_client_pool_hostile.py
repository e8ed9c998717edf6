"""Decoding processes that hang, die, lie or are told too much: every file has one outcome, and the others are read."""

from __future__ import annotations

import os
import pickle
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from client.identity import Identity
from client.image import CODES
from client.pool import Limits, Pool, Read
from client.records import RECORD
from client.worker import SIZE, Task
from common.errors import ConsiliumError
from common.presets import GENERIC
from simulations.encodings import SYNTAXES, film, write

pytestmark = pytest.mark.slow

TASK = Task(Identity(b"s" * 32), GENERIC, 16, frozenset())
QUICK = Limits(base_s=1.5)
ROOT = Path(__file__).resolve().parents[1]

DOUBLE = f"""#!{sys.executable}
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from client import worker

source, sink = (os.fdopen(int(number), mode) for number, mode in zip(sys.argv[4:6], ("rb", "wb")))
worker._next(source)
worker.end_with_parent()
task = worker.Task.parse(worker._next(source))
if not {{ready}}:
    sys.exit(1)
sink.write(b"H")
sink.flush()
while name := worker._next(source):
    path = Path(os.fsdecode(name))
    if path.name.startswith("hang"):
        time.sleep(600)
    if path.name.startswith("die"):
        os.kill(os.getpid(), 9)
    if path.name.startswith("once"):
        flag = path.with_name("flag-" + path.name)
        if not flag.exists():
            flag.touch()
            os.kill(os.getpid(), 9)
    if path.name.startswith("say"):
        sink.write(path.read_bytes())
        sink.flush()
        time.sleep(600)
    if path.name.startswith("chatter"):
        while True:
            sink.write(path.read_bytes())
            sink.flush()
            time.sleep(0.05)
    record, pixels = worker.look(path, task, sink)
    sink.write(b"R" + record + pixels)
    sink.flush()
"""
"""A process that decodes as the true one does, but for files whose names tell it to do something else."""


@pytest.fixture
def double(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path_factory.mktemp("double") / "python"
    script.write_text(DOUBLE.replace("{ready}", "True"))
    script.chmod(0o755)
    monkeypatch.setattr("client.pool.sys.executable", str(script))


def good(path: Path, seed: int = 0) -> Path:
    Image.fromarray(film(20, 30, 8, seed)).save(path, "PNG")
    return path


def outcomes(paths: list[Path], limits: Limits = QUICK, workers: int = 2) -> dict[str, str]:
    """Return the code of each file, by name; each has exactly one."""
    found: dict[str, str] = {}
    with Pool(TASK, workers, limits) as pool:
        for read in pool.read(paths):
            assert paths[read.number].name not in found
            found[paths[read.number].name] = read.entry.code
            assert (read.pixels is None) is bool(read.entry.code)
    assert set(found) == {path.name for path in paths}
    return found


# --- processes that hang, die and lie ---------------------------------------------------------------------------


def test_one_that_dies_once_is_read_and_one_that_dies_twice_is_given_up(tmp_path: Path, double: None) -> None:
    names = ("a", "once1", "b", "die", "c", "once2", "d")
    found = outcomes([good(tmp_path / name, n) for n, name in enumerate(names)])
    assert found.pop("die") == "crashed"
    assert set(found.values()) == {""}


class _Planted:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(Path(__file__).parent / "unpickled"),)


ANNOUNCED = b"A" + SIZE.pack(1000)


@pytest.mark.parametrize(
    "said",
    [
        b"no protocol at all",
        pickle.dumps(_Planted()),
        b"R" + pickle.dumps(_Planted()).ljust(RECORD.itemsize, b"\0"),
        b"R" + b"\xff" * RECORD.itemsize,
        b"R" + b"a patient's name".ljust(RECORD.itemsize, b"\0"),
        b"H",
        b"A" + SIZE.pack(2**63),
        ANNOUNCED + ANNOUNCED,
        b"\0" * 2**18,
    ],
)
def test_one_that_talks_nonsense_is_ended(tmp_path: Path, double: None, said: bytes) -> None:
    (tmp_path / "say").write_bytes(said)
    begin = time.monotonic()
    found = outcomes([good(tmp_path / "a"), tmp_path / "say", good(tmp_path / "b")], Limits(base_s=60.0))
    assert found == {"a": "", "say": "crashed", "b": ""}
    assert time.monotonic() - begin < 30
    assert not (Path(__file__).parent / "unpickled").exists()


@pytest.mark.parametrize("said", [b"R", b"R" + bytes(100), ANNOUNCED[:4]])
def test_one_that_breaks_off_is_a_timeout(tmp_path: Path, double: None, said: bytes) -> None:
    (tmp_path / "say").write_bytes(said)
    assert outcomes([good(tmp_path / "a"), tmp_path / "say"]) == {"a": "", "say": "timeout"}


def test_announcements_do_not_buy_time_for_ever(tmp_path: Path, double: None) -> None:
    (tmp_path / "chatter").write_bytes(ANNOUNCED)
    begin = time.monotonic()
    assert outcomes([tmp_path / "chatter"])["chatter"] == "crashed"
    assert time.monotonic() - begin < 20


def test_a_caller_that_pauses_loses_nothing(tmp_path: Path, double: None) -> None:
    paths = [good(tmp_path / str(n), n) for n in range(8)]
    codes = []
    with Pool(TASK, 2, Limits(base_s=0.5)) as pool:
        for read in pool.read(paths):
            codes.append(read.entry.code)
            if len(codes) in (1, 4):
                time.sleep(1.2)
    assert codes == [""] * 8


def test_processes_that_never_get_ready_are_told(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path_factory.mktemp("double") / "python"
    script.write_text(DOUBLE.replace("{ready}", "False"))
    script.chmod(0o755)
    monkeypatch.setattr("client.pool.sys.executable", str(script))
    with pytest.raises(ConsiliumError, match="free memory"), Pool(TASK, 1) as pool:
        list(pool.read([good(tmp_path / "a")]))


# --- the true process -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(TASK, 2, Limits(base_s=10.0)) as found:
        yield found


MAKERS = ("good", "cut", "empty", "text", "gone", "folder", "dicom")


def _made(folder: Path, number: int, kind: str) -> Path:
    path = folder / f"{number}-{kind}"
    content = good(folder / "made").read_bytes()
    if kind == "dicom":
        write(path, film(20, 30, 12, number), 12, list(SYNTAXES.values())[number % 3])
    elif kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.write_bytes({"good": content, "cut": content[:200], "empty": b"", "text": b"Once upon a time"}[kind])
    return path


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(MAKERS), max_size=20))
def test_every_file_has_one_outcome(tmp_path_factory: pytest.TempPathFactory, pool: Pool, kinds: list[str]) -> None:
    folder = tmp_path_factory.mktemp("mix")
    paths = [_made(folder, number, kind) for number, kind in enumerate(kinds)]
    found = {read.number: read.entry.code for read in pool.read(paths)}
    expected = {"good": "", "dicom": "", "cut": "damaged", "empty": "empty", "text": "not_an_image"}
    assert [found[n] for n in range(len(kinds))] == [expected.get(kind, "missing") for kind in kinds]


@pytest.mark.parametrize("name", [b"a\nb", b"\xff\xfe", b"x" * 250, b" ", b"-rf", b"a\xcc\x81.png", b"$(touch x)"])
def test_names_that_are_no_names(tmp_path: Path, pool: Pool, name: bytes) -> None:
    path = good(Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)))
    assert [read.entry.code for read in pool.read([path])] == [""]


def test_a_path_is_below_the_caller_s_folder(tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    good(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert [read.entry.code for read in pool.read([Path("a")])] == [""]


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_bomb_is_a_code_and_the_caller_stays_small(tmp_path: Path) -> None:
    """A frame within the limit on frames, but beyond the memory of the process."""
    bomb = write(tmp_path / "bomb", np.zeros((12_000, 12_000), np.uint8), 8, SYNTAXES["jpeg-ls"])
    assert bomb.stat().st_size < 2**16
    paths = [good(tmp_path / "a"), bomb, good(tmp_path / "b", 1)]
    before = _resident()
    found = outcomes(paths, Limits(memory=320 * 2**20, base_s=60.0), workers=1)
    assert found["a"] == found["b"] == ""
    assert found["bomb"] in ("too_large", "crashed")
    assert _resident() - before < 64 * 2**20


def test_many_who_were_taken_out_are_told_to_the_processes(tmp_path: Path) -> None:
    """More than a pipe holds."""
    identity = Identity(b"s" * 32)
    people = frozenset(identity.person(str(number)) for number in range(5000))
    path = write(tmp_path / "a", film(20, 30, 8), 8, SYNTAXES["raw"], PatientID="4999")
    with Pool(Task(identity, GENERIC, 16, people), 1) as pool:
        assert [read.entry.code for read in pool.read([path])] == ["opted_out"]


def test_nothing_is_printed(tmp_path: Path, pool: Pool, capfd: pytest.CaptureFixture[str]) -> None:
    paths = []
    for name, syntax in SYNTAXES.items():
        content = bytearray(write(tmp_path / name, film(34, 42, 8), 8, syntax, PatientID="SECRET").read_bytes())
        content[-60:-20] = b"\xff" * 40
        paths.append(tmp_path / f"SECRET-{name}")
        paths[-1].write_bytes(bytes(content))
    assert {read.entry.code for read in pool.read(paths)} <= {"", *CODES}
    assert capfd.readouterr() == ("", "")


def test_a_pool_reads_twice_and_leaves_nothing_open(tmp_path: Path) -> None:
    path = good(tmp_path / "a")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with Pool(TASK, 1) as pool:
        (first,), (again,) = (list(pool.read([path])) for _ in range(2))
        assert pool.started == 1
    assert isinstance(first, Read)
    assert first.entry.digest == again.entry.digest
    assert len(list(Path("/proc/self/fd").iterdir())) == before

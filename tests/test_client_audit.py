"""The audit trail: no line can be changed, moved or taken out unseen; a crash destroys nothing; no text gets in."""

from __future__ import annotations

import hashlib
import json
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client import audit
from common.errors import ConsiliumError

HEX = "ab" * 32


def trail(folder: Path, events: int = 4) -> Path:
    path = folder / "audit.jsonl"
    for number in range(events):
        audit.append(path, "check", {"accepted": number, "quarantine": {"damaged": 1}, "manifest_sha256": HEX})
    return path


def broken_at(path: Path) -> str:
    with pytest.raises(ConsiliumError) as raised:
        audit.verify(path)
    return str(raised.value)


def test_a_trail_holds_and_is_for_its_owner(tmp_path: Path) -> None:
    path = trail(tmp_path)
    assert audit.verify(path) == 4
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.facts["accepted"] for entry in audit.read(path)] == [0, 1, 2, 3]


def test_the_hashes_are_those_of_the_description(tmp_path: Path) -> None:
    previous = "0" * 64
    for line in trail(tmp_path).read_bytes().splitlines():
        value = json.loads(line)
        assert set(value) == {"time", "event", "facts", "previous", "sha256"}
        assert value["previous"] == previous
        previous = value.pop("sha256")
        body = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
        assert hashlib.sha256(body).hexdigest() == previous


@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_changed_byte_is_seen(position: int, byte: int, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    if not path.exists():
        trail(tmp_path, 3)
    content = path.read_bytes()
    position %= len(content)
    if content[position] == byte:
        return
    changed = tmp_path / "changed.jsonl"
    changed.write_bytes(content[:position] + bytes([byte]) + content[position + 1 :])
    if position < len(content) - 1:  # the last end of line may be missing
        line = content[:position].count(b"\n") + 1
        message = broken_at(changed)
        assert f"line {line} " in message


@given(order=st.permutations(range(4)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_order_is_bound(order: list[int], tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    if not path.exists():
        trail(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(b"".join(lines[k] for k in order))
    if order == sorted(order):
        assert audit.verify(moved) == 4
    else:
        assert "does not hold" in broken_at(moved)


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_line_taken_out_is_seen(gone: int, tmp_path: Path) -> None:
    path = trail(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:gone] + lines[gone + 1 :]))
    assert f"line {gone + 1} " in broken_at(path)


def test_a_line_written_twice_is_seen(tmp_path: Path) -> None:
    path = trail(tmp_path, 2)
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[-1])
    assert "line 3 " in broken_at(path)


def test_a_crash_at_any_byte_is_carried_on_from_and_recorded(tmp_path: Path) -> None:
    content = trail(tmp_path, 3).read_bytes()
    start = content.rindex(b"\n", 0, -1) + 1
    for end in range(start + 1, len(content)):
        path = tmp_path / f"torn-{end}.jsonl"
        path.write_bytes(content[:end])
        whole = end == len(content) - 1  # only the end of the line is missing
        if whole:
            assert audit.verify(path) == 3
        else:
            assert "what follows entry 2 is cut short" in broken_at(path)
        audit.append(path, "init", {})
        events = [entry.event for entry in audit.read(path)]
        assert events == ["check", "check", *(["check"] if whole else ["torn_line"]), "init"]
        assert path.read_bytes().startswith(content[:end])  # what was there is still there


def test_a_crash_while_a_crash_is_recorded(tmp_path: Path) -> None:
    path = trail(tmp_path, 2)
    for _ in range(3):
        content = path.read_bytes()
        path.write_bytes(content[:-30])
        audit.append(path, "pull", {"files": 3})
        path.write_bytes(path.read_bytes()[:-400])
    audit.append(path, "pull", {"files": 3})
    entries = audit.read(path)
    assert entries[-1].event == "pull"
    assert any(entry.event == "torn_line" for entry in entries)


def test_zeros_of_a_file_system_after_a_crash(tmp_path: Path) -> None:
    path = trail(tmp_path, 2)
    path.write_bytes(path.read_bytes() + b"\0" * 700)
    assert "cut short" in broken_at(path)
    audit.append(path, "init", {})
    assert [entry.event for entry in audit.read(path)] == ["check", "check", "torn_line", "init"]
    assert audit.read(path)[2].facts == {"bytes": 700, "torn_sha256": hashlib.sha256(b"\0" * 700).hexdigest()}


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_forged_line_is_not_taken_for_a_torn_one(end: bytes, tmp_path: Path) -> None:
    path = trail(tmp_path, 4)
    content = path.read_bytes().replace(b'"accepted":1', b'"accepted":7')
    path.write_bytes(content.removesuffix(b"\n") + end)
    assert "line 2 does not hold" in broken_at(path)
    audit.append(path, "init", {})
    audit.append(path, "init", {})
    assert "line 2 does not hold" in broken_at(path)
    assert path.read_bytes().startswith(content.removesuffix(b"\n"))


def test_a_forged_last_line_stays_forged(tmp_path: Path) -> None:
    path = trail(tmp_path, 2)
    path.write_bytes(path.read_bytes().replace(b'"accepted":1', b'"accepted":7'))
    audit.append(path, "init", {})
    assert "line 2 does not hold" in broken_at(path)


def test_torn_bytes_that_were_changed_later_are_seen(tmp_path: Path) -> None:
    path = trail(tmp_path, 2)
    path.write_bytes(path.read_bytes()[:-20])
    audit.append(path, "init", {})
    lines = path.read_bytes().split(b"\n")
    for changed in (lines[1].replace(b"check", b"chekc"), lines[1] + b" "):
        path.write_bytes(b"\n".join([lines[0], changed, *lines[2:]]))
        assert "line 2 does not hold" in broken_at(path)
    path.write_bytes(b"\n".join([lines[0], *lines[2:]]))  # taken out
    assert "line 2 does not hold" in broken_at(path)


@pytest.mark.parametrize(
    ("event", "facts"),
    [
        ("delete", {}),
        ("check", {"name": "Doe^Jane"}),
        ("check", {"Doe^Jane": 1}),
        ("check", {"quarantine": {"/data/ward 7/0001.dcm": 1}}),
        ("check", {"quarantine": {"damaged": HEX}}),
        ("check", {"quarantine": {"damaged": {"x": 1}}}),
        ("check", {"accepted": -1}),
        ("check", {"accepted": 1.5}),
        ("check", {"accepted": True}),
        ("check", {"accepted": None}),
        ("check", {"accepted": [1]}),
        ("check", {"manifest_sha256": "19470113"}),
        ("check", {"manifest_sha256": HEX + "0"}),
    ],
)
def test_no_text_gets_in(event: str, facts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="EVENTS|expected a count"):
        audit.append(tmp_path / "audit.jsonl", event, facts)
    assert not (tmp_path / "audit.jsonl").exists()


@given(garbage=st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_bytes_after_the_end_are_an_error_and_no_crash(garbage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.unlink(missing_ok=True)
    content = trail(tmp_path, 1).read_bytes()
    path.write_bytes(content + garbage)
    if garbage:
        broken_at(path)
    audit.append(path, "init", {})
    assert path.read_bytes().startswith(content + garbage)


@pytest.mark.parametrize(
    "line",
    [b"[]", b"{}", b"null", b"1e999", b"NaN", b'{"time":1}', b"[" * 100_000, b'{"a":' * 50_000, b"\xff", b"9" * 5000],
)
def test_hostile_lines(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(line + b"\n")
    assert "line 1 does not hold" in broken_at(path)


@pytest.mark.parametrize("part", ["time", "event", "facts", "previous"])
@pytest.mark.parametrize("value", [None, 3, [], {}, {"a": "b"}, "x"])
def test_a_rightly_hashed_line_of_another_kind(part: str, value: Any, tmp_path: Path) -> None:
    body: dict[str, Any] = {"time": "2026-01-01T00:00:00Z", "event": "check", "facts": {}, "previous": "0" * 64}
    body[part] = [] if part == "facts" and value == {} else value
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    whole = {**body, "sha256": hashlib.sha256(text).hexdigest()}
    path = tmp_path / "audit.jsonl"
    path.write_bytes(json.dumps(whole, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    assert "line 1 does not hold" in broken_at(path)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    assert "cannot be read" in broken_at(tmp_path / "none.jsonl")
    assert "cannot be read" in broken_at(tmp_path)
    (tmp_path / "link").symlink_to(trail(tmp_path))
    with pytest.raises(ConsiliumError, match="cannot be written"):
        audit.append(tmp_path / "link", "init", {})
    with pytest.raises(ConsiliumError, match="cannot be written"):
        audit.append(tmp_path / "no" / "audit.jsonl", "init", {})


def test_processes_at_the_same_time_make_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    script = (
        "import sys; from pathlib import Path; from client import audit\n"
        "for k in range(25): audit.append(Path(sys.argv[1]), 'check', {'accepted': k})"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=Path.cwd()) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert audit.verify(path) == 75


# Sealed files

LIMIT = 1000  # bytes: four entries or so


def long_trail(folder: Path, events: int = 30) -> Path:
    """Return a trail of several files."""
    path = folder / "audit.jsonl"
    for number in range(events):
        audit.append(path, "check", {"accepted": number}, LIMIT)
    return path


def moved(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def swapped(older: list[Path], at: int) -> None:
    first, second = older[at].read_bytes(), older[at + 1].read_bytes()
    older[at].write_bytes(second)
    older[at + 1].write_bytes(first)


def cut(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))


TAMPERING: dict[str, Callable[[list[Path], int], object]] = {
    "removed": lambda older, at: older[at].unlink(),
    "swapped": swapped,
    "cut at a line": lambda older, at: cut(older[at]),
    "cut in a line": lambda older, at: older[at].write_bytes(older[at].read_bytes()[:-9]),
    "without its last end of line": lambda older, at: older[at].write_bytes(older[at].read_bytes()[:-1]),
    "emptied": lambda older, at: older[at].write_bytes(b""),
    "another one": lambda older, at: moved(older[at], older[at + 1]),
    "more": lambda older, at: audit.append(older[at], "init", {}),
    "changed": lambda older, at: older[at].write_bytes(older[at].read_bytes().replace(b"accepted", b"acceptex")),
}


def test_files_are_one_chain(tmp_path: Path) -> None:
    path = long_trail(tmp_path)
    older = audit.sealed(path)
    assert [file.name for file in older] == [f"audit-{number:06d}.jsonl" for number in range(1, len(older) + 1)]
    assert len(older) >= 4 and all(LIMIT <= file.stat().st_size < 2 * LIMIT for file in older)
    assert [entry.facts["accepted"] for entry in audit.read(path)] == list(range(30)) and audit.verify(path) == 30
    assert [entry.facts["accepted"] for entry in audit.latest(path)] == list(range(30))[::-1]
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o600}
    whole = b"".join(file.read_bytes() for file in [*older, path])
    (tmp_path / "whole.jsonl").write_bytes(whole)
    assert audit.read(tmp_path / "whole.jsonl") == audit.read(path)


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("how", sorted(TAMPERING))
def test_whatever_is_done_to_a_sealed_file_is_seen(how: str, at: int, tmp_path: Path) -> None:
    path = long_trail(tmp_path)
    older = audit.sealed(path)
    TAMPERING[how](older, at)
    message = broken_at(path)
    assert "does not hold" in message and any(f"{file}: line " in message for file in older[at : at + 2])
    entries, wrong = audit.held(path)
    assert wrong == message and len(entries) < 30
    with pytest.raises(ConsiliumError, match="does not hold"):
        list(audit.latest(path))
    audit.append(path, "init", {}, LIMIT)
    assert broken_at(path) == message  # no later line explains it


def test_the_newest_sealed_file_is_missed_too(tmp_path: Path) -> None:
    path = long_trail(tmp_path)
    newest = audit.sealed(path)[-1]
    content, number = newest.read_bytes(), len(audit.sealed(path))
    newest.unlink()
    assert f"{path}: line 1 does not hold" in broken_at(path)
    newest.write_bytes(content)
    audit.sealed(path)[0].unlink()
    for _ in range(8):
        audit.append(path, "init", {}, LIMIT)
    assert newest.read_bytes() == content and len(audit.sealed(path)) > number - 1  # none is written over


def test_a_crash_between_two_files(tmp_path: Path) -> None:
    path = long_trail(tmp_path, 8)
    count = audit.verify(path)
    path.rename(audit._next_sealed(path))
    assert audit.verify(path) == count and len(list(audit.latest(path))) == count
    path.touch(0o600)
    assert audit.verify(path) == count
    audit.append(path, "init", {}, LIMIT)
    assert audit.verify(path) == count + 1
    first = json.loads(path.read_bytes().splitlines()[0])
    assert first["previous"] == json.loads(audit.sealed(path)[-1].read_bytes().splitlines()[-1])["sha256"]


def test_a_torn_file_is_sealed_once_that_is_recorded(tmp_path: Path) -> None:
    path = long_trail(tmp_path, 3)
    path.write_bytes(path.read_bytes() + b"x" * LIMIT)
    audit.append(path, "init", {}, LIMIT)
    assert not audit.sealed(path) and audit.read(path)[-2].event == "torn_line"
    audit.append(path, "init", {}, LIMIT)
    assert len(audit.sealed(path)) == 1 and audit.verify(path) == 6


def test_a_torn_first_line_of_a_later_file(tmp_path: Path) -> None:
    path = long_trail(tmp_path)
    count = len(audit.read(path)) - path.read_bytes().count(b"\n")
    path.write_bytes(path.read_bytes()[:30])
    assert f"{path}: what follows entry 0 is cut short" in broken_at(path)
    audit.append(path, "init", {}, LIMIT)
    assert [entry.event for entry in audit.read(path)[count:]] == ["torn_line", "init"]


def writers(path: Path, count: int, events: str) -> list[subprocess.Popen[bytes]]:
    script = (
        "import itertools, sys; from pathlib import Path; from client import audit\n"
        f"for k in {events}: audit.append(Path(sys.argv[1]), 'check', {{'accepted': k}}, {LIMIT})"
    )
    command = [sys.executable, "-c", script, str(path)]
    return [subprocess.Popen(command, cwd=Path.cwd()) for _ in range(count)]


def test_processes_that_seal_at_the_same_time_make_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    running = writers(path, 3, "range(40)")
    while any(process.poll() is None for process in running):
        if path.exists():
            audit.read(path)  # whoever looks on meanwhile sees a whole chain
    assert [process.returncode for process in running] == [0, 0, 0]
    assert audit.verify(path) == 120 and len(audit.sealed(path)) >= 20


def test_a_kill_at_any_moment_breaks_nothing(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    before = 0
    for turn in range(4):
        (process,) = writers(path, 1, "itertools.count()")
        end = time.monotonic() + 30
        while time.monotonic() < end and len(audit.sealed(path)) < 3 * (turn + 1):
            time.sleep(0.005)
        time.sleep(0.001 * turn)
        process.send_signal(signal.SIGKILL)
        process.wait()
        audit.append(path, "init", {}, LIMIT)
        count = audit.verify(path)
        assert count > before
        before = count

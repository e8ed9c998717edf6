"""The ledger: nothing spent is ever lost, whoever kills, cuts, forges or puts back; and its sums are right."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client import chain
from client import ledger as module
from client.ledger import BudgetExceeded, CohortChanged, Ledger, LedgerError, check_budget, statement
from client.spending import check
from common.privacy import Release, epsilon

OWNER, OTHER = "0a" * 32, "0b" * 32
RUN, SECOND = "1a" * 32, "1b" * 32
COHORT = "2a" * 32
BYTES = "3a" * 32
ROUND = Release(1.1, 0.05, 20)
PLANNED = [Release(1.1, 0.05, 60)]
LAWS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def noon() -> float:
    return 1_767_225_600.0  # 2026-01-01T00:00:00Z


def head_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.head")


def plan(ledger: Ledger, run: str = RUN, **changes: Any) -> None:
    values: dict[str, Any] = {"patients": 941, "cohort": COHORT, "unit": "patient", "delta": 1e-4, "releases": PLANNED}
    ledger.plan(run, **{**values, **changes})


def filled(folder: Path) -> Ledger:
    """Return a ledger of five entries: opened, planned, one round spent, one lost."""
    ledger = Ledger.open(folder / "ledger.jsonl", OWNER, now=noon)
    plan(ledger)
    ledger.spend(ledger.reserve(RUN, "round-1", [ROUND]), BYTES)
    ledger.reserve(RUN, "round-2", [ROUND])
    return ledger


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of `filled`."""
    folder = tmp_path_factory.mktemp("whole")
    filled(folder)
    return folder / "ledger.jsonl"


def copied(whole: Path, folder: Path, content: bytes | None = None) -> Path:
    """Return a copy of a ledger with its head, with other content where that is given."""
    path = folder / "ledger.jsonl"
    shutil.copy(head_of(whole), head_of(path))
    path.write_bytes(whole.read_bytes() if content is None else content)
    return path


def refused(path: Path, words: str, **how: Any) -> None:
    """Expect that a ledger can be neither opened nor read, and that nothing is written in trying."""
    before = path.read_bytes() if path.is_file() else None
    for call in (Ledger.open, Ledger.read):
        with pytest.raises(LedgerError, match=words):
            call(path, OWNER, **how)
    assert before == (path.read_bytes() if path.is_file() else None)


def test_an_entry_has_known_bytes(whole: Path) -> None:
    lines = whole.read_bytes().splitlines()
    assert lines[0] == (
        b'{"event":"open","facts":{"owner":"' + OWNER.encode() + b'"},"previous":"' + b"0" * 64 + b'","sha256":'
        b'"01f3d676f9728cb801306091dff8c7772ebea88145219282f275906a5cce44fa","time":"2026-01-01T00:00:00Z"}'
    )
    body = json.loads(lines[2])
    assert (
        body.pop("sha256")
        == hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    )
    assert body["facts"] == {
        "run": RUN,
        "purpose": "round-1",
        "releases": [{"kind": "gaussian", "noise_multiplier": 1.1, "sampling_rate": 0.05, "steps": 20}],
    }
    assert json.loads(lines[3])["facts"] == {"reserved": 3, "bytes_sha256": BYTES}
    assert head_of(whole).read_text() == f'{{"number":5,"sha256":"{json.loads(lines[4])["sha256"]}"}}\n'


def test_it_is_for_its_owner_alone(whole: Path) -> None:
    assert stat.S_IMODE(whole.stat().st_mode) == stat.S_IMODE(head_of(whole).stat().st_mode) == 0o600


def test_it_comes_back_as_it_was(whole: Path, tmp_path: Path) -> None:
    path = copied(whole, tmp_path)
    for ledger in (Ledger.open(path, OWNER), Ledger.read(path, OWNER)):
        assert ledger.head == (5, json.loads(whole.read_bytes().splitlines()[-1])["sha256"])
        assert [entry.kind for entry in ledger.entries] == ["open", "plan", "reserve", "spend", "reserve"]
        assert [entry.number for entry in ledger.entries] == [1, 2, 3, 4, 5]
        assert ledger.releases() == ledger.releases(RUN) == (ROUND, ROUND)
        assert ledger.releases(SECOND) == ()
        (run,) = ledger.runs()
        assert (run.fingerprint, run.rounds, run.reserved, run.spent, run.lost) == (RUN, 2, 2, 1, 1)
        assert (run.delta, run.planned, ledger.delta) == (1e-4, tuple(PLANNED), 1e-4)
        assert run.first == run.last == "2026-01-01T00:00:00Z"
    assert path.read_bytes() == whole.read_bytes()


def test_whole_numbers_are_written_as_floats_and_come_back_equal(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "ledger.jsonl", OWNER)
    plan(ledger, releases=[Release(1, 1, 1)])
    plan(ledger, releases=[Release(1.0, 1.0, 1)])
    assert ledger.head[0] == 2
    assert Ledger.open(tmp_path / "ledger.jsonl", OWNER).planned(RUN) == ledger.planned(RUN)


@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
@LAWS
def test_any_changed_byte_is_seen(position: int, byte: int, whole: Path, tmp_path: Path) -> None:
    content = whole.read_bytes()
    position %= len(content)
    if content[position] != byte:
        changed = content[:position] + bytes([byte]) + content[position + 1 :]
        refused(copied(whole, tmp_path, changed), "does not hold|cut short")


@given(order=st.lists(st.integers(0, 4), max_size=6))
@LAWS
def test_lines_moved_taken_out_or_doubled_are_seen(order: list[int], whole: Path, tmp_path: Path) -> None:
    lines = whole.read_bytes().splitlines(keepends=True)
    path = copied(whole, tmp_path, b"".join(lines[k] for k in order))
    if order == [0, 1, 2, 3, 4]:
        assert Ledger.open(path, OWNER).head[0] == 5
    else:
        refused(path, "does not hold|cut short")


def test_cut_short_at_any_byte_is_seen(whole: Path, tmp_path: Path) -> None:
    content = whole.read_bytes()
    for end in range(0, len(content) - 1, 7):
        refused(copied(whole, tmp_path, content[:end]), "cut short|does not hold")
    for end in (len(line) for line in _prefixes(content)):
        refused(copied(whole, tmp_path, content[:end]), "cut short")
    path = copied(whole, tmp_path, content[:-1])  # only the end of the line: the entry is whole
    assert Ledger.open(path, OWNER).head[0] == 5


def _prefixes(content: bytes) -> list[bytes]:
    lines = content.splitlines(keepends=True)
    return [b"".join(lines[:k]) for k in range(len(lines))]


def test_a_crash_while_writing_leaves_a_ledger_that_goes_on(whole: Path, tmp_path: Path) -> None:
    content = whole.read_bytes()
    start = content.rindex(b"\n", 0, -1) + 1
    fourth = json.loads(content.splitlines()[3])["sha256"]
    for end in range(start + 1, len(content) - 1, 11):
        path = copied(whole, tmp_path, content[:end])
        head_of(path).write_text(f'{{"number":4,"sha256":"{fourth}"}}\n')
        assert Ledger.read(path, OWNER).releases() == (ROUND,)  # the torn line reserved nothing: nothing left
        ledger = Ledger.open(path, OWNER)
        assert ledger.reserve(RUN, "round-2", [ROUND]) == 6
        assert path.read_bytes().startswith(content[:end] + b"\n")
        assert [entry.kind for entry in Ledger.open(path, OWNER).entries[3:]] == ["spend", "torn_line", "reserve"]
        assert Ledger.open(path, OWNER).releases() == (ROUND, ROUND)


@pytest.mark.parametrize("left", [b"", b"{", b"\0" * 500, b'{"event":"open"'])
def test_a_crash_at_the_very_beginning(left: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(left)
    plan(Ledger.open(path, OWNER))
    kinds = [entry.kind for entry in Ledger.open(path, OWNER).entries]
    assert kinds == [*(["torn_line"] if left else []), "open", "plan"]


def test_a_crash_between_an_entry_and_its_head(whole: Path, tmp_path: Path) -> None:
    path = copied(whole, tmp_path)
    third = json.loads(path.read_bytes().splitlines()[2])["sha256"]
    head_of(path).write_text(f'{{"number":3,"sha256":"{third}"}}\n')
    Ledger.read(path, OWNER)
    assert '"number":3' in head_of(path).read_text()
    assert Ledger.open(path, OWNER).releases() == (ROUND, ROUND)
    assert head_of(path).read_bytes() == head_of(whole).read_bytes()


def test_an_older_copy_with_its_head_is_seen_by_a_witness(whole: Path, tmp_path: Path) -> None:
    path = copied(whole, tmp_path)
    ledger = Ledger.open(path, OWNER)
    older = path.read_bytes(), head_of(path).read_bytes()
    ledger.reserve(RUN, "round-3", [ROUND])
    witness, newest = ledger.head, path.read_bytes()
    Ledger.open(path, OWNER, witnesses=[(0, chain.START), (5, Ledger.read(whole, OWNER).head[1]), witness])
    path.write_bytes(older[0])
    head_of(path).write_bytes(older[1])
    assert Ledger.read(path, OWNER).head[0] == 5  # by itself it looks whole
    refused(path, "has 5 entries, and entry 6", witnesses=[witness])
    for witness in [(2, BYTES), (-1, BYTES), (6, BYTES)]:
        refused(path, f"entry {witness[0]} .* is known", witnesses=[witness])
    for _ in range(2):  # a process that had seen more does not forget it
        with pytest.raises(LedgerError, match="cut short"):
            ledger.reserve(RUN, "round-4", [ROUND])
    assert ledger.releases() == (ROUND,) * 3
    path.write_bytes(newest)
    assert ledger.reserve(RUN, "round-4", [ROUND]) == 7


def test_one_written_anew_is_seen_by_its_head(whole: Path, tmp_path: Path) -> None:
    anew = tmp_path / "anew"
    anew.mkdir()
    ledger = Ledger.open(anew / "ledger.jsonl", OWNER)
    for k in range(6):
        ledger.reserve(SECOND, f"round-{k}", [ROUND])
    refused(copied(whole, tmp_path, (anew / "ledger.jsonl").read_bytes()), "entry 5")


def test_a_missing_ledger_is_begun_only_where_nobody_knows_better(whole: Path, tmp_path: Path) -> None:
    path = copied(whole, tmp_path)
    path.unlink()
    with pytest.raises(LedgerError, match="gone"):
        Ledger.open(path, OWNER)
    with pytest.raises(LedgerError, match="has 0 entries"):
        Ledger.read(path, OWNER)
    head_of(path).unlink()
    with pytest.raises(LedgerError, match="gone"):
        Ledger.open(path, OWNER, witnesses=[(1, BYTES)])
    assert list(tmp_path.iterdir()) == []
    assert Ledger.read(path, OWNER).head == (0, chain.START)
    assert list(tmp_path.iterdir()) == []
    assert Ledger.open(path, OWNER).head[0] == 1


def test_a_ledger_that_goes_away_while_it_is_used(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    (tmp_path / "ledger.jsonl").unlink()
    with pytest.raises(LedgerError, match="gone"):
        ledger.reserve(RUN, "round-3", [ROUND])


def test_a_missing_head_is_put_back_by_a_person(whole: Path, tmp_path: Path) -> None:
    path = copied(whole, tmp_path)
    head_of(path).unlink()
    refused(path, "missing, and it says how long")
    with pytest.raises(LedgerError) as raised:
        Ledger.open(path, OWNER)
    subprocess.run(["sh", "-c", str(raised.value).rpartition("write it: ")[2]], check=True)
    assert Ledger.open(path, OWNER).head[0] == 5


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"5",
        b"\xff",
        b"[" * 5000,
        b'{"number":5}',
        b'{"number":-1,"sha256":"x"}',
        b"x" * 9000,
    ],
)
def test_a_damaged_head(head: bytes, whole: Path, tmp_path: Path) -> None:
    path = copied(whole, tmp_path)
    head_of(path).write_bytes(head)
    refused(path, "damaged, expected")


def test_another_owner(whole: Path, tmp_path: Path) -> None:
    path = copied(whole, tmp_path)
    for call in (Ledger.open, Ledger.read):
        with pytest.raises(LedgerError, match="of another cohort"):
            call(path, OTHER)
        with pytest.raises(ValueError, match="owner"):
            call(path, "Ward 7")


def test_what_cannot_be_opened(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    refused(folder, "cannot be (written|read)")
    with pytest.raises(LedgerError, match="cannot be written"):
        Ledger.open(tmp_path / "no" / "ledger.jsonl", OWNER)
    path = copied(whole, tmp_path)
    path.rename(tmp_path / "real")
    path.symlink_to(tmp_path / "real")
    refused(path, "cannot be (written|read)")
    path.unlink()
    (tmp_path / "real").rename(path)
    head_of(path).unlink()
    head_of(path).mkdir()
    refused(path, "cannot be (read|written)")


def test_one_to_look_at_is_not_written(whole: Path, tmp_path: Path) -> None:
    path = copied(whole, tmp_path)
    ledger = Ledger.read(path, OWNER)
    for call in (lambda: plan(ledger), lambda: ledger.reserve(RUN, "sums", [ROUND]), lambda: ledger.spend(5, BYTES)):
        with pytest.raises(LedgerError, match="to be looked at"):
            call()
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("written", [0, 1, 200])
def test_a_full_disk_loses_nothing(written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = filled(tmp_path)

    def full(handle: int, content: bytes) -> None:
        os.write(handle, content[:written])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(chain, "write", full)
        with pytest.raises(LedgerError, match=r"cannot be written \(No space left on device\)"):
            ledger.reserve(RUN, "round-3", [ROUND])
    number = ledger.reserve(RUN, "round-3", [ROUND])
    assert number == (7 if written else 6)
    assert Ledger.open(tmp_path / "ledger.jsonl", OWNER).releases() == (ROUND,) * 3


def test_an_entry_without_its_head_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = filled(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_atomic", full)
        with pytest.raises(LedgerError, match="cannot be written"):
            ledger.reserve(RUN, "round-3", [ROUND])
    assert ledger.releases() == (ROUND,) * 3
    assert ledger.reserve(RUN, "round-3", [ROUND]) == 7
    assert Ledger.open(tmp_path / "ledger.jsonl", OWNER).releases() == (ROUND,) * 4


@pytest.mark.slow
def test_a_process_killed_between_reserving_and_spending_has_spent(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    script = (
        "import sys; from pathlib import Path; from client.ledger import *; from common.privacy import Release\n"
        f"ledger = Ledger.open(Path(sys.argv[1]), {OWNER!r})\n"
        "for k in range(10**6):\n"
        f"    number = ledger.reserve({RUN!r}, f'round-{{k}}', [Release(1.1, 0.05, 20)])\n"
        "    print(number, flush=True)\n"
        f"    if k % 2: ledger.spend(number, {BYTES!r})\n"
    )
    promised = 0
    for lines in (1, 4, 9):
        child = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for _ in range(lines):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        promised += lines + len(child.stdout.readlines())
        child.wait()
        child.stdout.close()
        (run,) = Ledger.open(path, OWNER).runs()
        assert promised <= run.reserved <= promised + lines  # one that was on disk may not have been heard of
        assert Ledger.open(path, OWNER).releases() == (ROUND,) * run.reserved
        promised = run.reserved


@pytest.mark.slow
def test_processes_at_the_same_time_make_one_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    script = (
        "import sys; from pathlib import Path; from client.ledger import *; from common.privacy import Release\n"
        f"ledger = Ledger.open(Path(sys.argv[1]), {OWNER!r})\n"
        "for k in range(20):\n"
        "    number = ledger.reserve(sys.argv[2], f'round-{k}', [Release(1.1, 0.05, 20)])\n"
        f"    ledger.spend(number, {BYTES!r})\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(path), run]) for run in (RUN, SECOND)]
    assert [process.wait(60) for process in running] == [0, 0]
    ledger = Ledger.open(path, OWNER)
    assert ledger.head[0] == 81
    assert [(run.reserved, run.lost) for run in ledger.runs()] == [(20, 0), (20, 0)]


def test_one_writes_while_nobody_else_reads_or_writes(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        with (tmp_path / "ledger.jsonl").open("rb") as other:
            fcntl.flock(other, fcntl.LOCK_SH)
            waiting = pool.submit(ledger.reserve, RUN, "round-3", [ROUND])
            with pytest.raises(TimeoutError):
                waiting.result(0.2)
        assert waiting.result(10) == 6


def test_threads_at_the_same_time_get_entries_of_their_own(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        numbers = list(pool.map(lambda k: ledger.reserve(RUN, f"round-{k}", [ROUND]), range(20)))
    assert sorted(numbers) == list(range(6, 26))
    assert Ledger.open(tmp_path / "ledger.jsonl", OWNER).head == ledger.head


def test_an_entry_is_on_disk_before_its_head_and_before_it_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, path, synced, real = filled(tmp_path), tmp_path / "ledger.jsonl", list[str](), os.fsync

    def told(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        real(handle)

    monkeypatch.setattr(os, "fsync", told)
    ledger.reserve(RUN, "round-3", [ROUND])
    assert [name.split(".head")[0] for name in synced] == [path.name, tmp_path.name, f".{path.name}"]


def test_a_reader_beside_a_writer_sees_what_is_there(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    before = Ledger.read(tmp_path / "ledger.jsonl", OWNER)
    ledger.reserve(RUN, "round-3", [ROUND])
    assert (before.head[0], Ledger.read(tmp_path / "ledger.jsonl", OWNER).head[0]) == (5, 6)


def test_another_writer_is_taken_in_before_anything_is_written(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    plan(Ledger.open(tmp_path / "ledger.jsonl", OWNER), SECOND)
    with pytest.raises(CohortChanged):
        plan(ledger, SECOND, cohort=BYTES)
    assert ledger.reserve(RUN, "round-3", [ROUND]) == 7


def test_an_entry_is_added_without_reading_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = filled(tmp_path)

    def unread(*_: object) -> bytes:
        raise AssertionError

    monkeypatch.setattr(chain, "read", unread)
    ledger.spend(ledger.reserve(RUN, "round-3", [ROUND]), BYTES)


def test_a_plan_is_noted_once_and_keeps_its_patients(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    plan(ledger)
    assert ledger.head[0] == 5
    for changes in ({"cohort": BYTES}, {"patients": 940}):
        with pytest.raises(CohortChanged, match="keeps its patients") as raised:
            plan(ledger, **changes)
        assert raised.value.code == "cohort_changed"
    assert ledger.head[0] == 5
    plan(ledger, releases=[ROUND], delta=1e-5)
    assert ledger.head[0] == 6
    found = ledger.planned(RUN)
    assert found is not None and (found.releases, found.delta, found.patients) == ((ROUND,), 1e-5, 941)
    assert ledger.planned(SECOND) is None
    assert ledger.delta == 1e-5


def test_what_was_reserved_leaves_as_it_is_or_not_at_all(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    ledger.spend(3, BYTES)  # the same bytes, sent again
    assert ledger.head[0] == 5
    with pytest.raises(LedgerError, match="needs a reservation of its own"):
        ledger.spend(3, COHORT)
    for number in (1, 4, 6):
        with pytest.raises(ValueError, match="no reservation"):
            ledger.spend(number, BYTES)


def test_what_is_reserved_again_counts_again_but_is_one_round(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    ledger.reserve(RUN, "round-2", [ROUND])
    ledger.reserve(RUN, "sums", [Release(2.0, kind="laplace")])
    (run,) = ledger.runs()
    assert (run.rounds, run.reserved, run.lost) == (2, 4, 3)
    assert len(ledger.releases()) == 4


@pytest.mark.parametrize(
    ("event", "facts"),
    [
        ("delete", {}),
        ("open", {}),
        ("open", {"owner": "Doe^Jane"}),
        ("open", {"owner": OWNER, "name": "x"}),
        ("open", {"owner": OWNER + "\n"}),
        ("reserve", {"run": RUN, "purpose": "Doe^Jane", "releases": []}),
        ("reserve", {"run": RUN, "purpose": "sums", "releases": [{"noise_multiplier": 1.0}]}),
        ("reserve", {"run": RUN, "purpose": "sums", "releases": 3}),
        (
            "reserve",
            {
                "run": RUN,
                "purpose": "sums",
                "releases": [{"noise_multiplier": -1.0, "sampling_rate": 1.0, "steps": 1, "kind": "gaussian"}],
            },
        ),
        ("spend", {"reserved": 0, "bytes_sha256": BYTES}),
        ("spend", {"reserved": True, "bytes_sha256": BYTES}),
        ("spend", {"reserved": 1.0, "bytes_sha256": BYTES}),
        ("torn_line", {"bytes": 1}),
    ],
)
def test_a_rightly_hashed_line_of_another_kind(event: str, facts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"KINDS|validation error"):
        check(event, facts)
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(chain.continuation(chain.End(), event, facts)[0])
    with pytest.raises(LedgerError, match="line 1 does not hold"):
        Ledger.open(path, OWNER)


def test_rightly_hashed_lines_that_contradict_each_other(whole: Path, tmp_path: Path) -> None:
    end = chain.End(Ledger.read(whole, OWNER).head[1])
    contradictions: list[tuple[str, dict[str, Any]]] = [
        ("open", {"owner": OWNER}),
        ("spend", {"reserved": 3, "bytes_sha256": COHORT}),
        ("spend", {"reserved": 9, "bytes_sha256": BYTES}),
    ]
    for event, facts in contradictions:
        more = chain.continuation(end, event, facts, datetime(2026, 1, 1, tzinfo=UTC))[0]
        refused(copied(whole, tmp_path, whole.read_bytes() + more), "entry 6 contradicts")


@pytest.mark.parametrize(
    "values",
    [
        {"run": "Doe"},
        {"patients": 0},
        {"patients": 1.5},
        {"cohort": "x"},
        {"unit": "Doe^Jane"},
        {"delta": 0.0},
        {"delta": 1.0},
        {"releases": [1]},
    ],
)
def test_no_text_gets_in(values: dict[str, Any], tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "ledger.jsonl", OWNER)
    with pytest.raises(ValueError, match="validation error"):
        plan(ledger, **values)
    with pytest.raises(ValueError, match="validation error"):
        ledger.reserve(RUN, "Doe^Jane", [ROUND])
    with pytest.raises(ValueError, match="validation error"):
        ledger.spend(1, "text")
    assert ledger.head[0] == 1


def test_its_sum_is_that_of_a_fresh_accountant(tmp_path: Path) -> None:
    from opacus.accountants import RDPAccountant

    ledger = Ledger.open(tmp_path / "ledger.jsonl", OWNER)
    for k in range(12):
        ledger.reserve((RUN, SECOND)[k % 2], f"round-{k}", [Release(1.0 + k % 3, 0.02, 10)])
    accountant = RDPAccountant()
    lines = (json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines())
    for release in (one for line in lines for one in line["facts"].get("releases", ())):
        for _ in range(release["steps"]):
            accountant.step(noise_multiplier=release["noise_multiplier"], sample_rate=release["sampling_rate"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ledger.epsilon(1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)
    assert max(ledger.epsilon(1e-5, RUN), ledger.epsilon(1e-5, SECOND)) < ledger.epsilon(1e-5)


def spent_half(folder: Path) -> Ledger:
    """Return a ledger in which another run took ε = 1/2, exactly."""
    ledger = Ledger.open(folder / "ledger.jsonl", OWNER)
    plan(ledger, SECOND, releases=[Release(2.0, kind="laplace")])
    ledger.reserve(SECOND, "sums", [Release(2.0, kind="laplace")])
    return ledger


def test_a_budget_is_kept_to_the_last_digit(tmp_path: Path) -> None:
    ledger = spent_half(tmp_path)
    mine = [Release(4.0, steps=1, kind="laplace")]
    check_budget(ledger, mine, RUN, 0.75, 1e-6, 1e-6)
    with pytest.raises(BudgetExceeded) as raised:
        check_budget(ledger, mine, RUN, 0.7499, 1e-6, 1e-6)
    assert raised.value.code == "budget"
    assert "epsilon 0.75 at delta 1e-06, allowed 0.7499; other runs took 0.5 of it" in str(raised.value)
    check_budget(ledger, mine * 100, RUN, None, None, 1e-4)


def test_what_a_run_planned_and_what_it_reserved_do_not_add_up(tmp_path: Path) -> None:
    ledger = spent_half(tmp_path)
    mine = [Release(4.0, kind="laplace")]
    ledger.reserve(RUN, "sums", mine)
    check_budget(ledger, mine, RUN, 0.75, 1e-6, 1e-6)
    check_budget(ledger, [], RUN, 0.75, 1e-6, 1e-6)
    ledger.reserve(RUN, "sums", mine)  # more than it planned
    with pytest.raises(BudgetExceeded, match="epsilon 1 at"):
        check_budget(ledger, mine, RUN, 0.75, 1e-6, 1e-6)


def test_a_delta_above_the_limit(tmp_path: Path) -> None:
    ledger = spent_half(tmp_path)
    check_budget(ledger, [], RUN, None, 1e-5, 1e-5)
    with pytest.raises(BudgetExceeded, match=r"delta is 0\.0001, allowed 1e-05"):
        check_budget(ledger, [], RUN, None, 1e-5, 1e-4)


def test_without_a_limit_the_smallest_delta_counts(tmp_path: Path) -> None:
    ledger = spent_half(tmp_path)  # planned at 1e-4
    limit = epsilon([*PLANNED, Release(2.0, kind="laplace")], 1e-4)
    check_budget(ledger, PLANNED, RUN, limit, None, 1e-3)
    with pytest.raises(BudgetExceeded, match="at delta 1e-05"):
        check_budget(ledger, PLANNED, RUN, limit, None, 1e-5)


@pytest.mark.slow
def test_the_statement(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    found = statement(ledger, 8.0, 1e-5)
    assert found == json.loads(json.dumps(found))
    (run,) = found["runs"]
    assert (found["entries"], found["sha256"]) == ledger.head
    assert (run["run"], run["rounds"], run["lost"], run["steps"], run["delta"]) == (RUN, 2, 1, 40, 1e-4)
    assert run["epsilon"] == epsilon([ROUND, ROUND], 1e-4) > run["epsilon_prv"] > 0
    assert found["total"]["epsilon"] == epsilon([ROUND, ROUND], 1e-5)
    assert (found["total"]["delta"], found["left"]) == (1e-5, 8.0 - found["total"]["epsilon"])
    assert found["budget"] == {"max_epsilon": 8.0, "max_delta": 1e-5}
    free = statement(ledger, None, None)
    assert (free["total"]["delta"], free["left"]) == (1e-4, None)
    assert statement(ledger, 0.1, None)["left"] == 0


def test_the_statement_of_an_empty_ledger(tmp_path: Path) -> None:
    found = statement(Ledger.read(tmp_path / "ledger.jsonl", OWNER), 3.0, None)
    assert (found["entries"], found["runs"], found["left"]) == (0, [], None)
    assert found["total"] == {"epsilon": None, "epsilon_prv": None, "delta": None}
    assert statement(Ledger.read(tmp_path / "ledger.jsonl", OWNER), 3.0, 1e-5)["left"] == 3.0


def test_it_needs_no_torch() -> None:
    script = "import sys, client.ledger; assert not {'torch', 'opacus'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)

"""Events of a run: a closed list, one whole line each, whatever ends the writer; the file stays small."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import events
from server.events import EVENTS, NAME, Events

ROOT = Path(__file__).parent.parent
FIRST = ["schema", "time", "event", "round"]


def lines(folder: Path) -> list[dict[str, Any]]:
    content = (folder / NAME).read_bytes()
    assert content.endswith(b"\n")
    return [json.loads(line) for line in content.split(b"\n")[:-1]]


def test_a_line_says_when_what_and_where(tmp_path: Path) -> None:
    made = Events(tmp_path)
    made.add("phase", 0, phase="prepare")
    made.add("site_lost", 3, site="north", code="absent")
    first, second = lines(tmp_path)
    assert list(first) == [*FIRST, "phase"] and list(second) == [*FIRST, "site", "code"]
    assert (second["schema"], second["event"], second["round"]) == (1, "site_lost", 3)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", second["time"])
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o644  # a dashboard may be another user


@pytest.mark.parametrize(("event", "facts"), [("deleted", {}), ("site_lost", {"site": "north"}), ("run_ended", {})])
def test_the_list_is_closed(event: str, facts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        Events(tmp_path).add(event, 0, **facts)
    assert not (tmp_path / NAME).exists()


@given(whole=st.integers(0, 3), torn=st.sampled_from([b"", b'{"schema": 1', b"\0" * 9, b"x" * 200_000]))
def test_what_a_crash_left_is_cut_off(whole: int, torn: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("run")
    for number in range(whole):
        Events(folder).add("checkpoint", number)
    with (folder / NAME).open("ab") as file:
        file.write(torn)
    Events(folder).add("checkpoint", 99)
    assert [line["round"] for line in lines(folder)] == [*range(whole), 99]


def test_it_stays_small_and_no_line_is_lost_at_a_turn(tmp_path: Path) -> None:
    made = Events(tmp_path, limit=2000, kept=2)
    for number in range(200):
        made.add("round_started", number)
    files = [tmp_path / name for name in (f"{NAME}.2", f"{NAME}.1", NAME)]
    assert sorted(tmp_path.iterdir()) == sorted(files) and all(file.stat().st_size <= 2000 for file in files)
    rounds = [json.loads(line)["round"] for file in files for line in file.read_bytes().splitlines()]
    assert rounds == list(range(200 - len(rounds), 200))


def test_a_kill_at_any_moment_leaves_whole_lines(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from server.events import Events\n"
        "made, number = Events(Path(sys.argv[1]), limit=100_000), 0\n"
        "while True: made.add('site_contributed', number, site='north'); number += 1"
    )
    for turn in range(3):
        with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT) as writer:
            end = time.monotonic() + 30
            while time.monotonic() < end and not any(tmp_path.glob(f"{NAME}.*")):
                time.sleep(0.02)
            time.sleep(0.03 * turn)
            writer.send_signal(signal.SIGKILL)
    Events(tmp_path).add("run_resumed", 0, sites=["north"], rounds=3, quorum=1, starts=2)
    assert lines(tmp_path)[-1]["event"] == "run_resumed"


def test_a_file_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    Events(tmp_path).add("checkpoint", 1)
    Events(tmp_path / "gone").add("checkpoint", 1)


def test_every_event_has_a_meaning_and_stands_in_the_manual() -> None:
    manual = (ROOT / "docs" / "watching.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `([a-z_]+)` \| (.+) \| (.*) \|$", manual.split("### Events\n")[1].split("\n#")[0], re.M)
    shown = [(name, meaning, tuple(re.findall("`([a-z_]+)`", keys))) for name, meaning, keys in table]
    assert shown == [(name, meaning, keys) for name, (meaning, keys) in EVENTS.items()]


def test_a_file_of_one_line_without_an_end_is_emptied(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(b"y" * (events._BLOCK + 7))
    events.mend(path)
    assert path.read_bytes() == b""
    events.mend(tmp_path / "none")

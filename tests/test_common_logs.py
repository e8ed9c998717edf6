"""Each line that a process prints is one JSON object, whatever is in it, and tells of an exception its kind alone."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import supervisor
from common.errors import ConfigError, ConsiliumError
from common.logs import KNOWN, LONGEST, JsonLines, Supervising, event_of, line

ROOT = Path(__file__).parents[1]
CANARY = "Doe^Jane"
HEAD = ["time", "level", "logger", "role", "event"]
HOSTILE = 'a\nb\r\x00\x1b[31m\x85\u2028\udc80\ud800\U0001f600\\"\' {"event": 1}'

anything = st.text(st.characters(categories=["L", "N", "P", "S", "Z", "C"]))  # surrogates among them


def strict(text: str) -> dict[str, Any]:
    """Return a line as a strict reader takes it: one line, ASCII, no lone surrogate, no key twice."""
    assert text.isascii() and text.isprintable()

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len({key for key, _ in found}) == len(found)
        return dict(found)

    value: dict[str, Any] = json.loads(text, object_pairs_hook=pairs)
    json.dumps(value, ensure_ascii=False).encode()  # fails for a lone surrogate
    assert list(value)[:5] == HEAD
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", value["time"])
    return value


@given(anything, anything, anything, st.integers())
def test_whatever_happens_is_one_line(event: str, logger: str, site: str, number: int) -> None:
    found = strict(line("link", "INFO", logger, event, about={"site": site, "round": number, "run": None}))
    assert found["event"] == event[:LONGEST].encode("utf-8", "backslashreplace").decode()
    assert found["round"] == number and "run" not in found
    assert ("site" in found) == bool(site)


class Sly:
    def __str__(self) -> str:
        raise RuntimeError(CANARY)


@pytest.mark.parametrize("arguments", [(HOSTILE,), (Sly(),), (1, 2), ()])
def test_a_record_that_cannot_be_put_together_is_told_as_far_as_it_can(arguments: tuple[object, ...]) -> None:
    record = logging.LogRecord("x", logging.ERROR, "path", 1, "text %s", arguments, None)
    found = strict(JsonLines("engine").format(record))
    assert found["event"].startswith("text ") and CANARY not in str(found)


def test_what_it_is_about_is_told_and_of_an_exception_its_kind_and_place() -> None:
    try:
        raise KeyError(CANARY)
    except KeyError:
        record = logging.LogRecord("x", logging.ERROR, "path", 1, "failed", None, sys.exc_info())
    record.__dict__.update(code="internal", site="charite", patient=CANARY)
    told = strict(JsonLines("daemon", lambda: {"site": "st-anna", "round": 3}).format(record))
    assert {key: told[key] for key in KNOWN if key in told} == {"site": "charite", "round": 3, "code": "internal"}
    assert told["error"] == "KeyError" and re.fullmatch(r"test_common_logs\.py:\d+", told["at"])
    assert CANARY not in str(told)


@given(anything)
def test_what_a_child_said_last_is_found_in_either_form(text: str) -> None:
    assert event_of(line("link", "ERROR", "x", text)) == text[:LONGEST].encode("utf-8", "backslashreplace").decode()
    assert event_of(f"consilium: {text}") == text


def test_a_supervisor_speaks_as_its_children_do(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    Supervising("text", said.append).tell("daemon: started")
    Supervising("json", said.append, "st-anna").tell(HOSTILE, "WARNING")
    assert said[0] == "daemon: started"
    found = strict(said[1])
    assert (found["role"], found["level"], found["site"]) == ("supervisor", "WARNING", "st-anna")
    with pytest.raises(ConsiliumError), Supervising("text", None).ending():
        raise ConsiliumError("x")
    with pytest.raises(SystemExit) as ended, Supervising("json", None).ending():
        raise ConfigError(HOSTILE)
    assert ended.value.code == 2
    assert strict(capsys.readouterr().err.rstrip("\n"))["level"] == "ERROR"


SCRIPT = f"""
import ctypes, logging, os, subprocess, sys, threading, warnings
from common.logs import set_up, tell_end
from common.errors import ConfigError
set_up(sys.argv[1], "link", "%(asctime)s %(levelname)s %(name)s: %(message)s", known=lambda: {{"site": "st-anna"}})
log = logging.getLogger("consilium.link")
log.info({HOSTILE!r})
log.warning("refused", extra={{"code": "timeout", "round": 2}})
log.error("%d", "no number")
print("printed", {HOSTILE!r}.encode("utf-8", "replace").decode())
sys.stderr.write("without an end")
sys.stderr.flush()
ctypes.CDLL(None).write(2, b"from C\\xff\\n", 8)
subprocess.run(["sh", "-c", "echo from a child >&2"], check=True)
warnings.warn("a warning")
class Sly:
    def __del__(self):
        raise ValueError("{CANARY}")
Sly()
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
os.write(2, b"x" * 20000 + b"\\n")
if sys.argv[2] == "raise":
    raise KeyError("{CANARY}")
sys.exit(tell_end(sys.argv[1], "link", ConfigError("wrong: {CANARY[:3]}")))
"""


def ran(form: str, end: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, form, end],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )


def test_whatever_a_process_prints_is_json() -> None:
    done = ran("json", "end")
    found = [strict(text) for text in done.stderr.decode("ascii").splitlines()]
    assert done.returncode == 2 and done.stdout == b""
    assert all(one["role"] == "link" and one["site"] == "st-anna" for one in found)
    assert CANARY not in str(found)
    ours = [one for one in found if one["logger"].startswith("consilium")]
    assert ours[0]["event"] == HOSTILE.encode("utf-8", "backslashreplace").decode()
    assert (ours[1]["code"], ours[1]["round"], ours[2]["event"]) == ("timeout", 2, "%d")
    assert [one["error"] for one in ours if "error" in one] == ["ValueError", "ZeroDivisionError"]
    assert ours[-1]["event"] == "wrong: Doe" and ours[-1]["level"] == "ERROR"
    foreign = "\n".join(one["event"] for one in found if one["logger"] == "stderr")
    for text in ("printed", "without an end", r"from C\xff", "from a child"):
        assert text in foreign
    assert "a warning" in next(one["event"] for one in found if one["logger"] == "py.warnings")
    assert foreign.count("x") >= 20000


def test_an_exception_that_ends_it_is_told_without_its_text() -> None:
    done = ran("json", "raise")
    found = [strict(text) for text in done.stderr.decode("ascii").splitlines()]
    (last,) = (one for one in found if one.get("error") == "KeyError")
    assert done.returncode == 1 and last["level"] == "CRITICAL" and last["at"].startswith("<string>:")
    assert CANARY not in str(found)


def test_text_is_as_it_was() -> None:
    done = ran("text", "end")
    said = done.stderr.decode("utf-8", "backslashreplace")
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING consilium\.link: refused$", said, re.MULTILINE)
    assert said.rstrip("\n").endswith("consilium: wrong: Doe")
    assert done.stdout.startswith(b"printed") and "from C" in said


CHATTY = """
import os, sys
from common.logs import line
texts = [line("link", "INFO", "x", f"{number} " + "y" * (number * 7 % 3000)) for number in range(5000)]
os.write(1, b"without an end")
for start in range(0, len(texts), 50):
    os.write(2, "".join(text + "\\n" for text in texts[start : start + 50]).encode())
"""


def test_no_line_is_cut_where_a_supervisor_puts_its_log_aside(tmp_path: Path) -> None:
    process = supervisor._Process(
        supervisor.Child("link", (sys.executable, "-c", CHATTY), {"PYTHONPATH": str(ROOT)}), tmp_path
    )
    process.start()
    while not process.ended():
        for pipe in process.pipes():
            process.read(pipe)
    assert process.bury() == 0
    process.log.close()
    files = sorted(tmp_path.iterdir(), reverse=True)
    assert len(files) == 2
    lines = b"".join(path.read_bytes() for path in files).split(b"\n")
    assert lines[-1] == b"without an end"
    assert [int(json.loads(text)["event"].partition(" ")[0]) for text in lines[:-1]] == [*range(5000)]
    assert all(path.read_bytes().startswith(b"{") for path in files)


# ------------------------------------------------------------------------------------------------------ true processes

SITE = '[site]\nname = "st-anna"\n[data]\nimages = "gone"\n[coordinator]\naddress = "127.0.0.1:1"\n'
SERVER = '[server]\nname = "chest"\n[network]\naddress = "127.0.0.1:1"\nlisten = "127.0.0.1:1"\noperator_port = 2\n'
PROCESSES = {
    "daemon": ("client.daemon", "site.toml"),
    "link": ("client.link", "site.toml"),
    "superlink": ("server.up", "superlink", "server.toml"),
    "supervisor": ("server.up", "up", "server.toml"),
    "engine": ("server.engine", "server.toml", "."),
}


@pytest.mark.slow
@pytest.mark.parametrize("role", PROCESSES)
def test_a_true_process_in_a_hostile_folder_ends_in_one_line_of_json(role: str, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b'a\n\r\x1b[31m\x85\xff\xe2\x80\xa8"{}')
    folder.mkdir()
    for name, text in (("site.toml", SITE), ("server.toml", SERVER)):
        (folder / name).write_text(text + '[logs]\nformat = "json"\n')
    module, *arguments = PROCESSES[role]
    named = [str(folder / one) if one == "." or one.endswith(".toml") else one for one in arguments]
    done = subprocess.run(
        [sys.executable, "-P", "-m", module, *named],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd="/",
        capture_output=True,
    )
    assert done.returncode in (1, 2) and done.stdout == b""
    (said,) = done.stderr.decode("ascii").splitlines()
    found = strict(said)
    assert (found["role"], found["level"]) == (role, "ERROR")
    assert "a\n\r\x1b[31m\\udc85\\udcff\u2028" in found["event"]

"""What a process prints for others to read: lines of text, or as `[logs] format` wants it one JSON object a line.

    {"time": "2026-11-26T18:00:00.123Z", "level": "WARNING", "logger": "consilium.link", "role": "link",
     "event": "timeout (ConnectTimeout); trying again in 0.9 s", "site": "st-anna", "code": "timeout"}

The first five keys are always there; `run`, `round`, `site` and `code` where they are known; of an exception `error`,
its kind, and `at`, the line of the code that raised it, never its text. A reader that expects JSON stumbles over any
other line. So whatever else the process prints, libraries in C and Python itself with its last words, is caught and
made an event of the logger `stderr`.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from common.errors import ConsiliumError

KNOWN = ("run", "round", "site", "code")
"""What an event may be about, as `extra` of a log record or from whoever sets up the log."""

LONGEST = 8000
"""Characters of an event; the rest of it is left out."""

_SHORT = 200  # characters of every other text
_FOREIGN = "stderr"
_DRAIN_S = 1.0
_log = logging.getLogger("consilium")

Known = Callable[[], Mapping[str, object]]


def nothing() -> Mapping[str, object]:
    """Return what is known where nothing is."""
    return {}


def set_up(form: str, role: str, text: str, *, level: int = logging.INFO, known: Known = nothing) -> None:
    """Log from now on to standard error, from the first line of a process of its own to the last.

    Args:
        form: `text` or `json`.
        role: what the process is: daemon, link, superlink, engine, keeper, monitor.
        text: the format of a line of text.
        level: the least that is logged.
        known: returns the run, round, site or code that every event is about.
    """
    if form == "text":
        logging.basicConfig(format=text, level=level, stream=sys.stderr)
    else:
        logging.basicConfig(handlers=[json_handler(role, known)], level=level)
        logging.getLogger("flwr").handlers.clear()  # a console of colours, beside the root's handlers


def json_handler(role: str, known: Known = nothing) -> logging.Handler:
    """Return what prints events as JSON; from now on nothing else reaches this process's standard output and error."""
    handler = logging.StreamHandler(os.fdopen(_captured(), "w", encoding="ascii"))
    handler.setFormatter(JsonLines(role, known))
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a reader that is gone must stop no work
    sys.excepthook = _ended
    threading.excepthook = lambda failed: _ended(failed.exc_type, failed.exc_value, failed.exc_traceback)
    sys.unraisablehook = lambda failed: _ended(failed.exc_type, failed.exc_value, failed.exc_traceback)
    return handler


class JsonLines(logging.Formatter):
    """Makes one line of JSON of a log record.

    Args:
        role: what the process is.
        known: returns what every event is about.
    """

    def __init__(self, role: str, known: Known = nothing) -> None:
        super().__init__()
        self._role = role
        self._known = known

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        about = {**self._known(), **{key: getattr(record, key) for key in KNOWN if hasattr(record, key)}}
        about |= _failure(record.exc_info)
        return line(self._role, record.levelname, record.name, _event(record), record.created, about)


def line(
    role: str, level: str, logger: str, event: str, created: float | None = None, about: Mapping[str, object] = {}
) -> str:
    r"""Return one event as JSON, without the end of the line.

    Args:
        role: of the process.
        level: DEBUG, INFO, WARNING, ERROR or CRITICAL.
        logger: whose event it is.
        event: what happened; may hold anything.
        created: seconds since 1970; None: now.
        about: what it is about; what is None or empty is left out.

    Examples:
        >>> line("link", "INFO", "consilium.link", "a\nb\udc80", 0.0, {"site": "st-anna", "code": ""})[54:]
        '"logger": "consilium.link", "role": "link", "event": "a\\nb\\\\udc80", "site": "st-anna"}'
    """
    moment = datetime.now(UTC) if created is None else datetime.fromtimestamp(created, UTC)
    fields: dict[str, object] = {
        "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": level,
        "logger": _clean(logger),
        "role": role,
        "event": _clean(event, LONGEST),
    }
    told = {key: value for key, value in about.items() if value is not None and value != ""}
    return json.dumps(
        fields | {key: value if isinstance(value, int) else _clean(str(value)) for key, value in told.items()}
    )


def event_of(said: str) -> str:
    """Return what a line that a process printed tells, whatever its form.

    Examples:
        >>> event_of('consilium: no such file'), event_of(line("link", "ERROR", "consilium", "no such file"))
        ('no such file', 'no such file')
    """
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        return str(json.loads(said)["event"])
    return said.removeprefix("consilium: ")


def tell_end(form: str, role: str, error: ConsiliumError) -> int:
    """Say in one line why a process ends, and return its exit code."""
    if form == "text":
        sys.stderr.write(f"consilium: {error}\n")
        return error.exit_code
    if not _log.hasHandlers():  # it ends before it came to set them up
        set_up(form, role, "")
    _log.error("%s", error)
    return error.exit_code


class Supervising:
    """How a supervisor tells of what it does: it has no thread but its own, so nothing is caught here.

    Args:
        form: `text` or `json`.
        site: the site's name, if it is one's.
        report: told each line.
    """

    def __init__(self, form: str, report: Callable[[str], None] | None, site: str = "") -> None:
        self._form = form
        self._site = site
        self._report = report or (lambda _line: None)

    def tell(self, text: str, level: str = "INFO") -> None:
        """Tell of an event."""
        self._report(text if self._form == "text" else self._line(text, level))

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Let what ends the block be the last line, in the form of all others.

        Raises:
            ConsiliumError: what ended the block, where lines are text.
            SystemExit: with its exit code, where they are JSON.
        """
        try:
            yield
        except ConsiliumError as error:
            if self._form == "text":
                raise
            sys.stderr.write(f"{self._line(str(error), 'ERROR')}\n")
            raise SystemExit(error.exit_code) from None

    def _line(self, text: str, level: str) -> str:
        return line("supervisor", level, "consilium.supervisor", text, about={"site": self._site})


def _event(record: logging.LogRecord) -> str:
    """Return what a record tells; one that cannot be put together must be no reason to print something else."""
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001  arguments may be anything, and so may what their texts raise
        return str(record.msg)


def _failure(found: Any) -> dict[str, object]:
    """Return kind and place of an exception."""
    kind, _, trace = found if isinstance(found, tuple) else (None, None, None)
    if kind is None:
        return {}
    return {"error": kind.__name__, "at": _place(trace)}


def _place(trace: TracebackType | None) -> str:
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"


def _clean(text: str, limit: int = _SHORT) -> str:
    """Return a text as every reader of JSON takes it: lone surrogates, of which not all know, are written out."""
    return text[:limit].encode("utf-8", "backslashreplace").decode()


def _ended(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    _log.critical("a process or a thread of it ended", exc_info=(kind, error or Exception(), trace))


def _captured() -> int:
    """Catch what the process prints, and return where its standard error went before."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    ours = os.dup(2)
    reader, writer = os.pipe()
    # Whoever prints may hold Python's lock, which the thread that reads needs: it must never have to wait for that.
    os.set_blocking(writer, False)
    for handle in (1, 2):
        os.dup2(writer, handle)
    os.close(writer)
    thread = threading.Thread(target=_read, args=(reader,), name="stderr", daemon=True)
    thread.start()
    atexit.register(_let_go, thread)
    return ours


def _read(reader: int) -> None:
    """Make events of what is printed, until its end."""
    foreign = logging.getLogger(_FOREIGN)
    with open(reader, "rb") as pipe:
        while said := pipe.readline(LONGEST):
            if said.strip():
                foreign.warning("%s", said.decode("utf-8", "backslashreplace").rstrip())


def _let_go(thread: threading.Thread) -> None:
    """Take in what was printed last; what comes after that is lost."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for handle in (1, 2):
        os.dup2(nowhere, handle)
    thread.join(_DRAIN_S)

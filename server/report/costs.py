"""What a run cost: bytes by purpose, seconds by purpose, each a part of a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from server.report.reading import Run, total
from server.report.wording import DASH, duration, grouped, percent, plural, size


@dataclass(frozen=True)
class Part:
    """One part of a whole: its figure, its share and its place in the bar."""

    name: str
    text: str
    share: str
    start: str
    length: str
    style: str


@dataclass(frozen=True)
class Account:
    """A whole and its parts, with sentences below."""

    title: str
    parts: list[Part]
    note: str


_START = ("describe", "prepare", "statistics", "freeze", "closed form")
_END = ("validation", "test")


def traffic(run: Run) -> Account:
    """Bytes of all messages, by what they were for."""
    trunk, transfers = run.section("trunk").get("bytes"), list(run.section("trunk", "transfers").values())
    named = [
        (_trunk_name(transfers), None if trunk is None or not transfers else trunk * sum(transfers)),
        ("Weights, to the sites", total(entry.weights[0] for entry in run.rounds)),
        ("Weights, from the sites", total(entry.weights[1] for entry in run.rounds)),
        ("Rest of the rounds, to the sites", total(entry.other[0] for entry in run.rounds)),
        ("Rest of the rounds, from the sites", total(entry.other[1] for entry in run.rounds)),
        ("Start: sums and first heads", _of_phases(run, _START)),
        ("Last validation and test", _of_phases(run, _END)),
    ]
    whole = total(value for _, value in named)
    parts = _parts([(name, value, size(value)) for name, value in named], "b")
    title = "Bytes were not recorded" if whole is None else f"{size(whole)} in all messages"
    return Account(title, parts, " ".join(_traffic_note(run)))


def _of_phases(run: Run, phases: Sequence[str]) -> float | None:
    """Return the bytes of these phases, both ways; None if none was recorded."""
    both = [run.section("traffic", phase) for phase in phases]
    return total(group.get(key) for group in both if group for key in ("bytes_down", "bytes_up"))


def _trunk_name(transfers: Sequence[int]) -> str:
    if set(transfers) == {1}:
        return "Trunk, once to each site"
    return f"Trunk, {plural(sum(transfers), 'time')} to {plural(len(transfers), 'site')}"


def _traffic_note(run: Run) -> list[str]:
    upper = run.section("upper")
    note = [f"The trunk is {size(run.section('trunk').get('bytes'))}; no round carries it."]
    later = [entry.traffic for entry in run.rounds if entry.number and entry.traffic is not None]
    if later:
        note.append(f"A round moves {size(fmean(later))} on average, all sites and both directions.")
    parameters, dtype = upper.get("parameters"), upper.get("wire_dtype") or DASH
    note.append(f"The {grouped(parameters)} trained parameters travel as {dtype}.")
    return note


def time(run: Run) -> Account:
    """Seconds of the phases that are timed, and what is left of the total."""
    seconds = run.section("seconds")
    named = [
        ("Features (trunk, once)", seconds.get("features")),
        ("Rounds", seconds.get("rounds")),
        ("Baselines", seconds.get("baselines")),
    ]
    whole, known = seconds.get("total"), total(value for _, value in named)
    if whole is not None and known is not None and whole - known > 0.005 * whole:
        named.append(("Data, model, start and test", whole - known))
    parts = _parts([(name, value, duration(value)) for name, value in named], "t")
    each = [entry.seconds for entry in run.rounds if entry.number and entry.seconds is not None]
    note = f"A round took {duration(fmean(each))} on average." if each else ""
    return Account("Time was not recorded" if whole is None else f"{duration(whole)} in all", parts, note)


def _parts(named: Sequence[tuple[str, float | None, str]], style: str) -> list[Part]:
    whole, start, parts = total(value for _, value, _ in named) or 0.0, 0.0, []
    for place, (name, value, text) in enumerate(named):
        share = (value or 0.0) / whole if whole else 0.0
        printed = DASH if value is None or not whole else percent(share)
        parts.append(Part(name, text, printed, f"{100 * start:.2f}%", f"{100 * share:.2f}%", f"{style}{place}"))
        start += share
    return parts

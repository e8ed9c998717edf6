"""What those see who watch over a site: its trail, what is to leave it, what waits for them, what privacy it has spent.

For a data protection officer rather than for an operator: facts are put in words, and nothing here changes anything but
`client.approval` and the marks of `client.outbox`.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from client import audit, chain, outbox
from client.outbox import Letter, Outbox
from client.report import audit_page
from client.site_config import SiteConfig
from common.errors import ConsiliumError, UsageError
from common.files import write_atomic

Format = Literal["csv", "html", "both"]

COLUMNS = ("number", "time", "event", "meaning", "facts", "sha256")
"""The columns of the exported trail."""

_KINDS = ("csv", "html")
_STEERING = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet takes a cell that begins so for a formula
_BOM = b"\xef\xbb\xbf"  # without which a spreadsheet takes UTF-8 for the local code page


@dataclass(frozen=True)
class Trail:
    """An audit trail, up to where it holds."""

    entries: tuple[chain.Entry, ...]
    wrong: str  # what is wrong after them; empty: nothing

    @property
    def last(self) -> str:
        """The hash that names the whole trail."""
        return self.entries[-1].sha256 if self.entries else chain.START


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    files: tuple[Path, ...]
    trail: Trail


def trail(path: Path) -> Trail:
    """Return an audit trail up to its first line that does not hold.

    Raises:
        ConsiliumError: there is none, or it cannot be read.
    """
    return Trail(*audit.held(path))


def export(config: SiteConfig, output: Path, wanted: Format | None) -> Exported:
    """Write the audit trail for the eyes of people.

    Args:
        config: the site.
        output: a folder, made if absent, or a file.
        wanted: what to write; None: what the file's name says, else both.

    Raises:
        UsageError: it cannot be written there.
        ConsiliumError: there is no trail.
    """
    found = trail(config.audit)
    targets = _targets(config.name, output, wanted)
    spent, unread = _spent(config)
    contents = {
        "csv": lambda: as_csv(found),
        "html": lambda: audit_page.render(config.name, found.entries, found.wrong, spent, unread).encode("utf-8"),
    }
    try:
        for kind, path in targets.items():
            path.parent.mkdir(mode=0o700, exist_ok=True)
            write_atomic(path, contents[kind](), mode=0o600)
    except OSError as error:
        raise UsageError(f"--output: {output} cannot be written ({error.strerror})") from None
    return Exported(tuple(targets.values()), found)


def as_csv(found: Trail) -> bytes:
    """Return a trail as CSV: a row an entry, and the first row says where it breaks, if it does."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    if found.wrong:
        writer.writerow(["", "", "broken", cell(found.wrong), "", ""])
    for number, entry in enumerate(found.entries, 1):
        facts = "; ".join(f"{name}={value}" for name, value in flat(entry.facts))
        meaning = audit.EVENTS.get(entry.event, "")
        row = [str(number), entry.time, entry.event, meaning, facts, entry.sha256]
        writer.writerow([cell(value) for value in row])
    return _BOM + text.getvalue().encode("utf-8", "backslashreplace")


def cell(text: str) -> str:
    r"""Return a text that no spreadsheet takes for a formula.

    Examples:
        >>> cell("=1+1"), cell("1")
        ("'=1+1", '1')
    """
    return f"'{text}" if text.startswith(_STEERING) else text


def flat(facts: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, str]]:
    """Yield the facts of an entry, names of names joined by a point.

    Examples:
        >>> list(flat({"kind": {"train": 1}, "norms": [1, 2]}))
        [('kind.train', '1'), ('norms', '1 2')]
    """
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{within}{name}.")
        elif isinstance(value, list | tuple):
            yield f"{within}{name}", " ".join(map(str, value))
        else:
            yield f"{within}{name}", str(value)


def event(number: int, entry: chain.Entry) -> dict[str, Any]:
    """Return one entry of a trail for a screen, its facts also in words."""
    said = ", ".join(f"{name} {audit_page.in_words(value)}" for name, value in entry.facts.items())
    meaning = audit.EVENTS.get(entry.event, "")
    shown = {"number": number, "time": entry.time, "event": entry.event, "meaning": meaning}
    return {**shown, "facts": dict(entry.facts), "in_words": said, "sha256": entry.sha256}


def box(config: SiteConfig) -> Outbox:
    """Return the site's outbox."""
    return Outbox.at(config.state)


def letters(config: SiteConfig) -> list[dict[str, Any]]:
    """Return what is in the outbox, the oldest first."""
    return [_listed(letter) for letter in _letters(config)]


def upcoming(config: SiteConfig) -> dict[str, Any] | None:
    """Return the newest reply that has not left yet, as it would leave: every array and every fact of it.

    Raises:
        ConsiliumError: the outbox cannot be read.
    """
    found = [letter for letter in _letters(config) if not letter.sent]
    waiting = [letter for letter in found if not letter.released] or found
    if not waiting:
        return None
    letter = waiting[-1]
    return {**_listed(letter), **outbox.describe(box(config).content(letter), _shapes(letter.facts))}


def release(config: SiteConfig, sha256: str) -> dict[str, Any]:
    """Let the reply that is held go.

    Args:
        config: the site.
        sha256: of the reply, or how it begins; empty: the only one.

    Raises:
        UsageError: none is held, several are, or none begins like that.
        ConsiliumError: the outbox cannot be read or written.
    """
    held = [letter for letter in _letters(config) if not (letter.released or letter.sent)]
    named = [letter for letter in held if letter.sha256.startswith(sha256.strip().lower())]
    if not named:
        remedy = "`consilium site outbox` lists what is there"
        raise UsageError(f"--release: no reply {f'{sha256[:80]!r} ' if sha256 else ''}is held; {remedy}")
    if len(named) > 1:
        known = ", ".join(letter.sha256[:16] for letter in named)
        raise UsageError(f"--release: {len(named)} replies are held ({known}); name the one by its SHA-256")
    audit.append(config.audit, "released", {"sha256": named[0].sha256})
    try:
        box(config).release(named[0].ticket)
    except OSError as error:
        raise ConsiliumError(f"{named[0].path}: cannot be released ({error.strerror})") from None
    return {**_listed(named[0]), "released": True}


def asked_in_words(asked: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a run asks for, in words for a person who is to approve it."""
    labels = ", ".join(asked.get("labels") or ()) or "not said"
    rounds = f"{asked.get('rounds')} rounds of {asked.get('strategy')}, each with {_work(asked)}"
    return [
        ("run", str(asked.get("fingerprint"))),
        ("waits since", str(asked.get("asked"))),
        ("what is learnt", f"{asked.get('task') or 'no name'}: {labels}"),
        ("which model", f"{asked.get('backbone')}, trained: {asked.get('trainable')}"),
        ("its frozen part", f"SHA-256 {asked.get('trunk_sha256') or 'not said'}"),
        ("what this site does", rounds),
        ("who takes part", _company(asked)),
        ("privacy", _privacy(asked.get("privacy"))),
        ("this site brings", _brings(asked.get("site") or {})),
    ]


def statement(config: SiteConfig) -> dict[str, Any]:
    """Return what the site has spent of its patients' privacy, as the ledger has it.

    Raises:
        ConsiliumError: the ledger cannot be used.
    """
    from client import ledger, site_ledger

    policy = config.toml.policy
    opened = site_ledger.open_ledger(config, write=False)
    return ledger.statement(opened, policy.max_epsilon, policy.max_delta)


def _spent(config: SiteConfig) -> tuple[dict[str, Any] | None, str]:
    """Return what the ledger says, or why it says nothing: an export tells of both."""
    try:
        return statement(config), ""
    except ConsiliumError as error:
        return None, str(error)


def _targets(name: str, output: Path, wanted: Format | None) -> dict[str, Path]:
    """Return what goes where: a file is known by its suffix, everything else is a folder."""
    suffix = output.suffix.lower().lstrip(".")
    if output.is_dir() or suffix not in _KINDS:
        if os.path.lexists(output) and not output.is_dir():
            raise UsageError(f"--output: {output} is a file of another kind, expected a folder, .csv or .html")
        return {kind: output / f"{name}-audit.{kind}" for kind in _KINDS if wanted in (None, "both", kind)}
    if wanted not in (None, "both", suffix):
        raise UsageError(f"--output: {output} has another suffix than --format {wanted}")
    return {kind: output.with_suffix(f".{kind}") for kind in _KINDS if wanted == "both" or kind == suffix}


def _letters(config: SiteConfig) -> tuple[Letter, ...]:
    try:
        return box(config).letters()
    except OSError as error:
        raise ConsiliumError(f"{config.state / outbox.FOLDER}: cannot be read ({error.strerror})") from None


def _listed(letter: Letter) -> dict[str, Any]:
    return {
        "time": letter.time,
        "kind": letter.kind,
        "run": letter.run,
        "bytes": letter.nbytes,
        "sha256": letter.sha256,
        "released": letter.released,
        "sent": letter.sent,
    }


def _shapes(facts: Mapping[str, Any]) -> outbox.Shapes | None:
    """Return the names and shapes that a reply was kept with."""
    try:
        return {str(name): tuple(map(int, shape)) for name, shape in facts.get("names") or ()} or None
    except (ValueError, TypeError):
        return None


def _work(asked: Mapping[str, Any]) -> str:
    if asked.get("local_steps"):
        return f"{asked['local_steps']} steps of {asked.get('batch_size')} images"
    passes = asked.get("local_epochs") or 1
    return f"{passes} {'pass' if passes == 1 else 'passes'} over its images, {asked.get('batch_size')} at a time"


def _company(asked: Mapping[str, Any]) -> str:
    sites: Sequence[str] = asked.get("sites") or ()
    quorum = asked.get("quorum")
    needed = "all of them" if quorum is None else str(quorum)
    return f"{', '.join(sites) or 'not said'}; a round needs {needed}"


def _privacy(target: Mapping[str, Any] | None) -> str:
    if not target:
        return "none: exact updates leave, which can tell of single patients"
    if target.get("epsilon") is not None:
        text = f"epsilon {target['epsilon']:g} for the whole run"
    else:
        text = f"noise multiplier {target.get('noise_multiplier'):g}"
    delta = f", delta {target['delta']:g}" if target.get("delta") else ", delta by the number of patients"
    counts = target.get("histogram_epsilon")
    evaluation = f"; evaluation: epsilon {counts:g}" if counts else "; evaluation: exact counts"
    return text + delta + evaluation


def _brings(site: Mapping[str, Any]) -> str:
    labels = ", ".join(f"{name} {count}" for name, count in (site.get("labels") or {}).items())
    known = [f"{site[key]} {key}" for key in ("patients", "examples") if site.get(key) is not None]
    return "; ".join(filter(None, (", ".join(known), labels))) or "not said"

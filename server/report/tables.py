"""The tables of the report: headline figures, rounds, sites, labels, images left out, configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from server.refusals import explain
from server.report.plots import COLOURS
from server.report.reading import SCHEMA, Round, Run, Score
from server.report.verdict import compare
from server.report.wording import DASH, GAP, Figure, duration, fixed, grouped, joined, size

METRICS = (
    ("auc", "AUC"),
    ("average_precision", "Average precision"),
    ("accuracy", "Accuracy"),
    ("balanced_accuracy", "Balanced accuracy"),
    ("precision", "Precision"),
    ("recall", "Recall (sensitivity)"),
    ("specificity", "Specificity"),
    ("f1", "F1"),
    ("ece", "Calibration error (ECE)"),
    ("brier", "Brier score"),
)
PER_LABEL = (
    ("auc", "AUC"),
    ("precision", "Precision"),
    ("recall", "Recall"),
    ("specificity", "Specificity"),
    ("f1", "F1"),
)
OPERATING = ("threshold", "precision", "recall", "specificity")

Pairs = list[tuple[str, str]]


# Headline figures


@dataclass(frozen=True)
class Tile:
    """A headline figure."""

    name: str
    figure: Figure
    below: str
    other: str


def tiles(run: Run) -> list[Tile]:
    """Return the four headline figures, none if there was no test."""
    named = [
        ("auc", "AUC", f"95{GAP}% interval {run.test.interval_text or DASH}"),
        ("accuracy", "Accuracy", run.subject if run.several else "all labels"),
        ("precision", "Precision", run.subject),
        ("recall", "Recall", run.subject),
    ]
    return [_tile(run, *tile) for tile in named] if run.test.values else []


def _tile(run: Run, key: str, name: str, below: str) -> Tile:
    other = run.pooled.get(key)
    return Tile(name, run.test.figure(key), below, "" if other is None else f"all data pooled {fixed(other)}")


def figures(run: Run) -> list[tuple[str, Figure, Figure]]:
    """Return every metric with its name, of the federated and of the pooled model."""
    return [(name, run.test.figure(key), run.pooled.figure(key)) for key, name in METRICS]


def operating_point(run: Run) -> list[tuple[str, Figure]]:
    """Return the figures at the threshold frozen on validation, none where there is no such threshold."""
    point = run.test.operating_point
    return [(key.capitalize(), Figure(fixed(point.get(key)))) for key in OPERATING] if point.values else []


# Rounds


@dataclass(frozen=True)
class RoundRow:
    """One line of the table of rounds."""

    number: int
    score: Score
    n: str
    loss: str
    sites: str
    seconds: str
    bytes: str


def rounds(run: Run) -> list[RoundRow]:
    """Return a row for each round."""
    return [_round(entry) for entry in run.rounds]


def _round(entry: Round) -> RoundRow:
    """The start has no exchange of its own: its zeros are dashes."""
    start = entry.number == 0
    return RoundRow(
        number=entry.number,
        score=entry.validation,
        n=grouped(entry.validation.n),
        loss=fixed(entry.mean_loss),
        sites=grouped(entry.contributors),
        seconds=duration(entry.seconds or None if start else entry.seconds),
        bytes=size(entry.traffic or None if start else entry.traffic),
    )


# Sites


@dataclass(frozen=True)
class SiteRow:
    """One line of the table of sites."""

    name: str
    status: str
    reasons: str
    examples: list[tuple[str, str]]
    mix: list[tuple[str, str, int]]
    mix_title: str
    rounds: str
    score: Score
    alone: Score
    gain: Figure
    tone: str


def sites(run: Run) -> list[SiteRow]:
    """Return a row for each site."""
    return [_site(run, name) for name in run.sites]


def _site(run: Run, name: str) -> SiteRow:
    site, held = run.section("sites", name), run.section("sites", name, "labels")
    examples = run.section("sites", name, "examples")
    counts = {label: held.get(label) or 0 for label in run.labels}
    alone = run.alone.get(name, Score())
    gain, tone = _gain(run, alone)
    return SiteRow(
        name=name,
        status=site.get("status") or DASH,
        reasons=_reasons(run, name) or explain(str(site.get("status", ""))).partition(": ")[2],
        examples=[(split.capitalize(), grouped(examples.get(split))) for split in ("train", "validation", "test")],
        mix=_mix(counts),
        mix_title=", ".join(f"{label}: {grouped(n)}" for label, n in counts.items()),
        rounds=grouped(site.get("rounds")),
        score=run.at_sites.get(name, Score()),
        alone=alone,
        gain=gain,
        tone=tone,
    )


def _reasons(run: Run, site: str) -> str:
    """Why a site missed rounds: each reason with its rounds."""
    missed: dict[str, list[str]] = {}
    for entry in run.rounds:
        reason = entry.sites.get(site, {}).get("reason")
        if reason:
            missed.setdefault(reason, []).append(str(entry.number))
    return "; ".join(
        f"{reason} (round{'s' if len(numbers) > 1 else ''} {joined(numbers, 6)})" for reason, numbers in missed.items()
    )


def _mix(counts: Mapping[str, int]) -> list[tuple[str, str, int]]:
    """Start, length and colour of each label's share of a bar."""
    whole, start, parts = sum(counts.values()), 0, []
    for place, n in enumerate(counts.values()):
        if n:
            parts.append((f"{100 * start / whole:.2f}%", f"{100 * n / whole:.2f}%", place % COLOURS))
        start += n
    return parts


def _gain(run: Run, alone: Score) -> tuple[Figure, str]:
    """Federated minus alone, both on all test images; coloured only where the intervals lie apart."""
    if run.test.auc is None or alone.auc is None:
        return Figure(DASH, alone.why if alone.auc is None else run.test.why), ""
    difference = round(run.test.auc - alone.auc, 3)
    text = ("+" if difference > 0 else "") + fixed(difference + 0.0)
    apart = "the intervals lie apart"
    why, tone = {
        "above": (apart, "up"),
        "below": (apart, "down"),
        "overlap": ("the intervals overlap: no difference can be shown", ""),
        "unknown": ("no interval to compare", ""),
    }[compare(run.test, alone)]
    return Figure(text, why), tone


# Labels


@dataclass(frozen=True)
class LabelRow:
    """One line of the table of labels."""

    name: str
    colour: int
    n: str
    annotated: str  # images that were annotated, of several labels an image
    interval: str
    figures: list[Figure]
    chosen: list[Figure]  # at the label's own operating point


def labels(run: Run) -> list[LabelRow]:
    """Return a row for each label, none if there was no test."""
    if not run.test.values:
        return []
    return [_label(run.test.label(label), label, place) for place, label in enumerate(run.labels)]


def _label(score: Score, name: str, place: int) -> LabelRow:
    point = score.operating_point
    return LabelRow(
        name=name,
        colour=place % COLOURS,
        n=grouped(score.n),
        annotated=grouped(score.annotated),
        interval=score.interval_text or DASH,
        figures=[score.figure(key) for key, _ in PER_LABEL],
        chosen=[Figure(fixed(point.get(key)), "" if point.values else "no operating point") for key in OPERATING],
    )


# Notes


def left_out(run: Run) -> list[tuple[str, str, str]]:
    """Return what became of images that were not used, the reason's code, and their number."""
    return [
        (what, code, grouped(count))
        for key, what in (("quarantine", "quarantined"), ("dropped", "dropped"))
        for code, count in sorted(run.section(key).items())
    ]


# Configuration


def identity(run: Run) -> Pairs:
    """Return what tells this run from others."""
    trunk, upper = run.section("trunk"), run.section("upper")
    return [
        ("Fingerprint of the run", _plain(run.result.get("fingerprint"))),
        ("Trunk, SHA-256", _plain(trunk.get("sha256"))),
        ("Trunk, parameters", grouped(trunk.get("parameters"))),
        ("Upper, parameters", grouped(upper.get("parameters"))),
        ("Result schema", str(SCHEMA)),
    ]


def configuration(run: Run) -> list[tuple[str, Pairs]]:
    """Return every setting in full, by group."""
    config = run.section("config")
    groups = {name: value for name, value in config.items() if isinstance(value, Mapping)}
    loose = {name: value for name, value in config.items() if name not in groups}
    known = {"run": loose, **groups, "weights": run.section("weights"), "software": run.section("software")}
    return [(name, list(_flat(group))) for name, group in known.items() if group]


def _flat(group: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in group.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _plain(value)


def _plain(value: Any) -> str:
    """A value in full, unrounded; null is a dash."""
    if value is None or value == []:
        return DASH
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value) or "“”"

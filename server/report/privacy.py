"""Privacy in the report: what each site spent, what is outside of epsilon, and what epsilon costs in accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.report.charts import Axis, Canvas, Dot, Line, Plot, axis
from server.report.reading import Run, natural
from server.report.wording import DASH, fixed

SPENT = ("epsilon", "planned_epsilon", "delta", "noise_multiplier", "sampling_rate", "steps")

OFF = "none"
"""What stands for a run without privacy where others have their epsilon."""


@dataclass(frozen=True)
class Privacy:
    """What each site spent."""

    unit: str
    largest: str
    rows: list[tuple[str, list[str]]]
    outside: list[str]  # what epsilon does not cover, in sentences


def spent(run: Run) -> Privacy | None:
    """Return the differential privacy spent, `None` if there was none."""
    sites = run.section("privacy", "sites")
    if not sites:
        return None
    rows = [
        (site, [_figure(key, (sites[site] or {}).get(key)) for key in SPENT]) for site in sorted(sites, key=natural)
    ]
    known = [value for figures in sites.values() if (value := (figures or {}).get("epsilon")) is not None]
    whole = run.section("privacy")
    largest = _figure("epsilon", max(known, default=None))
    return Privacy(whole.get("unit") or DASH, largest, rows, list(whole.get("outside") or ()))


def at_most(epsilon: float) -> str:
    """Return an epsilon as printed: never less than it is.

    Examples:
        >>> at_most(2.9871), at_most(3.0)
        ('2.988', '3.000')
    """
    return fixed(math.ceil(1000 * epsilon - 1e-9) / 1000)


def _figure(key: str, value: Any) -> str:
    if value is None:
        return DASH
    if key in ("epsilon", "planned_epsilon"):
        return at_most(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    epsilon: float | None  # None: without privacy
    federated: Mapping[str, Any]
    pooled: Mapping[str, Any]
    alone: tuple[float, ...]  # AUC of each site by itself, where it has one
    folder: str

    @property
    def name(self) -> str:
        """The epsilon as printed."""
        return OFF if self.epsilon is None else f"{self.epsilon:g}"

    @property
    def mean_alone(self) -> float | None:
        """The mean AUC of single sites."""
        return math.fsum(self.alone) / len(self.alone) if self.alone else None

    @property
    def cells(self) -> list[str]:
        """What the table says of it."""
        ends = self.federated.get("auc_ci95")
        interval = f"{fixed(ends[0])} to {fixed(ends[1])}" if ends else DASH
        spread = f"{fixed(min(self.alone))} to {fixed(max(self.alone))}" if self.alone else DASH
        return [
            fixed(self.federated.get("auc")),
            interval,
            fixed(self.federated.get("accuracy")),
            fixed(self.pooled.get("auc")),
            fixed(self.mean_alone),
            spread,
        ]


def sweep(run: Run) -> list[Point]:
    """Return the runs of a sweep by epsilon, the strictest first, that without privacy last; none of a single run."""
    points = [
        Point(
            epsilon=one.get("epsilon"),
            federated=one.get("federated") or {},
            pooled=one.get("pooled") or {},
            alone=tuple(value for value in (one.get("local") or {}).values() if value is not None),
            folder=str(one.get("folder") or ""),
        )
        for one in run.result.get("sweep") or ()
    ]
    return sorted(points, key=lambda point: math.inf if point.epsilon is None else point.epsilon)


@dataclass(frozen=True)
class EpsilonAxis(Axis):
    """A logarithmic scale of epsilons; the place behind the largest stands for no privacy."""

    def at(self, value: float) -> float:
        """Place of an epsilon, 0 to 1."""
        low, high = math.log(self.low), math.log(self.high)
        return min(1.0, max(0.0, (math.log(value) - low) / (high - low)))

    def text(self, tick: float) -> str:
        """An epsilon as printed."""
        return OFF if tick == self.ticks[-1] and self.digits else f"{tick:g}"


def utility(points: Sequence[Point]) -> Plot | None:
    """AUC against epsilon: the federation, all data pooled, and the mean of the sites alone."""
    places = [point.epsilon if point.epsilon is not None else _beyond(points) for point in points]
    columns = {
        ("federated", "fed"): [point.federated.get("auc") for point in points],
        ("all data pooled", "pool"): [point.pooled.get("auc") for point in points],
        ("mean of the sites alone", "alone"): [point.mean_alone for point in points],
    }
    known = [value for column in columns.values() for value in column if value is not None]
    if len(points) < 2 or not known:
        return None
    open_end = int(points[-1].epsilon is None)
    canvas = Canvas(EpsilonAxis(places[0], places[-1], tuple(places), open_end), axis(known, least=0.0, most=1.0))
    lines = tuple(_line(canvas, *key, places, column) for key, column in columns.items() if any(column))
    return Plot(canvas, "epsilon of each site", "AUC on the pooled test images", lines)


def _beyond(points: Sequence[Point]) -> float:
    known = [point.epsilon for point in points if point.epsilon is not None]
    return 2.5 * max(known, default=1.0)


def _line(canvas: Canvas, name: str, style: str, places: Sequence[float], values: Sequence[float | None]) -> Line:
    points = list(zip(places, values, strict=True))
    dots = tuple(
        Dot(*canvas.at(x, y), 3.2, f"{canvas.x.text(x)}: {name} {fixed(y)}") for x, y in points if y is not None
    )
    return Line(name, style, canvas.path(points), dots)

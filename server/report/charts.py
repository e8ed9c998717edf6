"""Geometry of the report's charts: scales, places and paths; colours and strokes live in the template."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from server.report.wording import fixed


@dataclass(frozen=True)
class Axis:
    """A linear scale from `low` to `high` with its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    digits: int

    def at(self, value: float) -> float:
        """Place of a value, 0 at `low` and 1 at `high`; what lies outside stays at the edge."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def percent(self, value: float) -> str:
        """The same place as an SVG length."""
        return f"{100 * self.at(value):.2f}%"

    def length(self, low: float, high: float) -> str:
        """The way from one value to another as an SVG length."""
        return f"{100 * (self.at(high) - self.at(low)):.2f}%"

    def text(self, tick: float) -> str:
        """A tick as printed."""
        return f"{tick:.0e}" if self.digits > 6 or abs(self.high) >= 1e6 else fixed(tick, self.digits)


UNIT = Axis(0.0, 1.0, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), 1)


def axis(values: Iterable[float], least: float = -math.inf, most: float = math.inf) -> Axis:
    """Choose a scale with round ticks that spans the values, within [least, most].

    Examples:
        >>> axis([0.79, 0.976], most=1.0).ticks
        (0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
    """
    kept = list(values) or [0.0, 1.0]
    low, high = min(kept), max(kept)
    narrow = max(0.05, 0.05 * abs(high)) - (high - low)  # closer than this and noise would look like a trend
    if narrow > 0:
        low, high = max(least, low - narrow / 2), min(most, high + narrow / 2)
    step = _step((high - low) / 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    inside = [k for k in range(first, last + 1) if least - 1e-9 <= k * step <= most + 1e-9]
    ticks = tuple(round(k * step, digits) for k in inside)
    return Axis(max(least, first * step), min(most, last * step), ticks, digits)


def round_axis(numbers: Sequence[int]) -> Axis:
    """Choose a scale of whole rounds."""
    low, high = min(numbers), max(numbers)
    step = max(1, int(_step(max(1, high - low) / 8)))
    ticks = tuple(float(k) for k in range(low, high + 1) if k % step == 0)
    return Axis(float(low), float(max(high, low + 1)), ticks, 0)


def _step(rough: float) -> float:
    """The round number (1, 2 or 5 times a power of ten) nearest above `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))


@dataclass(frozen=True)
class Canvas:
    """A drawing area with two scales, in SVG user units."""

    x: Axis
    y: Axis
    width: int = 480
    height: int = 280
    left: int = 58
    top: int = 14

    @property
    def right(self) -> int:
        """Right edge of the inner area."""
        return self.width - 14

    @property
    def bottom(self) -> int:
        """Lower edge of the inner area."""
        return self.height - 42

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Place of a data point."""
        return self._across(self.x.at(x)), self._up(self.y.at(y))

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        """Place and text of each tick."""
        return [(self._across(self.x.at(tick)), self.x.text(tick)) for tick in self.x.ticks]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """Place and text of each tick."""
        return [(self._up(self.y.at(tick)), self.y.text(tick)) for tick in self.y.ticks]

    def path(self, points: Iterable[tuple[float, float | None]]) -> str:
        """A path through the points, broken where a value is undefined."""
        pieces, pen = [], "M"
        for x, y in points:
            if y is None:
                pen = "M"
                continue
            across, up = self.at(x, y)
            pieces.append(f"{pen}{across:g} {up:g}")
            pen = "L"
        return "".join(pieces)

    def _across(self, fraction: float) -> float:
        return round(self.left + fraction * (self.right - self.left), 1)

    def _up(self, fraction: float) -> float:
        return round(self.bottom - fraction * (self.bottom - self.top), 1)


def square() -> Canvas:
    """Return a canvas for shares against shares."""
    return Canvas(UNIT, UNIT, 400, 400)


@dataclass(frozen=True)
class Dot:
    """A marked point."""

    x: float
    y: float
    radius: float
    title: str


@dataclass(frozen=True)
class Line:
    """One curve: a path, gaps included, and its points; without a name it is not in the legend."""

    name: str
    style: str
    path: str
    dots: tuple[Dot, ...] = ()


@dataclass(frozen=True)
class Marker:
    """A vertical line with a text beside it."""

    x: float
    text: str
    anchor: str


@dataclass(frozen=True)
class Plot:
    """A chart with two axes."""

    canvas: Canvas
    x_name: str
    y_name: str
    lines: tuple[Line, ...]
    area: str = ""
    marker: Marker | None = None
    diagonal: bool = False
    ring: Dot | None = None

    @property
    def legend(self) -> list[Line]:
        """The curves to tell apart."""
        named = [line for line in self.lines if line.name]
        return named if len(named) > 1 else []


@dataclass(frozen=True)
class Row:
    """One line of a dot-and-interval chart; places are SVG lengths."""

    name: str
    style: str
    text: str
    beside: str
    n: str
    why: str = ""
    dot: str = ""
    span: tuple[str, str] | None = None
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Forest:
    """A dot-and-interval chart: one scale, a row a model, and a band shaded through all rows."""

    scale: Axis
    rows: tuple[Row, ...]
    band: tuple[str, str] | None = None

    @property
    def ticks(self) -> list[tuple[str, str]]:
        """Place and text of each tick."""
        return [(self.scale.percent(tick), self.scale.text(tick)) for tick in self.scale.ticks]

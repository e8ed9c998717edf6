"""The page a study coordinator reads after a run: `result.json` in, one self-contained HTML file out.

Everything on the page is taken or computed from the result alone. The page asks the network for nothing, runs no
script, and is the same bytes for the same result. Names of sites and labels are chosen by others, so the template
escapes every value.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

import jinja2

from common.errors import UsageError

SCHEMA = 1
DASH = "–"
MANY = 12  # more sites than this and a chart summarises them instead of naming each
TINY = 10  # fewer test images of a label than this and its figures say little
NAMED = 8  # more curves than this and the table below the chart is their legend
TALL = 20  # a longer table scrolls in its own area on a screen (never in print)
COLOURS = 20  # label colours the style sheet defines
UNDEFINED = {
    "unmeasured": "not measured",
    "empty": "undefined: no images",
    "one label": "undefined: support too small, one label only",
    "other": "undefined or not recorded",
}
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
STATUS = {
    "completed": ("completed", "good"),
    "completed_partial": ("completed in part", "warn"),
    "failed": ("failed", "bad"),
}


def render(result: Mapping[str, Any]) -> str:
    """Return the report of one run as a complete HTML document.

    Args:
        result: the content of `result.json`, schema 1. Any metric may be null; test, baselines, curves may be absent.

    Raises:
        UsageError: the result has another schema.
    """
    if result.get("schema") != SCHEMA:
        raise UsageError(
            f"result.json: got schema {result.get('schema')!r}, expected {SCHEMA}; "
            "use the version of consilium that wrote it"
        )
    run = Run.of(result)
    page = _template().render(
        run=run,
        head=_head(run),
        verdict=_verdict(run),
        figures=_figures(run),
        forest=_forest(run),
        progress=_progress(run),
        sites=_sites(run),
        quality=_quality(run),
        cost=_cost(run),
        privacy=_privacy(run),
        notes=_notes(run),
        setup=_setup(run),
        grouped=grouped,
    )
    return page.lstrip()


@cache
def _template() -> jinja2.Template:
    """Compile the page once; it is as constant as this file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.j2")


def write(result: Mapping[str, Any], path: Path) -> None:
    """Write the report to `path`, whole or not at all.

    Raises:
        UsageError: the result has another schema.
        OSError: the folder cannot be written.
    """
    document = render(result).encode()
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(document)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)  # noqa: PTH105  atomic on every platform we run on, and says so
    finally:
        unfinished.unlink(missing_ok=True)


# --- reading a result that may hold null anywhere -------------------------------------------------------------------


def _visible(value: Any) -> Any:
    """Replace what a name could hide behind: control, bidirectional-override and unencodable characters."""
    if type(value) is not str:
        return value
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in {"Cc", "Cf", "Cs"} else c for c in value)


def _map(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _count(value: Any) -> int | None:
    number = _number(value)
    return None if number is None or number < 0 else int(number)


def _sum(values: Iterable[Any]) -> float | None:
    """Add up what is known; nothing known is `None`, not 0."""
    known = [number for value in values if (number := _number(value)) is not None]
    return math.fsum(known) if known else None


def _natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Order `site-2` before `site-10`; digits are compared as text, for a name may hold thousands of them."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, len(part.lstrip("0")), part) if part[0] in "0123456789" else (1, 0, part) for part in parts], name


# --- printing -------------------------------------------------------------------------------------------------------


def fixed(value: Any, digits: int = 3) -> str:
    """Print a figure with three decimals, an undefined one as a dash.

    Examples:
        >>> fixed(0.96149), fixed(None), fixed(float("nan"))
        ('0.961', '–', '–')
    """
    number = _number(value)
    return DASH if number is None else f"{number:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def grouped(value: Any) -> str:
    """Print a count in groups of three, an unknown one as a dash.

    Examples:
        >>> grouped(624), grouped(12480).split("\N{NARROW NO-BREAK SPACE}"), grouped(None)
        ('624', ['12', '480'], '–')
    """
    count = _count(value)
    return DASH if count is None else f"{count:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def size(value: Any) -> str:
    """Print a number of bytes in decimal units.

    Examples:
        >>> [text.replace("\N{NO-BREAK SPACE}", " ") for text in (size(812), size(13_500_000), size(None))]
        ['812 B', '13.5 MB', '–']
    """
    number = _number(value)
    if number is None:
        return DASH
    power = min(4, int(math.log10(number) // 3)) if number >= 1 else 0
    scaled = number / 1000**power
    digits = 0 if power == 0 or scaled >= 100 else 1
    return f"{scaled:.{digits}f}\N{NO-BREAK SPACE}{('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def duration(value: Any) -> str:
    """Print seconds the way one says them.

    Examples:
        >>> [text.replace("\N{NO-BREAK SPACE}", " ") for text in (duration(4.21), duration(133), duration(7320))]
        ['4.2 s', '2 min 13 s', '2 h 2 min']
    """
    number = _number(value)
    if number is None or number < 0:
        return DASH
    gap = "\N{NO-BREAK SPACE}"
    if number < 59.95:
        return f"{number:.1f}{gap}s"
    minutes, seconds = divmod(round(number), 60)
    if minutes < 60:
        return f"{minutes}{gap}min{gap}{seconds}{gap}s"
    return f"{minutes // 60}{gap}h{gap}{minutes % 60}{gap}min"


def plural(count: int | None, noun: str) -> str:
    """Print a count with its noun.

    Examples:
        >>> plural(1, "site"), plural(5, "site")
        ('1 site', '5 sites')
    """
    return f"{grouped(count)} {noun}{'' if count == 1 else 's'}"


def _joined(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {grouped(len(names) - most)} more"


@dataclass(frozen=True)
class Figure:
    """A number as printed; `why` explains a dash or gives the exact value."""

    text: str
    why: str = ""


@dataclass(frozen=True)
class Score:
    """The metrics of one model on one set of images; whatever is undefined reads as `None`."""

    values: Mapping[str, Any]

    @classmethod
    def of(cls, value: Any) -> Score:
        """Wrap METRICS, or null."""
        return cls(_map(value))

    @property
    def n(self) -> int | None:
        """Number of images."""
        return _count(self.values.get("examples"))

    @property
    def support(self) -> dict[str, int | None]:
        """Images of each label."""
        return {str(label): _count(n) for label, n in _map(self.values.get("support")).items()}

    @property
    def auc(self) -> float | None:
        """Area under the ROC curve."""
        return self.get("auc")

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the AUC."""
        ends = [_number(end) for end in _list(self.values.get("auc_ci95"))]
        if len(ends) != 2 or ends[0] is None or ends[1] is None:
            return None
        return ends[0], ends[1]

    @property
    def interval_text(self) -> str:
        """The interval as printed, `""` when there is none."""
        if self.interval is None:
            return ""
        return "\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}".join(map(fixed, self.interval))

    @property
    def bound_text(self) -> str:
        """The arithmetic error bound of the AUC as printed, `""` when there is none."""
        bound = self.get("auc_bound")
        if bound is None:
            return ""
        return "<\N{NO-BREAK SPACE}0.001" if 0 < bound < 0.001 else f"±\N{NO-BREAK SPACE}{fixed(bound)}"

    def get(self, key: str) -> float | None:
        """One metric."""
        return _number(self.values.get(key))

    def figure(self, key: str) -> Figure:
        """One metric as printed, with the reason where it is a dash."""
        return Figure(fixed(self.get(key)), "" if self.get(key) is not None else self.why)

    @property
    def why(self) -> str:
        """Why a metric of these images is a dash."""
        if not self.values or self.n is None:
            return UNDEFINED["unmeasured"]
        if self.n == 0:
            return UNDEFINED["empty"]
        present = [label for label, n in self.support.items() if n]
        return UNDEFINED["one label" if len(present) == 1 else "other"]

    def part(self, key: str) -> Score:
        """A nested group of figures, with the count of images of the whole."""
        return Score({**_map(self.values.get(key)), "examples": self.n})


@dataclass(frozen=True)
class Run:
    """A result, read once: what every section of the page starts from."""

    result: Mapping[str, Any]
    status: str
    labels: tuple[str, ...]
    sites: tuple[str, ...]
    rounds: tuple[Mapping[str, Any], ...]
    test: Score
    at_sites: Mapping[str, Score]
    pooled: Score
    alone: Mapping[str, Score]

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Run:
        """Read a result."""
        test, baselines = _map(result.get("test")), _map(result.get("baselines"))
        rounds = [entry for entry in _list(result.get("rounds")) if isinstance(entry, Mapping)]
        return cls(
            result=result,
            status=str(result.get("status")),
            labels=_labels(result),
            sites=tuple(sorted(map(str, _map(result.get("sites"))), key=_natural)),
            rounds=tuple(rounds),
            test=Score.of(test.get("pooled")),
            at_sites=_scores(test.get("sites")),
            pooled=Score.of(baselines.get("pooled")),
            alone=_scores(baselines.get("local")),
        )

    def section(self, *keys: str) -> Mapping[str, Any]:
        """A nested group of the result, empty where there is none."""
        value: Any = self.result
        for key in keys:
            value = _map(value).get(key)
        return _map(value)

    @property
    def trained(self) -> int:
        """Rounds that were run after the start."""
        return sum(number > 0 for number in self.numbers)

    @property
    def numbers(self) -> list[int]:
        """The number of each entry of `rounds`."""
        counts = [_count(entry.get("round")) for entry in self.rounds]
        return [place if count is None else count for place, count in enumerate(counts)]

    @property
    def random_weights(self) -> bool:
        """Whether the trunk was never trained on anything."""
        return self.section("weights").get("source") == "none"

    @property
    def subject(self) -> str:
        """Whose precision and recall the headline figures are."""
        if len(self.labels) == 2:
            return f"of label “{self.labels[1]}”"
        return f"mean over {len(self.labels)} labels" if self.labels else ""


def _scores(value: Any) -> dict[str, Score]:
    return {
        str(site): Score.of(metrics)
        for site, metrics in sorted(_map(value).items(), key=lambda kv: _natural(str(kv[0])))
    }


def _labels(result: Mapping[str, Any]) -> tuple[str, ...]:
    """Labels in the order of the task; any others the sites hold come after them."""
    task = _list(_map(_map(result.get("config")).get("task")).get("labels"))
    seen = {str(label) for site in _map(result.get("sites")).values() for label in _map(_map(site).get("labels"))}
    support = _map(_map(_map(result.get("test")).get("pooled")).get("support"))
    return tuple(dict.fromkeys([*map(str, task), *sorted(seen), *sorted(map(str, support))]))


# --- geometry of the charts: fractions and paths; colours and lines live in the template ----------------------------


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

    @property
    def labelled(self) -> list[tuple[str, str]]:
        """Each tick's place and text."""
        return [(self.percent(tick), self.text(tick)) for tick in self.ticks]

    def text(self, tick: float) -> str:
        """A tick as printed."""
        wide = abs(self.high) >= 1e6 or self.digits > 6
        return f"{tick:.0e}" if wide else fixed(tick, self.digits)


def axis(values: Iterable[float], least: float = -math.inf, most: float = math.inf, steps: int = 5) -> Axis:
    """Choose a scale with round ticks that spans the values, within [least, most].

    Examples:
        >>> axis([0.79, 0.976], most=1.0).ticks
        (0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
    """
    kept = [min(1e12, max(-1e12, value)) for value in values] or [0.0, 1.0]
    low, high = min(kept), max(kept)
    narrow = max(0.05, 0.05 * abs(high)) - (high - low)  # closer than this and noise would look like a trend
    if narrow > 0:
        low, high = max(least, low - narrow / 2), min(most, high + narrow / 2)
    step = _step((high - low) / steps)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    first, last = (first - 1, last + 1) if first == last else (first, last)
    kept_ticks = [k for k in range(first, last + 1) if least - 1e-9 <= k * step <= most + 1e-9]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = tuple(round(k * step, digits) for k in kept_ticks)
    return Axis(max(least, first * step), min(most, last * step), ticks, digits)


def _step(rough: float) -> float:
    """The round number (1, 2 or 5 times a power of ten) nearest above `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))


def _round_axis(numbers: Sequence[int]) -> Axis:
    """A scale of whole rounds."""
    low, high = min(numbers, default=0), max(numbers, default=0)
    step = max(1, int(_step(max(1, high - low) / 8)))
    last = high if high > low else low + 1
    ticks = tuple(float(k) for k in range(low, high + 1) if k % step == 0)
    return Axis(float(low), float(last), ticks, 0)


@dataclass(frozen=True)
class Frame:
    """The drawing area of a chart with axes, in SVG user units."""

    width: int
    height: int
    left: int = 58
    right: int = 14
    top: int = 14
    bottom: int = 40

    def x(self, fraction: float) -> float:
        """Horizontal place of a fraction of the x axis."""
        return round(self.left + fraction * (self.width - self.left - self.right), 1)

    def y(self, fraction: float) -> float:
        """Vertical place of a fraction of the y axis."""
        return round(self.height - self.bottom - fraction * (self.height - self.top - self.bottom), 1)


@dataclass(frozen=True)
class Dot:
    """A marked point."""

    x: float
    y: float
    radius: float
    title: str


@dataclass(frozen=True)
class Line:
    """One curve: a path, gaps included, and its points."""

    name: str
    style: str
    path: str
    dots: tuple[Dot, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """A chart with two axes."""

    frame: Frame
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    x_name: str
    y_name: str
    lines: tuple[Line, ...]
    area: str = ""
    marker: tuple[float, str, str] | None = None
    diagonal: bool = False
    extra: Dot | None = None

    @property
    def legend(self) -> list[Line]:
        """The named curves."""
        return [line for line in self.lines if line.name]


@dataclass(frozen=True)
class Canvas:
    """A frame with its two scales: turns data into paths."""

    frame: Frame
    x: Axis
    y: Axis

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Place of a data point."""
        return self.frame.x(self.x.at(x)), self.frame.y(self.y.at(y))

    def path(self, points: Iterable[tuple[float, float | None]]) -> str:
        """A path through the points, broken where a value is undefined."""
        pieces, pen = [], "M"
        for x, y in points:
            if y is None:
                pen = "M"
                continue
            px, py = self.at(x, y)
            pieces.append(f"{pen}{px:g} {py:g}")
            pen = "L"
        return "".join(pieces)

    def ticks(self) -> dict[str, Any]:
        """Frame and ticks, as `Plot` takes them."""
        return {
            "frame": self.frame,
            "x_ticks": tuple((self.frame.x(self.x.at(tick)), self.x.text(tick)) for tick in self.x.ticks),
            "y_ticks": tuple((self.frame.y(self.y.at(tick)), self.y.text(tick)) for tick in self.y.ticks),
        }


# --- the sections, in the order of the page -------------------------------------------------------------------------


def _head(run: Run) -> dict[str, Any]:
    training = run.section("config", "training")
    facts = [
        ("Strategy", training.get("strategy")),
        ("Sites", grouped(len(run.sites)) if run.sites else None),
        ("Rounds run", grouped(run.trained)),
        ("Backbone", run.section("config", "model").get("backbone")),
        ("Weights", run.section("weights").get("source")),
        ("Time", duration(run.section("seconds").get("total"))),
    ]
    title = run.section("config", "task").get("name")
    name, tone = STATUS.get(run.status, (run.status, "warn"))
    return {
        "title": str(title) if title else "Federated run",
        "status": name,
        "tone": tone,
        "facts": [(key, str(value)) for key, value in facts if value is not None],
    }


def _verdict(run: Run) -> dict[str, list[str]]:
    """Status first where it is not plain success, then the finding, then what may be concluded from it."""
    status = {"completed": [], "completed_partial": _partial(run), "failed": _failed(run)}
    unknown = [f"The run's status is “{run.status}”."]
    return {"status": status.get(run.status, unknown), "finding": [_finding(run)], "judgement": _judgement(run)}


def _failed(run: Run) -> list[str]:
    error = run.result.get("error")
    reason = f"This run failed: {error}" if error else "This run failed; no reason was recorded."
    return [reason, f"It ended after {plural(run.trained, 'round')}."]


def _partial(run: Run) -> list[str]:
    """Say what is missing from a run that ended `completed_partial`."""
    missing = [site for site in run.sites if (_count(run.section("sites", site).get("rounds")) or 0) < run.trained]
    sentences = ["This run is complete only in part."]
    if missing:
        sentences.append(
            f"{plural(len(missing), 'site')} of {grouped(len(run.sites))} contributed to fewer than all "
            f"{plural(run.trained, 'round')}: {_joined(missing)}."
        )
    planned = _count(run.section("config", "training").get("rounds"))
    if planned is not None and planned > run.trained:
        sentences.append(f"It ran {grouped(run.trained)} of {plural(planned, 'planned round')}.")
    return sentences


def _finding(run: Run) -> str:
    """The one sentence to remember; its figures are the result's."""
    if not run.test.values:
        return "The federated model was not measured on test images: there are no test figures."
    measured = sum(1 for score in run.at_sites.values() if score.n)
    where = f"on {plural(run.test.n, 'test image')}" + (f" of {plural(measured, 'site')}" if measured else "")
    if run.test.auc is None:
        reason = run.test.why.removeprefix("undefined: ")
        accuracy = fixed(run.test.get("accuracy"))
        return f"The AUC of the federated model is not defined {where} ({reason}); accuracy is {accuracy}."
    clauses = [f"The federated model reaches AUC {_with_interval(run.test)} {where}"]
    alone = [score.auc for score in run.alone.values() if score.auc is not None]
    if len(alone) == 1:
        clauses.append(f"the one site that could be measured alone reaches {fixed(alone[0])}")
    elif alone:
        clauses.append(
            f"single sites alone reach {fixed(min(alone))} to {fixed(max(alone))} (mean {fixed(fmean(alone))})"
        )
    if run.pooled.auc is not None:
        clauses.append(f"pooling all data would give {fixed(run.pooled.auc)}")
    return "; ".join(clauses) + "."


def _with_interval(score: Score) -> str:
    return fixed(score.auc) + (f" (95\N{NO-BREAK SPACE}% interval {score.interval_text})" if score.interval else "")


def compare(one: Score, other: Score) -> str:
    """Say what two intervals allow to say: `above`, `below`, `overlap`, or `unknown` without both intervals.

    Examples:
        >>> compare(Score({"auc_ci95": [0.9, 0.95]}), Score({"auc_ci95": [0.7, 0.8]}))
        'above'
    """
    if one.interval is None or other.interval is None:
        return "unknown"
    if one.interval[0] > other.interval[1]:
        return "above"
    return "below" if one.interval[1] < other.interval[0] else "overlap"


def _judgement(run: Run) -> list[str]:
    """Only what the intervals carry: where they overlap, no difference can be shown."""
    if run.test.auc is None:
        return []
    sentences = []
    if run.pooled.auc is not None:
        sentences.append(
            {
                "overlap": "Against pooling all data the intervals overlap: no difference can be shown.",
                "above": "Against pooling all data the federated model is better: the intervals do not overlap.",
                "below": "Against pooling all data the federated model is worse: the intervals do not overlap.",
                "unknown": "Against pooling all data nothing can be said, because an interval is missing.",
            }[compare(run.test, run.pooled)]
        )
    tally = Counter(compare(run.test, score) for score in run.alone.values() if score.auc is not None)
    if tally:
        sentences.append(f"Against {plural(tally.total(), 'site')} alone: {_tallied(tally)}.")
    if run.pooled.auc is None and not tally:
        sentences.append("No baseline was measured, so nothing can be said about what federation gained.")
    return sentences


def _tallied(tally: Counter[str]) -> str:
    """Say against how many sites the comparison came out which way."""
    wording = {
        "above": ("better than {} (intervals apart)", "each"),
        "below": ("worse than {} (intervals apart)", "each"),
        "overlap": ("no difference can be shown for {} (intervals overlap)", "any"),
        "unknown": ("no comparison for {} (an interval is missing)", "any"),
    }
    total = tally.total()
    every = {key: "it" if total == 1 else word for key, (_, word) in wording.items()}
    return "; ".join(
        text.format(every[key] if tally[key] == total else grouped(tally[key]))
        for key, (text, _) in wording.items()
        if tally[key]
    )


@dataclass(frozen=True)
class Tile:
    """A headline figure."""

    name: str
    figure: Figure
    beside: str
    below: str
    n: str
    other: str


def _figures(run: Run) -> dict[str, Any]:
    tiles = [
        _tile(
            run, "auc", "AUC", "95\N{NO-BREAK SPACE}% interval " + (run.test.interval_text or DASH), run.test.bound_text
        ),
        _tile(run, "accuracy", "Accuracy", "all labels"),
        _tile(run, "precision", "Precision", run.subject),
        _tile(run, "recall", "Recall", run.subject),
    ]
    rows = [(name, run.test.figure(key), run.pooled.figure(key)) for key, name in METRICS]
    point = run.test.part("operating_point")
    keys = ("threshold", "precision", "recall", "specificity")
    chosen = (
        [(key.capitalize(), point.figure(key)) for key in keys]
        if run.section("test", "pooled", "operating_point")
        else []
    )
    return {"tiles": tiles if run.test.values else [], "rows": rows, "point": chosen, "bound": run.test.bound_text}


def _tile(run: Run, key: str, name: str, below: str, beside: str = "") -> Tile:
    other = run.pooled.get(key)
    return Tile(
        name=name,
        figure=run.test.figure(key),
        beside=beside,
        below=below,
        n=grouped(run.test.n),
        other="" if other is None else f"all data pooled {fixed(other)}",
    )


@dataclass(frozen=True)
class Row:
    """One line of the dot-and-interval chart; places are SVG lengths."""

    name: str
    style: str
    figure: Figure
    interval: str
    n: str
    dot: str = ""
    span: tuple[str, str] | None = None
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Forest:
    """The dot-and-interval chart: one scale, one row a model, the federated interval shaded through all rows."""

    ticks: list[tuple[str, str]]
    rows: list[Row]
    band: tuple[str, str] | None


def _forest(run: Run) -> Forest | None:
    scores = [run.test, run.pooled, *run.alone.values()]
    values = [value for score in scores for value in (score.auc, *(score.interval or ())) if value is not None]
    if run.test.auc is None:
        return None
    scale = axis(values, least=0.0, most=1.0)
    rows = [_row("Federated", "fed", run.test, scale)]
    if run.pooled.values:
        rows.append(_row("All data pooled", "pool", run.pooled, scale))
    ranked = sorted(run.alone.items(), key=lambda item: -math.inf if item[1].auc is None else item[1].auc, reverse=True)
    if len(ranked) > MANY:
        rows.append(_crowd("Each site alone", "alone", [score.auc for _, score in ranked], scale))
    else:
        rows += [_row(f"{site} alone", "alone", score, scale) for site, score in ranked]
    band = run.test.interval
    return Forest(scale.labelled, rows, (scale.percent(band[0]), _length(scale, *band)) if band else None)


def _length(scale: Axis, low: float, high: float) -> str:
    return f"{100 * (scale.at(high) - scale.at(low)):.2f}%"


def _row(name: str, style: str, score: Score, scale: Axis) -> Row:
    ends = score.interval
    return Row(
        name=name,
        style=style,
        figure=score.figure("auc"),
        interval=score.interval_text,
        n=grouped(score.n),
        dot="" if score.auc is None else scale.percent(score.auc),
        span=(scale.percent(ends[0]), scale.percent(ends[1])) if ends and score.auc is not None else None,
    )


def _crowd(name: str, style: str, values: Sequence[float | None], scale: Axis) -> Row:
    """Many sites in one line: a tick each, the middle half as a bar, the median as a dot."""
    known = sorted(value for value in values if value is not None)
    if len(known) < 2:
        return Row(name, style, Figure(DASH, UNDEFINED["unmeasured"]), "", grouped(len(values)))
    lower, middle, upper = quantiles(known, n=4, method="inclusive")
    return Row(
        name=name,
        style=f"{style} crowd",
        figure=Figure(fixed(middle), "median over sites"),
        interval=f"{fixed(known[0])}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{fixed(known[-1])}",
        n=f"{grouped(len(known))} of {plural(len(values), 'site')}",
        dot=scale.percent(middle),
        span=(scale.percent(lower), scale.percent(upper)),
        marks=tuple(scale.percent(value) for value in known),
    )


def _progress(run: Run) -> dict[str, Any]:
    best = _count(run.result.get("best_round")) if run.rounds else None
    return {
        "best": best,
        "best_score": next((_validation(e) for e, k in zip(run.rounds, run.numbers, strict=True) if k == best), None),
        "validation": _validation_plot(run, best),
        "loss": _loss_plot(run, best),
        "table": _round_table(run),
        "tall": len(run.rounds) > TALL,
    }


def _validation(entry: Mapping[str, Any]) -> Score:
    return Score.of(entry.get("validation"))


def _validation_plot(run: Run, best: int | None) -> Plot | None:
    series = {"auc": ("AUC", "fed"), "accuracy": ("Accuracy", "alone")}
    values = {key: [_validation(entry).get(key) for entry in run.rounds] for key in series}
    known = [value for column in values.values() for value in column if value is not None]
    if not known:
        return None
    canvas = Canvas(Frame(480, 280), _round_axis(run.numbers), axis(known, least=0.0, most=1.0))
    lines = [
        _line(canvas, name, style, list(zip(run.numbers, values[key], strict=True)))
        for key, (name, style) in series.items()
    ]
    return Plot(
        **canvas.ticks(),
        x_name="round",
        y_name="on validation images",
        lines=tuple(lines),
        marker=_marker(canvas, best),
    )


def _line(canvas: Canvas, name: str, style: str, points: Sequence[tuple[int, float | None]]) -> Line:
    dense = len(points) > 40
    dots = tuple(
        Dot(*canvas.at(x, y), 1.6 if dense else 3.2, f"round {x}: {name} {fixed(y)}")
        for x, y in points
        if y is not None
    )
    return Line(name, f"{style} dense" if dense else style, canvas.path(points), dots)


def _marker(canvas: Canvas, best: int | None) -> tuple[float, str, str] | None:
    """The best round's place, its text and the side of the line the text fits on."""
    if best is None:
        return None
    place = canvas.x.at(best)
    return canvas.frame.x(place), f"best: round {best}", "end" if place > 0.6 else "start"


def _loss_plot(run: Run, best: int | None) -> Plot | None:
    """Mean training loss over images, with each site's own loss behind it (or the range, when sites are many)."""
    by_round = [_losses(entry) for entry in run.rounds]
    known = [loss for losses in by_round for _, loss in losses.values()]
    if not known:
        return None
    canvas = Canvas(Frame(480, 280), _round_axis(run.numbers), axis(known, least=min(0.0, *known)))
    mean = [_mean_loss(losses) for losses in by_round]
    names = sorted({site for losses in by_round for site in losses}, key=_natural)
    lines = [_line(canvas, "mean over sites, weighted by images", "fed", list(zip(run.numbers, mean, strict=True)))]
    area = ""
    if len(names) > MANY:
        area = _band(canvas, run.numbers, by_round)
    else:
        lines = [_site_line(canvas, run.numbers, by_round, name) for name in names] + lines
    return Plot(
        **canvas.ticks(),
        x_name="round",
        y_name="training loss",
        lines=tuple(lines),
        area=area,
        marker=_marker(canvas, best),
    )


def _losses(entry: Mapping[str, Any]) -> dict[str, tuple[int, float]]:
    """Images and training loss of each site that sent one."""
    pairs = {
        str(site): (_count(_map(report).get("examples")) or 0, _number(_map(report).get("train_loss")))
        for site, report in _map(entry.get("sites")).items()
    }
    return {site: (n, loss) for site, (n, loss) in pairs.items() if loss is not None}


def _mean_loss(losses: Mapping[str, tuple[int, float]]) -> float | None:
    total = sum(n for n, _ in losses.values())
    return math.fsum(n * loss for n, loss in losses.values()) / total if total else None


def _site_line(
    canvas: Canvas, numbers: Sequence[int], by_round: Sequence[Mapping[str, tuple[int, float]]], site: str
) -> Line:
    points = [(k, losses[site][1] if site in losses else None) for k, losses in zip(numbers, by_round, strict=True)]
    return Line("", "faint", canvas.path(points))


def _band(canvas: Canvas, numbers: Sequence[int], by_round: Sequence[Mapping[str, tuple[int, float]]]) -> str:
    """Outline of the range between the least and the greatest loss."""
    rows = [(k, [loss for _, loss in losses.values()]) for k, losses in zip(numbers, by_round, strict=True) if losses]
    outline = [(k, max(values)) for k, values in rows] + [(k, min(values)) for k, values in reversed(rows)]
    return canvas.path(outline) + "Z" if len(rows) > 1 else ""


def _round_table(run: Run) -> list[dict[str, Any]]:
    rows = []
    for entry, number in zip(run.rounds, run.numbers, strict=True):
        score, reports = _validation(entry), _map(entry.get("sites"))
        rows.append(
            {
                "round": number,
                "auc": score.figure("auc"),
                "accuracy": score.figure("accuracy"),
                "n": grouped(score.n),
                "loss": Figure(fixed(_mean_loss(_losses(entry))), "" if _losses(entry) else "no site reported a loss"),
                "sites": grouped(len(_losses(entry))) if reports else DASH,
                "seconds": duration(entry.get("seconds")),
                "bytes": size(_sum(entry.get(key) for key in TRAFFIC)),
            }
        )
    return rows


@dataclass(frozen=True)
class SiteRow:
    """One line of the table of sites."""

    name: str
    status: str
    reasons: str
    train: str
    validation: str
    test: str
    mix: list[tuple[str, str, int]]
    mix_title: str
    rounds: str
    score: Score
    alone: Score
    gain: Figure
    tone: str


def _sites(run: Run) -> dict[str, Any]:
    rows = [_site(run, name) for name in run.sites]
    aucs = [run.at_sites[name].auc if name in run.at_sites else None for name in run.sites]
    known = [value for value in aucs if value is not None]
    scale = axis(known, least=0.0, most=1.0)
    crowd = _crowd("Single sites", "fed", aucs, scale) if len(run.sites) > MANY and len(known) > 1 else None
    return {
        "rows": rows,
        "tall": len(rows) > TALL,
        "legend": [(label, place % COLOURS) for place, label in enumerate(run.labels)],
        "crowd": Forest(scale.labelled, [crowd], None) if crowd else None,
        "undefined": len(aucs) - len(known) if run.at_sites else 0,
    }


def _site(run: Run, name: str) -> SiteRow:
    site = run.section("sites", name)
    examples, alone = _map(site.get("examples")), run.alone.get(name, Score({}))
    counts = {label: _count(_map(site.get("labels")).get(label)) or 0 for label in run.labels}
    gain, tone = _gain(run, alone)
    return SiteRow(
        name=name,
        status=str(site.get("status") or DASH),
        reasons=_reasons(run, name),
        train=grouped(examples.get("train")),
        validation=grouped(examples.get("validation")),
        test=grouped(examples.get("test")),
        mix=_mix(counts),
        mix_title=", ".join(f"{label}: {grouped(n)}" for label, n in counts.items()),
        rounds=grouped(site.get("rounds")),
        score=run.at_sites.get(name, Score({})),
        alone=alone,
        gain=gain,
        tone=tone,
    )


def _reasons(run: Run, site: str) -> str:
    """Why a site missed rounds: each reason with its rounds."""
    rounds_of: dict[str, list[str]] = {}
    for entry, number in zip(run.rounds, run.numbers, strict=True):
        reason = _map(_map(entry.get("sites")).get(site)).get("reason")
        if reason:
            rounds_of.setdefault(str(reason), []).append(str(number))
    return "; ".join(
        f"{reason} (round{'s' if len(numbers) > 1 else ''} {_joined(numbers, 6)})"
        for reason, numbers in rounds_of.items()
    )


def _mix(counts: Mapping[str, int]) -> list[tuple[str, str, int]]:
    """Start, length and colour of each label's share of a bar."""
    total, start, parts = sum(counts.values()), 0, []
    for place, n in enumerate(counts.values()):
        if n:
            parts.append((f"{100 * start / total:.2f}%", f"{100 * n / total:.2f}%", place % COLOURS))
        start += n
    return parts


def _gain(run: Run, alone: Score) -> tuple[Figure, str]:
    """Federated minus alone, both on all test images; coloured only where the intervals lie apart."""
    if run.test.auc is None or alone.auc is None:
        return Figure(DASH, alone.why if alone.auc is None else run.test.why), ""
    difference = round(run.test.auc - alone.auc, 3)
    text = ("+" if difference > 0 else "") + fixed(difference + 0.0)
    relation = compare(run.test, alone)
    why = {
        "above": "the intervals lie apart",
        "below": "the intervals lie apart",
        "overlap": "the intervals overlap: no difference can be shown",
        "unknown": "no interval to compare",
    }[relation]
    return Figure(text, why), {"above": "up", "below": "down"}.get(relation, "")


def _quality(run: Run) -> dict[str, Any]:
    curves = run.section("curves")
    classes = _map(run.test.values.get("per_class"))
    rows = [
        {
            "label": label,
            "colour": place % COLOURS,
            "n": grouped(run.test.support.get(label)),
            "figures": [
                Score({**_map(classes.get(label)), "examples": run.test.n}).figure(key) for key, _ in PER_LABEL
            ],
            "bound": Score.of(classes.get(label)).bound_text,
        }
        for place, label in enumerate(run.labels)
    ]
    return {
        "roc": _roc(run, _map(curves.get("roc")), classes),
        "reliability": _reliability(_list(curves.get("reliability"))),
        "rows": rows if run.test.values else [],
        "columns": [name for _, name in PER_LABEL],
    }


UNIT = Axis(0.0, 1.0, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), 1)


def _pairs(points: Any, x: str | int, y: str | int) -> Iterator[tuple[float, float]]:
    for point in _list(points):
        if not isinstance(point, Mapping | list | tuple) or len(point) < 2:
            continue
        values: Any = point
        a, b = _number(values[x]), _number(values[y])
        if a is not None and b is not None:
            yield a, b


def _roc(run: Run, roc: Mapping[str, Any], classes: Mapping[str, Any]) -> Plot | None:
    canvas = Canvas(Frame(400, 400, bottom=44), UNIT, UNIT)
    places = {label: place for place, label in enumerate(run.labels)}
    drawn = sorted(
        ((str(label), list(_pairs(points, 0, 1))) for label, points in roc.items()), key=lambda c: places.get(c[0], 99)
    )
    curves = [(label, points) for label, points in drawn if points]
    lines = []
    for label, points in curves:
        style = "fed" if len(curves) == 1 else f"k{places.get(label, 0) % COLOURS}"
        auc = _number(_map(classes.get(label)).get("auc"))
        name = label if len(curves) <= NAMED else ""
        lines.append(Line(name, style, canvas.path(points), note=f"AUC {fixed(auc)}"))
    if not lines:
        return None
    return Plot(
        **canvas.ticks(),
        x_name="false positive rate (1 − specificity)",
        y_name="true positive rate (recall)",
        lines=tuple(lines),
        diagonal=True,
        extra=_operating_dot(run, canvas),
    )


def _operating_dot(run: Run, canvas: Canvas) -> Dot | None:
    """The operating point, which is a single point only where there are two labels."""
    point = run.test.part("operating_point")
    recall, specificity = point.get("recall"), point.get("specificity")
    if len(run.labels) != 2 or recall is None or specificity is None:
        return None
    title = f"threshold {fixed(point.get('threshold'))}: recall {fixed(recall)}, specificity {fixed(specificity)}"
    return Dot(*canvas.at(1 - specificity, recall), 5, title)


def _reliability(points: Sequence[Any]) -> Plot | None:
    """Accuracy against confidence; a dot's area is its share of the images."""
    bins = [
        (confidence, accuracy, _count(_map(point).get("n")) or 0)
        for point in points
        if (confidence := _number(_map(point).get("confidence"))) is not None
        and (accuracy := _number(_map(point).get("accuracy"))) is not None
    ]
    if not bins:
        return None
    canvas = Canvas(Frame(400, 400, bottom=44), UNIT, UNIT)
    most = max(n for *_, n in bins) or 1
    dots = tuple(
        Dot(
            *canvas.at(x, y),
            round(3 + 8 * math.sqrt(n / most), 1),
            f"confidence {fixed(x)}, accuracy {fixed(y)}, {plural(n, 'image')}",
        )
        for x, y, n in bins
    )
    line = Line("images, grouped by confidence", "fed bubbles", canvas.path([(x, y) for x, y, _ in sorted(bins)]), dots)
    return Plot(
        **canvas.ticks(), x_name="confidence of the model", y_name="share that was right", lines=(line,), diagonal=True
    )


TRAFFIC = ("bytes_down", "bytes_up", "evaluation_bytes_down", "evaluation_bytes_up")


@dataclass(frozen=True)
class Part:
    """One part of a whole: its figure, its share and its place in the bar."""

    name: str
    text: str
    share: str
    start: str
    length: str
    style: str


def _parts(named: Sequence[tuple[str, float | None, str]], style: str) -> list[Part]:
    total, start, parts = _sum(value for _, value, _ in named) or 0.0, 0.0, []
    for place, (name, value, text) in enumerate(named):
        share = 100 * (value or 0.0) / total if total > 0 else 0.0
        printed = DASH if value is None or total <= 0 else _share(share)
        parts.append(Part(name, text, printed, f"{start:.2f}%", f"{share:.2f}%", f"{style}{place}"))
        start += share
    return parts


def _share(percent: float) -> str:
    small = 0 < percent < 0.5
    return ("< 1" if small else f"{percent:.0f}") + "\N{NO-BREAK SPACE}%"


def _cost(run: Run) -> dict[str, Any]:
    later = [entry for entry, number in zip(run.rounds, run.numbers, strict=True) if number > 0]
    once, sent, transfers = _trunk_traffic(run)
    traffic = [_sum(entry.get(key) for entry in run.rounds) for key in TRAFFIC]
    names = (
        "Trunk, once to each site" if once else "Trunk",
        "Rounds, to the sites",
        "Rounds, from the sites",
        "Evaluation, to the sites",
        "Evaluation, from the sites",
    )
    named = list(zip(names, [sent, *traffic], strict=True))
    total, seconds = _sum(value for _, value in named), _number(run.section("seconds").get("total"))
    missing = [name for name, value in named[: 3 if later else 1] if value is None]
    per_round = _mean([_sum(entry.get(key) for key in TRAFFIC) for entry in later])
    each = _mean([_number(entry.get("seconds")) for entry in later])
    return {
        "bytes": _parts([(name, value, size(value)) for name, value in named], "b"),
        "bytes_title": "Bytes were not recorded" if total is None else f"{size(total)} over the network",
        "bytes_missing": missing if total is not None else [],
        "trunk": size(run.section("trunk").get("bytes")),
        "transfers": transfers,
        "per_round": "" if per_round is None else size(per_round),
        "round_seconds": "" if each is None else duration(each),
        "seconds": _seconds(run),
        "seconds_title": "The time in all was not recorded" if seconds is None else f"{duration(seconds)} in all",
        "upper": (grouped(run.section("upper").get("parameters")), run.section("upper").get("wire_dtype") or DASH),
    }


def _trunk_traffic(run: Run) -> tuple[bool, float | None, str]:
    """Whether each site got the trunk exactly once, the bytes that took, and the transfers in words."""
    transfers = [_count(n) for n in run.section("trunk", "transfers").values()]
    sent, weight = _sum(transfers), _number(run.section("trunk").get("bytes"))
    once = bool(transfers) and set(transfers) == {1}
    if sent is None:
        words = "was sent a number of times that is not recorded"
    elif once:
        words = (
            "was sent once to the one site"
            if len(transfers) == 1
            else f"was sent once to each of {len(transfers)} sites"
        )
    else:
        words = f"was sent {plural(int(sent), 'time')} to {plural(len(transfers), 'site')}"
    return once, None if sent is None or weight is None else sent * weight, words


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _seconds(run: Run) -> list[Part]:
    seconds = run.section("seconds")
    named = [("Features (trunk, once)", "features"), ("Rounds", "rounds"), ("Baselines", "baselines")]
    values = [(name, _number(seconds.get(key))) for name, key in named]
    total, known = _number(seconds.get("total")), _sum(value for _, value in values)
    if total is not None and known is not None and total - known > 0.005 * total:
        values.append(("Everything else", total - known))
    return _parts([(name, value, duration(value)) for name, value in values], "t")


def _privacy(run: Run) -> dict[str, Any] | None:
    privacy = run.section("privacy")
    if not privacy:
        return None
    spent = _map(privacy.get("sites"))
    keys = ("epsilon", "delta", "noise_multiplier", "sampling_rate", "steps")
    rows = [
        (site, [_plain(_map(spent[site]).get(key)) for key in keys])
        for site in sorted(spent, key=lambda s: _natural(str(s)))
    ]
    epsilons = [value for site in spent.values() if (value := _number(_map(site).get("epsilon"))) is not None]
    return {
        "unit": str(privacy.get("unit") or DASH),
        "rows": rows,
        "tall": len(rows) > TALL,
        "largest": fixed(max(epsilons, default=None)),
    }


def _notes(run: Run) -> dict[str, Any]:
    given = [
        (str(_map(w).get("code") or DASH), str(_map(w).get("message") or DASH))
        for w in _list(run.result.get("warnings"))
    ]
    codes = {code for code, _ in given}
    computed = [(code, text) for code, text in _computed(run) if code not in codes]
    counts = {
        key: [(str(code), grouped(n)) for code, n in sorted(run.section(key).items())]
        for key in ("quarantine", "dropped")
    }
    return {"warnings": computed + given, **counts}


def _computed(run: Run) -> Iterator[tuple[str, str]]:
    """Warnings that follow from the result itself."""
    if run.random_weights:
        yield "random_weights", "The trunk carried random weights; no figure here says what transfer learning can do."
    if run.status == "completed_partial":
        yield "partial_run", " ".join(_partial(run))
    if run.status == "failed":
        yield "failed_run", " ".join(_failed(run))
    tiny = {label: n for label, n in run.test.support.items() if n is not None and n < TINY}
    for label, n in tiny.items():
        yield (
            "tiny_support",
            f"Label “{label}” has {plural(n, 'test image')}, fewer than {TINY}: its figures say little.",
        )
    small = [site for site, score in run.at_sites.items() if any((n or 0) < TINY for n in score.support.values())]
    if small:
        yield (
            "tiny_site_support",
            f"{plural(len(small), 'site')} of {grouped(len(run.at_sites))} had fewer than {TINY} test images of some "
            f"label; the figures of these sites say little: {_joined(small)}.",
        )


def _plain(value: Any) -> str:
    """A configuration value in full, unrounded; null is a dash."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return DASH
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or DASH
    return str(value) if str(value) else "“”"


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", DASH if isinstance(value, Mapping) else _plain(value)


def _setup(run: Run) -> dict[str, Any]:
    config = run.section("config")
    groups = [(str(name), list(_flat(value))) for name, value in config.items() if isinstance(value, Mapping) and value]
    loose = {name: value for name, value in config.items() if not (isinstance(value, Mapping) and value)}
    trunk, upper = run.section("trunk"), run.section("upper")
    identity = [
        ("Fingerprint of the run", _plain(run.result.get("fingerprint"))),
        ("Trunk, SHA-256", _plain(trunk.get("sha256"))),
        ("Trunk, parameters", grouped(trunk.get("parameters"))),
        ("Upper, parameters", grouped(upper.get("parameters"))),
        ("Result schema", str(SCHEMA)),
    ]
    extra = [("weights", list(_flat(run.section("weights")))), ("software", list(_flat(run.section("software"))))]
    top = [("run", list(_flat(loose)))] if loose else []
    return {"identity": identity, "groups": top + groups, "extra": [(name, rows) for name, rows in extra if rows]}

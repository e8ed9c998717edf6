"""The charts of the report: AUC of every model, validation and loss by round, ROC, reliability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import quantiles

from server.report.charts import Axis, Canvas, Dot, Forest, Line, Marker, Plot, Row, axis, round_axis, square
from server.report.reading import Round, Run, Score, natural
from server.report.wording import DASH, GAP, fixed, grouped, plural

MANY = 12  # more sites than this and a chart summarises them instead of naming each
NAMED = 8  # more curves than this and the table below the chart is their legend
COLOURS = 20  # label colours the style sheet defines


def forest(run: Run) -> Forest | None:
    """AUC with its interval: the federated model, all data pooled, each site alone, best first."""
    if run.test.auc is None:
        return None
    scores = [run.test, run.pooled, *run.alone.values()]
    ends = [value for score in scores for value in (score.auc, *(score.interval or ())) if value is not None]
    scale = axis(ends, least=0.0, most=1.0)
    rows = [_row("Federated", "fed", run.test, scale)]
    if run.pooled.values:
        rows.append(_row("All data pooled", "pool", run.pooled, scale))
    if len(run.alone) > MANY:
        rows.append(_crowd("Each site alone", "alone", list(run.alone.values()), scale))
    else:
        ranked = sorted(run.alone.items(), key=lambda item: -math.inf if item[1].auc is None else item[1].auc)
        rows += [_row(f"{site} alone", "alone", score, scale) for site, score in reversed(ranked)]
    ours = run.test.interval
    return Forest(scale, tuple(rows), (scale.percent(ours[0]), scale.length(*ours)) if ours else None)


def at_sites(run: Run) -> Forest | None:
    """The federated model's AUC at each site in one line, if the sites are too many to compare in a table."""
    known = [score.auc for score in run.at_sites.values() if score.auc is not None]
    if len(run.sites) <= MANY or len(known) < 2:
        return None
    scale = axis(known, least=0.0, most=1.0)
    return Forest(scale, (_crowd("Single sites", "fed", list(run.at_sites.values()), scale),))


def _row(name: str, style: str, score: Score, scale: Axis) -> Row:
    figure, ends = score.figure("auc"), score.interval
    return Row(
        name=name,
        style=style,
        text=figure.text,
        why=figure.why,
        beside=score.interval_text,
        n=grouped(score.n),
        dot="" if score.auc is None else scale.percent(score.auc),
        span=(scale.percent(ends[0]), scale.percent(ends[1])) if ends else None,
    )


def _crowd(name: str, style: str, scores: Sequence[Score], scale: Axis) -> Row:
    """Many sites in one line: a tick each, the middle half as a bar, the median as a dot."""
    known = sorted(score.auc for score in scores if score.auc is not None)
    if len(known) < 2:
        return Row(name, style, DASH, "", plural(len(scores), "site"), why="not measured")
    lower, middle, upper = quantiles(known, n=4, method="inclusive")
    return Row(
        name=name,
        style=f"{style} crowd",
        text=fixed(middle),
        why="median over sites",
        beside=f"{fixed(known[0])}{GAP}to{GAP}{fixed(known[-1])}",
        n=f"{grouped(len(known))} of {plural(len(scores), 'site')}",
        dot=scale.percent(middle),
        span=(scale.percent(lower), scale.percent(upper)),
        marks=tuple(scale.percent(value) for value in known),
    )


def validation(run: Run) -> Plot | None:
    """AUC and accuracy on validation by round, with the chosen round marked."""
    series = [("auc", "AUC", "fed"), ("accuracy", "Accuracy", "alone")]
    columns = [[entry.validation.get(key) for entry in run.rounds] for key, _, _ in series]
    known = [value for column in columns for value in column if value is not None]
    if not known:
        return None
    canvas = Canvas(round_axis([entry.number for entry in run.rounds]), axis(known, least=0.0, most=1.0))
    lines = tuple(
        _line(canvas, name, style, run.rounds, column) for (_, name, style), column in zip(series, columns, strict=True)
    )
    return Plot(canvas, "round", "on validation images", lines, marker=_marker(canvas, run.best))


def _line(canvas: Canvas, name: str, style: str, rounds: Sequence[Round], values: Sequence[float | None]) -> Line:
    dense = len(rounds) > 40
    points = [(entry.number, value) for entry, value in zip(rounds, values, strict=True)]
    dots = tuple(
        Dot(*canvas.at(x, y), 1.6 if dense else 3.2, f"round {x}: {name} {fixed(y)}")
        for x, y in points
        if y is not None
    )
    return Line(name, f"{style} dense" if dense else style, canvas.path(points), dots)


def _marker(canvas: Canvas, best: Round | None) -> Marker | None:
    if best is None:
        return None
    anchor = "end" if canvas.x.at(best.number) > 0.6 else "start"  # the side where the text fits
    return Marker(canvas.at(best.number, 0)[0], f"best: round {best.number}", anchor)


def loss(run: Run) -> Plot | None:
    """Mean training loss over images, with each site's own behind it (or the range, when sites are many)."""
    known = [value for entry in run.rounds for value in entry.losses.values()]
    if not known:
        return None
    canvas = Canvas(round_axis([entry.number for entry in run.rounds]), axis(known, least=min(0.0, *known)))
    names = sorted({site for entry in run.rounds for site in entry.losses}, key=natural)
    mean = _line(canvas, "training loss", "fed", run.rounds, [entry.mean_loss for entry in run.rounds])
    if len(names) > MANY:
        return Plot(canvas, "round", "training loss", (mean,), area=_band(canvas, run.rounds))
    single = [
        Line("", "faint", canvas.path([(entry.number, entry.losses.get(name)) for entry in run.rounds]))
        for name in names
    ]
    return Plot(canvas, "round", "training loss", (*single, mean))


def _band(canvas: Canvas, rounds: Sequence[Round]) -> str:
    """Outline of the range between the least and the greatest loss."""
    known = [(entry.number, entry.losses.values()) for entry in rounds if entry.losses]
    outline = [(k, max(values)) for k, values in known] + [(k, min(values)) for k, values in reversed(known)]
    return canvas.path(outline) + "Z" if len(known) > 1 else ""


def roc(run: Run) -> Plot | None:
    """ROC curve of each label on the pooled test images."""
    found = run.section("curves", "roc")
    drawn = [(place, label) for place, label in enumerate(run.labels) if found.get(label)]
    if not drawn:
        return None
    canvas = square()
    lines = tuple(
        Line(
            name=label if len(drawn) <= NAMED else "",
            style="fed" if len(drawn) == 1 else f"k{place % COLOURS}",
            path=canvas.path([(x, y) for x, y in found[label]]),
        )
        for place, label in drawn
    )
    across, up = "false positive rate (1 − specificity)", "true positive rate (recall)"
    return Plot(canvas, across, up, lines, diagonal=True, ring=_operating_ring(run, canvas))


def _operating_ring(run: Run, canvas: Canvas) -> Dot | None:
    point = run.test.operating_point
    recall, specificity = point.get("recall"), point.get("specificity")
    if recall is None or specificity is None:
        return None
    title = f"threshold {fixed(point.get('threshold'))}: recall {fixed(recall)}, specificity {fixed(specificity)}"
    return Dot(*canvas.at(1 - specificity, recall), 5, title)


def reliability(run: Run) -> Plot | None:
    """Accuracy against confidence; a dot's area is its share of the images, or of all annotations of several labels."""
    bins = run.section("curves").get("reliability")
    if not bins:
        return None
    canvas = square()
    most = max(point["n"] for point in bins)
    counted = "annotation" if run.several else "image"
    dots = tuple(
        Dot(
            *canvas.at(point["confidence"], point["accuracy"]),
            round(max(2.5, 11 * math.sqrt(point["n"] / most)), 1),
            f"confidence {fixed(point['confidence'])}, accuracy {fixed(point['accuracy'])}, "
            f"{plural(point['n'], counted)}",
        )
        for point in bins
    )
    return Plot(canvas, "confidence of the model", "share that was right", (Line("", "fed", "", dots),), diagonal=True)

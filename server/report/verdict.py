"""What may be said of a run in sentences: how it ended, what was found, what the intervals carry, what to beware of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from statistics import fmean

from server.report.reading import Run, Score
from server.report.wording import GAP, fixed, grouped, joined, plural

TINY = 10  # fewer test images of a label than this and its figures say little
CHANCE = 0.5


def status(run: Run) -> str:
    """Say what went wrong; nothing if the run is complete."""
    if run.status == "completed":
        return ""
    if run.status == "completed_partial":
        return " ".join(_partial(run))
    if run.status == "failed":
        error = run.result.get("error") or "no reason was recorded"
        return f"This run failed after {plural(run.trained, 'round')}: {error.rstrip('.')}."
    return f"The run's status is “{run.status}”."


def _partial(run: Run) -> Iterator[str]:
    yield "This run is complete only in part."
    late = [site for site in run.sites if (run.section("sites", site).get("rounds") or 0) < run.trained]
    if late:
        number = f"{grouped(len(late))} of {plural(len(run.sites), 'site')}"
        yield f"{number} did not contribute to every round: {joined(late)}."
    silent = [site for site in run.sites if site not in run.at_sites]
    if silent:
        yield f"{grouped(len(silent))} of {plural(len(run.sites), 'site')} gave no test figures: {joined(silent)}."
    planned = run.section("config", "training").get("rounds") or 0
    if planned > run.trained > 0:
        yield f"It ran {grouped(run.trained)} of {plural(planned, 'planned round')}."


def finding(run: Run) -> str:
    """The one sentence to remember; its figures are the result's."""
    if not run.test.values:
        return "The federated model was not measured on test images: there are no test figures."
    measured = sum(1 for score in run.at_sites.values() if score.n)
    where = f"on {plural(run.test.n, 'test image')}" + (f" of {plural(measured, 'site')}" if measured else "")
    if run.test.auc is None:
        reason = run.test.why.removeprefix("undefined: ")
        accuracy = fixed(run.test.get("accuracy"))
        return f"The AUC of the federated model is not defined {where} ({reason}); its accuracy is {accuracy}."
    interval = f" (95{GAP}% interval {run.test.interval_text})" if run.test.interval else ""
    clauses = [f"The federated model reaches AUC {fixed(run.test.auc)}{interval} {where}", *_beside(run)]
    return "; ".join(clauses) + "."


def _beside(run: Run) -> Iterator[str]:
    """Say what the baselines reach."""
    alone = [score.auc for score in run.alone.values() if score.auc is not None]
    if len(alone) == 1:
        yield f"the one site that could be measured alone reaches {fixed(alone[0])}"
    elif alone:
        yield f"single sites alone reach {fixed(min(alone))} to {fixed(max(alone))} (mean {fixed(fmean(alone))})"
    if run.pooled.auc is not None:
        yield f"pooling all data would give {fixed(run.pooled.auc)}"


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


def judgement(run: Run) -> str:
    """Only what the intervals carry: where they overlap, no difference can be shown."""
    return " ".join(_judgement(run)) if run.test.auc is not None else ""


def _judgement(run: Run) -> Iterator[str]:
    if run.test.interval and run.test.interval[0] <= CHANCE:
        yield "The interval reaches down to 0.5, which is chance: that the model does better cannot be shown."
    if run.pooled.auc is not None:
        yield {
            "overlap": "Against pooling all data the intervals overlap: no difference can be shown.",
            "above": "Against pooling all data the federated model is better: the intervals do not overlap.",
            "below": "Against pooling all data the federated model is worse: the intervals do not overlap.",
            "unknown": "Against pooling all data nothing can be said, because an interval is missing.",
        }[compare(run.test, run.pooled)]
    alone = {site: score for site, score in run.alone.items() if score.auc is not None}
    if alone:
        tally = Counter(compare(run.test, score) for score in alone.values())
        yield f"Against {plural(len(alone), 'site')} alone: {_tallied(tally)}."
        yield from _one_sided(run, list(alone))
    elif run.pooled.auc is None:
        yield "No baseline was measured, so nothing can be said about what federation gained."


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


def _one_sided(run: Run, sites: list[str]) -> Iterator[str]:
    """Being better than a site that never saw a second label is no merit; of several labels an image none is alone."""
    if run.several:
        return
    poor = [site for site in sites if sum(1 for n in run.section("sites", site, "labels").values() if n) == 1]
    if poor:
        holds, learn = ("holds", "its own model") if len(poor) == 1 else ("hold", "their own models")
        yield (
            f"{grouped(len(poor))} of {plural(len(sites), 'site')} {holds} images of one label only, "
            f"from which {learn} cannot learn to tell labels apart."
        )


def choice(run: Run) -> str:
    """Say which round was chosen, and what round 0 is."""
    if run.best is None:
        return ""
    start = "a head solved in closed form from sums that the sites sent" if run.closed_form else "a head of zeros"
    if run.best.number:
        chosen = f"Round {run.best.number} of {run.trained} was chosen on validation. Round 0, the start, is {start}."
    elif run.trained:
        chosen = f"The start, round 0, was chosen: no round of training did better on validation. It is {start}."
    else:
        chosen = f"The start, round 0, was the only candidate. It is {start}."
    score = run.best.validation
    reached = f"AUC {fixed(score.auc)} and accuracy {fixed(score.get('accuracy'))} (n{GAP}{grouped(score.n)})"
    return f"{chosen} On validation the chosen model has {reached}."


def warnings(run: Run) -> list[tuple[str, str]]:
    """Return code and message of what to beware of: what the run recorded, then what follows from the figures."""
    given = [(entry["code"], entry["message"]) for entry in run.result.get("warnings") or ()]
    return given + [(code, text) for code, text in _small(run) if code not in dict(given)]


def _small(run: Run) -> Iterator[tuple[str, str]]:
    for label, n in run.test.support.items():
        if n is not None and n < TINY:
            text = f"Label “{label}” has {plural(n, 'test image')}, fewer than {TINY}: its figures say little."
            yield "tiny_support", text
    small = [site for site, score in run.at_sites.items() if any((n or 0) < TINY for n in score.support.values())]
    if small:
        yield (
            "tiny_site_support",
            f"{grouped(len(small))} of {plural(len(run.at_sites), 'site')} had fewer than {TINY} test images of some "
            f"label; the figures of these sites say little: {joined(small)}.",
        )

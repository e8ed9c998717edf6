"""A `result.json` as the report reads it: null anywhere a figure can be undefined, groups that may be missing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from server.report.wording import GAP, Figure, fixed, plural

SCHEMA = 1


@dataclass(frozen=True)
class Score:
    """The metrics of one model on one set of images; whatever is undefined reads as `None`."""

    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int | None:
        """Number of images."""
        return self.values.get("examples")

    @property
    def annotated(self) -> int | None:
        """Images that were annotated for this one of several labels; `None` of anything else."""
        return self.values.get("annotated")

    @property
    def support(self) -> Mapping[str, int | None]:
        """Images of each label."""
        return self.values.get("support") or {}

    @property
    def auc(self) -> float | None:
        """Area under the ROC curve."""
        return self.get("auc")

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the AUC."""
        ends = self.values.get("auc_ci95")
        return (ends[0], ends[1]) if ends else None

    @property
    def interval_text(self) -> str:
        """The interval as printed, `""` when there is none."""
        return f"{GAP}to{GAP}".join(map(fixed, self.interval)) if self.interval else ""

    @property
    def bound_text(self) -> str:
        """How far binning the scores may have moved the AUC, rounded up; `""` when that is not known."""
        bound = self.get("auc_bound")
        return "" if bound is None else f"±{GAP}{fixed(math.ceil(1000 * bound) / 1000)}"

    @property
    def why(self) -> str:
        """Why a metric of these images is a dash."""
        if self.n is None:
            return "not measured"
        if self.annotated is not None:
            return _why_of_one(self.n, self.annotated)
        if self.n == 0:
            return "undefined: no images"
        if self._several:
            return "undefined: no label is both present and absent"
        present = sum(1 for count in self.support.values() if count)
        return "undefined: one label only" if present == 1 else "undefined"

    @property
    def _several(self) -> bool:
        """Whether an image has several labels: then each tells how many images were annotated for it."""
        return any("annotated" in (figures or {}) for figures in (self.values.get("per_class") or {}).values())

    def get(self, key: str) -> float | None:
        """One metric."""
        return self.values.get(key)

    def figure(self, key: str) -> Figure:
        """One metric as printed, with the reason where it is a dash."""
        return Figure(fixed(self.get(key)), self.why if self.get(key) is None else "")

    def label(self, name: str) -> Score:
        """The figures of one label; `n` is the number of images that have it."""
        return Score({**((self.values.get("per_class") or {}).get(name) or {}), "examples": self.support.get(name)})

    @property
    def operating_point(self) -> Score:
        """The figures at the threshold that was frozen on validation."""
        return Score(self.values.get("operating_point") or {})


@dataclass(frozen=True)
class Round:
    """One entry of `rounds`; number 0 is the start."""

    number: int
    validation: Score
    sites: Mapping[str, Mapping[str, Any]]
    seconds: float | None
    weights: tuple[int | None, int | None]  # bytes to the sites, from the sites
    other: tuple[int | None, int | None]

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Round:
        """Read an entry."""
        return cls(
            number=entry["round"],
            validation=Score(entry.get("validation") or {}),
            sites={site: report or {} for site, report in (entry.get("sites") or {}).items()},
            seconds=entry.get("seconds"),
            weights=(entry.get("bytes_down"), entry.get("bytes_up")),
            other=(entry.get("evaluation_bytes_down"), entry.get("evaluation_bytes_up")),
        )

    @property
    def losses(self) -> dict[str, float]:
        """Training loss of each site that sent one."""
        reports = {site: report.get("train_loss") for site, report in self.sites.items()}
        return {site: loss for site, loss in reports.items() if loss is not None}

    @property
    def mean_loss(self) -> float | None:
        """Training loss over sites, weighted by their images."""
        images = {site: self.sites[site].get("examples") or 0 for site in self.losses}
        total = sum(images.values())
        return math.fsum(images[site] * loss for site, loss in self.losses.items()) / total if total else None

    @property
    def contributors(self) -> int:
        """Sites whose contribution was used."""
        return sum(report.get("status") == "contributed" for report in self.sites.values())

    @property
    def traffic(self) -> float | None:
        """Bytes of all its messages, both directions."""
        return total([*self.weights, *self.other])


@dataclass(frozen=True)
class Run:
    """A result, read once: what every section of the page starts from."""

    result: Mapping[str, Any]
    status: str
    labels: tuple[str, ...]
    sites: tuple[str, ...]
    rounds: tuple[Round, ...]
    test: Score
    at_sites: Mapping[str, Score]
    pooled: Score
    alone: Mapping[str, Score]

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Run:
        """Read a result."""
        test, baselines = result.get("test") or {}, result.get("baselines") or {}
        task = (result.get("config") or {}).get("task") or {}
        return cls(
            result=result,
            status=result.get("status") or "unknown",
            labels=tuple(task.get("labels") or ()),
            sites=tuple(sorted(result.get("sites") or {}, key=natural)),
            rounds=tuple(map(Round.of, result.get("rounds") or ())),
            test=Score(test.get("pooled") or {}),
            at_sites=_scores(test.get("sites")),
            pooled=Score(baselines.get("pooled") or {}),
            alone=_scores(baselines.get("local")),
        )

    def section(self, *keys: str) -> Mapping[str, Any]:
        """A nested group of the result, empty where there is none."""
        value: Any = self.result
        for key in keys:
            value = value.get(key) or {}
        found: Mapping[str, Any] = value
        return found

    @property
    def trained(self) -> int:
        """Rounds that were run after the start."""
        return sum(entry.number > 0 for entry in self.rounds)

    @property
    def best(self) -> Round | None:
        """The round whose model was chosen."""
        number = self.result.get("best_round")
        return next((entry for entry in self.rounds if entry.number == number), None)

    @property
    def closed_form(self) -> bool:
        """Whether the start is a head solved from the sites' sums."""
        return "analytic" in (
            self.section("config", "model").get("init"),
            self.section("config", "training").get("strategy"),
        )

    @property
    def random_weights(self) -> bool:
        """Whether the trunk was never trained on anything."""
        return self.section("weights").get("source") == "none"

    @property
    def several(self) -> bool:
        """Whether an image has several labels, each present or absent, and not exactly one."""
        return self.section("config", "task").get("kind") == "multi-label"

    @property
    def subject(self) -> str:
        """Whose precision and recall the headline figures are."""
        if len(self.labels) == 2 and not self.several:
            return f"of label “{self.labels[1]}”"
        return f"mean over {plural(len(self.labels), 'label')}" if self.labels else ""


def _scores(found: Mapping[str, Any] | None) -> dict[str, Score]:
    return {site: Score((found or {})[site] or {}) for site in sorted(found or {}, key=natural)}


def _why_of_one(present: int, annotated: int) -> str:
    """Say why a figure of one of several labels is undefined."""
    if annotated == 0:
        return "undefined: not annotated in any image"
    return {0: "undefined: present in no image", annotated: "undefined: absent in no image"}.get(present, "undefined")


def natural(name: str) -> str:
    """Return a key that sorts `site-2` before `site-10`."""
    return re.sub("[0-9]+", lambda digits: digits[0].zfill(12), name)


def total(values: Iterable[float | None]) -> float | None:
    """Add up what is known; nothing known is `None`, not 0."""
    known = [value for value in values if value is not None]
    return math.fsum(known) if known else None

"""Metrics as Prometheus reads them: families that are known beforehand, and what they are at this moment.

Nothing is counted here: whoever scrapes gets what the documents of the project say at that time. What is not known is
left out, never 0. Labels come from closed lists, but for names of sites and runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
OTHER = "other"
"""Stands for what a closed list does not have: a newer version may have written it."""


@dataclass(frozen=True)
class Family:
    """A metric that can be told; a counter if its name ends in `_total`, else a gauge."""

    name: str
    help: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """What a metric is now, for one set of labels."""

    name: str
    value: float
    labels: tuple[str, ...] = ()


def sample(name: str, value: object, *labels: str) -> Iterator[Sample]:
    """Yield a sample, or nothing where its value is not known."""
    if isinstance(value, bool | int | float) and math.isfinite(value):
        yield Sample(name, float(value), labels)


def one_of(name: str, known: Iterable[str], now: str | None, *labels: str) -> Iterator[Sample]:
    """Yield 1 for what of a closed list holds now, 0 for all else of it; `other` where it is not on the list.

    Args:
        name: of the metric; its last label is the state.
        known: the list.
        now: the state; None or empty: none holds.
        labels: the labels before the last.
    """
    states = (*known, OTHER)
    held = now if not now or now in states else OTHER
    for state in states:
        yield Sample(name, float(state == held), (*labels, state))


def exposed(families: Sequence[Family], samples: Iterable[Sample]) -> bytes:
    """Return a scrape.

    Args:
        families: all that can be told, in the order in which they are.
        samples: what is known now.

    Raises:
        KeyError: a sample of no family.
    """
    registry = CollectorRegistry()
    registry.register(_Told(families, samples))
    return generate_latest(registry)


class _Told(Collector):
    def __init__(self, families: Sequence[Family], samples: Iterable[Sample]) -> None:
        self._families = {family.name: _metric(family) for family in families}
        for one in samples:
            self._families[one.name].add_metric([_clean(label) for label in one.labels], one.value)

    def collect(self) -> Iterator[Metric]:
        return (family for family in self._families.values() if family.samples)

    def describe(self) -> Iterator[Metric]:
        return iter(())


def _clean(label: str) -> str:
    """Return a label that can be encoded: the name of a folder may be no Unicode."""
    return label.encode("utf-8", "backslashreplace").decode()


def _metric(family: Family) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if family.name.endswith("_total") else GaugeMetricFamily
    return kind(family.name, family.help, labels=family.labels)

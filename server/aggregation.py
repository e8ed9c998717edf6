"""Aggregation by Flower's own strategy classes, in the order of the sites' names.

The classes are used for their arithmetic alone: which sites take part, what is admitted and when a round ends is the
round engine's business. Addition of floats is not associative, so replies are ordered before they are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
)
from numpy.typing import NDArray

from common import parameters
from common.errors import ConfigError
from common.parameters import Parameters
from common.run_config import Strategy, Training

KRUM_LEAST_SITES = 3
"""Krum scores a site by its n - f - 2 nearest neighbours: below three sites there is none."""


@dataclass(frozen=True)
class Contribution:
    """One admitted update."""

    site: str
    update: Parameters
    num_examples: int


def krum_malicious(sites: int) -> int:
    """Return f, the most hostile sites that Krum can stand: n >= 2 f + 3 (Blanchard et al., NeurIPS 2017, prop. 4.2).

    Examples:
        >>> [krum_malicious(n) for n in (3, 5, 10)]
        [0, 1, 3]
    """
    return max(0, (sites - KRUM_LEAST_SITES) // 2)


_MAKERS: dict[str, Callable[[Strategy, Training, int], FedAvg]] = {
    "fedavg": lambda _rule, _training, _sites: FedAvg(),
    "analytic": lambda _rule, _training, _sites: FedAvg(),
    "fedprox": lambda rule, _training, _sites: FedProx(proximal_mu=rule.parameter or 0.0),
    "fedavgm": lambda _rule, training, _sites: FedAvgM(server_momentum=training.server_momentum),
    "fedadam": lambda _rule, training, _sites: FedAdam(eta=training.server_lr),
    "fedyogi": lambda _rule, training, _sites: FedYogi(eta=training.server_lr),
    "fedadagrad": lambda _rule, training, _sites: FedAdagrad(eta=training.server_lr),
    "median": lambda _rule, _training, _sites: FedMedian(),
    "trimmed-mean": lambda rule, _training, _sites: FedTrimmedAvg(beta=rule.parameter or 0.0),
    "krum": lambda _rule, _training, sites: Krum(num_malicious_nodes=krum_malicious(sites)),
}
# What a strategy carries from round to round, by attribute.
_MEMORY = ("m_t", "v_t", "momentum_vector")


def check_sites(rule: Strategy, sites: int) -> None:
    """Check that a strategy can work with this many sites.

    Raises:
        ConfigError: it needs more.
    """
    if rule.kind == "krum" and sites < KRUM_LEAST_SITES:
        raise ConfigError(f"--strategy krum: needs at least {KRUM_LEAST_SITES} sites, got {sites}")


class Aggregator:
    """One run's strategy: contributions to new weights, with a state that can be saved.

    Raises:
        ConfigError: fewer sites than the strategy needs.
    """

    def __init__(self, training: Training, sites: int) -> None:
        rule = training.rule
        check_sites(rule, sites)
        self._strategy: Any = _MAKERS[rule.kind](rule, training, sites)

    def aggregate(
        self, round_number: int, current: Parameters, contributions: Sequence[Contribution]
    ) -> dict[str, NDArray[np.float32]]:
        """Return the weights after a round.

        Args:
            round_number: 1 for the first.
            current: the weights that the sites received.
            contributions: at least one.
        """
        ordered = sorted(contributions, key=lambda contribution: contribution.site)
        if hasattr(self._strategy, "current_arrays"):
            keeps_record = isinstance(self._strategy, FedAvgM)
            self._strategy.current_arrays = _record(current) if keeps_record else dict(current)
        origin = self._origin(current)
        replies = [_reply(origin, contribution) for contribution in ordered]
        arrays, _ = self._strategy.aggregate_train(round_number, replies)
        found = {name: np.asarray(arrays[name].numpy(), np.float32) for name in current}
        return found if origin is current else parameters.add(current, found)

    def _origin(self, current: Parameters) -> Parameters:
        """Return what updates are added to before Flower sees them.

        Krum is shown the updates themselves: Flower takes distances as differences of squared norms, and those of the
        weights are so large that the distances between updates drown in their rounding.
        """
        if isinstance(self._strategy, Krum):
            return {name: np.zeros_like(value) for name, value in current.items()}
        return current

    def state(self) -> dict[str, NDArray[Any]]:
        """Return what the strategy carries to the next round, by name."""
        held: dict[str, NDArray[Any]] = {}
        for attribute in _MEMORY:
            value = getattr(self._strategy, attribute, None)
            items: Mapping[Any, Any] = value if isinstance(value, Mapping) else dict(enumerate(value or []))
            held.update({f"{attribute}/{key}": np.asarray(array) for key, array in items.items()})
        return held

    def restore(self, held: Mapping[str, NDArray[Any]]) -> None:
        """Take up a saved state."""
        for attribute in _MEMORY:
            items = {key.split("/", 1)[1]: value for key, value in held.items() if key.startswith(f"{attribute}/")}
            if items:
                listed = attribute == "momentum_vector"
                setattr(self._strategy, attribute, [items[str(i)] for i in range(len(items))] if listed else items)


def _record(values: Parameters) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in values.items()})


class _Sum(Array):
    """One array of a site's weights, added up when Flower reads it: of all sites' weights one array is in memory."""

    def __init__(self, origin: Parameters, update: Parameters, name: str) -> None:
        super().__init__(dtype="float32", shape=tuple(origin[name].shape), stype="numpy.ndarray", data=b"")
        self._read: Callable[[], NDArray[Any]] = lambda: np.asarray(origin[name] + update[name])

    def numpy(self) -> NDArray[Any]:
        """Return the array."""
        return self._read()


def _reply(origin: Parameters, contribution: Contribution) -> Message:
    """Return what Flower's strategies read: the site's weights, from `origin` on, and its number of examples."""
    weights = ArrayRecord()
    for name in origin:  # one by one: a record made of a mapping would copy their bytes
        weights[name] = _Sum(origin, contribution.update, name)
    metrics = MetricRecord({"num-examples": contribution.num_examples})
    return Message(RecordDict({"arrays": weights, "metrics": metrics}), dst_node_id=0, message_type="train")

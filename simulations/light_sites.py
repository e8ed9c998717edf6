"""Many sites in one process, to load a coordinator: true links, and answers that nobody computed.

python -P -m simulations.light_sites FOLDER

Every folder below FOLDER/sites is a site that has joined. Its link speaks Flower's protocol over TLS as any other;
what stands behind it is no daemon but a few made-up examples, so that a small machine can carry dozens of them. The
updates are as large as true ones, and differ between sites and rounds, for Flower keeps equal parts once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client import link
from client.app import make_relay
from client.site_config import read_site
from common import analytic, metrics
from common.messages import (
    REQUEST_OF,
    Describe,
    Description,
    Done,
    Evaluate,
    Evaluated,
    Reply,
    Request,
    Statistics,
    Summed,
    Train,
    Trained,
    content_of,
    from_bytes,
    from_record,
    packed,
    to_bytes,
    to_record,
)
from common.run_config import RunConfig

FACTS = "light.json"
"""The file in FOLDER that says what cannot be read from a request: the width of the head's input."""

LABELS = np.array([0, 1] * 4, np.int64)
"""The examples of every split of every site."""


@dataclass(frozen=True)
class LightSite:
    """One site: examples without images."""

    name: str
    width: int  # of the head's input

    def pass_on(self, kind: str, record: Any) -> Any:
        """Return the packed answer to packed records, as a relay does."""
        request = from_record(from_bytes(content_of(record)), REQUEST_OF[kind])
        return packed(to_bytes(to_record(self.answer(request))))

    def answer(self, request: Request) -> Reply:
        """Return the answer to a request."""
        answers: dict[type[Any], Callable[[Any], Reply]] = {
            Describe: self._describe,
            Statistics: self._statistics,
            Train: self._train,
            Evaluate: self._evaluate,
        }
        return answers.get(type(request), lambda _: Done())(request)

    def _describe(self, request: Describe) -> Description:
        run = RunConfig.from_toml(request.run)
        support = np.tile(np.bincount(LABELS, minlength=len(run.task.labels)), (3, 1)).astype(np.int64)
        return Description(self.name, support, run.model.trunk_sha256)  # it says that it holds the trunk

    def _statistics(self, request: Statistics) -> Summed:
        inputs = np.random.default_rng(self._seed(0)).normal(size=(len(LABELS), self.width))
        return Summed(**analytic.sums(inputs, LABELS, request.class_weights, gram=request.gram).__dict__)

    def _train(self, request: Train) -> Trained:
        found = self._judged(request.edges, request.round)
        update = self._update(len(request.weights), request.round).astype(request.weights.dtype)
        return Trained(update, len(LABELS), 0.5, epsilon=0.0, steps=0, round=request.round, **found)

    def _evaluate(self, request: Evaluate) -> Evaluated:
        return Evaluated(**self._judged(request.edges, 0))

    def _judged(self, edges: NDArray[np.float64], number: int) -> dict[str, NDArray[Any]]:
        logits = np.random.default_rng(self._seed(number)).normal(size=(len(LABELS), 2))
        return metrics.evaluate(logits, LABELS, edges).arrays()

    def _update(self, size: int, number: int) -> NDArray[np.float32]:
        return _noise(size) * np.float32(1 + self._seed(number) % 100_003 / 100_003)

    def _seed(self, number: int) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.name} {number}".encode()).digest()[:4])


@lru_cache(maxsize=1)
def _noise(size: int) -> NDArray[np.float32]:
    """Return small random numbers: the same for all sites, for there are many of both."""
    return np.random.default_rng(0).standard_normal(size, np.float32) * np.float32(1e-4)


def serve(folder: Path, stop: threading.Event) -> None:
    """Keep the sites of a folder linked until `stop` is set."""
    width = int(json.loads((folder / FACTS).read_bytes())["width"])
    threads = []
    for path in sorted((folder / "sites").glob("*/site.toml")):
        config = read_site(path)
        relay = make_relay(LightSite(config.name, width))
        threads.append(threading.Thread(target=link.run, args=(link.settings_of(config), relay, stop)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main(arguments: list[str]) -> int:
    """Run until SIGTERM."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    (folder,) = arguments
    serve(Path(folder), stop)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

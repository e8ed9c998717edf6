"""What the federation is compared with: all data pooled, and each site alone, with the same budget of steps.

Both are runs of the same coordinator and the same site code, over a federation of one site: pooled training takes as
many steps as all sites together, a site alone as many as it took in the federation. All are tested on the pooled
test split, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from client.app import make_app as make_client_app
from client.cohort import SPLITS, Cohort
from client.workshop import Workshop
from common.errors import ConsiliumError
from common.run_config import RunConfig
from server.app import make_app as make_server_app
from server.company import Start
from server.coordinator import Coordinator, Outcome
from server.federation import Federation
from simulations.grid import InProcessGrid, run_in_process
from simulations.hospitals import open_in_process

Progress = Callable[[str, int, int], None]


def run_all(
    start: Start, pool: Cohort, sites: Mapping[str, Cohort], workshop: Workshop, scratch: Path, progress: Progress
) -> dict[str, Any]:
    """Return the METRICS of pooled training and of each site alone, on the pooled test split."""
    labels = start.run.task.labels
    total = len(sites) + 1
    progress("baselines", 0, total)
    pooled = run_alone(start, "pooled", pool, workshop, scratch, parts=len(sites))
    found: dict[str, Any] = {"pooled": pooled.test.summary(labels, pooled.threshold), "local": {}}
    for number, (name, cohort) in enumerate(sites.items(), start=1):
        progress("baselines", number, total)
        alone = run_alone(start, name, with_test_of(pool, cohort), workshop, scratch)
        found["local"][name] = alone.test.summary(labels, alone.threshold)
    progress("baselines", total, total)
    return found


def with_test_of(pool: Cohort, site: Cohort) -> Cohort:
    """Return a site's training and validation examples with the test examples of the whole pool.

    Examples are found again in the pool by their row.
    """
    test = SPLITS.index("test")
    own = np.isin(pool.rows, site.rows[site.splits != test]) & (pool.splits != test)
    return pool.subset(np.flatnonzero(own | (pool.splits == test)))


def run_alone(start: Start, name: str, cohort: Cohort, workshop: Workshop, scratch: Path, parts: int = 1) -> Outcome:
    """Run a federation of one site that stands for `parts` of them; nothing of it is kept.

    Raises:
        ConsiliumError: the run did not end.
    """
    run = alone(start.run, name, parts)
    outcomes: list[Outcome] = []

    def coordinate(grid: Any) -> None:
        lonely = replace(start, run=run, folder=None, every_label=False)
        outcomes.append(Coordinator(Federation(grid, run.sites.deadline_s), lonely).execute())

    client = make_client_app(open_in_process({name: cohort}, workshop, scratch))
    run_in_process(make_server_app(coordinate), InProcessGrid(client, [name]))
    if not outcomes:
        raise ConsiliumError(f"baseline {name}: the run did not end")
    return outcomes[0]


def alone(run: RunConfig, name: str, parts: int = 1) -> RunConfig:
    """Return the run for one site that takes the steps of `parts` of them.

    Averaging one update is the identity, so robust rules and a limit on updates have nothing to do.
    """
    training = run.training
    if training.rule.kind not in ("analytic", "fedavg"):
        training = training.model_copy(update={"strategy": "fedavg"})
    # Epochs grow with the data by themselves, and what a private step costs and gives does not depend on their size
    if training.local_steps is not None and not run.privacy.on:
        training = training.model_copy(update={"local_steps": training.local_steps * parts})
    sites = run.sites.model_copy(update={"names": (name,), "quorum": 1, "max_norm": None})
    return run.model_copy(update={"training": training, "sites": sites})

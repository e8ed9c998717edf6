"""What grows is said to grow, and what only wavers or fills is not; the commands, as short as they can be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from simulations import crowd, many_sites, soak
from simulations.flatness import judged, trend
from simulations.observed import Held, Sample
from simulations.soak import ENGINE, by_run, findings, said, table

ROOT = Path(__file__).parents[1]
HOURS = np.linspace(0, 2, 60)
LEAST = 2e6


def noise(seed: int, size: float) -> Any:
    return np.random.default_rng(seed).normal(0, size, len(HOURS))


@pytest.mark.parametrize("size", [1e4, 1e6, 1e7])
def test_what_wavers_is_flat_or_not_told(size: float) -> None:
    verdicts = [judged(HOURS, 1e8 + noise(seed, size), LEAST)[1] for seed in range(100)]
    assert verdicts.count("grows") <= 1, "a chance in some hundreds"


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.floats(4.0, 100.0))
def test_what_leaks_grows_whatever_the_samples_in_a_message(seed: int, megabytes: float) -> None:
    values = 1e8 + megabytes * 1e6 * HOURS + noise(seed, 1e5)
    values[::10] += 4e7
    line, verdict = judged(HOURS, values, LEAST)
    assert verdict == "grows"
    assert line is not None and line.slope == pytest.approx(megabytes * 1e6, rel=0.2)


def test_what_fills_up_is_flat() -> None:
    assert judged(HOURS, 1e8 + 2e7 * (1 - np.exp(-8 * HOURS)), LEAST)[1] == "flat"


def test_a_time_too_short_to_tell_is_said_to_be() -> None:
    hours = np.linspace(0, 0.01, 10)
    assert judged(hours, 1e8 + noise(0, 1e6)[:10], LEAST)[1] == "unclear"
    assert trend(hours[:3], [1.0, 2.0, 3.0]) is None


def sampled(values: dict[int, list[float]], pid: int = 1, name: str = "link site-1") -> list[dict[str, Any]]:
    """Return samples, a minute apart, of a process by run."""
    flat = [(run, value) for run, found in values.items() for value in found]
    return [
        {
            "hours": number / 60,
            "run": run,
            "processes": {name: {"pid": pid, "rss": value, "files": 7, "threads": 3}},
            "places": {},
        }
        for number, (run, value) in enumerate(flat)
    ]


def test_of_a_run_the_least_counts_and_of_an_engine_the_most() -> None:
    values = {0: [1.0], 1: [5.0, 9.0], 2: [6.0, 4.0, 8.0]}
    assert by_run(sampled(values), "processes", "link site-1", "rss") == ([2 / 60, 5 / 60], [5.0, 4.0])
    assert by_run(sampled(values, name=ENGINE), "processes", ENGINE, "rss")[1] == [1.0, 9.0, 8.0]


def test_of_a_process_that_was_started_anew_the_longest_life_counts() -> None:
    samples = sampled({run: [float(run)] for run in range(9)})
    for sample in samples[6:]:
        sample["processes"]["link site-1"]["pid"] = 2
    assert by_run(samples, "processes", "link site-1", "rss")[1] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_leak_is_named_and_what_is_flat_beside_it_too() -> None:
    found = findings(sampled({run: [1e8 + run * 1e6] * 3 for run in range(40)}), 0.5)
    assert [(one.measure, one.verdict) for one in found] == [("files", "flat"), ("rss", "grows"), ("threads", "flat")]
    assert said(found[1]) == "grows: 20.0 MB/h"
    assert found[1].hours[0] >= 0.5, "the warm-up is left out"
    assert table(found).row_count == 3


@pytest.mark.slow
def test_a_plot_is_drawn(tmp_path: Path) -> None:
    found = findings(sampled({run: [1e8] for run in range(9)}), 0.0)
    soak.plot(tmp_path / "soak.png", found, [{"hours": 0.05, "process": "engine"}])
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--faults", "-1"], ["--sites", "0"]])
def test_a_soak_that_cannot_be_is_refused(arguments: list[str]) -> None:
    found = CliRunner().invoke(soak.main, arguments)
    assert isinstance(found.exception, ConfigError) and arguments[0] in str(found.exception)


def test_many_sites_refuse_to_be_none() -> None:
    found = CliRunner().invoke(many_sites.main, ["--sites", "0"])
    assert isinstance(found.exception, ConfigError) and "--sites: got 0" in str(found.exception)


def test_memory_is_told_by_kind_of_process() -> None:
    held = {"daemon site-1": Held(9, 5, 1, 1), "daemon site-2": Held(9, 7, 1, 1), "engine": Held(9, 1, 1, 1)}
    found = many_sites.memory([Sample(0.0, held), Sample(1.0, {"engine": Held(9, 2, 1, 1)})])
    assert found["sum_pss"] == 13
    assert found["kinds"] == {"daemon": {"median": 6, "peak": 7}, "engine": {"median": 1.5, "peak": 2}}


def test_a_missed_contribution_is_a_missed_aim() -> None:
    facts = {
        "sites": 2, "rounds": 3, "status": "completed", "same": True, "best_round": 1, "contributions": 5, "up_s": 1.0,
        "run_s": 1.0, "round_s": [1.0], "superlink_cpu_s": 1.0, "memory": {"sum_pss": 1, "kinds": {}},
    }  # fmt: skip
    missed = [row.name for row in many_sites.rows(facts) if row.aim and not row.met]
    assert missed == ["contributions"]


@pytest.mark.faults
def test_hospitals_whose_processes_come_from_one_do_a_run(tmp_path: Path) -> None:
    found = many_sites.measure(tmp_path, 3, 2, lambda _phase, _done, _total: None, apart=False)
    assert all(row.met for row in found.rows if row.aim), found.facts
    assert found.facts["contributions"] == 6 and found.facts["same"]


@pytest.mark.faults
def test_a_crowd_ends_with_the_first_that_ends(tmp_path: Path) -> None:
    place = tmp_path / "0"
    place.mkdir()
    (place / "site.toml").write_text('[site]\nname = "st-anna"\n\n[data]\nimages = "."\n')
    line = [sys.executable, "-P", "-m", "simulations.crowd", str(tmp_path)]
    environment = {**os.environ, **crowd.ENVIRONMENT}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert " st-anna has ended; see its log" in done.stderr and "Traceback" not in done.stderr
    assert set(json.loads((tmp_path / crowd.PIDS).read_bytes())) == {"daemon st-anna", "link st-anna"}


@pytest.mark.faults
def test_a_soak_of_a_minute_and_a_half_with_kills(tmp_path: Path) -> None:
    arguments = ["--minutes", "1.5", "--sites", "2", "--rounds", "2", "--faults", "20", "--output", str(tmp_path)]
    done = CliRunner().invoke(soak.main, arguments)
    facts = json.loads((tmp_path / "soak.json").read_bytes())
    assert [run["status"] for run in facts["runs"]] == ["completed"] * len(facts["runs"]) and facts["runs"]
    assert facts["kills"] and facts["samples"]
    assert {"engine", "link site-1", "daemon site-2", "superlink coordinator"} <= {
        one["of"] for one in facts["verdicts"]
    }
    assert done.exit_code == int(any(one["verdict"] == "grows" for one in facts["verdicts"]))

"""A coordinator killed at any point and started again ends with the bytes of one that was never killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import CheckpointError
from server.state import RoundLog, RunState, asdict_shallow, load, save

ROOT = Path(__file__).parent.parent
SITES = ("north", "south")


def state(**changes):
    random = np.random.default_rng(0)
    facts = RunState(
        round=3,
        weights={"body.w": random.normal(size=(2, 3)).astype(np.float32), "head.b": np.float32([1, -0.0])},
        best={"body.w": np.full((2, 3), np.float32(1e-45)), "head.b": np.float32([3.4e38, 0])},
        best_round=1,
        best_score=0.1 + 0.2,
        best_examples=17,
        threshold=-0.25,
        strategy={"m_t/body.w": random.normal(size=(2, 3)), "momentum_vector/0": np.float32([7])},
        fixed={"class_weights": np.array([0.1, 2.0]), "mean": np.float32([0.5])},
        edges=random.normal(size=(1, 15)),
        pending={"round": 3, "seconds": 0.125, "sites": {"Łódź\u2028": {"status": "contributed"}}},
        lines=3,
        transfers={"north": 1},
        seconds=12.5,
    )
    return replace(facts, **changes)


def same(one, other):
    for name, value in asdict_shallow(one).items():
        found = getattr(other, name)
        if name == "edges":
            value, found = {"edges": value}, {"edges": found}
        if name in ("weights", "best", "strategy", "fixed", "edges"):
            assert list(found) == list(value)
            for key in value:
                assert found[key].dtype == value[key].dtype
                assert found[key].shape == value[key].shape
                assert found[key].tobytes() == value[key].tobytes()
        else:
            assert found == value, name


# ----------------------------------------------------------------------------------------------- saving and loading


def test_a_state_comes_back_as_it_was(tmp_path):
    save(tmp_path / "state", state())
    same(state(), load(tmp_path / "state"))


@pytest.mark.parametrize(
    "changes",
    [{"best": {}, "best_score": None, "threshold": None, "strategy": {}}, {"weights": {"w": np.float32(2.5)}}],
)
def test_what_is_not_there_yet_comes_back_as_such(tmp_path, changes):
    save(tmp_path / "state", state(**changes))
    same(state(**changes), load(tmp_path / "state"))


def test_names_keep_their_order_for_the_order_is_that_of_the_wire(tmp_path):
    names = sorted(f"body.{block}.{kind}" for block in range(12) for kind in ("weight", "bias"))
    weights = {name: np.full(2, place, np.float32) for place, name in enumerate(names)}
    save(tmp_path / "state", state(weights=weights, best=weights))
    found = load(tmp_path / "state")
    assert list(found.weights) == list(found.best) == names


def test_nothing_saved_is_nothing_held(tmp_path):
    assert load(tmp_path / "state") is None
    (tmp_path / "state").mkdir()
    assert load(tmp_path / "state") is None


def test_only_the_tensors_of_the_last_round_are_kept(tmp_path):
    for number in (1, 2, 3):
        save(tmp_path / "state", state(round=number))
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["round-000003.safetensors", "state.json"]


def test_saving_the_same_state_again_changes_no_byte(tmp_path):
    save(tmp_path / "state", state())
    before = {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()}
    save(tmp_path / "state", load(tmp_path / "state"))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()}


# ---------------------------------------------------------------------------------------------------------- damage


def refused(folder, words="damaged"):
    with pytest.raises(CheckpointError, match=words):
        load(folder)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '"text"',
        "{}",
        '{"schema": 1}',
        "\x00\x00",
        '{"schema": 1, "tensors": 5, "sha256": 6}',
    ],
)
def test_a_damaged_index_is_refused(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    refused(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "state.json").write_bytes(b"\xff\xfe{}")
    refused(tmp_path)


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_another_schema_is_refused_and_said(tmp_path, schema):
    save(tmp_path, state())
    held = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**held, "schema": schema}))
    refused(tmp_path, "another version")


@pytest.mark.parametrize("change", [{"extra": 1}, {"round": None}, {"lines": 9}, {"best_score": 0.5}])
def test_facts_that_were_changed_added_or_removed_are_refused(tmp_path, change):
    save(tmp_path, state())
    held = json.loads((tmp_path / "state.json").read_text())
    held = {name: value for name, value in {**held, **change}.items() if value is not None}
    (tmp_path / "state.json").write_text(json.dumps(held))
    refused(tmp_path)


def test_missing_truncated_and_altered_tensors_are_refused(tmp_path):
    save(tmp_path, state())
    path = tmp_path / "round-000003.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-1], content + b"\0", b"", content[:100] + b"\x01" + content[101:]):
        path.write_bytes(damaged)
        refused(tmp_path)
    path.unlink()
    refused(tmp_path, "cannot be read")


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_one_altered_byte_is_refused_or_changes_nothing(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "one-altered-byte"
    if not folder.exists():
        save(folder, state())
    path = folder / data.draw(st.sampled_from(["round-000003.safetensors", "state.json"]))
    whole = path.read_bytes()
    altered = bytearray(whole)
    altered[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(altered)
    try:
        same(state(), load(folder))
    except CheckpointError:
        pass
    finally:
        path.write_bytes(whole)


# --------------------------------------------------------------------------------------------------- rounds.jsonl


ENTRIES = [{"round": number, "labels": {"a\u2028b\x85c": 0.1}, "validation": None} for number in range(4)]


def logged(path, count=4):
    log = RoundLog(path)
    for entry in ENTRIES[:count]:
        log.append(entry)
    return log


def test_entries_come_back_in_order_whatever_their_labels_are_called(tmp_path):
    log = logged(tmp_path / "rounds.jsonl")
    assert log.lines == 4
    assert log.read() == ENTRIES
    assert len((tmp_path / "rounds.jsonl").read_bytes().split(b"\n")) == 5


@pytest.mark.parametrize("kept", range(5))
def test_lines_that_the_state_does_not_count_are_cut(tmp_path, kept):
    path = tmp_path / "rounds.jsonl"
    logged(path)
    log = RoundLog(path, kept)
    assert (log.lines, log.read()) == (kept, ENTRIES[:kept])
    log.append(ENTRIES[kept % 4])
    assert log.read() == [*ENTRIES[:kept], ENTRIES[kept % 4]]


@pytest.mark.parametrize("tail", [b'{"round": 2, "lab', b"\xff\xfe", b"\n\n", b'{"round": 9}'])
def test_half_a_line_is_cut(tmp_path, tail):
    path = tmp_path / "rounds.jsonl"
    logged(path, 2)
    with path.open("ab") as file:
        file.write(tail)
    assert RoundLog(path, 2).read() == ENTRIES[:2]


def test_a_new_run_starts_an_empty_log(tmp_path):
    assert logged(tmp_path / "rounds.jsonl").lines == 4
    assert RoundLog(tmp_path / "rounds.jsonl").read() == []


def test_fewer_lines_than_the_state_counts_is_an_error_that_leaves_the_file_alone(tmp_path):
    path = tmp_path / "rounds.jsonl"
    logged(path, 2)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="holds 2 rounds, the saved state counts 3"):
        RoundLog(path, 3)
    assert path.read_bytes() == before


def test_nan_is_not_written(tmp_path):
    log = RoundLog(tmp_path / "rounds.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.append({"auc": float("nan")})
    assert log.read() == []


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def test_a_kill_while_the_log_is_cut_loses_no_line_that_counts(tmp_path, monkeypatch):
    path = tmp_path / "rounds.jsonl"
    logged(path)

    def die(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", die)
        patched.setattr(Path, "write_text", die)
        with pytest.raises(Killed):
            RoundLog(path, 3)
    assert RoundLog(path, 3).read() == ENTRIES[:3]


# ------------------------------------------------------------------------------------------- killed and resumed


def begin(lab, folder, strategy="fedadam", **sections):
    # The server's rate is low, so that the best round is not the first.
    training = {"strategy": strategy, "rounds": 2, "server_lr": 0.01}
    return lab.start(folder, names=SITES, training=training, **sections)


def reach(lab, start, memory):
    """Run in what could be a new process: new sites, a new workshop; only the disk is remembered."""
    return lab.execute(start, lab.grid(start, lab.cohorts(*SITES), memory=memory))


def ending(outcome):
    weights = b"".join(value.tobytes() for value in outcome.weights.values())
    rounds = [{**entry, "seconds": 0} for entry in outcome.rounds]
    test = [value.tobytes() for site in outcome.test.sites.values() for value in site.arrays().values()]
    return weights, json.dumps(rounds), outcome.best_round, outcome.threshold, test, outcome.contributed


class Scythe:
    """Ends the process at the n-th time that a file is synchronised, renamed or removed, and lets nothing follow."""

    FUNCTIONS = ("fsync", "replace", "unlink")

    def __init__(self, monkeypatch, at=None):
        self.calls = 0
        self.at = at
        for name in self.FUNCTIONS:
            monkeypatch.setattr(os, name, self._around(getattr(os, name)))

    def _around(self, original):
        def call(*args, **kwargs):
            self.calls += 1
            if self.at is not None and self.calls >= self.at:
                raise Killed
            return original(*args, **kwargs)

        return call


@pytest.mark.slow
def test_a_kill_at_any_write_leaves_a_run_that_ends_with_the_same_bytes(lab, tmp_path, monkeypatch):
    reach(lab, begin(lab, None), lab.scratch())  # fills the cache of features, which is not what is killed here
    (tmp_path / "whole").mkdir()
    with monkeypatch.context() as patched:
        counted = Scythe(patched)
        whole = reach(lab, begin(lab, tmp_path / "whole"), tmp_path / "whole" / "state")
    assert counted.calls > 20
    assert not list((tmp_path / "whole" / "state").glob(".*"))
    for at in range(1, counted.calls + 1):
        folder = tmp_path / str(at)
        folder.mkdir()
        with monkeypatch.context() as patched, pytest.raises(Killed):
            Scythe(patched, at)
            reach(lab, begin(lab, folder), folder / "state")
        resumed = reach(lab, begin(lab, folder), folder / "state")
        assert ending(resumed) == ending(whole), f"killed at write {at} of {counted.calls}"
        assert sum(resumed.cast.transfers.values()) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedyogi", "fedadagrad", "trimmed-mean:0.2"])
def test_two_kills_in_one_run_change_nothing(lab, tmp_path, monkeypatch, strategy):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = reach(lab, begin(lab, tmp_path / "whole", strategy), None)
    for at in (21, 9):
        with monkeypatch.context() as patched, pytest.raises(Killed):
            Scythe(patched, at)
            reach(lab, begin(lab, tmp_path / "killed", strategy), tmp_path / "killed" / "state")
    found = reach(lab, begin(lab, tmp_path / "killed", strategy), tmp_path / "killed" / "state")
    assert ending(found) == ending(whole)


def test_a_finished_run_ends_the_same_when_asked_again(lab, tmp_path):
    first = reach(lab, begin(lab, tmp_path), tmp_path / "state")
    start = begin(lab, tmp_path)
    grid = lab.grid(start, lab.cohorts(*SITES), memory=tmp_path / "state", kind=lab.grids.Recording)
    second = lab.execute(start, grid)
    assert ending(first) == ending(second)
    assert second.cast.transfers == dict.fromkeys(SITES, 1)
    assert grid.of_kind("query.install_trunk") == grid.of_kind("train") == []


def test_sites_that_lost_their_memory_are_sent_the_trunk_again(lab, tmp_path):
    whole = reach(lab, begin(lab, tmp_path), tmp_path / "state")
    again = reach(lab, begin(lab, tmp_path), lab.scratch())
    assert ending(again) == ending(whole)
    assert again.cast.transfers == dict.fromkeys(SITES, 2)


KILLED_RUN = """
import runpy, sys
from pathlib import Path
conftest = runpy.run_path("tests/conftest.py")
folder, cache = Path(sys.argv[1]), Path(sys.argv[2])
lab = conftest["Lab"](cache, lambda: folder / "state", *conftest["_pool"]())
training = {"strategy": "fedadam", "rounds": 2, "server_lr": 0.01}
start = lab.start(folder, names=("north", "south"), training=training)
cohorts = lab.cohorts("north", "south")
lab.execute(start, lab.grid(start, cohorts, faults=["crash:coordinator@2"], memory=folder / "state"))
"""


@pytest.mark.slow
def test_a_run_killed_in_another_process_is_ended_here_with_the_same_bytes(lab, tmp_path):
    whole = reach(lab, begin(lab, None), lab.scratch())
    command = [sys.executable, "-c", KILLED_RUN, str(tmp_path), str(lab.cache)]
    process = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)}
    )
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    assert load(tmp_path / "state").round == 1
    found = reach(lab, begin(lab, tmp_path), tmp_path / "state")
    assert ending(found) == ending(whole)

"""The state of a run on disk: after a `kill -9` at any point, a resumed run ends with the same bytes.

state/round-000007.safetensors   weights, best weights, standardiser, strategy's memory, histogram edges
state/state.json                 names that file and its SHA-256; replaced last, by rename
rounds.jsonl                     one line a finished round; the state says how many of them count
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import checkpoint
from common.errors import CheckpointError
from common.files import write_atomic, write_json
from server.evaluation import Threshold

SCHEMA = 1
_GROUPS = ("weights", "best", "strategy", "fixed", "average")


@dataclass(frozen=True)
class RunState:
    """Everything the coordinator needs to go on after round `round`."""

    round: int  # aggregated; its weights are not yet evaluated
    weights: Mapping[str, NDArray[np.float32]]
    best: Mapping[str, NDArray[np.float32]]  # weights of the best round so far; empty before the first look
    best_round: int
    best_score: float | None
    best_examples: int  # validation examples behind that score; sites, where their number is noisy
    threshold: Threshold  # operating point of the best round, in score space
    strategy: Mapping[str, NDArray[Any]]
    fixed: Mapping[str, NDArray[Any]]  # mean, scale, class_weights: settled before round 1
    edges: NDArray[np.float64]  # of the next look
    average: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)  # of the last rounds, if it is wanted
    pending: Mapping[str, Any] = field(default_factory=dict)  # the entry of round `round`, without its validation
    lines: int = 0  # finished rounds in rounds.jsonl
    transfers: Mapping[str, int] = field(default_factory=dict)  # times the trunk was sent to each site
    seconds: float = 0.0  # spent in rounds so far


def save(folder: Path, state: RunState) -> None:
    """Write a state so that a crash leaves this one or the one before.

    Raises:
        OSError: the disk is full or not writable.
    """
    folder.mkdir(exist_ok=True)
    tensors = {f"{group}.{name}": value for group in _GROUPS for name, value in getattr(state, group).items()}
    path = folder / f"round-{state.round:06d}.safetensors"
    digest = checkpoint.write_tensors(path, {**tensors, "edges": state.edges})
    facts = {key: value for key, value in asdict_shallow(state).items() if key not in (*_GROUPS, "edges")}
    index = {"schema": SCHEMA, "tensors": path.name, "sha256": digest, **facts}
    write_json(folder / "state.json", {**index, "check": _check(index)})
    for old in folder.glob("round-*.safetensors"):
        if old != path:
            old.unlink()


def _check(index: Mapping[str, Any]) -> str:
    """Return the SHA-256 over the content of `state.json`."""
    return checkpoint.sha256(json.dumps(index, sort_keys=True).encode())


def asdict_shallow(state: RunState) -> dict[str, Any]:
    """Return the fields by name, without copying arrays."""
    return {name: getattr(state, name) for name in RunState.__dataclass_fields__}


def load(folder: Path) -> RunState | None:
    """Return the saved state, or None if no round was reached.

    Raises:
        CheckpointError: the state is damaged or of another version.
    """
    path = folder / "state.json"
    if not path.exists():
        return None
    facts = _index(path)
    tensors = checkpoint.read_tensors(folder / facts.pop("tensors"), facts.pop("sha256"))
    edges = np.asarray(tensors.pop("edges"), np.float64)
    groups: dict[str, dict[str, Any]] = {group: {} for group in _GROUPS}
    for key, value in tensors.items():
        group, _, rest = key.partition(".")
        groups[group][rest] = value
    known: dict[str, Any] = {**groups, **facts}
    return RunState(edges=edges, **known)


def _index(path: Path) -> dict[str, Any]:
    """Return the content of `state.json`, checked, without schema and check."""
    try:
        facts = dict(json.loads(path.read_text(encoding="utf-8")))
        schema, check = facts["schema"], facts.pop("check", None)
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: damaged; start the run anew in another folder") from None
    if schema != SCHEMA:
        raise CheckpointError(f"{path}: written by another version (schema {schema}, expected {SCHEMA})")
    if check != _check(facts):
        raise CheckpointError(f"{path}: damaged; start the run anew in another folder")
    del facts["schema"]
    return facts


class RoundLog:
    """`rounds.jsonl`: appended as rounds end, cut back to what the state counts on resume."""

    def __init__(self, path: Path, lines: int = 0) -> None:
        self._path = path
        kept = _lines(path)[:lines]
        self.lines = len(kept)
        if self.lines < lines:
            raise CheckpointError(f"{path}: holds {self.lines} rounds, the saved state counts {lines}; start anew")
        write_atomic(path, b"".join(kept))

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a finished round and make sure that it is on disk."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines += 1

    def read(self) -> list[dict[str, Any]]:
        """Return the finished rounds."""
        return read_rounds(self._path)


def read_rounds(path: Path) -> list[dict[str, Any]]:
    """Return the finished rounds that a `rounds.jsonl` holds; none if there is no such file."""
    return [json.loads(line) for line in _lines(path)]


def _lines(path: Path) -> list[bytes]:
    """Return the finished lines: a line feed alone ends one, for labels may hold what Unicode takes for line ends."""
    content = path.read_bytes() if path.exists() else b""
    return [line + b"\n" for line in content.split(b"\n")[:-1]]

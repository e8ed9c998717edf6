"""Atomic files: whatever goes wrong, the old content is there and nothing lies beside it."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from common.files import write_atomic, write_json


def fail(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_content_and_mode_are_those_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    write_atomic(path, b"old")
    write_atomic(path, b"\x00new", mode=0o600)
    assert path.read_bytes() == b"\x00new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "fchmod", "replace"])
def test_a_failure_at_any_step_leaves_the_old_content_and_no_remains(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.bin"
    write_atomic(path, b"old")
    monkeypatch.setattr(*((Path, "replace") if call == "replace" else (os, call)), fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new, and longer than the old")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_writer_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.bin"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("state.bin", b"old")]


def test_the_content_is_flushed_to_disk_before_it_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.bin"
    seen: list[tuple[int, bool]] = []
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append((os.fstat(handle).st_size, path.exists())))
    write_atomic(path, b"four")
    assert seen == [(4, False)]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "none" / "state.bin", b"")


def test_json_round_trips_with_its_order_and_letters(tmp_path: Path) -> None:
    value = {"b": [1, 0.1, None, True], "a": {"Größe": "ß"}}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert text.endswith("}\n")
    assert "Größe" in text
    assert text.index('"b"') < text.index('"a"')


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_what_is_no_number_and_keeps_the_old_file(number: float, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"auc": None})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"auc": [number]})
    assert json.loads(path.read_text()) == {"auc": None}
    assert list(tmp_path.iterdir()) == [path]

"""Chains of lines: what is found from the end of a file is what all of it would have said."""

from __future__ import annotations

import errno
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client import chain

WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def anything(event: str, facts: chain.Facts) -> None:
    """Check nothing."""


def built(sizes: list[int]) -> bytes:
    """Return a chain whose entries carry texts of these lengths."""
    content, end = b"", chain.End()
    for size in sizes:
        more, entries = chain.continuation(end, "word", {"text": "x" * size}, WHEN)
        content, end = content + more, chain.End(entries[-1].sha256)
    return content


def ends(path: Path, content: bytes) -> tuple[chain.End, chain.Chain]:
    path.write_bytes(content)
    with chain.opened(path, os.O_RDONLY) as handle:
        return chain.find_end(handle, anything), chain.parse(chain.read(handle), anything)


def test_a_chain_parses_as_it_was_built() -> None:
    found = chain.parse(built([3, 0, 5]), anything)
    assert [entry.facts["text"] for entry in found.entries] == ["xxx", "", "xxxxx"]
    assert [entry.previous for entry in found.entries] == [chain.START, *(one.sha256 for one in found.entries[:-1])]
    assert found.wrong is None and found.end == chain.End(found.entries[-1].sha256)


@given(
    sizes=st.lists(st.sampled_from([0, 10, 3000, 70_000]), max_size=6),
    cut=st.integers(0, 400_000),
    garbage=st.sampled_from([b"", b"\0" * 100, b"half of a line", b"two\nlines", b"{" * 100_000]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
def test_the_end_is_found_without_the_beginning(sizes: list[int], cut: int, garbage: bytes, tmp_path: Path) -> None:
    content = built(sizes)
    content = content[: len(content) - min(cut % (len(content) + 1), 5000)] + garbage
    found, whole = ends(tmp_path / "chain", content)
    if whole.wrong is None:
        assert found == whole.end
        more, _ = chain.continuation(found, "word", {"text": "last"}, WHEN)
        after = chain.parse(content + more, anything)
        assert after.wrong is None and after.entries[-1].facts == {"text": "last"}


def test_of_a_long_file_only_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = os.pread

    def counted(handle: int, count: int, start: int) -> bytes:
        read.append(len(content := real(handle, count, start)))
        return content

    path = tmp_path / "chain"
    path.write_bytes(built([1000] * 1000))
    monkeypatch.setattr(os, "pread", counted)
    with chain.opened(path, os.O_RDONLY) as handle:
        assert chain.find_end(handle, anything).head != chain.START
    assert sum(read) <= 64 * 1024


def test_an_entry_that_begins_inside_of_a_line_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = built([10])[:-1]
    monkeypatch.setattr(chain, "_BLOCK", len(entry))
    found, whole = ends(tmp_path / "chain", b"y" * 1000 + entry)
    assert found == whole.end == chain.End(chain.START, b"y" * 1000 + entry, True)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "chain").write_bytes(built([1]))
    (tmp_path / "link").symlink_to(tmp_path / "chain")
    with pytest.raises(OSError, match="symbolic"), chain.opened(tmp_path / "link", os.O_RDONLY):
        pass


@pytest.mark.parametrize("time", ["2026-01-02T03:04:05", "2026-13-02T03:04:05Z", "2026-01-02T03:04:05+00:00", "", "x"])
def test_a_time_of_another_form_is_no_entry(time: str) -> None:
    entry: Any = chain._linked(time, "word", {}, chain.START)
    assert chain.parse(chain._canonical(vars(entry)) + b"\n", anything).wrong == 1


def test_what_does_not_fit_on_the_disk_leaves_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"whole\n")
    true, calls = os.write, []

    def full(handle: int, content: bytes) -> int:
        calls.append(content)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return true(handle, content[:3])

    with chain.opened(path, os.O_RDWR | os.O_APPEND) as handle, monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            chain.write(handle, b"a line\n")
    assert len(calls) == 2 and path.read_bytes() == b"whole\n"

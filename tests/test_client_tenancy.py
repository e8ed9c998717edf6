"""A site is in one run at a time, also after a restart, and never for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.tenancy import Tenancy

A, B = "a" * 64, "b" * 64


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_site_belongs_to_whoever_has_it(tmp_path: Path, clock: Clock) -> None:
    tenancy = Tenancy(tmp_path / "run.json", clock)
    assert tenancy.is_free(A)
    tenancy.begin(A, "chest", 60)
    for one in (tenancy, Tenancy(tmp_path / "run.json", clock)):
        assert one.is_free(A)
        assert not one.is_free(B)
        assert not one.is_free(B, "c" * 64)
        assert one.is_free(B, f"{'c' * 64} {A}")
    assert not tenancy.end(B)
    assert tenancy.end(A)
    assert not tenancy.end(A)
    assert Tenancy(tmp_path / "run.json", clock).tenure is None
    assert not list(tmp_path.iterdir())


def test_silence_sets_a_site_free(tmp_path: Path, clock: Clock) -> None:
    tenancy = Tenancy(tmp_path / "run.json", clock)
    tenancy.begin(A, "chest", 60)
    clock.now += 59
    tenancy.hear(A)
    clock.now += 60
    assert not tenancy.is_free(B)
    clock.now += 1
    assert tenancy.is_free(B)
    tenancy.hear(A, 3)  # it was only slow
    assert not tenancy.is_free(B)
    tenancy.hear(B, 7)
    assert tenancy.tenure is not None
    assert tenancy.tenure.round == 3


def test_a_restart_keeps_when_a_run_was_heard_and_its_round(tmp_path: Path, clock: Clock) -> None:
    tenancy = Tenancy(tmp_path / "run.json", clock)
    tenancy.begin(A, "chest", 600)
    clock.now += 120
    tenancy.hear(A, 4)
    clock.now += 100
    tenancy.hear(A)  # long since the last write
    again = Tenancy(tmp_path / "run.json", clock)
    assert again.tenure == tenancy.tenure
    again.begin(A, "chest", 600)  # described again
    assert again.tenure is not None
    assert again.tenure.round == 4
    again.begin(B, "chest", 600)
    assert again.tenure.round == 0


def test_a_clock_that_is_set_back_holds_no_site_for_ever(tmp_path: Path, clock: Clock) -> None:
    Tenancy(tmp_path / "run.json", clock).begin(A, "chest", 60)
    clock.now -= 900
    again = Tenancy(tmp_path / "run.json", clock)
    clock.now += 61
    assert again.is_free(B)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"fingerprint": "x"}', b"\xff", b"[" * 9999])
def test_a_damaged_file_is_said_and_no_hindrance(
    content: bytes, tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run.json").write_bytes(content)
    tenancy = Tenancy(tmp_path / "run.json", clock)
    assert tenancy.tenure is None
    assert "run.json" in caplog.text
    tenancy.begin(A, "chest", 60)
    assert Tenancy(tmp_path / "run.json", clock).tenure == tenancy.tenure

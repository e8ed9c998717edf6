from __future__ import annotations

import errno
from pathlib import Path

import pytest

from client import hospital
from common.errors import ConsiliumError, SiteRefusal


def wrapped(number: int, kind: Exception) -> Exception:
    """Return an error that hides its cause, as errors for people do."""
    try:
        try:
            raise OSError(number, "text")
        except OSError:
            raise kind from None
    except type(kind) as error:
        return error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("kind", [ConsiliumError("the trail cannot be written"), SiteRefusal("no_cohort")])
def test_a_full_disk_is_seen_under_whatever_hides_it(number: int, kind: Exception, tmp_path: Path) -> None:
    assert hospital._no_room(wrapped(number, kind), tmp_path)
    assert not hospital._no_room(wrapped(errno.EACCES, kind), tmp_path)


def test_where_no_cause_is_told_the_disk_is_asked_but_a_refusal_stays_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hospital, "LEAST_ROOM", 2**70)
    assert hospital._no_room(RuntimeError("of a library"), tmp_path)
    assert not hospital._no_room(SiteRefusal("policy"), tmp_path)
    assert not hospital._no_room(RuntimeError("of a library"), tmp_path / "gone")

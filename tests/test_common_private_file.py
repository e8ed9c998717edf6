"""Files for one user: made closed, and refused once they are open."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.private_file import read_private, write_private


def read(path: Path) -> bytes:
    return read_private(path, "the token", "make one")


def test_what_is_written_is_read_and_closed_to_others(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        write_private(tmp_path / "token", b"abc")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    assert read(tmp_path / "token") == b"abc"


def test_a_file_or_a_link_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("there", "link"):
        with pytest.raises(FileExistsError):
            write_private(tmp_path / name, b"abc")
    assert (tmp_path / "there").read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_private(tmp_path / "token", b"abc")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610, 0o777])
def test_open_to_others_is_refused(mode: int, tmp_path: Path) -> None:
    write_private(tmp_path / "token", b"abc")
    (tmp_path / "token").chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o} opens the token to others; run: chmod 600"):
        read(tmp_path / "token")


def test_what_is_no_file_of_that_kind(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir(0o700)
    os.mkfifo(tmp_path / "pipe", 0o600)
    write_private(tmp_path / "token", b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "token")
    write_private(tmp_path / "long", b"a" * 65537)
    for name, message in {
        "missing": "missing, expected the token; make one",
        "folder": "not a regular file",
        "pipe": "not a regular file",
        "link": "symbolic link",
        "long": "65537 bytes, too long",
    }.items():
        with pytest.raises(ConfigError, match=message) as raised:
            read(tmp_path / name)
        assert "\n" not in str(raised.value)

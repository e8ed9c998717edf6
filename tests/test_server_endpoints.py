from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import ConfigError
from server.endpoints import Endpoints, read_secret

HERE = Endpoints(*[Path("x")] * 5)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    wanted = replace(HERE, listen="127.0.0.1:1", operator_port=2, tls=False)
    wanted.write(tmp_path / "endpoints.json")
    assert Endpoints.read(tmp_path / "endpoints.json") == wanted
    assert (tmp_path / "endpoints.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"database": 1}', '{"database": "x", "other": "y"}'])
def test_another_file_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "endpoints.json").write_text(text)
    with pytest.raises(ConfigError, match="holds no endpoints"):
        Endpoints.read(tmp_path / "endpoints.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        Endpoints.read(tmp_path / "missing.json")


@pytest.mark.parametrize("listen", ["", "host", ":1", "host:", "host:0", "host:65536", "host:-1", "host:x"])
def test_an_address_without_host_or_port_is_refused(listen: str) -> None:
    with pytest.raises(ConfigError, match="listen: got"):
        replace(HERE, listen=listen).public()


def test_plain_http_stays_on_this_machine() -> None:
    assert replace(HERE, listen="127.0.0.1:1", tls=False).public() == ("127.0.0.1", 1)
    assert replace(HERE, listen="0.0.0.0:1").public() == ("0.0.0.0", 1)
    with pytest.raises(ConfigError, match="without TLS"):
        replace(HERE, listen="0.0.0.0:1", tls=False).public()


def test_a_secret_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    with pytest.raises(ConfigError, match="missing"):
        read_secret(path)
    secret = os.urandom(32)
    path.write_bytes(secret)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_secret(path)
    path.chmod(0o600)
    assert read_secret(path) == secret
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ConfigError, match="symbolic link"):
        read_secret(tmp_path / "link")
    with pytest.raises(ConfigError, match="not a regular file"):
        read_secret(Path(os.devnull))
    path.write_bytes(secret[:-1])
    with pytest.raises(ConfigError, match="31 bytes"):
        read_secret(path)

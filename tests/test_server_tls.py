"""The server's certificate over the years."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from common.certificates import CA_DAYS, SERVER_DAYS, read_certificates
from common.errors import ConfigError
from server import tls
from server.founding import found
from server.server_config import ServerConfig, read_server

NOW = datetime.now(UTC)


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    return read_server(found(tmp_path / "chest", "fl.example.org:9443").config)


def test_a_new_certificate_has_nothing_to_warn_of(config: ServerConfig) -> None:
    found = tls.status(config)
    assert (found.warning, found.days_left) == ("", SERVER_DAYS - 1)
    assert found.expires == read_certificates(config.certificate)[0].not_valid_after_utc


@pytest.mark.parametrize(
    ("days", "warning"),
    [
        (SERVER_DAYS - 31, ""),
        (SERVER_DAYS - 29, " days; run `consilium server renew`"),
        (SERVER_DAYS + 1, "expired on"),
    ],
)
def test_the_end_is_told_in_time(days: int, warning: str, config: ServerConfig) -> None:
    told = tls.status(config, NOW + timedelta(days=days)).warning
    assert warning in told
    assert bool(told) == bool(warning)


def test_the_end_of_the_authority_is_told_too(config: ServerConfig) -> None:
    late = NOW + timedelta(days=CA_DAYS - 10)
    tls.renew(config, late)
    assert " days; every site has to be invited again" in tls.status(config, late).warning


def test_renewal_keeps_key_and_authority(config: ServerConfig) -> None:
    kept = {path: path.read_bytes() for path in (config.key, config.ca_key, config.ca_certificate)}
    later = NOW + timedelta(days=SERVER_DAYS + 40)
    before = read_certificates(config.certificate)[0]
    assert tls.renew(config, later).days_left(later) >= SERVER_DAYS - 1
    assert {path: path.read_bytes() for path in kept} == kept
    assert read_certificates(config.certificate)[0].public_key() == before.public_key()
    assert tls.status(config, later).warning == ""


def test_another_address_needs_a_renewal(config: ServerConfig) -> None:
    config.path.write_text(config.path.read_text().replace("fl.example.org", "fl.example.com"))
    moved = read_server(config.path)
    assert "does not stand for fl.example.com" in tls.status(moved).warning
    tls.renew(moved)
    assert tls.status(moved).warning == ""


def test_certificates_of_the_operators_own_are_not_renewed_here(config: ServerConfig, tmp_path: Path) -> None:
    other = read_server(found(tmp_path / "own", "fl.example.org:9443").config)
    lines = f'[certificates]\ncertificate = "{other.certificate}"\nkey = "{other.key}"\nca = "{other.ca_certificate}"\n'
    config.path.write_text(config.path.read_text() + lines)
    own = read_server(config.path)
    assert tls.status(own).warning == ""
    before = other.certificate.read_bytes()
    with pytest.raises(ConfigError, match="your own authority; renew"):
        tls.renew(own)
    assert other.certificate.read_bytes() == before
    told = tls.status(own, NOW + timedelta(days=SERVER_DAYS - 5)).warning
    assert f"renew {other.certificate}" in told
    assert "consilium" not in told.rpartition("; ")[2].replace(str(other.certificate), "")


def test_a_missing_state_is_one_line(config: ServerConfig) -> None:
    config.ca_key.unlink()
    with pytest.raises(ConfigError, match="ca.key: missing, expected a private key"):
        tls.renew(config)
    config.certificate.write_text("junk")
    with pytest.raises(ConfigError, match="not a certificate"):
        tls.status(config)

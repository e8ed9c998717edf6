from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import ConsiliumError
from common.files import write_atomic
from server import roll
from server.control import Control
from server.server_config import ServerConfig, read_server

TOML = """
[server]
name = "chest"
state = "{state}"
[network]
address = "{listen}"
listen = "{listen}"
operator_port = {port}
"""


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[[Any], ServerConfig]:
    """Return a maker of the configuration whose state is the folder of a SuperLink."""

    def make(superlink: Any) -> ServerConfig:
        ends = superlink.endpoints
        text = TOML.format(state=superlink.folder, listen=ends.listen, port=ends.operator_port)
        (tmp_path / "server.toml").write_text(text)
        return read_server(tmp_path / "server.toml")

    return make


def key() -> str:
    form = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(*form).decode()


def enrol(config: ServerConfig, **keys: str) -> None:
    sites = [{"name": name, "public_key": key, "enrolled_at": "2026-01-02T03:04:05Z"} for name, key in keys.items()]
    write_atomic(config.sites, json.dumps({"version": 1, "sites": sites}).encode(), mode=0o600)


def registered(config: ServerConfig) -> dict[str, str]:
    with Control(config.endpoints) as control:
        return {node.name: node.public_key for node in control.nodes()}


def test_nobody_is_told_where_no_superlink_is(superlinks: Callable[..., Any], config_of: Any) -> None:
    config = config_of(superlinks())
    enrol(config, north=key())
    assert roll.call(config) is False
    assert roll.call(config, patience_s=0.3) is False


@pytest.mark.slow
def test_who_is_enrolled_is_let_in_and_nobody_else(superlink: Any, config_of: Any) -> None:
    config = config_of(superlink)
    keys = {name: key() for name in ("north", "south", "west")}
    enrol(config, **keys)
    for _ in range(2):  # once more changes nothing
        assert roll.call(config) is True
        assert registered(config) == keys
    new = {"north": keys["north"], "south": key(), "east": key()}
    enrol(config, **new)
    assert roll.call(config)
    assert registered(config) == new
    enrol(config)
    assert roll.call(config)
    assert registered(config) == {}


@pytest.mark.slow
def test_one_that_cannot_be_let_in_keeps_no_other_out(
    superlink: Any, config_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(superlink)
    spent, good = key(), key()
    enrol(config, north=spent)
    assert roll.call(config)
    enrol(config)
    assert roll.call(config)
    enrol(config, north=spent, south=good)
    with pytest.raises(ConsiliumError, match=r"^north: its key was withdrawn before and is not taken again; [^\n]*$"):
        roll.call(config)
    assert registered(config) == {"south": good}
    with caplog.at_level(logging.ERROR):
        roll.at_start(config)
    assert "not every site is let in: north: its key was withdrawn" in caplog.text
    write_atomic(config.sites, b"{", mode=0o600)
    roll.at_start(config)
    assert "sites.json: not JSON" in caplog.text
    assert registered(config) == {"south": good}  # a list that cannot be read lets nobody out either

"""A new coordinator: its folder, whole or not at all."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from common import certificates
from common.address import Address, parse_address
from common.errors import ConfigError, UsageError
from common.files import write_atomic
from common.private_file import SECRET_BYTES, write_private
from common.strict import parse_toml
from server import tls
from server.server_config import NAME, ServerConfig, parse_server

TEMPLATE = """\
# What this coordinator says of itself to consilium. Hospitals learn its address, and nothing else of it.
# Paths are relative to the folder of this file. A line that begins with '#' shows a key with its default.

[server]
{name}
# state = "state"                   # folder of keys, certificates, enrolled sites and the superlink's database
# runs = "runs"                     # folder of a folder a run

[network]
{address}
# host:port of the public listener; only what hospitals need is answered there.
{listen}
# Port of the operator's listener, on this machine only.
{operator_port}
# tls = "direct"                    # direct; proxy: one on this machine ends TLS, and listen is a loopback address

# [certificates]                    # of an authority of your own; by default those that are in the state
# certificate = ""                  # PEM file of the server's, those between it and the authority after it
# key = ""                          # PEM file, mode 0600
# ca = ""                           # PEM file of the authority, which hospitals get with their invitation

# [logs]
# format = "text"                   # what superlink, keeper and engines print; json: one object a line

# [monitor]                         # metrics and health for Prometheus, on 127.0.0.1 alone
# port = 0                          # such as 9465; 0: off
"""
"""Every key of `server.server_config`, explained."""

_OPERATOR_PORT = 9444


@dataclass(frozen=True)
class Founded:
    """Where a new coordinator is."""

    name: str
    config: Path
    state: Path


def found(
    folder: Path, address: str, name: str | None = None, listen: str | None = None, operator_port: int | None = None
) -> Founded:
    """Make the folder of a new coordinator: `server.toml`, `runs/`, and `state/` with keys, certificates and secrets.

    Args:
        folder: made if absent; may hold other things.
        address: what hospitals dial, host:port.
        name: of the coordinator; None: the folder's, if it can be one, else `coordinator`.
        listen: host:port of the public listener; None: all addresses of this machine, at the port of `address`.
        operator_port: of the operator's listener; None: 9444, or the one after it where that is taken.

    Raises:
        ConfigError: a name, an address or a port that cannot be.
        UsageError: a coordinator is there already, or the folder cannot be written.
    """
    folder = folder.absolute()
    made = False
    try:
        _check_free(folder)
        text = server_toml(folder, address, name, listen, operator_port)
        config = ServerConfig(folder / NAME, parse_server(parse_toml(text, NAME), NAME))
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        _place(folder, text, config.name, config.address)
    except OSError as error:
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise UsageError(f"{folder}: no coordinator can be made there ({error.strerror})") from None
    return Founded(config.name, folder / NAME, folder / "state")


def server_toml(
    folder: Path, address: str, name: str | None, listen: str | None, operator_port: int | None = None
) -> str:
    """Return the text of a new `server.toml`.

    Raises:
        ConfigError: a name, an address or a port that cannot be.
    """
    dialled = _address(address, "--address")
    heard = _address(listen, "--listen") if listen is not None else Address("0.0.0.0", dialled.port)  # noqa: S104
    operator = _OPERATOR_PORT + (heard.port == _OPERATOR_PORT) if operator_port is None else operator_port
    text = TEMPLATE.format(
        name=_assignment("name", _default_name(folder) if name is None else name),
        address=_assignment("address", str(dialled)),
        listen=_assignment("listen", str(heard)),
        operator_port=_assignment("operator_port", operator),
    )
    parse_server(parse_toml(text, NAME), NAME)
    return text


def _check_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: not a folder")
    there = [found for found in (NAME, "state", "runs") if os.path.lexists(folder / found)]
    if there:
        raise UsageError(f"{folder}: already holds {', '.join(there)}, which stay as they are; name another folder")


def _place(folder: Path, text: str, name: str, address: Address) -> None:
    """Make everything out of sight, then move it into place: the state first, which only one process can."""
    scratch = Path(tempfile.mkdtemp(prefix=".init-", dir=folder))
    try:
        state, runs = scratch / "state", scratch / "runs"
        for new in (state, runs):
            new.mkdir(mode=0o700)
        _fill(state, name, address)
        (scratch / NAME).write_text(text, encoding="utf-8")
        state.rename(folder / "state")
        runs.rename(folder / "runs")
        (scratch / NAME).rename(folder / NAME)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fill(state: Path, name: str, address: Address) -> None:
    ca, ca_key, key = state / "ca.pem", state / "ca.key", state / "server.key"
    certificates.make_key(ca_key)
    write_atomic(ca, certificates.make_ca(ca_key, name))
    certificates.make_key(key)
    write_atomic(state / "server.pem", certificates.make_server(ca, ca_key, key, tls.hosts(address)))
    for secret in ("superexec.secret", "operator.secret"):
        write_private(state / secret, secrets.token_bytes(SECRET_BYTES))


def _address(text: str, option: str) -> Address:
    try:
        return parse_address(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None


def _assignment(key: str, value: str | int) -> str:
    return tomli_w.dumps({key: value}).rstrip("\n")


def _default_name(folder: Path) -> str:
    kept = re.sub(r"[^A-Za-z0-9._-]", "", folder.resolve().name)
    return kept.lstrip("._-")[:63] or "coordinator"

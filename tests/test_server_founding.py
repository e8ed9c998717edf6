"""A coordinator is made whole or not at all."""

from __future__ import annotations

import re
import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest

from common import certificates
from common.errors import UsageError
from common.sections import LogsSection, MonitorSection
from server.founding import TEMPLATE, found, server_toml
from server.server_config import CertificatesSection, NetworkSection, ServerSection, ServerToml, read_server

ADDRESS = "coordinator.example.org:9443"
SECTIONS = {
    "server": ServerSection,
    "network": NetworkSection,
    "certificates": CertificatesSection,
    "logs": LogsSection,
    "monitor": MonitorSection,
}


def explained() -> dict[str, dict[str, str]]:
    sections: dict[str, dict[str, str]] = {}
    section: dict[str, str] = {}
    keys = {"name": 'name = "x"', "address": 'address = "a:1"', "listen": 'listen = "0.0.0.0:9443"'}
    for line in TEMPLATE.format(**keys, operator_port="operator_port = 9444").splitlines():
        if header := re.match(r"(?:# )?\[([a-z]+)\]", line):
            section = sections.setdefault(header[1], {})
        elif key := re.match(r"(?:# )?([a-z_]+) = (.*)", line):
            section[key[1]] = key[2]
    return sections


def test_the_new_file_explains_every_key_with_its_default() -> None:
    shown = explained()
    assert {name: set(keys) for name, keys in shown.items()} == {
        name: set(model.model_fields) for name, model in SECTIONS.items()
    }
    for name, model in SECTIONS.items():
        for key, text in shown[name].items():
            if not model.model_fields[key].is_required():
                assert tomllib.loads(f"{key} = {text}")[key] == model.model_fields[key].default, key


def test_every_line_of_the_new_file_is_valid_when_its_comment_is_taken_off(tmp_path: Path) -> None:
    text = server_toml(tmp_path, ADDRESS, "chest", None)
    lines = [re.sub(r"^# (?=[a-z_]+ = |\[)", "", line) for line in text.splitlines()]
    ServerToml.model_validate(tomllib.loads("\n".join(lines)))


def test_a_new_coordinator_is_whole(tmp_path: Path) -> None:
    made = found(tmp_path / "chest", ADDRESS)
    config = read_server(made.config)
    assert made.name == config.name == "chest"
    assert sorted(path.name for path in (tmp_path / "chest").iterdir()) == ["runs", "server.toml", "state"]
    for folder in (config.state, config.runs):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in (config.ca_key, config.key, config.superexec_secret, config.operator_secret):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for path in (config.superexec_secret, config.operator_secret):
        assert len(path.read_bytes()) == 32
    assert config.superexec_secret.read_bytes() != config.operator_secret.read_bytes()
    for host in ("coordinator.example.org", "localhost", "127.0.0.1"):
        assert certificates.check(config.ca_certificate, config.certificate, config.key, host) == ()


@pytest.mark.parametrize(
    ("address", "listen", "expected"),
    [
        ("10.0.0.7:443", None, ("0.0.0.0:443", 9444)),
        ("[2001:db8::1]:9444", None, ("0.0.0.0:9444", 9445)),
        ("fl.example.org:443", "127.0.0.1:9080", ("127.0.0.1:9080", 9444)),
    ],
)
def test_it_listens_where_hospitals_dial(address: str, listen: str | None, expected: Any, tmp_path: Path) -> None:
    config = read_server(found(tmp_path / "c", address, listen=listen).config)
    assert (str(config.listen), config.operator_port) == expected
    assert str(config.address) == address
    assert certificates.check(config.ca_certificate, config.certificate, config.key, config.address.host) == ()


@pytest.mark.parametrize("there", ["server.toml", "state", "runs"])
def test_nothing_is_overwritten(there: str, tmp_path: Path) -> None:
    (tmp_path / there).symlink_to("nowhere")
    with pytest.raises(UsageError, match=f"already holds {there}"):
        found(tmp_path, ADDRESS)
    assert [path.name for path in tmp_path.iterdir()] == [there]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"address": "host"}, "--address: got 'host', expected host:port"),
        ({"address": ADDRESS, "listen": "9443"}, "--listen: got '9443'"),
        ({"address": ADDRESS, "name": "a b"}, "1 to 63 letters"),
        ({"address": ADDRESS, "name": '"\nstate = "/etc"'}, "1 to 63 letters"),
    ],
)
def test_a_wrong_wish_leaves_nothing(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        found(tmp_path / "new" / "chest", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failing", ["write_private", "write_atomic"])
def test_a_full_disk_leaves_nothing(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"server.founding.{failing}", full)
    with pytest.raises(UsageError, match="No space left"):
        found(tmp_path / "chest", ADDRESS)
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "chest").write_text("")
    with pytest.raises(UsageError, match="not a folder"):
        found(tmp_path / "chest", ADDRESS)
    with pytest.raises(UsageError, match="no coordinator can be made there|not a folder"):
        found(tmp_path / "chest" / "below", ADDRESS)
    assert [path.name for path in tmp_path.iterdir()] == ["chest"]

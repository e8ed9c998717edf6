"""`server.toml` is taken at its word."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import ConfigError
from server.server_config import read_server

GOOD = '[server]\nname = "chest"\n[network]\naddress = "fl.example.org:9443"\n'
DEPLOY = Path(__file__).parent.parent / "deploy"


def written(folder: Path, text: str) -> Path:
    path = folder / "server.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_file_has_its_place(tmp_path: Path) -> None:
    config = read_server(written(tmp_path, GOOD))
    state = tmp_path / "state"
    assert (config.name, config.state, config.runs) == ("chest", state, tmp_path / "runs")
    assert [
        config.ca_key, config.ca_certificate, config.key, config.certificate, config.superexec_secret,
        config.operator_secret, config.database, config.sites, config.invitations,
    ] == [
        state / name
        for name in (
            "ca.key", "ca.pem", "server.key", "server.pem", "superexec.secret",
            "operator.secret", "superlink.db", "sites.json", "invitations.json",
        )
    ]  # fmt: skip
    assert (str(config.address), str(config.listen), config.operator_port) == (
        "fl.example.org:9443",
        "0.0.0.0:9443",
        9444,
    )
    assert config.own_authority
    assert not config.behind_proxy


def test_an_authority_of_the_operators_own(tmp_path: Path) -> None:
    text = GOOD + '[certificates]\ncertificate = "/tls/s.pem"\nkey = "s.key"\nca = "ca.pem"'
    config = read_server(written(tmp_path, text))
    assert not config.own_authority
    assert config.certificate == Path("/tls/s.pem")
    assert (config.key, config.ca_certificate) == (tmp_path / "s.key", tmp_path / "ca.pem")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "server: missing"),
        (GOOD + 'listne = "a:1"', r"\[network\] listne: unknown key \(did you mean 'listen'\?\)"),
        (GOOD.replace("chest", "a b"), r"\[server\] name: expected 1 to 63"),
        (GOOD.replace("9443", "0"), r"\[network\] address: got 'fl.example.org:0', expected host:port"),
        (GOOD.replace(":9443", ""), r"\[network\] address: got 'fl.example.org'"),
        (GOOD + 'listen = "::1:9443"', r"\[network\] listen: got '::1:9443', .* in brackets"),
        (GOOD + "operator_port = 65536", r"\[network\] operator_port: got 65536"),
        (GOOD + "operator_port = 0", r"\[network\] operator_port"),
        (GOOD + "operator_port = true", r"\[network\] operator_port"),
        (GOOD + "operator_port = 9443", "both are 9443, expected two different ports"),
        (GOOD + 'tls = "none"', r"\[network\] tls: got 'none'"),
        (GOOD + 'tls = "proxy"', "expected a loopback address"),
        (GOOD + '[certificates]\nca = "ca.pem"', "certificates: expected certificate, key and ca, or none"),
        (GOOD.replace('"chest"', '"chest"\nstate = "~nobody-of-that-name"'), r"\[server\] state: .*leads nowhere"),
        (GOOD.replace('"chest"', '"chest"\nstate = "a\\u0000b"'), r"\[server\] state: .*leads nowhere"),
    ],
)
def test_what_is_wrong_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read_server(written(tmp_path, text))
    assert str(raised.value).isprintable()


def test_behind_a_proxy_the_listener_is_on_loopback(tmp_path: Path) -> None:
    for listen in ("127.0.0.1:9080", "[::1]:9080", "localhost:9080"):
        assert read_server(written(tmp_path, f'{GOOD}listen = "{listen}"\ntls = "proxy"')).behind_proxy


def test_the_example_is_valid() -> None:
    config = read_server(DEPLOY / "server.toml")
    assert config.behind_proxy
    assert config.state == Path("/var/lib/consilium-coordinator/state")

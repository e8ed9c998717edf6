"""`consilium server`, and the hospital's half of an enrolment: exit codes, and what is printed where."""

from __future__ import annotations

import importlib.metadata
import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from client.cli import site
from common import cli
from server.cli import server
from server.server_config import read_server

Run = Callable[..., tuple[int, str, str]]
GROUPS = {"server": server, "site": site}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run `consilium ...` as the installed command would, and return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    class Entry:
        def __init__(self, name: str) -> None:
            self.name = name

        def load(self) -> Any:
            return GROUPS[self.name]

    def entry_points(group: str, name: str | None = None) -> list[Entry]:
        return [Entry(known) for known in GROUPS if group == cli.GROUP and name in (None, known)]

    def invoke(*arguments: object) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            patch.setattr(importlib.metadata, "entry_points", entry_points)
            patch.setattr(sys, "argv", ["consilium", *map(str, arguments)])
            with pytest.raises(SystemExit) as ended:
                cli.main()
        printed = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, printed.out, printed.err

    return invoke


@pytest.fixture
def toml(run: Run, tmp_path: Path) -> Path:
    assert run("server", "init", "chest", "--address", "fl.example.org:9443")[0] == 0
    return tmp_path / "chest" / "server.toml"


def done(result: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = result
    assert (code, err) == (0, "")
    value = json.loads(out)
    assert isinstance(value, dict)
    return value


def test_a_federation_of_two_from_nothing(run: Run, tmp_path: Path, toml: Path) -> None:
    code, out, err = run("server", "invite", "st-anna", "--server", toml)
    assert (code, err) == (0, "")
    authority = out.partition("Authority: ")[2].splitlines()[0]
    assert "st-anna.invitation.json: for st-anna, good once, until 20" in out
    assert stat.S_IMODE((tmp_path / "st-anna.invitation.json").stat().st_mode) == 0o600

    code, out, err = run("site", "init", "anna", "--invitation", "st-anna.invitation.json")
    assert (code, err) == (0, "")
    assert authority in out
    code, out, err = run("server", "enrol", "st-anna.enrolment.json", "--server", toml)
    assert (code, err) == (0, "")
    key = out.split()[2]
    assert key.startswith("SHA256:")

    invited = done(run("server", "invite", "st-bert", "--server", toml, "--json", "--output", "b.json"))
    assert set(invited) == {"invitation", "name", "expires", "authority"}
    assert invited["authority"] == authority
    assert done(run("site", "init", "bert", "--name", "st-bert", "--json"))["site"] == "st-bert"
    joined = done(run("site", "join", "b.json", "--site", "bert/site.toml", "--json", "--output", "answer.json"))
    assert set(joined) == {"enrolment", "name", "key", "authority"}
    enrolled = done(run("server", "enrol", "answer.json", "--server", toml, "--json"))
    assert (enrolled["name"], enrolled["fingerprint"]) == ("st-bert", joined["key"])

    code, out, err = run("server", "sites", "--server", toml)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["st-anna", "st-bert", "2"]
    assert key in out
    listed = done(run("server", "sites", "--server", toml, "--json"))
    assert [found["name"] for found in listed["sites"]] == ["st-anna", "st-bert"]
    assert listed["certificate"]["warning"] == ""

    assert run("server", "enrol", "answer.json", "--server", toml)[::2] == (
        1,
        f"consilium: st-bert: already enrolled with this key, since {enrolled['enrolled_at']}\n",
    )
    assert done(run("server", "remove", "st-bert", "--server", toml, "--json"))["name"] == "st-bert"
    assert run("server", "remove", "st-bert", "--server", toml)[0] == 1


def test_renewal_and_a_warning(run: Run, toml: Path) -> None:
    toml.write_text(toml.read_text().replace("fl.example.org", "fl.example.com"))
    code, _, err = run("server", "sites", "--server", toml)
    assert code == 0
    assert "warning: " in err
    assert "does not stand for fl.example.com" in err
    assert "consilium server renew" in err
    code, out, err = run("server", "renew", "--server", toml)
    assert (code, err) == (0, "")
    assert "server.pem: until 20" in out
    assert run("server", "sites", "--server", toml)[2] == ""
    assert done(run("server", "renew", "--server", toml, "--json"))["days_left"] > 390


def test_another_key_is_replaced_on_request(run: Run, toml: Path) -> None:
    for number, flags in enumerate(((), ("--replace",))):
        assert run("server", "invite", "st-anna", "--server", toml)[0] == 0
        assert run("site", "init", f"site-{number}", "--invitation", "st-anna.invitation.json")[0] == 0
        if flags:
            code, out, err = run("server", "enrol", "st-anna.enrolment.json", "--server", toml)
            assert (code, out) == (1, "")
            assert "--replace" in err
        assert run("server", "enrol", "st-anna.enrolment.json", "--server", toml, *flags)[0] == 0


def test_joining_again(run: Run, toml: Path) -> None:
    assert run("server", "invite", "st-anna", "--server", toml)[0] == 0
    first = done(run("site", "init", "anna", "--invitation", "st-anna.invitation.json", "--json"))
    assert set(first) == {"site", "config", "state", "enrolment", "name", "key", "authority"}
    join = ("site", "join", "st-anna.invitation.json", "--site", "anna/site.toml")
    code, out, err = run(*join)
    assert (code, out) == (2, "")
    assert "--again" in err
    assert done(run(*join, "--again", "--json"))["key"] == first["key"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("server", "init", "new", "--address", "here"), 2, "--address: got 'here', expected host:port"),
        (("server", "init", "chest", "--address", "a:1"), 2, "already holds server.toml, state, runs"),
        (("server", "invite", "a b", "--server", "chest/server.toml"), 2, "1 to 63 letters"),
        (("server", "invite", "a", "--server", "chest/server.toml", "--output", "no/a.json"), 1, "cannot be written"),
        (("server", "invite", "a"), 2, "server.toml: cannot be read"),
        (("server", "enrol", "none.json", "--server", "chest/server.toml"), 2, "none.json: cannot be read"),
        (("server", "enrol", "chest/server.toml", "--server", "chest/server.toml"), 2, "not JSON"),
        (("site", "init", "new", "--invitation", "none.json"), 2, "none.json: cannot be read"),
        (("site", "join", "none.json"), 2, "site.toml: cannot be read"),
        (("server", "enroll", "x"), 2, "Did you mean 'enrol'?"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: tuple[str, ...], code: int, message: str, run: Run, toml: Path, tmp_path: Path
) -> None:
    got, out, err = run(*arguments)
    assert (got, out) == (code, "")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "new").exists()


def test_a_name_that_is_not_the_invitations_makes_no_site(run: Run, toml: Path, tmp_path: Path) -> None:
    assert run("server", "invite", "st-anna", "--server", toml)[0] == 0
    arguments = ("site", "init", "new", "--name", "st-bert", "--invitation", "st-anna.invitation.json")
    code, _, err = run(*arguments)
    assert code == 2
    assert "invites 'st-anna'" in err
    assert not (tmp_path / "new").exists()


def test_no_secret_is_printed(run: Run, toml: Path, tmp_path: Path) -> None:
    commands = (
        ("server", "invite", "st-anna", "--server", toml),
        ("site", "init", "anna", "--invitation", "st-anna.invitation.json"),
        ("server", "enrol", "st-anna.enrolment.json", "--server", toml),
        ("server", "sites", "--server", toml, "--json"),
    )
    results = [run(*command) for command in commands]
    assert [code for code, _, _ in results] == [0, 0, 0, 0]
    printed = "".join(out + err for _, out, err in results)
    config = read_server(toml)
    token = json.loads((tmp_path / "st-anna.invitation.json").read_text())["token"]
    assert token not in printed
    for secret in (config.operator_secret.read_bytes(), config.superexec_secret.read_bytes()):
        assert secret not in printed.encode() and secret.hex() not in printed
    assert "PRIVATE" not in printed


@pytest.mark.parametrize("name", sorted(server.commands))
def test_every_command_has_help_with_an_example(name: str, run: Run) -> None:
    code, out, _ = run("server", name, "--help")
    assert code == 0
    assert f"consilium server {name}" in out
    assert "Exit code:" in " ".join(out.split())
    assert isinstance(server.commands[name], click.Command)
    assert any("--json" in parameter.opts for parameter in server.commands[name].params)


def test_neither_group_loads_anything_heavy() -> None:
    code = (
        "import sys, server.cli, client.joining, server.enrolment, server.founding\n"
        "print([name for name in ('torch', 'flwr', 'timm', 'pydicom') if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == "[]\n"

"""The command: quick to answer, one line for a mistake, and the documented exit codes."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import click
import pytest

from common import cli
from common.errors import ConfigError, ConsiliumError, DataError, QuorumLost, SiteRefusal, WeightsUnavailable

HEAVY = ("torch", "timm", "flwr", "sklearn", "matplotlib", "pandas", "ray")


class Entry:
    """An installed command."""

    def __init__(self, body: Callable[[], Any]) -> None:
        self.name = "probe"
        self._command = click.command("probe")(body)

    def load(self) -> click.Command:
        return self._command


def run(monkeypatch: pytest.MonkeyPatch, body: Callable[[], Any], *arguments: str) -> int:
    """Return the exit code of `consilium probe` with a body of ours."""
    found = {"probe": Entry(body)}

    def entry_points(group: str, name: str | None = None) -> list[Entry]:
        assert group == "consilium.commands"
        return [entry for key, entry in found.items() if name in (None, key)]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    monkeypatch.setattr(sys, "argv", ["consilium", *(arguments or ("probe",))])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def raising(error: BaseException) -> Callable[[], Any]:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConsiliumError("why"), 1),
        (WeightsUnavailable("why"), 1),
        (QuorumLost("why"), 1),
        (SiteRefusal("internal"), 1),
        (ConfigError("why"), 2),
        (DataError("why"), 2),
        (click.UsageError("why"), 2),
        (click.BadParameter("why"), 2),
        (click.ClickException("why"), 1),
        (click.Abort(), 1),
        (KeyboardInterrupt(), 1),
    ],
)
def test_an_error_is_its_exit_code_and_no_traceback(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, raising(error)) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    if isinstance(error, ConsiliumError):
        assert printed.err == f"consilium: {error}\n"


def test_an_interrupt_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, raising(KeyboardInterrupt())) == 1
    assert capsys.readouterr().err.strip() == "consilium: interrupted"


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1), (3, 3)])
def test_what_a_command_returns_is_the_exit_code(returned: Any, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, lambda: returned) == code


def test_a_bug_stays_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["consilium", "probe"])
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [Entry(raising(ZeroDivisionError()))])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_unknown_commands_and_options_exit_with_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, lambda: None, "simulat") == 2
    assert "No such command 'simulat'" in capsys.readouterr().err
    assert run(monkeypatch, lambda: None, "probe", "--nothing") == 2
    assert "No such option" in capsys.readouterr().err


def test_a_misspelt_option_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["consilium", "simulate", "--datset", "phantoms"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "--dataset" in capsys.readouterr().err


def test_help_and_version_exit_with_zero(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, lambda: None, "--help") == 0
    printed = capsys.readouterr().out
    assert "probe" in printed
    assert "\\b" not in printed
    assert "Example:\n    consilium simulate" in printed
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["consilium", "--version"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert importlib.metadata.version("consilium") in capsys.readouterr().out


def test_a_command_without_examples_of_others_loads_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    group = cli.Commands()
    assert group.get_command(click.Context(group), "no-such-command") is None
    assert group.list_commands(click.Context(group)) == sorted(group.list_commands(click.Context(group)))


@pytest.mark.parametrize("arguments", [["--help"], ["simulate", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from common.cli import main\n"
        f"sys.argv = ['consilium', *{arguments!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n"
        f"    print('heavy:', sorted(set({HEAVY!r}) & set(sys.modules)), end.code)\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    assert done.stdout.endswith("heavy: [] 0\n"), done.stdout + done.stderr
    if arguments == ["--help"]:
        assert "\n  simulate " in done.stdout


def test_the_installed_command_is_this_one() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="consilium")
    assert script.value == "common.cli:main"
    assert "simulate" in cli.Commands().list_commands(click.Context(cli.consilium))

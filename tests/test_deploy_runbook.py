"""deploy/RUNBOOK.md: what it names is there, and its drills run, with a coordinator and a hospital on one machine.

The drill (runbook_drill.py) runs every `sh` block of the page.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "deploy" / "RUNBOOK.md"
DRILL = ROOT / "tests" / "runbook_drill.py"
TEXT = PAGE.read_text()
TOOLS = ("unshare", "setpriv", "useradd", "groupadd", "mount", "nginx", "shred", "ip")
CONFIGS = {"site": "/etc/consilium/site.toml", "server": "/etc/consilium/server.toml"}


def blocks(*languages: str) -> list[str]:
    """Return the code blocks of these languages, in their order."""
    found = re.findall(r"^```([a-z]*)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    return [content for language, content in found if language in languages]


def spans() -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```$", "", TEXT))


# ------------------------------------------------------------------------------------------------ what it names


def commands(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield the arguments of every command of a site or a coordinator that is named."""
    for text in texts:
        for found in re.finditer(r"(?:^|[ /])consilium ((?:site|server) .*)$", text):
            yield shlex.split(found[1])


def lines() -> list[str]:
    return "".join(blocks("", "sh")).splitlines()


def find(arguments: list[str]) -> tuple[click.Command, list[str]]:
    from common.cli import consilium

    command: click.Command = consilium
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        found = command.get_command(click.Context(command), arguments[0])
        if found is None:
            break
        command, arguments = found, arguments[1:]
    return command, arguments


def test_every_command_is_there_with_its_options() -> None:
    named = list(commands([*lines(), *spans()]))
    assert len(named) > 40
    for arguments in named:
        command, rest = find(arguments)
        assert not (isinstance(command, click.Group) and rest and not rest[0].startswith("-")), arguments
        assert not (isinstance(command, click.Group) and command.name in CONFIGS), arguments
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known, arguments


def test_those_of_the_blocks_are_whole() -> None:
    for arguments in commands(lines()):
        command, rest = find(arguments)
        command.make_context(command.name, rest)  # raises where it does not take them


def test_every_file_unit_and_place_is_there() -> None:
    prose = "\n".join([*blocks("", "sh"), *spans()])
    deployed = {path.name for path in PAGE.parent.iterdir()}
    for name in re.findall(r"(?:/opt/consilium|consilium-\*)/(?:deploy/)?([\w*.-]+\.[a-z]+)", prose):
        assert name in deployed or list(PAGE.parent.glob(name)), name
    assert set(re.findall(r"\b[\w.-]+\.ya?ml\b", prose)) <= deployed
    for unit in re.findall(r"\bconsilium-(?:site-[a-z]+|coordinator)\b(?=[ .`]|$)", prose, flags=re.MULTILINE):
        assert f"{unit}.service" in deployed, unit
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", TEXT):
        page = PAGE if not target else (PAGE.parent / target).resolve()
        titles = re.findall(r"(?m)^#+ (.*)$", page.read_text())
        slugs = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert not anchor or anchor in slugs, (target, anchor)


def test_every_container_is_there() -> None:
    found = [re.findall(r"--file (\S+) (?:run --rm|exec|stop|kill --signal HUP) (\S+)", span) for span in spans()]
    named = [one for one in found if one]
    assert len(named) >= 7
    for ((file, service),) in named:
        assert service in yaml.safe_load((PAGE.parent / file).read_text())["services"]


def test_its_numbers_are_those_of_the_image() -> None:
    dockerfile = (PAGE.parent / "Dockerfile").read_text()
    for name in ("consilium", "consilium-link", "consilium-coordinator"):
        (here,) = re.findall(rf"(?m)^useradd .*--uid (\d+) .* {name}$", TEXT)
        there = re.sub(r"\s*\\\n\s*", " ", dockerfile)
        assert re.search(rf"useradd --uid {here} [^&]* {name} &&|useradd --uid {here} [^&]* {name} *(\\|&&|\n)", there)
    assert "--gid 9441 consilium-site" in TEXT and "--gid 9441 consilium-site" in dockerfile


# ---------------------------------------------------------------------------------------------------- the drill


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make users and namespaces")
@pytest.mark.skipif(
    not all(map(shutil.which, TOOLS)), reason=f"needs {', '.join(TOOLS)} (Debian: nginx-light, iproute2)"
)
def test_the_drill() -> None:
    names = ["--mount", "--net", "--pid", "--fork", "--kill-child", "--propagation", "private"]
    where = [str(ROOT), sys.base_prefix, sysconfig.get_path("purelib")]
    command = ["unshare", *names, sys.executable, "-P", str(DRILL), *where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["blocks"] == len(blocks("sh"))
    assert found["ledger"]["restored"] == found["ledger"]["before"] != ""
    assert set(found["modes"].values()) == {"0o600"}
    assert not any("/cache/" in name or "check.html" in name for name in found["backup"])
    assert {*CONFIGS.values()} - {CONFIGS["server"]} <= {f"/{name}" for name in found["backup"]}
    assert {"var/lib/consilium/secret", "var/lib/consilium-link/node.key"} <= {*found["backup"]}
    assert found["left"] == []
    for failed in found["doctors"]:  # what else it looks at is of the machine that the test runs on
        assert not {*failed} & {"configuration", "state", "secret", "key", "certificate", "enrolment", "separation"}

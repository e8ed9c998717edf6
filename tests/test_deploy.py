"""The units of systemd: that systemd takes them as they are, and that the link's has what keeps it from the data."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from client.cli import site
from server.cli import server

DEPLOY = Path(__file__).parent.parent / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))


def lines(unit: str) -> set[str]:
    return set((DEPLOY / unit).read_text().splitlines())


def test_there_are_four() -> None:
    names = [f"consilium-{name}.service" for name in ("coordinator", "site-daemon", "site-link", "site-monitor")]
    assert [unit.name for unit in UNITS] == names


def said(copy: Path, text: str) -> list[str]:
    copy.write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
    return [line for line in (done.stdout + done.stderr).splitlines() if "consilium" in line]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_takes_them(unit: Path, tmp_path: Path) -> None:
    text = unit.read_text()
    python = "/opt/consilium/bin/python" if "bin/python" in text else "/opt/consilium/bin/consilium"
    copy = tmp_path / unit.name
    whole = text.replace(python, "/bin/true")  # it must be there to be run
    assert said(copy, whole) == []
    assert said(copy, whole.replace("NoNewPrivileges=", "NoNewPrivilege=")) != []


EXPOSURE = {"coordinator": 18, "site-daemon": 33, "site-link": 17, "site-monitor": 16}
"""Tenths of what `systemd-analyze security` of systemd 252 counts. The daemon's are the GPU's devices and maps."""


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_they_are_exposed_to_little(unit: Path) -> None:
    most = EXPOSURE[unit.stem.removeprefix("consilium-")]
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", f"--threshold={most}", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "Overall exposure level" in done.stdout, done.stdout[-200:] + done.stderr


def test_neither_user_of_a_site_can_do_what_the_other_does() -> None:
    link, daemon = lines("consilium-site-link.service"), lines("consilium-site-daemon.service")
    assert {"User=consilium-link", "NoNewPrivileges=yes", "ProtectSystem=strict", "PrivateDevices=yes"} <= link
    assert {"CapabilityBoundingSet=", "SocketBindDeny=any", "ProtectHome=yes"} <= link
    assert any(line.startswith("InaccessiblePaths=") and "/var/lib/consilium " in line for line in link)
    assert {"User=consilium", "IPAddressDeny=any", "RestrictAddressFamilies=AF_UNIX AF_NETLINK"} <= daemon
    assert "InaccessiblePaths=-/var/lib/consilium-link" in daemon
    for unit in UNITS:
        assert "RestartPreventExitStatus=2" in lines(unit.name)


def test_the_monitor_sees_no_key_and_no_network() -> None:
    monitor = lines("consilium-site-monitor.service")
    assert {"IPAddressDeny=any", "IPAddressAllow=localhost", "SocketBindDeny=any", "CapabilityBoundingSet="} <= monitor
    assert any(line.startswith("InaccessiblePaths=") and "node.key" in line for line in monitor)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_what_they_start_is_there(unit: Path) -> None:
    (line,) = (line for line in lines(unit.name) if line.startswith("ExecStart="))
    program, *arguments = shlex.split(line.removeprefix("ExecStart="))
    if program == "/opt/consilium/bin/python":
        option, module_option, module, path = arguments
        assert (option, module_option) == ("-P", "-m")
        assert importlib.util.find_spec(module) is not None
    else:
        group, command, *options = arguments
        found = {"server": server, "site": site}[group].commands[command]
        path = str(found.make_context(command, options).params["path"])  # raises where it does not take them
    assert path in ("/etc/consilium/site.toml", "/etc/consilium/server.toml")


def test_the_page_names_every_file() -> None:
    text = (DEPLOY / "README.md").read_text()
    named = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}
    assert named | {"README.md"} == {path.name for path in DEPLOY.iterdir()}

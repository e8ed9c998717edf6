"""The image and the compose files: the linters take them, and what keeps the roles apart is in each of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from click import Command

from client.cli import site
from server.cli import server

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
FILES = sorted(DEPLOY.glob("compose.*.yaml"))
SITE, COORDINATOR = (DEPLOY / f"compose.{name}.yaml" for name in ("site", "coordinator"))
TOOLS = Path(sys.executable).parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def services(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text())["services"]
    return found


EVERY = [
    pytest.param(service, id=f"{path.name}:{name}")
    for path in (SITE, COORDINATOR)
    for name, service in services(path).items()
]


def mounts(service: dict[str, Any]) -> dict[str, bool]:
    """Return what is mounted into a service: the target, and whether it may be written."""
    return {one["target"]: not one.get("read_only", False) for one in service.get("volumes", [])}


def users() -> dict[str, int]:
    """Return the users that the image has, and their numbers."""
    return {name: int(number) for number, name in re.findall(r"useradd --uid (\d+) .*?([a-z-]+) *\\?\n", flat())}


def flat() -> str:
    """Return the Dockerfile with its continued lines joined, a command a line."""
    return DOCKERFILE.replace("\\\n", " ").replace("&&", "\n") + "\n"


def test_the_linters_take_the_image_and_the_scripts() -> None:
    for tool, options, files in (
        ("hadolint", ["--failure-threshold", "style"], [DEPLOY / "Dockerfile"]),
        ("shellcheck", [], sorted(DEPLOY.glob("*.sh"))),
    ):
        done = subprocess.run([TOOLS / tool, *options, *files], capture_output=True, text=True)
        assert done.returncode == 0 and files, done.stdout + done.stderr


def test_the_compose_files_are_of_the_schema(tmp_path: Path) -> None:
    check = [TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, *FILES], capture_output=True, text=True)
    assert done.returncode == 0 and len(FILES) == 3, done.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(SITE.read_text().replace("network_mode:", "network_modes:"))
    assert subprocess.run([*check, wrong], capture_output=True).returncode == 1


def test_the_image_comes_from_nowhere_and_runs_as_nobody_in_particular() -> None:
    lines = DOCKERFILE.splitlines()
    assert "ARG BASE=python:3.11-slim-bookworm" in lines
    assert not re.search(r"https?://|ADD |COPY |--index|apt-get|curl|wget", DOCKERFILE)  # nothing is fetched
    assert not re.search(r"(?i)secret|password|token", DOCKERFILE)
    assert "RUN --mount=type=bind,target=/kit /kit/install.sh /opt/consilium" in lines
    assert {"STOPSIGNAL SIGTERM", "USER 65534:65534"} <= set(lines)
    assert any(line.startswith("HEALTHCHECK ") for line in lines)
    assert users() == {"consilium": 9441, "consilium-link": 9442, "consilium-coordinator": 9443}


@pytest.mark.parametrize("service", EVERY)
def test_every_service_is_held_in(service: dict[str, Any]) -> None:
    assert service["restart"] in ("unless-stopped", "no")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"] > 0
    assert "privileged" not in service and service.get("pid") is None and service.get("ipc") is None
    assert "healthcheck" in service
    name, _, tag = service["image"].rpartition(":")
    assert tag not in ("", "latest") and "/" not in name
    assert tag == VERSION if name == "consilium" else tag[0].isdigit()
    user, group = map(int, service["user"].split(":"))
    assert (user, group) != (0, 0) or service["profiles"] == ["join"]
    for mounted in service.get("volumes", []):  # a folder that Docker made would be root's, and empty
        assert mounted["type"] == "volume" or mounted["bind"] == {"create_host_path": False}
    assert "docker.sock" not in json.dumps(service)


def test_the_daemon_has_data_and_no_network_and_the_link_the_reverse() -> None:
    found = services(SITE)
    daemon, link, join = found["daemon"], found["link"], found["join"]
    assert daemon["network_mode"] == "none" and "networks" not in daemon and "ports" not in daemon
    assert mounts(daemon) == {
        "/etc/consilium": False,
        "/run/consilium": True,
        "/var/lib/consilium": True,
        "/srv/images": False,
        "/srv/labels.csv": False,
    }
    assert mounts(link) == {"/etc/consilium": False, "/run/consilium": True, "/var/lib/consilium-link": True}
    assert "ports" not in link and "network_mode" not in link
    assert {"mem_limit", "memswap_limit"} <= link.keys()
    assert daemon["user"] != link["user"]
    assert mounts(join) == {"/etc/consilium": True, "/var/lib/consilium-link": True}
    assert join["network_mode"] == "none" and join["cap_add"] == ["CHOWN", "DAC_OVERRIDE"]


def test_both_ends_of_the_socket_have_the_numbers_of_the_image() -> None:
    found, numbers = services(SITE), users()
    assert found["daemon"]["user"] == f"{numbers['consilium']}:9441"
    assert found["link"]["user"] == f"{numbers['consilium-link']}:{numbers['consilium-link']}"
    assert found["link"]["group_add"] == ["9441"]  # opens the way to the socket
    assert "groupadd --gid 9441 consilium-site" in DOCKERFILE
    assert not any("userns_mode" in service for service in found.values())
    shared = [one for service in found.values() for one in service["volumes"] if one["type"] == "volume"]
    assert shared == [{"type": "volume", "source": "socket", "target": "/run/consilium"}] * 2
    example = tomllib.loads((DEPLOY / "site.toml").read_text())
    assert example["site"]["peers"] == ["consilium-link"]
    assert example["site"]["socket"] == "/run/consilium/site.sock"
    assert example["data"] == {"images": "/srv/images", "labels": "/srv/labels.csv"}


def test_only_nginx_is_reached_and_the_operators_port_is_not() -> None:
    found = services(COORDINATOR)
    ports = {name: service["ports"] for name, service in found.items() if "ports" in service}
    assert ports == {"network": ["443:443"]}
    assert found["coordinator"]["network_mode"] == found["nginx"]["network_mode"] == "service:network"
    assert found["coordinator"]["user"] == f"{users()['consilium-coordinator']}:9443"
    assert "/var/lib/consilium-coordinator" not in mounts(found["nginx"])
    example = tomllib.loads((DEPLOY / "server.toml").read_text())["network"]
    assert example["listen"] == "127.0.0.1:9443" and example["operator_port"] == 9444 and example["tls"] == "proxy"
    front = (DEPLOY / "nginx.conf").read_text()
    assert "listen 443 ssl" in front and "server 127.0.0.1:9443;" in front


@pytest.mark.parametrize("service", EVERY)
def test_what_they_start_is_there(service: dict[str, Any]) -> None:
    argv = service.get("entrypoint") or service.get("command") or []
    if argv[:3] == ["python", "-P", "-m"]:
        module, path = argv[3:]
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file() and path == "/etc/consilium/site.toml"
    elif argv[:1] == ["consilium"]:
        assert takes([*argv[1:], "x.json"] if "join" in argv else argv[1:])
    else:
        assert argv in ([], ["sleep", "infinity"])
    test = service["healthcheck"].get("test", [])
    if test[1:2] == ["consilium"]:
        assert takes(test[2:])


def takes(arguments: list[str]) -> bool:
    """Return whether the command of these arguments is there and takes them; click raises where it does not."""
    group, name, *options = arguments
    command: Command = {"site": site, "server": server}[group].commands[name]
    command.make_context(name, list(options))
    return True


def test_the_daemons_health_is_that_of_its_socket(tmp_path: Path) -> None:
    test = services(SITE)["daemon"]["healthcheck"]["test"]
    config = tmp_path / "site.toml"
    config.write_text('[site]\nname = "north"\n\n[data]\nimages = "."\n')
    code = test[-1].replace("/etc/consilium/site.toml", str(config))
    assert code != test[-1] and test[:-1] == ["CMD", "python", "-P", "-c"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")  # nobody listens

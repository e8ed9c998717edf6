"""The installation kit: made from a checkout of few dependencies, and installed where there is no network.

The wheels are what is installed here, packed again, so that nothing is fetched. All else is as it is shipped.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("client", "common", "server", "simulations")
NEEDED = {"click", "cryptography", "pydantic", "tomli_w"}
"""What `consilium server init` imports, and what these in turn need."""
CLOSURE = (*NEEDED, "cffi", "pycparser", "pydantic_core", "typing_extensions", "annotated-types", "typing-inspection")
NO_NETWORK = ("unshare", "--net")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        subprocess.run([*NO_NETWORK, "true"], capture_output=True).returncode != 0,
        reason="no network namespace can be made here (root, and unshare of util-linux)",
    ),
]


@dataclass(frozen=True)
class Made:
    """A kit, what it was made from, and what making it printed."""

    folder: Path
    checkout: Path
    tar: Path
    printed: str


@pytest.fixture
def link(tmp_path: Path) -> Path:
    """Return where to install to: its folder is there."""
    (tmp_path / "opt").mkdir()
    return tmp_path / "opt" / "consilium"


@dataclass(frozen=True)
class Installed:
    """What the kit became where there is no network."""

    link: Path
    done: subprocess.CompletedProcess[str]


def repacked(name: str, folder: Path) -> None:
    """Pack an installed distribution as a wheel again."""
    found = importlib.metadata.distribution(name)
    tag = re.findall(r"(?m)^Tag: (.*)$", found.read_text("WHEEL") or "")[0]
    kept = [
        str(file)
        for file in found.files or ()
        if not str(file).startswith("..") and file.name not in ("RECORD", "INSTALLER", "REQUESTED")
    ]
    (record,) = (str(file) for file in found.files or () if file.name == "RECORD")
    with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{found.version}-{tag}.whl", "w") as wheel:
        for file in kept:
            if "__pycache__" not in file:
                wheel.write(found.locate_file(file), file)
        wheel.writestr(record, "".join(f"{file},,\n" for file in (*kept, record)))


def checkout(folder: Path) -> Path:
    """Copy what a kit is made from, with fewer dependencies."""
    leave = shutil.ignore_patterns("__pycache__")
    for name in (*PACKAGES, "deploy", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=leave)
    for name in ("README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    text = (ROOT / "pyproject.toml").read_text()
    text = re.sub(r"(?ms)^dependencies = \[.*?^\]", f"dependencies = {sorted(NEEDED)}", text)
    text = re.sub(r"(?m)^(embedded|pacs) = .*$", r"\1 = []", text)
    (folder / "pyproject.toml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    wheels, out = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("dist")
    for name in CLOSURE:
        repacked(name, wheels)
    environment = {
        **os.environ,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": str(wheels),
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's own word for: without
        "SOURCE_DATE_EPOCH": "1700000000",
    }
    source = checkout(tmp_path_factory.mktemp("checkout"))
    command = [source / "deploy" / "make-kit.sh", sys.executable, out]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (tar,) = out.glob("*.tar")
    return Made(out / "kit", source, tar, done.stdout)


@pytest.fixture(scope="module")
def installed(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    link = tmp_path_factory.mktemp("opt") / "consilium"
    (place(made.folder, link) / "venv" / "bin").mkdir(parents=True)  # of an installation that was killed
    return Installed(link, install(made.folder, link))


def place(kit: Path, link: Path) -> Path:
    """Return the folder that a kit is installed in."""
    digest = hashlib.sha256((kit / "SHA256SUMS").read_bytes()).hexdigest()
    return link.with_name(f"{link.name}-{told(kit, 'version')}-{digest[:8]}")


def told(kit: Path, key: str) -> str:
    (value,) = re.findall(rf"(?m)^{key} (.*)$", (kit / "MANIFEST").read_text())
    return str(value)


def install(kit: Path, *arguments: str | Path, path: str = "") -> subprocess.CompletedProcess[str]:
    """Run a kit's installer without a network; `path` goes before the usual folders of commands."""
    command = [*NO_NETWORK, kit / "install.sh", "--python", sys.executable, *arguments]
    environment = {"PATH": f"{path}:/usr/sbin:/usr/bin:/sbin:/bin", "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)


def stub(folder: Path, name: str, script: str) -> Path:
    """Make a command that stands before the machine's own."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return folder / name


# ------------------------------------------------------------------------------------------------------ what is in it


def test_its_tar_is_the_kit_and_its_checksum_is_printed(made: Made) -> None:
    digest = hashlib.sha256(made.tar.read_bytes()).hexdigest()
    assert made.printed.splitlines()[-1] == f"{digest}  {made.tar.name}"
    assert (made.tar.parent / f"{made.tar.name}.sha256").read_text() == f"{digest}  {made.tar.name}\n"
    with tarfile.open(made.tar) as tar:
        members = {member.name: member for member in tar if member.isfile()}
    kit = {str(path.relative_to(made.folder)) for path in made.folder.rglob("*") if path.is_file()}
    assert {name.removeprefix(f"{made.tar.stem}/") for name in members} == kit
    assert {(member.uid, member.gid, member.mtime) for member in members.values()} == {(0, 0, 1700000000)}
    assert re.fullmatch(r"consilium-\d+\.\d+\.\d+-py3\.\d+-linux-x86_64\.tar", made.tar.name)


def test_it_holds_documents_manifest_and_sums_of_all(made: Made) -> None:
    kit = made.folder
    summed = {line.split("  ", 1)[1] for line in (kit / "SHA256SUMS").read_text().splitlines()}
    assert summed == {str(path.relative_to(kit)) for path in kit.rglob("*") if path.is_file()} - {"SHA256SUMS"}
    assert {"install.sh", "LICENSE", "deploy/RUNBOOK.md", "deploy/Dockerfile", "docs/federation.md"} <= summed
    assert "deploy/make-kit.sh" not in summed
    assert told(kit, "version") == importlib.metadata.version("consilium")
    assert told(kit, "python") == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert re.fullmatch(r"2\.\d+", told(kit, "glibc")) and int(told(kit, "installed_kib")) > 1000
    listed = re.findall(r"(?m)^wheel (\S+) (\d+)$", (kit / "MANIFEST").read_text())
    assert {name: int(size) for name, size in listed} == {
        path.name: path.stat().st_size for path in (kit / "wheels").iterdir()
    }
    required = re.findall(r"(?m)^(\S+)==\S+ --hash=sha256:[0-9a-f]{64}$", (kit / "requirements.txt").read_text())
    assert set(required) == {"consilium", *(name.replace("-", "_") for name in CLOSURE)}


def test_the_wheel_has_every_file_of_the_packages(made: Made) -> None:
    (wheel,) = (made.folder / "wheels").glob("consilium-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    tree = {
        str(path.relative_to(made.checkout))
        for name in PACKAGES
        for path in (made.checkout / name).rglob("*")
        if path.is_file() and path.suffix != ".md"
    }
    assert {name for name in held if ".dist-info/" not in name} == tree
    assert any(name.endswith(".html.j2") for name in held)


# ----------------------------------------------------------------------------------------------------- installing it


def test_it_is_installed_without_a_network(made: Made, installed: Installed) -> None:
    assert installed.done.returncode == 0, installed.done.stderr
    assert "No broken requirements found." in installed.done.stdout
    assert f"Next: {installed.link}/deploy/RUNBOOK.md" in installed.done.stdout
    assert installed.link.resolve() == place(made.folder, installed.link)
    assert {"bin", "deploy", "docs", "LICENSE", "MANIFEST"} <= {path.name for path in installed.link.iterdir()}
    assert not list(installed.link.parent.glob("*.next"))


def test_what_it_installed_runs_outside_of_any_checkout(installed: Installed, tmp_path: Path) -> None:
    def run(*command: str) -> str:
        line = [*NO_NETWORK, installed.link / "bin" / command[0], *command[1:]]
        return subprocess.run(line, cwd=tmp_path, env={}, check=True, capture_output=True, text=True).stdout

    assert run("consilium", "--version").strip().endswith(importlib.metadata.version("consilium"))
    assert "--dataset" in run("consilium", "simulate", "--help")
    assert "coordinator chest" in run("consilium", "server", "init", "chest", "--address", "127.0.0.1:9443")
    assert (tmp_path / "chest" / "state" / "server.pem").is_file()
    own = run("python", "-c", "import sys, common; print(sys.prefix, common.__file__)").split()
    assert [Path(one).is_relative_to(installed.link.resolve() / "venv") for one in own] == [True, True]  # not the link


def test_again_changes_nothing_and_another_kit_takes_its_place_and_gives_it_back(
    made: Made, installed: Installed, tmp_path: Path
) -> None:
    link, first = installed.link, place(made.folder, installed.link)
    again = install(made.folder, link)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    other = tmp_path / "kit"
    shutil.copytree(made.folder, other)
    sums = (other / "SHA256SUMS").read_text().splitlines(keepends=True)
    (other / "SHA256SUMS").write_text("".join(reversed(sums)))
    second = place(other, link)
    second.mkdir()
    (second / "whole").touch()  # as if it had been installed once
    turned = install(other, link)
    assert turned.returncode == 0 and link.resolve() == second != first, turned.stderr
    (command,) = re.findall(r"(?m)^Back: (.*), and start anew$", turned.stdout)
    subprocess.run(["sh", "-c", command], check=True)
    assert link.resolve() == first
    assert install(other, link).returncode == 0 and link.resolve() == second
    assert install(made.folder, link).returncode == 0 and link.resolve() == first


@pytest.mark.parametrize(
    ("name", "script", "expected"),
    [
        ("uname", "echo Linux aarch64", "this kit is for Linux x86_64, this machine is Linux aarch64"),
        ("getconf", "echo glibc 2.1", r"needs glibc 2\.\d+ or newer, found 2\.1"),
        ("getconf", "exit 1", "this machine has another C library"),
        ("df", "printf 'Filesystem\n/dev/x 9 9 2048 9 /\n'", r"2 MiB free, expected \d+; make room first"),
    ],
)
def test_a_machine_that_will_not_do(
    made: Made, link: Path, tmp_path: Path, name: str, script: str, expected: str
) -> None:
    stub(tmp_path / "bin", name, script)
    refused(install(made.folder, link, path=str(tmp_path / "bin")), link, expected)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 3.9", "is Python 3.9, this kit is for 3.11; name another with --python"),
        ("exit 1", "does not run"),
        (f'case $* in *ensurepip*) exit 1;; esac; exec {sys.executable} "$@"', "has no venv; install it first"),
        (f'case $* in *"-m venv"*) exit 1;; esac; exec {sys.executable} "$@"', "no environment can be made there"),
    ],
)
def test_a_python_that_will_not_do(made: Made, link: Path, tmp_path: Path, script: str, expected: str) -> None:
    python = stub(tmp_path / "bin", "python", script)
    refused(install(made.folder, "--python", python, link), link, expected)


def test_a_python_that_is_not_there(made: Made, link: Path) -> None:
    refused(install(made.folder, "--python", "/nowhere/python", link), link, "/nowhere/python: not found; install")


def test_a_kit_that_is_damaged(made: Made, link: Path, tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    shutil.copytree(made.folder, kit)
    wheel = next((kit / "wheels").glob("click-*.whl"))
    with wheel.open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    done = install(kit, link)
    assert f"wheels/{wheel.name}: FAILED" in done.stdout
    refused(done, link, "unpack the kit again")
    wheel.unlink()
    refused(install(kit, link), link, "unpack the kit again")


def test_a_place_that_will_not_do_and_wrong_use(made: Made, tmp_path: Path) -> None:
    there = tmp_path / "consilium"
    there.mkdir()
    done = install(made.folder, there)
    assert done.returncode == 1 and f"move it away first: mv {there} {there}-before" in done.stderr
    assert "no such folder; make it first" in install(made.folder, tmp_path / "x" / "consilium").stderr
    for wrong in (["--unknown"], ["--python"], ["one", "two"]):
        done = install(made.folder, *wrong)
        assert done.returncode == 2 and "./install.sh [--python PYTHON] [FOLDER]" in done.stderr


def refused(done: subprocess.CompletedProcess[str], link: Path, expected: str) -> None:
    """Check that an installation ended in one line that says why, and left nothing."""
    assert done.returncode == 1 and re.search(expected, done.stderr), done.stderr
    assert done.stderr.splitlines()[-1].startswith("install.sh: ")
    assert not list(link.parent.iterdir())

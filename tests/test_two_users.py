"""Whoever runs code as the link's user gets nothing of the daemon's: a hospital as in the manual, attacked for real.

The users, folders, modes and units are those of docs/federation.md and deploy/, made in namespaces of their own. What
the units ask of systemd's seccomp filters and cgroups is not played here; `NOT_HERE` names it. So all that is shown
holds with less than what runs at a hospital.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("unshare", "setpriv", "useradd", "groupadd", "mount")

pytestmark = [
    pytest.mark.faults,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make users and namespaces"),
    pytest.mark.skipif(
        not all(map(shutil.which, TOOLS)), reason=f"needs {', '.join(TOOLS)} (Debian: util-linux, passwd)"
    ),
]

FILES = (
    "an image",
    "the labels",
    "secret",
    "audit.jsonl",
    "ledger.jsonl",
    "outbox/0.reply",
    "daemon.log",
    "daemon.lock",
)
FOLDERS = ("the images", "the state", "the inner folder")
OF_PROC = (
    *("read /proc/environ", "read /proc/maps", "read /proc/auxv", "read /proc/io", "open /proc/mem"),
    *("list /proc/fd", "enter /proc/cwd", "enter /proc/root"),
)
BY_KERNEL = (
    *("ptrace attach", "ptrace seize", "process_vm_writev", "pidfd_getfd", "prlimit", "lower priority"),
    *("pin to a core", "setuid root", "setuid daemon", "setgid root", "setgroups", "mount", "chroot"),
    *(f"signal {name}" for name in ("SIGTERM", "SIGSTOP", "SIGUSR1", "SIGHUP", "SIGKILL")),
)
BY_FOLDER = (
    *("unlink the socket", "rename the socket", "bind beside the socket", "a symlink in the runtime folder"),
    *("a folder in the runtime folder", "take the inner folder away", "rename the runtime folder"),
)
BY_OWNER = ("chmod the socket", "chmod the runtime folder", "chown the socket")

# attempt -> the error by users and modes alone, and the one within what the unit hides besides
READING = {
    **{
        f"{how} {name}{by}": ("EACCES", "EACCES")
        for how, by in (("read", ""), ("reach", " by a link"))
        for name in FILES
    },
    **{f"list {name}": ("EACCES", "EACCES") for name in FOLDERS},
    **dict.fromkeys(OF_PROC, ("EACCES", "ENOENT")),
    "process_vm_readv": ("EPERM", "EPERM"),
    "connect to the inner socket": ("EACCES", "EACCES"),
}
TAKING = {
    **dict.fromkeys(BY_KERNEL, ("EPERM", "EPERM")),
    **dict.fromkeys(BY_FOLDER, ("EACCES", "EROFS")),
    **dict.fromkeys(BY_OWNER, ("EPERM", "EROFS")),
    "open /proc/mem to write": ("EACCES", "ENOENT"),
    "enter its namespace": ("EACCES", "ENOENT"),
    "bind on the socket": ("EADDRINUSE", "EADDRINUSE"),
    "write site.toml": ("EACCES", "EACCES"),
    "take site.toml away": ("EACCES", "EROFS"),
    **{f"write {name}": ("EACCES", "EACCES") for name in FILES},
}
ALLOWED = {
    "opened of the daemon's": "[]",
    "status": "ready",
    "a request of the list": "unknown_run",
    "a request outside of it": "malformed",
    "knock": "answered",
}

# What the link's unit says, and what is played of it. A key that is new here has to be thought about.
PLAYED = {
    *("User", "Group", "SupplementaryGroups", "UMask", "StateDirectory", "StateDirectoryMode", "NoNewPrivileges"),
    *(
        "CapabilityBoundingSet",
        "AmbientCapabilities",
        "InaccessiblePaths",
        "ProtectHome",
        "ProtectSystem",
        "PrivateTmp",
    ),
    *("ProtectProc", "ProcSubset"),
}
NOT_HERE = {
    *(
        "SystemCallFilter",
        "SystemCallArchitectures",
        "SystemCallErrorNumber",
        "RestrictAddressFamilies",
        "SocketBindDeny",
    ),
    *("RestrictNamespaces", "RestrictRealtime", "RestrictSUIDSGID", "LockPersonality", "PrivateDevices", "MemoryMax"),
    *("ProtectClock", "ProtectControlGroups", "ProtectHostname", "ProtectKernelLogs", "ProtectKernelModules"),
    *("ProtectKernelTunables", "TasksMax"),
}
RUNNING = {"Type", "ExecStart", "Environment", "Restart", "RestartSec", "RestartPreventExitStatus", "TimeoutStopSec"}


@pytest.fixture(scope="module")
def found() -> Any:
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
    script = [sys.executable, "-P", str(Path(__file__).with_name("two_users.py")), str(ROOT), sys.base_prefix]
    packages = sysconfig.get_path("purelib")
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no namespaces here: {error.stderr.decode().strip()}")
    done = subprocess.run([*command, *script, packages], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("level", "column"), [("users", 0), ("unit", 1)])
def test_each_attempt_of_the_links_user_fails(level: str, column: int, found: Any) -> None:
    expected = {name: errors[column] for name, errors in {**READING, **TAKING}.items()}
    assert found[level] == {**expected, **ALLOWED}
    assert found["untouched"], "the daemon runs on, its files and its socket are as they were"


def test_the_same_attempts_succeed_for_the_daemons_own_user(found: Any) -> None:
    assert found["owner"] == dict.fromkeys(READING, "done"), "or the attempts above prove nothing"


@pytest.mark.parametrize(("user", "knock"), [("stranger", "EACCES"), ("guest", "cut off")])
def test_a_third_user_cannot_even_speak(user: str, knock: str, found: Any) -> None:
    """A stranger does not reach the socket; a guest, who is in its group by mistake, is turned away unread."""
    assert found[user] == {**{name: errors[0] for name, errors in READING.items()}, "knock": knock}
    assert found["after"]["turned_away"] >= 1


def test_nobody_takes_the_sockets_place_while_no_daemon_runs(found: Any) -> None:
    names = ("bind on the socket", "make the runtime folder", "a symlink for the runtime folder")
    assert found["stopped"] == dict(zip(names, ("EACCES", "EEXIST", "EEXIST"), strict=True))
    assert found["gone"] == dict(zip(names, ("ENOENT", "EACCES", "EACCES"), strict=True))


def test_the_modes_are_those_of_the_manual(found: Any) -> None:
    assert found["modes"] == {
        "/var/lib/consilium": "0o700",
        "/var/lib/consilium-link": "0o700",
        "/run/consilium": "0o750",
        "/run/consilium/site.sock": "0o660",
    }


def test_all_that_the_unit_says_was_thought_about(found: Any) -> None:
    assert set(found["keys"]) == PLAYED | NOT_HERE | RUNNING

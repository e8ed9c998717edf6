"""A hospital as docs/federation.md has it, under two users, in namespaces of its own: nothing of it touches the host.

Run as root by `unshare`: `python two_users.py ROOT BASE PACKAGES`. Users, folders and modes come from the commands of
the manual and the keys of the units; what a unit says that needs systemd or seccomp is not done here. It prints one
JSON object, which tests/test_two_users.py asserts.
"""

from __future__ import annotations

import grp
import json
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HOLD, SHADOW = Path("/mnt/hold"), Path("/etc/nothing")
PYTHON = "/opt/consilium/bin/python"
FACTS = "/etc/consilium/facts.json"
Unit = dict[str, list[str]]


def run(*command: str, **options: Any) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


def read_unit(path: Path) -> Unit:
    """Return the keys of [Service] with their values."""
    found: Unit = {}
    section = path.read_text().partition("[Service]\n")[2].partition("\n[Install]")[0]
    for line in section.splitlines():
        name, sign, value = line.partition("=")
        if sign and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def lay_ground(root: Path, base: Path, packages: Path) -> None:
    """Give this namespace folders of its own, and the package where the manual has it."""
    run("mount", "-t", "proc", "proc", "/proc")
    run("mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", "/mnt")
    held = {"base": base, "packages": packages, "root": root, "etc": Path("/etc")}
    for name, place in held.items():
        (HOLD / name).mkdir(parents=True)
        if name == "etc":
            run("cp", "-a", "/etc/.", str(HOLD / name))
        else:
            run("mount", "--bind", str(place), str(HOLD / name))
    for place, mode in {"/opt": "0755", "/srv": "0755", "/run": "0755", "/var/lib": "0755", "/tmp": "1777"}.items():
        run("mount", "-t", "tmpfs", "-o", f"mode={mode}", "tmpfs", place)
    run("mount", "--bind", str(HOLD / "etc"), "/etc")
    SHADOW.mkdir(mode=0)
    shown = {"base": "/opt/python", "root": "/opt/source"}
    shown["packages"] = f"/opt/consilium/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    for name, place in shown.items():
        Path(place).mkdir(parents=True)
        run("mount", "--bind", str(HOLD / name), place)
    Path(PYTHON).parent.mkdir()
    Path(PYTHON).symlink_to(f"/opt/python/bin/python{sys.version_info[0]}.{sys.version_info[1]}")
    Path("/opt/consilium/pyvenv.cfg").write_text("home = /opt/python/bin\ninclude-system-site-packages = false\n")


def follow_the_manual(root: Path) -> None:
    """Run the commands that make users and folders, as they stand there."""
    block = (root / "docs/federation.md").read_text().partition("## As services, under two users")[2].split("```")[1]
    for line in block.splitlines():
        if re.match(r"(groupadd|useradd|install|cp) ", line):
            run("sh", "-c", line.partition("#")[0], cwd=root)
    run("useradd", "--system", "--no-create-home", "stranger")
    run("useradd", "--system", "--no-create-home", "--groups", "consilium-site", "guest")


def draw_images() -> None:
    """Write images and labels for the daemon's user alone."""
    script = (
        "import numpy as np, pathlib, csv\nfrom PIL import Image\nr = np.random.default_rng(0)\n"
        "p = pathlib.Path('/srv/images'); p.mkdir()\nrows = [('path', 'label')]\n"
        "for k in range(12):\n"
        "    Image.fromarray(r.integers(0, 256, (64, 64), np.uint8)).save(p / f'{k}.png')\n"
        "    rows.append((f'{k}.png', ('no', 'yes')[k % 2]))\n"
        "csv.writer(open('/srv/labels.csv', 'w')).writerows(rows)\n"
    )
    run(PYTHON, "-P", "-c", script, env=environment())
    run("chown", "-R", "consilium:consilium-site", "/srv/images", "/srv/labels.csv")
    run("chmod", "-R", "u=rwX,go=", "/srv/images", "/srv/labels.csv")


def environment() -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin:/usr/sbin", "PYTHONPATH": "/opt/source", "LD_LIBRARY_PATH": "/opt/python/lib",
            "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "FLWR_TELEMETRY_ENABLED": "0"}  # fmt: skip


def as_unit(unit: Unit, command: list[str]) -> list[str]:
    """Return a command under the user, the groups and the capabilities of a unit."""
    (user,), (group,) = unit["User"], unit["Group"]
    more = [str(grp.getgrnam(name).gr_gid) for name in shlex.split(" ".join(unit.get("SupplementaryGroups", [])))]
    assert unit["NoNewPrivileges"] == ["yes"] and unit["CapabilityBoundingSet"] == [""], "the unit has changed"
    groups = ["--groups", ",".join(more)] if more else ["--clear-groups"]
    return ["setpriv", f"--reuid={user}", f"--regid={group}", *groups, "--no-new-privs", "--bounding-set=-all",
            "--inh-caps=-all", "--ambient-caps=-all", *command]  # fmt: skip


def runtime_folder(unit: Unit) -> Path:
    """Make the folder of RuntimeDirectory= as systemd does."""
    (name,), (mode,), (user,), (group,) = (
        unit[key] for key in ("RuntimeDirectory", "RuntimeDirectoryMode", "User", "Group")
    )
    run("install", "-d", "-m", mode, "-o", user, "-g", group, f"/run/{name}")
    return Path("/run", name)


def start_daemon(unit: Unit) -> subprocess.Popen[bytes]:
    runtime_folder(unit)
    command = as_unit(unit, shlex.split(unit["ExecStart"][0]))
    with Path("/mnt/daemon.log").open("ab") as log:
        return subprocess.Popen(
            command, env=environment(), stdout=log, stderr=log, umask=int(unit["UMask"][0], 8), cwd="/"
        )


def hidden(unit: Unit) -> str:
    """Return the commands that hide from a process what its unit hides."""
    lines = ["set -e"]
    homes = ["/home", "/root", "/run/user"] if unit["ProtectHome"] == ["yes"] else []
    for place in (*shlex.split(" ".join(unit["InaccessiblePaths"])), *homes):
        path = Path(place.removeprefix("-"))
        if path.is_dir():
            lines.append(f"mount --bind {SHADOW} {path}")
    if unit["PrivateTmp"] == ["yes"]:
        lines += ["mount -t tmpfs -o mode=1777 tmpfs /tmp", "mount -t tmpfs -o mode=1777 tmpfs /var/tmp"]
    if unit["ProtectSystem"] == ["strict"]:
        (state,) = unit["StateDirectory"]
        lines += [f"mount --bind /var/lib/{state} /var/lib/{state}", "mount -o remount,ro,bind /etc"]
        lines += [f"mount -o remount,ro,bind {place}" for place in ("/", "/run", "/opt", "/var/lib", "/srv")]
        # /srv is hidden by then: what was bound over it cannot be written either
    if unit["ProtectProc"] == ["invisible"] and unit["ProcSubset"] == ["pid"]:
        lines.append("mount -t proc -o hidepid=invisible,subset=pid proc /proc")
    return "\n".join(lines) + '\nexec "$@"\n'


class Scene:
    def __init__(self) -> None:
        self.daemon_unit, self.link_unit = (
            read_unit(Path(f"/etc/systemd/system/consilium-site-{name}.service")) for name in ("daemon", "link")
        )

    def attack(self, *groups: str, unit: Unit | None = None, hide: bool = False) -> Any:
        """Return what came of attempts under a unit's rights, and within what it can see if `hide`."""
        command = as_unit(unit or self.link_unit, [PYTHON, "-P", "/opt/source/tests/link_attacks.py", FACTS, *groups])
        if hide:
            command = [
                "unshare",
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                hidden(self.link_unit),
                "sh",
                *command,
            ]
        return json.loads(run(*command, env=environment(), umask=0o077, cwd="/"))

    def as_user(self, name: str) -> Unit:
        """Return the link's unit for another user."""
        user = pwd.getpwnam(name)
        groups = [g.gr_name for g in grp.getgrall() if name in g.gr_mem]
        main = grp.getgrgid(user.pw_gid).gr_name
        return {**self.link_unit, "User": [name], "Group": [main], "SupplementaryGroups": [" ".join(groups)]}

    def status(self) -> Any:
        script = "import json;from pathlib import Path;from client.relay import Relay;" \
            "print(json.dumps(Relay(Path('/run/consilium/site.sock'), 'st-anna').status()))"  # fmt: skip
        return json.loads(run(PYTHON, "-P", "-c", script, env=environment()))

    def await_ready(self) -> Any:
        end = time.monotonic() + 120
        while (status := self.status())["state"] != "ready":
            if time.monotonic() > end or status["state"] == "unusable":
                raise SystemExit(f"the daemon is {status}: {Path('/mnt/daemon.log').read_text()}")
            time.sleep(0.3)
        return status

    def write_facts(self, pid: int) -> dict[str, str]:
        state, runtime = Path("/var/lib", self.daemon_unit["StateDirectory"][0]), Path("/run/consilium")
        for name in ("ledger.jsonl", "outbox/0.reply"):  # of private runs and of reviews
            (state / name).parent.mkdir(mode=0o700, exist_ok=True)
            (state / name).touch(mode=0o600)
        run("chown", "-R", "consilium:consilium-site", str(state))
        names = ("secret", "audit.jsonl", "ledger.jsonl", "outbox/0.reply", "daemon.log", "daemon.lock")
        files = {"an image": "/srv/images/0.png", "the labels": "/srv/labels.csv"}
        files |= {name: str(state / name) for name in names}
        (inner,) = runtime.glob(".*/s")
        user = pwd.getpwnam("consilium")
        facts = {
            "pid": pid, "files": files, "user": user.pw_uid, "group": user.pw_gid, "site": "st-anna",
            "folders": {"the images": "/srv/images", "the state": str(state), "the inner folder": str(inner.parent)},
            "inner": str(inner), "socket": str(runtime / "site.sock"), "config": "/etc/consilium/site.toml",
        }  # fmt: skip
        Path(FACTS).write_text(json.dumps(facts))
        Path(FACTS).chmod(0o644)
        return files


def marks(files: dict[str, str]) -> dict[str, Any]:
    """Return what would change if anything were touched."""
    socket = Path("/run/consilium/site.sock").stat()
    held = {
        name: Path(path).read_bytes().hex() for name, path in files.items() if name not in ("audit.jsonl", "daemon.log")
    }
    return {"socket": [socket.st_ino, socket.st_mode, socket.st_uid], "files": held,
            "config": Path("/etc/consilium/site.toml").read_text()}  # fmt: skip


def play() -> dict[str, Any]:
    scene = Scene()
    check = [PYTHON, "-P", "-c", "from common.cli import main; main()", "site", "check", "/etc/consilium/site.toml"]
    run(*as_unit(scene.daemon_unit, check), env=environment(), umask=0o077, cwd="/")
    daemon = start_daemon(scene.daemon_unit)
    try:
        scene.await_ready()
        files = scene.write_facts(daemon.pid)
        before, all_of_it = (
            marks(files),
            ("reading", "seizing", "rising", "replacing", "walking", "speaking", "knocking"),
        )
        found: dict[str, Any] = {
            "users": scene.attack(*all_of_it),
            "unit": scene.attack(*all_of_it, hide=True),
            "stranger": scene.attack("reading", "knocking", unit=scene.as_user("stranger")),
            "guest": scene.attack("reading", "knocking", unit=scene.as_user("guest")),
        }
        found["after"] = scene.status()
        found["untouched"] = marks(files) == before and daemon.poll() is None
        found["modes"] = {path: oct(Path(path).stat().st_mode & 0o7777) for path in _SHOWN}
        found["owner"] = scene.attack("reading", unit={**scene.daemon_unit, "SupplementaryGroups": []})
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(30)
    found["stopped"] = scene.attack("squatting")
    shutil.rmtree("/run/consilium")  # as systemd does
    found["gone"] = scene.attack("squatting")
    found["keys"] = sorted(scene.link_unit)
    return found


_SHOWN = ("/var/lib/consilium", "/var/lib/consilium-link", "/run/consilium", "/run/consilium/site.sock")


def main(arguments: list[str]) -> None:
    root, base, packages = map(Path, arguments)
    lay_ground(root, base, packages)
    root = Path("/opt/source")
    follow_the_manual(root)
    draw_images()
    sys.stdout.write(json.dumps(play()))


if __name__ == "__main__":
    main(sys.argv[1:])

"""The drill of deploy/RUNBOOK.md: every `sh` block, with a coordinator and a hospital, in namespaces of their own.

Run as root by `unshare`: `python runbook_drill.py ROOT BASE PACKAGES`. It prints one JSON object, which
tests/test_deploy_runbook.py asserts. Users, folders, nginx and the commands of the units under the units' users are
real; systemd, sudo and setfacl are played by this file.
"""

from __future__ import annotations

import csv
import json
import os
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

VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
PYTHON = f"/opt/python/bin/python{VERSION}"
DESK = Path("/srv/desk")
"""Where the two people work, and hand each other files."""

ENVIRONMENT = "PYTHONPATH=/opt/source LD_LIBRARY_PATH=/opt/python/lib PYTHONDONTWRITEBYTECODE=1"
STARTED = {
    "consilium": "#!/bin/sh\nexec /opt/consilium/bin/python -P -c 'from common.cli import main; main()' \"$@\"\n",
    "python": f'#!/bin/sh\nexport {ENVIRONMENT}\nexec /opt/consilium/venv/bin/python "$@"\n',
}
SHIMS = {
    "sudo": '#!/bin/sh\nuser=$2\nshift 2\nexec setpriv --reuid "$user" --regid "$(id -g "$user")" --init-groups "$@"\n',
    "setfacl": '#!/bin/sh\nshift 3\nexec chown -R consilium "$@"\n',  # the same rights, without the package acl
    "systemctl": f'#!/bin/sh\nexec {PYTHON} -P /opt/source/tests/runbook_drill.py systemctl "$@"\n',
}
PATIENCE_S = 180.0


def call(*command: str) -> None:
    subprocess.run(command, check=True)


def script(path: Path, content: str) -> None:
    path.write_text(content)
    path.chmod(0o755)


def lay_ground(root: Path, base: Path, packages: Path) -> None:
    """Give this namespace folders of its own, and the package where the page has it."""
    hold = Path("/mnt")
    call("mount", "-t", "proc", "proc", "/proc")
    call("mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", "/mnt")
    call("cp", "-a", "/etc", "/mnt/etc")
    environment = f"consilium/venv/lib/python{VERSION}/site-packages"
    held = {"source": root, "python": base, environment: packages}
    for name, place in held.items():
        (hold / name).mkdir(parents=True)
        call("mount", "--bind", str(place), str(hold / name))
    for place in ("/opt", "/srv", "/run", "/root", "/var/lib", "/var/log", "/tmp"):
        call("mount", "-t", "tmpfs", "-o", f"mode={'1777' if place == '/tmp' else '0755'}", "tmpfs", place)
    call("mount", "--bind", "/mnt/etc", "/etc")
    for name in held:
        Path("/opt", name).mkdir(parents=True)
        call("mount", "--bind", str(hold / name), f"/opt/{name}")
    for place in ("/var/lib/nginx", "/var/log/nginx", "/opt/consilium/bin", "/opt/shims", "/etc/systemd/system"):
        Path(place).mkdir(parents=True, exist_ok=True)
    Path("/opt/consilium/venv/bin").mkdir()
    Path("/opt/consilium/venv/bin/python").symlink_to(PYTHON)
    Path("/opt/consilium/venv/pyvenv.cfg").write_text("home = /opt/python/bin\n")
    Path("/opt/consilium/deploy").symlink_to("/opt/source/deploy")
    for name, content in STARTED.items():
        script(Path("/opt/consilium/bin", name), content)
    for name, content in SHIMS.items():
        script(Path("/opt/shims", name), content)
    call("ip", "link", "set", "lo", "up")
    with Path("/etc/hosts").open("a") as hosts:
        hosts.write("\n127.0.0.1 coordinator.example.org\n")
    DESK.mkdir()
    DESK.chmod(0o1777)
    os.environ["PATH"] = f"/opt/shims:/opt/consilium/bin:{os.environ['PATH']}:/usr/sbin"
    os.environ["OMP_NUM_THREADS"] = "1"


def draw_images() -> None:
    """Write images whose stripes lie or stand, and their labels."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    wave = (np.sin(np.arange(48) * 1.1) * 60 + 120)[None, :].repeat(48, 0)
    Path("/srv/images").mkdir()
    rows = [("path", "label")]
    for number in range(24):
        image = (wave if number % 2 else wave.T) + rng.normal(0, 25, (48, 48))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(f"/srv/images/{number}.png")
        rows.append((f"{number}.png", ("normal", "effusion")[number % 2]))
    with Path("/srv/labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


# ------------------------------------------------------------------------------------------------------- systemctl


def systemctl(arguments: list[str]) -> None:
    """Do what systemd would, as far as the page asks for it."""
    verb, *units = (word for word in arguments if word != "--now")
    for unit in units:
        if verb == "reload":
            call(unit, "-s", "reload")
        if verb in ("stop", "disable", "restart"):
            stop(unit)
        if verb in ("start", "enable", "restart"):
            start(unit)


def keys(unit: str) -> dict[str, str]:
    """Return the keys of [Service], the last of each."""
    lines = Path(f"/etc/systemd/system/{unit}.service").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def start(unit: str) -> None:
    if unit == "nginx":
        return call("nginx")
    found = keys(unit)
    if name := found.get("RuntimeDirectory"):
        owner = ("-o", found["User"], "-g", found["Group"])
        call("install", "-d", "-m", found["RuntimeDirectoryMode"], *owner, f"/run/{name}")
    groups = found.get("SupplementaryGroups")
    rights = ["--reuid", found["User"], "--regid", found["Group"], "--no-new-privs", "--bounding-set=-all"]
    rights += ["--groups", groups] if groups else ["--clear-groups"]
    with Path(f"/run/{unit}.log").open("ab") as log:
        process = subprocess.Popen(
            ["setpriv", *rights, *shlex.split(found["ExecStart"])],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            umask=int(found["UMask"], 8),
            start_new_session=True,
        )
    Path(f"/run/{unit}.pid").write_text(str(process.pid))
    return None


def stop(unit: str) -> None:
    path = Path("/run", f"{unit}.pid")
    if not path.exists():
        return
    process = int(path.read_text())
    os.kill(process, signal.SIGTERM)
    end = time.monotonic() + 40
    while runs(process):
        if time.monotonic() > end:
            raise SystemExit(f"{unit} does not end")
        time.sleep(0.1)
    if unit == "nginx":
        return
    path.unlink()
    if name := keys(unit).get("RuntimeDirectory"):
        shutil.rmtree(f"/run/{name}")


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ------------------------------------------------------------------------------------------------------ the blocks


class Desk:
    """Runs the lines of the page, and keeps what the test asks for."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {"blocks": 0, "ledger": {}, "doctors": [], "modes": {}, "backup": [], "left": []}

    def block(self, content: str) -> None:
        """Run a block: a status is waited for, and what a doctor finds is kept."""
        for line in content.splitlines():
            if not line.startswith("cd "):
                self.line(line)
        self.found["blocks"] += 1

    def line(self, line: str) -> None:
        if " doctor " in line:
            printed = sh(f"{line} --json", codes=(0, 1))
            self.found["doctors"].append([c["check"] for c in json.loads(printed)["checks"] if c["level"] == "fail"])
        elif " status " in line:
            self.await_good(line)
        else:
            sh(line)

    def await_good(self, line: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while ask(line).returncode:
            if time.monotonic() > end:
                raise SystemExit(f"{line}\n{ask(line).stdout}{logs()}")
            time.sleep(1)

    def ledger(self, when: str) -> None:
        self.found["ledger"][when] = sh("consilium site ledger --json --site /etc/consilium/site.toml")


def ask(line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", "-ec", line], cwd=DESK, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def sh(line: str, codes: tuple[int, ...] = (0,)) -> str:
    done = ask(line)
    if done.returncode not in codes:
        raise SystemExit(f"{line}\nexit code {done.returncode}\n{done.stdout}{done.stderr}{logs()}")
    return done.stdout


def logs() -> str:
    return "".join(f"--- {path}\n{path.read_text()[-2000:]}" for path in sorted(Path("/run").glob("*.log")))


def play(page: str) -> dict[str, Any]:
    """Run the blocks in the order of the page; an enrolment is recorded once there is one."""
    desk = Desk()
    found = re.findall(r"^```sh\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    later = [content for content in found if "server enrol" in content]
    for content in found:
        if content in later:
            continue
        if "-xzf /root/site-backup" in content:
            desk.ledger("before")
            sh("systemctl stop consilium-site-link; systemctl stop consilium-site-daemon")
            sh("rm -rf /var/lib/consilium/* /var/lib/consilium-link/*")
        desk.block(content)
        if "site join" in content:
            for one in later:
                desk.block(one)
        if "-xzf /root/site-backup" in content:
            desk.ledger("restored")
        if content.rstrip().endswith("site doctor /etc/consilium/site.toml"):
            desk.await_good("consilium site status /etc/consilium/site.toml")
    archives = [f"/root/{name}-backup.tar.gz" for name in ("site", "coordinator")]
    desk.found["modes"] = {path: oct(Path(path).stat().st_mode & 0o777) for path in archives}
    desk.found["backup"] = sh(f"tar -tzf {archives[0]}").splitlines()
    places = (
        pwd.getpwnam("consilium").pw_dir,
        "/var/lib/consilium",
        "/var/lib/consilium-link",
        "/etc/consilium/site.toml",
    )
    desk.found["left"] = [path for path in places if Path(path).exists()]
    return desk.found


def main(arguments: list[str]) -> None:
    if arguments[0] == "systemctl":
        return systemctl(arguments[1:])
    if arguments[0] == "play":
        draw_images()
        sys.stdout.write(json.dumps(play(Path("/opt/source/deploy/RUNBOOK.md").read_text())) + "\n")
        return systemctl(["stop", "consilium-coordinator", "nginx"])
    lay_ground(*map(Path, arguments))
    # This interpreter may lie below /root, which is another folder from here on.
    return os.execv("/opt/consilium/bin/python", ["python", "-P", "/opt/source/tests/runbook_drill.py", "play"])


if __name__ == "__main__":
    main(sys.argv[1:])

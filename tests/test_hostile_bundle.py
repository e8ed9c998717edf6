"""A coordinator whose bundle carries code: the true link, connected to a true SuperLink, executes no line of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from flwr.app import ConfigRecord, Message
from flwr.cli.build import build_fab_from_files

from client.daemon import Daemon
from client.founding import found_state
from client.link_status import read_status
from client.site_config import SiteConfig, read_site
from common.errors import ConsiliumError
from common.messages import Prepare, content_of, from_bytes, packed, to_bytes, to_record
from common.node_key import make_key, public_text
from server.control import Control

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# What the bundle does wherever it is imported: leave a mark, and take what it can see.
HOSTILE = """
import os
open(os.environ["CANARY"], "a").write(__name__ + "\\n")
for place in (os.environ["SITE"],):
    for folder, _, names in os.walk(place):
        for name in names:
            open(os.environ["CANARY"], "a").write(open(os.path.join(folder, name), "rb").read().hex())
from flwr.clientapp import ClientApp
app = ClientApp()
server = None
"""
SHADOWS = (
    *(
        "sitecustomize.py",
        "usercustomize.py",
        "client/__init__.py",
        "client/app.py",
        "client/relay.py",
        "client/link.py",
    ),
    *("common/__init__.py", "common/messages.py", "flwr/__init__.py", "grpc/__init__.py", "torch.py", "json.py"),
    *("encodings/__init__.py", "google/protobuf/__init__.py"),
)
# The link as it is, watched by Python itself: what it executes, what it starts, what it opens to write.
WATCHED = """
import json, os, runpy, sys
seen = {"executed": set(), "started": set(), "written": set()}
log = os.environ["WATCHED"]
def watch(event, arguments):
    if event == "exec":
        found = ("executed", getattr(arguments[0], "co_filename", "?"))
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class"):
        found = ("started", event)
    elif event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        found = ("written", os.path.abspath(arguments[0]))
    else:
        return
    if found[1] not in seen[found[0]] and found[1] != log:
        seen[found[0]].add(found[1])
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(handle, (json.dumps(found) + "\\n").encode())
        os.close(handle)
sys.addaudithook(watch)
sys.argv = ["link", sys.argv[1]]
runpy.run_module("client.link", run_name="__main__")
"""


def project(component: str) -> str:
    app = {"publisher": "nobody", "components": {"serverapp": "evil:server", "clientapp": component}}
    facts = {"name": "evil", "version": "1.0.0", "description": "takes", "license": "Apache-2.0"}
    return tomli_w.dumps({"project": facts, "tool": {"flwr": {"app": app}}})


def fab(component: str, files: Mapping[str, str]) -> bytes:
    whole = {"pyproject.toml": project(component), **files}
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # Flower's use of pathspec
        content, _ = build_fab_from_files({name: text.encode() for name, text in whole.items()})
    return content


def smuggling() -> bytes:
    """Return a bundle whose files lead out of the folder that it is unpacked into."""
    into = BytesIO(fab("evil:app", {"evil.py": HOSTILE}))
    with zipfile.ZipFile(into, "a") as archive:
        for name in ("../../evil.py", "/tmp/evil-of-consilium.py", "../../../../../../../../tmp/evil-of-consilium.py"):
            archive.writestr(name, HOSTILE)
    return into.getvalue()


BUNDLES: dict[str, Callable[[], bytes]] = {
    "its own app": lambda: fab("evil:app", {"evil.py": HOSTILE}),
    "modules of ours": lambda: fab("client.app:app", {"evil.py": HOSTILE, **dict.fromkeys(SHADOWS, HOSTILE)}),
    "paths that lead out": smuggling,
    "no archive": lambda: b"\x80\x04c" + b"os\nsystem\n" * 9,
}


@dataclass
class Hospital:
    """A site whose daemon and link run, and where the bundle's marks would be."""

    config: SiteConfig
    folder: Path
    node: int

    @property
    def canary(self) -> Path:
        return self.folder / "canary"

    def places(self) -> dict[str, list[str]]:
        """Return what lies where a link could leave something."""
        return {
            name: sorted(str(path.relative_to(self.folder)) for path in (self.folder / name).rglob("*"))
            for name in ("home", "tmp", "cwd")
        }

    def watched(self, kind: str) -> set[str]:
        lines = (self.folder / "watched").read_text().splitlines()
        return {value for name, value in map(json.loads, lines) if name == kind}


def await_truth(truth: Callable[[], object], process: subprocess.Popen[bytes] | None = None) -> None:
    end = time.monotonic() + 60
    while not truth():
        assert time.monotonic() < end and (process is None or process.poll() is None)
        time.sleep(0.05)


def no_cohort(_progress: Any) -> Any:
    raise ConsiliumError("there are no data behind this daemon")


@contextmanager
def hospital(folder: Path, superlink: Any) -> Iterator[Hospital]:
    for name in ("home", "tmp", "cwd", "link", "images"):
        (folder / name).mkdir(parents=True)
    (folder / "images" / "secret.png").write_bytes(b"a patient")
    coordinator = {"address": superlink.endpoints.listen, "ca_certificate": str(superlink.endpoints.certificate)}
    facts = {"site": {"name": "north"}, "data": {"images": "images"}, "coordinator": coordinator}
    (folder / "site.toml").write_text(tomli_w.dumps(facts))
    config = read_site(folder / "site.toml")
    found_state(config.state)
    with Control(superlink.endpoints) as control:
        node = control.register("north", public_text(make_key(folder / "link/node.key")))
    daemon = Daemon(config, no_cohort)
    await_truth(lambda: daemon.status()["state"] == "unusable")
    with (folder / "link.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", WATCHED, str(config.path)],
            env=environment(folder),
            cwd=folder / "cwd",
            stderr=log,
        )
    try:
        await_truth(lambda: (said := read_status(folder / "link")) is not None and said.code == "connected", process)
        yield Hospital(config, folder, node)
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        daemon.close()
        with Control(superlink.endpoints) as control:
            control.unregister("north")


def environment(folder: Path) -> dict[str, str]:
    places = {"HOME": "home", "TMPDIR": "tmp", "FLWR_HOME": "home/.flwr", "CANARY": "canary", "WATCHED": "watched"}
    return {
        **os.environ,
        **{name: str(folder / place) for name, place in places.items()},
        "PYTHONPATH": str(ROOT),
        "SITE": str(folder / "images"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }


def ask(grid: Any, node: int, kind: str) -> str:
    """Send a request of a run that nobody described, and return the code of the refusal."""
    record = packed(to_bytes(to_record(Prepare("0" * 64))))
    (sent,) = grid.push_messages([Message(record, node, kind)])
    found: list[Message] = []
    await_truth(lambda: found.extend(grid.pull_messages([sent])) or found)
    facts = from_bytes(content_of(found[0].content)).config_records["facts"]
    assert isinstance(facts, ConfigRecord) and set(facts) == {"refused"}
    return str(facts["refused"])


def test_no_bundle_is_executed_or_unpacked(superlink: Any, tmp_path: Path) -> None:
    """One link meets all of them, one run after the other; its daemon answers, so each message did come through."""
    with hospital(tmp_path / "site", superlink) as site, Control(superlink.endpoints) as control:
        before, served = site.places(), 0
        for make in BUNDLES.values():
            try:
                run_id = control.start_run(make())
            except ConsiliumError:  # Flower itself takes no such bundle
                continue
            served += 1
            with control.grid(run_id) as grid:
                assert ask(grid, site.node, "query.prepare") == "unknown_run"
                for kind in ("train", "evaluate", "query.install", "query.evil_app", "train.evil"):
                    assert ask(grid, site.node, kind) == "malformed"
        assert served >= 2
        assert not site.canary.exists()
        assert site.places() == before
        assert not Path("/tmp/evil-of-consilium.py").exists()
        known = (str(ROOT), sys.base_prefix, sys.prefix, "<", "?")
        assert all(name.startswith(known) for name in site.watched("executed"))
        assert site.watched("started") == set()
        own = {str(tmp_path / "site/link"), "/dev/null"}
        assert all(any(name.startswith(place) for place in own) for name in site.watched("written"))


@pytest.mark.parametrize("name", ["its own app", "modules of ours"])
def test_the_same_bundle_fires_where_flowers_own_client_app_process_takes_it(name: str, tmp_path: Path) -> None:
    """What Flower's SuperNode would have done with it: so the canary above is one that sings."""
    content, folder = BUNDLES[name](), tmp_path / "flower"
    for place in ("home", "tmp", "images"):
        (folder / place).mkdir(parents=True)
    (folder / "images" / "secret.png").write_bytes(b"a patient")
    (folder / "evil.fab").write_bytes(content)
    script = (
        "import sys; from pathlib import Path\n"
        "from flwr.cli.install import install_from_fab\nfrom flwr.clientapp.utils import get_load_client_app_fn\n"
        "place = install_from_fab(Path(sys.argv[1]).read_bytes(), skip_prompt=True)\n"
        "get_load_client_app_fn(default_app_ref='', app_path=str(place), multi_app=True)"
        "('nobody/evil', '1.0.0', str(place).rpartition('.')[2])\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, str(folder / "evil.fab")],
        env=environment(folder),
        capture_output=True,
        text=True,
    )
    assert (folder / "canary").exists(), done.stderr
    assert b"a patient".hex() in (folder / "canary").read_text()
    assert list((folder / "home/.flwr/apps").iterdir())

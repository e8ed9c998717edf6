"""A link that is killed or taken out, against the coordinator's own SuperLink."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from client.link_status import WORDS, read_status
from common import node_key
from common.messages import Describe, Prepare
from server.control import Control, bundle, roster
from server.federation import Federation, Network, Present

ROOT = Path(__file__).parent.parent
LINK = """
import sys, time
from pathlib import Path
import numpy as np
from flwr.app import Message
from flwr.clientapp import ClientApp
from client import link
from client.site_config import Coordinator
from common.address import parse_address
from common.messages import Description, Done, packed, to_bytes, to_record

class App(ClientApp):
    def __call__(self, message, context):
        if (folder / "hold").exists():
            (folder / "in-hand").touch()
            time.sleep(600)
        describe = message.metadata.message_type == "query.describe"
        reply = Description(site, np.zeros((3, 2), np.int64), "") if describe else Done()
        return Message(packed(to_bytes(to_record(reply))), reply_to=message)

site, address, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
coordinator = Coordinator(parse_address(address), Path(sys.argv[4]), folder / "node.key", None)
link.run(link.LinkSettings(site, coordinator, folder), App())
"""


def until(truth: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not truth():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


class Site:
    """A registered site, and its link in a process of its own."""

    def __init__(self, folder: Path, name: str, superlink: object, control: Control) -> None:
        self.folder, self.name, self.control = folder, name, control
        self._endpoints = superlink.endpoints  # type: ignore[attr-defined]
        folder.mkdir(mode=0o700)
        key = node_key.make_key(folder / "node.key")
        self.node = control.register(name, node_key.public_text(key))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        there = self._endpoints
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", LINK, self.name, there.listen, self.folder, there.certificate],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def says(self, code: str) -> bool:
        status = read_status(self.folder)
        own = self.process is not None and status is not None and status.pid == self.process.pid
        return own and status is not None and status.code == code


@pytest.fixture
def site(tmp_path: Path, superlink: object) -> Iterator[Site]:
    with Control(superlink.endpoints) as control:  # type: ignore[attr-defined]
        one = Site(tmp_path / "link", tmp_path.name[-20:].replace("_", "-"), superlink, control)
        yield one
        one.kill()
        control.unregister(one.name)


@pytest.mark.slow
def test_what_a_killed_link_had_in_hand_is_asked_again_at_once(site: Site) -> None:
    site.start()
    until(lambda: site.says("connected"))
    with site.control.grid(site.control.start_run(bundle())) as grid:

        def present() -> dict[str, Present]:
            return roster(grid)

        federation = Federation(grid, 120, Network(present))
        assert federation.find([site.name], Describe("x"))[site.name].status == "contributed"
        before = present()[site.name]
        restarted: list[float] = []

        def strike() -> None:
            until((site.folder / "in-hand").exists)
            site.kill()
            (site.folder / "hold").unlink()
            site.start()
            until(lambda: site.says("connected"))
            restarted.append(time.monotonic())

        (site.folder / "hold").touch()
        thread = threading.Thread(target=strike)
        thread.start()
        try:
            (answer,) = federation.ask({site.name: Prepare("f" * 64)})
        finally:
            thread.join()
        assert answer.status == "contributed"
        assert time.monotonic() - restarted[0] < 10  # a lost message would be missed after a minute
        after = present()[site.name]
        assert (after.node, before.node) == (site.node, site.node)
        assert after.since != before.since


@pytest.mark.slow
@pytest.mark.parametrize("memory", [None, "", "x", "1", "0 {mark}", "{node} " + "0" * 64])
def test_a_lease_whose_node_is_not_remembered_is_waited_for(site: Site, memory: str | None) -> None:
    site.start()
    until(lambda: site.says("connected"))
    site.kill()
    path = site.folder / "node_id"
    node, mark = path.read_text().split()
    assert int(node) == site.node
    if memory is None:
        path.unlink()
    else:
        path.write_text(memory.format(node=node, mark=mark))
    site.start()
    until(lambda: site.says("not_enrolled"))


@pytest.mark.slow
def test_a_site_that_is_taken_out_is_told_so(site: Site) -> None:
    site.start()
    until(lambda: site.says("connected"))
    site.control.unregister(site.name)
    until(lambda: site.says("withdrawn"), 10)
    assert WORDS["withdrawn"].state == "not_enrolled"
    site.kill()
    site.start()
    until(lambda: site.says("withdrawn"))  # also of one that was not there to see it

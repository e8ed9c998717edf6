"""The shipped nginx configuration in front of a real SuperLink: Debian's nginx, as this user, in a temporary folder."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.proto.fleet_pb2 import PullMessagesRequest

from server.control import Control, bundle
from server.endpoints import Endpoints

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
SHIPPED = Path(__file__).parent.parent / "deploy" / "nginx.conf"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="no nginx (Debian: apt-get install --no-install-recommends nginx-light)"),
]

FRAME = """
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 256; }}
http {{
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/consilium.conf;
}}
"""


class Front:
    """A SuperLink behind nginx."""

    def __init__(self, superlink: Any, port: int, root: Path) -> None:
        self.superlink = superlink
        self.address = f"127.0.0.1:{port}"
        self.port = port
        self.root = root

    def raw(self, head: str) -> bytes:
        """Return the first line of the answer to bytes that no client library would send."""
        context = ssl.create_default_context(cafile=str(self.root))
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as peer,
        ):
            peer.sendall(head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n")
            return peer.recv(65536)


def adapted(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert old in text, f"deploy/nginx.conf no longer has {old!r}"
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def front(superlink_behind_proxy: Any) -> Iterator[Front]:
    superlink = superlink_behind_proxy
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="nginx-") as name:
        folder = Path(name)
        lay_out(folder, superlink.endpoints, port)
        command = [str(NGINX), "-p", name, "-c", f"{name}/nginx.conf", "-e", "stderr"]
        subprocess.run([*command, "-t", "-q"], check=True, **unprivileged(folder))
        process = subprocess.Popen(command, **unprivileged(folder))
        try:
            await_port(port, process)
            yield Front(superlink, port, superlink.endpoints.certificate)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(10)


def lay_out(folder: Path, endpoints: Endpoints, port: int) -> None:
    changes = {
        "    listen 443 ssl default_server;": f"    listen 127.0.0.1:{port} ssl default_server;",
        "    listen [::]:443 ssl default_server;\n": "",
        "127.0.0.1:9443;": f"{endpoints.listen};",
        "/etc/consilium/": f"{folder}/",
    }
    (folder / "consilium.conf").write_text(adapted(SHIPPED.read_text(), changes))
    (folder / "nginx.conf").write_text(FRAME.format(folder=folder))
    shutil.copy(endpoints.certificate, folder / "server.pem")
    shutil.copy(endpoints.private_key, folder / "server.key")


def unprivileged(folder: Path) -> dict[str, Any]:
    """Return what makes a process of root's one of nobody's, to whom the folder is given."""
    if os.geteuid():
        return {}
    nobody = pwd.getpwnam("nobody")
    for path in (folder, *folder.rglob("*")):
        os.chown(path, nobody.pw_uid, nobody.pw_gid)
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def await_port(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 20
    while True:
        assert process.poll() is None and time.monotonic() < end
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/health",
        "/docs",
        "/openapi.json",
        "/v1/control/list-nodes",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/%72egister-node",
        "/v1/fleet/nothing",
        "//v1/fleet/../control/list-nodes",
        "/v1/fleet/../control/list-nodes",
        "/v1/fleet/%2e%2e/control/list-nodes",
        "/v1/fleet/..%2fcontrol%2flist-nodes",
        "/v1/control/../fleet/pull-messages",
        "/v1/fleet//pull-messages",
        "/V1/FLEET/PULL-MESSAGES",
        "https://127.0.0.1/v1/control/list-nodes",
    ],
)
def test_what_is_no_fleet_route_is_not_found(front: Front, target: str) -> None:
    answer = front.raw(f"POST {target} HTTP/1.1\nHost: x\nContent-Length: 0")
    assert answer.startswith(b"HTTP/1.1 404 "), answer
    assert b"nginx/" not in answer and b"uvicorn" not in answer


def test_another_method_is_refused(front: Front) -> None:
    answer = front.raw("GET /v1/fleet/pull-messages HTTP/1.1\nHost: x\nUpgrade: websocket\nConnection: Upgrade")
    assert answer.startswith(b"HTTP/1.1 403 ")


def test_a_body_above_the_limit_is_refused_and_old_tls_too(front: Front) -> None:
    head = "POST /v1/fleet/push-object HTTP/1.1\nHost: x\nContent-Length: "
    assert front.raw(head + str(8 * 2**20 + 1)).startswith(b"HTTP/1.1 413 ")
    context = ssl.create_default_context(cafile=str(front.root))
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", front.port)) as plain, pytest.raises(ssl.SSLError, match="(?i)version"):
        context.wrap_socket(plain, server_hostname="127.0.0.1")


def test_a_registered_key_works_through_it_and_another_does_not(front: Front, links: Callable[..., Any]) -> None:
    through = {"address": front.address, "root": front.root}
    site, stranger = links(front.superlink, **through), links(front.superlink, **through)
    with Control(front.superlink.endpoints) as control:
        node_id = control.register("north", site.public_key)
        with control.grid(control.start_run(bundle())) as grid:
            assert site.activate() == node_id
            values = np.arange(3_000_000, dtype=np.float32)  # objects of 5 MiB
            content = RecordDict({"weights": ArrayRecord({"x": Array(values)})})
            (sent,) = grid.push_messages([Message(content, node_id, "query.describe")])
            assert site.answer(lambda message: message.content)
            (reply,) = grid.pull_messages([sent])
            assert np.array_equal(reply.content.array_records["weights"]["x"].numpy(), values)
        with pytest.raises(httpx.HTTPStatusError, match="412"):
            stranger.activate()
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            stranger.client.PullMessages(PullMessagesRequest(node=site.node))


def test_a_site_in_a_hurry_is_not_held_up_and_a_flood_is(front: Front, links: Callable[..., Any]) -> None:
    context = ssl.create_default_context(cafile=str(front.root))
    with httpx.Client(verify=context, trust_env=False) as client:
        url = f"https://{front.address}/v1/fleet/nothing"
        assert {client.post(url).status_code for _ in range(200)} == {404}
    with (
        socket.create_connection(("127.0.0.1", front.port), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as peer,
    ):
        peer.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n" * 900)
        answers = b""
        while b" 503 " not in answers and (part := peer.recv(65536)):
            answers += part
    assert b" 503 " in answers

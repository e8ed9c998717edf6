"""One connection of a site's link to its coordinator: Flower's client over TLS, and a lease kept by signs of life."""

from __future__ import annotations

import hashlib
import logging
import ssl
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import VERSION_INCOMPATIBILITY_MESSAGE_METADATA_KEY
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufClientInterceptor, ProtobufRequestContext
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.link_status import StatusFile
from client.link_trouble import Trouble, flower_code
from client.site_config import Coordinator
from common.files import write_atomic
from common.node_key import PrivateKey

HEARTBEAT = 20.0
"""Seconds between two signs of life; the coordinator holds a site for lost after 60."""

_TIMEOUT = 30.0
_HURRY = 3.0  # seconds for the last word when stopping

_log = logging.getLogger("consilium.link")


class Client(FleetHttpClient):
    """Flower's client, on connections that go to one address only: no redirects, no proxies of the environment.

    Args:
        coordinator: where it is.
        key: signs each request.
        tls: whom to trust.
        status: told of every exchange.
    """

    def __init__(self, coordinator: Coordinator, key: PrivateKey, tls: ssl.SSLContext, status: StatusFile) -> None:
        interceptors: list[ProtobufClientInterceptor] = [NodeAuthHttpInterceptor(key, key.public_key()), _Meter(status)]
        super().__init__(f"https://{coordinator.address}", interceptors=interceptors, verify=tls)
        self._client.close()
        self._client = httpx.Client(
            verify=tls,
            timeout=_TIMEOUT,
            follow_redirects=False,
            trust_env=False,
            proxy=coordinator.proxy,
            headers={"user-agent": "consilium"},
        )
        self.public_key = public_key_to_bytes(key.public_key())

    def hurry(self) -> None:
        """Wait for no answer for long from now on."""
        self._client.timeout = httpx.Timeout(_HURRY)


class Session:
    """The time between two troubles: a lease at the coordinator, kept alive by heartbeats.

    Args:
        client: how to speak with it.
        memory: the file of the number by which the coordinator knew this key last.
    """

    def __init__(self, client: Client, memory: Path) -> None:
        self._memory = memory
        self._mark = hashlib.sha256(client.public_key).hexdigest()
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self.client = client
        self.node = Node()

    def __enter__(self) -> Session:
        self.node = Node(node_id=self._activate())
        self._remember(self.node.node_id)
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        stopped = kind is None or not issubclass(kind, Exception)
        if stopped:
            self.client.hurry()
            with suppress(Exception):  # the lease ends by itself as well
                self._deactivate(self.node.node_id)
        self._heart.join(_HURRY)

    def _activate(self) -> int:
        """Take the lease; give up first one that was left behind, by a link that was killed or met with trouble.

        A sign of life would carry the old one on. But what was in hand then is lost, and only a new lease tells the
        coordinator to send it again.

        Raises:
            Trouble: the key is not enrolled, or in use elsewhere.
        """
        node_id = self._take()
        known = self._known()
        if node_id is None and known is not None:
            self._give_up(known)
            node_id = self._take()
        if node_id is None:
            raise Trouble("not_enrolled")
        return node_id

    def _take(self) -> int | None:
        """Return the node of a new lease, or None where Flower gives none: one is held, or the key is not enrolled."""
        request = ActivateNodeRequest(public_key=self.client.public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        try:
            return int(self.client.ActivateNode(request).node_id)
        except httpx.HTTPStatusError as error:
            if flower_code(error.response) == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
                return None
            raise

    def _give_up(self, node_id: int) -> None:
        try:
            self._deactivate(node_id)
        except httpx.HTTPStatusError as error:
            if flower_code(error.response) != ApiErrorCode.FLEET_NODE_DEACTIVATION_FAILED:  # it has ended by itself
                raise

    def _deactivate(self, node_id: int) -> None:
        self.client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))

    def _known(self) -> int | None:
        try:
            number, mark = self._memory.read_text("ascii").split()
            node_id = int(number)
        except (OSError, ValueError):
            return None
        return node_id if 0 < node_id < 2**64 and mark == self._mark else None

    def _remember(self, node_id: int) -> None:
        if self._known() != node_id:
            try:
                write_atomic(self._memory, f"{node_id} {self._mark}\n".encode(), mode=0o600)
            except OSError as error:  # the next restart after a crash takes a minute, that is all
                _log.warning("node_id cannot be written (%s)", error.strerror)

    def _beat(self) -> None:
        request = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        while not self._over.wait(HEARTBEAT):
            try:
                self.client.SendNodeHeartbeat(request)
            except Exception as error:  # noqa: BLE001  whoever asks for work meets the same trouble, and deals with it
                _log.debug("a heartbeat failed: %r", error)


class _Meter:
    """The innermost step of a request: names our version, counts bytes, and looks at who answers."""

    def __init__(self, status: StatusFile) -> None:
        self._status = status
        self._version = dict(RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata())
        self._seen = False

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Send a request, and note what it cost."""
        context.request.headers.update(self._version)
        response = call_next(context)
        if not self._seen:
            self._seen = True
            self._status.certificate(_certificate_ends(response))
        self._status.count(len(context.request.content), len(response.content))
        if VERSION_INCOMPATIBILITY_MESSAGE_METADATA_KEY in response.headers:
            raise Trouble("version")
        return response


def _certificate_ends(response: httpx.Response) -> float | None:
    """Return when the certificate of who answered ends, in seconds since 1970."""
    stream = response.extensions.get("network_stream")
    channel: Any = stream.get_extra_info("ssl_object") if stream is not None else None
    ends = (channel.getpeercert() or {}).get("notAfter") if channel is not None else None
    return float(ssl.cert_time_to_seconds(ends)) if isinstance(ends, str) else None

"""The site's link to the coordinator: fetches requests, has them answered, and brings the answers back.

It stands where Flower's SuperNode would, and speaks its protocol with Flower's own client; but it runs no code that
it is sent. The bundle of a run is never fetched, a message is answered in this process by the installed `ClientApp`,
and no trouble on the network ends it: every one is waited out, and said in `status.json`.

It needs no right to the data and imports nothing that reads them: what it knows is the site's key.
"""

from __future__ import annotations

import logging
import random
import re
import signal
import ssl
import stat
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import VERSION_INCOMPATIBILITY_MESSAGE_METADATA_KEY
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufClientInterceptor, ProtobufRequestContext
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client import up
from client.app import make_relay
from client.link_status import LOCK, StatusFile
from client.link_trouble import Trouble, code_of, flower_code
from client.relay import Relay
from client.site_config import SiteConfig, read_site
from common.errors import ConfigError, ConsiliumError
from common.files import write_atomic
from common.locks import exclusive
from common.messages import refusal

BUSY_PAUSE, IDLE_PAUSE, PAUSE_GROWTH = 0.05, 3.0, 1.25
"""Seconds between two questions for work: after an exchange, at most, and the factor in between."""

FIRST_WAIT, LAST_WAIT = 0.5, 20.0
"""Seconds to wait after trouble: at first, and at most."""

HEARTBEAT = 20.0
"""Seconds between two signs of life; the coordinator holds a site for lost after 60."""

OBJECT_PAUSE, LAST_OBJECT_PAUSE = 0.02, 2.0
"""Seconds between two questions for a part of a message that the coordinator is still writing: at first, at most."""

OBJECT_PATIENCE = 120.0
"""Seconds after which a message whose parts do not come is dropped: who was sending it is gone."""

_TIMEOUT = 30.0
_HURRY = 3.0  # seconds for the last word when stopping
_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9][A-Za-z0-9.-]*):[0-9]{1,5}")
_UNDELIVERABLE = (ObjectPullError, ObjectPushError)

_log = logging.getLogger("consilium.link")


@dataclass(frozen=True)
class LinkSettings:
    """What a link needs to know."""

    site: str  # the site's name
    address: str  # host:port of the coordinator
    ca_certificate: Path  # PEM file
    private_key: Path  # EC key in OpenSSH's format, mode 0600
    proxy: str  # http://host:port, or empty
    folder: Path  # of status.json, node_id and the lock

    @property
    def node_id(self) -> Path:
        """The file of the number by which the coordinator knew this site last."""
        return self.folder / "node_id"


def run(settings: LinkSettings, app: ClientApp, stop: threading.Event | None = None) -> None:
    """Keep a site linked to its coordinator until it is stopped; an exception raised by a signal stops it too.

    Args:
        settings: where the coordinator is, and the key to speak with it.
        app: answers each message, in this process.
        stop: ends the link when set.

    Raises:
        ConfigError: the address, the proxy, the key or the certificate cannot be used.
        ConsiliumError: another link of this site runs.
    """
    check_addresses(settings)
    key, tls = read_private_key(settings.private_key), read_authority(settings.ca_certificate)
    with exclusive(settings.folder / LOCK, f"a link of {settings.site}"):
        _Link(settings, app, key, tls, stop or threading.Event()).run()


def check_addresses(settings: LinkSettings) -> None:
    """Refuse an address or a proxy that cannot be one.

    Raises:
        ConfigError: one of them cannot be.
    """
    if not _is_address(settings.address):
        raise ConfigError(f"[coordinator] address: got {settings.address!r}, expected host:port")
    if settings.proxy and not (settings.proxy.startswith("http://") and _is_address(settings.proxy[7:])):
        raise ConfigError(f"[coordinator] proxy: got {settings.proxy!r}, expected http://host:port")


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the site's private key.

    Raises:
        ConfigError: it is missing, open to others than its owner, or no EC key in OpenSSH's format.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: the site's private key cannot be read ({error.strerror}); `consilium site join` makes it"
        ) from None
    if mode & 0o077:
        raise ConfigError(f"{path}: mode {mode:04o} opens the site's private key to others; run: chmod 600 {path}")
    try:
        key = load_ssh_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            f"{path}: not the site's private key, expected an EC key in OpenSSH's format, without password"
        )
    return key


def read_authority(path: Path) -> ssl.SSLContext:
    """Return what trusts the coordinator's authority and no other.

    Raises:
        ConfigError: the certificate is missing or is none.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=path.read_text("ascii"))
    except (ssl.SSLError, ValueError):  # ValueError: not ASCII, or empty
        raise ConfigError(f"{path}: not a certificate, expected the PEM file of the coordinator's authority") from None
    except OSError as error:
        raise ConfigError(
            f"{path}: the coordinator's certificate cannot be read ({error.strerror}); "
            "`consilium site join` takes it from the invitation"
        ) from None
    return context


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


class _Client(FleetHttpClient):
    """Flower's client, on connections that go to one address only: no redirects, no proxies of the environment."""

    def __init__(
        self, settings: LinkSettings, key: ec.EllipticCurvePrivateKey, tls: ssl.SSLContext, status: StatusFile
    ) -> None:
        interceptors: list[ProtobufClientInterceptor] = [NodeAuthHttpInterceptor(key, key.public_key()), _Meter(status)]
        super().__init__(f"https://{settings.address}", interceptors=interceptors, verify=tls)
        self._client.close()
        self._client = httpx.Client(
            verify=tls,
            timeout=_TIMEOUT,
            follow_redirects=False,
            trust_env=False,
            proxy=settings.proxy or None,
            headers={"user-agent": "consilium"},
        )

    def hurry(self) -> None:
        """Wait for no answer for long from now on."""
        self._client.timeout = httpx.Timeout(_HURRY)


class _Session:
    """The time between two troubles: a lease at the coordinator, kept alive by heartbeats."""

    def __init__(self, settings: LinkSettings, client: _Client, public_key: bytes) -> None:
        self._settings = settings
        self._key = public_key
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self.client = client
        self.node = Node()

    def __enter__(self) -> _Session:
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
                self.client.DeactivateNode(DeactivateNodeRequest(node_id=self.node.node_id))
        self._heart.join(_HURRY)

    def _activate(self) -> int:
        """Take the lease, or go on with one that a killed link left behind.

        Flower gives a held lease to nobody for a minute, but a sign of life with the same key carries it on. Giving it
        back first would do too, but for a moment the site would be away, and what is on its way to it fail.

        Raises:
            Trouble: the key is not enrolled.
        """
        request = ActivateNodeRequest(public_key=self._key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        try:
            return int(self.client.ActivateNode(request).node_id)
        except httpx.HTTPStatusError as error:
            if flower_code(error.response) != ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
                raise
        known = self._known()
        if known is None or not self._alive(Node(node_id=known)):
            raise Trouble("not_enrolled")
        return known

    def _alive(self, node: Node) -> bool:
        """Give a sign of life; False where the coordinator does not take it for this node's."""
        request = SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        try:
            return bool(self.client.SendNodeHeartbeat(request).success)
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.UNAUTHORIZED:
                return False
            raise

    def _known(self) -> int | None:
        try:
            number = int(self._settings.node_id.read_text("ascii"))
        except (OSError, ValueError):
            return None
        return number if 0 < number < 2**64 else None

    def _remember(self, node_id: int) -> None:
        if self._known() != node_id:
            try:
                write_atomic(self._settings.node_id, f"{node_id}\n".encode(), mode=0o600)
            except OSError as error:  # the next restart after a crash takes a minute, that is all
                _log.warning("node_id cannot be written (%s)", error.strerror)

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT):
            try:
                self._alive(self.node)
            except Exception as error:  # noqa: BLE001  whoever asks for work meets the same trouble, and deals with it
                _log.debug("a heartbeat failed: %r", error)


class _Link:
    def __init__(
        self,
        settings: LinkSettings,
        app: ClientApp,
        key: ec.EllipticCurvePrivateKey,
        tls: ssl.SSLContext,
        stop: threading.Event,
    ) -> None:
        self._settings = settings
        self._app = app
        self._key, self._tls = key, tls
        self._stop = stop
        self._status = StatusFile(settings.folder, settings.site, settings.address)
        self._wait = FIRST_WAIT

    def run(self) -> None:
        self._status.say("connecting")
        try:
            while not self._stop.is_set():
                try:
                    self._connected()
                except Exception as error:  # noqa: BLE001  a link never gives up
                    self._trouble(error)
        finally:
            self._status.say("stopped")

    def _trouble(self, error: Exception) -> None:
        code = code_of(error, proxied=bool(self._settings.proxy))
        wait = self._wait * random.uniform(0.5, 1.0)  # so that all sites do not come back at once
        self._wait = min(2 * self._wait, LAST_WAIT)
        if code == "failed":
            _log.exception("something unknown went wrong; trying again in %.1f s", wait)
        else:
            _log.warning("%s (%s); trying again in %.1f s", code, type(error).__name__, wait)
        self._status.say(code)
        self._stop.wait(wait)

    def _connected(self) -> None:
        public_key = public_key_to_bytes(self._key.public_key())
        with (
            _Client(self._settings, self._key, self._tls, self._status) as client,
            _Session(self._settings, client, public_key) as session,
        ):
            _log.info("connected to %s", self._settings.address)
            self._serve(session)

    def _serve(self, session: _Session) -> None:
        request = PullMessagesRequest(node=session.node)
        pause = BUSY_PAUSE
        while not self._stop.is_set():
            found = session.client.PullMessages(request)
            self._wait = FIRST_WAIT
            if found.messages_list:
                self._status.say("working")
                self._answer(session, found)
                pause = BUSY_PAUSE
            self._status.say("connected")
            self._stop.wait(pause)
            pause = min(pause * PAUSE_GROWTH, IDLE_PAUSE)

    def _answer(self, session: _Session, found: PullMessagesResponse) -> None:
        """Answer a message; an answer that cannot be delivered is dropped: the coordinator asks again.

        Raises:
            httpx.TransportError: the coordinator cannot be reached any more.
        """
        begin = time.monotonic()
        try:
            reply = self._reply(session, found)
            _push(session, reply, time.monotonic() - begin)
            self._status.answered()
        except _UNDELIVERABLE as error:
            _log.warning("an exchange was dropped (%s)", type(error).__name__)
        except httpx.HTTPStatusError as error:
            _log.warning("an exchange was dropped (HTTP %d)", error.response.status_code)
        except httpx.TransportError:
            _log.warning("an exchange was dropped, for the connection broke off")
            raise

    def _reply(self, session: _Session, found: PullMessagesResponse) -> Message:
        skeleton = message_from_proto(found.messages_list[0])
        run_id = skeleton.metadata.run_id
        client, node, tree = session.client, session.node, found.message_object_trees[0]
        try:
            message = pull_and_inflate_object_from_tree(
                tree,
                make_pull_object_fn_protobuf(client.PullObject, node, run_id),
                make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, run_id),
                return_type=Message,
                initial_backoff=OBJECT_PAUSE,
                backoff_cap=LAST_OBJECT_PAUSE,
                max_time=OBJECT_PATIENCE,
            )
            message.metadata.__dict__["_message_id"] = tree.object_id  # not part of what is sent
            if not message.has_content() or not isinstance(message.content, RecordDict):
                raise ValueError("a message without records")
        except (httpx.HTTPError, *_UNDELIVERABLE):
            raise
        except Exception:  # noqa: BLE001  whatever was sent, it is no message
            _log.exception("a message cannot be read")
            return Message(refusal("malformed"), reply_to=skeleton)
        return self._asked(message, int(session.node.node_id))

    def _asked(self, message: Message, node_id: int) -> Message:
        """Return the app's reply, or a refusal: the text of an error never leaves the site."""
        context = Context(
            run_id=message.metadata.run_id,
            node_id=node_id,
            node_config={"site": self._settings.site},
            state=RecordDict(),
            run_config={},
        )
        try:
            reply = self._app(message=message, context=context)
            if reply.has_content():
                return reply
            _log.error("the app replied with an error instead of records")
        except Exception:  # noqa: BLE001  its text may hold anything
            _log.exception("the app failed")
        return Message(refusal("internal"), reply_to=message)


def _push(session: _Session, reply: Message, seconds: float) -> None:
    reply.metadata.__dict__["_message_id"] = reply.object_id
    with no_object_id_recompute():
        request = PushMessagesRequest(
            node=session.node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[get_object_tree(reply)],
            clientapp_runtime_list=[seconds],
        )
        found = session.client.PushMessages(request)
        push_objects(
            get_all_nested_objects(reply),
            make_push_object_fn_protobuf(
                session.client.PushObject, session.node, reply.metadata.run_id, found.session_id
            ),
            object_ids_to_push=set(found.objects_to_push),
        )


def _certificate_ends(response: httpx.Response) -> float | None:
    """Return when the certificate of who answered ends, in seconds since 1970."""
    stream = response.extensions.get("network_stream")
    channel: Any = stream.get_extra_info("ssl_object") if stream is not None else None
    ends = (channel.getpeercert() or {}).get("notAfter") if channel is not None else None
    return float(ssl.cert_time_to_seconds(ends)) if isinstance(ends, str) else None


def _is_address(text: str) -> bool:
    return _ADDRESS.fullmatch(text) is not None and 0 < int(text.rpartition(":")[2]) < 65536


def settings_of(config: SiteConfig) -> LinkSettings:
    """Return what a site's configuration says of its link.

    Raises:
        ConfigError: no coordinator is named.
    """
    section = config.toml.coordinator
    if not section.address:
        raise ConfigError(f"{config.path.name}: [coordinator] address: missing; run: consilium site join INVITATION")
    key = up.private_key(config)
    return LinkSettings(config.name, section.address, up.authority(config), key, section.proxy, key.parent)


def main() -> None:
    """Run the link of a `site.toml`: `python -P -m client.link SITE.TOML`."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a request
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    try:
        if len(sys.argv) != 2:
            raise ConfigError("usage: python -P -m client.link SITE.TOML")
        config = read_site(Path(sys.argv[1]))
        run(settings_of(config), make_relay(Relay(config.socket, config.name)))
    except ConsiliumError as error:
        sys.stderr.write(f"consilium: {error}\n")
        sys.exit(error.exit_code)


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    """Leave whatever is going on: all of it can be left at any time."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(0)


if __name__ == "__main__":
    main()

"""The site's link to the coordinator: fetches requests, has them answered, and brings the answers back.

It stands where Flower's SuperNode would, and speaks its protocol with Flower's own client; but it runs no code that
it is sent. The bundle of a run is never fetched, a message is answered in this process by the installed `ClientApp`,
and no trouble on the network ends it: every one is waited out, and said in `status.json`.

It needs no right to the data and imports nothing that reads them: what it knows is the site's key.
"""

from __future__ import annotations

import logging
import random
import signal
import ssl
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import httpx
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.fleet_pb2 import PullMessagesResponse

from client.app import make_relay
from client.authority import read_authority
from client.link_exchange import UNDELIVERABLE, Unreadable, ask, pull, push
from client.link_session import Client, Session
from client.link_status import LOCK, StatusFile
from client.link_trouble import code_of
from client.relay import Relay
from client.site_config import Coordinator, SiteConfig, read_any_site
from common.errors import ConfigError, ConsiliumError
from common.locks import exclusive
from common.logs import set_up, tell_end
from common.messages import refusal
from common.node_key import PrivateKey, read_key

SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 3.0
"""Seconds between two questions for work, at least and at most."""

QUIET_SHARE, ANSWER_SHARE = 0.1, 4.0
"""What they are in between: shares of the seconds since the last message, and of those that the last answer took."""

FIRST_WAIT, LAST_WAIT = 0.5, 20.0
"""Seconds to wait after trouble: at first, and at most."""

_log = logging.getLogger("consilium.link")


@dataclass(frozen=True)
class LinkSettings:
    """What a link needs to know."""

    site: str  # the site's name
    coordinator: Coordinator
    folder: Path  # of status.json, node_id and the lock


def run(settings: LinkSettings, app: ClientApp, stop: threading.Event | None = None) -> None:
    """Keep a site linked to its coordinator until it is stopped; an exception raised by a signal stops it too.

    Args:
        settings: where the coordinator is, and the key to speak with it.
        app: answers each message, in this process.
        stop: ends the link when set.

    Raises:
        ConfigError: the key or the certificate cannot be used.
        ConsiliumError: another link of this site runs.
    """
    key, tls = read_key(settings.coordinator.private_key), read_authority(settings.coordinator.ca_certificate)
    with exclusive(settings.folder / LOCK, f"a link of {settings.site}"):
        _Link(settings, app, key, tls, stop or threading.Event()).run()


def pause(quiet: float, took: float = 0.0) -> float:
    """Return the seconds until the next question for work.

    A site that others are waited for is asked again soon after the last of them is done, whatever a round takes. And
    many sites that wait do not keep the coordinator busy with saying no: the slower it answers, the less it is asked.

    Args:
        quiet: seconds since the last message.
        took: seconds until the last question was answered.

    Examples:
        >>> [pause(seconds) for seconds in (0, 5, 3600)]
        [0.05, 0.5, 3.0]
    """
    return min(LONGEST_PAUSE, max(SHORTEST_PAUSE, QUIET_SHARE * quiet, ANSWER_SHARE * took))


class _Link:
    def __init__(
        self, settings: LinkSettings, app: ClientApp, key: PrivateKey, tls: ssl.SSLContext, stop: threading.Event
    ) -> None:
        self._settings = settings
        self._app = app
        self._key, self._tls = key, tls
        self._stop = stop
        self._status = StatusFile(settings.folder, settings.site, str(settings.coordinator.address))
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
        code = code_of(error, proxied=self._settings.coordinator.proxy is not None)
        wait = self._wait * random.uniform(0.5, 1.0)  # so that all sites do not come back at once
        self._wait = min(2 * self._wait, LAST_WAIT)
        if code == "failed":
            _log.exception("something unknown went wrong; trying again in %.1f s", wait, extra={"code": code})
        else:
            _log.warning("%s (%s); trying again in %.1f s", code, type(error).__name__, wait, extra={"code": code})
        self._status.say(code)
        self._stop.wait(wait)

    def _connected(self) -> None:
        coordinator = self._settings.coordinator
        with (
            Client(coordinator, self._key, self._tls, self._status) as client,
            Session(client, self._settings.folder / "node_id") as session,
        ):
            _log.info("connected to %s", coordinator.address)
            self._serve(session)

    def _serve(self, session: Session) -> None:
        last = time.monotonic()
        while not self._stop.is_set():
            begin = time.monotonic()
            found = ask(session)
            took = time.monotonic() - begin
            self._wait = FIRST_WAIT
            if found is not None:
                self._status.say("working")
                self._answer(session, found)
                last = time.monotonic()
            self._status.say("connected")
            self._stop.wait(pause(time.monotonic() - last, took))

    def _answer(self, session: Session, found: PullMessagesResponse) -> None:
        """Answer a message; an answer that is not taken is dropped: the coordinator asks again.

        Raises:
            httpx.HTTPError: the coordinator cannot be reached any more, so that a new session tells it to ask again.
        """
        begin = time.monotonic()
        try:
            reply = self._reply(session, found)
            push(session, reply, time.monotonic() - begin)
            self._status.answered()
        except UNDELIVERABLE as error:
            _log.warning("an exchange was dropped (%s)", type(error).__name__)
        except httpx.HTTPStatusError as error:
            _log.warning("an exchange was dropped (HTTP %d)", error.response.status_code)
            if error.response.status_code in (502, 503, 504):  # of a proxy: the coordinator itself was not there
                raise
        except httpx.TransportError:
            _log.warning("an exchange was dropped, for the connection broke off")
            raise

    def _reply(self, session: Session, found: PullMessagesResponse) -> Message:
        try:
            message = pull(session, found)
        except Unreadable as error:
            return Message(refusal("malformed"), reply_to=error.skeleton)
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


def settings_of(config: SiteConfig) -> LinkSettings:
    """Return what a site's configuration says of its link.

    Raises:
        ConfigError: no coordinator is named.
    """
    return LinkSettings(config.name, config.coordinator(), config.link_folder)


def main() -> None:
    """Run the link of a `site.toml`: `python -P -m client.link SITE.TOML`."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a request
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    form = "text"
    try:
        if len(sys.argv) != 2:
            raise ConfigError("usage: python -P -m client.link SITE.TOML")
        config = read_any_site(Path(sys.argv[1]))
        form = config.toml.logs.format
        set_up(form, "link", "%(asctime)s %(levelname)s %(name)s: %(message)s", known=lambda: {"site": config.name})
        run(settings_of(config), make_relay(Relay(config.socket, config.name)))
    except ConsiliumError as error:
        sys.exit(tell_end(form, "link", error))


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    """Leave whatever is going on: all of it can be left at any time."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(0)


if __name__ == "__main__":
    main()

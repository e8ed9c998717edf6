"""A true Flower `ClientApp` around `handle(request) -> reply`.

The same app serves a simulation, where `handle` is the site itself, and a hospital, where it relays to the site's
daemon. Whatever goes wrong inside leaves as a code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from common.errors import SiteRefusal
from common.messages import KINDS, REQUEST_OF, MalformedMessage, Reply, Request, from_record, refusal, to_record

Handle = Callable[[Request], Reply]
OpenSite = Callable[[Mapping[str, Any]], Handle]


class Relay(Protocol):
    """What passes records on to a site: `client.relay.Relay`, which never raises."""

    def pass_on(self, kind: str, record: RecordDict) -> RecordDict:
        """Return the answer to a request of a kind."""


_log = logging.getLogger("consilium.site")


def make_app(open_site: OpenSite) -> ClientApp:
    """Return a ClientApp whose messages go to the site that `open_site` finds for a node's configuration."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        return Message(_answer(message, open_site, context.node_config), reply_to=message)

    app.train()(answer)
    app.evaluate()(answer)
    for kind, _ in KINDS.values():
        category, _, action = kind.partition(".")
        if category == "query":
            app.query(action)(answer)
    return app


def make_relay(relay: Relay) -> ClientApp:
    """Return a ClientApp that passes records on as they are, if they are of a kind that a site answers."""
    return _Relayed(relay)


class _Relayed(ClientApp):
    """Answers every message, also of types that Flower would find no function for."""

    def __init__(self, relay: Relay) -> None:
        super().__init__()
        self._relay = relay

    def __call__(self, message: Message, context: Context) -> Message:  # noqa: ARG002
        """Return the answer to a message."""
        kind = message.metadata.message_type
        if kind in REQUEST_OF and message.has_content():
            return Message(self._relay.pass_on(kind, message.content), reply_to=message)
        return Message(refusal("malformed"), reply_to=message)


def _answer(message: Message, open_site: OpenSite, node: Mapping[str, Any]) -> RecordDict:
    """Return the records of the reply, or of a refusal."""
    try:
        request = _read(message)
        return to_record(open_site(node)(request))
    except SiteRefusal as error:
        return refusal(error.code)
    except Exception:  # noqa: BLE001  its text may hold a path or a patient's name: it stays in the site's own log
        _log.exception("a request failed")
        return refusal("internal")


def _read(message: Message) -> Request:
    try:
        request: Request = from_record(message.content, REQUEST_OF[message.metadata.message_type])
    except (MalformedMessage, SiteRefusal):  # a refusal is no request
        raise SiteRefusal("malformed") from None
    return request

"""A true Flower `ClientApp` around `handle(request) -> reply`.

The same app serves a simulation, where `handle` is the site itself, and a hospital, where it relays to the site's
daemon. Whatever goes wrong inside leaves as a code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from common.errors import SiteRefusal
from common.messages import KINDS, REQUEST_OF, MalformedMessage, Reply, Request, from_record, refusal, to_record

Handle = Callable[[Request], Reply]
OpenSite = Callable[[Mapping[str, Any]], Handle]

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

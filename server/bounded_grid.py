"""Flower's grid as an engine uses it: it never waits for a site, and takes in no reply larger than can be.

A reply is announced before its parts are there. Flower's own grid waits for them, for minutes if the site's line has
gone dead meanwhile, and nobody else is heard that long. Here parts are fetched as they come, and a reply is handed on
when it is whole. None of its parts is larger than the front takes in, so their number bounds a reply before a byte of
it is fetched.

Source: flwr 1.41, `flwr.superlink.grid.http_grid`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import cast

from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
)
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import HttpGrid

from server.federation import TOO_LARGE, UNREADABLE

OBJECT_BYTES = 5 * 2**20
"""Bytes of an array that Flower puts into one object."""

WRAPPING = 16
"""Objects that an honest reply has besides: a message, its records, small arrays."""

TRIES, PAUSE_S = 4, 0.02
"""How often, and after how many seconds, a part is asked for again before others are heard: it may be on its way."""

FORGOTTEN_S = 600.0
"""Seconds after which a reply that nobody asks for any more is dropped."""


@dataclass
class _Arriving:
    """A reply of which some parts are there."""

    message_id: str
    missing: list[str]
    asked: float
    held: dict[str, bytes] = field(default_factory=dict)

    def fetch(self, pull: Callable[[str], bytes]) -> bool:
        """Fetch what is there by now, and return whether it is whole.

        Raises:
            ObjectPullError: a part is gone for good.
        """
        while self.missing:
            try:
                self.held[self.missing[-1]] = _soon(pull, self.missing[-1])
            except ObjectUnavailableError:
                return False
            self.missing.pop()
        return True


class BoundedGrid(HttpGrid):
    """A grid that waits for nobody and declines what is too large.

    Args:
        where: host and port of the inner listener.
        token: of the run's task.
        client: knows the operator's secret, and when to give up.
        largest: bytes of a reply's arrays at most.
    """

    def __init__(self, where: str, token: str, client: RuntimeHttpClient, largest: int) -> None:
        super().__init__(runtime_api_address=where, insecure=True, token=token)
        self._client = client
        self._most = WRAPPING + -(-largest // OBJECT_BYTES)
        self._arriving: dict[str, _Arriving] = {}  # by the message that is replied to

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Yield the replies to some messages that are whole by now; one that cannot be had is an error."""
        wanted = list(message_ids)
        yield from self._announced([one for one in wanted if one not in self._arriving])
        begin = time.monotonic()
        for reply_to in wanted:
            if reply_to in self._arriving:
                self._arriving[reply_to].asked = begin
                yield from self._whole(reply_to)
        for reply_to in [one for one, held in self._arriving.items() if held.asked < begin - FORGOTTEN_S]:
            del self._arriving[reply_to]

    def _announced(self, wanted: list[str]) -> Iterator[Message]:
        """Take note of replies that are on their way, and yield an error for each that is too large."""
        if not wanted:
            return
        found = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=wanted))
        for head, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            parts = [part.object_id for _, part in zip(range(self._most + 1), iterate_object_tree(tree), strict=False)]
            if len(parts) > self._most:
                yield self._error(head.metadata.reply_to_message_id, TOO_LARGE)
            else:
                arriving = _Arriving(head.metadata.message_id, list(dict.fromkeys(parts)), time.monotonic())
                self._arriving[head.metadata.reply_to_message_id] = arriving

    def _whole(self, reply_to: str) -> Iterator[Message]:
        """Yield a reply if it is whole; it is held no longer then."""
        arriving = self._arriving[reply_to]
        node, run_id = self.node, cast(Run, self._run).run_id
        try:
            if not arriving.fetch(make_pull_object_fn_protobuf(self._runtime_client.PullObject, node, run_id)):
                return
        except ObjectPullError:
            del self._arriving[reply_to]
            yield self._error(reply_to, ErrorCode.MESSAGE_UNAVAILABLE)
            return
        del self._arriving[reply_to]
        received = ConfirmMessageReceivedRequest(node=node, run_id=run_id, message_object_id=arriving.message_id)
        self._runtime_client.ConfirmMessageReceived(received)
        try:
            message = cast(Message, inflate_object_from_contents(arriving.message_id, arriving.held))
            message.metadata.__dict__["_message_id"] = arriving.message_id
        except Exception:  # noqa: BLE001  whatever a site has put together, it is no message
            yield self._error(reply_to, UNREADABLE)
            return
        yield message

    def _error(self, reply_to: str, code: int) -> Message:
        node, run_id = self.node.node_id, cast(Run, self._run).run_id
        facts = Metadata(run_id, "", node, node, reply_to, "", now().timestamp(), 0.0, SYSTEM_MESSAGE_TYPE)
        return make_message(metadata=facts, error=Error(code, "cannot be had"))


def _soon(pull: Callable[[str], bytes], part: str) -> bytes:
    """Return a part, asked for a few times within a moment.

    Raises:
        ObjectUnavailableError: it is not there yet.
        ObjectPullError: it never will be.
    """
    for _ in range(TRIES - 1):
        try:
            return pull(part)
        except ObjectUnavailableError:
            time.sleep(PAUSE_S)
    return pull(part)

"""Flower's grid as an engine uses it: over a client that knows when to give up, and never a reply larger than can be.

What a site sends travels in objects, none of which is larger than the front takes in. So the number of a reply's
objects bounds its size before a byte of it is fetched.

Source: flwr 1.41, `flwr.superlink.grid.http_grid`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, cast

from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import HttpGrid, http_grid

from server.federation import TOO_LARGE

OBJECT_BYTES = 5 * 2**20
"""Bytes of an array that Flower puts into one object."""

WRAPPING = 16
"""Objects that an honest reply has besides: a message, its records, small arrays."""

# An object is announced before it is there. Flower waits a second before it asks again, which is most of a short round.
http_grid.pull_objects = functools.partial(pull_objects, initial_backoff=0.02, backoff_cap=0.5)  # type: ignore[attr-defined]


class BoundedGrid(HttpGrid):
    """A grid that declines what is too large.

    Args:
        where: host and port of the inner listener.
        token: of the run's task.
        client: knows the operator's secret, and when to give up.
        largest: bytes of a reply's arrays at most.
    """

    def __init__(self, where: str, token: str, client: RuntimeHttpClient, largest: int) -> None:
        super().__init__(runtime_api_address=where, insecure=True, token=token)
        self._declining = _Declining(client, WRAPPING + -(-largest // OBJECT_BYTES))
        self._client = cast(RuntimeHttpClient, self._declining)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there; one that is too large as an error of the code `TOO_LARGE`."""
        found = list(super().pull_messages(message_ids))
        found += [self._error(reply_to) for reply_to in self._declining.taken()]
        return found

    def _error(self, reply_to: str) -> Message:
        node = self.node.node_id
        facts = Metadata(self.run.run_id, "", node, node, reply_to, "", now().timestamp(), 0.0, SYSTEM_MESSAGE_TYPE)
        return make_message(metadata=facts, error=Error(TOO_LARGE, "too large"))


class _Declining:
    """A client that hands on everything but heads of messages with too many objects, which it notes."""

    def __init__(self, client: RuntimeHttpClient, most: int) -> None:
        self._client = client
        self._most = most
        self._declined: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def PullMessages(self, request: Any) -> Any:  # noqa: N802  Flower's name
        found = self._client.PullMessages(request)
        for index in reversed(range(len(found.message_object_trees))):
            if _more(found.message_object_trees[index], self._most):
                self._declined.append(found.messages_list[index].metadata.reply_to_message_id)
                del found.messages_list[index], found.message_object_trees[index]
        return found

    def taken(self) -> list[str]:
        """Return which messages were replied to by what was declined since this was last asked."""
        declined, self._declined = self._declined, []
        return declined


def _more(tree: ObjectTree, most: int) -> bool:
    return any(number > most for number, _ in enumerate(iterate_object_tree(tree), start=1))

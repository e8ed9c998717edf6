from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from server import bounded_grid
from server.bounded_grid import BoundedGrid
from server.federation import TOO_LARGE, UNREADABLE


class Store:
    """What a SuperLink holds of one reply, and when."""

    def __init__(self, reply: Message) -> None:
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.head = message_to_proto(remove_content_from_message(reply))
        self.tree = get_object_tree(reply)
        self.parts = {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}
        self.there: set[str] = set()
        self.gone: set[str] = set()
        self.heads_asked = 0
        self.confirmed: list[str] = []

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:  # noqa: N802  Flower's name
        self.heads_asked += 1
        if self.heads_asked > 1 or not request.message_ids:  # a head is handed out once
            return PullAppMessagesResponse()
        return PullAppMessagesResponse(messages_list=[self.head], message_object_trees=[self.tree])

    def PullObject(self, request: Any) -> PullObjectResponse:  # noqa: N802  Flower's name
        name = request.object_id
        there = name in self.there
        content = self.parts[name] if there else b""
        return PullObjectResponse(object_found=name not in self.gone, object_available=there, object_content=content)

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802  Flower's name
        self.confirmed.append(request.message_object_id)


def a_reply(arrays: int = 3) -> Message:
    facts = Metadata(3, "asked", 1, 7, "", "", time.time(), 60.0, "train")
    asked = make_message(metadata=facts, content=RecordDict({}))
    values = {str(number): Array(np.full(5, number, np.float32)) for number in range(arrays)}
    return Message(RecordDict({"arrays": ArrayRecord(values)}), reply_to=asked)


@pytest.fixture
def store() -> Store:
    return Store(a_reply())


def grid_over(store: Store, largest: int = 0) -> BoundedGrid:
    grid = BoundedGrid("127.0.0.1:1", "token", store, largest)  # type: ignore[arg-type]
    grid._run = SimpleNamespace(run_id=3)  # type: ignore[assignment]
    return grid


def pulled(grid: BoundedGrid) -> list[Message]:
    return list(grid.pull_messages(["asked", "another"]))


def test_a_reply_whose_parts_do_not_come_keeps_nobody_waiting(store: Store) -> None:
    grid = grid_over(store)
    store.there = set(list(store.parts)[:2])
    begin = time.monotonic()
    assert [pulled(grid) for _ in range(3)] == [[], [], []]
    assert time.monotonic() - begin < 2.0
    store.there = set(store.parts)
    (found,) = pulled(grid)
    assert store.confirmed == [found.metadata.message_id] == [store.tree.object_id]
    assert found.metadata.reply_to_message_id == "asked"
    arrays = found.content.array_records["arrays"]
    assert [float(array.numpy()[0]) for array in arrays.values()] == [0.0, 1.0, 2.0]
    assert pulled(grid) == [], "once"


def test_a_reply_with_too_many_parts_is_not_fetched(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_grid, "WRAPPING", len(store.parts) - 1)
    store.there = set(store.parts)
    (found,) = pulled(grid_over(store))
    assert (found.error.code, found.metadata.reply_to_message_id) == (TOO_LARGE, "asked")
    assert not store.confirmed
    assert not pulled(grid_over(store, largest=1)), "and one part more may be there with a larger bound"


def test_a_part_that_is_gone_for_good_is_a_loss_on_the_way(store: Store) -> None:
    store.gone = set(store.parts)
    (found,) = pulled(grid_over(store))
    assert (found.error.code, found.metadata.reply_to_message_id) == (ErrorCode.MESSAGE_UNAVAILABLE, "asked")


def test_parts_that_make_no_message_are_no_reply(store: Store) -> None:
    store.parts = dict.fromkeys(store.parts, b"nothing that Flower knows")
    store.there = set(store.parts)
    (found,) = pulled(grid_over(store))
    assert found.error.code == UNREADABLE


def test_a_reply_that_nobody_asks_for_any_more_is_dropped(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = grid_over(store)
    assert not pulled(grid) and len(grid._arriving) == 1
    monkeypatch.setattr(bounded_grid, "FORGOTTEN_S", -1.0)
    assert not list(grid.pull_messages(["another"])) and not grid._arriving

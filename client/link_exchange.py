"""A message on its way through the link: fetched from the coordinator in parts, and its answer brought back in parts.

A message and its answer are trees of objects, each of which travels by itself under the name of its hash.
"""

from __future__ import annotations

import logging

import httpx
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse, PushMessagesRequest
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

from client.link_session import Session

OBJECT_PAUSE, LAST_OBJECT_PAUSE = 0.02, 2.0
"""Seconds between two questions for a part of a message that the coordinator is still writing: at first, at most."""

OBJECT_PATIENCE = 120.0
"""Seconds after which a message whose parts do not come is dropped: who was sending it is gone."""

UNDELIVERABLE = (ObjectPullError, ObjectPushError)
"""What a part that does not come, or is not taken, ends in."""

_log = logging.getLogger("consilium.link")


class Unreadable(Exception):
    """What was sent is no message of records; `skeleton` is what can be replied to."""

    def __init__(self, skeleton: Message) -> None:
        super().__init__("no message of records")
        self.skeleton = skeleton


def ask(session: Session) -> PullMessagesResponse | None:
    """Return what waits for this site: the head of one message, or None.

    Raises:
        httpx.HTTPError: the coordinator cannot be reached, or does not want to hear of this site.
    """
    found = session.client.PullMessages(PullMessagesRequest(node=session.node))
    return found if found.messages_list else None


def pull(session: Session, found: PullMessagesResponse) -> Message:
    """Return the message of a head.

    Raises:
        Unreadable: it is none.
        ObjectPullError: a part of it does not come.
        httpx.HTTPError: as `ask`.
    """
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
    except (httpx.HTTPError, *UNDELIVERABLE):
        raise
    except Exception:  # noqa: BLE001  whatever was sent, it is no message
        _log.exception("a message cannot be read")
        raise Unreadable(skeleton) from None
    return message


def push(session: Session, reply: Message, seconds: float) -> None:
    """Bring an answer to the coordinator.

    Args:
        session: the connection.
        reply: the answer.
        seconds: what it took to make.

    Raises:
        ObjectPushError: a part of it is not taken.
        httpx.HTTPError: as `ask`.
    """
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

"""The sites of a run behind Flower's `Grid`: one request to each, its answers as they come, within a deadline.

The list of sites is explicit. Who does not answer in time is lost, who declines is refused, what cannot be read is
quarantined; none of it stops the others.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.errors import QuorumLost, SiteRefusal
from common.messages import (
    KINDS,
    Describe,
    Description,
    MalformedMessage,
    Reply,
    Request,
    count_bytes,
    from_record,
    to_record,
)

POLL_S = 0.05
Status = Literal["contributed", "lost", "refused", "quarantined"]


@dataclass(frozen=True)
class Traffic:
    """Bytes of message contents: weights apart from everything else."""

    weights_down: int = 0
    weights_up: int = 0
    other_down: int = 0
    other_up: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        """Return the sum."""
        return Traffic(
            self.weights_down + other.weights_down,
            self.weights_up + other.weights_up,
            self.other_down + other.other_down,
            self.other_up + other.other_up,
        )


@dataclass(frozen=True)
class Answer:
    """What came of a request to one site."""

    site: str
    reply: Reply | None
    status: Status
    reason: str = ""
    traffic: Traffic = Traffic()


class Federation:
    """The named sites of a run.

    Args:
        grid: Flower's grid.
        deadline_s: seconds a site has for an answer.
    """

    def __init__(self, grid: Grid, deadline_s: float) -> None:
        self._grid = grid
        self._deadline_s = deadline_s
        self._nodes: dict[str, int] = {}

    @property
    def sites(self) -> list[str]:
        """The sites that were found, in text order."""
        return sorted(self._nodes)

    def find(self, names: Sequence[str], run: str) -> dict[str, Answer]:
        """Describe the run to every node and learn which site each one is; return the answers of `names`.

        Nodes of other names are left alone for the rest of the run.
        """
        nodes = self._await_nodes(len(names))
        request = to_record(Describe(run))
        answers: dict[str, Answer] = {}
        for node, answer in self._exchange({node: (str(node), request) for node in nodes}, Description):
            if isinstance(answer.reply, Description) and answer.reply.site in names:
                site = answer.reply.site
                if site not in self._nodes:
                    self._nodes[site] = node
                    answers[site] = Answer(site, answer.reply, answer.status, answer.reason, answer.traffic)
        return {name: answers.get(name, Answer(name, None, "lost", "absent")) for name in sorted(names)}

    def ask(self, requests: Mapping[str, Request]) -> Iterator[Answer]:
        """Send each site its request and yield the answers as they come; the last may be losses.

        One request object for several sites is encoded once.
        """
        records: dict[int, RecordDict] = {}
        addressed: dict[int, tuple[str, RecordDict]] = {}
        expected: type[Reply] | None = None
        for site, request in sorted(requests.items()):
            if id(request) not in records:
                records[id(request)] = to_record(request)
            addressed[self._nodes[site]] = (site, records[id(request)])
            expected = KINDS[type(request)][1]
        if expected is not None:
            kind = KINDS[type(next(iter(requests.values())))][0]
            for _, answer in self._exchange(addressed, expected, kind):
                yield answer

    def _await_nodes(self, count: int) -> list[int]:
        """Return the connected nodes once there are enough of them, or those there are at the deadline."""
        end = time.monotonic() + self._deadline_s
        while True:
            nodes = sorted(self._grid.get_node_ids())
            if len(nodes) >= count or time.monotonic() >= end:
                return nodes
            time.sleep(POLL_S)

    def _exchange(
        self,
        addressed: Mapping[int, tuple[str, RecordDict]],
        expected: type[Reply],
        kind: str = KINDS[Describe][0],
    ) -> Iterator[tuple[int, Answer]]:
        messages = [Message(record, dst_node_id=node, message_type=kind) for node, (_, record) in addressed.items()]
        waiting = dict(zip(self._grid.push_messages(messages), addressed, strict=True))
        sent = {id(record): count_bytes(record) for _, record in addressed.values()}
        end = time.monotonic() + self._deadline_s
        while waiting:
            arrived = list(self._grid.pull_messages(list(waiting)))
            for message in arrived:
                node = waiting.pop(message.metadata.reply_to_message_id, None)
                if node is None:  # a repeat, or an answer to an earlier question
                    continue
                site, record = addressed[node]
                yield node, _answer(site, message, expected, sent[id(record)])
            if not arrived:
                if time.monotonic() >= end:
                    break
                time.sleep(POLL_S)
        for node in waiting.values():
            site, record = addressed[node]
            down = sent[id(record)]
            yield node, Answer(site, None, "lost", "deadline", Traffic(weights_down=down[0], other_down=down[1]))


def _answer(site: str, message: Message, expected: type[Reply], down: tuple[int, int]) -> Answer:
    """Judge one reply; the text of a Flower error is not passed on, for it may hold anything."""
    if message.has_error():
        return Answer(site, None, "lost", "unreachable", Traffic(weights_down=down[0], other_down=down[1]))
    up = count_bytes(message.content)
    traffic = Traffic(down[0], up[0], down[1], up[1])
    try:
        return Answer(site, from_record(message.content, expected), "contributed", traffic=traffic)
    except SiteRefusal as refusal:
        return Answer(site, None, "refused", refusal.code, traffic)
    except MalformedMessage:
        return Answer(site, None, "quarantined", "unreadable", traffic)


def require_quorum(usable: int, quorum: int, total: int, what: str) -> None:
    """Check that enough sites are in.

    Raises:
        QuorumLost: too few, with what to do.
    """
    if usable < quorum:
        raise QuorumLost(
            f"{what}: {usable} of {total} sites gave a usable answer, the quorum is {quorum}; "
            "mend the sites and run again with --resume, or start a run with a lower --quorum"
        )

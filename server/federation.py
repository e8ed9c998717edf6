"""The sites of a run behind Flower's `Grid`: one request to each, its answers as they come, within a deadline.

The list of sites is explicit. Who does not answer in time is lost, who declines is refused, what cannot be read is
quarantined; none of it stops the others.

On a network (a `roster` is given) an answer can be lost, and the work of a site takes longer than a message may: the
site says `Pending`, and is asked again. Whatever went wrong on the way is asked again too, for a request that comes
twice finds its work done. A site of which nothing is heard is waited for `patience_s`, then it is lost; the next time
it has to show itself sooner. So a site that is dead does not cost the others a deadline each round.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.errors import SiteRefusal
from common.messages import (
    KINDS,
    Collect,
    Describe,
    Description,
    MalformedMessage,
    Pending,
    Reply,
    Request,
    count_bytes,
    from_record,
    packed,
    pending,
    to_bytes,
    to_record,
    unpacked,
)

POLL_S = 0.05
SLOWEST_POLL_S = 0.5
LOOK_S = 1.0
"""Seconds between two looks at who is connected."""

EXCUSED_S = 5.0
"""Seconds without a look at any site that no site pays for; a coordinator that is merely busy looks more often."""

LONGEST_EXCHANGE_S, SLOWEST_BYTES_S = 60.0, 50_000
"""An answer that is later than this many seconds and bytes a second was lost on the way, and is asked for again."""

PROBATION_S = 30.0
"""Seconds that a site has to show itself if it was lost when last asked."""

MOST_DEADLINES = 23
"""Deadlines by which a site that goes on working may be late while the run is prepared: a day, by default."""

AGAIN = frozenset({"unavailable", "no_room", "unknown_ticket"})
"""Refusals that a site gets over by itself: its daemon is starting, or was started anew."""

TOO_LARGE, UNREADABLE = 100, 101
"""Codes of errors that stand for a reply which is larger than any that was asked for, or none; Flower's are below."""

_MISMADE = {TOO_LARGE: "too_large", UNREADABLE: "unreadable"}

_PHASE = re.compile("[a-z][a-z ]{0,23}")

Status = Literal["contributed", "lost", "refused", "quarantined"]


@dataclass(frozen=True)
class Present:
    """A site that is connected."""

    node: int
    since: str  # when it came up: another text after each restart


Roster = Callable[[], Mapping[str, Present]]
"""Returns who is connected, by name."""

Watch = Callable[[str, str, int, int], None]
"""Told of a site, what it is at, and how much of it is done: for whoever looks on."""

Moved = Callable[[str, "Traffic"], None]
"""Told of a site and the bytes that its request and answer took."""


@dataclass(frozen=True)
class Network:
    """What a federation over a network needs to know of it."""

    roster: Roster
    patience_s: float = 120.0  # how long a site of which nothing is heard is waited for
    pull_bytes: int = 64 * 2**20  # replies that are taken in at once


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


@dataclass
class _Errand:
    """One site's request on its way: sent, worked at, asked for again."""

    site: str
    node: int
    kind: str
    record: RecordDict  # as it travels
    weight: tuple[int, int]  # bytes in it, weights and all else
    packed: bool = False  # over a network
    message: str = ""  # identity of what is out; empty: nothing is
    sent: float = 0.0
    since: str = ""  # of the node that has it
    ticket: str = ""  # of the work that the site is at
    begun: float = field(default_factory=time.monotonic)
    due: float = 0.0
    done: tuple[str, int] = ("", 0)  # phase of the work, and how much of it is done
    moved: float = 0.0  # when that changed, where it gives the site more time
    failures: int = 0
    life: float = field(default_factory=time.monotonic)  # when the site was last heard of
    trouble: str = "deadline"  # why nothing is heard of it
    traffic: Traffic = Traffic()

    def next_message(self) -> Message:
        """Return what is to be sent: the request, or the question after its answer."""
        if self.ticket:
            plain, kind = to_record(Collect(self.ticket)), KINDS[Collect][0]
            weights, other = count_bytes(plain)
            record = packed(to_bytes(plain)) if self.packed else plain
        else:
            record, kind, (weights, other) = self.record, self.kind, self.weight
        self.traffic = self.traffic + Traffic(weights_down=weights, other_down=other)
        return Message(record, dst_node_id=self.node, message_type=kind)

    def again(self, *, unknown: bool = False) -> None:
        """Send once more what was out, the later the more often that failed; if its ticket is unknown, the request."""
        self.message, self.ticket = "", "" if unknown else self.ticket
        self.due = time.monotonic() + min(10.0, 0.1 * 3**self.failures)
        self.failures += 1

    def wait(self, found: Pending) -> None:
        """Ask after the work, the later the longer it has taken."""
        self.message, self.ticket, self.failures = "", found.ticket, 0
        self.life, self.trouble = time.monotonic(), "deadline"
        self.due = time.monotonic() + min(5.0, 0.05 * (time.monotonic() - self.begun))


class Federation:
    """The named sites of a run.

    Args:
        grid: Flower's grid.
        deadline_s: seconds a site has for an answer.
        network: where the sites are processes of their own; None: every node of the grid is asked for its name, once.
        watch: told of the sites.
        moved: told of what each answer took.
    """

    def __init__(
        self,
        grid: Grid,
        deadline_s: float,
        network: Network | None = None,
        watch: Watch | None = None,
        moved: Moved | None = None,
    ) -> None:
        self._grid = grid
        self._deadline_s = deadline_s
        self._network = network
        self._watch = watch or (lambda _site, _what, _done, _total: None)
        self._moved = moved or (lambda _site, _traffic: None)
        self._nodes: dict[str, int] = {}
        self._silent: set[str] = set()  # who was lost when last asked

    @property
    def sites(self) -> list[str]:
        """The sites that were found, in text order."""
        return sorted(self._nodes)

    def find(self, names: Sequence[str], request: Describe) -> dict[str, Answer]:
        """Describe the run and learn which node each site is; return the answers of `names`.

        On a network, nodes that are enrolled under other names are sent nothing. In a process, every node is asked who
        it is, and those of other names are left alone for the rest of the run.
        """
        record = to_record(request)
        nodes = self._connected(names) if self._network else {str(node): node for node in self._await_nodes(len(names))}
        if self._network:
            self._silent.update(name for name in names if name not in nodes)
        answers: dict[str, Answer] = {}
        addressed = {key: (node, record) for key, node in nodes.items()}
        for answer in self._exchange(addressed, Description, preparing=True):
            named = self._named(answer)
            if named is not None and named.site in names and named.site not in answers:
                self._nodes[named.site] = nodes[answer.site]
                answers[named.site] = named
        return {name: answers.get(name, Answer(name, None, "lost", "absent")) for name in sorted(names)}

    def present(self, names: Sequence[str]) -> list[str]:
        """Return which of some sites are connected now; in a process nobody comes or goes."""
        there = self._network.roster() if self._network and names else {}
        return [name for name in names if name in there]

    def _named(self, answer: Answer) -> Answer | None:
        """Return the answer under the site's name: the one it was enrolled under, or the one it gives."""
        given = answer.reply.site if isinstance(answer.reply, Description) else None
        if self._network:
            same = given is None or given == answer.site
            return answer if same else replace(answer, reply=None, status="quarantined", reason="identity")
        return None if given is None else replace(answer, site=given)

    def ask(
        self, requests: Mapping[str, Request], within_s: float | None = None, *, preparing: bool = False
    ) -> Iterator[Answer]:
        """Send each site its request and yield the answers as they come; the last may be losses.

        One request object for several sites is encoded once.

        Args:
            requests: by site.
            within_s: seconds for this once, instead of the federation's deadline.
            preparing: whether the deadline is one of standstill: images that pass the trunk take as long as they take.
        """
        if not requests:
            return
        records: dict[int, RecordDict] = {}
        for request in requests.values():
            if id(request) not in records:
                records[id(request)] = to_record(request)
        addressed = {site: (self._nodes[site], records[id(request)]) for site, request in sorted(requests.items())}
        kind, expected = KINDS[type(next(iter(requests.values())))]
        yield from self._exchange(addressed, expected, kind, within_s, preparing=preparing)

    def _await_nodes(self, count: int) -> list[int]:
        """Return the connected nodes once there are enough of them, or those there are at the deadline."""
        end = time.monotonic() + self._deadline_s
        while True:
            nodes = sorted(self._grid.get_node_ids())
            if len(nodes) >= count or time.monotonic() >= end:
                return nodes
            time.sleep(POLL_S)

    def _connected(self, names: Sequence[str]) -> dict[str, int]:
        """Return the nodes of these names once all are connected, or those there are when patience ends."""
        network = self._network
        assert network is not None  # noqa: S101  asked for on a network alone
        end = time.monotonic() + min(self._deadline_s, network.patience_s)
        while True:
            there = {name: present.node for name, present in network.roster().items() if name in names}
            for name in names:
                self._watch(name, "connected" if name in there else "awaited", 0, 0)
            if len(there) == len(names) or time.monotonic() >= end:
                return there
            time.sleep(SLOWEST_POLL_S)

    def _exchange(
        self,
        addressed: Mapping[str, tuple[int, RecordDict]],
        expected: type[Reply],
        kind: str = KINDS[Describe][0],
        within_s: float | None = None,
        *,
        preparing: bool,
    ) -> Iterator[Answer]:
        parcels = {id(record): self._parcel(record) for _, record in addressed.values()}
        errands = [
            _Errand(site, node, kind, *parcels[id(record)], packed=self._network is not None)
            for site, (node, record) in addressed.items()
        ]
        deadline_s = self._deadline_s if within_s is None else within_s
        silent = frozenset(self._silent)
        exchange = _Exchange(self._grid, self._network, self._watch, expected, silent, preparing=preparing)
        for answer in exchange.answers(errands, deadline_s):
            (self._silent.add if answer.status == "lost" else self._silent.discard)(answer.site)
            self._moved(answer.site, answer.traffic)
            yield answer

    def _parcel(self, record: RecordDict) -> tuple[RecordDict, tuple[int, int]]:
        """Return records as they travel, and the bytes in them: weights and all else."""
        return (packed(to_bytes(record)) if self._network else record), count_bytes(record)


class _Exchange:
    """One request to several sites, until each has answered or is given up."""

    def __init__(
        self,
        grid: Grid,
        network: Network | None,
        watch: Watch,
        expected: type[Reply],
        silent: Collection[str],
        *,
        preparing: bool,
    ) -> None:
        self._grid = grid
        self._network = network
        self._watch = watch
        self._expected = expected
        self._silent = silent
        self._preparing = preparing
        self._open: dict[str, _Errand] = {}
        self._looked = time.monotonic()
        self._found: tuple[float, Mapping[str, Present]] = (float("-inf"), {})

    def answers(self, errands: Iterable[_Errand], deadline_s: float) -> Iterator[Answer]:
        """Yield an answer for every errand."""
        self._open = {errand.site: errand for errand in errands}
        begin = quiet = time.monotonic()
        while self._open:
            turn = time.monotonic()
            self._send()
            found = False
            for answer in chain(self._receive(), self._look(turn)):  # one at a time: they may be large
                found = True
                yield answer
            now = time.monotonic()
            quiet = now if found else quiet
            if not found:
                moved = max([begin, *(errand.moved for errand in self._open.values())])
                if now >= min(moved, begin + MOST_DEADLINES * deadline_s) + deadline_s:
                    break
                time.sleep(min(SLOWEST_POLL_S, max(POLL_S, (now - quiet) / 20)) if self._network else POLL_S)
        for errand in self._open.values():
            yield Answer(errand.site, None, "lost", "deadline", errand.traffic)

    def _excuse(self, seconds: float) -> None:
        """Let no site pay for time in which nobody could be heard: the SuperLink was away, or a reply was taken in."""
        if seconds >= EXCUSED_S:
            for errand in self._open.values():
                errand.life += seconds

    def _send(self) -> None:
        now = time.monotonic()
        due = [errand for errand in self._open.values() if not errand.message and errand.due <= now]
        if not due:
            return
        connected = self._connected(now)
        for errand in due:
            errand.since = connected[errand.site].since if errand.site in connected else ""
        for errand, identity in zip(due, self._grid.push_messages([e.next_message() for e in due]), strict=True):
            errand.message, errand.sent = identity or "", now
            if not identity:
                errand.again()

    def _connected(self, now: float) -> Mapping[str, Present]:
        """Return who was connected within the last `LOOK_S`: sites come due one by one, and each question costs."""
        if self._network is not None and now >= self._found[0] + LOOK_S:
            self._found = now, self._network.roster()
        return self._found[1]

    def _receive(self) -> Iterator[Answer]:
        out = {errand.message: errand for errand in self._open.values() if errand.message}
        for group in self._groups(list(out)):
            messages = list(self._grid.pull_messages(group))
            while messages:
                answer = self._taken(out, messages.pop(0))
                if answer is not None:
                    yield answer
                del answer  # it may be large, and the next one too

    def _taken(self, out: dict[str, _Errand], message: Message) -> Answer | None:
        """Return what a message means, None for one that ends no errand."""
        errand = out.pop(message.metadata.reply_to_message_id, None)
        if errand is None:  # a repeat, or an answer to an earlier question
            return None
        answer = self._judged(errand, message)
        if answer is not None:
            del self._open[errand.site]
        return answer

    def _groups(self, identities: list[str]) -> Iterator[list[str]]:
        """Yield what may be pulled at once: replies are taken to be as large as the requests."""
        if not identities:
            return
        size = len(identities)
        if self._network:
            largest = max(sum(errand.weight) for errand in self._open.values())
            size = max(1, self._network.pull_bytes // max(1, largest))
        for start in range(0, len(identities), size):
            yield identities[start : start + size]

    def _judged(self, errand: _Errand, message: Message) -> Answer | None:
        """Return what a message means for its errand: an answer, or None where the site is asked again.

        The text of a Flower error is not passed on, for it may hold anything.
        """
        if message.has_error() and message.error.code in _MISMADE:
            return self._failed(errand, "quarantined", _MISMADE[message.error.code], again=False)
        if message.has_error():
            return self._failed(errand, "lost", "unreachable", again=True)
        try:
            content = unpacked(message.content) if self._network else message.content
            weights, other = count_bytes(content)
            errand.traffic = errand.traffic + Traffic(weights_up=weights, other_up=other)
            waiting = pending(content)
            if waiting is not None:
                phase = (
                    waiting.phase if _PHASE.fullmatch(waiting.phase) else "at work"
                )  # it is shown: no site's own text
                self._watch(errand.site, phase, waiting.done, waiting.total)
                if self._preparing and errand.done != (waiting.phase, waiting.done):
                    errand.done, errand.moved = (waiting.phase, waiting.done), time.monotonic()
                errand.wait(waiting)
                return None
            reply = from_record(content, self._expected)
        except SiteRefusal as refusal:
            return self._failed(errand, "refused", refusal.code, again=refusal.code in AGAIN)
        except MalformedMessage:
            return self._failed(errand, "quarantined", "unreadable", again=False)
        self._watch(errand.site, "answered", 0, 0)
        return Answer(errand.site, reply, "contributed", traffic=errand.traffic)

    def _failed(self, errand: _Errand, status: Status, reason: str, *, again: bool) -> Answer | None:
        """Return a failure as the answer, or None where a network may be at fault and the request goes out again."""
        if again and self._network:
            self._watch(errand.site, reason, 0, 0)
            if reason in ("unavailable", "no_room"):
                errand.trouble = reason
            errand.again(unknown=reason == "unknown_ticket")
            return None
        return Answer(errand.site, None, status, reason, errand.traffic)

    def _look(self, turn: float) -> Iterator[Answer]:
        """Ask those again who have been restarted with a message in hand, and give up who is gone for long."""
        now = time.monotonic()
        self._excuse(now - turn)
        if self._network is None or now < self._looked + LOOK_S:
            return
        self._looked = now
        connected = self._connected(now)
        for errand in list(self._open.values()):
            present = connected.get(errand.site)
            if present is None:
                errand.trouble = "absent"
                self._watch(errand.site, "not connected", 0, 0)
            else:
                self._check_message(errand, present, now)
            if now >= errand.life + self._patience_s(errand):
                del self._open[errand.site]
                yield Answer(errand.site, None, "lost", errand.trouble, errand.traffic)

    def _check_message(self, errand: _Errand, present: Present, now: float) -> None:
        """Send again what died with a link that was started anew, or was lost in some other way."""
        restarted = errand.since not in ("", present.since)
        if errand.message and (restarted or now >= errand.sent + LONGEST_EXCHANGE_S + _transfer_s(errand)):
            errand.again()
        errand.since = present.since

    def _patience_s(self, errand: _Errand) -> float:
        """Return how long a site may be silent: one that works says so within seconds; who was lost is on probation."""
        assert self._network is not None  # noqa: S101  asked on a network alone
        patience = self._network.patience_s
        return (min(patience, PROBATION_S) if errand.site in self._silent else patience) + _transfer_s(errand)


def _transfer_s(errand: _Errand) -> float:
    """Return how long a request and an answer of its size may be on their way."""
    return sum(errand.weight) / SLOWEST_BYTES_S

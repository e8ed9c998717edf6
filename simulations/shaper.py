"""Lines as long, as narrow and as bad as those between hospitals, in user space: `tc netem` without its kernel module.

Each end of the network is the file of a TUN device, so what passes are IP packets, and TCP sees what it would see on
such a line. Every line joins one site to the hub, and is the same each way:

    waits for its turn (drop-tail) -> takes its time at the line's rate -> is lost, or not -> is under way for a delay

Packets between two sites, and those to anybody else, go nowhere.
"""

from __future__ import annotations

import heapq
import math
import os
import random
import selectors
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address

_PACKET = 65536
_LOOK_S = 0.1
_IPV4 = 4


@dataclass(frozen=True)
class Line:
    """What a line does to packets, each way."""

    delay_s: float = 0.05  # one way: an echo takes twice that
    bits_s: float = 10e6
    loss: float = 0.01  # share of the packets
    waiting: int = 100  # packets that wait for their turn; one more is dropped


FREE = Line(0.0, math.inf, 0.0, 10_000)
"""A line that does nothing."""


@dataclass
class Counts:
    """What became of the packets of one direction."""

    passed: int = 0
    passed_bytes: int = 0
    lost: int = 0
    overflowed: int = 0
    cut: int = 0  # while there was no connection


@dataclass
class Way:
    """One direction of a line."""

    line: Line
    chance: random.Random
    cut: bool = False
    counts: Counts = field(default_factory=Counts)
    _departures: deque[float] = field(default_factory=deque)  # of those that wait, and of the one on its way out

    def arrival(self, size: int, now: float) -> float | None:
        """Return when a packet of so many bytes that comes now is at the other end; None if it never is.

        Examples:
            >>> way = Way(Line(delay_s=0.25, bits_s=800.0, loss=0.0, waiting=2), random.Random(0))
            >>> [way.arrival(100, now) for now in (0.0, 0.0, 0.0, 1.0)]
            [1.25, 2.25, None, 3.25]
        """
        while self._departures and self._departures[0] <= now:
            self._departures.popleft()
        if self.cut:
            self.counts.cut += 1
            return None
        if len(self._departures) >= self.line.waiting:
            self.counts.overflowed += 1
            return None
        begins = self._departures[-1] if self._departures else now
        self._departures.append(begins + 8 * size / self.line.bits_s)
        if self.chance.random() < self.line.loss:
            self.counts.lost += 1
            return None
        self.counts.passed += 1
        self.counts.passed_bytes += size
        return self._departures[-1] + self.line.delay_s


@dataclass(frozen=True)
class End:
    """An end of the network."""

    device: int  # file of a TUN device that does not block
    address: IPv4Address


class Shaper:
    """Passes packets between a hub and its sites; see `shaped`.

    Args:
        hub: where all lines end.
        sites: their other ends, by name.
        line: how the lines are.
        seed: decides which packets are lost: the same of each direction, counted in packets.
    """

    def __init__(self, hub: End, sites: Mapping[str, End], line: Line, seed: int) -> None:
        self._hub, self._sites = hub, dict(sites)
        self._ways = {
            (name, way): Way(line, random.Random(f"{seed} {name} {way}")) for name in sites for way in ("up", "down")
        }
        self._named = {end.address.packed: name for name, end in sites.items()}
        self._under_way: list[tuple[float, int, int, bytes]] = []
        self._number = 0

    def partition(self, site: str) -> None:
        """Let nothing pass a site's line any more; nobody is told."""
        self._cut(site, cut=True)

    def heal(self, site: str) -> None:
        """Let packets pass a site's line again."""
        self._cut(site, cut=False)

    def set_lines(self, line: Line) -> None:
        """Let all lines be like this from now on."""
        for way in self._ways.values():
            way.line = line

    def counts(self, site: str) -> dict[str, Counts]:
        """Return what became of a site's packets, `up` and `down`, so far."""
        return {way: self._ways[site, way].counts for way in ("up", "down")}

    def run(self, stop: threading.Event) -> None:
        """Pass packets on until `stop` is set."""
        with selectors.DefaultSelector() as selector:
            for name, end in [("", self._hub), *self._sites.items()]:
                selector.register(end.device, selectors.EVENT_READ, name)
            while not stop.is_set():
                due = self._under_way[0][0] - time.monotonic() if self._under_way else _LOOK_S
                for key, _ in selector.select(min(_LOOK_S, max(0.0, due))):
                    for packet in _packets(key.fd):
                        self._take(key.data, packet)
                self._deliver()

    def _cut(self, site: str, *, cut: bool) -> None:
        for way in ("up", "down"):
            self._ways[site, way].cut = cut

    def _take(self, source: str, packet: bytes) -> None:
        if packet[0] >> 4 != _IPV4:
            return  # the kernel asks for IPv6 neighbours
        if source:
            site, way, end = source, "up", self._hub
        else:
            site, way = self._named.get(packet[16:20], ""), "down"
            end = self._sites.get(site, self._hub)
        if end.address.packed != packet[16:20] or not site:
            return
        at = self._ways[site, way].arrival(len(packet), time.monotonic())
        if at is not None:
            self._number += 1
            heapq.heappush(self._under_way, (at, self._number, end.device, packet))

    def _deliver(self) -> None:
        now = time.monotonic()
        while self._under_way and self._under_way[0][0] <= now:
            _, _, device, packet = heapq.heappop(self._under_way)
            os.write(device, packet)


def _packets(device: int) -> Iterator[bytes]:
    """Yield what waits at a device."""
    while True:
        try:
            yield os.read(device, _PACKET)
        except BlockingIOError:
            return


@contextmanager
def shaped(hub: End, sites: Mapping[str, End], line: Line, seed: int) -> Iterator[Shaper]:
    """Let packets pass until the end of the block, in a thread."""
    shaper, stop = Shaper(hub, sites, line, seed), threading.Event()
    thread = threading.Thread(target=shaper.run, args=(stop,), name="shaper")
    thread.start()
    try:
        yield shaper
    finally:
        stop.set()
        thread.join()

"""The shaper: laws of a line, and what true packets meet on one."""

from __future__ import annotations

import random
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulations.hosts import Hosts, entered, hosts, missing
from simulations.shaper import FREE, Line, Way

needs_hosts = pytest.mark.skipif(bool(missing()), reason=missing())
LINE = Line(delay_s=0.05, bits_s=10e6, loss=0.01)
PORT = 7000

packets = st.lists(st.tuples(st.floats(0, 0.01), st.integers(40, 1500)), min_size=1, max_size=200)
"""Seconds since the packet before, and bytes."""


def sent(way: Way, gaps: list[tuple[float, int]]) -> list[tuple[float, int, float | None]]:
    """Return when each packet was sent, its size, and when it comes."""
    now, found = 0.0, []
    for gap, size in gaps:
        now += gap
        found.append((now, size, way.arrival(size, now)))
    return found


@settings(deadline=None, max_examples=50)
@given(packets)
def test_packets_keep_their_order_their_delay_and_the_lines_rate(gaps: list[tuple[float, int]]) -> None:
    line = Line(0.05, 1e6, 0.0, 10_000)
    found = sent(Way(line, random.Random(0)), gaps)
    arrivals = [at for _, _, at in found if at is not None]
    assert len(arrivals) == len(gaps), "nothing is lost, and the queue is long"
    assert arrivals == sorted(arrivals)
    for begin, size, at in found:
        assert at is not None and at >= begin + line.delay_s + 8 * size / line.bits_s - 1e-9
    for (_, _, one), (_, size, after) in pairwise(found):
        assert one is not None and after is not None and after - one >= 8 * size / line.bits_s - 1e-9


@settings(deadline=None, max_examples=50)
@given(packets, st.integers(1, 5))
def test_no_more_wait_than_may(gaps: list[tuple[float, int]], waiting: int) -> None:
    line = Line(0.0, 1e5, 0.0, waiting)
    way = Way(line, random.Random(0))
    longest = waiting * 8 * 1500 / line.bits_s
    assert all(at is None or at - begin <= longest + 1e-9 for begin, _, at in sent(way, gaps))
    assert way.counts.passed + way.counts.overflowed == len(gaps)


@settings(deadline=None, max_examples=50)
@given(packets)
def test_a_line_that_is_cut_passes_nothing(gaps: list[tuple[float, int]]) -> None:
    way = Way(LINE, random.Random(0), cut=True)
    assert all(at is None for _, _, at in sent(way, gaps))
    assert way.counts.cut == len(gaps) and way.counts.passed_bytes == 0


def test_losses_are_the_share_that_was_asked_for_and_the_same_with_the_same_seed() -> None:
    def lost(seed: int) -> list[bool]:
        way = Way(replace(LINE, waiting=10**6), random.Random(seed))
        return [at is None for _, _, at in sent(way, [(0.001, 100)] * 20_000)]

    assert 0.008 < statistics.mean(lost(0)) < 0.012
    assert lost(0) == lost(0) != lost(1)


# True packets


@pytest.fixture(scope="module")
def network() -> Iterator[Hosts]:
    def held() -> tuple[Path, int]:
        return Path("/proc/thread-self/ns/net").readlink(), len(list(Path("/proc/self/fd").iterdir()))

    before = held()
    with hosts(["site-1", "site-2"], LINE) as found, entered(found.coordinator):
        yield found
    assert held() == before


@needs_hosts
@pytest.mark.faults
def test_an_echo_takes_both_delays(network: Hosts) -> None:
    network.shaper.set_lines(replace(LINE, loss=0.0))
    with socket.create_server((network.address, PORT)):
        taken = []
        for _ in range(10):
            begin = time.monotonic()
            network.sites["site-1"].run(lambda: socket.create_connection((network.address, PORT))).close()
            taken.append(time.monotonic() - begin)
    assert min(taken) >= 0.1 and statistics.median(taken) < 0.13


@needs_hosts
@pytest.mark.faults
@pytest.mark.parametrize(("loss", "least"), [(0.0, 5.0), (0.01, 0.3)])
def test_a_stream_gets_no_more_than_the_line_has(network: Hosts, loss: float, least: float) -> None:
    # What a stream makes of a lossy line is the kernel's affair: about 1.5 Mbit/s with CUBIC, most of 10 with BBR.
    network.shaper.set_lines(replace(LINE, loss=loss))
    before = network.shaper.counts("site-1")["up"].lost
    megabits = received(network, 5.0) * 8 / 5.0 / 1e6
    assert least < megabits < 10.0
    assert (network.shaper.counts("site-1")["up"].lost > before) == (loss > 0)


def received(network: Hosts, seconds: float) -> int:
    """Return the bytes that a stream from a site brings in so many seconds."""
    with socket.create_server((network.address, PORT)) as server:
        sender = network.sites["site-1"].run(lambda: socket.create_connection((network.address, PORT)))
        reader, _ = server.accept()

    def send() -> None:
        with suppress(OSError), sender:
            while True:
                sender.sendall(bytes(65536))

    thread = threading.Thread(target=send)
    thread.start()
    total, end = 0, time.monotonic() + seconds
    with reader:
        while time.monotonic() < end:
            total += len(reader.recv(65536))
    thread.join()
    return total


@needs_hosts
@pytest.mark.faults
def test_one_packet_in_a_hundred_is_lost_and_none_comes_twice(network: Hosts) -> None:
    network.shaper.set_lines(LINE)
    count = 10_000
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**24)
        reader.bind((network.address, PORT))
        reader.settimeout(2.0)
        network.sites["site-2"].run(lambda: _send(network.address, count))
        seen = []
        with suppress(TimeoutError):
            while True:
                seen.append(int.from_bytes(reader.recv(100), "big"))
    counts = network.shaper.counts("site-2")["up"]
    assert len(seen) == len(set(seen)) and seen == sorted(seen)
    assert counts.overflowed == 0, "it was sent too fast for the queue"
    assert 0.005 < 1 - len(seen) / count < 0.015


def _send(address: str, count: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for number in range(count):
            sender.sendto(number.to_bytes(100, "big"), (address, PORT))
            if number % 20 == 0:
                time.sleep(0.005)


@needs_hosts
@pytest.mark.faults
def test_a_partition_is_silent_and_can_be_healed(network: Hosts) -> None:
    network.shaper.set_lines(FREE)

    def connect(site: str) -> None:
        network.sites[site].run(lambda: socket.create_connection((network.address, PORT), 1.0)).close()

    with socket.create_server((network.address, PORT)):
        network.shaper.partition("site-1")
        with pytest.raises(TimeoutError):
            connect("site-1")
        connect("site-2")
        network.shaper.heal("site-1")
        connect("site-1")


@needs_hosts
@pytest.mark.faults
def test_sites_cannot_reach_each_other(network: Hosts) -> None:
    network.shaper.set_lines(FREE)
    other = str(network.sites["site-2"].end.address)
    with network.sites["site-2"].run(lambda: socket.create_server((other, PORT))), pytest.raises(TimeoutError):
        network.sites["site-1"].run(lambda: socket.create_connection((other, PORT), 1.0))

"""A tap on a connection: passes bytes on between whoever connects and one address, and counts them both ways."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_CHUNK = 2**18


@dataclass(frozen=True)
class Counts:
    """Bytes that passed, as the one who connects sees them."""

    up: int = 0
    down: int = 0
    connections: int = 0

    def __add__(self, other: Counts) -> Counts:
        """Return the sum."""
        return Counts(self.up + other.up, self.down + other.down, self.connections + other.connections)

    def __sub__(self, other: Counts) -> Counts:
        """Return what passed since."""
        return Counts(self.up - other.up, self.down - other.down, self.connections - other.connections)


class Tap:
    """Listens on a free port of the loopback interface while it is open; see `tapped`."""

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._passed = [0, 0, 0]  # up, down, connections
        self.port = 0
        self.cut = False  # whether nothing passes, as where a network is parted: nobody is told

    @property
    def counts(self) -> Counts:
        """What has passed so far."""
        return Counts(*self._passed)

    async def serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        """Pass bytes on until `stop` is set."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, limit=_CHUNK)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await stop.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0)  # transports close in the next turn of the loop

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._passed[2] += 1
        await self._joined()
        try:
            back, forth = await asyncio.open_connection(*self._target, limit=_CHUNK)
        except OSError:
            writer.close()
            return
        try:
            await asyncio.gather(self._pump(reader, forth, 0), self._pump(back, writer, 1))
        finally:
            forth.close()
            writer.close()

    async def _joined(self) -> None:
        while self.cut:
            await asyncio.sleep(0.05)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: int) -> None:
        """Pass one direction on to its end; one that breaks ends both."""
        try:
            while chunk := await reader.read(_CHUNK):
                await self._joined()
                self._passed[way] += len(chunk)
                writer.write(chunk)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()
        except OSError:
            writer.close()


@contextmanager
def tapped(port: int, host: str = "127.0.0.1") -> Iterator[Tap]:
    """Open a tap before an address; connections end with the block."""
    tap, ready = Tap(host, port), threading.Event()
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    def run() -> None:
        try:
            loop.run_until_complete(tap.serve(ready, stop))
        finally:
            ready.set()
            loop.close()

    thread = threading.Thread(target=run, name="tap")
    thread.start()
    ready.wait()
    try:
        yield tap
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()

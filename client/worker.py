"""The process that decodes: it reads paths, answers records and pixels, and is expected to die.

Its limits are set before it reads its first byte of a file: memory, file size written (none), core dumps (none). It
ends with the process that started it, has no terminal, and what C libraries print goes nowhere, for it quotes the file.

Protocol, little endian. In: the limit on memory (u8), the task as JSON, then file names, each with its length (u4)
before it. Out: `H` when it is ready, and for each file `A` and the bytes that it asks for (u8), when that is known;
then `R`, a record of `client.records.RECORD`, and behind it the pixels of the image, if there is one.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from client.decoding import read
from client.duplicates import dhash, thumb
from client.identity import Identity
from client.preprocessing import preprocess
from client.records import Entry, pack
from common.presets import Preset

LENGTH = struct.Struct("<I")
SIZE = struct.Struct("<Q")


def limit(memory: int) -> None:
    """Cap what this process may take, for good."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends, whatever it is doing then (Linux)."""
    import ctypes
    import signal

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() == 1:  # it had ended before
        os._exit(1)


@dataclass(frozen=True)
class Task:
    """What is done with each file."""

    identity: Identity
    preset: Preset
    size: int
    opted_out: frozenset[bytes]  # Identity.person of patients whose images are not decoded

    @staticmethod
    def parse(text: bytes) -> Task:
        """Read what `client.pool` wrote."""
        setup = json.loads(text)
        lists = {"hu_windows": tuple(map(tuple, setup["preset"]["hu_windows"]))}
        lists["percentiles"] = tuple(setup["preset"]["percentiles"])
        preset = Preset(**setup["preset"] | lists)
        opted_out = frozenset(map(bytes.fromhex, setup["opted_out"]))
        return Task(Identity(bytes.fromhex(setup["secret"])), preset, setup["size"], opted_out)

    def text(self) -> bytes:
        """Return the task as `parse` reads it."""
        setup = {
            "secret": self.identity.secret.hex(),
            "preset": asdict(self.preset),
            "size": self.size,
            "opted_out": [person.hex() for person in sorted(self.opted_out)],
        }
        return json.dumps(setup).encode()


def serve(source: IO[bytes], sink: IO[bytes], task: Task) -> None:
    """Answer one file name after the other until there are no more."""
    sink.write(b"H")
    sink.flush()
    while name := _next(source):
        record, pixels = look(Path(os.fsdecode(name)), task, sink)
        sink.write(b"R" + record + pixels)
        sink.flush()


def look(path: Path, task: Task, sink: IO[bytes]) -> tuple[bytes, bytes]:
    """Read one file and return its record and its preprocessed pixels, none if it gives no image."""

    def announce(asked: int) -> None:
        sink.write(b"A" + SIZE.pack(asked))
        sink.flush()

    begin = time.perf_counter()
    found = read(path, task.identity, task.preset.frame, announce, task.opted_out)
    if found.image is None:
        return pack(Entry(found.code, found.header, seconds=time.perf_counter() - begin)).tobytes(), b""
    try:
        pixels = preprocess(found.image, task.preset, task.size)
    except MemoryError:
        return pack(Entry("too_large", found.header, seconds=time.perf_counter() - begin)).tobytes(), b""
    entry = Entry(
        code="",
        header=found.header,
        kind="grey" if len(pixels) == 1 else "colour",
        digest=found.digest,
        pixel_sha256=found.image.pixel_sha256,
        dhash=dhash(pixels),
        thumb=thumb(pixels),
        seconds=time.perf_counter() - begin,
    )
    return pack(entry).tobytes(), pixels.tobytes()


def _next(source: IO[bytes]) -> bytes:
    head = source.read(LENGTH.size)
    return source.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""


def main() -> None:
    """Serve on the two descriptors that the command line names."""
    source, sink = (os.fdopen(int(number), mode) for number, mode in zip(sys.argv[1:3], ("rb", "wb"), strict=True))
    memory = SIZE.unpack(_next(source))[0]
    end_with_parent()
    limit(memory)
    serve(source, sink, Task.parse(_next(source)))


if __name__ == "__main__":
    main()

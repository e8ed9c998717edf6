"""Damaged image files by the thousand, through the processes that decode at a hospital: does every one end as told?

Each file is a good one of some syntax and kind, spoiled in one way: bits flipped, blocks copied, cut, spliced with
another, or an element of its header given another value while the file stays well formed. All of it follows from the
seed. What must hold is checked, not counted: each file has one outcome, none takes longer than its time, and the
process that asks lives and stays small.
"""

from __future__ import annotations

import io
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from client.identity import Identity
from client.image import CODES, IGNORED
from client.pool import Limits, Pool, Read
from client.worker import Task
from common.errors import ConsiliumError
from common.files import write_json
from common.presets import GENERIC
from simulations.encodings import SYNTAXES, film, write

_BATCH = 500  # files that lie on disk at a time
_SLACK_S = 30.0  # on top of what a file may take: a loaded machine, and processes that start anew

Random = np.random.Generator
Mutation = Callable[[Random, bytes, bytes], bytes]


@dataclass(frozen=True)
class Fuzzed:
    """What became of the files."""

    files: int
    outcomes: Mapping[str, int]  # code -> files; empty: an image
    seconds: float
    ended: int  # processes that died or were ended
    longest_s: float  # between two answers
    peak_bytes: int  # resident memory of the process that asks


# --------------------------------------------------------------------------------------------------------- good files


def good_files(folder: Path) -> list[bytes]:
    """Return one file of each syntax and kind, small."""
    grey, deep = film(34, 42, 8), film(34, 42, 12)
    colour = np.stack([film(34, 42, 8, seed) for seed in range(3)], axis=-1)
    clip = np.stack([film(34, 42, 8, seed) for seed in range(3)])
    kinds: list[tuple[np.ndarray[Any, Any], int, dict[str, Any]]] = [
        (grey, 8, {}),
        (deep, 12, {**_WINDOWED}),
        (deep.astype(np.int16) - 2000, 12, {**_WINDOWED, "PhotometricInterpretation": "MONOCHROME1"}),
        (colour, 8, {}),
        (clip, 8, {"Modality": "US"}),
        (grey, 8, _palette()),
    ]
    files = [
        write(folder / "file", pixels, bits, syntax, **elements).read_bytes()
        for pixels, bits, elements in kinds
        for name, syntax in SYNTAXES.items()
        if name not in ("jpeg", "jpeg-2000-lossy") or (pixels is grey and not elements) or pixels is colour
    ]
    bare = files[0][files[0].index(b"\x08\0\x16\0", 132) :]  # without preamble and meta information
    return [*files, bare, *_pictures(grey, deep, colour)]


_WINDOWED: Mapping[str, Any] = {
    "WindowCenter": ["100", "2000"], "WindowWidth": ["400", "100"], "RescaleSlope": "2", "RescaleIntercept": "-1024",
    "PixelPaddingValue": 0, "StudyDate": "20200131", "PatientID": "4711", "Manufacturer": "GE",
}  # fmt: skip


def _palette() -> dict[str, Any]:
    entries = np.arange(256, dtype="<u2") << 8
    elements: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for number, name in enumerate(("Red", "Green", "Blue")):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        elements[f"{name}PaletteColorLookupTableData"] = np.roll(entries, 80 * number).tobytes()
    return elements


def _pictures(*images: np.ndarray[Any, Any]) -> list[bytes]:
    files = []
    for pixels in images:
        for form in ("PNG", "TIFF", "JPEG"):
            if form != "JPEG" or pixels.dtype == np.uint8:
                content = io.BytesIO()
                Image.fromarray(pixels).save(content, form)
                files.append(content.getvalue())
    return files


# ---------------------------------------------------------------------------------------------------------- mutations


def _flipped(rng: Random, content: bytes, _other: bytes) -> bytes:
    spoiled = bytearray(content)
    beginning = len(content) if rng.random() < 0.5 else min(len(content), 1500)  # headers are short beside pixels
    for _ in range(int(rng.integers(1, 9))):
        spoiled[int(rng.integers(beginning))] ^= 1 << int(rng.integers(8))
    return bytes(spoiled)


def _copied(rng: Random, content: bytes, _other: bytes) -> bytes:
    length = int(rng.integers(1, 65))
    source, target = (int(rng.integers(max(1, len(content) - length))) for _ in range(2))
    return content[:target] + content[source : source + length] + content[target + length * int(rng.integers(2)) :]


def _cut(rng: Random, content: bytes, _other: bytes) -> bytes:
    return content[: int(rng.integers(len(content)))]


def _spliced(rng: Random, content: bytes, other: bytes) -> bytes:
    return content[: int(rng.integers(len(content)))] + other[int(rng.integers(len(other))) :]


_NUMBER = re.compile(rb"[\x20\x28\x54]\0..(US|SS)\x02\0", re.DOTALL)
_TEXT = re.compile(rb"[\x08\x10\x20\x28\x02]\0..(DS|IS|CS|UI|LO|DA)([\x02-\x40])\0", re.DOTALL)
_SIZE = re.compile(rb"(\xe0\x7f|\x28\0|\xfe\xff)..(OW\0\0|OB\0\0)?", re.DOTALL)
_NUMBERS = (0, 1, 2, 3, 7, 8, 9, 12, 15, 16, 24, 32, 33, 35, 64, 255, 256, 4000, 32767, 32768, 65535)
_TEXTS = (b"", b"0", b"-1", b"1e9", b"1e308", b"NaN", b"inf", b"1\\2\\3", b"2000000000", b"../../x", b"\xff\xfe\0",
          b"MONOCHROME1", b"RGB", b"YBR_FULL_422", b"PALETTE COLOR", b"CMYK", b"CT", b"SR", b"SIGMOID",
          *(str(syntax).encode() for syntax in SYNTAXES.values()))  # fmt: skip


def _edited(rng: Random, content: bytes, _other: bytes) -> bytes:
    """Give an element another value; the file stays as long as it was, and well formed."""
    pattern = (_NUMBER, _TEXT, _SIZE)[int(rng.choice(3, p=(0.45, 0.45, 0.1)))]
    found = list(pattern.finditer(content[:4000]))
    if not found:
        return _flipped(rng, content, b"")
    match = found[int(rng.integers(len(found)))]
    at = match.end()
    if pattern is _NUMBER:
        return content[:at] + int(rng.choice(_NUMBERS)).to_bytes(2, "little") + content[at + 2 :]
    if pattern is _SIZE:
        return content[:at] + int(rng.choice(2**16 - 1)).to_bytes(4, "little") + content[at + 4 :]
    length = match.group(2)[0]
    return content[:at] + _TEXTS[int(rng.integers(len(_TEXTS)))][:length].ljust(length) + content[at + length :]


_MUTATIONS: Sequence[Mutation] = (_flipped, _copied, _cut, _spliced, _edited, _edited)


def spoiled_files(good: Sequence[bytes], files: int, seed: int) -> Iterator[bytes]:
    """Yield files that were good, each spoiled in one way or two; they follow from the seed."""
    rng = np.random.default_rng(seed)
    for _ in range(files):
        content = good[int(rng.integers(len(good)))]
        for _ in range(int(rng.integers(1, 3))):
            other = good[int(rng.integers(len(good)))]
            content = _MUTATIONS[int(rng.integers(len(_MUTATIONS)))](rng, content, other) or b"\0"
        yield content


# ------------------------------------------------------------------------------------------------------------ the run


def fuzz(files: int, seed: int = 0, seconds: float = float("inf"), workers: int | None = None) -> Fuzzed:
    """Read spoiled files, and check that each ends as it must.

    Args:
        files: at most.
        seed: decides every file.
        seconds: after which no more are begun.
        workers: processes; None: one a core.

    Raises:
        ConsiliumError: a file without an outcome, or with two, or one whose time was up and that went on.
    """
    limits = Limits(base_s=10.0)
    begin = time.monotonic()
    outcomes: Counter[str] = Counter()
    longest, done = 0.0, 0
    with tempfile.TemporaryDirectory(prefix="consilium-fuzz-") as name, Pool(_task(), workers, limits) as pool:
        folder = Path(name)
        contents = spoiled_files(good_files(folder), files, seed)
        while time.monotonic() - begin < seconds and (paths := _written(folder, contents)):
            codes, waited = _outcomes(pool, paths, limits)
            outcomes.update(codes)
            longest, done = max(longest, waited), done + len(paths)
        ended = pool.started - pool.alive
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Fuzzed(done, dict(outcomes.most_common()), time.monotonic() - begin, ended, longest, peak)


def _task() -> Task:
    return Task(Identity(b"fuzz" * 8), GENERIC, 32, frozenset())


def _written(folder: Path, contents: Iterator[bytes]) -> list[Path]:
    """Write the next files in place of the ones before, and return their paths."""
    paths = []
    for number, content in zip(range(_BATCH), contents, strict=False):
        paths.append(folder / str(number))
        paths[-1].write_bytes(content)
    return paths


def _outcomes(pool: Pool, paths: Sequence[Path], limits: Limits) -> tuple[list[str], float]:
    """Return the code of each file, and the longest time between two answers."""
    codes: dict[int, str] = {}
    longest, last = 0.0, time.monotonic()
    for read in pool.read(paths):
        now = time.monotonic()
        longest, last = max(longest, now - last), now
        _check(read, codes)
        codes[read.number] = read.entry.code
    if len(codes) != len(paths):
        raise ConsiliumError(f"{len(paths) - len(codes)} of {len(paths)} files have no outcome")
    if longest > 2 * limits.base_s + _SLACK_S:
        raise ConsiliumError(f"{longest:.0f} s without an answer, where a file may take {limits.base_s:.0f} s")
    return list(codes.values()), longest


def _check(read: Read, codes: Mapping[int, str]) -> None:
    code = read.entry.code
    if read.number in codes:
        raise ConsiliumError(f"file {read.number} has two outcomes: {codes[read.number]!r} and {code!r}")
    if (code in CODES or code in IGNORED) is (read.pixels is not None):
        raise ConsiliumError(
            f"file {read.number}: got code {code!r} and {'' if read.pixels is not None else 'no '}pixels"
        )


def show(found: Fuzzed, console: Console) -> None:
    """Print what became of the files."""
    table = Table(title=f"{found.files} spoiled files in {found.seconds:.0f} s", title_justify="left")
    table.add_column("outcome")
    table.add_column("files", justify="right")
    for code, count in found.outcomes.items():
        table.add_row(code or "an image", str(count))
    console.print(table)
    console.print(
        f"{found.files / max(found.seconds, 1e-9):.0f} files/s; {found.ended} processes ended; longest wait for an "
        f"answer {found.longest_s:.1f} s; peak memory of the process that asks {found.peak_bytes / 2**20:.0f} MiB"
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--files", type=int, default=20_000, metavar="N", help="At most [20000].")
@click.option("--seconds", type=float, default=float("inf"), metavar="S", help="After which no more are begun [none].")
@click.option("--seed", type=int, default=0, metavar="N", help="Decides every file [0].")
@click.option("--workers", type=int, metavar="N", help="Processes that decode [one a core].")
@click.option("--json", "as_json", type=click.Path(path_type=Path), metavar="FILE", help="Write all figures here.")
def main(files: int, seconds: float, seed: int, workers: int | None, as_json: Path | None) -> None:
    """Read damaged image files, and check that each ends as it must."""
    found = fuzz(files, seed, seconds, workers)
    show(found, Console())
    if as_json is not None:
        write_json(as_json, asdict(found))


if __name__ == "__main__":
    try:
        main()
    except ConsiliumError as error:
        click.echo(f"fuzz: {error}", err=True)
        sys.exit(error.exit_code)

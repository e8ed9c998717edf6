"""How fast a hospital's files are taken in, side by side with the bare decoders; `make bench` prints it.

Throughput is that of the whole path, from file to preprocessed pixels on disk, in as many processes as there are
cores. It is compared with the rate at which the best decoder alone, in one process, turns the same files into arrays,
times the cores. Both run alternately on the same files, the page cache warm, and the best of each counts. The start
of the processes, once a run, is measured with one file and taken off.
"""

from __future__ import annotations

import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from client.catalogue import Catalogue
from client.identity import Identity
from common.errors import ConsiliumError
from common.presets import CHEST_XRAY
from simulations.encodings import SYNTAXES, bare_reading, dataset, film, write

KINDS = {"raw": 400, "rle": 400, "jpeg": 400, "jpeg-ls": 160, "jpeg-2000": 48}  # files of 512 x 512
SIZES = ((512, 512, 1), (2500, 2048, 12))  # rows, columns, share of the files
ROUNDS = 3
SMALL = 10_000
SIDE = 256
"""Files of the large folder, and their pixels a side."""


@dataclass(frozen=True)
class Throughput:
    """Rates of one transfer syntax and size."""

    syntax: str
    rows: int
    columns: int
    bare: float  # files a second of the best decoder alone, one process, times the cores
    whole: float  # files a second of the whole path, a process on each core

    @property
    def ratio(self) -> float:
        """The whole path as a share of the bare decoders."""
        return self.whole / self.bare


@dataclass(frozen=True)
class Examined:
    """Two examinations of one large folder by the true command."""

    files: int
    first_s: float
    again_s: float
    peak_mib: float  # the largest resident memory of any of the processes


def throughput(folder: Path, kind: str, rows: int, columns: int, files: int) -> Throughput:
    """Measure one transfer syntax at one size."""
    bits = 8 if kind == "jpeg" else 12
    paths = []
    for number in range(4):  # different images, each under several names: a copy costs as much to read
        made = write(folder / f"{kind}-{rows}-{number}", film(rows, columns, bits, number), bits, SYNTAXES[kind])
        copies = [made.with_name(f"{made.name}-{copy}") for copy in range(files // 4)]
        for path in copies:
            path.hardlink_to(made)
        paths += copies
    cores = len(os.sched_getaffinity(0))
    bare, whole = [], []
    for turn in range(ROUNDS):
        bare.append(_seconds(lambda: [bare_reading(path, SYNTAXES[kind]) for path in paths[::2]]) * 2)
        whole.append(_whole(folder / f"cache-{kind}-{rows}-{turn}", paths))
    return Throughput(kind, rows, columns, len(paths) / min(bare) * cores, len(paths) / min(whole))


def _whole(cache: Path, paths: list[Path]) -> float:
    """Return the seconds of the whole path, without the start of the processes."""

    def read(name: str, chosen: list[Path]) -> None:
        entries = Catalogue(cache / name, Identity(b"bench" * 8), CHEST_XRAY, 224).read(chosen)
        if any(entry.code for entry in entries):
            raise ConsiliumError("the bench wrote files that cannot be read")

    start = _seconds(lambda: read("one", paths[:2]))
    return _seconds(lambda: read("all", paths)) - start


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def examined(folder: Path, files: int = SMALL) -> Examined:
    """Examine a folder of small files twice with the true command."""
    images = folder / "images"
    rows = []
    for number in range(files):
        place = images / f"{number // 500:03d}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 4096, (SIDE, SIDE), np.uint16)
        data = dataset(pixels, 12, PatientID=f"P{number // 2:06d}", AccessionNumber=f"{number // 2:08d}")
        data.save_as(place / f"IM{number:05d}", enforce_file_format=True)
        rows.append((str(data.SOPInstanceUID), "yes" if number // 2 % 3 else "no"))
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("SOPInstanceUID", "finding"), *rows])
    _command("site", "init", folder / "site", "--images", images, "--labels", folder / "labels.csv")
    first, again = (
        _seconds(lambda: _command("site", "check", folder / "site" / "site.toml", "--json", "--quiet"))
        for _ in range(2)
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return Examined(files, first, again, peak)


def _command(*words: object) -> None:
    script = "from common.cli import main; main()"
    command = [sys.executable, "-P", "-c", script, *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": _ROOT})  # noqa: S603


_ROOT = str(Path(__file__).resolve().parents[1])


def _show(console: Console, rates: list[Throughput], large: Examined) -> None:
    table = Table("transfer syntax", "size", "bare x cores, files/s", "whole path, files/s", "ratio")
    for rate in rates:
        size = f"{rate.rows} x {rate.columns}"
        table.add_row(rate.syntax, size, f"{rate.bare:.1f}", f"{rate.whole:.1f}", f"{rate.ratio:.2f}")
    console.print(table)
    console.print(
        f"{large.files:,} files of {SIDE} x {SIDE}: examined in {large.first_s:.1f} s, again in {large.again_s:.1f} s;"
        f" at most {large.peak_mib:.0f} MiB in any process"
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--files", type=int, default=SMALL, metavar="N", help="Files of the large folder [10000].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, and nothing else, on stdout.")
def main(files: int, as_json: bool) -> None:
    """Measure how fast a hospital's files are taken in.

    \b
    Example:
      python -P -m simulations.intake_bench
    """  # noqa: D301
    with tempfile.TemporaryDirectory(prefix="consilium-bench-") as name:
        folder = Path(name)
        rates = [
            throughput(folder, kind, rows, columns, max(4, count // share))
            for rows, columns, share in SIZES
            for kind, count in KINDS.items()
        ]
        large = examined(folder, files)
    if as_json:
        found = {"throughput": [{**asdict(rate), "ratio": rate.ratio} for rate in rates], "large": asdict(large)}
        click.echo(json.dumps(found))
    else:
        _show(Console(), rates, large)


if __name__ == "__main__":
    main()

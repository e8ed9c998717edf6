"""What a machine has to offer: versions, memory, disk, shared memory, open files, its clock, its random numbers.

Nothing heavy is imported before `versions` is called.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import platform
import resource
import shutil
import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement  # of Flower's own requirements
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from common.doctor import Found, failed, passed, skipped, warned

GB = 10**9
OPEN_FILES = 1024
"""Files that a process should be able to have open: connections, caches and libraries are files."""

SHARED_MEMORY = 256 * 2**20
"""Bytes of shared memory from which on nobody minds; containers have 64 MB unless they are given more."""

_NAMED = ("flwr", "torch")  # versions that are told, besides Python's and our own
_UNSYNCHRONISED = 0x40  # STA_UNSYNC of <sys/timex.h>
_STATUS_AT = 40  # its place in `struct timex`, 64 bits
_FLOOR = GB // 4  # bytes below which a disk counts as full


def amount(count: float) -> str:
    """Print a number of bytes.

    Examples:
        >>> amount(348e3), amount(64e6), amount(2.5e9), amount(4e12)
        ('348 kB', '64 MB', '2.5 GB', '4.0 TB')
    """
    for unit, size in (("TB", 10**12), ("GB", GB), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.{0 if unit == 'MB' else 1}f} {unit}"
    return f"{count / 1000:.0f} kB"


# Versions


def versions(name: str = "consilium") -> Found:
    """Compare what is installed with what a distribution requires, and import it.

    Args:
        name: of the distribution; what it says of itself is what counts.
    """
    distribution = importlib.metadata.distribution(name)
    python = platform.python_version()
    wrong = [] if python in SpecifierSet(distribution.metadata["Requires-Python"] or "") else [f"Python is {python}"]
    modules = _modules()
    required = [Requirement(text) for text in distribution.requires or ()]
    needed = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong += [said for one in needed if (said := _wrong(one, modules))]
    if wrong:
        return failed("; ".join(wrong))
    told = [f"{one} {importlib.metadata.version(one)}" for one in (name, *_NAMED)]
    return passed(f"Python {python}, {', '.join(told)}; {len(needed)} packages as required")


def _wrong(required: Requirement, modules: Mapping[str, list[str]]) -> str:
    """Return what is wrong with an installed distribution, or an empty text."""
    try:
        version = importlib.metadata.version(required.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{required.name} is not installed"
    if not required.specifier.contains(version, prereleases=True):
        return f"{required.name} is {version}, expected {required.specifier}"
    names = modules.get(canonicalize_name(required.name), [])
    own = [name for name in names if name == required.name] or [name for name in names if name[0] != "_"]
    broken = next(filter(None, map(_import_error, own)), "")
    return f"{required.name} {version} cannot be imported ({broken})" if broken else ""


def _import_error(module: str) -> str:
    try:
        with warnings.catch_warnings(action="ignore"):
            importlib.import_module(module)
    except Exception as error:  # noqa: BLE001  a library that is not for this machine raises whatever it does
        return type(error).__name__
    return ""


def _modules() -> dict[str, list[str]]:
    """Return the modules of each installed distribution."""
    found: dict[str, list[str]] = {}
    for module, names in importlib.metadata.packages_distributions().items():
        for name in set(names):
            found.setdefault(canonicalize_name(name), []).append(module)
    return found


# Room


def disk(path: Path, need: int, what: str) -> Found:
    """Look whether a folder's disk has room.

    Args:
        path: the folder.
        need: bytes that are going to be written.
        what: takes them.
    """
    room, left = shutil.disk_usage(path).free, os.statvfs(path)
    said = f"{amount(room)} free below {path}; {what} may take {amount(need)}"
    if room < _FLOOR:
        return failed(said)
    if left.f_files and not left.f_favail:
        return failed(f"{path}: no file can be made any more (inodes)")
    return passed(said) if room >= need else warned(said)


def memory(least: int, good: int, root: Path = Path("/")) -> Found:
    """Look at the memory that is available, to the machine and in the control group of this process.

    Args:
        least: bytes without which work fails.
        good: bytes with which it goes well.
        root: below which /proc and /sys are.
    """
    room = _available(root)
    said = f"{amount(room)} available"
    limits = list(_group_room(root))
    if limits and min(limits) < room:
        room = min(limits)
        said = f"{amount(room)} available under the limit of this process's control group"
    if room < least:
        return failed(f"{said}; {amount(least)} are needed")
    return passed(said) if room >= good else warned(f"{said}; {amount(good)} would be better")


def _available(root: Path) -> int:
    lines = (root / "proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _group_room(root: Path) -> Iterator[int]:
    """Yield what each limit on the way up leaves, in bytes: of control groups of the second version or the first."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            yield from _rooms(root / "sys/fs/cgroup", path, "memory.max", "memory.current")
        elif "memory" in kinds.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes"
            yield from _rooms(root / "sys/fs/cgroup/memory", path, *names)


def _rooms(top: Path, path: str, limit: str, usage: str) -> Iterator[int]:
    place = top / path.strip("/")
    for folder in (place, *place.parents):
        if not folder.is_relative_to(top):
            return
        try:
            ceiling, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        except (OSError, ValueError):  # the root has none
            continue
        if ceiling != "max":
            yield max(0, int(ceiling) - used + _reclaimable(folder))


def _reclaimable(folder: Path) -> int:
    """Return the bytes of files in memory that the kernel gives back by itself."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def shared_memory(path: Path = Path("/dev/shm")) -> Found:  # noqa: S108
    """Look at the size of the shared memory."""
    if not path.is_dir():
        return warned(f"there is no {path}")
    size = shutil.disk_usage(path).total
    said = f"{path} has {amount(size)}"
    return passed(said) if size >= SHARED_MEMORY else warned(f"{said}, as containers have by default")


def open_files(least: int = OPEN_FILES) -> Found:
    """Look at how many files a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = "any number" if soft == resource.RLIM_INFINITY else str(soft)
    if soft == resource.RLIM_INFINITY or soft >= least:
        return passed(f"{said} a process")
    return (failed if soft < least // 4 else warned)(f"{said} a process, {least} are better (hard limit {hard})")


# Time and chance


def clock() -> Found:
    """Ask the kernel whether anything keeps the clock right."""
    content = ctypes.create_string_buffer(512)  # a struct timex of zeros asks and changes nothing
    if ctypes.CDLL(None).adjtimex(content) < 0:
        return skipped("the kernel does not tell this process of its clock")
    (status,) = struct.unpack_from("i", content.raw, _STATUS_AT)
    if status & _UNSYNCHRONISED:
        return warned("nothing is known to set this machine's clock")
    return passed("a time service keeps this machine's clock")


def randomness() -> Found:
    """Ask the kernel for the random numbers that keys and noise are made of."""
    try:
        drawn = os.getrandom(32, os.GRND_NONBLOCK), os.getrandom(32, os.GRND_NONBLOCK)
    except BlockingIOError:
        return failed("the kernel has not collected enough chance yet")
    return passed("the kernel gives random numbers") if drawn[0] != drawn[1] else failed("two draws are the same")

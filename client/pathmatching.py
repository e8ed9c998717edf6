"""Which file a path in a table means: written on another machine, below another root, or as a bare file name.

A cell means a file if they are the same path, or if the whole of one is the end of the other, on whole components; it
must be the only file that the cell can mean, and no other cell may mean it. The ending of the name counts first and is
left out of account for what remains.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".dcm", ".dicom", ".ima", ".bmp", ".gif", ".webp"}
)

_SEVERAL = -1
_DEEPEST = 64  # components of a path that are compared
_LONGEST = 4096  # characters; no file system has longer paths


@dataclass(frozen=True, repr=False)
class PathIndex:
    """What the paths of files end in."""

    paths: dict[str, int]  # whole path -> file, or _SEVERAL
    ends: dict[str, int]  # last components -> file, or _SEVERAL
    names: frozenset[str]  # last components, one each

    @staticmethod
    def of(paths: Iterable[str]) -> PathIndex:
        """Return the index of these paths, numbered in their order."""
        whole: dict[str, int] = {}
        ends: dict[str, int] = {}
        names = set()
        for number, path in enumerate(paths):
            parts = path.split("/")
            _add(whole, path, number)
            for end in _ends(parts):
                _add(ends, end, number)
            names.add(parts[-1])
        return PathIndex(whole, ends, frozenset(names))

    def find(self, path: str) -> int | None:
        """Return the one file that a path can mean, `_SEVERAL`, or None."""
        if path.rpartition("/")[2] not in self.names:
            return None
        if path in self.paths:
            return self.paths[path]
        if path in self.ends:
            return self.ends[path]
        return next((self.paths[end] for end in _ends(path.split("/")) if end in self.paths), None)


@dataclass(frozen=True, repr=False)
class PathMatcher:
    """The files of a folder, found by what a table calls them."""

    full: PathIndex
    bare: PathIndex

    @staticmethod
    def of(paths: Sequence[str]) -> PathMatcher:
        """Return a matcher for paths relative to the data root, POSIX."""
        composed = [_composed(path) for path in paths]
        return PathMatcher(PathIndex.of(composed), PathIndex.of(map(_bare, composed)))

    def match(self, cells: Sequence[str]) -> tuple[dict[int, int], int]:
        """Return which cell means a file, as file -> cell, and how many cells or files were open to doubt.

        Args:
            cells: different paths, as `normal` returns them.
        """
        wanted = list(enumerate(cells))
        found, doubtful = _claims(self.full, wanted)
        left = set(found.values())
        rest = [(number, _bare(path)) for number, path in wanted if number not in left]
        more, doubtful_bare = _claims(self.bare, rest)
        return {**more, **found}, max(doubtful, doubtful_bare)


def normal(cell: str) -> str:
    r"""Return a cell as a POSIX path without a root; empty for what cannot be one, or leads upwards.

    Examples:
        >>> normal(r".\a\1.png"), normal("/data//a/1.png"), normal("../1.png")
        ('a/1.png', 'data/a/1.png', '')
    """
    if len(cell) > _LONGEST:
        return ""
    parts = [part for part in _composed(cell).replace("\\", "/").split("/") if part not in ("", ".")]
    return "/".join(parts) if ".." not in parts else ""


def _claims(index: PathIndex, wanted: list[tuple[int, str]]) -> tuple[dict[int, int], int]:
    """Return file -> cell where one cell alone means the file, the very path going before what only ends alike."""
    claims: dict[int, list[int]] = {}
    exact: dict[int, list[int]] = {}
    doubtful = 0
    for number, path in wanted:
        file = index.find(path)
        if file is None:
            continue
        if file == _SEVERAL:
            doubtful += 1
            continue
        (exact if path in index.paths else claims).setdefault(file, []).append(number)
    alone = {file: numbers[0] for file, numbers in {**claims, **exact}.items() if len(numbers) == 1}
    return alone, doubtful + len(claims.keys() | exact.keys()) - len(alone)


def _add(index: dict[str, int], path: str, number: int) -> None:
    index[path] = _SEVERAL if path in index else number


def _ends(parts: Sequence[str]) -> Iterable[str]:
    """Yield the proper ends of a path, the longest first."""
    for begin in range(max(1, len(parts) - _DEEPEST), len(parts)):
        yield "/".join(parts[begin:])


def _composed(path: str) -> str:
    return path if path.isascii() else unicodedata.normalize("NFC", path)  # macOS takes letters and accents apart


def _bare(path: str) -> str:
    stem, _, suffix = path.rpartition(".")
    return stem if f".{suffix.lower()}" in IMAGE_SUFFIXES and stem and not stem.endswith("/") else path

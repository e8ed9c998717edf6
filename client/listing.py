"""Which files of a data folder could be images; nothing is opened, and each file has one outcome.

Messages never name a path below the folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError

MANIFEST = "manifest.csv"
SPLIT_WORDS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
_OTHER_SUFFIXES = frozenset(
    {
        *("csv", "tsv", "txt", "md", "rst", "log", "json", "jsonl", "xml", "html", "htm", "css", "js", "ipynb"),
        *("yaml", "yml", "toml", "ini", "cfg", "conf", "inf", "lock", "py", "pyc", "java", "jar", "sh"),
        *("pdf", "doc", "docx", "odt", "rtf", "xls", "xlsx", "xlsm", "ods", "ppt", "pptx", "odp", "tex", "bib"),
        *("zip", "gz", "tgz", "tar", "bz2", "xz", "zst", "7z", "rar", "iso", "dmg", "exe", "dll", "bat", "cmd", "msi"),
        *("npz", "npy", "nii", "nrrd", "mha", "mhd", "h5", "hdf5", "mat", "parquet", "feather", "arrow"),
        *("pkl", "pickle", "pt", "pth", "onnx", "safetensors", "so"),
        *("mp4", "avi", "mov", "mkv", "wmv", "mpg", "mpeg", "webm", "mp3", "wav", "svg"),
        *("db", "sqlite", "sqlite3", "bak", "tmp", "part", "swp", "lnk", "url"),
    }
)
"""Endings of what is certainly neither DICOM nor a picture; any other file is judged by its content."""


@dataclass(frozen=True, repr=False)
class Found:
    """The files of a folder, paths relative to it, POSIX, ordered by their components.

    A name that is not UTF-8 has its odd bytes as surrogates (PEP 383), so `os.fsencode` gives the very name.
    """

    paths: tuple[str, ...]  # could be images
    quarantine: Mapping[str, str]  # path -> image.CODES: outside_root, missing, no_access
    ignored: Mapping[str, str]  # path -> IGNORED


def check_class_names(names: set[str]) -> None:
    """Refuse class folders that are splits.

    Raises:
        DataError: every one of several folders is called like a split.
    """
    if len(names) > 1 and all(name.lower() in SPLIT_WORDS for name in names):
        raise DataError(
            f"subfolders {', '.join(sorted(names))} look like splits, expected one subfolder a class"
            f" - describe the files in {MANIFEST} with path,label,split"
        )


def list_files(root: Path) -> Found:
    """Return every file below a folder that could be an image, without opening any.

    What has no known ending may be DICOM and stays; the reader decides by content. Links to folders are not followed,
    links to files only where they end inside the folder.

    Raises:
        DataError: there is no such folder.
    """
    if not root.is_dir():
        raise DataError(f"{root}: expected a folder of images")
    top = os.path.realpath(root)
    paths: list[str] = []
    quarantine: dict[str, str] = {}
    ignored: dict[str, str] = {}
    for path, entry in _walk(top):
        if entry is None:
            quarantine[path] = "no_access"
        elif reason := _ignored(path):
            ignored[path] = reason
        elif code := _refused(top, entry):
            quarantine[path] = code
        else:
            paths.append(path)
    return Found(tuple(sorted(paths, key=_parts)), _ordered(quarantine), _ordered(ignored))


def _walk(top: str) -> Iterator[tuple[str, os.DirEntry[str] | None]]:
    """Yield whatever is no folder, and no link to one, with its path below the top; None for folders kept shut."""
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(f"{top}/{folder}") as entries:
                listed = list(entries)
        except OSError:
            yield folder.rstrip("/"), None
            continue
        for entry in listed:
            if entry.is_dir(follow_symlinks=False):
                folders.append(f"{folder}{entry.name}/")
            elif not (entry.is_symlink() and _leads_to_folder(entry)):
                yield f"{folder}{entry.name}", entry


def _leads_to_folder(link: os.DirEntry[str]) -> bool:
    try:
        return link.is_dir()
    except OSError:  # a loop of links
        return False


def _ignored(path: str) -> str | None:
    if path.startswith(".") or "/." in path:
        return "hidden"
    name = path.rpartition("/")[2]
    stem, _, suffix = name.rpartition(".")
    if name.upper() == "DICOMDIR":
        return "directory"
    return "other_suffix" if stem and suffix.lower() in _OTHER_SUFFIXES else None


def _refused(top: str, entry: os.DirEntry[str]) -> str | None:
    """Return why an entry that is no folder cannot be read: sockets, pipes and devices would never end."""
    try:
        if entry.is_symlink() and not os.path.realpath(entry.path).startswith(top.rstrip("/") + "/"):
            return "outside_root"
        return None if entry.is_file() else "missing"
    except OSError:
        return "missing"


def _parts(path: str) -> list[str]:
    return path.split("/")


def _ordered(codes: Mapping[str, str]) -> dict[str, str]:
    return {path: codes[path] for path in sorted(codes, key=_parts)}

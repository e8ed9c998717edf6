"""Who may do what with a file: asked of the kernel where this user can, else judged by modes, else not known."""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
from itertools import chain, islice
from pathlib import Path

from common.doctor import Found, failed, passed, warned

_WANT = {"r": os.R_OK, "w": os.W_OK, "x": os.X_OK}
_ACL = "system.posix_acl_access"
_TEST = Path("/usr/bin/test")
_ENTRIES = 10_000  # of a folder that are looked at


def name_of(user: int) -> str:
    """Return a user's name, or the number of one that has none."""
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def closed(path: Path) -> bool:
    """Return whether this user cannot even see if a path is there."""
    try:
        path.lstat()
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def may(user: int, path: Path, want: str) -> bool | None:
    """Return whether a user may do something with a path that is there; None where this user cannot tell.

    Args:
        user: number of the user.
        path: of a file or a folder.
        want: r to read, w to write, x to enter.
    """
    if user == os.geteuid():
        return os.access(path, _WANT[want], effective_ids=True)
    if user == 0:
        return True
    return _asked(user, path, want) if os.geteuid() == 0 else _judged(user, path, want)


def _asked(user: int, path: Path, want: str) -> bool | None:
    """Ask the kernel as that user, which takes access lists into account."""
    if not _TEST.exists():
        return _judged(user, path, want)
    identity = {"user": user, "group": _primary(user), "extra_groups": sorted(_groups(user))}
    command = [str(_TEST), f"-{want}", str(path)]
    return subprocess.run(command, check=False, cwd="/", **identity).returncode == 0  # type: ignore[call-overload,no-any-return]  # noqa: S603


def _judged(user: int, path: Path, want: str) -> bool | None:
    """Judge by the modes of a path and of every folder on the way; an access list says more than they do."""
    answers = [_allows(folder, user, "x") for folder in reversed(path.absolute().parents)]
    answers.append(_allows(path, user, want))
    if False in answers:
        return False
    return None if None in answers else True


def _allows(path: Path, user: int, want: str) -> bool | None:
    try:
        found = path.stat()
        if _ACL in os.listxattr(path):
            return None
    except OSError:
        return None
    shift = 6 if found.st_uid == user else 3 if found.st_gid in _groups(user) else 0
    return bool(stat.S_IMODE(found.st_mode) >> shift & _WANT[want])


def _groups(user: int) -> set[int]:
    try:
        return set(os.getgrouplist(pwd.getpwuid(user).pw_name, _primary(user)))
    except KeyError:  # a number without a name
        return {user}


def _primary(user: int) -> int:
    try:
        return pwd.getpwuid(user).pw_gid
    except KeyError:
        return user


def private_folder(path: Path) -> Found:
    """Look whether a folder is for its owner's eyes only, and all in it its owner's.

    Args:
        path: of the folder; what lies in it and one level deeper is looked at.
    """
    if closed(path):
        return failed(f"{path} is closed to this user", "Ask as root, or as the user who owns it.")
    if not path.is_dir():
        return failed(f"{path}: there is no such folder")
    found = path.stat()
    mode, owner = stat.S_IMODE(found.st_mode), name_of(found.st_uid)
    if os.geteuid() not in (0, found.st_uid):
        return failed(f"{path} belongs to {owner}", f"Ask as {owner}{' or root' if found.st_uid else ''}.")
    if mode & 0o077:
        return failed(f"{path}: mode {mode:04o} opens it to others", f"Run: chmod 700 {path}")
    foreign = [entry for entry in _entries(path) if entry.lstat().st_uid != found.st_uid]
    if foreign:
        said = f"{foreign[0]} belongs to {name_of(foreign[0].lstat().st_uid)}, and the folder to {owner}"
        remedy = f"A command was run as another user; run: chown -R {owner}: {path}"
        return (warned if found.st_uid == 0 else failed)(said, remedy)  # root may use what belongs to others
    return passed(f"{path}, mode {mode:04o}, of {owner}")


def _entries(path: Path) -> list[Path]:
    return list(islice(chain(path.glob("*"), path.glob("*/*")), _ENTRIES))

"""A site joins: it makes its key, keeps whom to trust, fills in `[coordinator]` and writes its enrolment.

The key comes first and site.toml last: whatever a crash leaves, `--again` goes on from there with the same key, and a
failure that is noticed leaves nothing behind.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path

import tomli_w

from client.site_config import SiteConfig, parse_site, read_any_site
from common import node_key
from common.errors import ConfigError, ConsiliumError, UsageError
from common.files import write_atomic
from common.invitation import Enrolment, Invitation, enrolment, read_invitation, write_document
from common.strict import parse_toml

_SECTION = "coordinator"
_HEADER = re.compile(rf"^[ \t]*\[[ \t]*{_SECTION}[ \t]*\][ \t]*(?:#[^\n]*)?(?:\r?\n|\Z)", re.MULTILINE)
_NEXT = re.compile(r"^[ \t]*\[", re.MULTILINE)
_BOM = "\ufeff"


def join(site: Path, invitation: Path, output: Path, again: bool = False, now: datetime | None = None) -> Enrolment:
    """Make the site's key and everything that follows from it.

    Args:
        site: its site.toml, whose other lines stay as they are.
        invitation: the coordinator's file.
        output: where the enrolment goes.
        again: keep the key that is there, and do all the rest again.
        now: the time to judge at.

    Raises:
        ConfigError: site.toml or the invitation cannot be used, or they do not belong together.
        UsageError: there is a key, or with `again` there is none.
        ConsiliumError: a file cannot be written.
    """
    config, offered = read_any_site(site), read_invitation(invitation)
    _check(config, offered, invitation, now)
    content = config.path.read_bytes()
    filled = _filled(config, content, offered)
    _check_key(config, again)
    _check_writable(output)
    try:
        return _write(config, offered, filled if filled != content else None, output)
    except OSError as error:
        raise ConsiliumError(f"{error.filename or output}: cannot be written ({error.strerror})") from None


def fill(text: str, values: Mapping[str, str]) -> str:
    r"""Return the text of a site.toml with these keys of `[coordinator]`; every other line stays as it is.

    Examples:
        >>> print(fill("[coordinator]\naddress = ''  # theirs\n", {"address": "fl.example:443"}))
        [coordinator]
        address = "fl.example:443"  # theirs
        <BLANKLINE>
    """
    end = "\r\n" if "\r\n" in text else "\n"
    header = _HEADER.search(text)
    if header is None:
        lines = end.join([f"[{_SECTION}]", *(_line(key, value) for key, value in values.items())])
        gap = end if not text or text.endswith("\n") else end * 2
        return text + gap + lines + end
    following = _NEXT.search(text, header.end())
    stop = following.start() if following else len(text)
    section = text[header.end() : stop]
    head = text[: header.end()] + ("" if header[0].endswith("\n") else end)
    for key, value in reversed(list(values.items())):
        section = _with(section, key, value, end)
    return head + section + text[stop:]


def _with(section: str, key: str, value: str, end: str) -> str:
    """Return the lines of a section with another value of a key, or with a line for it before the others."""
    old = re.compile(rf"""^([ \t]*{key}[ \t]*=[ \t]*)(?:"(?:[^"\\\n]|\\[^\n])*"|'[^'\n]*')""", re.MULTILINE)
    literal = _line(key, value).partition(" = ")[2]
    changed, count = old.subn(lambda found: found[1] + literal, section)
    return changed if count else _line(key, value) + end + section


def _line(key: str, value: str) -> str:
    return tomli_w.dumps({key: value}).rstrip("\n")


def _filled(config: SiteConfig, content: bytes, offered: Invitation) -> bytes:
    """Return the new content of site.toml, after a look at what it then means."""
    section = config.toml.coordinator
    values = {
        "address": offered.address,
        "ca_certificate": section.ca_certificate or "link/ca.pem",
        "private_key": section.private_key or "link/node.key",
    }
    text = content.decode("utf-8")
    filled = fill(text, values)
    wanted = section.model_copy(update=values)
    try:
        toml = parse_site(parse_toml(filled.removeprefix(_BOM), config.path.name), config.path.name)
    except ConfigError:
        toml = None
    if toml is None or toml != config.toml.model_copy(update={_SECTION: wanted}):
        lines = ", ".join(_line(key, value) for key, value in values.items())
        raise ConfigError(
            f"{config.path}: its [{_SECTION}] is written in a way that is not changed here; set by hand: {lines}"
        )
    return filled.encode("utf-8")


def _check(config: SiteConfig, offered: Invitation, invitation: Path, now: datetime | None) -> None:
    if offered.name != config.name:
        raise ConfigError(
            f"{invitation}: invites {offered.name!r}, but [site] name in {config.path} is {config.name!r}; "
            "ask the coordinator for an invitation to that name, or change it"
        )
    if offered.expired(now):
        raise ConfigError(f"{invitation}: expired on {offered.expires}; ask the coordinator for a new one")


def _check_key(config: SiteConfig, again: bool) -> None:
    there = os.path.lexists(config.private_key)
    if there and not again:
        raise UsageError(
            f"{config.private_key}: the site has a key already; --again keeps it and writes the enrolment again"
        )
    if again and not there:
        raise UsageError(f"{config.private_key}: there is no key to go on with; leave --again out")


def _check_writable(target: Path) -> None:
    if target.is_dir() or not target.parent.is_dir():
        raise UsageError(f"{target}: no file can be made there")


def _write(config: SiteConfig, offered: Invitation, filled: bytes | None, target: Path) -> Enrolment:
    with ExitStack() as undo:
        if _make_folder(config.link_folder):
            undo.callback(_remove_empty, config.link_folder)
        key = _key(config.private_key, undo)
        for path in (config.ca_certificate, target):
            if not os.path.lexists(path):
                undo.callback(path.unlink, missing_ok=True)
        _make_folder(config.ca_certificate.parent)
        write_atomic(config.ca_certificate, offered.ca_certificate.encode("ascii"))
        for path in (config.private_key, config.ca_certificate):
            _give(path, config.link_folder.stat())
        answer = enrolment(offered, key)
        write_document(target, answer)
        if filled is not None:
            _replace(config.path, filled)
        undo.pop_all()
    return answer


def _key(path: Path, undo: ExitStack) -> node_key.PrivateKey:
    """Return the key that is there, or a new one, which goes again if the rest fails: nobody has seen it."""
    if os.path.lexists(path):
        return node_key.read_key(path)
    key = node_key.make_key(path)
    undo.callback(path.unlink, missing_ok=True)
    return key


def _make_folder(folder: Path) -> bool:
    """Make a folder for its owner only; one that is there stays as it is."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        return False
    return True


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # another process has put something there
        folder.rmdir()


def _replace(path: Path, content: bytes) -> None:
    """Change a file's content and nothing else of it."""
    before = path.stat()
    write_atomic(path, content, mode=stat.S_IMODE(before.st_mode))
    _give(path, before)


def _give(path: Path, like: os.stat_result) -> None:
    """Let a file belong to whom another belongs: root sets up what the link's own user must read."""
    if os.geteuid() == 0:
        os.chown(path, like.st_uid, like.st_gid, follow_symlinks=False)

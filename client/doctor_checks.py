"""What a site's doctor looks at on its own machine, without torch and without any network.

Whoever asks may be root, while the daemon runs as the owner of the state and the link as the owner of its folder:
rights are judged for those two. Nothing below the data folder is named.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client import oversight, up
from client.authority import read_authority
from client.link_status import LOCK
from client.secret import read_secret
from client.site_config import SiteConfig
from client.site_ledger import NAME as LEDGER
from client.site_ledger import open_ledger
from client.status import SiteStatus
from common import machine
from common.access import closed, may, name_of, private_folder
from common.certificates import WARN_DAYS, describe, read_certificates
from common.doctor import Found, failed, passed, skipped, warned
from common.locks import holder
from common.node_key import read_key

REPORT = "check.json"
"""What `consilium site check` left in the state."""

LOOKING_S = 2.0
"""Seconds that the files of a data folder are counted for."""

LONGEST = 64 * 2**20
"""Bytes of a trail or a ledger up to which it is verified here: some seconds."""

FEATURES = 32 * 2**10
"""Bytes of features that an image takes in the usual runs, about: four views of a head's input."""

FLOOR = 2 * machine.GB
"""Bytes that a site's disk should have left where nothing is known of its images."""

_CHANNELS = 3
_TORN = "cut short, as a crash leaves it"  # what is said of a trail of which all but the end holds
_JOIN = "the site has joined no coordinator"
_CHECK = "Run: consilium site check {}"


# State and keys


def state(config: SiteConfig) -> Found:
    """Look at the folder of everything that the site keeps."""
    if not closed(config.state) and not config.state.exists():
        return failed(f"{config.state}: no state of a site yet", _CHECK.format(config.path))
    return private_folder(config.state)


def secret(config: SiteConfig) -> Found:
    """Look at the site's secret.

    Raises:
        ConfigError: it cannot be used.
    """
    read_secret(config.secret)
    return passed(f"{config.secret}, for its owner alone")


def key(config: SiteConfig) -> Found:
    """Look at the key that the coordinator knows the site by.

    Raises:
        ConfigError: it cannot be used.
    """
    if not config.toml.coordinator.address:
        return skipped(_JOIN)
    if closed(config.private_key):
        return skipped(f"{config.link_folder} is closed to this user; ask as root, or as the user of the link")
    read_key(config.private_key)
    return passed(f"{config.private_key}, for its owner alone")


def authority(config: SiteConfig) -> Found:
    """Look at whom the site trusts.

    Raises:
        ConfigError: the certificate cannot be used.
    """
    if not config.toml.coordinator.address:
        return skipped(_JOIN)
    if closed(config.ca_certificate):
        return skipped(f"{config.ca_certificate} is closed to this user; ask as root, or as the user of the link")
    read_authority(config.ca_certificate)
    found = min(map(describe, read_certificates(config.ca_certificate)), key=lambda one: one.expires)
    left, day = found.days_left(), f"{found.expires:%Y-%m-%d}"
    if left < 0:
        return failed(f"{config.ca_certificate}: ended on {day}")
    said = f"{config.ca_certificate}, until {day}"
    return passed(said) if left >= WARN_DAYS else warned(f"{said}: {left} days")


# The machine


def device(config: SiteConfig) -> Found:
    """Look at what the site computes with.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    wish = config.toml.compute.device
    if wish == "cpu":
        return passed("the CPU, as [compute] device says")
    from client.workshop import choose_device

    if choose_device(wish) == "cuda":
        return passed(_gpu())
    if _has_nvidia():
        return warned("this machine has an NVIDIA device that torch does not see, so the CPU is taken")
    return passed("the CPU: torch sees no GPU here")


def _gpu() -> str:
    import torch

    free, total = torch.cuda.mem_get_info()
    others = torch.cuda.device_count() - 1
    beside = f"; {others} more are not used" if others else ""
    return f"{torch.cuda.get_device_name()}, {machine.amount(free)} of {machine.amount(total)} free{beside}"


def _has_nvidia(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    return any(path.read_text().strip() == "0x10de" for path in devices.glob("*/vendor"))


def disk(config: SiteConfig) -> Found:
    """Look at the room for images and features, by what the last check counted."""
    if not config.state.is_dir():
        return skipped("there is no state yet")
    place = config.cache if config.cache.is_dir() else config.state
    images = _images(_report(config))
    if not images:
        return machine.disk(place, FLOOR, "the caches")
    whole = images * (_CHANNELS * config.image_size**2 + FEATURES)
    there = sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) if place == config.cache else 0
    return machine.disk(place, max(whole - there, 0) + FLOOR // 2, f"the caches of {images} images")


# The data


@dataclass(frozen=True)
class Counted:
    """What a walk through a folder told."""

    files: int
    one: Path | None  # any of them
    folders_changed: float  # when the latest change of any folder was, seconds since 1970
    whole: bool  # whether there was time for all of it


def counted(root: Path, seconds: float = LOOKING_S) -> Counted:
    """Count the files below a folder for some seconds; links are not followed, and no file is opened."""
    end = time.monotonic() + seconds
    files, latest, one = 0, 0.0, None
    for folder, _, names in os.walk(root):
        files += len(names)
        one = one or (Path(folder) / names[0] if names else None)
        latest = max(latest, os.stat(folder).st_mtime)  # noqa: PTH116  a million times
        if time.monotonic() > end:
            return Counted(files, one, latest, False)
    return Counted(files, one, latest, True)


def data(config: SiteConfig) -> Found:
    """Look whether the daemon's user can read images and labels."""
    toml = config.toml.data
    if not toml.images and toml.dicomweb is None:
        return failed("no images are named", "Name their folder in [data] images.")
    if not toml.images and not config.images.exists():
        return warned("nothing was pulled from the PACS yet", f"Run: consilium site pull {config.path}")
    who = daemon_user(config)
    for path, wants in ((config.images, "rx"), *([(config.labels, "r")] if config.labels else [])):
        if not closed(path) and not path.exists():
            return failed(f"{path}: no such file or folder", "Correct [data] in site.toml.")
        if (found := _readable(path, wants, who)) is not None:
            return found
    return _files(config, who)


def _readable(path: Path, wants: str, who: int) -> Found | None:
    """Return what keeps a user, or this one who asks, from a path; None: nothing."""
    name, answers = name_of(who), [may(who, path, want) for want in wants]
    if False in answers:
        return failed(f"{path}: {name} cannot read it", f"Give {name} the right to: setfacl -R -m u:{name}:rX {path}")
    if None in answers or not all(may(os.geteuid(), path, want) for want in wants):
        return skipped(f"whether {name} can read {path} cannot be told by this user; ask as root")
    return None


def _files(config: SiteConfig, who: int) -> Found:
    found, name = counted(config.images), name_of(who)
    said = f"{'' if found.whole else 'at least '}{found.files} files below {config.images}"
    if found.one is None:
        return failed(
            f"{config.images}: no files in it", "Put the images there, or name another folder in [data] images."
        )
    if may(who, found.one, "r") is False:
        return failed(f"{said}, and {name} cannot read the first of them")
    return passed(f"{said}, readable by {name}")


def cohort(config: SiteConfig) -> Found:
    """Look whether the last check still stands; nothing is read again."""
    report = _report(config)
    again = _CHECK.format(config.path)
    if report is None:
        return warned("the data were never checked", again)
    if report.get("stop"):
        return failed("the last check found that the data may not be used as they are", again)
    try:
        changed = _changed(config, report)
    except PermissionError:
        return skipped("not reached, see data")
    if changed:
        return warned(f"since the last check, {changed}", again)
    examples = report["examples"]
    splits = ", ".join(f"{count} {split}" for split, count in examples.items())
    return passed(f"{sum(examples.values())} images in use ({splits}), as the last check found")


def _changed(config: SiteConfig, report: Mapping[str, Any]) -> str:
    """Return what has changed since the check, as far as that shows without reading files; empty: nothing."""
    when = (config.state / REPORT).stat().st_mtime
    if (report["preset"], report["image_size"]) != (config.toml.data.preset, config.image_size):
        return "[data] preset or image_size were changed"
    if config.labels and config.labels.stat().st_mtime > when:
        return "the table of labels was changed"
    if config.images.is_dir() and counted(config.images).folders_changed > when:
        return "files came, went or were renamed"
    return ""


def _report(config: SiteConfig) -> Mapping[str, Any] | None:
    """Return what the last check found, None where there was none."""
    try:
        found: dict[str, Any] = json.loads((config.state / REPORT).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found


def _images(report: Mapping[str, Any] | None) -> int:
    return sum(report["examples"].values()) if report else 0


def daemon_user(config: SiteConfig) -> int:
    """Return the number of the user whom the state belongs to; where there is none, of this one."""
    try:
        return config.state.stat().st_uid
    except OSError:
        return os.geteuid()


def separation(config: SiteConfig) -> Found:
    """Look whether the link, where it is another user's, is kept from data, state and secret."""
    if not config.toml.coordinator.address:
        return skipped(_JOIN)
    try:
        link = config.link_folder.stat().st_uid
    except OSError:
        return skipped(f"{config.link_folder} is closed to this user; ask as root")
    if link == daemon_user(config):
        return skipped(f"daemon and link are both {name_of(link)}'s; docs/federation.md tells how to part them")
    places = [config.images, config.state, *([config.labels] if config.labels else [])]
    answers = {path: may(link, path, "r") for path in places if closed(path) or path.exists()}
    readable = [str(path) for path, answer in answers.items() if answer]
    if readable:
        return warned(f"{name_of(link)}, who runs the link, can read {', '.join(readable)}")
    if None in answers.values():
        return skipped(f"what {name_of(link)} may read cannot be told by this user; ask as root")
    return passed(f"{name_of(link)}, who runs the link, can read neither data nor state")


# Socket and processes


def socket(config: SiteConfig) -> Found:
    """Look whether the socket can be made, and whether its peers can reach it.

    Raises:
        ConfigError: its path is too long, or a peer is no user of this machine.
    """
    path, peers = config.socket, config.peers
    folder, who = path.parent, daemon_user(config)
    if closed(path):
        return skipped(f"{folder} is closed to this user; ask as root")
    if not folder.is_dir():
        return warned(f"{folder}: there is no such folder", "A systemd unit makes it as it starts; else make it.")
    if may(who, folder, "w") is False:
        return failed(f"{folder}: {name_of(who)} cannot make a socket there")
    for peer in sorted(peers - {who, 0}):
        if may(peer, folder, "x") is False:
            return failed(f"{folder}: {name_of(peer)}, a peer, cannot enter it")
        if path.exists() and may(peer, path, "w") is False:
            return failed(f"{path}: {name_of(peer)}, a peer, may not speak to it")
    if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
        return failed(f"{path}: holds something else than a socket", "Take it away, or name another [site] socket.")
    who_else = ", ".join(map(name_of, sorted(peers - {who, 0})))
    return passed(f"{path}, for {name_of(who)}{f' and {who_else}' if who_else else ''}")


def out_of_sight(config: SiteConfig, about: str) -> str:
    """Return why nothing can be said of a process, or an empty text."""
    if about == "link" and not config.toml.coordinator.address:
        return _JOIN
    places = {"link": config.link_folder / LOCK, "daemon": config.socket, "supervisor": up.logs(config)}
    return f"{places[about].parent} is closed to this user; ask as root" if closed(places[about]) else ""


def process(config: SiteConfig, standing: SiteStatus, about: str) -> Found:
    """Return what `consilium site status` says of a process, in this form.

    Args:
        config: the site.
        standing: how it stands.
        about: supervisor, daemon or link.
    """
    found = [finding for finding in standing.findings if finding.about == about]
    if not found:
        running = standing.supervisor is not None and standing.supervisor.running
        return passed("its processes stay up") if running else skipped("none runs here; under systemd there is none")
    worst = max(found, key=lambda one: ("good", "warning", "wrong").index(one.level))
    if worst.level == "good":
        return passed(worst.sentence)
    stopped = worst.level == "wrong" and _not_started(config, standing, about)
    return (warned if stopped or worst.level == "warning" else failed)(worst.sentence, worst.remedy)


def _not_started(config: SiteConfig, standing: SiteStatus, about: str) -> bool:
    """Return whether a process is merely not there, as before the first `consilium site up`."""
    if standing.supervisor is not None and standing.supervisor.running:
        return False
    if about == "daemon":
        return standing.daemon.get("code") == "no socket"
    return about == "link" and holder(config.link_folder / LOCK) is None


# Records


def trail(config: SiteConfig) -> Found:
    """Verify the audit trail.

    Raises:
        ConsiliumError: there is none, or it cannot be read.
    """
    if (
        sum(path.stat().st_size for path in config.audit.parent.glob(f"{config.audit.stem}*{config.audit.suffix}"))
        > LONGEST
    ):
        return skipped(f"it is long; run: consilium site audit verify --site {config.path}")
    found = oversight.trail(config.audit)
    if _TORN in found.wrong:
        return warned(found.wrong, "Nothing; look why the machine or the daemon ended.")
    return failed(found.wrong) if found.wrong else passed(f"{len(found.entries)} events hold")


def ledger(config: SiteConfig) -> Found:
    """Verify the ledger of spent privacy.

    Raises:
        ConsiliumError: it does not hold, or the secret is missing.
    """
    path = config.state / LEDGER
    if path.exists() and path.stat().st_size > LONGEST:
        return skipped(f"it is long; run: consilium site ledger --site {config.path}")
    entries = len(open_ledger(config, write=False).entries)
    return passed(f"{entries} entries hold" if entries else "no run with privacy has drawn on it yet")

"""A new site: its folder, whole or not at all, or the state of one whose `site.toml` was written by hand."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from client import audit
from client.secret import make_secret
from client.site_config import NAME, parse_site
from common.errors import ConfigError, UsageError
from common.strict import parse_toml

TEMPLATE = """\
# What this hospital says of itself to consilium. Nothing of this file is ever sent but the site's name.
# Paths are relative to the folder of this file. A line that begins with '#' shows a key with its default.

[site]
{name}
# state = "state"                   # folder of the secret, the index, the caches and the audit trail
# socket = ""                       # where the daemon listens, at most 107 bytes; empty: daemon.sock in the state
# peers = []                        # users who may speak to the daemon besides its own, such as "consilium-link"

[data]
# Folder of the images: DICOM, PNG, JPEG, TIFF, at any depth. Empty: what is pulled from the PACS, see [data.dicomweb].
{images}
# CSV file of the labels. Empty: manifest.csv in the folder of the images, or else one subfolder a class.
{labels}
# Column that names the image, or what it holds: path, SOPInstanceUID, SeriesInstanceUID, StudyInstanceUID,
# AccessionNumber. auto: found by what matches.
# key = "auto"
# Column of the labels as words, or several columns of 1, 0, -1 and blank: label = ["Effusion", "Edema"]. Empty: found.
# label = []
# Words of the one column that mean yes, for a task of two labels: positive = ["abnormal", "1"]. Empty: a label a word.
# positive = []
# uncertain = "ignore"              # what -1 means: ignore, zeros, ones, soft
# blank = "zeros"                   # what an empty cell among several columns means: zeros, ignore
# Column to take in place of the file's PatientID; none by default.
# patient = "PatientID"
# Column with train, validation, test; by default one called split, else patients are split by keyed hash.
# split = "split"
# Local word or column = the federation's label; an empty text leaves it out. {{}} by default.
# words = {{ "Pleuraerguss" = "effusion", "technisch unbrauchbar" = "" }}
# placeholder_patients = "stop"     # images of PatientIDs such as ANON, which stand for nobody: stop, quarantine
# preset = "generic"                # how images are shown to the network; generic, chest-xray, ct, mammography, …
# image_size = 224                  # pixels a side; the preset's by default

# [data.dicomweb]                   # pull listed studies from the PACS; needs the extra `pacs`
# url = "https://pacs.hospital.example/dicom-web"
# studies = "studies.csv"           # StudyInstanceUIDs or AccessionNumbers, one a line or a column; without default
# credentials = "pacs.key"          # file with user:password or Bearer TOKEN, mode 0600; none by default
# ca_certificate = "pacs.pem"       # PEM file; by default the authorities that browsers trust
# proxy = "http://proxy:3128"       # none by default
# allow_http = false                # let images and credentials cross the network in the clear
# requests_per_second = 5.0
# timeout_s = 60.0
# retries = 5
# max_file_mb = 2048

# [policy]                          # limits on what a coordinator may ask: a run outside of them is refused
# tasks = []                        # names of tasks; empty: any
# backbones = []                    # names of timm models; empty: any
# trunks = []                       # SHA-256 of frozen weights; empty: any
# strategies = []                   # such as "fedavg", "fedprox"; empty: any
# Coordinators: the fingerprint of their authority, as `consilium site join` prints it, or host:port. Empty: any.
# coordinators = []
# metrics = []                      # what may leave: confusion, histograms, calibration, losses; empty: any of them
# closed = false                    # true: an empty list allows nothing, so what is not named is refused
# max_rounds = 100                  # any number by default
# max_local_steps = 500             # optimiser steps a round at this site; any number by default
# max_local_epochs = 5              # passes a round over this site's training images; any number by default
# max_bytes_out = 100000000         # bytes of one reply; any number by default
# min_patients = 0                  # patients in training that this site needs to take part
# min_per_label = 0                 # training images of every label of the run that this site needs
# min_batch = 2                     # images a batch, at least; a batch of one is never allowed
# min_sites = 1                     # sites that a run names, and that each round needs
# min_cell = 0                      # counts below this do not leave; 0: they do
# round_counts = 2                  # significant digits of counts that leave; exact by default
# privacy = "optional"              # required: runs without differential privacy are refused
# max_epsilon = 8.0                 # epsilon of all runs on these patients together; any by default
# max_delta = 0.0001                # delta, likewise; any by default
# allow_exact = false               # true: with max_epsilon, runs without differential privacy are taken all the same
# hours = []                        # local time, such as ["20:00-06:00"]; new work is refused outside; empty: any time
# approval = false                  # true: each new run waits for `consilium site approve`
# review = false                    # true: each reply waits for `consilium site outbox --release`

# [coordinator]                     # `consilium site join` fills it in; not needed to examine the data
# address = ""                      # host:port
# ca_certificate = ""               # PEM file; empty: link/ca.pem
# private_key = ""                  # file, mode 0600; empty: link/node.key
# proxy = ""                        # "http://host:port" on the way out; empty: none

# [compute]
# device = "auto"                   # auto, cpu, cuda
# threads = 4                       # processes that decode images; one a core by default
# weights = ""                      # .safetensors file of pretrained weights: a run that uses them sends no trunk

# [logs]
# format = "text"                   # what daemon and link print; json: one object a line

# [monitor]                         # metrics and health for Prometheus, on 127.0.0.1 alone
# port = 0                          # such as 9464; 0: off
"""
"""Every key of `client.site_config`, explained."""


@dataclass(frozen=True)
class Founded:
    """Where a new site is."""

    site: str
    config: Path
    state: Path


def found(folder: Path, name: str | None = None, images: Path | None = None, labels: Path | None = None) -> Founded:
    """Make the folder of a new site: `site.toml`, `state/`, `state/secret` and the first line of the audit trail.

    Args:
        folder: made if absent; may hold other things.
        name: of the site in the federation; None: the folder's, if it can be one, else `site`.
        images: folder of the images; None: to be filled in.
        labels: the label table; None: to be filled in.

    Raises:
        ConfigError: the name is none that a site can have.
        UsageError: a site is there already, a path does not exist, or the folder cannot be written.
    """
    folder = folder.absolute()
    made = False
    try:
        _check_free(folder)
        text = site_toml(folder, name, images, labels)
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        _place(folder, text)
    except OSError as error:
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise UsageError(f"{folder}: no site can be made there ({error.strerror})") from None
    return Founded(parse_site(parse_toml(text, NAME), NAME).site.name, folder / NAME, folder / "state")


def found_state(state: Path) -> bool:
    """Make the state of a site that has none: the folder, its secret and the first line of the audit trail.

    A folder that holds anything stays as it is, and so does one that several processes find empty but for the first of
    them: another secret would move patients between the splits and name nobody of those who were taken out.

    Returns:
        Whether it was made.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if any(state.iterdir()):
                return False
            os.fchmod(handle, 0o700)
            make_secret(state / "secret")
            audit.append(state / "audit.jsonl", "init", {})
        finally:
            os.close(handle)
    except OSError as error:
        raise ConfigError(f"{state}: the site's state cannot be made there ({error.strerror})") from None
    return True


def site_toml(folder: Path, name: str | None, images: Path | None, labels: Path | None) -> str:
    """Return the text of a new `site.toml`.

    Raises:
        ConfigError: the name is none that a site can have.
        UsageError: a path does not exist or is not Unicode.
    """
    text = TEMPLATE.format(
        name=_assignment("name", _default_name(folder) if name is None else name),
        images=_assignment("images", _from(folder, images, "--images", "folder")),
        labels=_assignment("labels", _from(folder, labels, "--labels", "file")),
    )
    parse_site(parse_toml(text, NAME), NAME)
    return text


def _check_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: not a folder")
    there = [found for found in (NAME, "state") if os.path.lexists(folder / found)]
    if there:
        raise UsageError(
            f"{folder}: already holds {' and '.join(there)}, which stay as they are; "
            "name another folder, or run `consilium site check` on this one"
        )


def _place(folder: Path, text: str) -> None:
    """Make everything out of sight, then move it into place: the state first, which only one process can."""
    scratch = Path(tempfile.mkdtemp(prefix=".init-", dir=folder))
    try:
        state = scratch / "state"
        state.mkdir(mode=0o700)
        make_secret(state / "secret")
        audit.append(state / "audit.jsonl", "init", {})
        (scratch / NAME).write_text(text, encoding="utf-8")
        state.rename(folder / "state")
        (scratch / NAME).rename(folder / NAME)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _assignment(key: str, value: str) -> str:
    return tomli_w.dumps({key: value}).rstrip("\n")


def _default_name(folder: Path) -> str:
    kept = re.sub(r"[^A-Za-z0-9._-]", "", folder.resolve().name)
    return kept.lstrip("._-")[:63] or "site"


def _from(folder: Path, path: Path | None, option: str, kind: str) -> str:
    """Return a path as site.toml names it: below the site's folder relative to it, else absolute."""
    if path is None:
        return ""
    whole = Path(os.path.abspath(path.expanduser()))  # noqa: PTH100  not resolved: a link keeps its name
    if not (whole.is_dir() if kind == "folder" else whole.is_file()):
        raise UsageError(f"{option}: there is no {kind} {path}")
    try:
        str(whole).encode()
    except UnicodeEncodeError:
        raise UsageError(f"{option}: the path is not UTF-8, so no TOML file can name it; use a link to it") from None
    return str(whole.relative_to(folder)) if whole.is_relative_to(folder) and whole != folder else str(whole)

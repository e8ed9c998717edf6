"""`site.toml`: what one hospital says of itself. Local facts: nothing of it is ever sent but the name.

Paths are relative to the folder of the file. Limits refuse, they never clamp.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from client.labels import Rules
from client.pacs_config import DicomWeb
from common.address import Address, parse_address
from common.errors import ConfigError
from common.names import Name
from common.presets import PRESETS, Preset
from common.run_config import METRICS, StrategyKind
from common.sections import LogsSection, MonitorSection
from common.strict import Section, read_toml, validated

NAME = "site.toml"
"""What the file is called when nothing else is said."""

SOCKET_BYTES = 107
"""The longest path of a unix socket (sun_path of Linux, less its end)."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_HOURS = re.compile(r"((?:[01][0-9]|2[0-3]):[0-5][0-9])-((?:[01][0-9]|2[0-3]):[0-5][0-9]|24:00)")
_PROXY = re.compile(r"http://(?P<address>[^/@]+)/?")


def _words(value: Any) -> Any:
    """Return one word or a list of them as texts: TOML's `positive = 1` means the word `1`."""
    values = value if isinstance(value, list) else [value]
    if all(isinstance(word, str | int) for word in values):
        return tuple(str(int(word)) if isinstance(word, bool) else str(word) for word in values)
    return value  # pydantic says what is wrong


def known_coordinator(text: str) -> str:
    """Return the one way in which a coordinator is written: 64 small hexadecimal digits, or host:port.

    Raises:
        ValueError: it is neither a fingerprint nor an address.

    Examples:
        >>> known_coordinator("AB:" * 31 + "CD") == "ab" * 31 + "cd"
        True
        >>> known_coordinator("fl.example.org:9443")
        'fl.example.org:9443'
    """
    digits = text.replace(":", "").lower()
    if _SHA256.fullmatch(digits):
        return digits
    try:
        return str(parse_address(text)).lower()
    except ValueError:
        raise ValueError(
            f"got {text[:120]!r}, expected the SHA-256 fingerprint of an authority as `consilium site join` prints it, "
            "or host:port"
        ) from None


def hours_of(text: str) -> tuple[int, int]:
    """Return the minutes of a day at which hours begin and end; they cross midnight where the end comes first.

    Raises:
        ValueError: it is no span of time, or an empty one.

    Examples:
        >>> hours_of("20:00-06:30")
        (1200, 390)
    """
    found = _HOURS.fullmatch(text)
    if found is None:
        raise ValueError(f'got {text[:80]!r}, expected hours such as "20:00-06:00"')
    start, end = _minutes(found[1]), _minutes(found[2])
    if start == end:
        raise ValueError(f"got {text!r}, which is no time at all; leave hours out for any time")
    return start, end


def _minutes(clock: str) -> int:
    hours, _, minutes = clock.partition(":")
    return int(hours) * 60 + int(minutes)


def _some_of(known: Sequence[str], value: tuple[str, ...]) -> tuple[str, ...]:
    foreign = [name for name in value if name not in known]
    if foreign:
        raise ValueError(f"got {foreign[0]!r}, expected some of {', '.join(known)}")
    return value


def _place(value: str) -> str:
    """Refuse what no file system has in a name, before it ends in an error that names nothing."""
    if any(character < " " for character in value):
        raise ValueError("expected a path without control characters")
    return value


Words = Annotated[tuple[str, ...], BeforeValidator(_words), Field(strict=False)]
Place = Annotated[str, AfterValidator(_place)]
Names = Annotated[tuple[str, ...], Field(strict=False)]
Users = Annotated[tuple[str | Annotated[int, Field(ge=0, lt=2**32)], ...], Field(strict=False)]


class SiteSection(Section):
    """Who the site is, and where it keeps what it knows."""

    name: Name  # in the federation
    state: Place = "state"  # folder for secret, index, caches, audit trail; made if absent
    socket: Place = ""  # where the daemon listens; empty: daemon.sock in the state
    peers: Users = ()  # users, by name or number, who may speak to the daemon besides its own


class DataSection(Section):
    """Where the images and their labels are."""

    images: Place = ""  # folder; empty: what is pulled from the PACS
    labels: Place = ""  # CSV file; empty: manifest.csv in the folder, or one subfolder a class
    key: str = "auto"  # column that names the image, or what it holds: path, SOPInstanceUID, ..., AccessionNumber
    label: Words = ()  # column of words, or several columns of 1/0/-1/blank; empty: found by itself
    positive: Words = ()  # words of the one column that mean yes
    uncertain: Literal["ignore", "zeros", "ones", "soft"] = "ignore"  # what -1 means
    blank: Literal["zeros", "ignore"] = "zeros"  # what an empty cell means among several columns
    patient: str | None = None  # column to take in place of PatientID
    split: str | None = None  # column with train, validation, test; None: one called split, else the site's own
    words: dict[str, str] = Field(
        default_factory=dict
    )  # local word or column -> the federation's label; empty text: leave out
    placeholder_patients: Literal["stop", "quarantine"] = "stop"  # images of PatientIDs that stand for nobody
    preset: str = "generic"  # a name of client.preprocessing.PRESETS
    image_size: int | None = Field(default=None, ge=16, le=2048)  # pixels, square; None: the preset's
    dicomweb: DicomWeb | None = None

    @field_validator("preset")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in PRESETS:
            raise ValueError(f"got {value!r}, expected one of {', '.join(PRESETS)}")
        return value


class PolicySection(Section):
    """Limits on what a coordinator may ask; a run outside of them is refused as a whole. An empty list: any.

    `client.policy` judges by them. Limits refuse, they never clamp, and what cannot be judged is refused.
    """

    # who asks, for what
    tasks: Names = ()  # names of tasks
    backbones: Names = ()  # names of timm models
    trunks: Names = ()  # SHA-256 of frozen weights, 64 hexadecimal digits
    strategies: Names = ()  # without their parameters
    coordinators: Names = ()  # fingerprints of an authority, as `site join` prints them, or host:port
    metrics: Names = ()  # statistics of an evaluation that may leave: names of METRICS
    closed: bool = False  # whether an empty list allows nothing, where it otherwise allows any
    # how much
    max_rounds: int | None = Field(default=None, ge=1)  # None: any number
    max_local_steps: int | None = Field(default=None, ge=1)  # optimiser steps a round at this site
    max_local_epochs: int | None = Field(default=None, ge=1)  # passes a round over this site's training split
    max_bytes_out: int | None = Field(default=None, ge=1)  # bytes of one reply
    # how many stand behind what leaves
    min_patients: int = Field(default=0, ge=0)  # in the training split
    min_per_label: int = Field(default=0, ge=0)  # training examples of every label of the run
    min_batch: int = Field(default=2, ge=2)  # examples a batch; a batch of one is never allowed
    min_sites: int = Field(default=1, ge=1)  # sites that a run names, and that a round needs
    min_cell: int = Field(default=0, ge=0)  # k: counts below it do not leave; 0: they do
    round_counts: int | None = Field(default=None, ge=1, le=3)  # significant digits of counts that leave; None: exact
    # differential privacy
    privacy: Literal["optional", "required"] = "optional"
    max_epsilon: float | None = Field(default=None, gt=0)  # of the whole ledger: all runs on these patients together
    max_delta: float | None = Field(default=None, gt=0, lt=1)  # likewise
    allow_exact: bool = False  # whether a site with max_epsilon still takes runs without privacy
    # when, and who looks first
    hours: Words = ()  # "20:00-06:00", local time, one or several; new work is refused outside; empty: at any time
    approval: bool = False  # whether each new run waits for `consilium site approve`
    review: bool = False  # whether each reply waits in the outbox for `consilium site outbox --release`

    @field_validator("strategies")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _some_of(get_args(StrategyKind), value)

    @field_validator("metrics")
    @classmethod
    def _measured(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _some_of(METRICS, value)

    @field_validator("trunks")
    @classmethod
    def _digests(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [text for text in value if not _SHA256.fullmatch(text.lower())]
        if wrong:
            raise ValueError(f"got {wrong[0][:80]!r}, expected the 64 hexadecimal digits of a SHA-256")
        return tuple(text.lower() for text in value)

    @field_validator("coordinators")
    @classmethod
    def _reached(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(known_coordinator(text) for text in value)

    @field_validator("hours")
    @classmethod
    def _spans(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            hours_of(text)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> PolicySection:
        if self.privacy == "required" and self.allow_exact:
            raise ValueError('privacy = "required" and allow_exact = true contradict each other: take one out')
        return self


class CoordinatorSection(Section):
    """Where the coordinator is, and the keys to speak with it; `consilium site join` fills it in."""

    address: str = ""  # host:port
    ca_certificate: Place = ""  # PEM file; empty: link/ca.pem
    private_key: Place = ""  # file, for the eyes of its owner only; empty: link/node.key
    proxy: str = ""  # http://host:port, on the way to the coordinator

    @field_validator("address")
    @classmethod
    def _reachable(cls, value: str) -> str:
        if value:
            parse_address(value)
        return value

    @field_validator("proxy")
    @classmethod
    def _through(cls, value: str) -> str:
        found = _PROXY.fullmatch(value)
        if value and not found:
            raise ValueError(f"got {value!r}, expected http://host:port")
        if found:
            parse_address(found["address"])
        return value


class ComputeSection(Section):
    """What the site computes with."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1, le=1024)  # processes that decode; None: one a core
    weights: Place = ""  # .safetensors file of pretrained weights at this site: a run that uses them sends no trunk


class SiteToml(Section):
    """The whole file."""

    site: SiteSection
    data: DataSection = DataSection()
    policy: PolicySection = PolicySection()
    coordinator: CoordinatorSection = CoordinatorSection()
    compute: ComputeSection = ComputeSection()
    logs: LogsSection = LogsSection()
    monitor: MonitorSection = MonitorSection()


@dataclass(frozen=True)
class Coordinator:
    """What a link needs to reach its coordinator."""

    address: Address
    ca_certificate: Path
    private_key: Path
    proxy: str | None


@dataclass(frozen=True)
class SiteConfig:
    """A site's configuration with its paths resolved."""

    path: Path  # of site.toml
    toml: SiteToml

    @property
    def name(self) -> str:
        """The site's name in the federation."""
        return self.toml.site.name

    @property
    def state(self) -> Path:
        """The folder of everything that the site keeps."""
        return self._resolved(self.toml.site.state)

    @property
    def secret(self) -> Path:
        """The file of the secret that all digests of this site are made with."""
        return self.state / "secret"

    @property
    def optout(self) -> Path:
        """The list of patients who are not to be used."""
        return self.state / "optout"

    @property
    def cache(self) -> Path:
        """The folder of everything that can be made again: records of files, images, features."""
        return self.state / "cache"

    @property
    def audit(self) -> Path:
        """The audit trail."""
        return self.state / "audit.jsonl"

    @property
    def images(self) -> Path:
        """The folder of the images."""
        return self._resolved(self.toml.data.images) if self.toml.data.images else self.state / "pacs"

    @property
    def labels(self) -> Path | None:
        """The label table, if one is named."""
        return self._resolved(self.toml.data.labels) if self.toml.data.labels else None

    @property
    def weights(self) -> Path | None:
        """The file of pretrained weights, if one is named."""
        return self._resolved(self.toml.compute.weights) if self.toml.compute.weights else None

    @property
    def preset(self) -> Preset:
        """How images are shown to the network."""
        return PRESETS[self.toml.data.preset]

    @property
    def image_size(self) -> int:
        """S, pixels a side."""
        return self.toml.data.image_size or self.preset.image_size

    @property
    def rules(self) -> Rules:
        """How the label table is read."""
        data = self.toml.data
        return Rules(
            key=data.key,
            label=data.label,
            positive=data.positive,
            uncertain=data.uncertain,
            blank=data.blank,
            patient=data.patient,
            split=data.split,
            words=data.words,
        )

    @property
    def socket(self) -> Path:
        """Where the daemon listens.

        Raises:
            ConfigError: the path is longer than that of a socket can be.
        """
        path = self._resolved(self.toml.site.socket) if self.toml.site.socket else self.state / "daemon.sock"
        length = len(os.fsencode(path))
        if length > SOCKET_BYTES:
            raise ConfigError(
                f"{self.path.name}: [site] socket: {path} has {length} bytes, a socket's path at most {SOCKET_BYTES}; "
                'name a shorter one, such as socket = "/run/consilium/site.sock"'
            )
        return path

    @property
    def peers(self) -> frozenset[int]:
        """Numbers of the users who may speak to the daemon besides its own.

        Raises:
            ConfigError: a name that this machine does not know.
        """
        return frozenset(self._user(user) for user in self.toml.site.peers)

    @property
    def private_key(self) -> Path:
        """The site's private key in the federation."""
        return self._named(self.toml.coordinator.private_key or "link/node.key")

    @property
    def ca_certificate(self) -> Path:
        """The certificate of the authority that the coordinator's is signed by."""
        return self._named(self.toml.coordinator.ca_certificate or "link/ca.pem")

    @property
    def link_folder(self) -> Path:
        """The folder of the link, which owns the key and nothing of the data."""
        return self.private_key.parent

    def coordinator(self) -> Coordinator:
        """Return what the link needs to reach its coordinator.

        Raises:
            ConfigError: the site has joined none yet.
        """
        section = self.toml.coordinator
        if not section.address:
            raise ConfigError(
                f"{self.path.name}: [coordinator] address: missing - run `consilium site join` with the invitation"
            )
        return Coordinator(
            parse_address(section.address), self.ca_certificate, self.private_key, section.proxy.rstrip("/") or None
        )

    def _user(self, user: str | int) -> int:
        try:
            return user if isinstance(user, int) else pwd.getpwnam(user).pw_uid
        except (KeyError, ValueError):
            raise ConfigError(f"{self.path.name}: [site] peers: this machine knows no user {user!r}") from None

    def _named(self, path: str) -> Path:
        """Return a path in its true folder, but not what it leads to if it is a link: a key may not be one."""
        place = self.path.parent / Path(path).expanduser()
        return place.parent.resolve() / place.name

    def _resolved(self, path: str) -> Path:
        return (self.path.parent / Path(path).expanduser()).resolve()


def read_site(path: Path) -> SiteConfig:
    """Read a `site.toml` whose data are named.

    Raises:
        ConfigError: it cannot be read, is no TOML, or holds a key or a value that is not expected.
    """
    config = read_any_site(path)
    if not config.toml.data.images and config.toml.data.dicomweb is None:
        raise ConfigError(f"{path.name}: [data] images: missing - name the folder of the images, or a [data.dicomweb]")
    return config


def read_any_site(path: Path) -> SiteConfig:
    """Read a `site.toml`, also one whose data are not named yet.

    Raises:
        ConfigError: it cannot be read, is no TOML, or holds a key or a value that is not expected.
    """
    config = SiteConfig(path.resolve(), parse_site(read_toml(path), path.name))
    for section, key, place in _places(config.toml):
        try:
            config._resolved(place)
        except (OSError, RuntimeError):  # a home that nobody has, a loop of links
            raise ConfigError(f"{path.name}: [{section}] {key}: got {place!r}, which leads nowhere") from None
    return config


def parse_site(values: Mapping[str, Any], where: str) -> SiteToml:
    """Return the validated content of a `site.toml`; whether its paths are filled in is another question.

    Raises:
        ConfigError: a key or a value that is not expected.
    """
    return validated(SiteToml, values, where)


def _places(toml: SiteToml) -> tuple[tuple[str, str, str], ...]:
    site, data, coordinator = toml.site, toml.data, toml.coordinator
    return (
        ("site", "state", site.state),
        ("site", "socket", site.socket),
        ("data", "images", data.images),
        ("data", "labels", data.labels),
        ("coordinator", "ca_certificate", coordinator.ca_certificate),
        ("coordinator", "private_key", coordinator.private_key),
    )

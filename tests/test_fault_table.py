"""Every fault at several moments of a run: it ends by itself, says truly how, and loses nothing.

Where the same sites contributed the model has the bytes of the undisturbed run. The table of faults and outcomes is
printed at the end, and written where `--fault-table` says. `--faults sample` takes some faults, each at one moment,
drawn by `--fault-seed`; all of them are taken by default.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import certificates
from common.files import write_atomic
from server import board, tls
from simulations import rehearsed
from simulations.stage import COORDINATOR
from tests import drill, mischief
from tests.drill import ROUNDS, Play, until

pytestmark = pytest.mark.faults

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
HOSTILE = (mischief.__file__,)
MANY = 60
"""Rounds of a run that a site can join on its way: its link looks for the coordinator every 20 seconds at least."""

Wait = Callable[[Play, Path], None]


def _setup(_play: Play, folder: Path) -> None:
    until(lambda: any(site["at"] for site in (board.read(folder) or {"sites": {}})["sites"].values()))


def _round(play: Play, folder: Path) -> None:
    training = play.training("site-1", 2)
    until(lambda: training() or (board.read(folder) or {})["phase"] == "ended")


def _end(_play: Play, folder: Path) -> None:
    until(lambda: (board.read(folder) or {})["phase"] in ("validation", "test", "ended"))


MOMENTS: dict[str, Wait] = {"setup": _setup, "round": _round, "end": _end}
"""While sites are being set up; while they train; while the model is judged for the last time."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a run, and what has to become of it."""

    what: str
    strike: Callable[[Play, Path, ExitStack], None]  # what is to be undone, or waited for, goes on the stack
    outcome: Callable[[Play, Path, str], dict[str, Any]]
    sites: dict[str, Any] = field(default_factory=dict)  # of the run
    before: Callable[[Play, ExitStack], None] | None = None
    rounds: dict[str, int] = field(default_factory=dict)  # by moment, where it takes more than a few
    needs: Callable[[Play], str] = lambda _play: ""


# What has to become of it


def whole(play: Play, folder: Path, _moment: str) -> dict[str, Any]:
    """All sites contributed: the bytes of the undisturbed run."""
    return play.check_undisturbed(folder)


def without(site: str, *statuses: str, least: dict[str, int], rounds: int = ROUNDS) -> Callable[..., dict[str, Any]]:
    """Return the check of a run in which a site missed something, or nothing if the fault came too late."""

    def check(play: Play, folder: Path, moment: str) -> dict[str, Any]:
        found = play.outcome(folder)
        if found["status"] == "completed":
            return play.check_undisturbed(folder)
        return play.check_partial(folder, site, statuses, range(least[moment], rounds + 1))

    return check


def changed(play: Play, folder: Path, moment: str) -> dict[str, Any]:
    """Site-2 is in with the data that it declared, or it is not believed any more."""
    found = play.outcome(folder)
    if found["status"] == "completed" and moment == "setup":  # it declared what it has now
        assert all(site["rounds"] == ROUNDS for site in found["sites"].values())
        play.check_clean(folder)
        return found
    statuses = ("contributed", "quarantined(examples_differ)", "quarantined(bad_statistics)")
    least = {"setup": 0, "round": 1, "end": ROUNDS - 1}
    return without("site-2", *statuses, least=least)(play, folder, moment)


# Processes that are killed


def kill(name: str, role: str) -> Callable[[Play, Path, ExitStack], None]:
    def strike(play: Play, _folder: Path, _stack: ExitStack) -> None:
        os.kill(play.pid(name, role), signal.SIGKILL)

    return strike


def kill_engine(play: Play, folder: Path, _stack: ExitStack) -> None:
    play.kill_engine(folder)


def kill_proxy(play: Play, _folder: Path, _stack: ExitStack) -> None:
    assert play.front is not None
    play.front.kill()
    time.sleep(2.0)  # systemd's RestartSec
    play.front.begin()


def kill_machine(name: str) -> Callable[[Play, Path, ExitStack], None]:
    """Return what ends all processes of a site or of the coordinator at once, and starts them again after a while."""

    def strike(play: Play, folder: Path, _stack: ExitStack) -> None:
        pids = play.stage.pids(name)
        for pid in (pids.pop("supervisor"), *pids.values()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if name == COORDINATOR:
            play.kill_engine(folder)
        play.stage.end(name)
        time.sleep(2.0)
        play.stage.start(name)

    return strike


# Networks that are parted


@contextmanager
def parted(play: Play) -> Iterator[None]:
    assert play.line is not None
    play.line.cut = True
    try:
        yield
    finally:
        play.line.cut = False


def unreachable(seconds: float) -> Callable[[Play, Path, ExitStack], None]:
    def strike(play: Play, _folder: Path, _stack: ExitStack) -> None:
        with parted(play):
            time.sleep(seconds)

    return strike


def unreachable_for_good(play: Play, _folder: Path, stack: ExitStack) -> None:
    stack.enter_context(parted(play))


def away_at_first(play: Play, stack: ExitStack) -> None:
    """Have site-2 come up behind a line that is cut: it is there, and the coordinator has not heard of it."""
    play.stage.end("site-2")
    until(lambda: "site-2" not in play.stage.connected())
    stack.enter_context(parted(play))
    play.stage.start("site-2")
    until(lambda: play.ready("site-2"))


def comes(play: Play, _folder: Path, _stack: ExitStack) -> None:
    assert play.line is not None
    play.line.cut = False


def hang(play: Play, _folder: Path, _stack: ExitStack) -> None:
    pid = play.pid("site-2", "daemon")
    os.kill(pid, signal.SIGSTOP)
    time.sleep(25.0)  # longer than the run's deadline
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


# Disks, clocks, certificates


def full_disk(name: str) -> Callable[[Play, Path, ExitStack], None]:
    def strike(play: Play, _folder: Path, _stack: ExitStack) -> None:
        disk = play.disks[name]
        drill.fill(disk)
        time.sleep(6.0)
        (disk / "filler").unlink()

    return strike


def needs_mount(play: Play) -> str:
    return "" if play.disks else "needs the right to mount a file system (root)"


def wrong_clock_possible(play: Play, stack: ExitStack) -> None:
    """Start site-3 on a clock that can be put wrong."""
    place = play.stage.sites["site-3"].parent / "clock"
    place.write_text("+0\n")
    faked = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(place),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    play.stage.end("site-3")
    play.stage.start("site-3", environment=faked)
    play.settle()

    def honest() -> None:
        play.stage.end("site-3")
        play.stage.start("site-3")

    stack.callback(honest)


def wrong_clock(hours: int) -> Callable[[Play, Path, ExitStack], None]:
    def strike(play: Play, _folder: Path, _stack: ExitStack) -> None:
        place = play.stage.sites["site-3"].parent / "clock"
        place.write_text(f"{hours:+d}h\n")
        time.sleep(8.0)
        place.write_text("+0\n")  # somebody has mended it

    return strike


def expired(play: Play, _folder: Path, _stack: ExitStack) -> None:
    config = play.stage.config
    then = datetime.now(UTC) - timedelta(days=certificates.SERVER_DAYS + 1)
    hosts = [config.address.host]
    ended = certificates.make_server(config.ca_certificate, config.ca_key, config.key, hosts, then)
    write_atomic(config.certificate, ended)
    _shown(play)
    time.sleep(8.0)
    tls.renew(config)
    _shown(play)


def _shown(play: Play) -> None:
    """Have the front take up the coordinator's certificate; the SuperLink itself does so by itself."""
    if play.front is not None:
        play.front.reload()


# What a hospital does


def rewritten(site: str, change: Callable[[Play, Path], None]) -> Callable[[Play, Path, ExitStack], None]:
    """Return what changes files of a site, has its daemon start anew, and puts everything back in the end."""

    def strike(play: Play, _folder: Path, stack: ExitStack) -> None:
        place = play.stage.sites[site].parent
        kept = {path: path.read_bytes() for path in (place / "site.toml", place / "cohort.npz", place / "pixels.npy")}

        def undone() -> None:
            for path, content in kept.items():
                path.write_bytes(content)
            os.kill(play.pid(site, "daemon"), signal.SIGKILL)

        stack.callback(undone)
        change(play, place)
        os.kill(play.pid(site, "daemon"), signal.SIGKILL)

    return strike


def fewer_examples(_play: Play, place: Path) -> None:
    cohort = rehearsed.read(place)
    rows = np.arange(len(cohort))[:-3]
    facts = {name: getattr(cohort, name)[rows] for name in ("digests", "labels", "splits", "patients")}
    names = {"names": np.array(cohort.label_names), "preprocessing": np.array(cohort.preprocessing)}
    np.savez(place / "cohort.npz", allow_pickle=False, **names, **facts)
    np.save(place / "pixels.npy", cohort.pixels(rows))


def stricter(_play: Play, place: Path) -> None:
    with (place / "site.toml").open("a") as file:
        file.write("\n[policy]\nmax_rounds = 1\n")


# Hostile answers


def hostile(play: Play, stack: ExitStack) -> None:
    play.stage.end("site-3")
    play.stage.start("site-3", HOSTILE)
    play.settle()

    def honest() -> None:
        play.stage.end("site-3")
        play.stage.start("site-3")

    stack.callback(honest)


def told(kind: str, number: int) -> Callable[[Play, Path, ExitStack], None]:
    """Return what has the hostile site answer in a certain way in a certain round."""

    def strike(play: Play, _folder: Path, stack: ExitStack) -> None:
        place = play.stage.sites["site-3"].parent
        (place / mischief.DONE).unlink(missing_ok=True)
        (place / mischief.ORDERS).write_text(json.dumps({"kind": kind, "round": number}))

        def check() -> None:
            assert (place / mischief.DONE).exists(), "the site did as it should"
            (place / mischief.ORDERS).unlink(missing_ok=True)

        stack.callback(check)

    return strike


PATIENT = {"patience_s": 180.0}
HURRIED = {"quorum": 2, "patience_s": 15.0}

KILLED = {
    "superlink": Fault("the SuperLink is killed", kill(COORDINATOR, "superlink"), whole),
    "engine": Fault("the ServerApp is killed", kill_engine, whole),
    "keeper": Fault("the keeper is killed", kill(COORDINATOR, "keeper"), whole),
    "proxy": Fault(
        "the proxy is killed, and back after 2 s",
        kill_proxy,
        whole,
        needs=lambda play: "" if play.front else "no nginx (Debian: apt-get install nginx-light)",
    ),
    "coordinator": Fault("all of the coordinator is killed", kill_machine(COORDINATOR), whole),
    "link": Fault("a site's link is killed", kill("site-2", "link"), whole),
    "daemon": Fault("a site's daemon is killed", kill("site-2", "daemon"), whole),
    "site": Fault("all of a site is killed", kill_machine("site-2"), whole),
}
AWAY = {
    "minute": Fault("a site is unreachable for a minute", unreachable(60.0), whole, PATIENT),
    "good": Fault(
        "a site is unreachable for good",
        unreachable_for_good,
        without(
            "site-2", "lost(absent)", "lost(deadline)", "contributed", least={"setup": 0, "round": 1, "end": ROUNDS - 1}
        ),
        HURRIED,
    ),
    "late": Fault(
        "a site joins late",
        comes,
        without("site-2", "contributed", "lost(absent)", least={"setup": 0, "round": 1, "end": 0}, rounds=MANY),
        {"quorum": 2, "patience_s": 10.0},
        before=away_at_first,
        rounds={"round": MANY},
    ),
    "slow": Fault(
        "a site is slow beyond the deadline",
        hang,
        without(
            "site-2",
            "lost(deadline)",
            "lost(unavailable)",
            "lost(absent)",
            "contributed",
            least={"setup": 0, "round": 1, "end": ROUNDS - 1},
        ),
        {"quorum": 2, "patience_s": 10.0, "deadline_s": 12.0},
    ),
}
WORLD = {
    "full": Fault("the coordinator's disk is full for 6 s", full_disk(COORDINATOR), whole, PATIENT, needs=needs_mount),
    "full-site": Fault(
        "a site's disk is full for 6 s",
        full_disk("site-3"),
        whole,
        PATIENT,
        needs=needs_mount,
    ),
    "clock": Fault(
        "a site's clock is an hour ahead for 8 s",
        wrong_clock(1),
        whole,
        PATIENT,
        before=wrong_clock_possible,
        needs=lambda _play: "" if FAKETIME else "no libfaketime (Debian: apt-get install libfaketime)",
    ),
    "certificate": Fault("the certificate has expired, and is renewed after 8 s", expired, whole, PATIENT),
}
DECIDED = {
    "data": Fault("a site's data changed", rewritten("site-2", fewer_examples), changed, {"quorum": 2}),
    "policy": Fault(
        "a site's policy refuses the run from now on",
        rewritten("site-2", stricter),
        without("site-2", "refused(policy)", "contributed", least={"setup": 0, "round": 1, "end": ROUNDS - 1}),
        {"quorum": 2},
    ),
}
POISON = {
    "nan": "values that are no numbers",
    "shapes": "a wrong shape",
    "counts": "an absurd count",
    "norms": "an absurd norm",
    "statistics": "counts that contradict what was declared",
    "replay": "the reply of the round before",
    "garbage": "bytes that mean nothing",
    "late": "a reply after the deadline",
    "duplicate": "the same reply four times",
}
REASON = {
    "nan": "not_finite",
    "shapes": "wrong_shape",
    "counts": "examples_differ",
    "norms": "norm_too_large",
    "statistics": "bad_statistics",
    "replay": "wrong_round",
    "garbage": "unreadable",
}
FAULTS = {**KILLED, **AWAY, **WORLD, **DECIDED}


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Play]:
    with drill.opened(tmp_path_factory.mktemp("faults"), hard=True) as found:
        yield found


@pytest.fixture
def row(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Return what adds a row to the table."""

    def add(fault: str, moment: str, phase: str, found: dict[str, Any], seconds: float, *, same: bool) -> None:
        sites = {site: f"{facts['status']}, {facts['rounds']} rounds" for site, facts in found["sites"].items()}
        record_property(
            "fault",
            {
                "fault": fault,
                "moment": moment,
                "phase": phase,
                "status": found["status"],
                "bytes": "the undisturbed run's" if same else "another",
                "sites": sites,
                "seconds": round(seconds, 1),
            },
        )

    del request
    return add


def struck(play: Play, name: str, fault: Fault, moment: str, seed: int) -> tuple[dict[str, Any], str, float, bool]:
    """Play one run with one fault.

    Returns:
        Its result, the phase that was struck, how long it took, and whether its model is the undisturbed run's.
    """
    reason = fault.needs(play)
    if reason:
        pytest.skip(reason)
    with ExitStack() as stack:
        stack.callback(play.settle)
        if fault.before is not None:
            fault.before(play, stack)
        begin = time.monotonic()
        with play.run(f"{name}-{moment}", fault.rounds.get(moment, ROUNDS), **fault.sites) as folder:
            MOMENTS[moment](play, folder)
            time.sleep(drill.jitter(seed, name, moment))
            phase = str((board.read(folder) or {}).get("phase"))
            fault.strike(play, folder, stack)
            found = fault.outcome(play, folder, moment)
            same = play.same(folder)
    return found, phase, time.monotonic() - begin, same


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_run_ends_and_says_truly_how(
    name: str, moment: str, play: Play, row: Callable[..., None], fault_seed: int
) -> None:
    fault = FAULTS[name]
    found, phase, seconds, same = struck(play, name, fault, moment, fault_seed)
    row(fault.what, moment, phase, found, seconds, same=same)


@pytest.fixture(scope="module")
def poisoned(play: Play) -> Iterator[Play]:
    with ExitStack() as stack:
        stack.callback(play.settle)
        hostile(play, stack)
        yield play


@pytest.mark.parametrize("number", range(1, ROUNDS + 1))
@pytest.mark.parametrize("kind", POISON)
def test_an_answer_that_must_not_count_does_not(
    kind: str, number: int, poisoned: Play, row: Callable[..., None]
) -> None:
    play = poisoned
    deadline = {"deadline_s": 15.0} if kind == "late" else {}
    if kind == "replay" and number == 1:
        pytest.skip("nothing comes before the first round")
    begin = time.monotonic()
    with play.run(f"{kind}-{number}", quorum=2, **deadline) as folder, ExitStack() as stack:
        told(kind, number)(play, folder, stack)
        if kind == "duplicate":
            found = play.check_undisturbed(folder)
        elif kind == "late":
            found = play.check_partial(folder, "site-3", ("contributed", "lost(deadline)"), range(ROUNDS))
        else:
            found = play.check_partial(
                folder, "site-3", ("contributed", f"quarantined({REASON[kind]})"), range(ROUNDS - 1, ROUNDS)
            )
            assert found["rounds"][number]["sites"]["site-3"]["reason"] == REASON[kind]
        same = play.same(folder)
    row(f"a site sends {POISON[kind]}", f"round {number}", "rounds", found, time.monotonic() - begin, same=same)

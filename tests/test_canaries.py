"""Nothing of a patient, a path or an error ever reaches the coordinator: a real federation, and a search of all it has.

Hospitals whose data are full of words that stand for what must stay, and which fail in every way that has a text: a
table that cannot be read, damaged files, a disk that is full, exceptions of the opening, of the decoding and of the
training. Between nginx and the superlink each byte is written down as it comes out of TLS. One site more, of ours,
tells words on purpose: the search must find those.
"""

from __future__ import annotations

import base64
import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from client import audit, joining, link, selftest
from client.founding import found_state
from client.site_config import SiteConfig, read_site
from common.invitation import write_document
from common.messages import packed, to_bytes
from common.run_config import RunConfig
from common.supervisor import bound_to
from server import enrolment, roll, runs
from server import founding as server_founding
from server.control import Control
from server.endpoints import QUIET
from server.plan import settled
from server.server_config import ServerConfig, read_server
from simulations import encodings, tap
from tests.conftest import free_port, scan
from tests.sightings import sightings
from tests.test_strangers import needs_nginx, nginx_before

pytestmark = [pytest.mark.slow, pytest.mark.faults, needs_nginx]

ROOT = Path(__file__).parents[1]
BY_ROOT = os.geteuid() == 0
# What stands for a patient, a place, a person, a machine. All but the UID begin alike, so that no part is overlooked.
PATIENT = {
    "PatientName": "Zzkanarie^Anna",
    "PatientID": "ZZKANARIE-4711",
    "PatientBirthDate": "19470113",
    "AccessionNumber": "ZZKANARIE0815",
    "InstitutionName": "Zzkanarie Klinik",
    "ReferringPhysicianName": "Zzkanarie^Doktor",
    "StationName": "ZZKANARIE_CT1",
    "PatientComments": "zzkanarie-comment",
    "StudyDescription": "zzkanarie-study",
}
UID = "1.2.826.0.1.3680043.9.777123456789"
PRIVATE = (*PATIENT.values(), UID, "zzkanarie", "777123456789")
"""Words that neither the coordinator nor the site's public log may have; the place of the data below is one of them."""
PLACES = ("zzplace-root", "zzplace-host", "zzplace-user", "zzplace-home")
"""Words that the coordinator may not have either: where the data are, the machine, who runs it."""
TRAITOR = {name: f"zzverrat-{name}" for name in ("plain", "utf-16", "hex", "base64", "zlib", "zlib of hex")}
SITES = ("ward", "strict", "table", "opening", "decoding", "training", "disk", "traitor")

FAULTY = """
import sys
from dataclasses import replace
from pathlib import Path
from client import daemon
from client.site_config import read_site

def fail(*_arguments, **_options):
    raise ValueError("Zzkanarie^Anna in zzkanarie-folder/zzkanarie-1.dcm, 1.2.826.0.1.3680043.9.777123456789")

def opened(_progress):
    if sys.argv[1] == "opening":
        raise FileNotFoundError(2, "No such file", "/zzkanarie-folder/zzkanarie-1.dcm")
    from client import selftest, training  # not before the daemon has set up its log, as in the daemon itself
    cohort = selftest.drawn_cohort(selftest.drawn_run("test_efficientnet", "head"))
    if sys.argv[1] == "training":
        training.fit = fail
    return replace(cohort, source=fail) if sys.argv[1] == "decoding" else cohort

daemon.serve(read_site(Path(sys.argv[2])), opened)
"""


class Recorder(tap.Tap):
    """A tap that keeps what passes."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: tuple[list[bytes], list[bytes]] = ([], [])

    async def _pump(self, reader: Any, writer: Any, way: int) -> None:
        read = reader.read

        async def noted(count: int) -> bytes:
            chunk: bytes = await read(count)
            self.seen[way].append(chunk)
            return chunk

        reader.read = noted
        await super()._pump(reader, writer, way)


@dataclass
class Play:
    """The federation while it is up."""

    root: Path
    config: ServerConfig
    recorder: Recorder
    sites: dict[str, SiteConfig] = field(default_factory=dict)

    def coordinators(self) -> dict[str, bytes]:
        """Return all files that the coordinator has."""
        return {str(path): path.read_bytes() for path in self.config.path.parent.rglob("*") if path.is_file()}

    def printed(self) -> dict[str, bytes]:
        """Return what the processes of the sites printed, which a journal keeps."""
        return {str(path): path.read_bytes() for path in (self.root / "printed").iterdir()}


def coordinator(root: Path, address: int) -> ServerConfig:
    """Found a coordinator behind a proxy."""
    made = server_founding.found(root / "coordinator", f"127.0.0.1:{address}", "zoo")
    network = {"address": f"127.0.0.1:{address}", "listen": f"127.0.0.1:{free_port()}", "operator_port": free_port()}
    made.config.write_text(tomli_w.dumps({"server": {"name": "zoo"}, "network": {**network, "tls": "proxy"}}))
    return read_server(made.config)


def hospital(root: Path, config: ServerConfig, name: str) -> SiteConfig:
    """Found a hospital, give it its data, and enrol it."""
    place = root / "zzplace-root" / name
    (place / "images").mkdir(parents=True)
    values = {
        "site": {"name": name},
        "data": {"images": "images", "labels": "labels.csv", "label": "finding", "image_size": 32},
        "compute": {"device": "cpu", "threads": 1},
        "policy": {"max_rounds": 1} if name == "strict" else {},
    }
    (place / "site.toml").write_text(tomli_w.dumps(values))
    fill(place)
    site = read_site(place / "site.toml")
    found_state(site.state)
    if name == "table":
        (place / "labels.csv").write_bytes(
            b"path,finding\nzzkanarie-folder/zzkanarie-1.dcm,\xff\xfe\x00Zzkanarie^Anna\n"
        )
    invitation, answer = place / "invitation.json", place / "enrolment.json"
    write_document(invitation, enrolment.invite(config, name))
    joining.join(site.path, invitation, answer)
    enrolment.enrol(config, answer)
    roll.call(config, 60.0)
    return read_site(site.path)


def fill(place: Path) -> None:
    """Write DICOM files whose headers, names and folders tell of patients, and a table that tells more than it must."""
    folder = place / "images" / "zzkanarie-folder"
    folder.mkdir()
    rows = []
    for number in range(24):
        who = {**PATIENT, "PatientID": f"ZZKANARIE-{4711 + number}"}
        ids = {"StudyInstanceUID": f"{UID}.{number}", "SeriesInstanceUID": f"{UID}.{number}.1"}
        path = folder / f"zzkanarie-{number}.dcm"
        encodings.write(
            path, scan(number), 12, encodings.SYNTAXES["raw"], **who, **ids, SOPInstanceUID=f"{UID}.9.{number}"
        )
        rows.append((f"zzkanarie-folder/{path.name}", ("absent", "present")[number % 2], "Zzkanarie^Anna", UID))
    damaged = folder / "zzkanarie-damaged.dcm"
    damaged.write_bytes((folder / "zzkanarie-0.dcm").read_bytes()[:-900])
    (folder / "zzkanarie-none.dcm").write_bytes(b"Zzkanarie^Anna, no image at all")
    rows.append((f"zzkanarie-folder/{damaged.name}", "absent", "Zzkanarie^Anna", UID))
    with (place / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "finding", "zzkanarie-column", "zzkanarie-uid"), *rows])


def commands(site: SiteConfig) -> dict[str, list[str]]:
    """Return how a site's daemon and link are started."""
    python, path = [sys.executable, "-P"], str(site.path)
    daemon = [*python, "-m", "client.daemon", path]
    if site.name in ("opening", "decoding", "training"):
        daemon = [*python, "-c", FAULTY, site.name, path]
    if site.name == "disk":
        mount = f'mkdir -p {site.cache} && mount -t tmpfs -o size=24k tmpfs {site.cache} && exec "$@"'
        daemon = ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount, "sh", *daemon]
    found = {"daemon": daemon, "link": [*python, "-m", "client.link", path]}
    named = ["unshare", "--uts", "sh", "-c", 'hostname zzplace-host && exec "$@"', "sh"] if BY_ROOT else []
    return {name: [*named, *command] for name, command in found.items()}


@contextmanager
def started(command: list[str], log: Path, **places: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **places}
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, env=environment, start_new_session=True, preexec_fn=bound_to(os.getpid())
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Traitor(ClientApp):
    """Answers everything with words, in each form that the search must know."""

    def __call__(self, message: Message, context: Any) -> Message:
        word = {name: text.encode() for name, text in TRAITOR.items()}
        told = {
            "plain": word["plain"],
            "utf-16": TRAITOR["utf-16"].encode("utf-16-le"),
            "hex": word["hex"].hex().encode(),
            "base64": base64.b64encode(b"x" + word["base64"]),
            "zlib": b"x" + zlib.compress(b"some words around " + word["zlib"]),
            "zlib of hex": zlib.compress(word["zlib of hex"].hex().encode() * 3),
        }
        arrays = {name: Array("uint8", (len(text),), "consilium.raw", text) for name, text in told.items()}
        record = RecordDict({"arrays": ArrayRecord(arrays), "facts": ConfigRecord({"site": TRAITOR["plain"]})})
        return Message(packed(to_bytes(record)), reply_to=message)


def run_of(names: tuple[str, ...]) -> RunConfig:
    """Return a short run."""
    values = {
        "task": {"name": "zoo", "labels": selftest.LABELS},
        "data": {"preset": "generic", "image_size": selftest.SIDE, "views": 1},
        "model": {"backbone": "test_efficientnet", "weights": "none", "init": "zero"},
        "training": {"rounds": 2, "local_epochs": 1, "batch_size": 8},
        "sites": {"names": names, "quorum": 1, "deadline_s": 60.0, "patience_s": 20.0},
    }
    plan = RunConfig.model_validate(values)
    return settled(plan, plan.task, names, "generic").run


def await_all(config: ServerConfig, names: tuple[str, ...]) -> None:
    end = time.monotonic() + 240
    while True:
        with Control(config.endpoints) as control:
            online = {node.name for node in control.nodes() if node.status == "online"} if control.is_up() else set()
        if online >= set(names):
            return
        assert time.monotonic() < end, set(names) - online
        time.sleep(0.3)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Play]:
    """A federation that has run to its end, its processes gone."""
    root, port = tmp_path_factory.mktemp("zoo"), free_port()
    (root / "printed").mkdir()
    names = SITES if BY_ROOT else tuple(name for name in SITES if name != "disk")
    config = coordinator(root, port)
    places = {"USER": "zzplace-user", "LOGNAME": "zzplace-user", "HOME": str(root / "zzplace-home")}
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(tap, "Tap", Recorder)
        up = [sys.executable, "-P", "-m", "server.up", "up", str(config.path)]
        stack.enter_context(started(up, config.path.parent / "up.log"))
        passed: Any = stack.enter_context(tap.tapped(config.listen.port))
        behind, state = f"127.0.0.1:{passed.port}", config.state
        stack.enter_context(nginx_before(behind, state / "server.pem", state / "server.key", port))
        play = Play(root, config, passed)
        await_all(config, ())
        for name in names:
            play.sites[name] = hospital(root, config, name)
            for kind, command in commands(play.sites[name]).items():
                if name != "traitor":
                    stack.enter_context(started(command, root / "printed" / f"{name}-{kind}.log", **places))
        stack.enter_context(in_thread(play.sites["traitor"]))
        await_all(config, names)
        engine = runs.launch(config, runs.make_folder(config, run_of(names), root / "coordinator/runs/zoo"), bound=True)
        try:
            engine.wait(400)
        finally:
            engine.kill()
            engine.wait()
    yield play


@contextmanager
def in_thread(site: SiteConfig) -> Iterator[None]:
    """Keep the traitor linked by the true link, with an app of its own."""
    stop = threading.Event()
    thread = threading.Thread(target=link.run, args=(link.settings_of(site), Traitor(), stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)


def result(play: Play) -> Any:
    return json.loads((play.root / "coordinator/runs/zoo/result.json").read_text())


def test_the_run_went_on_with_the_site_that_works_and_the_others_failed_by_code(played: Play) -> None:
    found = result(played)
    assert found["status"] == "completed_partial"
    assert found["sites"]["ward"]["status"] == "contributed" and found["sites"]["ward"]["rounds"] == 2
    codes = {name: entry["status"] for name, entry in found["sites"].items() if name != "ward"}
    expected = {
        **dict.fromkeys(("table", "opening", "disk"), "refused(no_cohort)"),
        **dict.fromkeys(("decoding", "training"), "refused(internal)"),
        "strict": "refused(policy)",
        "traitor": "quarantined(unreadable)",
    }
    assert codes == {name: code for name, code in expected.items() if name in played.sites}


def test_the_texts_are_there_to_be_found_at_the_sites_themselves(played: Play) -> None:
    """Each fault had a text with a patient's name or a path in it, and the site's own log has that text."""
    for name in ("decoding", "training", "opening"):
        assert b"zzkanarie" in (played.sites[name].state / "daemon.log").read_bytes().lower(), name
    if BY_ROOT:
        assert b"No space left on device" in (played.sites["disk"].state / "daemon.log").read_bytes()


def test_a_limit_that_was_met_is_named_at_the_site_and_nowhere_else(played: Play) -> None:
    site, said = played.sites["strict"], b"[policy] max_rounds: the run has 2, allowed 1"
    assert said in (site.state / "daemon.log").read_bytes()
    decisions = [entry.facts for entry in audit.read(site.audit) if entry.event == "decision"]
    assert [(facts["rule"], facts["allowed"]) for facts in decisions] == [({"max_rounds": 1}, 0)]
    assert not any(b"max_rounds" in content for content in played.coordinators().values())


def test_no_word_of_theirs_is_in_any_byte_that_the_sites_sent(played: Play) -> None:
    sent = b"".join(played.recorder.seen[0])
    assert len(sent) > 100_000
    assert sightings(sent, (*PRIVATE, *PLACES, str(played.root))) == set()


def test_no_word_of_theirs_is_in_any_file_of_the_coordinator(played: Play) -> None:
    files = played.coordinators()
    assert {"report.html", "result.json", "engine.log", "superlink.log"} <= {Path(name).name for name in files}
    assert any("superlink.db" in name for name in files)
    for name, content in files.items():
        assert sightings(content, (*PRIVATE, *PLACES)) == set(), name


def test_no_word_of_a_patient_is_in_what_the_sites_processes_printed(played: Play) -> None:
    printed = played.printed()
    assert all(printed[name] for name in printed if name.endswith("daemon.log"))
    for name, content in printed.items():
        assert sightings(content, PRIVATE) == set(), name


def test_the_search_finds_what_one_site_told_on_purpose(played: Play) -> None:
    """By the same way and in the same record as the site's true answers."""
    found = sightings(b"".join(played.recorder.seen[0]), tuple(TRAITOR.values()))
    assert {word for word, _ in found} == set(TRAITOR.values())
    stored = {word for content in played.coordinators().values() for word, _ in sightings(content, [*TRAITOR.values()])}
    assert not stored, "nor is it kept anywhere once it was refused"


@pytest.mark.parametrize("form", ["utf-8", "capitals", "utf-16", "hex", "base64", "zlib", "gzip", "zip", "zlib twice"])
def test_the_search_knows_each_form(form: str) -> None:
    import gzip
    import io
    import zipfile

    word, archive = b"Zzkanarie^Anna", io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x", b"the name is " + word)
    made = {
        "utf-8": b"..." + word,
        "capitals": word.upper(),
        "utf-16": word.decode().encode("utf-16"),
        "hex": word.hex().upper().encode(),
        "base64": base64.b64encode(b"what is said of " + word + b" is said"),
        "zlib": b"..x" + zlib.compress(b"the name is " + word) + b"...",
        "gzip": b"..." + gzip.compress(b"the name is " + word),
        "zip": archive.getvalue(),
        "zlib twice": zlib.compress(zlib.compress(b"the name is " + word)),
    }
    noise = np.random.default_rng(0).bytes(4096)
    assert {
        found
        for found, _ in sightings(
            made[form] + noise if form == "zip" else noise + made[form] + noise, ["Zzkanarie^Anna"]
        )
    }
    assert not sightings(noise, ["Zzkanarie^Anna"])

"""Pulls from a real Orthanc, each side a process of its own, in a network namespace that nobody else can reach.

Debian: `apt-get install --no-install-recommends orthanc orthanc-dicomweb iproute2 util-linux`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from client.identity import Identity

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
CANARIES = ("CANARYNAME", "CANARYID", "CANARYORDER", "CANARYDESC")
SYNTAXES = {
    "explicit": ExplicitVRLittleEndian,
    "rle": RLELossless,
    "jpeg": JPEGBaseline8Bit,
    "jpegls": JPEGLSLossless,
    "jpeg2000": JPEG2000Lossless,
}
ROOT = Path(__file__).parents[1]
URL = "http://127.0.0.1:8042/dicom-web"
IDENTITY = Identity(b"s" * 32)

PULL = r"""
import json, logging, re, sys
from pathlib import Path
import client.dicomweb  # pydicom's plugins tell on being imported, which is no matter of ours
logging.basicConfig(level=logging.DEBUG)
from client.identity import Identity
from client.pacs import pull
from client.pacs_config import DicomWeb
from common.errors import ConsiliumError
base = Path(sys.argv[1])
report = lambda done, total: print(f"{done}/{total}", file=sys.stderr)
try:
    pulled = pull(DicomWeb(**json.loads(sys.argv[2])), base, base / "pacs", Identity(b"s" * 32), report)
except ConsiliumError as error:
    sys.exit(f"consilium: {error}")
peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # ru_maxrss is the parent's too
print(json.dumps({**pulled.__dict__, "peak": peak}))
"""
ASK = """
import base64, sys, urllib.request
head = {"Authorization": "Basic " + base64.b64encode(b"puller:s3cret").decode()}
body = sys.stdin.buffer.read() or None
request = urllib.request.Request("http://127.0.0.1:8042" + sys.argv[1], body, head)
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
sys.stdout.buffer.write(opener.open(request, timeout=60).read())
"""


def _missing() -> str | None:
    if os.geteuid() != 0:
        return "a network namespace needs root"
    lacking = [name for name in ("Orthanc", "unshare", "nsenter", "ip") if shutil.which(name) is None]
    if lacking or not PLUGIN.exists():
        return f"not installed: {', '.join(lacking) or 'orthanc-dicomweb'}"
    if subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode:
        return "this machine lets nobody make a network namespace"
    return None


WHY_NOT = _missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]


class Pacs:
    """One Orthanc, which can be killed and started again with the same studies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = {
            "StorageDirectory": str(folder / "db"),
            "IndexDirectory": str(folder / "db"),
            "HttpPort": 8042,
            "DicomServerEnabled": False,
            "AuthenticationEnabled": True,
            "RegisteredUsers": {"puller": "s3cret"},
            "Plugins": [str(PLUGIN)],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }
        (folder / "orthanc.json").write_text(json.dumps(config))
        # 1.10.1 binds every address, whatever it is told; the namespace keeps it to itself.
        self._space = subprocess.Popen(["unshare", "-n", "sh", "-c", "ip link set lo up; echo; exec sleep infinity"],
                                       stdout=subprocess.PIPE)  # fmt: skip
        assert self._space.stdout is not None
        self._space.stdout.read(1)
        self._inside = ["nsenter", "-t", str(self._space.pid), "-n"]
        self._orthanc: subprocess.Popen[bytes] | None = None

    def run(self, *command: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [*self._inside, *command],
            input=given,
            capture_output=True,
            cwd=ROOT,
            env=environment,
            check=False,
            timeout=300,
        )

    def begin(self, *command: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [*self._inside, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def ask(self, path: str, given: bytes = b"") -> bytes:
        done = self.run(sys.executable, "-c", ASK, path, given=given)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def start(self) -> None:
        with (self.folder / "orthanc.log").open("ab") as log:
            self._orthanc = subprocess.Popen(
                [*self._inside, "Orthanc", str(self.folder / "orthanc.json")], stdout=log, stderr=log
            )
        deadline = time.monotonic() + 30
        while self.run(sys.executable, "-c", ASK, "/system").returncode:
            assert time.monotonic() < deadline, (self.folder / "orthanc.log").read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        if self._orthanc is not None:
            self._orthanc.kill()  # nsenter became Orthanc, so this is its own process
            self._orthanc.wait()
            self._orthanc = None

    def close(self) -> None:
        self.kill()
        self._space.kill()
        self._space.communicate()

    def upload(self, content: bytes) -> bytes:
        """Return the file as Orthanc keeps it."""
        stored = json.loads(self.ask("/instances", content))
        return self.ask(f"/instances/{stored['ID']}/file")


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pacs]:
    pacs = Pacs(tmp_path_factory.mktemp("orthanc"))
    try:
        pacs.start()
        yield pacs
    finally:
        pacs.close()


@pytest.fixture(scope="module")
def stored(pacs: Pacs) -> dict[str, tuple[str, str, bytes]]:
    """Return by syntax: StudyInstanceUID, SOPInstanceUID, and the file as Orthanc keeps it."""
    made = {name: image(syntax, name) for name, syntax in SYNTAXES.items()}
    return {name: (d.StudyInstanceUID, d.SOPInstanceUID, pacs.upload(content(d))) for name, d in made.items()}


def image(syntax: str, name: str, side: int = 64, study: str = "") -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.PatientName, dataset.PatientID = "CANARYNAME^A", "CANARYID1"
    dataset.AccessionNumber = f"CANARYORDER{len(name)}"  # rle and jpeg stand alone, jpegls and explicit too
    dataset.StudyDescription = dataset.SeriesDescription = "CANARYDESC"
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    dataset.StudyInstanceUID = study or generate_uid()
    dataset.SeriesInstanceUID = generate_uid()
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.Modality, dataset.ConversionType = "OT", "WSD"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows = dataset.Columns = side
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    pixels = np.random.default_rng(len(name)).integers(0, 255, (side, side), np.uint8)
    dataset.add_new("PixelData", "OB", pixels.tobytes())
    if syntax == JPEGBaseline8Bit:
        jpeg = io.BytesIO()
        Image.fromarray(pixels).save(jpeg, "JPEG")
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.add_new("PixelData", "OB", encapsulate([jpeg.getvalue()]))
        dataset["PixelData"].is_undefined_length = True
    elif syntax != ExplicitVRLittleEndian:
        dataset.compress(syntax, generate_instance_uid=False)
    return dataset


def content(dataset: Dataset) -> bytes:
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


class Site:
    """A site's folder and its command line."""

    def __init__(self, base: Path, pacs: Pacs) -> None:
        self.base, self.pacs = base, pacs
        self.secret("puller:s3cret")

    def secret(self, text: str) -> None:
        path = self.base / "pacs.secret"
        path.write_text(text)
        path.chmod(0o600)

    def command(self, entries: list[str], **values: Any) -> list[str]:
        (self.base / "studies.txt").write_text("\n".join(entries))
        config = {
            "url": URL,
            "studies": "studies.txt",
            "credentials": "pacs.secret",
            "requests_per_second": 500,
            **values,
        }
        return [sys.executable, "-c", PULL, str(self.base), json.dumps(config)]

    def pull(self, entries: list[str], **values: Any) -> tuple[int, dict[str, Any], str]:
        """Return the exit code, what was pulled, and what was said; patients are in none of it."""
        done = self.pacs.run(*self.command(entries, **values))
        return judged(done.returncode, done.stdout, done.stderr)

    def path(self, study: str, instance: str) -> Path:
        name = IDENTITY.key("SOPInstanceUID", instance).hex()
        return self.base / "pacs" / IDENTITY.key("StudyInstanceUID", study).hex() / f"{name}.dcm"

    def names(self) -> list[str]:
        return [path.relative_to(self.base).as_posix() for path in (self.base / "pacs").rglob("*")]

    def files(self) -> list[Path]:
        return [*(self.base / "pacs").glob("*/*.dcm")]


def judged(code: int, out: bytes, err: bytes) -> tuple[int, dict[str, Any], str]:
    said = err.decode()
    assert not any(canary in said + out.decode() for canary in (*CANARIES, "s3cret", "1.2.826"))  # pydicom's UID root
    return code, json.loads(out) if out else {}, said


@pytest.fixture
def site(tmp_path: Path, pacs: Pacs) -> Site:
    return Site(tmp_path, pacs)


def test_five_transfer_syntaxes_arrive_as_they_are_stored(
    site: Site, stored: dict[str, tuple[str, str, bytes]]
) -> None:
    code, pulled, said = site.pull([study for study, _, _ in stored.values()])
    assert code == 0, said
    assert (pulled["studies"], pulled["instances"], pulled["failed"], pulled["rejected"]) == (5, 5, 0, 0)
    for name, (study, instance, kept) in stored.items():
        got = site.path(study, instance).read_bytes()
        assert got == kept, name
        assert str(SYNTAXES[name]).encode() + b"\0" * (len(SYNTAXES[name]) % 2) in got[:600]
    assert not any(word in "\n".join(site.names()) for word in (*CANARIES, "1.2.826"))
    assert said.splitlines() == [f"{done}/5" for done in range(6)]
    again = site.pull([study for study, _, _ in stored.values()])[1]
    assert (again["already"], again["instances"]) == (5, 0)


def test_orders_are_found_and_missing_studies_counted(site: Site, stored: dict[str, tuple[str, str, bytes]]) -> None:
    code, pulled, said = site.pull(["CANARYORDER3", "canaryorder4", "CANARYORDER", "1.2.3.4.5", stored["jpegls"][0]])
    assert code == 0, said
    assert (pulled["studies"], pulled["instances"], pulled["not_found"]) == (2, 2, 3)
    assert site.path(*stored["rle"][:2]).read_bytes() == stored["rle"][2]


def test_wrong_credentials_are_one_line(site: Site, stored: dict[str, tuple[str, str, bytes]]) -> None:
    site.secret("puller:wrong")
    code, _, said = site.pull([stored["rle"][0]])
    assert code == 1
    assert said.splitlines()[-1].startswith(f"consilium: {URL}: the server does not accept the credentials (401)")
    assert len(said.splitlines()) == 2  # the other is the progress
    assert "wrong" not in said


@pytest.fixture(scope="module")
def many(pacs: Pacs) -> dict[str, str]:
    """Return the SHA-256 of 40 instances in 10 studies, by what stands for a path."""
    datasets = [
        image(RLELossless, "many", 128, f"1.2.826.0.1.3680043.8.498.{study}") for study in range(1, 11) for _ in "1234"
    ]
    kept = {d.SOPInstanceUID: (d.StudyInstanceUID, pacs.upload(content(d))) for d in datasets}
    return {f"{study} {uid}": hashlib.sha256(kept).hexdigest() for uid, (study, kept) in kept.items()}


def whole(site: Site, many: dict[str, str]) -> int:
    """Return how many instances are here; each is whole, and nothing else is."""
    paths = {site.path(*key.split()): digest for key, digest in many.items()}
    assert set(site.files()) <= paths.keys()
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == paths[path] for path in site.files())
    return len(site.files())


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def studies_of(many: dict[str, str]) -> list[str]:
    return list(dict.fromkeys(key.split()[0] for key in many))


def test_a_pull_outlives_a_server_that_is_killed(site: Site, many: dict[str, str]) -> None:
    command = site.command(studies_of(many), requests_per_second=20, retries=0, timeout_s=5)
    running = site.pacs.begin(*command)
    try:
        wait_for(lambda: len(site.files()) >= 6, running)
        site.pacs.kill()
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
        site.pacs.start()
    code, _, said = judged(running.returncode, out, err)
    here = whole(site, many)
    assert code == 1
    assert f"; {here} files are here, and the same command goes on" in said.splitlines()[-1]
    assert 6 <= here < 40
    code, pulled, said = site.pull(studies_of(many))
    assert code == 0, said
    assert (pulled["already"], pulled["instances"], pulled["failed"]) == (here, 40 - here, 0)
    assert whole(site, many) == 40


def test_a_server_that_comes_back_in_time_is_not_even_missed(site: Site, many: dict[str, str]) -> None:
    running = site.pacs.begin(*site.command(studies_of(many), requests_per_second=20, retries=8))
    try:
        wait_for(lambda: len(site.files()) >= 6, running)
        site.pacs.kill()
        site.pacs.start()
        out, err = running.communicate(timeout=120)
    finally:
        running.kill()
    code, pulled, said = judged(running.returncode, out, err)
    assert code == 0, said
    assert (pulled["instances"], pulled["failed"]) == (40, 0)
    assert whole(site, many) == 40


def test_a_pull_that_is_killed_goes_on(site: Site, many: dict[str, str]) -> None:
    running = site.pacs.begin(*site.command(studies_of(many), requests_per_second=30))
    try:
        wait_for(lambda: len(site.files()) >= 6, running)
    finally:
        running.kill()
        running.communicate()
    here = whole(site, many)
    pulled = site.pull(studies_of(many))[1]
    assert (pulled["already"], pulled["instances"]) == (here, 40 - here)
    assert whole(site, many) == 40


def test_sixty_megabytes_need_no_memory(site: Site, pacs: Pacs, stored: dict[str, tuple[str, str, bytes]]) -> None:
    large = image(ExplicitVRLittleEndian, "large", 7746)
    kept = pacs.upload(content(large))
    assert len(kept) > 60_000_000
    small = site.pull([stored["rle"][0]])[1]
    code, pulled, said = site.pull([large.StudyInstanceUID])
    assert code == 0, said
    assert site.path(large.StudyInstanceUID, large.SOPInstanceUID).read_bytes() == kept
    assert pulled["peak"] - small["peak"] < 8 * 1024  # kB


def test_a_file_that_breaks_off_is_never_taken_for_whole(site: Site, pacs: Pacs) -> None:
    large = image(ExplicitVRLittleEndian, "large", 7746)
    kept = pacs.upload(content(large))
    path = site.path(large.StudyInstanceUID, large.SOPInstanceUID)
    running = pacs.begin(*site.command([large.StudyInstanceUID], retries=8))
    try:
        wait_for(lambda: any((site.base / "pacs").glob("*/.*.part")), running)
        pacs.kill()
        assert not path.exists() or path.stat().st_size == len(kept)
        pacs.start()
        out, err = running.communicate(timeout=120)
    finally:
        running.kill()
    code, pulled, said = judged(running.returncode, out, err)
    assert code == 0, said
    assert pulled["instances"] == 1
    assert path.read_bytes() == kept
    assert len(site.names()) == 4  # the study, its file, the record and the lock

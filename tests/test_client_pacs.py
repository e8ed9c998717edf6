"""What a pull leaves in its folder and says about it, against a small archive on the loopback."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

pytest.importorskip("dicomweb_client", reason="the extra `pacs` is not installed")

from client.identity import Identity
from client.pacs import FINISHED, Pulled, pull
from client.pacs_config import DicomWeb
from common.errors import ConfigError, ConsiliumError, DataError

IDENTITY = Identity(b"s" * 32)
A, B, C = "1.2.840.7777.1.1", "1.2.840.7777.1.2", "1.2.840.7777.1.3"


def dicom(content: bytes) -> bytes:
    return bytes(128) + b"DICM" + content


class Archive:
    """Studies, and what is wrong with some instances."""

    def __init__(self) -> None:
        self.studies = {
            A: {f"{A}.1": [f"{A}.1.1", f"{A}.1.2"], f"{A}.2": [f"{A}.2.1"]},
            B: {f"{B}.1": [f"{B}.1.1"]},
            C: {},
        }
        self.orders = {"ORDER-1": [A, B], "ORDER-2": [B], "ORDER-3": []}
        self.faults: dict[str, int | bytes] = {}  # UID -> status, or content
        self.asked: Counter[str] = Counter()
        self.url = ""

    def answer(self, path: list[str], query: dict[str, list[str]]) -> tuple[int, bytes]:
        """Return status and body for what comes behind `studies`."""
        self.asked["search" if len(path) % 2 == 0 or not path else "instance"] += 1
        fault = next((self.faults[uid] for uid in reversed(path) if uid in self.faults), 200)
        if isinstance(fault, bytes):
            return 200, fault
        if fault != 200:
            return fault, b""
        if len(path) == 5:
            return 200, dicom(path[4].encode())
        series = self.studies.get(path[0] if path else "", {})
        found = {
            0: lambda: [{"0020000D": study, "00080050": query["AccessionNumber"][0]} for study in self._ordered(query)],
            2: lambda: [{"0020000E": uid} for uid in series],
            4: lambda: [{"00080018": uid} for uid in series.get(path[2], [])],
        }[len(path)]()[int(query["offset"][0]) :]
        body = [{tag: {"Value": [value]} for tag, value in result.items()} for result in found]
        return 200, json.dumps(body).encode()

    def _ordered(self, query: dict[str, list[str]]) -> list[str]:
        return self.orders.get(query["AccessionNumber"][0], [])


@pytest.fixture
def archive() -> Iterator[Archive]:
    archive = Archive()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            status, content = archive.answer(parts.path.split("/")[2:], parse_qs(parts.query))
            self.send_response(status)
            self.send_header("Content-Type", "application/dicom")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        archive.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield archive
        server.shutdown()
        thread.join()


class Place:
    """A site's folder, and pulls into it."""

    def __init__(self, base: Path, archive: Archive) -> None:
        self.base, self.archive, self.folder = base, archive, base / "state" / "pacs"
        self.progress: list[tuple[int, int]] = []

    def pull(self, *entries: str, **values: Any) -> Pulled:
        (self.base / "studies.txt").write_text("\n".join(entries))
        config = {
            "url": self.archive.url,
            "studies": "studies.txt",
            "retries": 0,
            "requests_per_second": 1000,
            **values,
        }
        self.archive.asked.clear()
        self.progress.clear()
        report = lambda done, total: self.progress.append((done, total))  # noqa: E731
        return pull(DicomWeb.model_validate(config), self.base, self.folder, IDENTITY, report)

    def path(self, study: str, instance: str) -> Path:
        name = IDENTITY.key("SOPInstanceUID", instance).hex()
        return self.folder / IDENTITY.key("StudyInstanceUID", study).hex() / f"{name}.dcm"

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())


@pytest.fixture
def place(tmp_path: Path, archive: Archive) -> Place:
    return Place(tmp_path, archive)


def counts(pulled: Pulled) -> dict[str, int]:
    names = ("studies", "instances", "already", "not_found", "failed", "rejected")
    return {name: getattr(pulled, name) for name in names if getattr(pulled, name)}


def test_every_image_of_the_list_arrives_under_a_name_that_says_nothing(place: Place) -> None:
    pulled = place.pull(A, B)
    assert counts(pulled) == {"studies": 2, "instances": 4}
    for uid in (f"{A}.1.1", f"{A}.1.2", f"{A}.2.1"):
        assert place.path(A, uid).read_bytes() == dicom(uid.encode())
    assert pulled.bytes == sum(path.stat().st_size for path in place.folder.glob("*/*.dcm"))
    assert pulled.seconds > 0
    assert place.progress == [(0, 2), (1, 2), (2, 2)]
    told = "\n".join(place.files()) + (place.folder / FINISHED).read_text()
    assert not any(uid in told for uid in ("1.2.840", "7777"))


def test_nobody_else_may_look(place: Place) -> None:
    before = os.umask(0)
    try:
        place.pull(A)
    finally:
        os.umask(before)
    paths = [place.folder, *place.folder.rglob("*")]
    assert len(paths) == 7
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path.name


def test_a_folder_that_was_open_is_closed(place: Place) -> None:
    place.folder.mkdir(parents=True, mode=0o755)
    place.pull(B)
    assert stat.S_IMODE(place.folder.stat().st_mode) == 0o700


def test_an_order_brings_all_its_studies_each_once(place: Place) -> None:
    assert counts(place.pull("ORDER-1", "ORDER-2", B, A)) == {"studies": 2, "instances": 4}
    assert place.archive.asked["instance"] == 4
    assert counts(place.pull("ORDER-1", "ORDER-2", B, A)) == {"studies": 2, "already": 4}
    assert place.archive.asked.total() == 0


def test_a_second_pull_asks_nothing_and_a_longer_list_asks_for_the_new(place: Place) -> None:
    place.pull(A)
    assert counts(place.pull(A)) == {"studies": 1, "already": 3}
    assert place.archive.asked.total() == 0
    assert counts(place.pull(A, B)) == {"studies": 2, "already": 3, "instances": 1}
    assert place.archive.asked == {"search": 4, "instance": 1}


def test_what_the_server_does_not_have_is_counted(place: Place) -> None:
    place.archive.faults["1.2.3.4.5"] = 404
    assert counts(place.pull("1.2.3.4.5", "1.2.3.4.6", C, "ORDER-3", "no such order", B)) == {
        "studies": 1,
        "instances": 1,
        "not_found": 5,
    }
    assert counts(place.pull(C)) == {"not_found": 1}
    assert place.archive.asked.total() > 0  # it may have come meanwhile


@pytest.mark.parametrize("fault", [500, 503, 400, 404])
def test_an_instance_that_fails_is_tried_again_by_the_next_pull(fault: int, place: Place) -> None:
    place.archive.faults[f"{A}.1.2"] = fault
    assert counts(place.pull(A, B)) == {"studies": 2, "instances": 3, "failed": 1}
    assert counts(place.pull(A, B)) == {"studies": 2, "already": 3, "failed": 1}
    place.archive.faults.clear()
    assert counts(place.pull(A, B)) == {"studies": 2, "already": 3, "instances": 1}


def test_a_study_that_cannot_be_listed_fails(place: Place) -> None:
    place.archive.faults |= {f"{A}.2": 500, "ORDER-2": 200}
    assert counts(place.pull(A, B)) == {"studies": 1, "instances": 1, "failed": 1}


@pytest.mark.parametrize("content", [b"", b"<html>no", dicom(bytes(1 << 20)), b"x" * 200])
def test_what_is_no_dicom_or_too_large_is_rejected(content: bytes, place: Place) -> None:
    place.archive.faults[f"{A}.1.2"] = content
    assert counts(place.pull(A, max_file_mb=1)) == {"studies": 1, "instances": 2, "rejected": 1}
    assert not place.path(A, f"{A}.1.2").exists()
    assert len(place.files()) == 3  # two images and the lock


@pytest.mark.parametrize("uid", ["../../../etc/passwd", "1.2/3", "CANARY", "1.2?x=1", "1" * 65])
def test_a_uid_that_is_none_becomes_no_address(uid: str, place: Place) -> None:
    place.archive.studies[A] = {uid: ["1.2.3"]}
    place.archive.studies[B] = {f"{B}.1": [uid]}
    assert counts(place.pull(A, B)) == {"failed": 2}
    assert place.archive.asked["instance"] == 0


def test_a_uid_of_a_study_that_is_none_fails_too(place: Place) -> None:
    place.archive.orders["ORDER-9"] = ["../CANARY"]
    assert counts(place.pull("ORDER-9")) == {"failed": 1}


def test_a_file_that_was_lost_is_fetched_again(place: Place) -> None:
    place.pull(A)
    place.path(A, f"{A}.2.1").unlink()
    assert counts(place.pull(A)) == {"studies": 1, "already": 2, "instances": 1}


def test_new_images_come_when_the_record_is_removed(place: Place) -> None:
    place.pull(B)
    place.archive.studies[B][f"{B}.2"] = [f"{B}.2.1"]
    assert counts(place.pull(B)) == {"studies": 1, "already": 1}
    (place.folder / FINISHED).unlink()
    assert counts(place.pull(B)) == {"studies": 1, "already": 1, "instances": 1}


@pytest.mark.parametrize("rest", [b'{"entry": "', b"\xff\xfe", b"[]", b"null", b'{"entry": [], "studies": {}}', b"{}"])
def test_a_record_that_a_kill_cut_off_costs_only_itself(rest: bytes, place: Place) -> None:
    place.pull(A)
    with (place.folder / FINISHED).open("ab") as file:
        file.write(rest)
    assert counts(place.pull(A, B)) == {"studies": 2, "already": 3, "instances": 1}
    assert counts(place.pull(A, B)) == {"studies": 2, "already": 4}
    assert place.archive.asked.total() == 0


def test_what_a_kill_left_half_written_is_removed(place: Place) -> None:
    half = place.path(A, f"{A}.1.1").with_name(".abc.part")
    half.parent.mkdir(parents=True)
    half.write_bytes(dicom(b""))
    assert counts(place.pull(A)) == {"studies": 1, "instances": 3}
    assert not half.exists()


def test_two_pulls_do_not_share_a_folder(place: Place) -> None:
    place.pull(A)
    with (place.folder / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConsiliumError, match="another pull is at work here"):
            place.pull(B)
    assert counts(place.pull(B)) == {"studies": 1, "instances": 1}


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.pull(B)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        ConsiliumError, match=r"No space left on device\); 1 files are here, and the same command goes on"
    ):
        place.pull(A)
    assert len(place.files()) == 3  # an image, the record and the lock


def test_images_are_on_the_disk_before_the_record_says_so(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(stat.S_ISDIR(os.fstat(handle).st_mode)))
    place.pull(A)
    assert synced == [False, False, False, True, False]  # three images, their folder, the record


def test_an_interrupted_pull_goes_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []

    def interrupt(handle: int) -> None:
        synced.append(handle)
        if len(synced) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "fsync", interrupt)
        place.pull(A)
    assert len(place.files()) == 2
    assert counts(place.pull(A)) == {"studies": 1, "already": 1, "instances": 2}


def test_a_server_that_goes_away_is_one_line(place: Place) -> None:
    place.pull(A)
    place.archive.faults |= dict.fromkeys((B, C, "1.2.3.4.5"), 503)
    with pytest.raises(ConsiliumError) as error:
        place.pull(A, B, C, "1.2.3.4.5", "1.2.3.4.6")
    assert "no answer to 3 requests in a row, with 0 retries each; 3 files are here, and the same command" in str(
        error.value
    )
    assert "\n" not in str(error.value)
    assert not any(uid in str(error.value) for uid in (A, B, C, "1.2.3"))


def test_a_refusal_is_one_line(place: Place) -> None:
    place.archive.faults[A] = 401
    secret = place.base / "pacs.secret"
    secret.write_text("someone:hunter2")
    secret.chmod(0o600)
    with pytest.raises(ConsiliumError, match="does not accept the credentials") as error:
        place.pull(A, credentials="pacs.secret")
    assert not any(word in str(error.value) for word in ("hunter2", "someone", "7777"))


def test_what_is_wrong_at_home_is_said_before_anything_is_asked(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="found none"):
        place.pull()
    with pytest.raises(ConfigError, match="credentials .*cannot be read"):
        place.pull(A, credentials="nothing")
    with pytest.raises(ConfigError, match="ca_certificate .*cannot be used"):
        place.pull(A, ca_certificate="nothing")
    monkeypatch.setitem(sys.modules, "client.dicomweb", None)
    monkeypatch.delattr("client.dicomweb", raising=False)
    with pytest.raises(ConsiliumError, match=r"pip install 'consilium\[pacs\]'"):
        place.pull(A)
    assert place.archive.asked.total() == 0

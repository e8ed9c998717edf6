"""`consilium site` as a hospital runs it: the true command, true decoding processes, hostile files, and a real ward."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
import tomllib
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from client.findings import WARNINGS
from client.image import CODES, IGNORED
from client.remedies import REMEDIES
from client.site_config import PolicySection, parse_site
from simulations import encodings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CANARY = "ZZPHI"
SCRIPT = "from common.cli import main; main()"


def started(folder: Path, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start `consilium site ...` in a folder."""
    command = [sys.executable, "-P", "-c", SCRIPT, "site", *map(str, arguments)]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(folder), "COLUMNS": "200"}
    environment |= {"LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="surrogateescape",
        **options,
    )


def run(folder: Path, *arguments: object) -> tuple[int, str, str]:
    """Run it, and return exit code, stdout and stderr."""
    process = started(folder, *arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def files_of(folder: Path) -> dict[str, bytes]:
    """Return every regular file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if stat.S_ISREG(path.lstat().st_mode)
    }


# -------------------------------------------------------------------------------------------------------- the canaries

TEXTS = (
    *("PatientName", "PatientID", "IssuerOfPatientID", "OtherPatientNames", "Manufacturer", "ManufacturerModelName"),
    *("StationName", "InstitutionName", "InstitutionAddress", "StudyDescription", "SeriesDescription", "StudyID"),
    *("AccessionNumber", "ReferringPhysicianName", "OperatorsName", "AdditionalPatientHistory", "PatientComments"),
    *("ImageComments", "DeviceSerialNumber", "SoftwareVersions", "ProtocolName", "BodyPartExamined", "ViewPosition"),
    *("PatientBirthDate", "PatientAge", "StudyDate", "StudyTime", "AcquisitionDateTime", "BurnedInAnnotation"),
    *("PresentationIntentType", "TextValue", "LongCodeValue", "RetrieveURL", "RetrieveAETitle", "ImageType"),
    *("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Laterality", "Modality"),
    *("WindowCenterWidthExplanation", "SpecificCharacterSet", "VOILUTFunction", "DerivationDescription"),
)
"""Elements of every text VR: PN LO SH ST LT UT UC UR AE CS DA TM DT AS UI."""

NUMBERS = {"SpecificCharacterSet": "ISO_IR 192", "VOILUTFunction": "LINEAR"}


def marked(number: int, spare: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return canaries for every text of an image, but for the elements to spare."""
    names: dict[str, Any] = {word: f"{CANARY}^CANARY-{number}-{word}"[:60] for word in TEXTS if word not in spare}
    names |= {word: value for word, value in NUMBERS.items() if number % 3}
    names["PatientID"] = f"{CANARY}^CANARY-{number % 5}"
    item = Dataset()
    item.PatientID = item.PatientName = f"{CANARY}^CANARY-ITEM"
    names["OtherPatientIDsSequence"] = [item]
    names["SOPInstanceUID"] = f"../../{CANARY}/{number}"
    return names


@pytest.fixture
def marked_ward(ward: Any) -> Any:
    """Images, whole and broken, a table and names of files, all of which name a patient."""
    rows = []
    with pydicom.config.disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(20):
            path = f"{CANARY}^CANARY ward/{CANARY}-{number:02d}.dcm"
            syntax = list(encodings.SYNTAXES)[number % len(encodings.SYNTAXES)]
            spare = ("Modality",) if number % 2 else ()
            pixels = np.random.default_rng(number).integers(0, 255, (64, 64), np.uint8)
            ward.dicom(path, pixels, syntax, 8, **marked(number, spare))
            if number % 4 == 3:
                private(ward.images / path)
            rows.append(
                {"path": path, "class": "ab"[number % 2], "Name": f"{CANARY}^CANARY", "Comment": f"{CANARY}, x"}
            )
    for number, keep in enumerate((200, 400, 900, -2000, -10)):
        whole = (ward.images / rows[number]["path"]).read_bytes()
        (ward.images / f"{CANARY} broken {number}").write_bytes(whole[:keep])
        flipped = bytearray(whole)
        flipped[150 + 37 * number : 190 + 37 * number] = f"{CANARY}^CANARY".encode() * 3
        (ward.images / f"{CANARY} flipped {number}").write_bytes(flipped)
    ward.picture(f"{CANARY}.png", 3)
    (ward.images / f"{CANARY}.pdf").touch()
    (ward.images / f".{CANARY}").touch()
    (ward.images / f"{CANARY} link").symlink_to("/etc/passwd")
    rows.append({"path": f"{CANARY}/gone.dcm", "class": "a", "Name": CANARY, "Comment": ""})
    ward.table(rows)
    (ward.folder / "out.csv").write_text(f"PatientID;Name\n{CANARY}^CANARY-1;{CANARY}\n{CANARY}^canary-2;{CANARY}\n")
    return ward


def private(path: Path) -> None:
    data = pydicom.dcmread(path)
    block = data.private_block(0x0009, f"{CANARY}^CREATOR", create=True)
    block.add_new(0x01, "LT", f"{CANARY}^CANARY private")
    block.add_new(0x02, "UN", f"{CANARY}^CANARY unknown".encode())
    data.save_as(path)


def test_no_patient_gets_out_of_any_command(marked_ward: Any) -> None:
    """A canary may be seen where a name of a file is asked for, on the site's own screen, and nowhere else."""
    folder = marked_ward.folder
    code, out, err = run(folder, "init", "site", "--images", "images", "--labels", "labels.csv")
    assert (code, err) == (0, "")
    assert CANARY not in out
    before = files_of(folder)
    shown = []
    for arguments, asked in (
        (["check"], False),
        (["check", "--json"], False),
        (["check", "--files"], True),
        (["check", "--json", "--files"], True),
    ):
        code, out, err = run(folder, arguments[0], "site/site.toml", *arguments[1:])
        assert code == 0, err
        assert CANARY not in err
        assert (CANARY in out) == asked
        shown.append(out)
    found = json.loads(shown[3])
    assert sum(found["examples"].values()) == 20
    assert found["matching"]["rows_without_file"] == 1
    for file in found["files"]:
        assert set(file) <= {"path", "status", "code", "pixel_sha256"}
    del found["files"]
    assert CANARY not in json.dumps(found)
    for arguments in (["forget", "out.csv"], ["forget", "out.csv", "--json"], ["audit", "verify"]):
        code, out, err = run(folder, *arguments, "--site", "site/site.toml")
        assert (code, err) == (0, "")
        assert CANARY not in out
    code, out, err = run(folder, "check", "site/site.toml", "--json")
    assert json.loads(out)["ignored"]["opted_out"] >= 8
    assert CANARY not in out + err
    after = files_of(folder)
    assert {name: after[name] for name in before} == before | {
        name: after[name] for name in before if name.startswith("site/state/")
    }
    new = {name: content for name, content in after.items() if name.startswith("site/state/")}
    assert set(after) == set(before) | set(new)  # nothing was written elsewhere
    for name, content in new.items():
        assert CANARY not in name
        assert CANARY.encode() not in content, name
        assert CANARY.encode("utf-16-le") not in content, name
    assert {"site/state/check.html", "site/state/check.json", "site/state/audit.jsonl"} <= set(new)


@pytest.mark.parametrize("secret", [b"a" * 32, b"b" * 32])
def test_no_digest_without_the_secret(secret: bytes, marked_ward: Any) -> None:
    """Nothing in the state can be found by who knows a patient's number and not the site's secret."""
    folder = marked_ward.folder
    marked_ward.site()
    assert run(folder, "check", "site.toml", "--quiet")[0] == 0
    content = b"".join(files_of(folder / "state").values())
    for text in (f"{CANARY}^CANARY-1", f"../../{CANARY}/1"):
        for made in (hashlib.sha256(text.encode()), hashlib.md5(text.encode(), usedforsecurity=False)):
            assert made.digest()[:16] not in content
            assert made.hexdigest()[:16].encode() not in content


BROKEN_TABLES = {
    "quotes": f'path,label\n"{CANARY}^CANARY,a\n',
    "no header": f"{CANARY}^CANARY;19470113;scar\n{CANARY};x;oedema\n{CANARY}2;x;scar\n",
    "no match": f"path,label,Name\n{CANARY}-1.dcm,a,{CANARY} x\n",
    "long label": f"path,label\n{CANARY}.png,{CANARY * 20}\n",
    "two patients": f"path,label,patient\n{CANARY}.png,a,{CANARY}1\n{CANARY}.png,a,{CANARY}2\n",
    "split": f"path,label,split\n{CANARY}.png,a,{CANARY}\n",
    "not text": f"path,label\n{CANARY}.png,\0\n",
    "wide row": f"path,label\n{CANARY}.png,a,{CANARY}\n",
    "hidden": f"path,label\n{CANARY}.png,{CANARY}\u202e\n",
}


@pytest.mark.parametrize("broken", BROKEN_TABLES)
def test_no_error_quotes_a_cell(broken: str, ward: Any) -> None:
    ward.picture(f"{CANARY}.png", 1)
    (ward.folder / "labels.csv").write_text(BROKEN_TABLES[broken])
    ward.site()
    code, out, err = run(ward.folder, "check", "site.toml", "--quiet")
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1
    assert CANARY not in err
    (ward.folder / "out.csv").write_text(f'PatientID,x\n"{CANARY}\n')
    code, out, err = run(ward.folder, "forget", "out.csv")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert CANARY not in err


# ------------------------------------------------------------------------------------------------------- hostile names


class Elements(HTMLParser):
    """Collects what a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = ("=cmd|'/C calc'!A0", "<script>alert(1)</script>", "{{7*7}}", "[bold red]x[/]", "a&amp;b\"'`", "../../etc")


def test_hostile_names_are_only_names(ward: Any) -> None:
    rows = []
    odd = ["\x1b[31mred", "new\nline", "\u202egnp.exe", "<img src=x onerror=alert(1)>", "=1+1", "'; rm -rf ~", "\x07"]
    for number, label in enumerate(HOSTILE * 4):
        path = f"{number}.png"
        ward.picture(path, number)
        rows.append({"path": path, "label": label})
    for number, name in enumerate(odd):
        ward.picture(f"{name}/{name}{number}.png", 50 + number)
        (ward.images / f"{name} broken").write_bytes(b"x")
    (ward.images / os.fsdecode(b"caf\xe9 \x9b31m")).write_bytes(b"x")
    ward.table(rows)
    ward.site()
    before = files_of(ward.folder)
    code, out, err = run(ward.folder, "check", "site.toml", "--files")
    assert code == 0, err
    for printed in (out, err):
        assert not {c for c in printed if (ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 or c == "\u202e"}
    for label in HOSTILE:
        assert label in out
    code, out, _ = run(ward.folder, "check", "site.toml", "--files", "--json")
    found = json.loads(out)
    assert set(found["labels"]["train"]) == set(HOSTILE)
    assert {f"{name} broken" for name in odd} <= {file["path"] for file in found["files"]}
    after = files_of(ward.folder)
    assert {name: content for name, content in after.items() if not name.startswith("state/")} == {
        name: content for name, content in before.items() if not name.startswith("state/")
    }
    page = Elements((ward.state / "check.html").read_text())
    assert not page.tags & {"script", "img", "iframe", "object", "link", "a", "form"}
    assert not {name for name in page.attributes if name.startswith("on")}
    for label in HOSTILE:
        assert label in page.text


@pytest.mark.parametrize("label", ["\x1b[31mred", "a\u202eb", "\x9b31m", "zero\u200bwidth"])
def test_a_label_that_hides_something_is_refused(label: str, ward: Any) -> None:
    for number in range(4):
        ward.picture(f"{('plain', label)[number % 2]}/{number}.png", number)
    ward.site()
    code, out, err = run(ward.folder, "check", "site.toml", "--quiet")
    assert (code, out) == (2, "")
    assert "invisible characters" in err
    assert not set(err) & {"\x1b", "\x9b", "\u202e"}


# ------------------------------------------------------------------------------------------- what a hospital lives with


@pytest.mark.parametrize(
    ("policy", "patients", "code"),
    [("stop", 8, 2), ("quarantine", 8, 0), ("stop", 1, 0)],
)
def test_placeholder_patients(policy: str, patients: int, code: int, ward: Any) -> None:
    for number in range(24):
        name = "ANONYMOUS" if number < patients else f"P{number}"
        ward.dicom(f"{'ab'[number % 2]}/{number}.dcm", number, PatientID=name)
    ward.site(placeholder_patients=policy)
    ended, out, err = run(ward.folder, "check", "site.toml", "--json", "--quiet")
    found = json.loads(out)
    assert ended == code
    assert found["quarantine"] == {"placeholder_patient": patients}
    assert "placeholder_patients" in {warned["code"] for warned in found["warnings"]}
    assert ("[data] patient" in err) == (code == 2)
    assert bool(found["stop"]) == (code == 2)


def test_an_examination_that_was_killed_goes_on_where_it_was(wards: Any) -> None:
    documents = []
    for name in ("killed", "whole"):
        ward = wards(name)
        for number in range(400):
            pixels = np.random.default_rng(number).integers(0, 255, (40, 40), np.uint8)
            ward.picture(f"{'ab'[number % 2]}/{number:03d}.png", pixels)
        ward.site()
        if name == "killed":
            kill_in_the_middle(ward)
        code, out, _ = run(ward.folder, "check", "site.toml", "--json", "--files", "--quiet")
        assert code == 0
        documents.append(json.loads(out))
        assert documents[-1]["from_cache"] >= (128 if name == "killed" else 0)
        code, out, _ = run(ward.folder, "check", "site.toml", "--json", "--files", "--quiet")
        documents.append(json.loads(out))
        assert documents[-1]["from_cache"] == 400
        assert run(ward.folder, "audit", "verify")[0] == 0
    for one in documents:
        for key in ("seconds", "from_cache", "decode"):
            del one[key]
    assert all(one == documents[0] for one in documents)


def kill_in_the_middle(ward: Any) -> None:
    process = started(ward.folder, "check", "site.toml", "--quiet")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(
        path.stat().st_size for path in ward.state.glob("cache/images/*/records-*/index.bin")
    ):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (ward.state / "check.json").exists()


def test_two_examinations_at_once_say_the_same(ward: Any) -> None:
    for number in range(60):
        ward.dicom(f"{'ab'[number % 2]}/{number}.dcm", number, PatientID=f"P{number}")
    ward.site()
    both = [started(ward.folder, "check", "site.toml", "--json", "--quiet") for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    first, second = (json.loads(out) for out, _ in answers)
    assert first["manifest_sha256"] == second["manifest_sha256"]
    assert {first["from_cache"], second["from_cache"]} == {0, 60}


def test_a_check_of_real_images_loads_nothing_heavy(ward: Any) -> None:
    for number in range(4):
        ward.dicom(f"{'ab'[number % 2]}/{number}.dcm", number, "jpeg-2000", PatientID=f"P{number}")
    ward.site()
    script = (
        "import sys\nfrom client.cli import site\n"
        "site(['check', 'site.toml', '--quiet'], standalone_mode=False)\n"
        "print('heavy:', sorted({'torch', 'timm', 'flwr', 'torchvision', 'scipy', 'pandas'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=ward.folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith("heavy: []\n")


# ---------------------------------------------------------------------------------------------------------- the manual

MANUAL = ROOT / "docs" / "site.md"


def blocks(language: str) -> list[str]:
    """Return the code blocks of the manual in a language."""
    parts = MANUAL.read_text().split(f"```{language}\n")[1:]
    return [part.partition("\n```")[0] for part in parts]


def commands() -> Iterator[str]:
    for block in blocks("sh"):
        yield from (line for line in block.splitlines() if line.strip() and not line.startswith("#"))


def test_the_first_run_of_the_manual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of the manual, in its order, in one folder."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, options in (("consilium", f" -P -c '{SCRIPT}'"), ("python", "")):
        (bin_folder / name).write_text(f'#!/bin/sh\nexec {sys.executable}{options} "$@"\n')
        (bin_folder / name).chmod(0o755)
    environment = {"PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    work = tmp_path / "work"
    work.mkdir()
    listed = list(commands())
    assert any("site init" in command for command in listed)
    for command in listed:
        done = subprocess.run(["sh", "-c", command], cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stdout, done.stderr)


def test_the_examples_of_the_manual_are_read(ward: Any) -> None:
    (example,) = blocks("toml")
    parsed = parse_site(tomllib.loads(example), "site.toml")
    assert parsed.data.words == {"Pleuraerguss": "effusion", "technisch unbrauchbar": ""}
    single, several = blocks("csv")
    for number, name in enumerate(("2023/a.dcm", "2023/b.dcm")):
        ward.dicom(name, number, PatientID=f"P{number}", AccessionNumber=f"{4711 + number:07d}")
    for table, names in ((single, {"effusion", "normal"}), (several, {"Effusion", "Edema"})):
        (ward.folder / "labels.csv").write_text(table + "\n")
        found = ward.examine()
        assert set(found.labels["train"]) == names
        assert sum(found.examples.values()) == 2


def test_the_tables_of_the_manual_are_those_of_the_code() -> None:
    text = MANUAL.read_text()
    rows = re.findall(r"^\| (`.*?) \|", text.split("| key of [policy] |")[1].split("\n\n")[0], flags=re.MULTILINE)
    assert sorted(re.findall("`([a-z_]+)`", "".join(rows))) == sorted(PolicySection.model_fields)
    for codes in (CODES, IGNORED):
        table = "\n".join(f"| `{code}` | {meaning} | {REMEDIES[code]} |" for code, meaning in codes.items())
        assert table in text
    warned = "\n".join(f"| `{code}` | {meaning} |" for code, meaning in WARNINGS.items())
    assert warned in text

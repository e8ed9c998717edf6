"""Patients who opted out are found however a spreadsheet wrote them, listed as digests only, and never lost."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.founding import found
from client.identity import Identity
from client.optout import optout, persons, take_out
from client.site_config import SiteConfig, SiteSection, SiteToml
from common.errors import CheckpointError, ConsiliumError, DataError

WHO = Identity(b"s" * 32)
ANNA, BERT = WHO.person("A-1"), WHO.person("4711")


def site(folder: Path) -> SiteConfig:
    made = found(folder / "site")
    return SiteConfig(made.config, SiteToml(site=SiteSection(name="a")))


def table(folder: Path, content: str | bytes) -> Path:
    path = folder / "patients.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "content",
    [
        "A-1\n4711\n",
        "A-1\r\n4711",
        "PatientID\nA-1\n4711\n",
        "patient\na-1\n00004711\n",
        "Patient ID\n\n A-1 \n\n4711\n\n",
        "\ufeffPatientID;Name\nA-1;Doe, Jane\n4711;Roe\n",
        "Name,patient_id\n\"Doe, Jane\",A-1\n'x',4711\n",
        "name\tPATIENT-ID\nx\tA-1\ny\t4711\n",
        '"PatientID"\n"A-1"\n"4711"\n"4711"\n',
        "patient;PatientID\n1;A-1\n2;4711\n",
        "PatientID,\nA-1,\n4711,\n,\n",
        "PatientID\nA-1\n4711\n".encode("utf-16"),
        "\n\n;;\nPatientID;x;y\nA-1;;\n4711;;\n",
    ],
)
def test_the_same_two_patients(content: str | bytes, tmp_path: Path) -> None:
    assert persons(table(tmp_path, content), WHO) == {ANNA, BERT}


def test_a_named_column_wins(tmp_path: Path) -> None:
    path = table(tmp_path, "PatientID,Fall Nr\n1,A-1\n2,4711\n")
    assert persons(path, WHO, "fall nr") == {ANNA, BERT}
    with pytest.raises(DataError, match="a column called MRN"):
        persons(path, WHO, "MRN")


@given(st.lists(st.from_regex(r"[A-Z1-9][A-Z0-9-]{3,12}", fullmatch=True), min_size=1, max_size=20))
def test_any_list_in_any_order(names: list[str]) -> None:
    path = Path(f"/dev/shm/consilium-{os.getpid()}.csv")
    try:
        path.write_text("PatientID\n" + "\n".join(names))
        forward = persons(path, WHO)
        path.write_text(
            "\n".join(f"00{name.lower()} ,x" for name in ["PatientID", *reversed(names)]).replace("00p", "p", 1)
        )
        assert persons(path, WHO) == forward == {WHO.person(name) for name in names}
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\n\n ; ;\n", "empty"),
        (b"PatientID\n", "names no patient"),
        (b"a,b\nCANARY,2\n", "expected a column called PatientID or patient"),
        (b"PatientID,patient-id\nCANARY,2\n", "several columns"),
        (b"PatientID,x\nCANARY,1\n,CANARY\n", "line 3 names nobody"),
        (b"PatientID\nCANARY\nANON\n", "line 3 names nobody"),
        (b"x,PatientID\nCANARY,7\nCANARY\n", "line 3 names nobody"),
        (b"PatientID\nCANARY\n1.23457E+15\n", "line 3 holds a number that a spreadsheet has rounded"),
        (b"PatientID\nCANARY\n1,23457E+15\n", "line 3"),
        (b"PatientID,x\nCANARY,1\nCANARY,,1,2\n", "line 3 has more cells"),
        (b'PatientID\n"CANARY\n', "is not CSV"),
        (b"PatientID\nCAN\xe4RY\n", "not UTF-8"),
        (b"PatientID\nCAN\0ARY\n", "NUL"),
        (b"\xff\xfeC", "not UTF-8"),
    ],
)
def test_what_cannot_be_used_is_one_line_without_a_cell(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as raised:
        persons(table(tmp_path, content), WHO)
    assert "CANARY" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        persons(tmp_path / "none.csv", WHO)
    with pytest.raises(DataError, match="Is a directory"):
        persons(tmp_path, WHO)


def test_the_list_grows_and_is_for_its_owner(tmp_path: Path) -> None:
    config = site(tmp_path)
    assert optout(config) == frozenset()
    assert take_out(config, {BERT}) == 1
    assert take_out(config, {ANNA, BERT}) == 1
    assert take_out(config, {ANNA}) == 0
    assert optout(config) == {ANNA, BERT}
    assert config.optout.read_text() == "".join(f"{line}\n" for line in sorted([ANNA.hex(), BERT.hex()]))
    assert stat.S_IMODE(config.optout.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [b"\n", b"ab\n", b"AB" * 16 + b"\n", b"ab" * 16, b"ab" * 16 + b"\n\n", b"\0" * 33])
def test_a_damaged_list_is_never_an_empty_one(content: bytes, tmp_path: Path) -> None:
    config = site(tmp_path)
    config.optout.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        optout(config)
    with pytest.raises(CheckpointError, match="damaged"):
        take_out(config, {ANNA})
    assert config.optout.read_bytes() == content


def test_a_list_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = site(tmp_path)
    take_out(config, {ANNA})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("client.optout.write_atomic", full)
    with pytest.raises(ConsiliumError, match="No space left"):
        take_out(config, {BERT})
    assert optout(config) == {ANNA}

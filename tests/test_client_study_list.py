"""The list of studies: what spreadsheets make of it is read, what could ask for more than one study is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.study_list import is_uid, studies_in
from common.errors import DataError

UID, OTHER = "1.2.840.113619.2.55.3.604688", "2.25.329800735698586629295641978511506172918"


def read(tmp_path: Path, content: str | bytes) -> list[tuple[str, str, int]]:
    path = tmp_path / "studies.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [(entry.kind[0], entry.value, entry.line) for entry in studies_in(path)]


def test_a_line_is_a_uid_if_it_looks_like_one(tmp_path: Path) -> None:
    content = f"# the cohort\r\n\n{UID}\n  00123 \nA-7,\n{UID}\n00123"
    assert read(tmp_path, content.replace(",", "")) == [("S", UID, 3), ("A", "00123", 4), ("A", "A-7", 5)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_heading_decides(delimiter: str, tmp_path: Path) -> None:
    rows = [["label", "Accession Number"], ["1", "1.2.3.4"], ["", ""], ["0", '" 7 "']]
    content = "\ufeff" + "\n".join(delimiter.join(row) for row in rows)
    assert read(tmp_path, content) == [("A", "1.2.3.4", 2), ("A", "7", 4)]


def test_of_both_columns_the_uid_counts(tmp_path: Path) -> None:
    content = f"accession_number,StudyInstanceUID\n5,{UID}\n6,\n,{OTHER}\n"
    assert read(tmp_path, content) == [("S", UID, 2), ("A", "6", 3), ("S", OTHER, 4)]


def test_a_heading_alone_in_its_line(tmp_path: Path) -> None:
    assert read(tmp_path, f"StudyInstanceUID\n{UID}\n") == [("S", UID, 2)]


@pytest.mark.parametrize("value", ["CANARY*", "CANARY?", "CANARY\\1", "*", UID + "*"])
@pytest.mark.parametrize("heading", ["", "AccessionNumber\n", "StudyInstanceUID\n"])
def test_wildcards_are_refused_by_line(heading: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 4: .*name each study") as error:
        read(tmp_path, f"{heading or '# none'}\n\n# a comment\n{value}\n".replace("\n\n\n", "\n\n"))
    assert "CANARY" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "found none"),
        ("\ufeff\n#x\n", "found none"),
        ("StudyInstanceUID\n", "found none"),
        ("name,label\nCANARY,1\n", "line 1: more than one cell"),
        ("CANARY,1\n", "line 1: more than one cell"),
        ("StudyInstanceUID\nCANARY\n", "line 2: not a StudyInstanceUID"),
        (f"StudyInstanceUID\n{'1.2' * 30}\n", "line 2: not a StudyInstanceUID"),
        ("StudyInstanceUID\n1.2/../CANARY\n", "line 2: not a StudyInstanceUID"),
        (f"{'CANARY' * 20}\n", "line 1: not an AccessionNumber"),
        ("CAN\x1bARY\n", "line 1: not an AccessionNumber"),
        ("label,AccessionNumber\n1,\n", "line 2: neither"),
        ("AccessionNumber,label\n7,1,CANARY\n", "line 2: 3 cells, expected 2"),
        ("A" * 200_000 + ",x", "line 1: more than one cell"),
        (b"\xffCANARY", "expected UTF-8"),
    ],
)
def test_what_cannot_be_read_is_refused_by_line(content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path, content)
    assert "CANARY" not in str(error.value)


def test_no_list(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read \\(No such file or directory\\)"):
        studies_in(tmp_path / "nothing")


@given(st.binary(max_size=300))
def test_any_file_is_a_list_or_an_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    try:
        entries = read(tmp_path_factory.getbasetemp(), content)
    except DataError:
        return
    assert entries
    assert all(value and not set(value) & set("*?\\") and value.isprintable() for _, value, _ in entries)


def test_entries_do_not_show_what_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("CANARY")
    assert "CANARY" not in repr(studies_in(path))


def test_only_digits_and_dots_become_part_of_an_address() -> None:
    assert is_uid(UID)
    assert not any(is_uid(text) for text in ("", "1", "1..2", "1.2.", "../x", "1.2/3", "1.2?x", "1." * 40 + "1", "١.٢"))

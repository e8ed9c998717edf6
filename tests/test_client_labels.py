"""Label tables as hospitals keep them: every spelling of one table gives one answer, and no message shows a cell."""

from __future__ import annotations

import csv
import io
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.identity import Identity
from client.image import CODES
from client.keys import KEY_KINDS
from client.labels import WARNINGS, Labelled, Named, Rules, class_folders, read_labels
from common.errors import DataError

SITE = Identity(b"site secret 1234")
NAN = float("nan")


def named(path: str, sop: str = "", series: str = "", study: str = "", accession: str = "") -> Named:
    values = zip(KEY_KINDS, (sop, series, study, accession), strict=True)
    keys = {kind: SITE.key(kind, value) for kind, value in values if value}
    return Named(path, keys, SITE.loose_key("AccessionNumber", accession) if accession else b"")


def cohort(n: int = 6) -> list[Named]:
    """Files of n images, two to a study, two studies to an order."""
    return [
        named(f"p{i // 4}/s{i // 2}/{i}.dcm", f"1.2.3.{i}", f"1.2.4.{i // 2}", f"1.2.5.{i // 2}", f"00A{i // 4}")
        for i in range(n)
    ]


PNGS = [named(f"{folder}/{i}.png") for folder in "ab" for i in (f"{folder}1", f"{folder}2")]


def text_of(rows: Sequence[Sequence[str]], **dialect: Any) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, **{"lineterminator": "\n", **dialect}).writerows(rows)
    return out.getvalue()


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def reading(content: str | bytes, files: Sequence[Named] = PNGS, **rules: Any) -> Labelled:
        table = tmp_path / "labels.csv"
        table.write_bytes(content if isinstance(content, bytes) else content.encode())
        labelled = read_labels(table, files, Rules(**rules), SITE)
        check(labelled, len(files))
        return labelled

    return reading


def check(labelled: Labelled, n: int) -> None:
    """What holds of every answer."""
    lengths = map(len, (labelled.labels, labelled.codes, labelled.patients, labelled.sites, labelled.splits))
    assert set(lengths) == {n}
    assert {code for code, _ in labelled.warnings} <= set(WARNINGS)
    assert all("\n" not in message and "secret" not in message for _, message in labelled.warnings)
    assert set(labelled.codes) - {""} <= {"no_label", "label_conflict"} <= set(CODES)
    if labelled.kind == "single-label":
        assert labelled.labels.dtype == np.int64
        assert [value < 0 for value in labelled.labels] == [code != "" for code in labelled.codes]
    else:
        assert labelled.labels.dtype == np.float32
        assert labelled.labels.shape == (n, len(labelled.label_names))
        assert np.isnan(labelled.labels).all(axis=1).tolist() == [code != "" for code in labelled.codes]


def words(labelled: Labelled) -> list[str]:
    return [
        labelled.label_names[label] if label >= 0 else code
        for label, code in zip(labelled.labels, labelled.codes, strict=True)
    ]


def codes(labelled: Labelled) -> set[str]:
    return {code for code, _ in labelled.warnings}


def refusal(read: Any, *args: Any, **rules: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(*args, **rules)
    message = str(caught.value)
    assert "\n" not in message
    assert "secret" not in message
    return message


# --- one table, many spellings ------------------------------------------------------------------------------

TABLE = [
    ["StudyInstanceUID", "Note", "Label"],
    ["1.2.5.0", "größer; or, smaller", "ill"],
    ["1.2.5.1", 'a "quoted"\nline', "healthy"],
    ["1.2.5.9", "", "ill"],
]


@settings(max_examples=60, deadline=None)
@given(
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252"]),
    delimiter=st.sampled_from(",;\t|"),
    ending=st.sampled_from(["\n", "\r\n", "\r"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    sep=st.booleans(),
    tail=st.integers(0, 3),
    blank=st.sampled_from(["", " ", "\xa0", "\t "]),
    order=st.permutations(range(3)),
    columns=st.permutations(range(3)),
)
def test_every_spelling_of_a_table_says_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    encoding: str,
    delimiter: str,
    ending: str,
    quoting: Any,
    sep: bool,
    tail: int,
    blank: str,
    order: list[int],
    columns: list[int],
) -> None:
    rows = [TABLE[0], *(TABLE[1 + row] for row in order)]
    blank = blank.replace(delimiter, "")
    rows = [[row[c] + blank for c in columns] + [""] * tail for row in rows] + [[""] * (3 + tail)] * tail
    text = text_of(rows, delimiter=delimiter, lineterminator=ending, quoting=quoting)
    table = tmp_path_factory.mktemp("table") / "labels.csv"
    table.write_bytes(((f"sep={delimiter}{ending}" if sep else "") + text).encode(encoding))
    labelled = read_labels(table, cohort(), Rules(), SITE)
    check(labelled, 6)
    assert words(labelled) == ["ill", "ill", "healthy", "healthy", "no_label", "no_label"]
    assert labelled.label_names == ("healthy", "ill")
    assert (labelled.key, labelled.rows, labelled.unmatched_rows) == ("StudyInstanceUID", 3, 1)
    assert codes(labelled) == {"inherited"} | ({"encoding"} if encoding == "cp1252" else set())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found nothing"),
        (b"\n\n;;\n", "found nothing"),
        (b"path,label\na\0,x\n", "not a text"),
        ("path,label\n".encode("utf-16-le"), "not a text"),
        (b"\xff\xfep\0", "no row matches"),
        (b"\xff\xfea\0b", "not a text"),
        (b"\xef\xbb\xbfpath\xff", "not a text"),
        (b"path,label\n\x81secret,x\n", "not a text"),
        (b"path,label\n\xfc\x01,x\n", "not a text"),
        (b"PK\x03\x04rest", "a workbook"),
        (b"\xd0\xcf\x11\xe0rest", "a workbook"),
        (b'path,label\n"secret,x\n', "line 2: not CSV - check the quotes"),
        (b'path,label\na,"x"secret\n', "line 2: not CSV - check the quotes"),
        (b"path,label\nsecret,a,x\n", "line 2: 3 cells, expected 2"),
        (b"sep=x\npathxlabel\n", "sep= must name"),
    ],
)
def test_what_is_no_table(read: Any, content: bytes, message: str) -> None:
    assert message in refusal(read, content)


def test_a_table_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.csv: cannot be read"):
        read_labels(tmp_path / "gone.csv", PNGS, Rules(), SITE)
    with pytest.raises(DataError, match=r"the label table: cannot be read"):
        read_labels(tmp_path / "<b>\n.csv", PNGS, Rules(), SITE)


def test_line_numbers_are_those_of_an_editor(read: Any) -> None:
    text = 'sep=,\n\npath,label,split\n"a/a1.png\n",x,train\na/a2.png,x,secret\n'
    assert "line 6: split must be" in refusal(read, text)


# --- the key ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["path", *KEY_KINDS])
@pytest.mark.parametrize("naming", ["auto", "kind", "column", "odd column"])
def test_any_kind_of_key_gives_the_same_labels(read: Any, kind: str, naming: str) -> None:
    files = cohort(8)
    values = {
        "path": [file.path for file in files],
        "SOPInstanceUID": [f"1.2.3.{i}" for i in range(8)],
        "SeriesInstanceUID": [f"1.2.4.{i // 2}" for i in range(8)],
        "StudyInstanceUID": [f"1.2.5.{i // 2}" for i in range(8)],
        "AccessionNumber": [f"00A{i // 4}" for i in range(8)],
    }
    column = "what" if naming == "odd column" else kind
    rows = [["nothing", column, "label"], *([f"n{i}", values[kind][i], f"l{i // 4}"] for i in range(8))]
    key = {"auto": "auto", "kind": kind.upper(), "column": column, "odd column": "WHAT"}[naming]
    labelled = read(text_of(rows), files, key=key)
    assert words(labelled) == ["l0"] * 4 + ["l1"] * 4
    assert (labelled.key, labelled.column) == (kind, f"column {column!r}")
    assert ("inherited" in codes(labelled)) == (kind not in ("path", "SOPInstanceUID"))


def test_a_table_of_images_is_not_taken_for_one_of_studies(read: Any) -> None:
    """The studies match more files, for one image has no row; the labels of a study's images differ."""
    rows = [["StudyInstanceUID", "SOPInstanceUID", "label"]]
    rows += [[f"1.2.5.{i // 2}", f"1.2.3.{i}", f"l{i % 2}"] for i in range(7)]
    labelled = read(text_of(rows), cohort(8))
    assert labelled.key == "SOPInstanceUID"
    assert words(labelled) == ["l0", "l1"] * 3 + ["l0", "no_label"]


def test_a_table_of_studies_is_not_taken_for_one_of_images(read: Any) -> None:
    """A row names its study, and one key image of it."""
    rows = [["SOPInstanceUID", "StudyInstanceUID", "label"]]
    rows += [[f"1.2.3.{2 * i}", f"1.2.5.{i}", f"l{i % 2}"] for i in range(4)]
    labelled = read(text_of(rows), cohort(8))
    assert labelled.key == "StudyInstanceUID"
    assert words(labelled) == ["l0", "l0", "l1", "l1"] * 2


def test_a_patient_is_no_key_unless_named(read: Any) -> None:
    files = [named(f"x/{patient}.png") for patient in ("471", "472")]
    text = "PatientID,label\n471,a\n472,b\n"
    assert "tried nothing, for no column can be such a key" in refusal(read, text, files)
    assert words(read(text, files, key="PatientID", patient="PatientID")) == ["a", "b"]


def test_row_numbers_are_not_taken_for_keys(read: Any) -> None:
    """Short numbers match by chance, so they are believed only where a name or the site says that they are keys."""
    files = [named(f"{i}.png", accession=str(i)) for i in range(1, 9)]
    rows = [["Lfd", "MRN", "label"], *([str(i), f"m{i}", f"l{i % 2}"] for i in range(1, 20))]
    assert "no row matches" in refusal(read, text_of(rows), files)
    assert words(read(text_of(rows), files, key="lfd")) == ["l1", "l0"] * 4
    assert words(read(text_of([["id", *rows[0][1:]], *rows[1:]]), files)) == ["l1", "l0"] * 4
    longer = [named("IM1", accession="AC4711")]
    assert read("order,label\nAC4711,x\n", longer).key == "AccessionNumber"


def test_a_key_without_a_name(read: Any) -> None:
    """As pandas writes its index."""
    labelled = read(",,label\nz,a1,x\ny,a2,y\n")
    assert (words(labelled)[:2], labelled.column) == (["x", "y"], "column 2")


@pytest.mark.parametrize(
    "spelling",
    [
        "{path}",
        "./{path}",
        "/{path}",
        "/mnt/export/{path}",
        "C:\\data\\{windows}",
        "{windows}",
        ".\\{windows}",
        "{name}",
        "{stem}",
        "{stem}.dcm",
        "{path}.JPG",
        "file:///x/{path}",
        "//host//share/./{path}",
    ],
)
def test_spellings_of_a_path(read: Any, spelling: str) -> None:
    rows = [["Image", "label"]]
    for number, file in enumerate(PNGS):
        name = file.path.rpartition("/")[2]
        path = file.path.removesuffix(".png") if spelling == "{path}.JPG" else file.path
        form = spelling.format(path=path, windows=path.replace("/", "\\"), name=name, stem=name[:-4])
        rows.append([form, f"l{number}"])
    assert words(read(text_of(rows))) == ["l0", "l1", "l2", "l3"]


def test_uids_are_no_endings(read: Any) -> None:
    files = [named("1.2.3.4"), named("1.2.3.5.dcm")]
    assert words(read("uid,label\n1.2.3.4,a\n1.2.3.5,b\n", files)) == ["a", "b"]


@pytest.mark.parametrize(
    ("cells", "files", "labels"),
    [
        (["1.png"], ["a/1.png", "b/1.png", "c.png"], ["no_label", "no_label", "end"]),  # which of the two?
        (["x/a/1.png", "y/a/1.png"], ["a/1.png", "c.png"], ["no_label", "end"]),  # which row?
        (["p2/s/1.png"], ["p1/s/1.png", "c.png"], ["no_label", "end"]),  # another patient's
        (["../a/1.png", "a/../../1.png"], ["a/1.png", "1.png", "c.png"], ["no_label", "no_label", "end"]),
        (["a/1.png", "x/a/1.png"], ["a/1.png", "c.png"], ["l0", "end"]),  # the very path goes before
        (["a/1.jpg", "a/1.png"], ["a/1.png", "c.png"], ["l1", "end"]),
        (["1"], ["1.png", "1.jpg", "c.png"], ["no_label", "no_label", "end"]),
        (["A/1.png"], ["a/1.png", "c.png"], ["no_label", "end"]),
        (["a/é.png"], ["a/e\u0301.png", "c.png"], ["l0", "end"]),
        (["a/1.png" * 100_000, "/" * 100_000, "x/" * 1000 + "a/1.png"], ["a/1.png", "c.png"], ["l2", "end"]),
    ],
)
def test_only_the_one_file_that_a_path_can_mean(
    read: Any, cells: list[str], files: list[str], labels: list[str]
) -> None:
    rows = [["file", "label"], *([cell, f"l{i}"] for i, cell in enumerate(cells)), ["c.png", "end"]]
    assert words(read(text_of(rows), [named(file) for file in files])) == labels


def test_doubtful_paths_are_told_of(read: Any) -> None:
    files = [named(path) for path in ("a/1.png", "b/1.png", "c.png")]
    assert "ambiguous_keys" in codes(read("file,label\n1.png,x\nc.png,y\n", files))


@given(st.permutations(range(12)), st.integers(1, 12))
def test_the_order_of_rows_and_files_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], seed: int
) -> None:
    files = cohort(8)
    rows = [[f"00A{i % 3}", f"1.2.3.{i}", str(i % 2), str(i % 3 - 1)] for i in range(8)]
    rows += [["9", "1.2.3.0", "1", ""], ["9", "1.2.3.1", "1", ""], ["", "", "", ""], ["", "1.2.9", "0", "0"]]
    random_files = random.Random(seed).sample(range(8), 8)
    table = tmp_path_factory.mktemp("table") / "labels.csv"
    header = ["AccessionNumber", "SOPInstanceUID", "Edema", "Mass"]
    table.write_text(text_of([header, *rows]))
    first = read_labels(table, files, Rules(), SITE)
    table.write_text(text_of([header, *(rows[i] for i in order)]))
    second = read_labels(table, [files[i] for i in random_files], Rules(), SITE)
    np.testing.assert_array_equal(first.labels[random_files], second.labels)
    assert [first.codes[i] for i in random_files] == list(second.codes)
    assert first.codes[0] == "label_conflict"
    assert first.unmatched_rows == second.unmatched_rows == 1


# --- what spreadsheets do to numbers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "accession", "found"),
    [
        ("123", "00123", True),
        ("00123", "123", True),
        ("a12", "A12", True),
        ("123.0", "123", True),
        ("123,00", "00123", True),
        ("1.2345E+04", "12345", True),
        ("1.23E+05", "123000", False),  # it may have been 123456
        ('"=""00123"""', "00123", True),
        ("'00123", "00123", True),
        ("123.5", "123", False),
        ("12", "120", False),
    ],
)
@pytest.mark.parametrize("key", ["auto", "AccessionNumber"])
def test_accession_numbers_after_a_spreadsheet(read: Any, cell: str, accession: str, found: bool, key: str) -> None:
    files = [named("IM1", accession=accession), named("IM2", accession="77")]
    text = f"AccessionNumber;label\n{cell};x\n77;y\n"
    labelled = read(text, files, key=key)
    assert words(labelled) == ["x" if found else "no_label", "y"]
    numbers = cell in ("123.0", "123,00", "1.2345E+04", "1.23E+05")
    assert ("number_format" in codes(labelled)) == numbers
    assert ("leading_zeros" in codes(labelled)) == (cell in ("123", "00123", "a12", "123,00") and found)


def test_digits_that_a_spreadsheet_lost_are_explained(read: Any) -> None:
    message = refusal(read, "Accession,label\n1.23E+11,x\n", [named("IM1", accession="123000000000")])
    assert "a spreadsheet has changed numbers" in message


@pytest.mark.parametrize(
    ("cells", "accessions", "labels"),
    [
        (["123"], ["00123", "0123"], ["no_label", "no_label"]),  # which of the two files?
        (["123", "0123"], ["00123"], ["no_label"]),  # which of the two rows?
        (["123"], ["123", "00123"], ["l0", "no_label"]),  # the very number goes before
        (["123"], ["00123", "00123"], ["l0", "l0"]),
        (["123.0", "123"], ["00123"], ["label_conflict"]),  # one number, two labels
    ],
)
def test_leading_zeros_only_without_doubt(
    read: Any, cells: list[str], accessions: list[str], labels: list[str]
) -> None:
    files = [named(f"IM{i}", accession=accession) for i, accession in enumerate(accessions)]
    rows = [["AccessionNumber", "label"], *([cell, f"l{i}"] for i, cell in enumerate(cells)), ["7", "end"]]
    labelled = read(text_of(rows), [*files, named("end", accession="7")])
    assert words(labelled) == [*labels, "end"]


# --- one column of words ------------------------------------------------------------------------------------


def test_words_stand_as_they_are(read: Any) -> None:
    labelled = read("path,class\na1,01\na2,1\nb1, two  words \nb2,\n")
    assert labelled.label_names == ("01", "1", "two words")
    assert words(labelled) == ["01", "1", "two words", "no_label"]
    assert "similar_words" in codes(labelled)


def test_rows_of_one_key(read: Any) -> None:
    labelled = read("path,label\na1,x\na1,x\na2,x\na2,y\nb1,\nb1,y\nz,q\n")
    assert words(labelled) == ["x", "label_conflict", "y", "no_label"]
    assert labelled.label_names == ("x", "y")  # q belongs to no file
    assert labelled.unmatched_rows == 1
    assert "duplicate_rows" in codes(labelled)


def test_words_of_the_federation(read: Any) -> None:
    text = "path,befund\na1,Lungenentzündung\na2,PNEUMONIE \nb1,unklar\nb2,normal\n"
    mapping = {"lungenentzündung": "pneumonia", "pneumonie": "pneumonia", "unklar": "", "Norml": "healthy"}
    labelled = read(text, label=("Befund",), words=mapping)
    assert words(labelled) == ["pneumonia", "pneumonia", "no_label", "normal"]
    assert {"ignored_rows", "unknown_words"} <= codes(labelled)
    hint = next(message for code, message in labelled.warnings if code == "unknown_words")
    assert "'Norml'" in hint
    assert "line 5" in hint


def test_positive_words_make_two_labels(read: Any) -> None:
    text = "path,label\na1,mass\na2,Nodule\nb1,clear\nb2,unclear\n"
    labelled = read(text, positive=("MASS", "nodule"), words={"unclear": "", "positive": "tumour"})
    assert labelled.label_names == ("negative", "tumour")
    assert words(labelled) == ["tumour", "tumour", "negative", "no_label"]


def test_a_label_of_two_words_joins_them_without_conflict(read: Any) -> None:
    assert words(read("path,label\na1,x\na1,y\na2,y\n", words={"x": "z", "y": "z"}))[:2] == ["z", "z"]


def test_local_words_are_given_once(read: Any) -> None:
    assert "each local word once" in refusal(read, "path,label\na1,x\n", words={"X": "a", "x": "b"})


@pytest.mark.parametrize("column", ["Pneumonia", "Edema_2"])
def test_a_single_column_of_marks(read: Any, column: str) -> None:
    text = f"path,Sex,Age,{column}\na1,0,1,1.0\na2,1,0,NO\nb1,1,1,-1\nb2,0,0,\n"
    for rules in ({}, {"label": (column,)}):
        labelled = read(text, **rules)
        assert labelled.label_names == ("negative", "positive")
        assert words(labelled) == ["positive", "negative", "no_label", "no_label"]
    assert words(read(text, uncertain="ones"))[2] == "positive"
    assert words(read(text, uncertain="zeros"))[2] == "negative"
    renamed = read(text, words={"1.0": "ill", "no": "healthy", "-1": "ill"})
    assert (renamed.label_names, words(renamed)) == (("healthy", "ill"), ["ill", "healthy", "ill", "no_label"])


def test_a_column_called_label_holds_words_even_if_these_are_digits(read: Any) -> None:
    assert read("path,label\na1,0\na2,1\n").label_names == ("0", "1")


@pytest.mark.parametrize(
    ("text", "rules", "message"),
    [
        ("path,what\na1,x\n", {}, "found path, what - name the label columns"),
        ("path,diagnosis,target\na1,x,y\n", {}, "columns diagnosis and target may be the label"),
        ("path,finding\na1,x\n", {"label": ("findings",)}, "did you mean 'finding'?"),
        ("path,label,label\na1,x,y\n", {}, "each column once, column 'label' comes 2 times"),
        ("path,Path,label\na1,a1,y\n", {}, "each column once"),
        ("path,Edema,edema\na1,1,0\n", {}, "each column once"),
        ("path,label\na1,x\n", {"key": "accesion"}, "names column 'accesion'"),
        ("path,label\na1,x\n", {"key": "label"}, "tried column 'label' as path"),
        ("path,label\nsecret,x\n", {}, "tried column 'path' as path"),
        ("path,secret1,label\nz,x,y\n", {}, "tried column 'path', column 2 as path"),
        ("path,label\na1,x\n", {"patient": "PID"}, "[data] patient names column 'PID'"),
        ("path,label\na1,x\n", {"split": "fold"}, "[data] split names column 'fold'"),
        ("path,label\na1,in\u202everse\n", {}, "column 'label', line 2: a label with invisible characters"),
        ("path,label\na1,a\u200bb\n", {}, "invisible characters"),
        ("path,label\na1,a\x07b\n", {}, "invisible characters"),
        (f"path,label\na1,{'secret' * 11}\n", {}, "a label of 66 characters, expected at most 64"),
        ("path,label\na1,x\n", {"words": {"x": "a\u202eb"}}, "invisible characters"),
        (f"path,Edema,E{'x' * 64}\na1,1,0\n", {}, "column 3: a label of 65"),
        ("path,Edema,E\x07\na1,1,0\n", {}, "column 3: a label with invisible"),
    ],
)
def test_labels_that_cannot_be_read(read: Any, text: str, rules: dict[str, Any], message: str) -> None:
    assert message in refusal(read, text, **rules)


def test_too_many_labels(read: Any) -> None:
    files = [named(f"{i}.png") for i in range(513)]
    assert "513 different labels" in refusal(
        read, text_of([["path", "label"], *([f"{i}", f"l{i}"] for i in range(513))]), files
    )
    header = ["path", *(f"f{i}" for i in range(513))]
    assert "513 different labels" in refusal(read, text_of([header, ["a1", *["1"] * 513]]))


# --- several columns of marks -------------------------------------------------------------------------------

CHEXPERT = """Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Edema,Mass
v1/a/a1.png,F,1,1,AP,1.0,0.0,
v1/a/a2.png,M,0,1,PA,,-1.0,1.0
v1/b/b1.png,F,1,0,AP,,,
v1/b/b9.png,F,1,0,,1.0,,
"""


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, [[1, 0, 0], [0, NAN, 1], [0, 0, 0], [NAN] * 3]),
        ({"uncertain": "zeros"}, [[1, 0, 0], [0, 0, 1], [0, 0, 0], [NAN] * 3]),
        ({"uncertain": "ones"}, [[1, 0, 0], [0, 1, 1], [0, 0, 0], [NAN] * 3]),
        ({"uncertain": "soft"}, [[1, 0, 0], [0, 0.5, 1], [0, 0, 0], [NAN] * 3]),
        ({"blank": "ignore"}, [[1, 0, NAN], [NAN, NAN, 1], [NAN] * 3, [NAN] * 3]),
        ({"blank": "ignore", "uncertain": "soft"}, [[1, 0, NAN], [NAN, 0.5, 1], [NAN] * 3, [NAN] * 3]),
    ],
)
def test_findings_and_what_uncertain_and_blank_mean(read: Any, rules: dict[str, Any], expected: list[Any]) -> None:
    labelled = read(CHEXPERT, **rules)
    assert (labelled.kind, labelled.label_names) == ("multi-label", ("No Finding", "Edema", "Mass"))
    np.testing.assert_array_equal(labelled.labels, np.array(expected, np.float32))
    assert labelled.unmatched_rows == 1
    assert "-1 in 1 of 4 rows" in dict(labelled.warnings)["uncertain"]


def test_findings_that_are_named(read: Any) -> None:
    labelled = read(CHEXPERT, label=("Mass", "Fracture", "edema"), words={"edema": "oedema", "No Finding": ""})
    assert labelled.label_names == ("Mass", "Fracture", "oedema")
    np.testing.assert_array_equal(labelled.labels[:3], np.array([[0, NAN, 0], [1, NAN, NAN], [0, NAN, 0]], np.float32))
    assert "'Fracture' is not in the table" in dict(labelled.warnings)["masked_label"]


def test_a_blank_column_that_is_named_is_unknown(read: Any) -> None:
    labelled = read("path,A,B\na1,1,\na2,0,\n", label=("A", "B"))
    np.testing.assert_array_equal(labelled.labels[:2], np.array([[1, NAN], [0, NAN]], np.float32))
    assert "column 'B' is blank" in dict(labelled.warnings)["masked_label"]


def test_columns_with_one_label_are_joined(read: Any) -> None:
    text = "path,A,B,C\na1,1,0,0\na2,-1,0,1\nb1,-1,-1,0\nb2,0,0,0\n"
    labelled = read(text, words={"a": "tumour", "b": "tumour", "c": ""})
    assert labelled.label_names == ("tumour",)
    np.testing.assert_array_equal(labelled.labels[:, 0], np.array([1, 0, NAN, 0], np.float32))
    assert labelled.codes == ("", "", "no_label", "")
    assert "leaves out every label" in refusal(read, text, words={"a": "", "b": "", "c": ""})


def test_findings_of_several_rows(read: Any) -> None:
    labelled = read("path,A,B\na1,1,\na1,,0\na2,1,0\na2,1,1\nb1,1,-1\nb1,1,-1\nb2,0,-1\nb2,0,1\n", uncertain="soft")
    np.testing.assert_array_equal(labelled.labels, np.array([[1, 0], [NAN, NAN], [1, 0.5], [NAN, NAN]], np.float32))
    assert labelled.codes == ("", "label_conflict", "", "label_conflict")


def test_a_cell_that_is_no_mark(read: Any) -> None:
    text = "path,A,B\na1,1,0\na2,secret,1\n"
    assert "line 3, column 'A': expected 1, 0, -1 or blank" in refusal(read, text, label=("A", "B"))


def test_a_finding_with_a_slip_is_told_of(read: Any) -> None:
    files = [named(f"{i}.png") for i in range(20)]
    rows = [["path", "A", "B", "C"], *([str(i), "1", "0", "0" if i else "secret"] for i in range(20))]
    labelled = read(text_of(rows), files)
    assert labelled.label_names == ("A", "B")
    assert "column 'C' holds 1 and 0, but not in 1 rows, first in line 2" in dict(labelled.warnings)["column_left_out"]


@given(st.lists(st.sampled_from(["1", "0", "-1", "", "1.0", "Yes", "FALSE", "uncertain"]), min_size=3, max_size=12))
def test_spelling_of_marks_and_order_of_columns(tmp_path_factory: pytest.TempPathFactory, marks: list[str]) -> None:
    plain = {"1.0": "1", "Yes": "1", "FALSE": "0", "uncertain": "-1"}
    table = tmp_path_factory.mktemp("table") / "labels.csv"
    columns = [["path", *(f"{i}" for i in range(len(marks)))], ["A", *marks], ["B", "1", *marks[1:]]]
    files = [named(f"{i}.png") for i in range(len(marks))]
    results = []
    for columns_now in (columns, columns[::-1], [[plain.get(cell, cell) for cell in column] for column in columns]):
        table.write_text(text_of(list(zip(*columns_now, strict=True))))
        labelled = read_labels(table, files, Rules(label=("A", "B"), uncertain="soft"), SITE)
        results.append(labelled.labels)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


# --- patients, sites, splits: the contract of manifest.csv --------------------------------------------------


def test_manifest(read: Any) -> None:
    text = "Split,PATH,Label,patient,site\ntrain,a/a1.png,x,7,A\nVAL,a/a2.png,y,,A\ntest,b/b1.png,x,8,B\n"
    labelled = read(text)
    assert words(labelled) == ["x", "y", "x", "no_label"]
    assert labelled.patients == ("7", None, "8", None)
    assert labelled.sites == ("A", "A", "B", None)
    assert labelled.splits == ("train", "validation", "test", None)
    findings = read("path,A,B,split\na/a1.png,1,0,train\na/a2.png,,1,test\n")
    assert findings.splits == ("train", "test", None, None)
    assert findings.label_names == ("A", "B")


@pytest.mark.parametrize(
    ("text", "rules", "message"),
    [
        ("path,label,patients\na1,x,3\n", {}, "name it in [data] patient, rename it to 'patient', or remove it"),
        ("path,label,patient_id\na1,x,3\n", {}, "rename it to 'patient'"),
        ("path,labels\na1,x\n", {}, "found path, labels"),
        ("path,label,splits\na1,x,train\n", {}, "rename it to 'split'"),
        ("path,label,sit\na1,x,train\n", {}, "rename it to 'site'"),
        ("path,label,site\na1,x,A\na2,x,\n", {}, "column site is blank in 1 of 2 rows, first in line 3"),
        ("path,label,split\na1,x,\na2,x,val\n", {}, "column split is blank in 1 of 2 rows"),
        ("path,label,split\na1,x,train\na2,x,secret\n", {}, "line 3: split must be train, val"),
        ("path,label,patient\na1,x,secret\na2,x,1\na1,x,2\n", {}, "lines 2 and 4: one file with two patients"),
        ("path,label,site\na1,x,A\na1,x,B\n", {}, "lines 2 and 3: one file with two"),
        ("path,label,split\na1,x,val\na1,x,test\n", {}, "lines 2 and 3: one file with two"),
    ],
)
def test_manifests_that_cannot_be_taken_at_their_word(
    read: Any, text: str, rules: dict[str, Any], message: str
) -> None:
    assert message in refusal(read, text, **rules)


def test_what_does_not_contradict_itself(read: Any) -> None:
    labelled = read("path,label,split,patient\na1,x,val,3\na1,x,Validation,\nz,x,val,8\nz,x,test,9\n")
    assert (labelled.splits[0], labelled.patients[0]) == ("validation", "3")


def test_a_column_of_patients_is_not_missed_where_no_header_names_them(read: Any) -> None:
    assert "patient_unread" in codes(read("path,label,MRN\na1,x,3\n"))
    assert read("path,label,PatientID\na1,x,3\n", patient="patientid").patients[0] == "3"
    assert codes(read("SOPInstanceUID,label,PatientID\n1.2.3.0,x,3\n", cohort())) == set()


# --- class folders ------------------------------------------------------------------------------------------


def test_class_folders() -> None:
    files = [named(path) for path in ("b/1.png", "a/x/2.png", "3.png", "c/4.png")]
    labelled = class_folders(files, Rules(words={"C": "", "a": "A a"}))
    check(labelled, 4)
    assert labelled.label_names == ("A a", "b")
    assert words(labelled) == ["b", "A a", "no_label", "no_label"]
    assert class_folders([], Rules()).label_names == ()


def test_folders_that_are_no_classes() -> None:
    with pytest.raises(DataError, match="look like splits"):
        class_folders([named("train/a/1.png"), named("Test/a/1.png")], Rules())
    for hostile in ("secret\udcff", "secret\u202e", "secret" * 20):
        with pytest.raises(DataError, match="a subfolder of the data folder: a label") as caught:
            class_folders([named(f"{hostile}/1.png")], Rules())
        assert "secret" not in str(caught.value)


# --- hostile --------------------------------------------------------------------------------------------------


def test_cells_are_texts_and_nothing_else(read: Any) -> None:
    rows = [["path", "note", "label"], ["a1", "=cmd|' /C calc'!A0", "<script>"], ["a2", "x" * 2**20, "=1+1"]]
    rows += [["b1", "\x1b[31m\x07", "x"], ["../../etc/passwd", "", "x"], ["b2", "'" * 9, "x"]]
    assert words(read(text_of(rows))) == ["<script>", "=1+1", "x", "x"]
    assert csv.field_size_limit() == 131072


def test_a_cell_without_end(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.table.MAX_CELL", 1000)
    assert "line 3: not CSV" in refusal(read, 'path,label\na1,x\na2,"' + "secret\n" * 200)


@pytest.mark.slow
def test_many_columns_and_many_blanks(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    header = ["path", "label", *(f"c{i}" for i in range(100_000))]
    assert words(read(text_of([header, ["a1", "x"], ["a2", "y"]])))[:2] == ["x", "y"]
    ragged = text_of([header, *(["z"] for _ in range(2000))])
    assert "most rows are shorter than the header" in refusal(read, ragged)
    monkeypatch.setattr("client.table.MAX_COLUMNS", 3)
    assert "more than 3 columns" in refusal(read, "path,label,a,b,c\n")


def test_a_table_that_is_too_large(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.table.MAX_BYTES", 10)
    assert "larger than" in refusal(read, "path,label\na1,x\n")


def test_no_files(read: Any) -> None:
    assert "found none in the data folder" in refusal(read, "path,label\n", [])


@settings(deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"path,label\n", b"\xff\xfe", b"sep=;\n", b"a,b,AccessionNumber\n1,0,7\n"]),
)
def test_any_bytes_give_an_answer_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, head: bytes
) -> None:
    table = tmp_path_factory.mktemp("table") / "labels.csv"
    table.write_bytes(head + content)
    try:
        check(read_labels(table, [named("IM1", "1.2.3", accession="7")], Rules(), SITE), 1)
    except DataError as error:
        assert "\n" not in str(error)  # either outcome is right


def test_representations_show_no_path_and_no_cell(read: Any) -> None:
    labelled = read("path,label,patient\na1,x,secret\n")
    assert "secret" not in repr(labelled)
    assert "IM1" not in repr(named("IM1"))


@pytest.mark.slow
def test_time_grows_with_the_table(tmp_path: Path) -> None:
    for n in (10_000, 100_000):
        rows = [["Path", "PatientID", "Study", "Accession", "Report", "A", "B", "C", "D"]]
        for i in range(n):
            path = f"CheXpert/train/p{i // 4}/s{i % 4}/v.png"
            report = "report " * (n // 1000)
            rows.append([path, f"P{i}", f"1.2.840.1.{i}", f"AC{i}", report, "1.0", "", "-1.0", "0.0"])
        table = tmp_path / "labels.csv"
        table.write_text(text_of(rows))
        files = [
            named(f"train/p{i // 4}/s{i % 4}/v.png", f"1.2.3.{i}", f"1.2.4.{i}", f"1.2.840.1.{i}", f"AC{i}")
            for i in range(n)
        ]
        start = time.perf_counter()
        labelled = read_labels(table, files, Rules(), SITE)
        print(f"{n}: {table.stat().st_size / 1e6:.0f} MB, {time.perf_counter() - start:.2f} s")  # noqa: T201
        assert labelled.codes == ("",) * n

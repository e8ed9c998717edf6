"""What an examination found is shown whole, in closed words, and no name can pass for markup or steer a terminal."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from client.findings import WARNINGS, FileFinding, Findings, Warned
from client.image import CODES, IGNORED
from client.remedies import REMEDIES
from client.report import sheet, tables, terminal
from client.report.document import document
from client.report.page import render
from client.report.wording import encodable, visible
from common.errors import ConsiliumError

HOSTILE = '<script>alert("x")</script>&<img src=x onerror=alert(1)>[bold]\x1b[31m\u202e:smile:=cmd()|\'{{7*7}}'
VOID = {"meta", "br", "hr", "img", "input", "link", "rect"}
CONTRACT = ("examples", "patients", "labels", "quarantine", "ignored", "modalities", "transfer_syntaxes", "warnings")

Make = Callable[..., Findings]


class Page(HTMLParser):
    """Reads a page strictly: every element is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def on_terminal(found: Findings, width: int = 120, **options: Any) -> str:
    stream = io.StringIO()
    terminal.show(found, "/state/check.html", Console(file=stream, width=width, force_terminal=False), **options)
    return stream.getvalue()


def nothing(make: Make) -> Findings:
    """An examination of an empty folder."""
    kinds = ("examples", "labels", "quarantine", "ignored", "modalities", "views", "devices", "transfer_syntaxes")
    empty: dict[str, Any] = {kind: {} for kind in kinds}
    sheet_of_none = np.zeros((0, 1, 224, 224), np.uint8)
    zero: dict[str, Any] = dict.fromkeys(("patients", "duplicates", "near_duplicates", "rows", "from_cache"), 0)
    return make(
        **empty, **zero, burned_in={}, decode={}, months=None, confounding=(), warnings=(), key="", files=(),
        files_without_label=0, rows_without_file=0, manifest_sha256="", sheet=sheet_of_none,
        sheet_labels=(), seconds=0.0,
    )  # fmt: skip


def test_every_code_has_a_remedy_and_no_other() -> None:
    assert set(REMEDIES) == set(CODES) | set(IGNORED)
    assert not set(CODES) & set(IGNORED)
    assert all(text.endswith(".") and "\n" not in text for text in REMEDIES.values())


def test_codes_are_closed(findings: Make) -> None:
    with pytest.raises(ValueError, match="WARNINGS"):
        Warned("Doe^Jane", "")
    with pytest.raises(ValueError, match="CODES"):
        findings(quarantine={"/data/1.dcm": 1})
    with pytest.raises(ValueError, match="IGNORED"):
        findings(ignored={"damaged": 1})


def test_the_document_is_the_contract(findings: Make) -> None:
    found = findings()
    value = document(found, files=True)
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    for key in (*CONTRACT, "manifest_sha256", "preprocessing_id", "files"):
        assert key in value
    assert value["labels"]["train"] == {"normal": 500, "pneumonia": 200}
    assert value["warnings"][0] == {"code": "confounding", "message": "view tells pneumonia"}
    assert value["files"] == [
        {"path": "a/1.dcm", "status": "accepted", "pixel_sha256": "cd" * 32},
        {"path": "a/2.dcm", "status": "quarantined", "code": "damaged"},
        {"path": "b/report.dcm", "status": "ignored", "code": "report"},
    ]
    assert "files" not in document(found)
    assert value["months"] == {"first": "2019-03", "last": "2024-11"}
    assert value["stop"] is None


def test_the_document_describes_each_of_its_keys(findings: Make) -> None:
    from client.report import document as module

    described = module.__doc__ or ""
    assert all(re.search(rf"\b{key}\b", described) for key in document(findings(), files=True))


def test_a_name_of_any_bytes_is_json(findings: Make) -> None:
    path = os.fsdecode(b"caf\xe9/\xff.dcm")
    value = document(findings(files=(FileFinding(path, "accepted"),)), files=True)
    assert value["files"][0]["path"] == r"caf\xe9/\xff.dcm"
    json.dumps(value, ensure_ascii=False).encode()


@given(st.binary(min_size=1, max_size=40))
def test_any_file_name_can_be_written(name: bytes) -> None:
    encodable(os.fsdecode(name)).encode()


def test_terminal_and_page_tell_all_that_was_found(findings: Make) -> None:
    found = findings(decode={**findings().decode, "RLE Lossless": (3, 60.0)})
    for text in (on_terminal(found), Page(render(found)).text):
        for word in (
            "st-anna", "pneumonia", "700", "150", "812", "damaged", "no_pixels", "report", "DX", "CR", "PA", "AP",
            "GE 3f2a", "Siemens 91bc", "JPEG 2000", "20 a second", "< 0.1 a second", "2019-03 to 2024-11",
            "SOPInstanceUID",
            "yes 3, no 900, unknown 98", "72 %", "31 %", "view tells pneumonia", "3 images hold text",
            "ab" * 32, "0123456789abcdef", "chest-xray", "1 min 1 s",
        ):  # fmt: skip
            assert word in text, word
        flat = re.sub(r"\s+", " ", text)
        assert CODES["damaged"].split()[0] in flat
        assert REMEDIES["no_pixels"].split(";")[0][:20] in flat
        assert "this site only" in text
    assert "/state/check.html" in on_terminal(found)


def test_the_stronger_confounder_comes_first(findings: Make) -> None:
    assert [row[1] for row in tables.confounding(findings())] == ["view", "device"]


def test_files_are_listed_only_when_asked(findings: Make) -> None:
    assert "a/2.dcm" not in on_terminal(findings())
    text = on_terminal(findings(), files=True)
    assert "a/2.dcm" in text
    assert "b/report.dcm" in text
    assert "a/1.dcm" not in text
    assert "a/2.dcm" not in render(findings())


def test_nothing_found_can_be_shown(findings: Make) -> None:
    found = nothing(findings)
    page = Page(render(found)).text
    assert "0 images of 0 patients can be used" in page
    assert "No image to show" in page
    assert "0 images of 0 patients" in on_terminal(found)
    json.dumps(document(found), allow_nan=False)


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_narrow_terminal_loses_nothing_of_a_label(width: int, findings: Make) -> None:
    label = "cardiomegaly-with-a-name-that-is-far-too-long-for-a-table" * 3
    text = on_terminal(findings(labels={"train": {label: 700}}), width)
    assert label.replace("-", "") in re.sub(r"[^a-z]", "", text) or width < 40
    assert max(map(len, text.splitlines()[:6])) <= width


def test_a_thousand_labels_are_cut_on_the_terminal_and_whole_on_the_page(findings: Make) -> None:
    found = findings(labels={"train": {f"finding-{k}": 1 for k in range(1000)}})
    assert "and 960 more labels" in on_terminal(found)
    assert "finding-999" not in on_terminal(found)
    assert "finding-999" in render(found)


def hostile(make: Make, text: str) -> Findings:
    return make(
        site=text,
        labels={"train": {text: 700}},
        modalities={text: 1},
        devices={text: 2},
        transfer_syntaxes={text: 3},
        key=text,
        confounding=((text, "view", 0.5, 10),),
        warnings=(Warned("confounding", text),),
        sheet_labels=(text,) * 9,
        files=(FileFinding(text, "quarantined", "damaged"),),
        stop=text,
    )


def test_a_hostile_name_is_text_and_nothing_else(findings: Make) -> None:
    page = render(hostile(findings, HOSTILE))
    read, plain = Page(page), Page(render(findings(stop="x")))
    assert {tag for tag, _ in read.tags} == {tag for tag, _ in plain.tags}
    assert "script" not in {tag for tag, _ in read.tags}
    assert not any(name.startswith("on") for _, attributes in read.tags for name in attributes)
    assert visible(HOSTILE) in read.text
    shown = on_terminal(hostile(findings, HOSTILE), width=2000, files=True)
    assert shown.count(visible(HOSTILE)) >= 5
    for forbidden in ("\x1b", "\u202e", "\x07"):
        assert forbidden not in page
        assert forbidden not in shown


@given(text=st.text(max_size=60))
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=25)
def test_any_name_can_be_shown(text: str, findings: Make) -> None:
    found = hostile(findings, text)
    Page(render(found)).text.encode()
    shown = on_terminal(found, files=True)
    shown.encode()
    assert not any(ord(letter) < 32 and letter != "\n" for letter in shown)
    json.dumps(document(found, files=True), allow_nan=False)


def test_surrogates_do_not_stop_a_page(findings: Make) -> None:
    render(hostile(findings, "a\udce9b")).encode()
    on_terminal(hostile(findings, "a\udce9b"), files=True).encode()


def test_the_page_asks_the_network_for_nothing(findings: Make) -> None:
    page = render(findings())
    assert not re.findall(r"(?:src|href|action)\s*=", page)
    assert set(re.findall(r"url\(\"(.{5})", page)) == {"data:"}
    assert "http://" not in page.lower()
    assert "https://" not in page.lower()
    assert "default-src 'none'" in page


def test_the_page_is_the_same_for_the_same_findings(findings: Make) -> None:
    assert render(findings()) == render(findings())


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize("count", [1, 6, 7, 24])
def test_the_contact_sheet_shows_the_pixels(channels: int, mode: str, count: int, findings: Make) -> None:
    images = np.random.default_rng(0).integers(0, 256, (count, channels, 32, 32), np.uint8)
    page = render(findings(sheet=images, sheet_labels=tuple(f"finding {k}" for k in range(count))))
    (content,) = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    shown = Image.open(io.BytesIO(base64.b64decode(content)))
    assert shown.mode == mode
    assert not shown.info
    pixels = np.asarray(shown).reshape(shown.height, shown.width, channels)
    places = re.findall(r"background-position: -(\d+)px -(\d+)px", page)
    assert len(places) == count
    for image, (left, top) in zip(images, places, strict=True):
        part = pixels[int(top) : int(top) + 32, int(left) : int(left) + 32]
        assert np.array_equal(np.moveaxis(part, -1, 0), image)


def test_large_images_are_made_smaller_for_the_sheet() -> None:
    images = np.full((24, 3, 700, 700), 90, np.uint8)
    content = sheet.contact_sheet(images)
    assert Image.open(io.BytesIO(content)).size == (6 * sheet.SIDE, 4 * sheet.SIDE)
    assert sheet.size(images) == (sheet.SIDE, 6, 4)


@pytest.mark.parametrize(
    "images", [np.zeros((25, 1, 8, 8), np.uint8), np.zeros((1, 2, 8, 8), np.uint8), np.zeros((1, 1, 8, 8), np.float32)]
)
def test_a_sheet_of_another_kind_is_refused(images: Any) -> None:
    with pytest.raises(ConsiliumError, match="expected uint8"):
        sheet.contact_sheet(images)


def test_a_missing_sheet_label_is_blank(findings: Make) -> None:
    Page(render(findings(sheet_labels=())))


def test_what_stops_a_site_stands_first(findings: Make) -> None:
    page = Page(render(findings(stop="640 images are of ANON")))
    assert page.text.index("640 images are of ANON") < page.text.index("can be used")


def test_a_warning_without_a_sentence_shows_its_meaning(findings: Make) -> None:
    for code, meaning in WARNINGS.items():
        assert tables.warnings(findings(warnings=(Warned(code, ""),))) == [(code, meaning)]

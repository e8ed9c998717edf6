"""`consilium site approve`, `audit`, `ledger`, `outbox`, `selftest`: what those who watch over a site see and do."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import re
import stat
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import client
from client import approval, audit, chain, oversight, site_ledger
from client.cli import site
from client.founding import found
from client.ledger import Ledger, LedgerError
from client.oversight import Trail, as_csv, asked_in_words, cell
from client.report import audit_page
from client.site_config import SiteConfig, read_any_site
from common import cli
from common.errors import UsageError
from common.messages import Summed, to_bytes, to_record
from common.privacy import Release
from common.run_config import RunConfig

Run = Callable[..., tuple[int, str, str]]
OWNER = "0f" * 32
RUN = "3f" * 32


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run `consilium site ...` as the installed command would, and return exit code, stdout and stderr."""

    class Entry:
        name = "site"

        def load(self) -> Any:
            return site

    def entry_points(group: str, name: str | None = None) -> list[Entry]:
        return [Entry()] if group == cli.GROUP and name in (None, "site") else []

    def invoke(*arguments: object) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            patch.setattr(importlib.metadata, "entry_points", entry_points)
            patch.setattr(sys, "argv", ["consilium", "site", *map(str, arguments)])
            patch.setenv("COLUMNS", "200")
            with pytest.raises(SystemExit) as ended:
                cli.main()
        printed = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, printed.out, printed.err

    return invoke


@pytest.fixture
def hospital(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SiteConfig:
    """A site with a trail of a run, and a ledger that is empty."""
    config = read_any_site(found(tmp_path / "site", "st-anna").config)
    audit.append(config.audit, "run", {"fingerprint": RUN, "described": 1})
    for number in range(2):
        facts = {"kind": {"train": 1}, "bytes": 1000 + number, "sha256": f"{number}a" * 32}
        audit.append(config.audit, "reply", facts)
    audit.append(config.audit, "refused", {"kind": {"describe": 1}, "code": {"policy": 1}})

    def open_ledger(config: SiteConfig, *, write: bool) -> Ledger:
        assert not write
        return Ledger.read(config.state / "ledger.jsonl", OWNER)

    monkeypatch.setattr(site_ledger, "open_ledger", open_ledger)
    return config


def spend(config: SiteConfig) -> None:
    ledger = Ledger.open(config.state / "ledger.jsonl", OWNER)
    release = Release(noise_multiplier=4.0, sampling_rate=0.1, steps=10)
    ledger.plan(RUN, patients=800, cohort="cc" * 32, unit="patient", delta=1e-5, releases=[release])
    ledger.spend(ledger.reserve(RUN, "round", [release]), "dd" * 32)


def wait(config: SiteConfig, seed: int = 0, name: str = "chest") -> str:
    asked = RunConfig.model_validate({"task": {"name": name, "labels": ["normal", "effusion"]}, "seed": seed})
    approval.waiting(config, asked, {"patients": 812, "examples": 1001, "labels": {"normal": 700, "effusion": 301}})
    return asked.fingerprint()


# -------------------------------------------------------------------------------------------------------- the export


def rows_of(path: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(path.read_text("utf-8-sig"))))


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "action") or name.startswith("on")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_trail_as_a_table_and_as_a_page(hospital: SiteConfig, run: Run, tmp_path: Path) -> None:
    spend(hospital)
    code, out, err = run("audit", "export", "--site", hospital.path, "--output", tmp_path / "trail", "--json")
    assert (code, err) == (0, "")
    table, page = tmp_path / "trail" / "st-anna-audit.csv", tmp_path / "trail" / "st-anna-audit.html"
    entries = audit.read(hospital.audit)
    assert json.loads(out) == {
        "files": [str(table), str(page)],
        "entries": 5,
        "holds": True,
        "wrong": None,
        "sha256": entries[-1].sha256,
    }
    header, *rows = rows_of(table)
    assert tuple(header) == oversight.COLUMNS
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5"]
    assert rows[2] == [
        "3",
        entries[2].time,
        "reply",
        audit.EVENTS["reply"],
        f"bytes=1000; kind.train=1; sha256={'0a' * 32}",
        entries[2].sha256,
    ]
    shown = Page(page.read_text("utf-8"))
    for text in (
        "st-anna",
        "the chain holds",
        "0a" * 32,
        "1a" * 32,
        "2\N{NARROW NO-BREAK SPACE}001",
        RUN[:16],
        "policy",
    ):
        assert text in shown.text
    assert not {"script", "img", "link", "iframe", "form", "object"} & set(shown.tags)
    assert shown.links == []
    assert "default-src 'none'" in page.read_text("utf-8")
    for file in (table, page):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("output", "wanted", "files"),
    [
        ("a.csv", None, ["a.csv"]),
        ("a.HTML", None, ["a.html"]),
        ("a.csv", "both", ["a.csv", "a.html"]),
        ("", "html", ["st-anna-audit.html"]),
        ("new", "csv", ["new/st-anna-audit.csv"]),
    ],
)
def test_where_an_export_goes(
    output: str, wanted: str | None, files: list[str], hospital: SiteConfig, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "to").mkdir()
    given = ["--format", wanted] if wanted else []
    assert run("audit", "export", "--site", hospital.path, "--output", tmp_path / "to" / output, *given)[0] == 0
    assert sorted(path for path in (tmp_path / "to").rglob("*") if path.is_file()) == [
        tmp_path / "to" / name for name in files
    ]


@pytest.mark.parametrize("arguments", [["x.csv", "--format", "html"], ["x.txt/y/z"], ["site/site.toml"], []])
def test_an_export_that_cannot_be(arguments: list[str], hospital: SiteConfig, run: Run, tmp_path: Path) -> None:
    to = ["--output", tmp_path / arguments[0], *arguments[1:]] if arguments else []
    before = hospital.path.read_bytes()
    code, out, err = run("audit", "export", "--site", hospital.path, *to)
    assert (code, out) == (2, "")
    assert "--output" in err
    assert hospital.path.read_bytes() == before


@pytest.mark.parametrize("harm", ["changed", "cut", "gone"])
def test_a_trail_that_does_not_hold_is_exported_up_to_there(
    harm: str, hospital: SiteConfig, run: Run, tmp_path: Path
) -> None:
    content = hospital.audit.read_bytes()
    if harm == "changed":
        hospital.audit.write_bytes(content.replace(b'"bytes":1001', b'"bytes":1002'))
    elif harm == "cut":
        hospital.audit.write_bytes(content[:-30])
    else:
        hospital.audit.unlink()
    code, out, err = run("audit", "export", "--site", hospital.path, "--output", tmp_path / "to")
    assert (code, err.count("\n")) == (1, 1)
    if harm == "gone":
        assert not (tmp_path / "to").exists()
        return
    holding = 3 if harm == "changed" else 4
    said = "line 4 does not hold" if harm == "changed" else "what follows entry 4 is cut short"
    assert said in err
    rows = rows_of(tmp_path / "to" / "st-anna-audit.csv")
    assert rows[1][2] == "broken"
    assert said in rows[1][3]
    assert len(rows) == 2 + holding
    page = Page((tmp_path / "to" / "st-anna-audit.html").read_text("utf-8")).text
    assert page.index("does not hold to its end") < page.index(said) < page.index("What left this hospital")
    code, out, _ = run("audit", "export", "--site", hospital.path, "--output", tmp_path / "to", "--json")
    assert (code, json.loads(out)["holds"], json.loads(out)["entries"]) == (1, False, holding)


def test_a_ledger_that_cannot_be_read_is_said_on_the_page(
    hospital: SiteConfig, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise LedgerError("rolled <b>back</b>")

    monkeypatch.setattr(site_ledger, "open_ledger", fails)
    assert run("audit", "export", "--site", hospital.path, "--output", tmp_path / "a.html")[0] == 0
    assert "rolled <b>back</b>" in Page((tmp_path / "a.html").read_text("utf-8")).text
    assert run("ledger", hospital.path) == (1, "", "consilium: rolled <b>back</b>\n")


HOSTILE = (
    "=cmd|' /C calc'!A0",
    "+1",
    "-1",
    "@SUM(1)",
    "\tx",
    "\rx",
    "<script>alert(1)</script>",
    '"><img src=x>',
    "\x1b[31m",
)


def entry(facts: dict[str, Any], event: str = "reply") -> chain.Entry:
    return chain.Entry("2026-03-01T12:00:00Z", event, facts, chain.START, "ab" * 32)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_cell_is_a_formula_and_no_text_is_markup(text: str) -> None:
    """The trail holds no such text today; what writes the export does not count on that."""
    entries = (entry({text: 1, "sha256": text, "bytes": 1, "list": [text, {text: text}]}, event=text), entry({}))
    trail = Trail(entries, text)
    rows = list(csv.reader(io.StringIO(as_csv(trail).decode("utf-8-sig"), newline="")))
    for row in rows:
        assert not any(value.startswith(("=", "+", "-", "@", "\t", "\r")) for value in row)
    assert all(len(row) == len(oversight.COLUMNS) for row in rows)
    assert cell(text) in (text, f"'{text}")
    page = audit_page.render(text, entries, text, None, text)
    assert "\x1b" not in page
    shown = Page(page)
    assert not {"script", "img"} & set(shown.tags)


def test_facts_of_any_depth_are_shown() -> None:
    facts = {"tensors": {"head.weight": {"norm": 0.25, "shape": [3, 1280]}}, "epsilon": 1.5, "none": {}, "on": True}
    page = Page(audit_page.render("a", (entry(facts, "decision"),), "", None)).text
    for text in ("head.weight", "norm 0.25", "3 1\N{NARROW NO-BREAK SPACE}280", "1.5"):
        assert text in page
    (_, row) = csv.reader(io.StringIO(as_csv(Trail((entry(facts),), "")).decode("utf-8-sig")))
    assert row[4] == "tensors.head.weight.norm=0.25; tensors.head.weight.shape=3 1280; epsilon=1.5; on=True"


# ------------------------------------------------------------------------------------------------------- the trail


def test_the_trail_by_itself_shows_its_last_events(hospital: SiteConfig, run: Run) -> None:
    for arguments in (["--site", hospital.path], [hospital.path]):
        code, out, err = run("audit", *arguments)
        assert (code, err) == (0, "")
        assert "a reply to a coordinator was made" in out
        assert "5 events" in out
    found = json.loads(run("audit", "--site", hospital.path, "--json")[1])
    assert (found["entries"], found["holds"]) == (5, True)
    assert [one["number"] for one in found["latest"]] == [1, 2, 3, 4, 5]
    assert found["latest"][-1]["facts"] == {"kind": {"describe": 1}, "code": {"policy": 1}}
    hospital.audit.write_bytes(hospital.audit.read_bytes()[:-2])
    code, out, err = run("audit", "--site", hospital.path)
    assert (code, "4 events" in out, "cut short" in err) == (1, True, True)


@pytest.mark.parametrize("place", ["option", "outer", "argument", "first", "both"])
def test_a_site_is_named_in_any_place(place: str, hospital: SiteConfig, run: Run) -> None:
    arguments = {
        "option": ["audit", "verify", "--site", hospital.path],
        "outer": ["audit", "--site", hospital.path, "verify"],
        "argument": ["audit", "verify", hospital.path],
        "first": ["audit", hospital.path, "verify"],
        "both": ["audit", "verify", hospital.path, "--site", hospital.path],
    }
    code, out, err = run(*arguments[place], "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"entries": 5, "torn_lines": 0, "sha256": audit.read(hospital.audit)[-1].sha256}


def test_a_site_is_named_once(hospital: SiteConfig, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run("ledger", hospital.path, "--site", "other.toml")
    assert (code, "name one site" in err) == (2, True)
    monkeypatch.chdir(hospital.path.parent)
    assert run("ledger")[0] == 0
    assert run("audit")[0] == 0


# -------------------------------------------------------------------------------------------------------- approving


def test_what_waits_is_listed_in_words(hospital: SiteConfig, run: Run) -> None:
    assert run("approve", "--site", hospital.path)[:2] == (0, "No run waits for approval.\n")
    fingerprint = wait(hospital, name="chest\x1b[31m")
    code, out, err = run("approve", "--site", hospital.path)
    assert (code, err, "\x1b" in out) == (0, "", False)
    for text in (
        fingerprint,
        "chest",
        "normal, effusion",
        "tf_efficientnet_lite0",
        "10 rounds of fedavg, each with 1 pass over its images",
        "exact updates leave",
        "812 patients, 1001 examples; normal 700, effusion 301",
        f"consilium site approve {fingerprint[:12]} --reject",
    ):
        assert text in out
    found = json.loads(run("approve", "--site", hospital.path, "--json")[1])
    assert [asked["fingerprint"] for asked in found["waiting"]] == [fingerprint]


def test_privacy_in_words() -> None:
    def said(**target: Any) -> str:
        asked = RunConfig.model_validate({"privacy": target})
        return dict(asked_in_words(approval.described(asked, {})))["privacy"]

    assert said(epsilon=3.0, delta=1e-5) == "epsilon 3 for the whole run, delta 1e-05; evaluation: exact counts"
    assert said(noise_multiplier=1.5, histogram_epsilon=0.5) == (
        "noise multiplier 1.5, delta by the number of patients; evaluation: epsilon 0.5"
    )


def test_approving_and_rejecting(hospital: SiteConfig, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "root")
    monkeypatch.setenv("SUDO_USER", "anna")
    one, other = wait(hospital, 1), wait(hospital, 2)
    code, out, err = run("approve", one[:10], "--site", hospital.path, "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert (said["fingerprint"], said["approved"], said["who"]) == (one, True, "anna as root")
    assert run("approve", other, "--reject", "--site", hospital.path)[1] == f"run {other}: rejected by anna as root\n"
    assert approval.approved(hospital, one)
    assert not approval.approved(hospital, other)
    for arguments in ([other], ["ffff" * 16], ["--reject"]):
        code, out, err = run("approve", *arguments, "--site", hospital.path)
        assert (code, out, err.count("\n")) == (2, "", 1)
    decided = json.loads(run("approve", "--site", hospital.path, "--json")[1])["decided"]
    assert [(said["fingerprint"], said["approved"]) for said in decided] == [(one, True), (other, False)]


# -------------------------------------------------------------------------------------------------------- the outbox


def reply(value: float) -> bytes:
    return to_bytes(to_record(Summed(*(np.full(2, float(value)) for _ in range(8)))))


def test_the_outbox_shows_what_would_leave(hospital: SiteConfig, run: Run) -> None:
    assert run("outbox", "--site", hospital.path)[:2] == (0, "Nothing is in the outbox.\n")
    assert run("outbox", "--next", "--site", hospital.path)[:2] == (0, "Nothing is about to leave.\n")
    assert json.loads(run("outbox", "--next", "--site", hospital.path, "--json")[1]) == {"next": None}
    box = oversight.box(hospital)
    box.put("one", "statistics", reply(1), {"run": RUN})
    box.mark_sent("one")
    box.put("two", "statistics", reply(2), {"run": RUN, "names": [["a", [2]]]})
    code, out, err = run("outbox", "--next", "--site", hospital.path)
    assert (code, err) == (0, "")
    for text in ("statistics", RUN[:12], "gram", "float64", "2.82843", box.letters()[-1].sha256):
        assert text in out
    shown = json.loads(run("outbox", "--next", "--site", hospital.path, "--json")[1])["next"]
    assert shown["sha256"] == box.letters()[-1].sha256
    assert {one["name"] for one in shown["arrays"]} == set(Summed.__dataclass_fields__)
    code, out, _ = run("outbox", "--site", hospital.path)
    assert (code, "sent" in out, "here" in out) == (0, True, True)
    listed = json.loads(run("outbox", "--site", hospital.path, "--json")[1])["replies"]
    assert [(one["sent"], one["released"]) for one in listed] == [(True, False), (False, False)]


def test_releasing(hospital: SiteConfig, run: Run) -> None:
    box = oversight.box(hospital)
    code, _, err = run("outbox", "--release", "--site", hospital.path)
    assert (code, "no reply is held" in err) == (2, True)
    box.put("one", "train", b"one", {"run": RUN})
    code, out, _ = run("outbox", "--site", hospital.path, "--release")
    assert (code, box.is_released("one"), "released: the answer to train, 3 bytes" in out) == (0, True, True)
    for ticket in ("two", "three"):
        box.put(ticket, "train", ticket.encode(), {"run": RUN})
    code, _, err = run("outbox", "--release", "--site", hospital.path)
    assert (code, "2 replies are held" in err) == (2, True)
    assert not (box.is_released("two") or box.is_released("three"))
    wanted = next(letter.sha256 for letter in box.letters() if letter.ticket == "three")
    code, out, _ = run("outbox", "--release", wanted[:20], "--site", hospital.path, "--json")
    assert (code, json.loads(out)["sha256"], json.loads(out)["released"]) == (0, wanted, True)
    assert (box.is_released("two"), box.is_released("three")) == (False, True)
    assert run("outbox", "--release", "zz", "--site", hospital.path)[0] == 2
    assert run("outbox", "--release", "--next", "--site", hospital.path)[0] == 2


def test_a_reply_that_cannot_be_read_is_shown_as_that(hospital: SiteConfig, run: Run) -> None:
    oversight.box(hospital).put("one", "train", b"\xff" * 40, {"names": "nonsense"})
    code, out, err = run("outbox", "--next", "--site", hospital.path)
    assert (code, err, "not the records of a reply" in out) == (0, "", True)
    letter = oversight.box(hospital).letters()[0]
    letter.path.write_bytes(letter.path.read_bytes()[:-1])
    assert run("outbox", "--next", "--site", hospital.path)[0] == 1


# -------------------------------------------------------------------------------------------- ledger and self-test


def test_the_ledger_in_words(hospital: SiteConfig, run: Run) -> None:
    code, out, err = run("ledger", "--site", hospital.path)
    assert (code, err) == (0, "")
    assert out.startswith("No run with differential privacy")
    assert "sets no limit" in out
    spend(hospital)
    hospital.path.write_text(hospital.path.read_text() + "\n[policy]\nmax_epsilon = 8\nmax_delta = 0.0001\n")
    code, out, err = run("ledger", hospital.path)
    assert (code, err) == (0, "")
    assert RUN[:12] in out
    assert re.search(r"allows epsilon 8; left [0-9.]+\.", out)
    found = json.loads(run("ledger", hospital.path, "--json")[1])
    assert found["budget"] == {"max_epsilon": 8.0, "max_delta": 0.0001}
    assert 0 < found["left"] < 8


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    said: str


@pytest.mark.parametrize("passed", [True, False])
def test_the_self_test(passed: bool, hospital: SiteConfig, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def tests(device: str) -> tuple[Check, ...]:
        asked.append(device)
        return Check("clipping", True, "norm 1.0"), Check("noise", passed, "deviation 0.99")

    module = types.ModuleType("client.selftest")
    module.run = tests  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "client.selftest", module)
    monkeypatch.setattr(client, "selftest", module, raising=False)
    code, out, err = run("selftest", hospital.path)
    assert (code, err) == (0 if passed else 1, "")
    assert f"{'pass' if passed else 'FAIL'}  noise: deviation 0.99" in out
    found = json.loads(run("selftest", "--site", hospital.path, "--json")[1])
    assert (found["passed"], len(found["checks"])) == (passed, 2)
    monkeypatch.chdir(hospital.state)  # no site.toml there
    assert run("selftest")[0] == (0 if passed else 1)
    assert asked == ["auto"] * 3


@pytest.mark.parametrize(
    "command",
    [["approve"], ["audit"], ["audit", "export"], ["audit", "verify"], ["ledger"], ["outbox"], ["selftest"]],
    ids=" ".join,
)
def test_every_command_has_help_with_an_example(command: list[str], run: Run) -> None:
    code, out, err = run(*command, "--help")
    assert (code, err) == (0, "")
    assert "Example:\n    consilium site " in out
    assert max(map(len, out.splitlines())) <= 120


def test_a_site_that_is_not_there(run: Run, tmp_path: Path) -> None:
    for command in (["approve"], ["audit"], ["ledger"], ["outbox"], ["audit", "verify"]):
        code, out, err = run(*command, "--site", tmp_path / "none.toml")
        assert (code, out, err.count("\n")) == (2, "", 1)


def test_what_an_export_says_is_a_usage_error_names_the_option(hospital: SiteConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="--output: .* is a file of another kind"):
        oversight.export(hospital, tmp_path / "file", None)

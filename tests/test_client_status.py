from __future__ import annotations

import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client import balance, site_ledger, status_view, up
from client import status as standing
from client.cli import site
from client.link_status import GOOD, LOCK, WORDS, StatusFile
from client.refused import REFUSED
from client.site_config import SiteConfig, read_site
from client.status import SiteStatus, status
from common import live
from common.errors import ConfigError
from common.files import write_atomic, write_json
from common.locks import exclusive
from common.messages import REFUSALS
from common.privacy import Release

READY = {"state": "ready", "code": "", "phase": "", "done": 0, "total": 0}


def authority(path: Path, days: float) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, end - datetime.timedelta(days=999), end)
    path.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


@pytest.fixture
def config(tmp_path: Path) -> SiteConfig:
    (tmp_path / "images").mkdir()
    (tmp_path / "link").mkdir()
    text = '[site]\nname = "st-anna"\n[data]\nimages = "images"\n[coordinator]\naddress = "host:1"\n'
    (tmp_path / "site.toml").write_text(text)
    authority(tmp_path / "link" / "ca.pem", 900)
    return read_site(tmp_path / "site.toml")


def of(found: SiteStatus, about: str) -> list[tuple[str, str]]:
    return [(finding.level, finding.sentence) for finding in found.findings if finding.about == about]


def linked(config: SiteConfig, code: str, ends: float | None = None) -> StatusFile:
    file = StatusFile(config.link_folder, config.name, "host:1")
    file.certificate(ends)
    file.say(code)
    return file


@pytest.mark.parametrize("code", sorted(set(WORDS) - {"stopped"}))
def test_what_a_running_link_says_is_passed_on(config: SiteConfig, code: str) -> None:
    with exclusive(config.link_folder / LOCK, "a link"):
        linked(config, code)
        found = status(config, READY)
    assert of(found, "link") == [("good" if code in GOOD else "wrong", WORDS[code].sentence)]
    assert found.healthy == (code in GOOD)
    assert json.loads(json.dumps(found.document(), allow_nan=False))["link"]["code"] == code


def test_a_link_that_is_gone_is_not_believed(config: SiteConfig) -> None:
    assert of(status(config, READY), "link") == [("wrong", "The link is not running.")]
    linked(config, "connected")
    assert of(status(config, READY), "link") == [("wrong", "The link is not running.")]


def test_a_link_that_is_stuck_is_not_believed(config: SiteConfig) -> None:
    with exclusive(config.link_folder / LOCK, "a link"):
        linked(config, "connected")
        path = config.link_folder / "status.json"
        value = json.loads(path.read_text())
        write_json(path, {**value, "written": time.time() - 121})
        assert "stuck" in of(status(config, READY), "link")[0][1]
        path.write_text("{")
        assert "damaged" in of(status(config, READY), "link")[0][1]


def test_a_site_without_a_coordinator_is_told_to_join(config: SiteConfig) -> None:
    config.path.write_text('[site]\nname = "st-anna"\n[data]\nimages = "images"\n')
    found = status(read_site(config.path), READY)
    assert of(found, "link") == [("wrong", "The site has joined no coordinator yet.")]


@pytest.mark.parametrize(
    ("said", "level", "words"),
    [
        (READY, "good", "The daemon is ready."),
        ({**READY, "state": "working", "phase": "training", "done": 3, "total": 9}, "good", "training (3 of 9)"),
        ({**READY, "state": "examining", "done": 1, "total": 2}, "good", "examining the site's data (1 of 2)"),
        ({**READY, "state": "starting"}, "good", "starting"),
        ({**READY, "state": "unusable", "code": "no_cohort"}, "wrong", "cannot be used (no_cohort)"),
        ({"state": "unavailable", "code": "DEADLINE"}, "wrong", "does not answer at its socket (DEADLINE)"),
        ({}, "wrong", "nothing that is known"),
    ],
)
def test_what_the_daemon_says_in_words(config: SiteConfig, said: dict[str, Any], level: str, words: str) -> None:
    ((found, sentence),) = of(status(config, said), "daemon")
    assert found == level
    assert words in sentence


@pytest.mark.parametrize(("days", "words"), [(-1, " ended on "), (29, " ends on "), (31, "")])
def test_certificates_that_end_soon_are_spoken_of(config: SiteConfig, days: float, words: str) -> None:
    end = time.time() + days * 86400
    day = time.strftime("%Y-%m-%d", time.gmtime(end))
    authority(config.ca_certificate, days)
    linked(config, "connected", end)
    found = of(status(config, READY), "certificate")
    assert len(found) == (2 if words else 0)
    assert all(words in sentence and day in sentence for _, sentence in found)


def supervised(config: SiteConfig, **child: Any) -> list[tuple[str, str]]:
    folder = up.logs(config)
    folder.mkdir(parents=True, exist_ok=True)
    base = {"pid": 1, "started": time.time(), "restarts": 0, "last_exit": None}
    write_json(folder / "supervisor.json", {"pid": 1, "started": 0.0, "children": {"link": {**base, **child}}})
    with exclusive(folder / "supervisor.lock", "a supervisor"):
        return of(status(config, READY), "supervisor")


def test_what_dies_is_told_of(config: SiteConfig) -> None:
    assert supervised(config) == []
    assert supervised(config, restarts=3, started=time.time() - 61) == []
    assert supervised(config, restarts=3) == [("warning", "The link was started again, 3 times by now.")]
    assert supervised(config, pid=None, last_exit=-9) == [("wrong", "The link ended with exit code -9.")]


def test_the_command_prints_json_alone_and_ends_with_1(config: SiteConfig) -> None:
    run = CliRunner().invoke(site, ["status", str(config.path), "--json"], standalone_mode=False)
    assert run.return_value == 1
    value = json.loads(run.stdout)
    assert value["healthy"] is False
    assert value["daemon"]["state"] == "unavailable"
    text = CliRunner().invoke(site, ["status", str(config.path)], standalone_mode=False).stdout
    assert "The link is not running." in text
    assert "consilium site up" in text


def test_a_site_without_a_state_is_not_run(config: SiteConfig) -> None:
    with pytest.raises(ConfigError, match="consilium site check"):
        up.up(config)
    assert not config.state.exists()


def test_nothing_heavy_is_started_by_names_alone(config: SiteConfig) -> None:
    daemon, link = up.children(config)
    assert daemon.argv[1:] == ("-P", "-m", "client.daemon", str(config.path))
    assert link.argv[1:] == ("-P", "-m", "client.link", str(config.path))
    assert Path(daemon.argv[0]).is_absolute()
    assert link.env == {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_closed_to_this_user_is_said_to_be(config: SiteConfig) -> None:
    config.link_folder.chmod(0)
    assert "closed to this user" in of(status(config, READY), "link")[0][1]


@pytest.mark.parametrize("code", REFUSALS)
def test_the_last_refusal_is_told_where_somebody_can_do_something(config: SiteConfig, code: str) -> None:
    with exclusive(config.link_folder / LOCK, "a link"):
        linked(config, "connected")
        found = status(config, {**READY, "refused": {"code": code, "at": time.time()}})
    told = [finding for finding in found.findings if finding.about == "request"]
    assert found.healthy
    assert len(told) == (code in REFUSED)
    assert all(code in finding.sentence and finding.remedy for finding in told)
    assert set(REFUSED) <= set(REFUSALS)


def test_whatever_is_wrong_comes_with_a_remedy(config: SiteConfig) -> None:
    linked(config, "timeout", time.time() + 86400)
    authority(config.ca_certificate, -1)
    for said in ({**READY, "state": "unusable", "code": "no_cohort"}, {"state": "unavailable", "code": "x"}, {}):
        found = status(config, said)
        assert not found.healthy
        assert all(finding.remedy for finding in found.findings if finding.level != "good")


def test_the_document_is_what_scripts_rely_on(config: SiteConfig) -> None:
    with exclusive(config.link_folder / LOCK, "a link"):
        linked(config, "connected", 4e9)
        supervised(config)
        value = json.loads(json.dumps(status(config, READY).document(), allow_nan=False))
    assert list(value) == ["site", "healthy", "findings", "supervisor", "daemon", "link"]
    assert (value["site"], value["healthy"], value["daemon"]) == ("st-anna", True, READY)
    assert {tuple(finding) for finding in value["findings"]} == {("about", "level", "sentence", "remedy")}
    assert [finding["about"] for finding in value["findings"]] == ["daemon", "link"]
    assert set(value["supervisor"]) == {"running", "pid", "started", "children"}
    assert set(value["supervisor"]["children"]["link"]) == {"pid", "started", "restarts", "last_exit"}
    link = value["link"]
    texts = ("site", "address", "code", "state", "sentence", "remedy")
    numbers = ("pid", "since", "written", "messages", "bytes_in", "bytes_out", "certificate_ends")
    assert set(link) == {*texts, *numbers, "last_contact"}
    assert all(isinstance(link[key], str) for key in texts)
    assert all(isinstance(link[key], int | float) for key in numbers)
    assert link["last_contact"] is None


# What it is at


WORKING = {
    **READY,
    "state": "working",
    "phase": "training",
    "done": 3,
    "total": 9,
    "last": {"phase": "training", "seconds": 12.4},
}


def document(config: SiteConfig, said: dict[str, Any]) -> dict[str, Any]:
    return {**status(config, said).document(), "privacy": balance.balance(config)}


def test_what_a_site_is_at_is_shown_in_figures(config: SiteConfig) -> None:
    with exclusive(config.link_folder / LOCK, "a link"):
        file = linked(config, "connected", 4e9)
        file.count(2_000_000, 3_000)
        file.say("working")
        file.say("timeout")
        now = time.time()
        said = {**WORKING, "since": now - 100, "run": {"name": "chest", "round": 3, "rounds": 20, "heard": now - 200}}
        lines = list(status_view.lines(document(config, said)))
    assert "run                   chest, round 3 of 20, heard of 3 min ago" in lines
    assert "at work               training 3 of 9, begun 2 min ago" in lines
    assert "last work             training, 12 s" in lines
    assert any(line.endswith("3.0 kB in, 2.0 MB out, 0 messages answered") for line in lines)
    assert "certificate           the coordinator's, until 2096-10-02" in lines
    assert not any(line.startswith("privacy") for line in lines)  # nothing was spent


def test_a_daemon_of_an_earlier_version_is_shown(config: SiteConfig) -> None:
    said = {**READY, "phase": "training", "run": {"name": "", "round": 3, "heard": None}}
    lines = list(status_view.lines(document(config, said)))
    assert "run                   no name, round 3, heard of never" in lines
    assert "at work               training, begun never" in lines


@pytest.fixture
def spent(config: SiteConfig) -> SiteConfig:
    """A site with a budget, of which a run has taken something."""
    config.state.mkdir(mode=0o700)
    write_atomic(config.secret, b"0" * 32, mode=0o600)
    config.path.write_text(config.path.read_text() + "[policy]\nmax_epsilon = 3.0\nmax_delta = 1e-5\n")
    ledger = site_ledger.open_ledger(config, write=True)
    release = Release(2.0, 0.1, 10)
    ledger.plan("a" * 64, patients=100, cohort="b" * 64, unit="patient", delta=1e-5, releases=(release,))
    ledger.reserve("a" * 64, "round", [release])
    return read_site(config.path)


def test_what_was_spent_is_read_from_the_ledger(spent: SiteConfig) -> None:
    found = balance.balance(spent)
    assert found["unknown"] == "" and found["max_epsilon"] == 3.0 and found["delta"] == 1e-5
    assert found["epsilon"] + found["left"] == pytest.approx(3.0) and 0 < found["epsilon"] < 3
    expected = (
        f"privacy               epsilon {found['epsilon']:.3f} spent at delta 1e-05, {found['left']:.3f} left of 3"
    )
    assert expected in list(status_view.lines(document(spent, READY)))


def test_the_ledger_is_read_again_when_it_changed(spent: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    read = iter([1.0, 2.0])
    monkeypatch.setattr(balance, "_spent", lambda _config: (next(read), 1e-5))
    again = balance.watched(spent)
    assert [again()["epsilon"] for _ in range(3)] == [1.0, 1.0, 1.0]
    with (spent.state / "ledger.jsonl").open("ab") as file:
        file.write(b"\n")
    assert again()["epsilon"] == 2.0


def test_a_ledger_that_is_damaged_hides_nothing_else(spent: SiteConfig) -> None:
    (spent.state / "ledger.jsonl").write_bytes(b"{}\n")
    found = document(spent, READY)
    assert found["privacy"]["unknown"] == "consilium site ledger says what is wrong with it"
    assert found["privacy"]["epsilon"] is None
    assert "privacy               not known: consilium site ledger says what is wrong with it" in status_view.lines(
        found
    )


def test_watching_prints_a_document_for_each_change(config: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [READY, {**READY, "memory": {"resident": 5}}, {**READY, "state": "starting"}]

    def ask(_config: SiteConfig) -> dict[str, Any]:
        if not said:
            raise KeyboardInterrupt
        return said.pop(0)

    monkeypatch.setattr(standing, "ask", ask)
    monkeypatch.setattr(live, "PAUSE_S", 0.0)
    run = CliRunner().invoke(site, ["status", str(config.path), "--watch", "--json"], standalone_mode=False)
    assert run.return_value == 1  # the link is not running
    assert [json.loads(line)["daemon"]["state"] for line in run.stdout.splitlines()] == ["ready", "starting"]

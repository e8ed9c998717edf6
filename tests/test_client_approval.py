"""A run that waits is shown to a person in full; what they say is kept, and a rejection is final."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from client import approval
from client.approval import approve, approved, decisions, pending, reject, waiting
from client.site_config import SiteConfig, SiteSection, SiteToml
from common.errors import ConsiliumError, UsageError
from common.run_config import RunConfig

FACTS = {"patients": 812, "examples": 1001, "labels": {"normal": 700, "effusion": 301}}


@pytest.fixture
def config(tmp_path: Path) -> SiteConfig:
    (tmp_path / "state").mkdir()
    return SiteConfig(tmp_path / "site.toml", SiteToml(site=SiteSection(name="st-anna")))


def run(seed: int = 0, **sections: Any) -> RunConfig:
    return RunConfig.model_validate({"task": {"name": "chest"}, "seed": seed, **sections})


def test_what_a_run_asks_for_is_written_down(config: SiteConfig) -> None:
    asked = run(privacy={"epsilon": 3.0}, sites={"names": ["a", "b"], "quorum": 2})
    path = waiting(config, asked, FACTS)
    assert path == config.state / "pending_runs" / f"{asked.fingerprint()}.json"
    assert [stat.S_IMODE(one.stat().st_mode) for one in (path.parent, path)] == [0o700, 0o600]
    (found,) = pending(config)
    assert found == json.loads(path.read_text())
    assert (found["task"], found["backbone"], found["strategy"], found["rounds"]) == (
        "chest",
        "tf_efficientnet_lite0",
        "fedavg",
        10,
    )
    assert (found["privacy"]["epsilon"], found["sites"], found["quorum"]) == (3.0, ["a", "b"], 2)
    assert found["site"] == FACTS
    before = path.stat().st_mtime_ns
    waiting(config, asked, {})
    assert path.stat().st_mtime_ns == before  # it waits since it was asked first


def test_approved_and_rejected(config: SiteConfig) -> None:
    one, other = run(1).fingerprint(), run(2).fingerprint()
    for seed in (1, 2):
        waiting(config, run(seed), FACTS)
    assert not approved(config, one)
    said = approve(config, one[:8].upper(), "anna")
    assert (said.fingerprint, said.approved, said.who, said.asked["site"]) == (one, True, "anna", FACTS)
    assert approved(config, one)
    assert not approved(config, other)
    assert [asked["fingerprint"] for asked in pending(config)] == [other]
    assert approve(config, one, "bert") == said  # said once
    reject(config, other[:9], "anna")
    assert (pending(config), approved(config, other)) == ((), False)
    with pytest.raises(UsageError, match=f"run {other[:12]}: anna rejected it on .* final; ask the coordinator"):
        approve(config, other, "bert")
    reject(config, one, "bert")  # what was approved may be taken back
    assert not approved(config, one)
    assert [said.who for said in decisions(config)] == ["anna", "anna", "bert"]
    assert stat.S_IMODE((config.state / "approvals.json").stat().st_mode) == 0o600


def test_beginnings_of_fingerprints(config: SiteConfig) -> None:
    found = sorted(run(seed).fingerprint() for seed in range(40))
    for seed in range(40):
        waiting(config, run(seed), {})
    digit = next(digit for digit in "0123456789abcdef" if sum(name.startswith(digit) for name in found) > 1)
    with pytest.raises(UsageError, match=f"run '{digit}': [0-9]+ runs begin like that .*give more of it"):
        approve(config, digit, "anna")
    for nobody in ("", " ", "g", "0" * 64, found[0] + "0", "../approvals"):
        with pytest.raises(UsageError, match="none of that fingerprint waits here"):
            approve(config, nobody, "anna")
    assert decisions(config) == ()


def test_texts_of_a_coordinator_are_shortened(config: SiteConfig) -> None:
    hostile = run(
        task={"name": "\x1b[31m" * 9000, "labels": ["x" * 9000] * 900},
        model={"backbone": "y" * 90000},
        sites={"names": ["z" * 900] * 9000},
    )
    assert waiting(config, hostile, {}).stat().st_size < 200_000
    assert pending(config)[0]["labels"][-1] == "and 700 more"


def test_waiting_runs_do_not_fill_the_disk(config: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approval, "MOST", 2)
    for seed in (1, 2):
        waiting(config, run(seed), {})
    with pytest.raises(ConsiliumError, match="2 runs wait already; reject some"):
        waiting(config, run(3), {})
    waiting(config, run(2), {})
    reject(config, run(1).fingerprint(), "anna")
    waiting(config, run(3), {})


@pytest.mark.parametrize("content", ["", "{", "[1]", '[{"fingerprint": "a"}]', "null", "[" * 9000, '[{"x": 1}]'])
def test_damaged_decisions_approve_nothing(content: str, config: SiteConfig) -> None:
    waiting(config, run(), {})
    path = config.state / "approvals.json"
    path.write_text(content)
    for attempt in (
        lambda: approved(config, run().fingerprint()),
        lambda: approve(config, run().fingerprint(), "anna"),
        lambda: pending(config),
    ):
        with pytest.raises(ConsiliumError, match="damaged"):
            attempt()
    assert path.read_text() == content


def test_damaged_or_foreign_files_of_waiting_runs(config: SiteConfig, tmp_path: Path) -> None:
    path = waiting(config, run(), {})
    path.write_text("[]")
    with pytest.raises(ConsiliumError, match="damaged; remove it"):
        pending(config)
    path.unlink()
    path.symlink_to(tmp_path / "site.toml")
    (tmp_path / "site.toml").write_text("{}")
    with pytest.raises(ConsiliumError, match="cannot be read"):
        pending(config)


def test_a_crash_between_the_decision_and_the_end_of_waiting(
    config: SiteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = waiting(config, run(), {})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        approve(config, run().fingerprint(), "anna")
    assert path.exists()
    assert approved(config, run().fingerprint())
    assert pending(config) == ()


def test_a_site_without_state(tmp_path: Path) -> None:
    config = SiteConfig(tmp_path / "site.toml", SiteToml(site=SiteSection(name="a")))
    assert (pending(config), decisions(config)) == ((), ())
    for attempt in (lambda: waiting(config, run(), {}), lambda: approve(config, "a", "anna")):
        with pytest.raises(ConsiliumError, match="cannot be"):
            attempt()

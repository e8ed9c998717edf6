"""What a site takes away of what it kept to be quick: only what was of no use for months, and never what counts."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from client import pruning
from client.memory import Memory
from client.outbox import Outbox
from client.site_config import SiteConfig, read_site
from common.run_config import RunConfig

OWN, OTHER = "a" * 64, "b" * 64
LATER = pruning.UNUSED_S + 1000


@pytest.fixture
def config(tmp_path: Path) -> SiteConfig:
    (tmp_path / "images").mkdir()
    (tmp_path / "site.toml").write_text('[site]\nname = "st-anna"\n[data]\nimages = "images"\n')
    return read_site(tmp_path / "site.toml")


def a_run(seed: int = 0) -> RunConfig:
    return RunConfig.model_validate({"seed": seed, "model": {"trunk_sha256": OWN}})


def filled(config: SiteConfig) -> Outbox:
    """Make what two runs leave behind, one of them with the weights of `a_run`, and return the outbox."""
    memory = Memory.at(config.state / "federation", config.name)
    for sha256 in (OWN, OTHER):
        (memory.trunks / f"{sha256}.safetensors").write_bytes(b"x")
        (memory.folder / f"{sha256}.part").write_bytes(b"x")
        (config.cache / "features" / f"{sha256[:32]}-generic").mkdir(parents=True)
        (config.cache / "features" / f"{sha256[:32]}-generic" / "rows").write_bytes(b"x")
    for name in ("ledger.jsonl", "ledger.jsonl.head", "audit.jsonl", "audit-000001.jsonl", "secret", ".optout.lock"):
        (config.state / name).write_bytes(b"x")
    (config.state / ".run.json.abcd_123").write_bytes(b"half")
    outbox = Outbox.at(config.state)
    for seed in (0, 1):
        outbox.put(f"ticket {seed}", "train", b"update", {"run": a_run(seed).fingerprint()})
    outbox.put("statement", "x", b"y", {})
    return outbox


def left(config: SiteConfig) -> set[str]:
    return {str(path.relative_to(config.state)) for path in config.state.rglob("*") if path.is_file()}


def test_what_was_used_of_late_stays(config: SiteConfig) -> None:
    outbox = filled(config)
    before = left(config)
    pruning.prune(config, outbox, a_run(), time.time() + pruning.TORN_S - 60)
    assert left(config) == before


def test_what_nobody_used_goes_and_what_counts_stays(config: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = filled(config)
    before = left(config)
    now = time.time() + LATER
    own = [path for path in pruning._cached(config) if path.name.startswith(OWN[:32])]
    monkeypatch.setattr(pruning, "_unused", lambda config, _now: [p for p in pruning._cached(config) if p not in own])
    pruning.prune(config, outbox, a_run(), now)
    gone = before - left(config)
    assert {Path(name).name for name in gone if "outbox" not in name} == {
        f"{OTHER}.safetensors",
        f"{OTHER}.part",
        "rows",
        ".run.json.abcd_123",
    }
    assert len(own) == 3 and all(path.exists() for path in own)
    assert [letter.run for letter in outbox.letters()] == [a_run().fingerprint(), ""]


def test_what_a_run_needs_is_used_now(config: SiteConfig) -> None:
    filled(config)
    before = {path: path.stat().st_mtime_ns for path in pruning._cached(config)}
    for path in before:
        os.utime(path, (0, 0))
    pruning.prune(config, Outbox.at(config.state), a_run())
    assert {path.name[0] for path in before if path.stat().st_mtime_ns} == {"a"}
    assert list(pruning._unused(config, time.time())) == []  # when it came here counts, not how old it says it is
    assert set(pruning._unused(config, time.time() + LATER)) == set(before)


def test_a_damaged_reply_hides_nothing(config: SiteConfig) -> None:
    outbox = filled(config)
    (letter, *_) = outbox.letters()
    letter.path.write_bytes(b"x")
    pruning.prune(config, outbox, a_run(1), time.time() + LATER)
    assert letter.path.read_bytes() == b"x"

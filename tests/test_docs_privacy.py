"""docs/privacy.md: its commands run, its examples are read, and its codes and numbers are those of the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from client.site_config import parse_site
from common import cli, private_steps
from common.messages import REFUSALS
from common.private_plan import CENTRE_SHARE
from common.run_config import build
from common.strict import parse_toml
from server.private_defaults import DEEP_BATCH

MANUAL = (Path(__file__).parents[1] / "docs" / "privacy.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", MANUAL, flags=re.MULTILINE | re.DOTALL)


def test_its_examples_are_read() -> None:
    run, site = blocks("toml")
    assert build(parse_toml(run, "run.toml"), "run.toml").privacy.epsilon == 3.0
    assert parse_site(parse_toml(site, "site.toml"), "site.toml").policy.max_epsilon == 8.0


def test_its_codes_and_numbers_are_those_of_the_code() -> None:
    coordinators = MANUAL.split("## For coordinators")[1].split("## For hospitals")[0]
    named = re.findall(r"`([a-z_]+)`", coordinators.split("refuse with")[1])
    assert set(named) <= set(REFUSALS) and "budget" in named
    assert f"{private_steps.ROUNDS} rounds of one clipped gradient step" in MANUAL
    assert f"batches of {DEEP_BATCH}" in MANUAL
    assert CENTRE_SHARE == 0.2 and "a fifth of the budget goes into one noisy sum" in MANUAL


@pytest.mark.slow
def test_its_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    labels = np.arange(120) % 2
    images = np.random.default_rng(0).integers(0, 100, (120, 24, 24), np.uint8) + 100 * labels[:, None, None].astype(
        np.uint8
    )
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    (tmp_path / "images").mkdir()
    for number, image in enumerate(images[:4]):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "labels.csv").write_text("path,finding\n" + "".join(f"{number}.png,no\n" for number in range(4)))
    for line in "".join(blocks("sh")).splitlines():
        found = CliRunner().invoke(cli.consilium, shlex.split(line)[1:], standalone_mode=False)
        assert found.exception is None and not found.return_value, (line, found.exception)
    assert (tmp_path / "audit" / "st-anna-audit.html").is_file()

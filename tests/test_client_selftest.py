"""The self-test of a site: it passes on code that is whole, and fails on code with a planted defect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor, nn

from client import clipping, private_training, selftest
from client.guard import Guard
from client.noise import Noise
from common.backbone import Upper

Check = Callable[[str], str]


@pytest.mark.slow
def test_all_passes_on_whole_code() -> None:
    found = selftest.run("cpu")
    assert [check.name for check in found] == ["gradients", "clipping", "noise", "randomness", "norms", "ledger"]
    assert all(check.passed for check in found), found


def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_training, "add_noise", lambda total, _std, _noise: total.float())


def little_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Noise.normal
    monkeypatch.setattr(Noise, "normal", lambda self, shape, std: drawn(self, shape, 0.9 * std))


def no_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipping, "clip_factors", lambda norms, _clip: torch.ones_like(norms))


def norms_that_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Upper, "train", nn.Module.train)


def seeded_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    renew = Noise._renew

    def seeded(self: Noise) -> None:
        renew(self)
        self._cipher = Cipher(algorithms.ChaCha20(bytes(32), bytes(16)), None).encryptor()

    monkeypatch.setattr(Noise, "_renew", seeded)


def no_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guard, "reserve", lambda *_: 1)
    monkeypatch.setattr(Guard, "spend", lambda *_: None)


def one_entry_for_all_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    reserve = Guard.reserve

    def once(self: Guard, run: Any, cohort: Any, purpose: str, release: Any) -> int:
        return reserve(self, run, cohort, "round-1", release)

    monkeypatch.setattr(Guard, "reserve", once)


def sums_that_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = clipping.Clipper.sums

    def scaled(self: clipping.Clipper, *arguments: Any) -> list[Tensor]:
        return [total * 1.01 for total in sums(self, *arguments)]

    monkeypatch.setattr(clipping.Clipper, "sums", scaled)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "check"),
    [
        (no_noise, selftest.noise_level),
        (little_noise, selftest.noise_level),
        (no_clipping, selftest.gradients),
        (no_clipping, selftest.bound),
        (sums_that_are_too_large, selftest.gradients),
        (sums_that_are_too_large, selftest.bound),
        (norms_that_learn, selftest.norms),
        (seeded_noise, selftest.two_runs),
        (no_entry, selftest.replay),
        (one_entry_for_all_rounds, selftest.replay),
    ],
)
def test_a_planted_defect_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    (found,) = [selftest._tried("check", lambda: check("cpu"))]
    assert not found.passed, found.said

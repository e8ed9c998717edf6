"""The comparison: its parts measure what they say, and the command writes every figure that it shows."""

from __future__ import annotations

import json
import mmap
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from common import model
from simulations import compare, plain_flower
from simulations.compare import Bench, Clock, Findings, Ledger, Row


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Sixty images of two brightnesses at two sites, and a small backbone without pretrained weights."""
    folder = tmp_path_factory.mktemp("compare")
    drawn = np.random.default_rng(0)
    labels = np.arange(60) % 2
    images = drawn.integers(0, 150, (60, 32, 32), np.uint8) + (labels * 100).astype(np.uint8)[:, None, None]
    split = np.tile(["train", "train", "train", "validation", "test", "train"], 10)
    path = folder / "tiny.npz"
    np.savez(path, images=images, labels=labels, split=split)
    cuts = ("stages:1",)
    named = {"weights": "none", "backbone": "resnet10t"}
    return Bench(str(path), 32, 2, 2, (0,), folder / "cache", crowd=(2, 4), cuts=cuts, model=named)


def test_nested_calls_count_once() -> None:
    ledger = Ledger()
    inner = ledger.timed(lambda: time.sleep(0.02), "inner")

    def both() -> None:
        time.sleep(0.01)
        inner()

    begin = time.perf_counter()
    ledger.timed(both, "outer")()
    whole = time.perf_counter() - begin
    assert ledger.seconds["inner"] >= 0.02
    assert 0.01 <= ledger.seconds["outer"] <= whole - ledger.seconds["inner"]
    assert sum(ledger.page().values()) == pytest.approx(whole, abs=0.005)


def test_a_call_that_fails_is_timed_too_and_leaves_the_ledger_usable() -> None:
    ledger = Ledger()
    with pytest.raises(ZeroDivisionError):
        ledger.timed(lambda: 1 // 0, "bad")()
    assert set(ledger.page()) == {"bad"}
    ledger.timed(lambda: None, "good")()
    assert ledger.seconds["good"] < 0.01


def test_probes_leave_everything_as_it_was() -> None:
    before = [getattr(owner, name) for owner, name, _ in compare._PROBES]
    with pytest.raises(RuntimeError), compare.probes(Ledger()):
        assert all(getattr(o, n) is not b for (o, n, _), b in zip(compare._PROBES, before, strict=True))
        raise RuntimeError
    assert [getattr(owner, name) for owner, name, _ in compare._PROBES] == before


def test_a_clock_times_rounds_and_nothing_before_them() -> None:
    clock = Clock(lambda: "seen")
    for phase in ("images", "rounds", "train", "rounds", "rounds"):
        clock(phase, 0, 2)
    assert len(clock.seconds) == 2
    assert clock.notes == ["seen"] * 3


def test_the_crowd_is_five_images_a_site(tmp_path: Path) -> None:
    with np.load(compare._write_crowd(tmp_path, 3)) as held:
        assert held["images"].shape == (15, 32, 32)
        assert list(np.unique(held["site"], return_counts=True)[1]) == [5, 5, 5]
        bright = [held["images"][held["labels"] == label].mean() for label in (0, 1)]
    assert bright[1] - bright[0] == pytest.approx(50, abs=5)


def test_peak_memory_forgets_what_was_given_back() -> None:
    compare._take_peak()
    with mmap.mmap(-1, 64 << 20) as block:  # memory of its own: an allocator would reuse what it holds already
        block.write(b"x" * (64 << 20))
        with_block = compare._take_peak()
    compare._take_peak()
    assert with_block - compare._take_peak() > 60


@pytest.mark.parametrize("text", ["", "a", "1,,2", "-1"])
def test_bad_seeds_are_refused_in_words(text: str) -> None:
    found = CliRunner().invoke(compare.main, ["--seeds", text])
    assert found.exit_code == 2
    assert "expected whole numbers" in found.output


@pytest.mark.slow
def test_plain_flower_trains_the_upper_and_leaves_the_trunk(bench: Bench) -> None:
    scene = bench.scene(model={**bench.model, "trainable": "stages:1"})
    trunk = {name: value.clone() for name, value in scene.built.trunk.state_dict().items()}
    upper = model.trainable_values(scene.built.upper)
    recipe = plain_flower.Recipe(8, 1e-3, scene.built.spec)
    found = plain_flower.run(scene.built, list(scene.sites.values()), recipe, rounds=3)
    assert len(found.seconds) == 3
    assert all(seconds > 0 for seconds in found.seconds)
    assert found.losses[-1] < found.losses[0]  # brightness alone tells the labels apart
    after = model.trainable_values(scene.built.upper)
    assert any(not np.array_equal(after[name], upper[name]) for name in upper)
    for name, value in scene.built.trunk.state_dict().items():
        assert np.allclose(value.numpy(), trunk[name].numpy(), rtol=1e-5)  # averaging copies is not quite the identity
    assert found.state_bytes > 4 * sum(value.numel() for value in trunk.values())


@pytest.mark.slow
def test_speed_and_orchestration_measure_a_cut(bench: Bench) -> None:
    facts = compare.speed(bench).facts["stages:1"]
    assert facts["ratio"] == pytest.approx(facts["plain_s"] / facts["ours_s"])
    assert 0 < facts["one_pass_share"] < 1
    assert facts["ratio_of_whole_run"] < facts["ratio"]
    assert facts["plain_cores"] > 0
    spent = compare.orchestration(bench).facts["stages:1"]
    assert 0 < spent["share"] < 1
    assert sum(spent["seconds"].values()) == pytest.approx(spent["round_s"], rel=0.5)
    assert spent["seconds"]["training"] > 0
    assert spent["seconds"]["evaluation"] > 0


@pytest.mark.slow
def test_bytes_are_the_trainable_values_and_next_to_nothing_else(bench: Bench) -> None:
    found = compare.count_bytes(bench)
    for facts in found.facts.values():
        assert 1 <= facts["down"] <= 1.02
        assert 1 <= facts["up"] <= 1.02
        assert facts["evaluation_up"] > 0
    assert found.facts["float32"]["least_bytes"] == 2 * found.facts["bfloat16"]["least_bytes"]


@pytest.mark.slow
def test_scale_runs_each_crowd_in_a_process_of_its_own(bench: Bench) -> None:
    facts = compare.scale(bench).facts
    assert facts["few"]["sites"] == 2
    assert facts["many"]["sites"] == 4
    assert len(facts["many"]["peak_mb"]) == bench.rounds + 1
    assert facts["ratio"] == max(facts["many"]["peak_mb"]) / max(facts["few"]["peak_mb"])


@pytest.mark.slow
def test_accuracy_is_a_mean_over_seeds(bench: Bench) -> None:
    facts = compare.accuracy(bench).facts["dirichlet:0.5"]
    assert facts["accuracy_difference"] == pytest.approx(facts["accuracy"] - facts["pooled_accuracy"])
    assert facts["runs"][0]["auc"] == facts["auc"]


@pytest.mark.slow
def test_the_command_writes_what_it_shows(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def section(given: Bench) -> Findings:
        return Findings({"sites": given.sites}, [Row("sites", str(given.sites), "at least 9", met=False)])

    monkeypatch.setattr(compare, "SECTIONS", {**compare.SECTIONS, "scale": section})
    output = tmp_path / "figures.json"
    found = CliRunner().invoke(compare.main, ["--only", "scale", "--sites", "7", "--json", str(output)])
    assert found.exit_code == 0, found.output
    assert "missed" in found.output
    facts = json.loads(output.read_text())["scale"]
    assert facts["sites"] == 7
    assert len(facts["load"]) == 2


@pytest.mark.slow
def test_a_warm_start_is_timed_to_its_first_round(bench: Bench, tmp_path: Path) -> None:
    output = tmp_path / "run"
    seconds = compare._until_first_round(bench, output)
    assert seconds > 0
    assert (output / "result.json").is_file()

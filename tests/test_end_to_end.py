"""The command as its users run it: the true apps, from files to report, on drawn data."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from common import cli
from common.checkpoint import read_tensors
from common.errors import ConsiliumError

pytestmark = pytest.mark.slow

QUICK = ["--weights", "none", "--image-size", "32", "--views", "2", "--sites", "3", "--rounds", "2", "--quiet"]
METRICS = {
    "examples", "support", "accuracy", "balanced_accuracy", "precision", "recall", "f1", "specificity",
    "auc", "auc_bound", "auc_ci95", "average_precision", "ece", "brier", "per_class", "operating_point",
}  # fmt: skip


def stripes(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return grey images whose stripes lie or stand, with noise: (N, 24, 24) and labels 0, 1."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    wave = (np.sin(np.arange(24) * 1.3) * 60 + 120)[None, :].repeat(24, 0)
    images = np.stack([wave if label else wave.T for label in labels]) + rng.normal(0, 25, (count, 24, 24))
    return images.clip(0, 255).astype(np.uint8), labels


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a flat .npz of 120 images."""
    path = tmp_path_factory.mktemp("data") / "stripes.npz"
    images, labels = stripes(120)
    np.savez(path, images=images, labels=labels)
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache that the module's runs share."""
    return tmp_path_factory.mktemp("cache")


def consilium(*arguments: object) -> tuple[int, str, str]:
    """Run the command in this process as `main` does; return exit code, standard output and standard error."""
    result = CliRunner().invoke(cli.consilium, [str(argument) for argument in arguments], standalone_mode=False)
    if isinstance(result.exception, ConsiliumError):
        return result.exception.exit_code, result.stdout, str(result.exception)
    if result.exception is not None and not hasattr(result.exception, "exit_code"):
        raise result.exception
    code = getattr(result.exception, "exit_code", None)
    return (code if code is not None else result.return_value or 0), result.stdout, str(result.exception or "")


def simulate(data: Path, cache: Path, output: Path, *more: object) -> tuple[int, str, str]:
    """Run `consilium simulate` on small data."""
    return consilium("simulate", "--dataset", data, "--cache", cache, "--output", output, *QUICK, *more)


@pytest.fixture(scope="module")
def finished(data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Return the folder and the result of a run to the end, with baselines."""
    folder = tmp_path_factory.mktemp("run") / "first"
    code, output, _ = simulate(data, cache, folder, "--json")
    assert code == 0
    return folder, json.loads(output)


def test_a_run_leaves_what_the_readme_promises(finished: tuple[Path, dict]) -> None:
    folder, result = finished
    assert {path.name for path in folder.iterdir()} == {
        "run.toml",
        "result.json",
        "rounds.jsonl",
        "report.html",
        "model",
    }
    assert {path.name for path in (folder / "model").iterdir()} == {"upper.safetensors", "model.json"}
    assert json.loads((folder / "result.json").read_text()) == result
    assert len((folder / "rounds.jsonl").read_text().splitlines()) == 3


def test_the_result_says_everything(finished: tuple[Path, dict]) -> None:
    _, result = finished
    assert result["schema"] == 1 and result["status"] == "completed"
    assert [entry["round"] for entry in result["rounds"]] == [0, 1, 2]
    assert result["trunk"]["transfers"] == {"site-1": 1, "site-2": 1, "site-3": 1}
    assert result["test"]["pooled"].keys() == METRICS
    assert set(result["baselines"]["local"]) == set(result["sites"]) == {"site-1", "site-2", "site-3"}
    assert sum(site["examples"]["train"] for site in result["sites"].values()) == 84
    assert all(site["rounds"] == 2 and site["status"] == "contributed" for site in result["sites"].values())
    aucs = [entry["validation"]["auc"] for entry in result["rounds"]]
    assert result["best_round"] == aucs.index(max(aucs))
    assert result["test"]["pooled"]["auc"] > 0.9, "even a random trunk sees stripes"


def test_a_round_sends_the_weights_and_nothing_else(finished: tuple[Path, dict]) -> None:
    _, result = finished
    payload = 3 * result["upper"]["parameters"] * 4
    for entry in result["rounds"][1:]:
        assert entry["bytes_down"] == entry["bytes_up"] == payload
        assert entry["evaluation_bytes_up"] < 3 * result["trunk"]["bytes"]


def test_random_weights_are_said_in_the_reports_first_line(finished: tuple[Path, dict]) -> None:
    folder, result = finished
    page = (folder / "report.html").read_text()
    body = re.sub(r"<[^>]+>", " ", page[page.index("<body") :])
    assert "random" in " ".join(body.split())[:200].lower()
    assert "random_weights" in [warning["code"] for warning in result["warnings"]]


def test_the_written_run_can_be_run_again(finished: tuple[Path, dict], cache: Path, tmp_path: Path) -> None:
    folder, result = finished
    code, _, _ = consilium(
        "simulate",
        "--config",
        folder / "run.toml",
        "--cache",
        cache,
        "--output",
        tmp_path / "again",
        "--quiet",
        "--no-baselines",
    )
    assert code == 0
    again = json.loads((tmp_path / "again" / "result.json").read_text())
    assert again["fingerprint"] == result["fingerprint"]
    assert (tmp_path / "again/model/upper.safetensors").read_bytes() == (
        folder / "model/upper.safetensors"
    ).read_bytes()


def test_a_fresh_cache_gives_the_same_bytes(finished: tuple[Path, dict], data: Path, tmp_path: Path) -> None:
    folder, _ = finished
    assert simulate(data, tmp_path / "cache", tmp_path / "run", "--no-baselines")[0] == 0
    assert (tmp_path / "run/model/upper.safetensors").read_bytes() == (folder / "model/upper.safetensors").read_bytes()


def test_another_partition_finds_the_features_again(
    finished: tuple[Path, dict], data: Path, cache: Path, tmp_path: Path
) -> None:
    def rows() -> int:
        return sum(path.stat().st_size for path in (cache / "features").glob("*/rows.bin"))

    before = rows()
    assert simulate(data, cache, tmp_path / "run", "--no-baselines", "--partition", "iid", "--seed", 3)[0] == 0
    assert simulate(data, cache, tmp_path / "seven", "--no-baselines", "--partition", "iid", "--sites", 7)[0] == 0
    assert before > 0 and rows() == 2 * before, "another seed draws other random weights; another partition nothing"


def test_a_missing_site_ends_in_a_partial_run(
    finished: tuple[Path, dict], data: Path, cache: Path, tmp_path: Path
) -> None:
    faults = ["--fault", "drop:site-2@1", "--fault", "nan:site-3@2"]
    code, _, _ = simulate(data, cache, tmp_path / "run", "--no-baselines", "--quorum", 2, *faults)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert code == 3 and result["status"] == "completed_partial"
    assert [result["sites"][site]["rounds"] for site in ("site-1", "site-2", "site-3")] == [2, 1, 1]
    assert result["rounds"][1]["sites"]["site-2"]["status"] == "lost"
    assert result["rounds"][2]["sites"]["site-3"] == {
        **result["rounds"][2]["sites"]["site-3"], "status": "quarantined", "reason": "not_finite"
    }  # fmt: skip
    for tensor in read_tensors(tmp_path / "run/model/upper.safetensors").values():
        assert np.isfinite(tensor).all()


def test_a_lost_quorum_ends_honestly(finished: tuple[Path, dict], data: Path, cache: Path, tmp_path: Path) -> None:
    code, _, message = simulate(data, cache, tmp_path / "run", "--fault", "drop:site-2@1")
    assert code == 1 and "the quorum is 3" in message and "--resume" in message
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["status"] == "failed" and result["test"] is None
    assert (tmp_path / "run/report.html").exists()
    assert simulate(data, cache, tmp_path / "run", "--resume")[0] == 0, "without the fault the run goes on"


def test_a_folder_of_mixed_files_is_used_as_far_as_it_can(cache: Path, tmp_path: Path) -> None:
    images, labels = stripes(60)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "photos" / ("lying", "standing")[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    (tmp_path / "photos/lying/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    code, _, _ = simulate(tmp_path / "photos", cache, tmp_path / "run", "--no-baselines", "--partition", "iid")
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert code == 0
    assert sum(result["quarantine"].values()) == 1
    assert result["config"]["task"]["labels"] == ["lying", "standing"]


BAD = {
    "an unknown strategy": ["--strategy", "fedprx"],
    "a strategy without its number": ["--strategy", "fedprox"],
    "a negative number": ["--rounds", "-1"],
    "an unknown partition": ["--partition", "dirichlt:1"],
    "a cut that is not there": ["--trainable", "stages:99"],
    "an unknown backbone": ["--backbone", "resnet19"],
    "weights of another backbone": ["--backbone", "resnet18", "--weights", "embedded"],
    "a weights file that is not there": ["--weights", "none.safetensors"],
    "an unknown preset": ["--preset", "xray"],
    "a quorum above the sites": ["--quorum", "9"],
    "a fault at no site": ["--fault", "drop:site-9@1"],
    "a fault beyond the rounds": ["--fault", "drop:site-1@9"],
    "both lengths": ["--local-epochs", "1", "--local-steps", "2"],
    "a wire type": ["--wire", "float8"],
    "natural sites where there are none": ["--partition", "natural"],
    "a word for uncertain": ["--uncertain", "maybe"],
    "a word for blank": ["--blank", "ones"],
    "something else to draw": ["--draw", "sites"],
    "an epsilon of nothing": ["--epsilon", "0"],
    "an epsilon that is no number": ["--epsilon", "three"],
    "a delta without an epsilon": ["--delta", "0.001"],
    "an epsilon that no noise reaches": ["--epsilon", "0.0001"],
    "a data set that is not there": ["--dataset", "missing.npz"],
    "a configuration that is not there": ["--config", "missing.toml"],
    "krum for two": ["--strategy", "krum", "--sites", "2"],
}  # fmt: skip


@pytest.mark.parametrize("options", BAD.values(), ids=BAD.keys())
def test_a_mistake_is_one_line_and_leaves_nothing(options: list[str], data: Path, cache: Path, tmp_path: Path) -> None:
    code, output, message = simulate(data, cache, tmp_path / "run", *options)
    assert code == 2 and output == ""
    assert message and "\n" not in message
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_not_touched(finished: tuple[Path, dict], data: Path, cache: Path) -> None:
    folder, result = finished
    code, _, message = simulate(data, cache, folder)
    assert code == 2 and "--resume" in message
    assert json.loads((folder / "result.json").read_text()) == result


def test_a_resumed_run_keeps_its_configuration(finished: tuple[Path, dict], data: Path, cache: Path) -> None:
    folder, _ = finished
    code, _, message = simulate(data, cache, folder, "--resume", "--strategy", "fedadam")
    assert code == 2 and "training.strategy" in message


def start_process(*arguments: object) -> subprocess.Popen[bytes]:
    """Start the command as a process of its own."""
    command = [sys.executable, "-P", "-c", "from common.cli import main; main()", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def run_process(*arguments: object) -> tuple[int, str]:
    """Run the command in a process of its own; return its exit code and standard error."""
    with start_process(*arguments) as process:
        _, errors = process.communicate(timeout=300)
    return process.returncode, errors.decode()


@pytest.mark.parametrize("lines", [1, 4])
def test_killed_at_any_point_it_ends_with_the_same_bytes(lines: int, data: Path, cache: Path, tmp_path: Path) -> None:
    """The coordinator is killed once some rounds are on disk; the resumed run is compared byte by byte."""
    options = [
        "simulate",
        "--dataset",
        data,
        "--cache",
        cache,
        *QUICK,
        "--no-baselines",
        "--rounds",
        40,
        "--strategy",
        "fedadam",
    ]
    assert run_process(*options, "--output", tmp_path / "whole")[0] == 0
    log = tmp_path / "killed" / "rounds.jsonl"
    end = time.monotonic() + 120
    with start_process(*options, "--output", tmp_path / "killed") as process:
        while time.monotonic() < end and process.poll() is None:
            if log.exists() and log.read_bytes().count(b"\n") >= lines:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.001)
        process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    code, errors = run_process("simulate", "--cache", cache, "--output", tmp_path / "killed", "--resume", "--quiet")
    assert code == 0, errors
    for name in ("model/upper.safetensors", "model/model.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_crash_on_purpose_happens_once(data: Path, cache: Path, tmp_path: Path) -> None:
    options = ["simulate", "--dataset", data, "--cache", cache, *QUICK, "--no-baselines", "--output", tmp_path / "run"]
    fault = ["--fault", "crash:coordinator@2"]
    assert run_process(*options, *fault)[0] == -signal.SIGKILL
    assert run_process(*options, *fault, "--resume")[0] == 0


def test_ray_gives_the_same_bytes(finished: tuple[Path, dict], data: Path, cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is part of the extra 'simulation'")
    folder, _ = finished
    options = ["simulate", "--dataset", data, "--cache", cache, *QUICK, "--no-baselines", "--output", tmp_path / "run"]
    assert run_process(*options, "--backend", "ray")[0] == 0
    assert (tmp_path / "run/model/upper.safetensors").read_bytes() == (folder / "model/upper.safetensors").read_bytes()


def several_findings(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return images with any of three findings, two to a patient, some open or uncertain, one nowhere at one site."""
    rng = np.random.default_rng(seed)
    found = rng.random((count, 3)) < (0.4, 0.3, 0.3)
    images = np.full((count, 24, 24), 100.0)
    for finding, place in enumerate((np.s_[:, 2:8, 2:8], np.s_[:, 14:22, 2:10], np.s_[:, 4:20, 15:20])):
        images[place] += 70 * found[:, finding, None, None]
    labels, open_ = found.astype(float), rng.random((count, 3))
    labels[open_ < 0.05], labels[open_ > 0.95] = -1, np.nan
    site = np.array(["east", "north", "south"])[np.arange(count) // 2 % 3]
    labels[site == "east", 2] = np.nan
    return {
        "images": (images + rng.normal(0, 15, images.shape)).clip(0, 255).astype(np.uint8),
        "labels": labels,
        "label_names": np.array(["mass", "effusion", "nodule"]),
        "patient": np.arange(count) // 2,
        "site": site,
    }


SEVERAL = ["--partition", "natural", "--uncertain", "soft", "--draw", "patients"]


@pytest.fixture(scope="module")
def clinics(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    """Return data with several labels an image, and folder and result of a run on them."""
    folder = tmp_path_factory.mktemp("clinics")
    np.savez(folder / "findings.npz", **several_findings(180))
    code, output, _ = simulate(folder / "findings.npz", cache, folder / "run", "--json", *SEVERAL)
    assert code == 0
    return folder / "findings.npz", folder / "run", json.loads(output)


def test_several_labels_an_image_from_file_to_report(clinics: tuple[Path, Path, dict]) -> None:
    _, folder, result = clinics
    pooled = result["test"]["pooled"]
    assert result["status"] == "completed" and pooled.keys() == METRICS
    assert result["config"]["task"]["kind"] == "multi-label"
    assert result["config"]["data"]["uncertain"] == "soft" and result["config"]["training"]["draw"] == "patients"
    assert list(pooled["per_class"]) == ["mass", "effusion", "nodule"] and pooled["auc"] > 0.9
    assert result["sites"]["east"]["annotated"]["nodule"] == 0
    assert result["test"]["sites"]["east"]["per_class"]["nodule"]["auc"] is None
    assert set(result["baselines"]["local"]) == {"east", "north", "south"}
    assert result["baselines"]["local"]["east"]["per_class"]["nodule"]["auc"] == 0.5, "it never learnt it"
    assert result["baselines"]["pooled"]["auc"] > 0.9
    page = (folder / "report.html").read_text()
    assert "mean over 3 labels" in page and "Annotated" in page
    assert json.loads((folder / "model/model.json").read_text())["kind"] == "multi-label"


def test_several_labels_give_the_same_bytes_on_ray(
    clinics: tuple[Path, Path, dict], cache: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="Ray is part of the extra 'simulation'")
    data, _, _ = clinics
    options = [*SEVERAL, "--no-baselines", "--trainable", "stages:1", "--strategy", "fedprox:0.1"]
    assert simulate(data, cache, tmp_path / "here", *options)[0] == 0
    command = ["simulate", "--dataset", data, "--cache", cache, *QUICK, *options, "--backend", "ray"]
    assert run_process(*command, "--output", tmp_path / "ray")[0] == 0
    model = "model/upper.safetensors"
    assert (tmp_path / "ray" / model).read_bytes() == (tmp_path / "here" / model).read_bytes()


def test_the_default_run_learns(cache: Path, tmp_path: Path) -> None:
    """Phantoms, embedded ImageNet weights, defaults: the federation is far above what single sites reach."""
    code, output, _ = consilium("simulate", "--cache", cache, "--output", tmp_path / "run", "--json", "--quiet")
    result = json.loads(output)
    assert code == 0 and result["status"] == "completed"
    assert result["test"]["pooled"]["auc"] > 0.9
    alone = [figures["auc"] for figures in result["baselines"]["local"].values()]
    assert result["test"]["pooled"]["auc"] > sum(alone) / len(alone) + 0.03


def test_every_command_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    commands = re.findall(r"^consilium (.+)$", readme, flags=re.MULTILINE)
    assert len(commands) >= 4
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images, labels = stripes(120)
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    for label in (0, 1):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(image).save(tmp_path / "images" / str(label) / f"{number}.png")
    rows = [f"{label}/{number}.png,{('no', 'yes')[label]}" for number, label in enumerate(labels.ravel().tolist())]
    (tmp_path / "labels.csv").write_text("\n".join(["path,finding", *rows]) + "\n")
    for command in commands:
        code, errors = run_process(*shlex.split(command, comments=True))
        assert code == (3 if "--quorum" in command else 0), (command, errors)

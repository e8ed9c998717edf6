"""The run: TOML and back, a fingerprint of exactly what was agreed on, and one line for whatever is wrong."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from common.errors import ConfigError
from common.run_config import RunConfig, Simulation, Strategy, StrategyKind, WireType, build
from common.strict import parse_toml, read_toml

# Another value than the default for every field that the federation agrees on.
OTHER: dict[str, dict[str, Any]] = {
    "task": {"name": "pneumonia", "labels": ("normal", "ill"), "kind": "multi-label"},
    "data": {
        "preset": "chest", "image_size": 128, "views": 4, "preprocessing": "grey-1",
        "uncertain": "soft", "blank": "ignore",
    },
    "model": {
        "backbone": "resnet18", "weights": "none", "trainable": "stages:2", "features": "last", "init": "zero",
        "scaling": "stages", "ridge": (1.0,), "dropout": 0.5, "trunk_sha256": "0" * 64,
    },
    "training": {
        "strategy": "fedprox:0.1", "rounds": 3, "local_epochs": 2, "local_steps": 7, "batch_size": 8,
        "draw": "patients", "optimizer": "sgd", "lr": 0.5, "weight_decay": 0.1, "schedule": "constant", "warmup": 0.1,
        "class_weights": "none", "server_lr": 0.1, "server_momentum": 0.5, "momentum": 0.5, "averaging": 0.5,
    },
    "privacy": {
        "epsilon": 3.0, "noise_multiplier": 1.1, "delta": 1e-5, "clip": 0.5, "centre": False,
        "histogram_epsilon": 0.5, "run": "0a" * 16,
    },
    "evaluation": {"metrics": ("confusion", "histograms")},
    "sites": {"names": ("north", "south"), "quorum": 1, "deadline_s": 5.0, "patience_s": 7.0, "max_norm": 3.0},
    "wire": {"dtype": "bfloat16"},
}  # fmt: skip
# Values without which another makes no sense.
NEEDED: dict[tuple[str, str], dict[str, Any]] = {
    ("privacy", key): {"noise_multiplier": 2.0} for key in ("delta", "clip", "histogram_epsilon")
}
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
law = settings(deadline=None, max_examples=60)


def other_fields() -> Iterator[tuple[str, str, Any]]:
    for section, values in OTHER.items():
        yield from ((section, key, value) for key, value in values.items())


def section_model(name: str) -> type[BaseModel]:
    annotation = RunConfig.model_fields[name].annotation
    return next(kind for kind in get_args(annotation) or (annotation,) if kind is not type(None))


def message(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        build(values, "run.toml")
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("run.toml: ")
    return text.removeprefix("run.toml: ")


@st.composite
def runs(draw: st.DrawFn) -> RunConfig:
    """Runs with any subset of fields set, and texts of any letters."""
    chosen = draw(st.lists(st.sampled_from(list(other_fields())), unique_by=lambda item: item[:2]))
    values: dict[str, dict[str, Any]] = {section: {} for section in OTHER}
    for section, key, value in chosen:
        values[section][key] = value
    if "local_epochs" in values["training"]:
        values["training"].pop("local_steps", None)
    if "epsilon" in values["privacy"]:
        values["privacy"].pop("noise_multiplier", None)
    for section, key in NEEDED:
        if not values["privacy"].keys() & {"epsilon", "noise_multiplier"}:
            values[section].pop(key, None)
    values["task"] = {**values["task"], "labels": draw(st.lists(text, max_size=3)), "name": draw(text)}
    values["training"]["lr"] = draw(st.floats(1e-300, 100))
    simulation = draw(st.none() | st.builds(Simulation, dataset=text, data_root=text, sites=st.integers(1, 9)))
    return RunConfig.model_validate({**values, "simulation": simulation, "seed": draw(st.integers(0, 2**63 - 1))})


# -------------------------------------------------------------------------------------------- TOML and fingerprint


@law
@given(runs())
def test_toml_gives_the_run_back_with_its_fingerprint(run: RunConfig) -> None:
    back = RunConfig.from_toml(run.to_toml())
    assert back == run
    assert back.fingerprint() == run.fingerprint()


def test_the_defaults_written_out_are_complete_and_valid() -> None:
    assert RunConfig.from_toml("") == RunConfig.from_toml(RunConfig().to_toml()) == RunConfig()
    written = tomllib.loads(RunConfig(simulation=Simulation()).to_toml())
    assert set(written) == set(RunConfig.model_fields)


def test_the_table_of_other_values_names_every_agreed_field() -> None:
    assert OTHER.keys() | {"simulation", "seed"} == RunConfig.model_fields.keys()
    for section, values in OTHER.items():
        assert values.keys() == section_model(section).model_fields.keys(), section


@pytest.mark.parametrize(("section", "key", "value"), list(other_fields()), ids=lambda value: str(value)[:20])
def test_the_fingerprint_changes_with_every_agreed_field(section: str, key: str, value: Any) -> None:
    needed = NEEDED.get((section, key), {})
    plain, run = build({section: needed}, "run.toml"), build({section: {**needed, key: value}}, "run.toml")
    assert run != plain
    assert run.fingerprint() != plain.fingerprint()
    assert RunConfig.from_toml(run.to_toml()).fingerprint() == run.fingerprint()


def test_the_fingerprint_changes_with_the_seed_and_with_the_order_of_labels_and_sites() -> None:
    plain = {"task": {"labels": ("a", "b")}, "sites": {"names": ("x", "y")}}
    runs = [
        build(plain, "x"),
        build({**plain, "seed": 1}, "x"),
        build({**plain, "task": {"labels": ("b", "a")}}, "x"),
        build({**plain, "sites": {"names": ("y", "x")}}, "x"),
    ]
    assert len({run.fingerprint() for run in runs}) == 4


@pytest.mark.parametrize(
    "simulation",
    [
        {"dataset": "pneumoniamnist"}, {"data_root": "/data"}, {"sites": 9}, {"partition": "iid"}, {"baselines": False},
        {"backend": "ray"}, {"device": "cuda"},
    ],
)  # fmt: skip
def test_the_fingerprint_does_not_see_the_simulation(simulation: dict[str, Any]) -> None:
    run = build({"simulation": simulation}, "run.toml")
    assert run.simulation is not None
    assert run.fingerprint() == RunConfig().fingerprint()
    assert len(run.fingerprint()) == 64


def test_a_whole_number_and_the_same_number_with_a_point_are_one_run() -> None:
    assert RunConfig.from_toml("[training]\nlr = 1") == RunConfig.from_toml("[training]\nlr = 1.0")
    one, other = (RunConfig.from_toml(f"[training]\nlr = {lr}") for lr in ("1", "1.0"))
    assert one.fingerprint() == other.fingerprint()


def test_a_run_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().training.rounds = 3
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().seed = 3


def test_the_wire_types_and_strategies_are_those_documented() -> None:
    assert get_args(WireType) == ("float32", "bfloat16", "float16")
    assert len(get_args(StrategyKind)) == 10


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"trainin": {}}, "trainin: unknown key (did you mean 'training'?)"),
        ({"training": {"round": 3}}, "[training] round: unknown key (did you mean 'rounds'?)"),
        ({"simulation": {"site": 3}}, "[simulation] site: unknown key (did you mean 'sites'?)"),
        ({"model": {"backbon": "x"}}, "[model] backbon: unknown key (did you mean 'backbone'?)"),
        ({"wire": {"zzz": 1}}, "[wire] zzz: unknown key, expected one of dtype"),
        ({"privacy": {"epsilno": 3}}, "[privacy] epsilno: unknown key (did you mean 'epsilon'?)"),
    ],
)
def test_an_unknown_key_is_named_with_its_section_and_the_nearest(values: dict[str, Any], expected: str) -> None:
    assert message(values) == expected


@pytest.mark.parametrize(
    ("privacy", "expected"),
    [
        ({"epsilon": 3.0, "noise_multiplier": 1.0}, "epsilon and noise_multiplier exclude each other: give one"),
        ({"delta": 1e-5}, "delta without epsilon or noise_multiplier: give one of these with it"),
        ({"clip": 1.0}, "clip without epsilon or noise_multiplier: give one of these with it"),
        (
            {"histogram_epsilon": 1.0},
            "histogram_epsilon without epsilon or noise_multiplier: give one of these with it",
        ),
        ({"epsilon": 0.0}, "got 0.0, input should be greater than 0"),
        ({"epsilon": 1000.5}, "got 1000.5, input should be less than or equal to 1000"),
        ({"epsilon": float("nan")}, "got nan, input should be a finite number"),
        ({"epsilon": 1.0, "delta": 1.0}, "got 1.0, input should be less than 1"),
        ({"epsilon": 1.0, "delta": 0.0}, "got 0.0, input should be greater than 0"),
        ({"noise_multiplier": 0.0}, "got 0.0, input should be greater than or equal to 0.001"),
        ({"epsilon": 1.0, "clip": 0.0}, "got 0.0, input should be greater than 0"),
    ],
)
def test_privacy_that_makes_no_sense(privacy: dict[str, Any], expected: str) -> None:
    assert expected in message({"privacy": privacy})


def test_a_run_is_private_with_an_epsilon_or_with_noise() -> None:
    assert build({"privacy": {"epsilon": 3.0}}, "x").privacy.on
    assert build({"privacy": {"noise_multiplier": 3.0}}, "x").privacy.on
    assert not RunConfig().privacy.on


def test_rounds_cannot_do_without_confusion_and_histograms() -> None:
    assert "expected histograms among them" in message({"evaluation": {"metrics": ["confusion", "losses"]}})
    assert "got none, expected confusion" in message({"evaluation": {"metrics": []}})


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("data", "image_size", 15, "got 15, input should be greater than or equal to 16"),
        ("data", "image_size", 2049, "got 2049, input should be less than or equal to 2048"),
        ("data", "views", 0, "got 0, input should be greater than or equal to 1"),
        ("data", "views", 17, "got 17, input should be less than or equal to 16"),
        ("model", "dropout", 1.0, "got 1.0, input should be less than 1"),
        ("model", "dropout", -0.1, "got -0.1, input should be greater than or equal to 0"),
        ("model", "features", "all", "got 'all', input should be 'multi' or 'last'"),
        ("model", "init", "random", "got 'random', input should be 'analytic' or 'zero'"),
        ("model", "ridge", [], "got [], tuple should have at least 1 item after validation, not 0"),
        ("model", "ridge", [1.0, 0.0], "expected positive numbers"),
        ("model", "trainable", "stages:0", "got 'stages:0', expected head, stages:N with N at least 1, or all"),
        ("training", "rounds", -1, "got -1, input should be greater than or equal to 0"),
        ("training", "rounds", 100_001, "got 100001, input should be less than or equal to 100000"),
        ("training", "rounds", True, "got True, input should be a valid integer"),
        ("training", "rounds", 1.5, "got 1.5, input should be a valid integer"),
        ("training", "rounds", "3", "got '3', input should be a valid integer"),
        ("training", "local_epochs", 0, "got 0, input should be greater than or equal to 1"),
        ("training", "local_steps", 0, "got 0, input should be greater than or equal to 1"),
        ("training", "batch_size", 0, "got 0, input should be greater than or equal to 1"),
        ("training", "lr", 0.0, "got 0.0, input should be greater than 0"),
        ("training", "lr", 101.0, "got 101.0, input should be less than or equal to 100"),
        ("training", "lr", math.nan, "got nan, input should be a finite number"),
        ("training", "weight_decay", -1.0, "got -1.0, input should be greater than or equal to 0"),
        ("training", "weight_decay", math.inf, "got inf, input should be a finite number"),
        ("training", "warmup", 1.0, "got 1.0, input should be less than 1"),
        ("training", "server_lr", 0.0, "got 0.0, input should be greater than 0"),
        ("training", "server_momentum", 1.0, "got 1.0, input should be less than 1"),
        ("training", "schedule", "linear", "got 'linear', input should be 'cosine' or 'constant'"),
        ("training", "strategy", "fedavg:1", "'fedavg' takes no parameter, got 'fedavg:1'"),
        ("training", "strategy", "fedprox", "got 'fedprox', expected fedprox:MU with a number"),
        ("sites", "quorum", 0, "got 0, input should be greater than or equal to 1"),
        ("sites", "deadline_s", 0.0, "got 0.0, input should be greater than 0"),
        ("sites", "deadline_s", math.inf, "got inf, input should be a finite number"),
        ("sites", "max_norm", 0.0, "got 0.0, input should be greater than 0"),
        ("sites", "names", "north", "got 'north', input should be a valid tuple"),
        ("wire", "dtype", "float64", "got 'float64', input should be 'float32', 'bfloat16' or 'float16'"),
        ("simulation", "sites", 0, "got 0, input should be greater than or equal to 1"),
    ],
)
def test_a_value_out_of_range_is_one_line_with_key_got_and_expected(
    section: str, key: str, value: Any, expected: str
) -> None:
    assert message({section: {key: value}}) == f"[{section}] {key}: {expected}"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"seed": -1}, "seed: got -1, input should be greater than or equal to 0"),
        ({"seed": 2**63}, f"seed: got {2**63}, input should be less than {2**63}"),
        ({"model": {"ridge": [1.0, math.nan]}}, "[model] ridge.1: got nan, input should be a finite number"),
        ({"task": {"labels": ["a", 1]}}, "[task] labels.1: got 1, input should be a valid string"),
        (
            {"training": {"local_epochs": 1, "local_steps": 2}},
            "training: local_epochs and local_steps exclude each other: give one",
        ),
        ({"data": 3}, "data: got 3, input should be a valid dictionary or instance of Data"),
        ({"model": {"trainable": "two\nlines"}}, "[model] trainable: got 'two\\nlines', expected head"),
    ],
)
def test_other_wrong_values(values: dict[str, Any], expected: str) -> None:
    assert message(values).startswith(expected)


@pytest.mark.parametrize("cut", ["head", "all", "stages:1", "stages:12"])
def test_cuts_that_can_be(cut: str) -> None:
    assert build({"model": {"trainable": cut}}, "run.toml").model.trainable == cut


@pytest.mark.parametrize(
    "cut", ["", "Head", "stages", "stages:", "stages:-1", "stages:1.5", "stages: 1", "stages:٣", "stages:01", "head:1"]
)
def test_cuts_that_cannot_be(cut: str) -> None:
    assert f"got {cut!r}, expected head, stages:N" in message({"model": {"trainable": cut}})


# -------------------------------------------------------------------------------------------------------- strategies


@pytest.mark.parametrize(
    ("text", "kind", "parameter"),
    [
        ("fedavg", "fedavg", None),
        ("analytic", "analytic", None),
        ("fedavgm", "fedavgm", None),
        ("fedadam", "fedadam", None),
        ("fedyogi", "fedyogi", None),
        ("fedadagrad", "fedadagrad", None),
        ("median", "median", None),
        ("krum", "krum", None),
        ("fedprox:0", "fedprox", 0.0),
        ("fedprox:1e-3", "fedprox", 0.001),
        ("fedprox:100", "fedprox", 100.0),
        ("trimmed-mean:0", "trimmed-mean", 0.0),
        ("trimmed-mean:0.49", "trimmed-mean", 0.49),
    ],
)
def test_strategies_as_they_are_spelt(text: str, kind: str, parameter: float | None) -> None:
    strategy = Strategy.parse(text)
    assert (strategy.kind, strategy.parameter) == (kind, parameter)
    assert build({"training": {"strategy": text}}, "x").training.rule == strategy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fedavgg", "strategy: got 'fedavgg', expected fedavg, "),
        ("FedAvg", "(did you mean 'fedavg'?)"),
        ("fedporx:1", "(did you mean 'fedprox'?)"),
        ("", "strategy: got '', expected fedavg, "),
        ("fedavg:1", "strategy: 'fedavg' takes no parameter, got 'fedavg:1'"),
        ("fedavg:", "strategy: 'fedavg' takes no parameter, got 'fedavg:'"),
        ("fedprox", "strategy: got 'fedprox', expected fedprox:MU with a number"),
        ("fedprox:", "strategy: got 'fedprox:', expected fedprox:MU with a number"),
        ("fedprox:a", "strategy: got 'fedprox:a', expected fedprox:MU with a number"),
        ("fedprox:-0.1", "strategy: got 'fedprox:-0.1', expected fedprox:MU at least 0"),
        ("fedprox:inf", "strategy: got 'fedprox:inf', expected fedprox:MU at least 0"),
        ("fedprox:nan", "strategy: got 'fedprox:nan', expected fedprox:MU at least 0"),
        ("trimmed-mean:0.5", "got 'trimmed-mean:0.5', expected trimmed-mean:BETA at least 0 and below 0.5"),
        ("trimmed-mean:nan", "got 'trimmed-mean:nan', expected trimmed-mean:BETA at least 0 and below 0.5"),
        ("krum:2", "strategy: 'krum' takes no parameter, got 'krum:2'"),
    ],
)
def test_strategies_that_are_none(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Strategy.parse(text)
    assert expected in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- files


def test_a_file_is_read_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('seed = 3\n[task]\nname = "Lunge é"\n', encoding="utf-8")
    assert read_toml(path) == {"seed": 3, "task": {"name": "Lunge é"}}


def test_a_file_that_cannot_be_read_says_why_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b'[task]\nname = "\xe9"\n')
    (tmp_path / "none.toml").write_text("seed == 3")
    for name, reason in [
        ("absent.toml", "cannot be read (No such file or directory)"),
        (".", "cannot be read (Is a directory)"),
        ("latin", "cannot be read (not UTF-8 text)"),
        ("none.toml", "not TOML ("),
    ]:
        with pytest.raises(ConfigError) as caught:
            read_toml(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: {reason}")
        assert "\n" not in str(caught.value)


def test_no_toml_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"^run\.toml: not TOML \("):
        parse_toml("[training", "run.toml")


def test_the_whole_run_is_json() -> None:
    run = build({"simulation": {}}, "run.toml")
    assert RunConfig.model_validate(json.loads(json.dumps(run.model_dump(mode="json")))) == run

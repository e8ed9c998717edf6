from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from common.presets import PRESETS, preprocessing_id
from common.run_config import DEEP_LR, HEAD_LR, RunConfig, Task
from server.plan import settled, with_trunk

TASK = Task(name="blobs", labels=("dark", "bright"))
SITES = ("north", "south")


def plan(**sections: Any) -> RunConfig:
    values: dict[str, Any] = {
        "data": {"image_size": 32},
        "model": {"backbone": "test_efficientnet", "weights": "none"},
    }
    return RunConfig.model_validate({**values, **{n: {**values.get(n, {}), **v} for n, v in sections.items()}})


def test_what_is_left_open_is_filled_in() -> None:
    run = settled(plan(data={"image_size": None}), TASK, ("south", "north"), "chest-xray").run
    preset = PRESETS["chest-xray"]
    assert (run.data.preset, run.data.image_size, run.data.views) == ("chest-xray", preset.image_size, preset.views)
    assert run.data.preprocessing == preprocessing_id(preset, preset.image_size)
    assert (run.sites.names, run.sites.quorum) == (SITES, 2)
    assert (run.training.local_epochs, run.training.local_steps, run.training.lr) == (1, None, HEAD_LR)
    assert (run.task, run.model.weights, len(run.model.trunk_sha256)) == (TASK, "none", 64)


def test_what_was_asked_for_stands() -> None:
    asked = plan(
        data={"preset": "ct", "image_size": 40, "views": 3, "preprocessing": "claimed"},
        training={"local_steps": 7, "lr": 0.5},
        sites={"quorum": 1},
        model={"trunk_sha256": "claimed"},
    )
    run = settled(asked, TASK, SITES, "generic").run
    assert (run.data.preset, run.data.image_size, run.data.views) == ("ct", 40, 3)
    assert (run.training.local_steps, run.training.local_epochs, run.training.lr) == (7, None, 0.5)
    assert run.sites.quorum == 1
    assert "claimed" not in (run.data.preprocessing, run.model.trunk_sha256)  # facts are found, never believed


def test_deeper_cuts_learn_more_slowly() -> None:
    assert settled(plan(model={"trainable": "all"}), TASK, SITES, "generic").run.training.lr == DEEP_LR


@pytest.mark.slow
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    names=st.lists(st.text("abc-", min_size=1, max_size=4), min_size=1, max_size=4, unique=True),
    rounds=st.integers(0, 9),
    wire=st.sampled_from(["float32", "float16"]),
)
def test_a_settled_run_is_settled_whatever_order_its_sites_were_named_in(
    names: list[str], rounds: int, wire: str
) -> None:
    asked = plan(training={"rounds": rounds}, wire={"dtype": wire})
    first = settled(asked, TASK, names, "generic").run
    assert settled(asked, TASK, names[::-1], "generic").run.fingerprint() == first.fingerprint()
    assert settled(first, first.task, first.sites.names, "ct").run == first
    assert with_trunk(first).run == first
    assert RunConfig.from_toml(first.to_toml()) == first


def test_the_same_options_have_the_fingerprint_of_the_simulation() -> None:
    asked = plan(training={"rounds": 2, "batch_size": 8})
    simulated = asked.model_copy(
        update={"simulation": RunConfig.model_validate({"simulation": {"sites": 2, "baselines": False}}).simulation}
    )
    real = settled(asked.model_copy(update={"task": TASK}), TASK, SITES, "generic")
    assert settled(simulated, TASK, ("north", "south"), "generic").run.fingerprint() == real.run.fingerprint()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"sites": {"quorum": 3}}, "quorum 3: the run has 2 sites"),
        ({"data": {"preset": "chest"}}, r"preset: got 'chest', expected .*did you mean 'chest-ct'"),
        ({"training": {"strategy": "krum"}}, "krum: needs at least"),
        ({"model": {"weights": "embedded"}}, "the wheel holds"),
    ],
)
def test_what_contradicts_itself(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settled(plan(**sections), TASK, SITES, "generic")

"""A whole hospital in a private run: what it lets out, what it writes down first, and what it refuses."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from client import approval, audit, oversight, selftest, site_ledger
from client.cohort import Cohort
from client.founding import found_state
from client.hospital import Hospital
from client.site_config import SiteConfig, read_site
from common import checkpoint, codec, metrics, model
from common.errors import SiteRefusal
from common.messages import (
    Describe,
    Description,
    Evaluate,
    Evaluated,
    Finish,
    Freeze,
    InstallTrunk,
    Prepare,
    PrivateStatistics,
    PrivateSums,
    Reply,
    Request,
    Statistics,
    Train,
    Trained,
    from_bytes,
    from_record,
)
from common.privacy import epsilon
from common.run_config import RunConfig

pytestmark = pytest.mark.slow

VERSION = importlib.metadata.version("consilium")
EDGES = metrics.coarse_edges(2, bins=16)


BARE = {"privacy": {"noise_multiplier": None, "delta": None, "clip": None}}
"""What makes the run one without privacy."""


class Play:
    """A coordinator's part, spoken to one hospital."""

    def __init__(self, folder: Path, policy: dict[str, Any], **sections: Any) -> None:
        self.folder = folder
        self.progress: Callable[[str, int, int], None] = lambda *_: None
        (folder / "images").mkdir(parents=True, exist_ok=True)
        values = {
            "site": {"name": "north"},
            "data": {"images": "images"},
            "compute": {"device": "cpu"},
            "policy": policy,
        }
        (folder / "site.toml").write_text(tomli_w.dumps(values))
        self.config: SiteConfig = read_site(folder / "site.toml")
        found_state(self.config.state)
        self.run, self.trunk, self.weights = prepared(**sections)
        self.cohort: Callable[[], Cohort] = lambda: selftest.drawn_cohort(self.run)
        self.restart()

    def restart(self) -> None:
        self.hospital = Hospital(self.config, lambda _progress: self.cohort())

    def say(self, request: Request, expected: type[Any]) -> Any:
        content = self.hospital.work(request, self.progress)
        self.content = content
        return from_record(from_bytes(content), expected)

    @property
    def name(self) -> str:
        return self.run.fingerprint()

    def describe(self) -> Description:
        found: Description = self.say(Describe(self.run.to_toml(), VERSION), Description)
        return found

    def begin(self) -> Description:
        found = self.describe()
        self.say(InstallTrunk(self.name, self.run.model.trunk_sha256, np.frombuffer(self.trunk, np.uint8)), _done())
        self.say(Prepare(self.name), _done())
        width = self.width
        self.say(Freeze(self.name, np.zeros(width, np.float32), np.ones(width, np.float32), np.ones(2)), _done())
        return found

    @property
    def width(self) -> int:
        return int(self.weights["head.linear.weight"].shape[1])

    def train(self, number: int, shift: float = 0.0) -> Trained:
        vector = codec.encode({k: v + np.float32(shift) for k, v in self.weights.items()}, "float32")
        found: Trained = self.say(Train(self.name, number, vector, EDGES), Trained)
        return found

    def evaluate(self, split: str, shift: float = 0.0) -> Evaluated:
        vector = codec.encode({k: v + np.float32(shift) for k, v in self.weights.items()}, "float32")
        found: Evaluated = self.say(Evaluate(self.name, split, vector, EDGES), Evaluated)
        return found

    def refused(self, act: Callable[[], Any]) -> str:
        with pytest.raises(SiteRefusal) as caught:
            act()
        return caught.value.code

    def ledger(self) -> Any:
        return site_ledger.open_ledger(self.config, write=False)

    def events(self, kind: str) -> list[Any]:
        return [entry.facts for entry in audit.read(self.config.audit) if entry.event == kind]


def _done() -> type[Reply]:
    from common.messages import Done

    return Done


_PREPARED: dict[str, Any] = {}


def prepared(**sections: Any) -> tuple[RunConfig, bytes, dict[str, Any]]:
    """Return a settled run, its trunk and its first weights."""
    plan = selftest.drawn_run("test_efficientnet", "head").model_dump()
    for section, changes in sections.items():
        plan[section] = {**plan[section], **changes}
    run = RunConfig.model_validate(plan)
    key = repr((run.model, run.task.labels))
    if key not in _PREPARED:
        built = model.skeleton(run)
        _PREPARED[key] = (model.frozen_content(built, run), model.trainable_values(built.upper))
    trunk, weights = _PREPARED[key]
    named = run.model.model_copy(update={"trunk_sha256": checkpoint.sha256(trunk)})
    return run.model_copy(update={"model": named}), trunk, weights


@pytest.fixture
def play(tmp_path: Path) -> Play:
    return Play(tmp_path, {})


def test_the_plan_is_told_and_written_down_before_anything_is_taken(play: Play) -> None:
    said = play.describe()
    assert said.unit == "image" and said.examples == 16 and not said.support[0].any()
    assert (said.noise_multiplier, said.sampling_rate, said.steps) == (selftest.SIGMA, 1.0, 3)
    assert said.spent == 0 and said.epsilon == epsilon(play.ledger().planned(play.name).releases, said.delta)
    assert play.ledger().releases() == ()


def test_a_round_is_reserved_then_spent_and_its_bytes_are_in_both_books(play: Play) -> None:
    play.begin()
    reply = play.train(1)
    (run,) = play.ledger().runs()
    (departed,) = run.departed.values()
    sent = play.events("reply")[-1]
    assert sent["sha256"] == departed and sent["bytes"] == len(play.content)
    assert sent["epsilon"] == pytest.approx(reply.epsilon) and sent["ledger_entries"] == play.ledger().head[0]
    assert set(sent["tensors"]) >= {"head.linear.weight", "head.linear.bias"}
    assert reply.train_loss == 0.0 and reply.steps == 1


def test_the_same_question_gets_the_same_bytes_also_after_a_restart_and_costs_nothing_more(play: Play) -> None:
    play.begin()
    first = play.train(1)
    bytes_sent, spent = play.content, play.ledger().epsilon(1e-3)
    play.restart()
    again = play.train(1)
    assert play.content == bytes_sent and np.array_equal(first.weights, again.weights)
    assert play.ledger().epsilon(1e-3) == spent


def test_another_question_for_a_round_is_another_draw_and_stops_at_the_plan(play: Play) -> None:
    play.begin()
    replies = [play.train(1, shift).weights for shift in (0.0, 0.1, 0.2)]
    assert not np.array_equal(replies[0], replies[1])
    assert play.refused(lambda: play.train(2)) == "budget"
    assert play.ledger().runs()[0].reserved == 3


def test_what_was_reserved_by_a_process_that_died_counts_as_spent(play: Play) -> None:
    play.begin()
    play.train(1)
    (planned,) = play.ledger().planned(play.name).releases
    one = type(planned)(planned.noise_multiplier, planned.sampling_rate, 1)
    site_ledger.open_ledger(play.config, write=True).reserve(play.name, "round-2", [one])
    play.restart()
    assert play.train(2).steps == 3
    assert play.refused(lambda: play.train(3)) == "budget"


def test_a_budget_that_does_not_cover_the_whole_run_refuses_it_before_it_starts(tmp_path: Path) -> None:
    play = Play(tmp_path, {"max_epsilon": 2.0, "max_delta": 1e-3})
    assert play.refused(play.describe) == "budget"
    assert len(play.ledger().entries) == 1  # that it was opened
    assert not (play.config.cache / "features").exists()


def test_a_delta_above_the_hospitals_is_refused(tmp_path: Path) -> None:
    play = Play(tmp_path, {"max_epsilon": 50.0, "max_delta": 1e-4})
    assert play.refused(play.describe) in ("policy", "budget")


def test_a_target_that_no_noise_reaches_and_a_delta_above_one_patient_are_refused(tmp_path: Path) -> None:
    tiny = Play(tmp_path / "a", {}, privacy={"noise_multiplier": None, "epsilon": 0.001})
    large = Play(tmp_path / "b", {}, privacy={"delta": 0.2})
    assert [play.refused(play.describe) for play in (tiny, large)] == ["target", "target"]
    assert all(not play.ledger().releases() for play in (tiny, large))


@pytest.mark.parametrize("kept", [23, 20])
def test_a_cohort_that_shrank_since_the_plan_is_refused_and_nothing_is_spent(kept: int, play: Play) -> None:
    play.begin()
    play.train(1)
    whole = selftest.drawn_cohort(play.run)
    play.cohort = lambda: whole.subset(np.arange(kept))
    play.restart()
    spent = play.ledger().epsilon(1e-3)
    assert play.refused(lambda: play.train(2)) == "cohort_changed"
    assert play.refused(lambda: play.train(1)) == "cohort_changed"  # not even what was sent before
    assert play.ledger().epsilon(1e-3) == spent


def test_patients_who_come_after_the_plan_are_not_in_the_run(play: Play) -> None:
    whole = selftest.drawn_cohort(play.run)
    play.cohort = lambda: whole.subset(np.arange(1, len(whole)))
    play.begin()
    play.cohort = lambda: whole
    play.restart()
    assert play.train(1).num_examples == 15


def test_exact_sums_are_none_of_a_private_run_nor_noisy_ones_of_another(play: Play, tmp_path: Path) -> None:
    play.begin()
    assert play.refused(lambda: play.say(Statistics(play.name, np.ones(2), gram=False), PrivateSums)) == "malformed"
    exact = Play(tmp_path / "exact", {}, **BARE)
    exact.begin()
    assert exact.refused(lambda: exact.say(PrivateStatistics(exact.name, gram=False), PrivateSums)) == "malformed"
    assert not (exact.config.state / site_ledger.NAME).exists()


def test_sums_that_the_plan_has_not_are_refused(play: Play) -> None:
    play.begin()
    assert play.refused(lambda: play.say(PrivateStatistics(play.name, gram=True), PrivateSums)) == "budget"


def test_a_centre_is_noisy_and_paid_for(tmp_path: Path) -> None:
    play = Play(tmp_path, {}, privacy={"centre": True})
    play.begin()
    found: PrivateSums = play.say(PrivateStatistics(play.name, gram=False), PrivateSums)
    assert found.total.shape == (play.width,) and found.noise_multiplier == selftest.SIGMA
    assert np.linalg.norm(found.total) > 0.5 * selftest.SIGMA * np.sqrt(play.width)
    assert found.epsilon == pytest.approx(play.ledger().epsilon(selftest.DELTA))


def test_a_split_is_looked_at_as_often_as_the_run_needs_and_no_more(play: Play) -> None:
    play.begin()
    for shift in (0.0, 0.1, 0.1):
        play.evaluate("test", shift)
    assert play.refused(lambda: play.evaluate("test", 0.2)) == "cadence"
    assert play.refused(lambda: play.evaluate("train")) == "malformed"


def test_counts_under_noise_are_paid_for_by_the_patients_of_their_split(tmp_path: Path) -> None:
    wanted = {"privacy": {"histogram_epsilon": 1.0}, "evaluation": {"metrics": ("confusion", "histograms")}}
    play = Play(tmp_path, {}, **wanted)
    said = play.begin()
    assert not said.support.any()
    found = play.evaluate("test")
    assert not found.calibration.any() and not found.brier.any()
    entries = [entry.facts for entry in play.ledger().entries if entry.kind == "reserve"]
    assert [entry["purpose"] for entry in entries] == ["look-test"]
    assert play.ledger().releases() == ()  # training patients paid nothing


def test_weights_that_blow_an_image_up_end_in_no_error_that_would_tell(tmp_path: Path) -> None:
    wanted = {"privacy": {"histogram_epsilon": 1.0}, "evaluation": {"metrics": ("confusion", "histograms")}}
    play = Play(tmp_path, {}, **wanted)
    play.begin()
    play.weights = {**play.weights, "head.linear.weight": np.full_like(play.weights["head.linear.weight"], 3e38)}
    assert play.evaluate("test").confusion.shape == (2, 2)


def test_a_small_cell_hides_its_split(tmp_path: Path) -> None:
    play = Play(tmp_path, {"min_cell": 3})
    said = play.begin()
    assert not said.support[1:].any()
    assert not play.evaluate("test").confusion.any()
    assert Play(tmp_path / "b", {"min_cell": 2}).describe().support[1:].all()


def test_sizes_leave_rounded_and_exact_sums_not_at_all(tmp_path: Path) -> None:
    play = Play(tmp_path, {"round_counts": 1})
    assert play.begin().examples == 20 == play.train(1).num_examples
    exact = Play(
        tmp_path / "exact", {"round_counts": 1}, privacy={"noise_multiplier": None, "delta": None, "clip": None}
    )
    assert exact.refused(exact.describe) == "policy"


def test_a_site_with_a_budget_takes_no_run_without_privacy(tmp_path: Path) -> None:
    for number, policy in enumerate(({"max_epsilon": 3.0}, {"privacy": "required"})):
        play = Play(tmp_path / str(number), policy, **BARE)
        assert play.refused(play.describe) == "policy"
        assert play.events("decision")[-1]["allowed"] == 0
    Play(tmp_path / "2", {"max_epsilon": 3.0, "allow_exact": True}, **BARE).begin()


def test_a_run_waits_for_a_person_and_each_decision_is_in_the_trail(tmp_path: Path) -> None:
    play = Play(tmp_path, {"approval": True})
    assert play.refused(play.describe) == "approval"
    approval.approve(play.config, play.name[:8], "dpo")
    play.begin()
    play.train(1)
    approval.reject(play.config, play.name[:8], "dpo")
    assert play.refused(lambda: play.train(2)) == "policy"
    rules = [next(iter(facts["rule"])) for facts in play.events("decision")]
    assert rules == ["approval", "allowed", "rejected"]


def test_a_model_whose_patients_cannot_be_told_apart_is_refused_before_its_images_are_read(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    from client import clipping

    monkeypatch.setattr(clipping, "clip_factors", lambda norms, _clip: 0 * norms + 1)
    play.describe()
    play.say(InstallTrunk(play.name, play.run.model.trunk_sha256, np.frombuffer(play.trunk, np.uint8)), _done())
    assert play.refused(lambda: play.say(Prepare(play.name), _done())) == "not_private"
    assert not list((play.config.cache / "features").rglob("*.rows"))
    assert play.ledger().releases() == ()


@pytest.mark.parametrize("harm", ["cut", "changed", "older", "gone", "foreign"])
def test_a_ledger_that_was_tampered_with_stops_the_run(harm: str, play: Play) -> None:
    path = play.config.state / site_ledger.NAME
    play.begin()
    play.train(1)
    old = path.read_bytes(), Path(f"{path}.head").read_bytes()
    play.train(2)
    content = path.read_bytes()
    if harm == "cut":
        path.write_bytes(b"\n".join(content.split(b"\n")[:-3]) + b"\n")
    elif harm == "changed":
        path.write_bytes(content.replace(b'"purpose":"round-1"', b'"purpose":"round-9"'))
    elif harm == "older":  # ledger and head together: the audit trail knows better
        path.write_bytes(old[0])
        Path(f"{path}.head").write_bytes(old[1])
    elif harm == "gone":
        path.unlink()
        Path(f"{path}.head").unlink()
    else:
        (play.config.state / "secret").unlink()
        (play.config.state / "secret").write_bytes(bytes(32))
        (play.config.state / "secret").chmod(0o600)
    play.restart()
    assert play.refused(lambda: play.train(3)) == "ledger"
    assert play.refused(play.describe) == "ledger"


def test_nothing_of_a_private_run_can_be_asked_of_a_ledger_that_cannot_be_written(play: Play) -> None:
    path = play.config.state / site_ledger.NAME
    path.symlink_to(play.folder / "elsewhere")
    assert play.refused(play.describe) == "ledger"
    assert not (play.folder / "elsewhere").exists()


def test_a_run_that_is_over_leaves_no_replies_behind(play: Play) -> None:
    play.begin()
    play.train(1)
    assert list((play.config.state / "outbox").glob("*.reply"))
    play.say(Finish(play.name, "completed"), _done())
    assert not list((play.config.state / "outbox").glob("*.reply"))


def test_a_reply_waits_until_a_person_has_seen_every_tensor_of_it_and_let_it_go(tmp_path: Path) -> None:
    play = Play(tmp_path, {"review": True})
    seen: list[dict[str, Any]] = []

    def look(phase: str, _done: int, _total: int) -> None:
        if phase == "review":
            found = oversight.upcoming(play.config)
            assert found is not None
            seen.append(found)
            oversight.release(play.config, found["sha256"])

    play.progress = look
    play.begin()
    play.train(1)
    *_, shown = seen
    (weights,) = (array for array in shown["arrays"] if array["name"] == "weights")
    assert [part["name"] for part in weights["parts"]] == ["head.linear.bias", "head.linear.weight"]
    assert shown["bytes"] == len(play.content) and oversight.upcoming(play.config) is None
    assert len(play.events("released")) == len(seen)


def test_the_trail_holds_no_text(play: Play) -> None:
    play.begin()
    play.train(1)
    for entry in audit.read(play.config.audit):
        text = json.dumps(entry.facts)
        assert "north" not in text and str(play.folder) not in text

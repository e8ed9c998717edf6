"""A hospital's limits refuse a run as a whole; only the hospital learns which limit it was."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client import approval, policy
from client.cohort import Cohort
from client.policy import Facts, PolicyRefusal, check, check_hours, check_reply, enforce, facts_of, judge
from client.site_config import PolicySection, SiteConfig, SiteSection, SiteToml, hours_of
from common import certificates
from common.errors import SiteRefusal
from common.messages import REFUSALS
from common.run_config import RunConfig

TRUNK = "ab" * 32
AUTHORITY = ":".join(["CD"] * 32)
NIGHT = datetime(2026, 3, 1, 23, 30)
HELD = Facts(NIGHT, 100, 200, {"normal": 150, "effusion": 50}, AUTHORITY, "fl.example.org:9443")


def run(**sections: Any) -> RunConfig:
    values: dict[str, Any] = {
        "task": {"name": "chest", "labels": ["normal", "effusion"]},
        "model": {"backbone": "resnet18", "trunk_sha256": TRUNK},
        "training": {"strategy": "fedprox:0.1", "rounds": 20},
        "sites": {"names": ["a", "b", "c"]},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return RunConfig.model_validate(values)


def site(limits: PolicySection | None = None, folder: Path = Path("/nowhere")) -> SiteConfig:
    return SiteConfig(folder / "site.toml", SiteToml(site=SiteSection(name="a"), policy=limits or PolicySection()))


@pytest.mark.parametrize(
    "limits",
    [
        PolicySection(),
        PolicySection(
            tasks=("chest", "skin"), backbones=("resnet18",), strategies=("fedavg", "fedprox"), max_rounds=20
        ),
    ],
)
def test_a_run_within_the_limits_passes(limits: PolicySection) -> None:
    assert check(limits, run()) is None  # type: ignore[func-returns-value]  # nothing is clamped, so nothing comes back


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (PolicySection(tasks=("skin",)), "[policy] tasks: the run's task is 'chest', allowed skin"),
        (PolicySection(backbones=("vit",)), "[policy] backbones: the run's backbone is 'resnet18', allowed vit"),
        (PolicySection(strategies=("fedavg",)), "[policy] strategies: the run's strategy is 'fedprox', allowed fedavg"),
        (PolicySection(max_rounds=19), "[policy] max_rounds: the run has 20, allowed 19"),
    ],
)
def test_a_run_outside_of_a_limit_is_refused(limits: PolicySection, reason: str) -> None:
    with pytest.raises(PolicyRefusal) as raised:
        check(limits, run())
    assert raised.value.reason == reason
    assert isinstance(raised.value, SiteRefusal)
    assert str(raised.value) == raised.value.code == "policy"


PRIVATE = {"epsilon": 3.0, "delta": 1e-5}

# key of the policy, a value, changes of the run that it allows, changes that it refuses
RULES: tuple[tuple[str, Any, dict[str, Any], dict[str, Any]], ...] = (
    ("tasks", ("chest",), {}, {"task": {"name": "skin"}}),
    ("backbones", ("resnet18",), {}, {"model": {"backbone": "vit"}}),
    ("trunks", (TRUNK,), {}, {"model": {"trunk_sha256": "cd" * 32}}),
    ("trunks", (TRUNK,), {"model": {"trunk_sha256": TRUNK.upper()}}, {"model": {"trunk_sha256": ""}}),
    ("strategies", ("fedprox",), {}, {"training": {"strategy": "krum"}}),
    ("max_rounds", 20, {}, {"training": {"rounds": 21}}),
    ("min_sites", 3, {}, {"sites": {"names": ["a", "b"]}}),
    ("min_sites", 2, {"sites": {"quorum": 2}}, {"sites": {"quorum": 1}}),
    ("min_sites", 2, {}, {"sites": {"names": ["a", "a"]}}),
    ("min_sites", 2, {}, {"sites": {"names": []}}),
    ("privacy", "required", {"privacy": PRIVATE}, {}),
    ("max_epsilon", 3.0, {"privacy": PRIVATE}, {"privacy": {**PRIVATE, "epsilon": 3.1}}),
    ("max_epsilon", 3.0, {"privacy": {"noise_multiplier": 1.0}}, {}),
    ("max_epsilon", 3.0, {"privacy": PRIVATE}, {"privacy": {**PRIVATE, "histogram_epsilon": 4.0}}),
    ("max_delta", 1e-5, {"privacy": PRIVATE}, {"privacy": {**PRIVATE, "delta": 2e-5}}),
    ("max_delta", 1e-5, {}, {"privacy": {**PRIVATE, "delta": 2e-5}}),
    ("min_batch", 16, {"training": {"batch_size": 16}}, {"training": {"batch_size": 15}}),
    ("min_batch", 2, {"training": {"batch_size": 2}}, {"training": {"batch_size": 1}}),
    ("max_local_steps", 7, {"training": {"local_steps": 7}}, {"training": {"local_steps": 8}}),
    ("max_local_steps", 7, {}, {"training": {"local_epochs": 2}}),  # 200 examples, 32 a batch
    ("max_local_steps", 4, {"training": {"draw": "patients"}}, {}),  # 100 patients
    ("max_local_steps", 4, {"privacy": PRIVATE}, {}),  # private runs draw patients
    ("max_local_epochs", 2, {"training": {"local_epochs": 2}}, {"training": {"local_epochs": 3}}),
    ("max_local_epochs", 1, {}, {"training": {"local_steps": 8}}),
    ("max_local_epochs", 2, {"training": {"local_steps": 14}}, {"training": {"local_steps": 15}}),
)


@pytest.mark.parametrize(
    ("key", "value", "inside", "outside"), RULES, ids=[f"{k}-{rule[0]}" for k, rule in enumerate(RULES)]
)
def test_each_limit_on_runs(key: str, value: Any, inside: dict[str, Any], outside: dict[str, Any]) -> None:
    limits = site(PolicySection(**{key: value}))
    assert judge(limits, run(**inside), HELD) == policy.Decision(True, "allowed", "")
    decision = judge(limits, run(**outside), HELD)
    assert (decision.allowed, decision.rule) == (False, key)
    assert decision.reason.startswith(f"[policy] {key}: ")
    assert "\n" not in decision.reason


@pytest.mark.parametrize(
    ("key", "value", "inside", "outside"),
    [
        ("min_patients", 100, {}, {"patients": 99}),
        ("min_patients", 1, {}, {"patients": None}),
        ("min_per_label", 50, {}, {"per_label": {"normal": 150, "effusion": 49}}),
        ("min_per_label", 1, {}, {"per_label": {"normal": 150}}),
        ("min_per_label", 1, {}, {"per_label": None}),
        ("min_batch", 32, {}, {"patients": 31}),
        ("min_batch", 2, {}, {"patients": 1, "examples": 9}),
        ("min_batch", 2, {"patients": None}, {"patients": None, "examples": None}),
        ("max_local_steps", 7, {}, {"examples": None}),
        ("max_local_steps", 7, {}, {"examples": 225}),
        ("coordinators", (AUTHORITY,), {}, {"authority": ":".join(["CE"] * 32)}),
        ("coordinators", (AUTHORITY.replace(":", "").lower(),), {}, {"authority": ""}),
        ("coordinators", ("fl.example.org:9443",), {"authority": ""}, {"address": "fl.example.org:443"}),
        ("coordinators", ("FL.example.org:9443",), {}, {"authority": "", "address": ""}),
        ("hours", ("20:00-06:00",), {}, {"now": datetime(2026, 3, 1, 6, 0)}),
        ("hours", ("06:00-07:00", "23:00-24:00"), {}, {"now": datetime(2026, 3, 1, 0, 0)}),
    ],
)
def test_each_limit_on_what_the_site_holds(
    key: str, value: Any, inside: dict[str, Any], outside: dict[str, Any]
) -> None:
    def judged(changes: Mapping[str, Any]) -> policy.Decision:
        limits = PolicySection.model_validate({key: value})
        return judge(site(limits), run(), Facts(**{**vars(HELD), **changes}))

    assert judged(inside).allowed
    assert (judged(outside).allowed, judged(outside).rule) == (False, key)


def test_every_key_that_judges_runs_is_tried_above() -> None:
    known = {key for key, _ in (*policy.OF_THE_RUN, *policy.OF_THE_MOMENT, *policy.OF_THE_DATA)}
    elsewhere = {"closed", "allow_exact", "max_bytes_out", "min_cell", "round_counts", "approval", "review"}
    assert known | elsewhere == set(PolicySection.model_fields)


def test_limits_on_metrics_bear_on_what_a_run_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    few = site(PolicySection(metrics=("confusion",)))
    assert judge(few, run(), HELD).rule == "metrics"  # a run that names none sends all

    class Asking:
        metrics = ("confusion",)

    asking = run()
    object.__setattr__(asking, "__dict__", {**asking.__dict__, "evaluation": Asking()})
    assert judge(few, asking, HELD).allowed


def test_a_budget_takes_exact_runs_only_where_it_says_so() -> None:
    assert judge(site(PolicySection(max_epsilon=1, allow_exact=True)), run(), HELD).allowed
    refused = judge(site(PolicySection(max_epsilon=1)), run(), HELD)
    assert (refused.rule, "allow_exact = true" in refused.reason) == ("max_epsilon", True)


NAMED: dict[str, Any] = {
    "tasks": ("chest",),
    "backbones": ("resnet18",),
    "trunks": (TRUNK,),
    "strategies": ("fedprox",),
    "metrics": ("confusion", "histograms", "calibration", "losses"),
    "coordinators": ("fl.example.org:9443",),
}


@pytest.mark.parametrize("left_out", ["", *NAMED])
def test_a_closed_policy_allows_what_it_names_and_nothing_else(left_out: str) -> None:
    named = {key: value for key, value in NAMED.items() if key != left_out}
    decision = judge(site(PolicySection(closed=True, **named)), run(), HELD)
    assert decision.rule == (left_out or "allowed")


def test_before_the_data_are_open_only_what_can_be_known_is_asked(tmp_path: Path) -> None:
    limits = site(PolicySection(min_patients=1000, min_per_label=9, max_local_steps=1, approval=True), tmp_path)
    nothing = Facts(NIGHT)
    enforce(limits, run(), nothing, opened=False)
    assert not approval.pending(limits)
    for rule, changes in (("max_rounds", {"training": {"rounds": 99}}), ("tasks", {"task": {"name": "x"}})):
        narrow = site(PolicySection(max_rounds=20, tasks=("chest",)), tmp_path)
        assert judge(narrow, run(**changes), nothing, opened=False).rule == rule
    assert judge(limits, run(), nothing).rule == "min_patients"


def test_a_rule_that_fails_has_not_allowed_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    decision = judge(site(), run(), Facts(NIGHT, 100, 200, {}, "no fingerprint", ""))
    assert (decision.allowed, decision.rule) == (False, "unjudged")
    assert decision.reason == "[policy] coordinators: cannot be judged (ValueError)"
    for rules in ("OF_THE_RUN", "OF_THE_DATA"):
        with monkeypatch.context() as patch:
            patch.setattr(policy, rules, (("max_rounds", lambda *_: 1 // 0),))
            assert judge(site(), run(), HELD).rule == "unjudged"


# Each key with values from lax to strict
LADDERS: dict[str, tuple[Any, ...]] = {
    "tasks": ((), ("chest", "skin"), ("skin",)),
    "trunks": ((), (TRUNK,), ("cd" * 32,)),
    "strategies": ((), ("fedprox", "fedavg"), ("fedavg",)),
    "metrics": ((), ("confusion",)),
    "coordinators": ((), ("fl.example.org:9443",), ("other:1",)),
    "max_rounds": (None, 30, 20, 10),
    "max_local_steps": (None, 100, 7, 1),
    "max_local_epochs": (None, 3, 1),
    "min_patients": (0, 100, 101),
    "min_per_label": (0, 50, 60),
    "min_batch": (2, 32, 64),
    "min_sites": (1, 3, 4),
    "max_epsilon": (None, 8.0, 1.0),
    "max_delta": (None, 1e-4, 1e-6),
    "hours": ((), ("20:00-06:00",), ("08:00-09:00",)),
}
STRICTER = st.fixed_dictionaries({key: st.integers(0, len(values) - 1) for key, values in LADDERS.items()})
RUNS = st.builds(
    lambda rounds, steps, private, quorum: run(
        training={"rounds": rounds, "local_steps": steps},
        privacy={"epsilon": 3.0, "delta": 1e-5} if private else {},
        sites={"quorum": quorum},
    ),
    st.sampled_from([5, 20, 25]),
    st.sampled_from([None, 1, 50]),
    st.booleans(),
    st.sampled_from([None, 1, 3]),
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(STRICTER, STRICTER, RUNS)
def test_more_limits_never_allow_what_fewer_refuse(
    one: dict[str, int], other: dict[str, int], asked: RunConfig
) -> None:
    def allows(places: Mapping[str, int], closed: bool) -> bool:
        values = {key: LADDERS[key][place] for key, place in places.items()}
        return judge(site(PolicySection.model_validate({**values, "closed": closed})), asked, HELD).allowed

    both = {key: max(one[key], other[key]) for key in LADDERS}
    assert allows(one, False) or not allows(both, False)
    assert allows(both, False) or not allows(both, True)


@given(st.integers(0, 1439), st.integers(0, 1439), st.integers(0, 1439))
def test_hours_across_midnight(start: int, end: int, at: int) -> None:
    if start == end:
        return
    span = f"{start // 60:02d}:{start % 60:02d}-{end // 60:02d}:{end % 60:02d}"
    assert hours_of(span) == (start, end)
    inside = (at - start) % 1440 < (end - start) % 1440
    moment = datetime(2026, 5, 4, at // 60, at % 60, 59)
    assert judge(site(PolicySection(hours=(span,))), run(), Facts(**{**vars(HELD), "now": moment})).allowed == inside


def test_hours_are_those_of_the_wall_clock() -> None:
    limits = PolicySection(hours=("20:00-06:00",))
    check_hours(limits, NIGHT)
    check_hours(limits, NIGHT.astimezone(UTC))  # the same moment, said in another zone
    with pytest.raises(PolicyRefusal) as raised:
        check_hours(limits, datetime(2026, 3, 1, 12, 5))
    assert (raised.value.rule, raised.value.reason) == ("hours", "[policy] hours: it is 12:05, allowed 20:00-06:00")


def test_a_reply_may_be_too_large() -> None:
    check_reply(PolicySection(), 10**12)
    check_reply(PolicySection(max_bytes_out=100), 100)
    with pytest.raises(PolicyRefusal) as raised:
        check_reply(PolicySection(max_bytes_out=100), 101)
    assert raised.value.rule == "max_bytes_out"


def test_a_person_comes_last(tmp_path: Path) -> None:
    config = site(PolicySection(approval=True, max_rounds=20), tmp_path)
    (tmp_path / "state").mkdir()
    with pytest.raises(PolicyRefusal) as raised:
        enforce(config, run(training={"rounds": 21}), HELD)
    assert (raised.value.rule, approval.pending(config)) == ("max_rounds", ())  # nobody is asked about it
    with pytest.raises(PolicyRefusal) as raised:
        enforce(config, run(), HELD)
    assert (raised.value.rule, raised.value.code) == ("approval", "approval")
    assert raised.value.code in REFUSALS
    (asked,) = approval.pending(config)
    assert asked["site"] == {"patients": 100, "examples": 200, "labels": {"normal": 150, "effusion": 50}}
    approval.approve(config, run().fingerprint(), "anna")
    enforce(config, run(), HELD)
    with pytest.raises(PolicyRefusal):
        enforce(config, run(seed=1), HELD)  # another run
    approval.reject(config, run().fingerprint(), "anna")
    for limits in (config, site(folder=tmp_path)):  # a rejection stays, whatever the policy says later
        with pytest.raises(PolicyRefusal) as raised:
            enforce(limits, run(), HELD, opened=False)
        assert (raised.value.rule, raised.value.code) == ("rejected", "policy")


def test_decisions_that_cannot_be_read_refuse(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "approvals.json").write_text("[{")
    decision = judge(site(folder=tmp_path), run(), HELD)
    assert (decision.allowed, decision.rule) == (False, "unjudged")


def test_what_is_known_at_a_site(tmp_path: Path) -> None:
    cohort = Cohort(
        source=lambda rows: np.zeros((len(rows), 1, 16, 16), np.uint8),
        rows=np.arange(5),
        digests=np.zeros((5, 32), np.uint8),
        labels=np.array([0, 0, 1, 1, 1]),
        splits=np.array([0, 0, 0, 1, 2], np.int8),
        patients=np.array([7, 7, 8, 9, 9]),
        label_names=("normal", "effusion"),
        preprocessing="x",
    )
    config = site(folder=tmp_path)
    assert facts_of(config, None, NIGHT) == Facts(NIGHT)
    found = facts_of(config, cohort, NIGHT)
    assert (found.patients, found.examples, found.per_label) == (2, 3, {"normal": 2, "effusion": 1})
    (tmp_path / "link").mkdir()
    certificates.make_key(tmp_path / "ca.key")
    (tmp_path / "link/ca.pem").write_bytes(certificates.make_ca(tmp_path / "ca.key", "theirs"))
    ours = facts_of(config, None, NIGHT).authority
    assert ours == certificates.describe(certificates.read_certificates(tmp_path / "link/ca.pem")[0]).fingerprint
    assert judge(site(PolicySection(coordinators=(ours,))), run(), Facts(**{**vars(HELD), "authority": ours})).allowed
    (tmp_path / "link/ca.pem").write_bytes(b"\xff")
    assert facts_of(config, None, NIGHT).authority == ""
    several = facts_of(
        config, Cohort(**{**vars(cohort), "labels": np.float32([[1, 0], [1, 1], [0, 0.5], [1, 1], [1, 1]])})
    )
    assert several.per_label == {"normal": 2, "effusion": 1}


def test_what_a_coordinator_writes_breaks_no_line_of_the_log() -> None:
    with pytest.raises(PolicyRefusal) as raised:
        check(PolicySection(tasks=("skin",)), run(task={"name": "a\n\x1b[31m" + "x" * 9000}))
    assert raised.value.reason.isprintable()
    assert len(raised.value.reason) < 400

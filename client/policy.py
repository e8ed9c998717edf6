"""What a hospital lets a coordinator ask: a run outside of its limits is refused as a whole, never made smaller.

The coordinator learns that the policy said no, and nothing else; the site's own log says which limit it was. A limit
that is absent allows any, unless the policy is `closed`; a limit that is there and cannot be judged, because something
that it needs is not known, refuses. The rules are three tables, in the order in which they are asked:

- of the run: `run.toml` alone decides;
- of the moment: who asks, and when;
- of the data: what the site holds decides, so they wait until its cohort is open.

Last comes a person, where the policy wants one. What a run costs of the budget of privacy is the ledger's to judge,
for it alone knows of the other runs; `max_epsilon` and `max_delta` here refuse what no ledger could allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from client import approval
from client.site_config import PolicySection, SiteConfig, hours_of, known_coordinator
from common.errors import SiteRefusal
from common.run_config import RunConfig

if TYPE_CHECKING:
    from client.cohort import Cohort

ALLOWED, UNJUDGED, REJECTED = "allowed", "unjudged", "rejected"
"""What decided where it was no key of the policy: nothing spoke against it; a rule failed; a person said no."""

_SHOWN = 200  # characters of what a coordinator wrote, in a reason


class PolicyRefusal(SiteRefusal):
    """A run is outside of a site's limits, or waits for a person at the site.

    Args:
        reason: one line for the site's own log; it never leaves the site.
        rule: what decided, a key of the policy or one of this module's words.
    """

    def __init__(self, reason: str, rule: str = "") -> None:
        super().__init__("approval" if rule == "approval" else "policy")
        self.reason = reason
        self.rule = rule


@dataclass(frozen=True)
class Facts:
    """What is judged by besides policy and run; None, or an empty text: not known."""

    now: datetime  # naive: local time
    patients: int | None = None  # in the training split
    examples: int | None = None  # in the training split
    per_label: Mapping[str, int] | None = None  # label -> training examples that have it
    authority: str = ""  # fingerprint of the certificate of the coordinator's authority
    address: str = ""  # of the coordinator, host:port


@dataclass(frozen=True)
class Decision:
    """What the policy says to a run."""

    allowed: bool
    rule: str  # the key that decided, or ALLOWED, UNJUDGED, REJECTED
    reason: str  # one line for the site's own log; empty where it is allowed


Rule = Callable[[PolicySection, RunConfig, Facts], str | None]
"""Returns why a run is refused, or None."""


def judge(config: SiteConfig, run: RunConfig, facts: Facts, *, opened: bool = True) -> Decision:
    """Return what the hospital's policy says to a run: the first limit that it is outside of decides.

    Args:
        config: the site.
        run: what is asked for.
        facts: what is judged by.
        opened: whether the site's cohort is open; if not, the rules of the data, and the person, are left for later.
    """
    rules = (*OF_THE_RUN, *OF_THE_MOMENT, *(OF_THE_DATA if opened else ()))
    decision = _first(rules, config.toml.policy, run, facts)
    return decision if not decision.allowed else _person(config, run, opened)


def enforce(config: SiteConfig, run: RunConfig, facts: Facts, *, opened: bool = True) -> None:
    """Refuse a run that the policy does not allow; one that waits for a person only is written down for that person.

    Raises:
        PolicyRefusal: with the rule that decided; its code is `approval` where only that is missing, else `policy`.
        ConsiliumError: what waits cannot be written down.
    """
    decision = judge(config, run, facts, opened=opened)
    if decision.rule == "approval":
        approval.waiting(config, run, _held(facts))
    if not decision.allowed:
        raise PolicyRefusal(decision.reason, decision.rule)


def check(policy: PolicySection, run: RunConfig) -> None:
    """Refuse a run that is outside of the limits on runs, whoever asks and whatever the site holds.

    Raises:
        PolicyRefusal: the first limit that it is outside of.
    """
    decision = _first(OF_THE_RUN, policy, run, Facts(datetime.now()))
    if not decision.allowed:
        raise PolicyRefusal(decision.reason, decision.rule)


def check_hours(policy: PolicySection, now: datetime) -> None:
    """Refuse new work outside of the site's hours.

    Raises:
        PolicyRefusal: it is outside.
    """
    reason = _outside(policy, now)
    if reason:
        raise PolicyRefusal(f"[policy] hours: {reason}", "hours")


def check_reply(policy: PolicySection, nbytes: int) -> None:
    """Refuse to send a reply that is too large.

    Raises:
        PolicyRefusal: it is.
    """
    if policy.max_bytes_out is not None and nbytes > policy.max_bytes_out:
        reason = f"[policy] max_bytes_out: a reply has {nbytes} bytes, allowed {policy.max_bytes_out}"
        raise PolicyRefusal(reason, "max_bytes_out")


def facts_of(config: SiteConfig, cohort: Cohort | None, now: datetime | None = None) -> Facts:
    """Return what is known at a site; of its data only once its cohort, with the labels of the run, is open."""
    moment = now or datetime.now()
    address, authority = config.toml.coordinator.address, _authority(config)
    if cohort is None:
        return Facts(moment, authority=authority, address=address)
    train = cohort.indices("train")
    counts = cohort.support("train")  # (K,), or (4, K) of which the first row are those that have the label
    having = counts if counts.ndim == 1 else counts[0]
    per_label = dict(zip(cohort.label_names, map(int, having), strict=True))
    patients = len(set(cohort.patients[train].tolist()))
    return Facts(moment, patients, len(train), per_label, authority, address)


# --------------------------------------------------------------------------------------------------------- of the run


def _task(policy: PolicySection, run: RunConfig, _: Facts) -> str | None:
    return _among(policy, policy.tasks, "task", run.task.name)


def _backbone(policy: PolicySection, run: RunConfig, _: Facts) -> str | None:
    return _among(policy, policy.backbones, "backbone", run.model.backbone)


def _trunk(policy: PolicySection, run: RunConfig, _: Facts) -> str | None:
    return _among(policy, policy.trunks, "trunk", run.model.trunk_sha256.lower())


def _strategy(policy: PolicySection, run: RunConfig, _: Facts) -> str | None:
    return _among(policy, policy.strategies, "strategy", run.training.rule.kind)


def _metrics(policy: PolicySection, run: RunConfig, _: Facts) -> str | None:
    refused = (_among(policy, policy.metrics, "evaluation", name) for name in run.evaluation.metrics)
    return next((reason for reason in refused if reason), None)


def _rounds(policy: PolicySection, run: RunConfig, _: Facts) -> str | None:
    return _at_most(policy.max_rounds, run.training.rounds, "the run has")


def _sites(policy: PolicySection, run: RunConfig, _: Facts) -> str | None:
    named = len(set(run.sites.names))
    if policy.min_sites > 1 and named < policy.min_sites:
        return f"the run names {named} sites, needed {policy.min_sites}"
    quorum = named if run.sites.quorum is None else run.sites.quorum
    if policy.min_sites > 1 and quorum < policy.min_sites:
        return f"a round of the run needs {quorum} sites only, needed {policy.min_sites}"
    return None


def _private(policy: PolicySection, run: RunConfig, _: Facts) -> str | None:
    if policy.privacy == "required" and not run.privacy.on:
        return "the run has no differential privacy, and it is required"
    return None


def _epsilon(policy: PolicySection, run: RunConfig, _: Facts) -> str | None:
    """Judge what a run asks for by itself; what is left of the budget is the ledger's to judge."""
    if policy.max_epsilon is None:
        return None
    if not run.privacy.on:
        exact = "the run has no differential privacy, and the site has a budget; allow_exact = true would take it"
        return None if policy.allow_exact else exact
    asked = max(run.privacy.epsilon or 0.0, run.privacy.histogram_epsilon or 0.0)
    if asked > policy.max_epsilon:
        return f"the run asks for {asked:g}, allowed {policy.max_epsilon:g} for all runs together"
    return None


def _delta(policy: PolicySection, run: RunConfig, _: Facts) -> str | None:
    asked = run.privacy.delta
    if policy.max_delta is not None and asked is not None and asked > policy.max_delta:
        return f"the run asks for {asked:g}, allowed {policy.max_delta:g} for all runs together"
    return None


def _counts(policy: PolicySection, run: RunConfig, _: Facts) -> str | None:
    if policy.round_counts is None or run.privacy.on:
        return None
    return "a run without privacy takes sums over all patients, which tell their exact number"


def _batch(policy: PolicySection, run: RunConfig, _: Facts) -> str | None:
    return _at_least(policy.min_batch, run.training.batch_size, "the run's batches are of")


def _given_steps(policy: PolicySection, run: RunConfig, _: Facts) -> str | None:
    return _at_most(policy.max_local_steps, run.training.local_steps or 0, "the run has")


def _given_epochs(policy: PolicySection, run: RunConfig, _: Facts) -> str | None:
    epochs = run.training.local_epochs or (0 if run.training.local_steps else 1)
    return _at_most(policy.max_local_epochs, epochs, "the run has")


# ------------------------------------------------------------------------------------------------------ of the moment


def _coordinator(policy: PolicySection, _: RunConfig, facts: Facts) -> str | None:
    """Judge whom this site has joined, by either way in which it may be named."""
    ours = [known_coordinator(text) for text in (facts.authority, facts.address) if text]
    if any(text in policy.coordinators for text in ours):
        return None
    return _among(policy, policy.coordinators, "coordinator", " or ".join(reversed(ours)) or "not known")


def _hours(policy: PolicySection, _: RunConfig, facts: Facts) -> str | None:
    return _outside(policy, facts.now)


# -------------------------------------------------------------------------------------------------------- of the data


def _patients(policy: PolicySection, _: RunConfig, facts: Facts) -> str | None:
    if not policy.min_patients:
        return None
    return _at_least(policy.min_patients, facts.patients, "the site trains on the patients of")


def _per_label(policy: PolicySection, run: RunConfig, facts: Facts) -> str | None:
    """Judge every label of the run: one that the site has nothing of counts as none."""
    if not policy.min_per_label:
        return None
    if facts.per_label is None:
        return _unknown("how many training examples each label has")
    counts = {name: facts.per_label.get(name, 0) for name in run.task.labels or facts.per_label}
    few = next((name for name, count in counts.items() if count < policy.min_per_label), None)
    return None if few is None else f"of {_shown(few)} the site has {counts[few]}, needed {policy.min_per_label}"


def _real_batch(policy: PolicySection, run: RunConfig, facts: Facts) -> str | None:
    """Judge the batches of a site that has less than a batch."""
    if facts.examples is None and facts.patients is None:
        return _unknown("how many examples the site trains on")
    most = min(count for count in (facts.examples, facts.patients) if count is not None)
    return _at_least(policy.min_batch, min(most, run.training.batch_size), "the site's batches would be of")


def _steps(policy: PolicySection, run: RunConfig, facts: Facts) -> str | None:
    """Judge the steps of a round that is given as passes, as `client.training.steps_per_round` counts them."""
    if policy.max_local_steps is None or run.training.local_steps is not None:
        return None
    drawn = _drawn(run, facts)
    if drawn is None:
        return _unknown("how many examples a pass visits")
    steps = (run.training.local_epochs or 1) * math.ceil(drawn / run.training.batch_size)
    return _at_most(policy.max_local_steps, steps, "at this site a round of the run has")


def _epochs(policy: PolicySection, run: RunConfig, facts: Facts) -> str | None:
    """Judge the passes of a round that is given as steps."""
    if policy.max_local_epochs is None or run.training.local_steps is None:
        return None
    drawn = _drawn(run, facts)
    if drawn is None:
        return _unknown("how many examples a pass visits")
    passes = run.training.local_steps / math.ceil(drawn / run.training.batch_size) if drawn else 0
    return _at_most(policy.max_local_epochs, passes, "at this site a round of the run has")


OF_THE_RUN: tuple[tuple[str, Rule], ...] = (
    ("tasks", _task),
    ("backbones", _backbone),
    ("trunks", _trunk),
    ("strategies", _strategy),
    ("metrics", _metrics),
    ("max_rounds", _rounds),
    ("min_sites", _sites),
    ("privacy", _private),
    ("max_epsilon", _epsilon),
    ("max_delta", _delta),
    ("round_counts", _counts),
    ("min_batch", _batch),
    ("max_local_steps", _given_steps),
    ("max_local_epochs", _given_epochs),
)
OF_THE_MOMENT: tuple[tuple[str, Rule], ...] = (
    ("coordinators", _coordinator),
    ("hours", _hours),
)
OF_THE_DATA: tuple[tuple[str, Rule], ...] = (
    ("min_patients", _patients),
    ("min_per_label", _per_label),
    ("min_batch", _real_batch),
    ("max_local_steps", _steps),
    ("max_local_epochs", _epochs),
)


# ------------------------------------------------------------------------------------------------------------ judging


def _first(rules: Sequence[tuple[str, Rule]], policy: PolicySection, run: RunConfig, facts: Facts) -> Decision:
    for key, rule in rules:
        try:
            reason = rule(policy, run, facts)
        except Exception as error:  # noqa: BLE001  a rule that fails has not allowed anything
            return Decision(False, UNJUDGED, f"[policy] {key}: cannot be judged ({type(error).__name__})")
        if reason:
            return Decision(False, key, f"[policy] {key}: {reason}")
    return Decision(True, ALLOWED, "")


def _person(config: SiteConfig, run: RunConfig, opened: bool) -> Decision:
    """Return what the people of the site said to a run that nothing else speaks against."""
    fingerprint = run.fingerprint()
    try:
        said = approval.decided(config, fingerprint)
    except Exception as error:  # noqa: BLE001  as above
        return Decision(False, UNJUDGED, f"[policy] approval: cannot be judged ({_shown(str(error))})")
    if said is not None and not said.approved:
        return Decision(False, REJECTED, f"[policy] approval: {said.who} rejected run {fingerprint} on {said.time}")
    if config.toml.policy.approval and said is None and opened:
        remedy = f"consilium site approve {fingerprint[:12]} --site {config.path}"
        return Decision(False, "approval", f"[policy] approval: nobody has approved run {fingerprint} yet: {remedy}")
    return Decision(True, ALLOWED, "")


def _among(policy: PolicySection, allowed: tuple[str, ...], what: str, got: str) -> str | None:
    if got in allowed or not (allowed or policy.closed):
        return None
    known = ", ".join(allowed) or "none: the policy is closed, and names none"
    return f"the run's {what} is {_shown(got)}, allowed {known}"


def _at_most(limit: int | None, got: float, what: str) -> str | None:
    shown = str(got) if isinstance(got, int) else f"{got:.6g}"
    return f"{what} {shown}, allowed {limit}" if limit is not None and got > limit else None


def _at_least(limit: int, got: int | None, what: str) -> str | None:
    if got is None:
        return _unknown(f"{what} how many")
    return f"{what} {got}, needed {limit}" if got < limit else None


def _unknown(what: str) -> str:
    return f"it is not known here: {what}"


def _drawn(run: RunConfig, facts: Facts) -> int | None:
    """Return what one pass of a run visits."""
    by_patient = run.training.draw == "patients" or run.privacy.on
    return facts.patients if by_patient else facts.examples


def _outside(policy: PolicySection, now: datetime) -> str | None:
    local = now.astimezone() if now.tzinfo else now
    minute = local.hour * 60 + local.minute
    if not policy.hours or any(_within(minute, *hours_of(span)) for span in policy.hours):
        return None
    return f"it is {local:%H:%M}, allowed {', '.join(policy.hours)}"


def _within(minute: int, start: int, end: int) -> bool:
    return start <= minute < end if start < end else minute >= start or minute < end


def _authority(config: SiteConfig) -> str:
    """Return the fingerprint of the authority that this site trusts; empty where it cannot be read."""
    from common import certificates

    try:
        return certificates.fingerprint(certificates.parse_authority(config.ca_certificate.read_text("ascii")))
    except (OSError, ValueError):  # where the link has a user of its own, its folder is closed to this one
        return ""


def _held(facts: Facts) -> dict[str, object]:
    """Return what a person who is to approve a run should know of the site's part in it."""
    return {"patients": facts.patients, "examples": facts.examples, "labels": dict(facts.per_label or {})}


def _shown(text: str) -> str:
    return repr(text[:_SHOWN])

"""What it means that a site did not contribute, in words for whoever coordinates: what happened, and what to do.

Sites and the engine speak in codes of closed lists; here each has its sentence. None of it comes from a site as text.
"""

from __future__ import annotations

from collections.abc import Mapping

WORDS: Mapping[str, str] = {
    # refusals: `common.messages.REFUSALS`
    "malformed": "it could not read the request; install the same version of consilium at both ends",
    "unknown_run": "it no longer knows the run; nothing: before the next round it is described to it again",
    "unknown_trunk": "the frozen part of the backbone did not reach it whole; nothing: it is sent again",
    "not_prepared": "its features are not ready; nothing: it is prepared again before the next round",
    "labels_differ": "it has labels that the run has not, or of another kind; make [task] labels and kind of run.toml "
    "and its own labels agree",
    "preprocessing_differs": "it shows its images in another way; make [data] preset and image_size of run.toml and of "
    "its site.toml agree",
    "version_differs": "it runs another version of consilium; install the same version at both ends",
    "policy": "its own policy does not allow the run; its log says which limit: change the run, or ask the hospital",
    "approval": "somebody there has to approve the run first; ask the hospital to look at `consilium site approve`",
    "not_private": "its upper cannot be trained with differential privacy; train the head alone (--trainable head)",
    "target": "no noise reaches the run's epsilon with as few patients as it has, or [privacy] delta is above 1 in its "
    "patients; raise epsilon, leave delta out, or leave the site out",
    "budget": "its budget of privacy does not cover the run; ask the hospital what is left, and ask for less: fewer "
    "rounds, or a smaller epsilon",
    "cohort_changed": "patients came or went there since the run's privacy was planned; go on without it, or start "
    "another run",
    "ledger": "its ledger of spent privacy cannot be used; ask the hospital to look at `consilium site ledger`",
    "cadence": "it was asked to evaluate more often than the run needs; install the same version at both ends",
    "busy": "it is in another run; wait for the end of that one, or let the hospital end it",
    "no_cohort": "its data cannot be used; its own log and `consilium site check` say why: ask the hospital",
    "unknown_ticket": "it was started anew in the middle of its work; resume the run",
    "unavailable": "its link is connected, but its daemon does not answer; ask the hospital to look at "
    "`consilium site status`",
    "no_room": "its disk is full; ask the hospital to make room",
    "internal": "it failed; its own log says why: ask the hospital",
    # losses: `server.federation`
    "absent": "it is not connected; ask the hospital to look at `consilium site status`, or raise [sites] patience_s",
    "deadline": "its answer did not come in time; raise [sites] deadline_s, or ask the hospital what keeps it",
    "unreachable": "its answer was lost on the way; resume the run",
    # what was not believed: `server.admission.REASONS`, and an answer in another's name
    "identity": "it calls itself by another name than it is enrolled under; ask the hospital to join anew",
    "unreadable": "its answer cannot be read; install the same version of consilium at both ends",
    "too_large": "its answer is larger than any that the run asks for; install the same version at both ends",
    "wrong_shape": "its update has another shape than the run's; install the same version of consilium at both ends",
    "not_finite": "its update holds values that are no numbers; lower [training] lr, or look at its data with it",
    "norm_too_large": "its update is out of proportion to the others', or larger than [sites] max_norm; raise the "
    "limit, or look at its data with it",
    "wrong_round": "it answered a request of an earlier round; install the same version of consilium at both ends",
    "examples_differ": "it trained on another number of images than it declared; resume the run, which counts again",
    "bad_statistics": "its counts contradict each other or what it declared; resume the run, which counts again",
}
"""Every code that can stand in a site's status, with what it means and what to do about it."""


def explain(status: str) -> str:
    """Return a site's status in words; an empty text where nothing is wrong with it.

    Examples:
        >>> explain("lost(unreachable)")
        'lost: its answer was lost on the way; resume the run'
        >>> explain("contributed")
        ''
    """
    kind, _, code = status.rstrip(")").partition("(")
    return f"{kind}: {WORDS.get(code, code)}" if code else ""


def troubles(statuses: Mapping[str, str]) -> dict[str, str]:
    """Return what is wrong in words, by site, of those with which something is."""
    explained = {site: explain(status) for site, status in sorted(statuses.items())}
    return {site: text for site, text in explained.items() if text}


def quorum_missed(phase: str, usable: int, quorum: int, statuses: Mapping[str, str]) -> str:
    """Return in one line which sites were missed and why.

    Args:
        phase: of the run.
        usable: how many sites gave a usable answer.
        quorum: how many had to.
        statuses: of all sites of the run.

    Examples:
        >>> quorum_missed("round 2", 1, 2, {"north": "contributed", "south": "lost(unreachable)"})[:68]
        'round 2: 1 of 2 sites gave a usable answer, the quorum is 2; south: '
    """
    head = f"{phase}: {usable} of {len(statuses)} sites gave a usable answer, the quorum is {quorum}"
    reasons = [f"{site}: {text}" for site, text in troubles(statuses).items()]
    shown = [*reasons[:MOST], *([f"and {len(reasons) - MOST} more sites"] if len(reasons) > MOST else [])]
    return "; ".join(
        [head, *shown, "then go on with it (--resume, `consilium server resume`), or start one with a lower --quorum"]
    )


MOST = 5
"""Sites that one line explains; the result has them all."""

"""What a site's refusal means to the people who look after it; what it gets over by itself is not spoken of."""

from __future__ import annotations

REFUSED = {
    "malformed": (
        "a request could not be read",
        "Compare `consilium --version` here and at the coordinator.",
    ),
    "labels_differ": (
        "the site's labels are not those of the run",
        "Compare the labels in check.html with the run's; [data] words translates local ones.",
    ),
    "preprocessing_differs": (
        "the site's images are not prepared as the run wants them",
        "Set [data] preset and image_size as the coordinator says, then run consilium site check.",
    ),
    "version_differs": (
        "the two ends run different versions",
        "Install the coordinator's version here, or ask it to install this one; restart daemon and link.",
    ),
    "policy": (
        "the site's own policy does not allow the run",
        "daemon.log in the site's state says which line of [policy]; change it, or tell the coordinator.",
    ),
    "approval": (
        "a run waits for a person",
        "Look at it with consilium site approve, then allow it with its fingerprint, or reject it.",
    ),
    "not_private": (
        "the run's model cannot be trained with differential privacy",
        "daemon.log in the site's state says which part of it; tell the coordinator, who can take --trainable head.",
    ),
    "target": (
        "no noise reaches the run's epsilon with this site's patients, or its delta is too large for them",
        "daemon.log in the site's state has the numbers; tell the coordinator.",
    ),
    "budget": (
        "the site's budget of privacy does not cover the run",
        "consilium site ledger says what is left; [policy] max_epsilon and max_delta are the hospital's to change.",
    ),
    "cohort_changed": (
        "patients came or went since the run's privacy was planned",
        "The run goes on without this site; ask the coordinator for a new one.",
    ),
    "ledger": (
        "the ledger of spent privacy cannot be used",
        "consilium site ledger says what is wrong with it. Never delete it: what was spent would be forgotten.",
    ),
    "cadence": (
        "an evaluation was asked for that the run does not need",
        "Nothing; if it comes again, ask the coordinator why.",
    ),
    "busy": (
        "the site was in another run",
        "Nothing; if the other run is over, ask the coordinator to end it.",
    ),
    "no_cohort": (
        "the site's data cannot be used",
        "Run consilium site check.",
    ),
    "no_room": (
        "the disk of the site's state is full",
        "Make room; what waited goes on by itself, and a run that went on without the site takes it in again.",
    ),
    "internal": (
        "the site failed",
        "Look at the end of daemon.log in the site's state, and report it.",
    ),
}
"""Code of a refusal -> what happened, and what to do."""

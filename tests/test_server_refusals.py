from __future__ import annotations

from typing import get_args

import pytest

from common.messages import REFUSALS
from server import refusals
from server.admission import REASONS
from server.federation import Status

LOSSES = {"absent", "deadline", "unreachable", "identity"}  # of `server.federation`


def test_every_code_has_its_sentence_and_no_sentence_is_without_a_code() -> None:
    assert set(refusals.WORDS) == {*REFUSALS, *REASONS, *LOSSES}
    assert len(set(refusals.WORDS.values())) == len(refusals.WORDS)


@pytest.mark.parametrize("code", sorted(refusals.WORDS))
def test_a_sentence_says_what_is_and_what_to_do(code: str) -> None:
    what, _, remedy = refusals.WORDS[code].partition("; ")
    assert what and remedy
    assert "\n" not in refusals.WORDS[code] and not refusals.WORDS[code].endswith(".")


@pytest.mark.parametrize("kind", sorted(set(get_args(Status)) - {"contributed"}))
def test_a_status_keeps_its_kind(kind: str) -> None:
    assert refusals.explain(f"{kind}(policy)").startswith(f"{kind}: its own policy")
    assert refusals.explain(f"{kind}(new_code)") == f"{kind}: new_code"  # of a version that knows more


def test_who_is_well_has_no_trouble() -> None:
    statuses = {"b": "registered", "a": "refused(busy)", "c": "contributed", "d": "", "e": "preparing"}
    assert list(refusals.troubles(statuses)) == ["a"]


def test_one_line_names_the_first_sites_and_counts_the_rest() -> None:
    statuses = {f"s{number}": "lost(absent)" for number in range(9)} | {"well": "registered"}
    text = refusals.quorum_missed("setup", 1, 10, statuses)
    assert text.startswith(
        "setup: 1 of 10 sites gave a usable answer, the quorum is 10; s0: lost: it is not connected; "
    )
    assert "s4: " in text and "s5" not in text and "; and 4 more sites; " in text and "\n" not in text

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from client.identity import Identity, is_placeholder, loosely, tidy

SITE, OTHER = Identity(b"s" * 32), Identity(b"t" * 32)


@given(st.text(), st.text())
def test_a_patient_is_named_by_issuer_and_id_under_the_sites_secret(issuer: str, patient: str) -> None:
    assert SITE.patient(issuer, patient) == SITE.patient(f" {issuer}\0", f"{patient}  ")
    assert SITE.patient(issuer, patient) != OTHER.patient(issuer, patient)
    assert len(SITE.patient(issuer, patient)) == 32


def test_two_issuers_make_two_patients_and_one_person() -> None:
    assert SITE.patient("A", "7") != SITE.patient("B", "7")
    assert SITE.person("007 ") == SITE.person("7")


@given(st.text())
def test_tidying_and_loosening_are_idempotent(text: str) -> None:
    assert tidy(tidy(text)) == tidy(text)
    assert loosely(loosely(text)) == loosely(text) or "0" in text


def test_placeholders_stand_for_nobody() -> None:
    assert all(is_placeholder(text) for text in ("", " ", "0", "0000", "anonymous", "N/A", "Unknown", "\0"))
    assert not any(is_placeholder(text) for text in ("1", "PAT0", "Anonymous 12"))


def test_kinds_of_key_do_not_collide() -> None:
    assert SITE.key("StudyInstanceUID", "1.2") != SITE.key("SeriesInstanceUID", "1.2")
    assert SITE.key("AccessionNumber", "1") != SITE.loose_key("AccessionNumber", "1")


def test_a_representation_shows_no_secret() -> None:
    assert "ssss" not in repr(SITE)

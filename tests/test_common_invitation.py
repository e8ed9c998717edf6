"""The two documents: exact, small, signed; what others may put into them is one line."""

from __future__ import annotations

import importlib.metadata
import json
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from common import certificates, node_key
from common.errors import ConfigError
from common.invitation import (
    Enrolment,
    Invitation,
    enrolment,
    parse_timestamp,
    read_enrolment,
    read_invitation,
    read_json,
    timestamp,
    write_document,
)

KEY = ec.derive_private_key(7, ec.SECP384R1())
OTHER = ec.derive_private_key(8, ec.SECP384R1())
TOKEN = "ab" * 32
OURS = importlib.metadata.version("consilium")


@pytest.fixture(scope="module")
def invitation(tmp_path_factory: pytest.TempPathFactory) -> Invitation:
    key = tmp_path_factory.mktemp("ca") / "ca.key"
    certificates.make_key(key)
    return Invitation(
        name="st-anna",
        address="coordinator.example.org:9443",
        ca_certificate=certificates.make_ca(key, "chest").decode(),
        token=TOKEN,
        expires=timestamp(datetime.now(UTC) + timedelta(days=14)),
        version=OURS,
    )


def written(folder: Path, value: Any) -> Path:
    path = folder / "document.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_documents_read_back_and_are_for_their_owner_only(invitation: Invitation, tmp_path: Path) -> None:
    answer = enrolment(invitation, KEY)
    for document, read in ((invitation, read_invitation), (answer, read_enrolment)):
        write_document(tmp_path / "d.json", document)
        assert stat.S_IMODE((tmp_path / "d.json").stat().st_mode) == 0o600
        assert read(tmp_path / "d.json") == document  # type: ignore[operator]
    assert set(json.loads((tmp_path / "d.json").read_text())) == {"schema", "name", "token", "public_key", "signature"}
    assert answer.public_key == node_key.public_text(KEY)
    assert answer.token == invitation.token


@pytest.mark.parametrize(
    "changes",
    [{"name": "st-bert"}, {"token": "cd" * 32}, {"public_key": node_key.public_text(OTHER)}],
)
def test_a_changed_enrolment_is_refused(changes: dict[str, str], invitation: Invitation, tmp_path: Path) -> None:
    values = enrolment(invitation, KEY).model_dump(by_alias=True) | changes
    with pytest.raises(ConfigError, match="the signature is not that of its key"):
        read_enrolment(written(tmp_path, values))


def test_a_signature_of_another_key_is_refused(invitation: Invitation, tmp_path: Path) -> None:
    values = enrolment(invitation, OTHER).model_dump(by_alias=True) | {"public_key": node_key.public_text(KEY)}
    with pytest.raises(ConfigError, match="the signature is not"):
        read_enrolment(written(tmp_path, values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": 1}, "extra: unknown key"),
        ({"tokem": 1}, "did you mean 'token'"),
        ({"name": "a/b"}, "name: expected 1 to 63"),
        ({"name": "../x"}, "name: expected 1 to 63"),
        ({"name": 3}, "name: got 3"),
        ({"name": "a\ud800"}, "name"),
        ({"address": "host"}, "address: got 'host', expected host:port"),
        ({"address": "http://host:80"}, "address"),
        ({"ca_certificate": "junk"}, "ca_certificate: expected the certificate"),
        ({"token": "ab"}, "token"),
        ({"token": TOKEN + "\n"}, "token"),
        ({"token": "x" * 60000}, "token"),
        ({"token": None}, "token: got None"),
        ({"expires": "tomorrow"}, "expires: expected a time"),
        ({"expires": "2027-1-31T12:00:00Z"}, "expires: expected a time"),
        ({"expires": "2027-13-31T12:00:00Z"}, "expires: expected a time"),
        ({"version": "new"}, "version: expected a version"),
        ({"version": 10**400}, "version"),
        ({"version": "99999.0.0"}, f"comes from consilium 99999.0.0, this is {OURS}: update consilium here"),
        ({"version": "99999.0.0", "new_in_that_version": []}, "update consilium here"),
        ({"version": "0.0.9"}, "the coordinator has to update and invite again"),
        ({"schema": "consilium-invitation-2"}, "written by a newer consilium, update this one"),
        ({"schema": "consilium-enrolment-1"}, "another document"),
        ({"schema": 1}, "got something else"),
        ({"schema": None}, "got none"),
    ],
)
def test_what_is_wrong_with_an_invitation_is_one_line(
    changes: dict[str, Any], message: str, invitation: Invitation, tmp_path: Path
) -> None:
    values = invitation.model_dump(by_alias=True) | changes
    with pytest.raises(ConfigError, match=message) as raised:
        read_invitation(written(tmp_path, values))
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 600 + len(str(tmp_path))


def test_every_key_is_needed(invitation: Invitation, tmp_path: Path) -> None:
    for document, read in ((invitation, read_invitation), (enrolment(invitation, KEY), read_enrolment)):
        whole = document.model_dump(by_alias=True)
        for key in whole:
            with pytest.raises(ConfigError, match=key):
                read(written(tmp_path, {name: value for name, value in whole.items() if name != key}))


def test_a_patch_release_is_of_the_same_series(invitation: Invitation, tmp_path: Path) -> None:
    series = ".".join(OURS.split(".")[:2])
    for version in (series, f"{series}.999", f"{series}.0rc1", f"{series}.0.dev1+local"):
        values = invitation.model_dump(by_alias=True) | {"version": version}
        assert read_invitation(written(tmp_path, values)).version == version


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "not a JSON object"),
        ("1" * 5000, "not JSON"),
        ('{"name": ' + "1" * 5000 + "}", "not JSON"),
        ("[" * 60000, "not JSON"),
        ('{"a":' * 9000, "not JSON"),
        ('{"name": NaN}', "NaN is no JSON"),
        ('{"name": -Infinity}', "no JSON"),
        ('{"name": "a", "name": "b"}', "a key occurs twice"),
        ('{"na\\nme": "a"}', "other characters"),
        ('{"\\u001b[31m": "a"}', "other characters"),
        ("{" + " " * 65536 + "}", "larger than 64 KiB"),
    ],
)
def test_hostile_json_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read_invitation(written(tmp_path, text))
    assert str(raised.value).isprintable()


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "latin").write_bytes(b'{"name": "\xe4"}')
    for name, message in {
        ".": "not a regular file|Is a directory",
        "none": "No such file",
        "pipe": "not a regular file",
        "loop": "cannot be read",
        "latin": "not JSON",
        "nul\0": "cannot be read",
    }.items():
        with pytest.raises(ConfigError, match=message):
            read_json(tmp_path / name)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_json(Path("/dev/zero"))


PLAIN = st.none() | st.booleans() | st.integers() | st.text()


@given(
    st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3), max_leaves=5),
    st.sampled_from(["schema", "name", "token", "public_key", "signature"]),
)
def test_any_other_value_is_an_error(value: Any, key: str) -> None:
    answer = Enrolment.model_validate(GOOD)
    path = Path(f"/dev/shm/consilium-{os.getpid()}.json")
    try:
        path.write_text(json.dumps({**GOOD, key: value}))
        with pytest.raises(ConfigError) as raised:
            read_enrolment(path)
        assert answer.is_signed()
        assert "\n" not in str(raised.value)
    finally:
        path.unlink(missing_ok=True)


@given(st.binary(max_size=300))
def test_any_bytes_are_an_error(content: bytes) -> None:
    path = Path(f"/dev/shm/consilium-{os.getpid()}.json")
    try:
        path.write_bytes(content)
        for read in (read_invitation, read_enrolment):
            with pytest.raises(ConfigError):
                read(path)
    finally:
        path.unlink(missing_ok=True)


@given(st.datetimes(datetime(1000, 1, 1), datetime(9000, 1, 1), timezones=st.just(UTC)))
def test_times_read_back_to_the_second(moment: datetime) -> None:
    assert parse_timestamp(timestamp(moment)) == moment.replace(microsecond=0)


def test_an_invitation_ends(invitation: Invitation) -> None:
    end = parse_timestamp(invitation.expires)
    assert not invitation.expired()
    assert not invitation.expired(end - timedelta(seconds=1))
    assert invitation.expired(end)


def _good() -> dict[str, Any]:
    from common.invitation import signed_bytes

    public = node_key.public_text(KEY)
    signature = node_key.sign(KEY, signed_bytes("st-anna", TOKEN, public))
    values = {"schema": "consilium-enrolment-1", "name": "st-anna", "token": TOKEN}
    return {**values, "public_key": public, "signature": signature}


GOOD = _good()

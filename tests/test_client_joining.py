"""A site joins: its key, whom it trusts, what site.toml says afterwards and what it keeps."""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from client import founding
from client.joining import fill, join
from client.site_config import read_any_site
from common import certificates, node_key
from common.errors import ConfigError, ConsiliumError, UsageError
from common.invitation import Invitation, read_enrolment, timestamp, write_document

VALUES = {"address": "fl.example.org:9443", "ca_certificate": "link/ca.pem", "private_key": "link/node.key"}
LINES = [f'{key} = "{value}"' for key, value in VALUES.items()]

Invite = Callable[..., Path]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> str:
    key = tmp_path_factory.mktemp("ca") / "ca.key"
    certificates.make_key(key)
    return certificates.make_ca(key, "chest").decode()


@pytest.fixture
def invite(tmp_path: Path, authority: str) -> Invite:
    def make(**changes: Any) -> Path:
        values = {
            "name": "st-anna",
            "address": "fl.example.org:9443",
            "ca_certificate": authority,
            "token": "ab" * 32,
            "expires": timestamp(datetime.now(UTC) + timedelta(days=1)),
            "version": "0.1.0",
        }
        write_document(tmp_path / "st-anna.invitation.json", Invitation(**{**values, **changes}))
        return tmp_path / "st-anna.invitation.json"

    return make


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return founding.found(tmp_path / "site", "st-anna").config


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_site_joins(site: Path, invite: Invite, tmp_path: Path, authority: str) -> None:
    before = site.read_text()
    output = tmp_path / "st-anna.enrolment.json"
    answer = join(site, invite(), output)
    assert read_enrolment(output) == answer
    config = read_any_site(site)
    assert answer.public_key == node_key.public_text(node_key.read_key(config.private_key))
    assert (answer.name, answer.token) == ("st-anna", "ab" * 32)
    link = site.parent / "link"
    assert (config.link_folder, config.private_key, config.ca_certificate) == (link, link / "node.key", link / "ca.pem")
    assert stat.S_IMODE(link.stat().st_mode) == 0o700
    assert config.ca_certificate.read_text() == authority
    assert str(config.coordinator().address) == "fl.example.org:9443"
    assert site.read_text().startswith(before)
    assert site.read_text()[len(before) :] == "\n".join(["", "[coordinator]", *LINES, ""])
    assert sorted(path.name for path in link.iterdir()) == ["ca.pem", "node.key"]


def test_a_key_is_never_overwritten(site: Path, invite: Invite, tmp_path: Path) -> None:
    first = join(site, invite(), tmp_path / "e.json")
    other = invite(token="cd" * 32)
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match="has a key already; --again keeps it"):
        join(site, other, tmp_path / "e.json")
    assert snapshot(tmp_path) == before
    second = join(site, invite(token="cd" * 32, address="fl.example.com:443"), tmp_path / "e.json", again=True)
    assert second.public_key == first.public_key
    assert second.token == "cd" * 32
    assert site.read_bytes() == before["site/site.toml"].replace(b"fl.example.org:9443", b"fl.example.com:443")


def test_again_needs_a_key(site: Path, invite: Invite, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave --again out"):
        join(site, invite(), tmp_path / "e.json", again=True)
    join(site, invite(), tmp_path / "e.json")
    (site.parent / "link" / "node.key").chmod(0o644)
    before = snapshot(site.parent)
    with pytest.raises(ConfigError, match="chmod 600"):
        join(site, invite(address="fl.example.com:443"), tmp_path / "e.json", again=True)
    assert snapshot(site.parent) == before


def test_a_link_in_place_of_the_key_is_not_followed(site: Path, invite: Invite, tmp_path: Path) -> None:
    (site.parent / "link").mkdir()
    (site.parent / "link" / "node.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="has a key already"):
        join(site, invite(), tmp_path / "e.json")
    with pytest.raises(ConfigError, match="missing|symbolic link"):
        join(site, invite(), tmp_path / "e.json", again=True)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "st-bert"}, r"invites 'st-bert', but \[site\] name in .* is 'st-anna'"),
        ({"expires": "2020-01-01T00:00:00Z"}, "expired on 2020-01-01T00:00:00Z; ask the coordinator for a new one"),
        ({"version": "0.2.0"}, "comes from consilium 0.2.0, this is .*: update consilium here"),
        ({"version": "0.0.1"}, "the coordinator has to update"),
    ],
)
def test_what_is_not_for_this_site_leaves_nothing(
    changes: dict[str, str], message: str, site: Path, invite: Invite, tmp_path: Path
) -> None:
    invitation = invite(**changes)
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=message) as raised:
        join(site, invitation, tmp_path / "e.json")
    assert "\n" not in str(raised.value)
    assert snapshot(tmp_path) == before
    assert not (site.parent / "link").exists()


@pytest.mark.parametrize("output", ["nowhere/e.json", "."])
def test_an_output_that_cannot_be_leaves_nothing(output: str, site: Path, invite: Invite, tmp_path: Path) -> None:
    before = snapshot(site.parent)
    with pytest.raises(UsageError, match="no file can be made there"):
        join(site, invite(), tmp_path / output)
    assert snapshot(site.parent) == before


@pytest.mark.parametrize("failing", ["node_key.make_key", "write_atomic", "write_document", "_replace"])
def test_a_full_disk_leaves_nothing(
    failing: str, site: Path, invite: Invite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    invitation = invite()
    before = snapshot(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(f"client.joining.{failing}", full)
        with pytest.raises(ConsiliumError, match="cannot be written .No space left"):
            join(site, invitation, tmp_path / "e.json")
    assert snapshot(tmp_path) == before
    assert not (site.parent / "link").exists()
    assert join(site, invitation, tmp_path / "e.json").name == "st-anna"


def test_who_comes_second_leaves_the_key_of_the_first(
    site: Path, invite: Invite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = node_key.make_key

    def beaten(path: Path) -> Any:
        make(path)
        return make(path)

    monkeypatch.setattr("client.joining.node_key.make_key", beaten)
    with pytest.raises(ConsiliumError, match="node.key: cannot be written .File exists"):
        join(site, invite(), tmp_path / "e.json")
    assert node_key.read_key(site.parent / "link" / "node.key")


@pytest.mark.parametrize("step", ["write_atomic", "write_document", "_replace"])
def test_after_a_crash_it_goes_on_with_the_same_key(
    step: str, site: Path, invite: Invite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed undoes nothing: what it leaves is imitated by taking the undoing away."""

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"client.joining.{step}", killed)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        patch.setattr(Path, "rmdir", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            join(site, invite(), tmp_path / "e.json")
    kept = (site.parent / "link" / "node.key").read_bytes()
    answer = join(site, invite(), tmp_path / "e.json", again=True)
    assert (site.parent / "link" / "node.key").read_bytes() == kept
    assert answer.is_signed()
    assert read_any_site(site).coordinator().private_key == site.parent / "link" / "node.key"


def test_the_places_that_site_toml_names_are_kept(site: Path, invite: Invite, tmp_path: Path) -> None:
    own = tmp_path / "consilium-link"
    own.mkdir(0o700)
    text = site.read_text() + f'\n[coordinator]\nprivate_key = "{own}/k.key"  # the link\'s\nproxy = "http://p:1"\n'
    site.write_text(text)
    site.chmod(0o640)
    join(site, invite(), tmp_path / "e.json")
    added = 'address = "fl.example.org:9443"\nca_certificate = "link/ca.pem"\n'
    assert site.read_text() == text.replace("[coordinator]\nprivate", f"[coordinator]\n{added}private")
    assert stat.S_IMODE(site.stat().st_mode) == 0o640
    config = read_any_site(site)
    assert config.private_key == own / "k.key"
    assert config.coordinator().proxy == "http://p:1"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root sets up for other users")
def test_root_gives_the_key_to_whom_the_folder_belongs(site: Path, invite: Invite, tmp_path: Path) -> None:
    (site.parent / "link").mkdir(0o700)
    os.chown(site.parent / "link", 12345, 12346)
    os.chown(site, 54321, 54321)
    join(site, invite(), tmp_path / "e.json")
    for name in ("node.key", "ca.pem"):
        found = (site.parent / "link" / name).stat()
        assert (found.st_uid, found.st_gid) == (12345, 12346)
    assert site.stat().st_uid == 54321


@pytest.mark.parametrize(
    "text",
    [
        'coordinator = {address = ""}\n[site]\nname = "st-anna"\n',
        '[site]\nname = "st-anna"\n["coordinator"]\naddress = ""\n',
        '[site]\nname = "st-anna"\n[coordinator]\n"address" = ""\n',
        '[site]\nname = "st-anna"\n[coordinator]\naddress = """a:1"""\n',
        'site.name = "st-anna"\ncoordinator.address = ""\n',
    ],
)
def test_what_cannot_be_changed_safely_is_left_to_people(text: str, site: Path, invite: Invite, tmp_path: Path) -> None:
    site.write_text(text)
    before = snapshot(site.parent)
    with pytest.raises(ConfigError, match='set by hand: address = "fl.example.org:9443", ca_certificate = ') as raised:
        join(site, invite(), tmp_path / "e.json")
    assert "\n" not in str(raised.value)
    assert snapshot(site.parent) == before
    assert not (site.parent / "link").exists()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_ends_of_lines_and_marks_are_kept(end: str, mark: str, site: Path, invite: Invite, tmp_path: Path) -> None:
    lines = ["[site]", 'name = "st-anna"  # ä', "[ coordinator ]  # ours", 'address = ""', "[compute]", "threads = 2"]
    site.write_bytes((mark + end.join(lines)).encode())
    join(site, invite(), tmp_path / "e.json")
    lines[3:4] = [*LINES[1:], LINES[0]]
    assert site.read_bytes().decode() == mark + end.join(lines)


def test_a_header_within_a_text_is_not_one(site: Path, invite: Invite, tmp_path: Path) -> None:
    text = '[site]\nname = "st-anna"\n[data]\nimages = """\n[coordinator]\n"""\n'
    site.write_text(text.replace("\n[coordinator]\n", "[coordinator]"))
    join(site, invite(), tmp_path / "e.json")
    assert read_any_site(site).toml.data.images == "[coordinator]"


@given(
    st.lists(
        st.sampled_from(
            ["", "# [coordinator]", "# address = 'x'", "   ", "[compute]", "[policy] # [coordinator]", "[data]"]
        ),
        unique=True,
    ),
    st.integers(0, 6),
    st.booleans(),
    st.booleans(),
)
def test_every_other_line_stays_whatever_stands_around(lines: list[str], place: int, there: bool, last: bool) -> None:
    before = ["[site]", 'name = "a"', *lines]
    if there:
        before[2 + place : 2 + place] = [
            "[coordinator] # c",
            " # kept",
            "address = 'old:1' # why",
            'proxy = "http://p:1"',
        ]
    text = "\n".join(before) + ("\n" if last else "")
    filled = fill(text, VALUES)
    known = tomllib.loads(text)
    assert tomllib.loads(filled) == {**known, "coordinator": {**known.get("coordinator", {}), **VALUES}}
    remaining = iter(re.split("\n", filled))
    for line in before:
        kept = line.replace("'old:1'", '"fl.example.org:9443"')
        assert any(candidate == kept for candidate in remaining), line
    assert fill(filled, VALUES) == filled


def test_the_key_is_one_that_flower_takes(site: Path, invite: Invite, tmp_path: Path) -> None:
    join(site, invite(), tmp_path / "e.json")
    assert isinstance(node_key.read_key(site.parent / "link" / "node.key").curve, ec.SECP384R1)

"""Who may take part: a token is good once, a key is one site's, a name has one key."""

from __future__ import annotations

import json
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from common import node_key
from common.errors import ConfigError, ConsiliumError
from common.invitation import Enrolment, Invitation, enrolment, write_document
from server.enrolment import DAYS, enrol, enrolled, invite, remove
from server.founding import found
from server.server_config import ServerConfig, read_server


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    return read_server(found(tmp_path / "chest", "fl.example.org:9443").config)


class Site:
    """A hospital that answers."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self.key = node_key.make_key(folder / f"{key}.key")

    def answers(self, invitation: Invitation) -> Path:
        return self.sends(enrolment(invitation, self.key))

    def sends(self, answer: Enrolment) -> Path:
        write_document(self.folder / "answer.json", answer)
        return self.folder / "answer.json"

    @property
    def public(self) -> str:
        return node_key.public_text(self.key)


@pytest.fixture
def anna(tmp_path: Path) -> Site:
    return Site(tmp_path, "anna")


@pytest.fixture
def bert(tmp_path: Path) -> Site:
    return Site(tmp_path, "bert")


def test_a_site_enrols_once(config: ServerConfig, anna: Site) -> None:
    invitation = invite(config, "st-anna")
    assert (invitation.address, invitation.ca_certificate) == ("fl.example.org:9443", config.ca_certificate.read_text())
    assert invitation.token not in config.invitations.read_text()
    assert enrolled(config) == ()
    site = enrol(config, anna.answers(invitation))
    assert (site.name, site.public_key) == ("st-anna", anna.public)
    assert enrolled(config) == (site,)
    for path in (config.sites, config.invitations):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(config.invitations.read_text())["invitations"] == []
    with pytest.raises(ConsiliumError, match="st-anna: already enrolled with this key, since 20"):
        enrol(config, anna.answers(invitation))


def test_a_token_is_good_once(config: ServerConfig, anna: Site, bert: Site) -> None:
    invitation = invite(config, "st-anna")
    site = enrol(config, anna.answers(invitation))
    for replace in (False, True):
        with pytest.raises(ConsiliumError, match="no open invitation has this token"):
            enrol(config, bert.answers(invitation), replace=replace)
    assert enrolled(config) == (site,)


def test_a_token_is_good_for_its_name_alone(config: ServerConfig, anna: Site) -> None:
    invite(config, "st-bert")
    invitation = invite(config, "st-anna").model_copy(update={"name": "st-bert"})
    with pytest.raises(ConsiliumError, match="st-bert: no open invitation has this token"):
        enrol(config, anna.answers(invitation))
    with pytest.raises(ConsiliumError, match="st-carl: no open invitation"):
        enrol(config, anna.answers(invitation.model_copy(update={"name": "st-carl"})))
    assert enrolled(config) == ()


def test_a_later_invitation_takes_the_place_of_an_earlier_one(config: ServerConfig, anna: Site) -> None:
    first, second = invite(config, "st-anna"), invite(config, "st-anna")
    with pytest.raises(ConsiliumError, match="a later invitation took its place"):
        enrol(config, anna.answers(first))
    assert enrol(config, anna.answers(second)).name == "st-anna"


def test_an_invitation_expires(config: ServerConfig, anna: Site) -> None:
    now = datetime.now(UTC)
    invitation = invite(config, "st-anna", now - timedelta(days=DAYS))
    with pytest.raises(ConsiliumError, match="its invitation expired on"):
        enrol(config, anna.answers(invitation), now=now)
    assert enrol(config, anna.answers(invitation), now=now - timedelta(days=1)).name == "st-anna"


def test_another_key_needs_the_operators_word(config: ServerConfig, anna: Site, bert: Site) -> None:
    enrol(config, anna.answers(invite(config, "st-anna")))
    again = invite(config, "st-anna")
    with pytest.raises(ConsiliumError, match="--replace") as raised:
        enrol(config, bert.answers(again))
    for site in (anna, bert):
        assert node_key.fingerprint(site.public) in str(raised.value)
    assert [site.public_key for site in enrolled(config)] == [anna.public]
    enrol(config, bert.answers(again), replace=True)  # the refusal has not used up the token
    assert [site.public_key for site in enrolled(config)] == [bert.public]


def test_a_key_is_one_sites(config: ServerConfig, anna: Site) -> None:
    enrol(config, anna.answers(invite(config, "st-anna")))
    other = invite(config, "st-bert")
    for replace in (False, True):
        with pytest.raises(ConsiliumError, match="st-bert: its key is that of st-anna"):
            enrol(config, anna.answers(other), replace=replace)


def test_a_forged_answer_leaves_the_token_open(config: ServerConfig, anna: Site, bert: Site) -> None:
    invitation = invite(config, "st-anna")
    forged = enrolment(invitation, bert.key).model_copy(update={"public_key": anna.public})
    with pytest.raises(ConfigError, match="the signature is not that of its key"):
        enrol(config, bert.sends(forged))
    assert enrol(config, anna.answers(invitation)).name == "st-anna"


def test_a_removed_site_is_gone_and_so_is_its_invitation(config: ServerConfig, anna: Site, bert: Site) -> None:
    for name, site in (("st-bert", bert), ("st-anna", anna)):
        enrol(config, site.answers(invite(config, name)))
    assert [site.name for site in enrolled(config)] == ["st-anna", "st-bert"]
    open_one = invite(config, "st-anna")
    assert remove(config, "st-anna").public_key == anna.public
    assert [site.name for site in enrolled(config)] == ["st-bert"]
    with pytest.raises(ConsiliumError, match="no open invitation"):
        enrol(config, anna.answers(open_one))
    with pytest.raises(ConsiliumError, match="'st-anna' is not enrolled; enrolled: st-bert"):
        remove(config, "st-anna")
    assert enrol(config, anna.answers(invite(config, "st-anna"))).public_key == anna.public


@pytest.mark.parametrize("name", ["", "a b", "../x", "a/b", "a" * 64, "-x", "ä"])
def test_a_name_that_no_site_can_have(name: str, config: ServerConfig) -> None:
    with pytest.raises(ConfigError, match="NAME: got .*1 to 63 letters"):
        invite(config, name)
    assert not config.invitations.exists()


def test_a_damaged_file_is_one_line_and_stays(config: ServerConfig, anna: Site) -> None:
    answer = anna.answers(invite(config, "st-anna"))
    site = enrol(config, answer)
    entry = site.model_dump()
    damaged = [
        "", "{", "[]", "null", '{"version": 2, "sites": []}', '{"sites": {}}', '{"sites": [{"name": "a"}]}',
        json.dumps({"version": 1, "sites": [entry, entry]}),
        json.dumps({"version": 1, "sites": [entry, {**entry, "name": "other"}]}),
        json.dumps({"version": 1, "sites": [{**entry, "public_key": "ssh-rsa AAAA"}]}),
    ]  # fmt: skip
    for text in damaged:
        config.sites.write_text(text)
        for act in (enrolled, lambda config: enrol(config, answer), lambda config: remove(config, "st-anna")):
            with pytest.raises(ConsiliumError, match=r"sites.json: .*; bring it back from your backup") as raised:
                act(config)
            assert str(raised.value).isprintable()
        assert config.sites.read_text() == text
    config.sites.write_text(json.dumps({"version": 1, "sites": [entry]}))
    config.invitations.write_text('{"version": 1, "invitations": [3]}')
    with pytest.raises(ConsiliumError, match="invitations.json: .*backup"):
        invite(config, "st-bert")


def test_a_missing_state_is_one_line(config: ServerConfig, tmp_path: Path) -> None:
    config.state.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"ca.pem: cannot be read"):
        invite(config, "st-anna")
    with pytest.raises(ConfigError, match="`consilium server init` makes a new one"):
        remove(config, "st-anna")


def test_what_is_no_authority_is_not_handed_out(config: ServerConfig) -> None:
    config.ca_certificate.write_bytes(config.certificate.read_bytes())
    with pytest.raises(ConfigError, match="ca.pem: expected the certificate .* of one authority"):
        invite(config, "st-anna")


def test_sites_that_enrol_at_once_are_all_recorded(config: ServerConfig, tmp_path: Path) -> None:
    names = [f"site-{number}" for number in range(8)]
    answers = []
    for name in names:
        (tmp_path / name).mkdir()
        answers.append(Site(tmp_path / name, "k").answers(invite(config, name)))
    threads = [threading.Thread(target=enrol, args=(config, answer)) for answer in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [site.name for site in enrolled(config)] == names


def test_a_full_disk_changes_nothing(config: ServerConfig, anna: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    invitation = invite(config, "st-anna")
    answer = anna.answers(invitation)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("server.enrolment.write_atomic", full)
        with pytest.raises(ConsiliumError, match="sites.json: cannot be written"):
            enrol(config, answer)
    assert enrolled(config) == ()
    assert enrol(config, answer).name == "st-anna"

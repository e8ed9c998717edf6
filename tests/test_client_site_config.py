"""A site's configuration is taken at its word, its folder is made whole or not at all, and its secret stays one."""

from __future__ import annotations

import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from client import audit
from client.founding import TEMPLATE, found, site_toml
from client.pacs_config import DicomWeb
from client.secret import BYTES, make_secret, read_secret
from client.site_config import (
    ComputeSection,
    CoordinatorSection,
    DataSection,
    PolicySection,
    SiteSection,
    SiteToml,
    read_any_site,
    read_site,
)
from common.errors import ConfigError, UsageError
from common.sections import LogsSection, MonitorSection

SECTIONS: dict[str, type[BaseModel]] = {
    "site": SiteSection,
    "data": DataSection,
    "data.dicomweb": DicomWeb,
    "policy": PolicySection,
    "coordinator": CoordinatorSection,
    "compute": ComputeSection,
    "logs": LogsSection,
    "monitor": MonitorSection,
}


def written(folder: Path, text: str) -> Path:
    path = folder / "site.toml"
    path.write_text(text, encoding="utf-8")
    return path


def explained() -> dict[str, dict[str, str]]:
    """Return section -> key -> value of the template, comments taken off."""
    sections: dict[str, dict[str, str]] = {}
    section: dict[str, str] = {}
    for line in TEMPLATE.format(name='name = "x"', images='images = ""', labels='labels = ""').splitlines():
        if header := re.match(r"(?:# )?\[([a-z.]+)\]", line):
            section = sections.setdefault(header[1], {})
        elif key := re.match(r"(?:# )?([a-z_]+) = (.*)", line):
            section[key[1]] = key[2]
    return sections


def test_the_new_file_explains_every_key_and_no_other() -> None:
    shown = explained()
    for name, model in SECTIONS.items():
        keys = set(model.model_fields) - ({"dicomweb"} if name == "data" else set())
        missing, foreign = keys - set(shown[name]), set(shown[name]) - keys
        assert not missing, name
        assert name == "data.dicomweb" or not foreign, name
    assert set(shown) == set(SECTIONS)


def test_the_defaults_that_the_new_file_shows_are_the_defaults() -> None:
    shown = explained()
    examples = {"name", "patient", "split", "words", "image_size", "threads"}  # said to be examples
    examples |= {name for name, field in PolicySection.model_fields.items() if field.default is None}
    for name, model in SECTIONS.items():
        if name == "data.dicomweb":
            continue
        for key, text in shown[name].items():
            if key not in examples:
                value = tomllib.loads(f"{key} = {text}")[key]
                default: Any = model.model_fields[key].default
                assert value == (list(default) if isinstance(default, tuple) else default), key


def test_every_line_of_the_new_file_is_valid_when_its_comment_is_taken_off(tmp_path: Path) -> None:
    text = site_toml(tmp_path, "anna", None, None)
    lines = [line for line in text.splitlines() if "dicomweb" not in line]
    on = [re.sub(r"^# (?=[a-z_]+ = |\[)", "", line) for line in lines]
    start, end = (next(k for k, line in enumerate(on) if line.startswith(key)) for key in ("url =", "[policy]"))
    SiteToml.model_validate(tomllib.loads("\n".join(on[:start] + on[end:])))


def test_a_new_site_is_whole(tmp_path: Path) -> None:
    images, labels = tmp_path / "bilder ä", tmp_path / 'la"b\\els.csv'
    images.mkdir()
    labels.write_text("path,label\n")
    made = found(tmp_path / "st anna", images=images, labels=labels)
    config = read_site(made.config)
    assert made.site == config.name == "stanna"
    assert (config.images, config.labels) == (images, labels)
    assert config.state == made.state == tmp_path / "st anna" / "state"
    assert sorted(path.name for path in (tmp_path / "st anna").iterdir()) == ["site.toml", "state"]
    assert stat.S_IMODE(made.state.stat().st_mode) == 0o700
    for name in ("secret", "audit.jsonl"):
        assert stat.S_IMODE((made.state / name).stat().st_mode) == 0o600
    assert len(read_secret(config.secret)) == BYTES
    assert [entry.event for entry in audit.read(config.audit)] == ["init"]


def test_paths_below_the_site_are_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site" / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "site")
    made = found(Path(), images=Path("images"))
    assert 'images = "images"' in made.config.read_text()
    assert read_site(made.config).images == tmp_path / "site" / "images"
    assert read_site(Path("site.toml")).state == tmp_path / "site" / "state"


def test_two_sites_have_two_secrets(tmp_path: Path) -> None:
    one, two = found(tmp_path / "one"), found(tmp_path / "two")
    assert read_secret(one.state / "secret") != read_secret(two.state / "secret")


@pytest.mark.parametrize("there", ["site.toml", "state"])
def test_nothing_is_overwritten(there: str, tmp_path: Path) -> None:
    (tmp_path / there).write_text("mine")
    with pytest.raises(UsageError, match=there):
        found(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "a b"}, "1 to 63 letters"),
        ({"name": ""}, "1 to 63 letters"),
        ({"name": '"\nstate = "/etc"'}, "1 to 63 letters"),
        ({"images": Path("nowhere")}, "--images: there is no folder"),
        ({"labels": Path("nowhere.csv")}, "--labels: there is no file"),
    ],
)
def test_a_wrong_wish_leaves_nothing(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        found(tmp_path / "new" / "site", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_crash_while_it_is_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("client.founding.make_secret", full)
    with pytest.raises(UsageError, match="No space left"):
        found(tmp_path / "site")
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "site").write_text("")
    with pytest.raises(UsageError, match="not a folder"):
        found(tmp_path / "site")
    with pytest.raises(UsageError, match="no site can be made there|not a folder"):
        found(tmp_path / "site" / "below")


def test_a_path_that_toml_cannot_hold(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    odd.mkdir()
    with pytest.raises(UsageError, match="not UTF-8"):
        found(tmp_path / "site", images=odd)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"site: missing"),
        ("[site]", r"\[site\] name: missing"),
        ('[site]\nname = "a"', r"\[data\] images: missing"),
        ('[site]\nname = "a"\n[data]\nimages = ""', r"\[data\] images: missing"),
        ('[site]\nname = "a"\n[data]\nimage = "x"', r"\[data\] image: unknown key \(did you mean 'images'\?\)"),
        ('[site]\nname = "a"\n[dta]\nimages = "x"', r"dta: unknown key \(did you mean 'data'\?\)"),
        ('[site]\nname = 3\n[data]\nimages = "x"', r"\[site\] name: got 3"),
        ('[site]\nname = "a/b"\n[data]\nimages = "x"', r"\[site\] name: expected 1 to 63"),
        ('site = "a"', "site: got 'a'"),
        ('[site]\nname = "a"\n[data]\nimages = "a\\u0000b"', r"\[data\] images: expected a path without control"),
        ('[site]\nname = "a"\nstate = "a\\u0000b"\n[data]\nimages = "x"', r"\[site\] state: expected a path"),
        ('[site]\nname = "a"\n[data]\nimages = ["x"]', r"\[data\] images: got \['x'\]"),
        ('[site]\nname = "a"\n[data]\nimages = "~nobody-of-that-name/x"', r"\[data\] images: .*leads nowhere"),
        ('[site]\nname = "a"\n[data]\nimages = "x"\npreset = "xray"', "expected one of generic"),
        ('[site]\nname = "a"\n[data]\nimages = "x"\nimage_size = true', "image_size"),
        ('[site]\nname = "a"\n[data]\nimages = "x"\nimage_size = 9999', "image_size"),
        ('[site]\nname = "a"\n[data]\nimages = "x"\nplaceholder_patients = "use"', "'stop' or 'quarantine'"),
        ('[site]\nname = "a"\n[data]\nimages = "x"\nlabel = [1.5]', "label"),
        ('[site]\nname = "a"\n[data]\nimages = "x"\n[policy]\nmax = 1', "expected one of tasks, backbones"),
        ('[site]\nname = "a"\n[data]\nimages = "x"\n[compute]\nthreads = 0', "threads"),
        ('[site]\nname = "a"\nname = "b"', "not TOML"),
        ("a = " + "[" * 9000, "not TOML"),
        ("\0", "not TOML"),
    ],
)
def test_what_is_wrong_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read_site(written(tmp_path, text))
    assert str(raised.value).count("\n") == 0


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_site(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_site(tmp_path / "no.toml")
    (tmp_path / "site.toml").write_bytes(b"[site]\nname = '\xff'")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_site(tmp_path / "site.toml")


@pytest.mark.parametrize(("text", "words"), [("1", ("1",)), ('"yes"', ("yes",)), ('["a", 2, true]', ("a", "2", "1"))])
def test_one_word_is_a_list_of_one(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    path = written(tmp_path, f'[site]\nname = "a"\n[data]\nimages = "x"\npositive = {text}')
    assert read_site(path).rules.positive == words


@given(st.binary(max_size=200))
def test_any_bytes_are_a_configuration_or_an_error(content: bytes) -> None:
    path = Path(f"/dev/shm/consilium-{os.getpid()}.toml")
    try:
        path.write_bytes(content)
        with pytest.raises(ConfigError):
            read_site(path)
    finally:
        path.unlink(missing_ok=True)


def test_a_secret_is_made_once(tmp_path: Path) -> None:
    make_secret(tmp_path / "secret")
    kept = read_secret(tmp_path / "secret")
    with pytest.raises(FileExistsError):
        make_secret(tmp_path / "secret")
    assert read_secret(tmp_path / "secret") == kept


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_secret_that_others_can_open_is_refused(mode: int, tmp_path: Path) -> None:
    make_secret(tmp_path / "secret")
    (tmp_path / "secret").chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}.*chmod 600"):
        read_secret(tmp_path / "secret")


def test_a_secret_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    with pytest.raises(ConfigError, match="missing, expected the site.s secret; `consilium site init`"):
        read_secret(path)
    path.write_bytes(b"x" * 31)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="31 bytes, expected 32"):
        read_secret(path)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ConfigError, match="symbolic link"):
        read_secret(tmp_path / "link")
    with pytest.raises(ConfigError, match="not a regular file|cannot be read"):
        read_secret(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_secret(tmp_path / "pipe")


JOINED = '[site]\nname = "a"\n[coordinator]\naddress = "fl.example.org:9443"\n'


def test_a_site_knows_its_coordinator(tmp_path: Path) -> None:
    found = read_any_site(written(tmp_path, JOINED)).coordinator()
    assert (str(found.address), found.proxy) == ("fl.example.org:9443", None)
    assert (found.private_key, found.ca_certificate) == (tmp_path / "link/node.key", tmp_path / "link/ca.pem")
    text = f'{JOINED}private_key = "/k/node.key"\nca_certificate = "/c/ca.pem"\nproxy = "http://proxy:3128/"\n'
    config = read_any_site(written(tmp_path, text))
    assert config.coordinator().proxy == "http://proxy:3128"
    assert (config.link_folder, config.ca_certificate) == (Path("/k"), Path("/c/ca.pem"))


def test_a_site_that_has_not_joined_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[coordinator\] address: missing - run `consilium site join`"):
        read_any_site(written(tmp_path, '[site]\nname = "a"')).coordinator()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("address", "fl.example.org", "expected host:port"),
        ("address", "https://fl.example.org:1", "expected host:port"),
        ("proxy", "proxy:3128", "expected http://host:port"),
        ("proxy", "https://proxy:3128", "expected http://host:port"),
        ("proxy", "http://user:word@proxy:3128", "expected http://host:port"),
        ("proxy", "http://proxy", "expected host:port"),
        ("proxy", "http://proxy:3128/path", "expected http://host:port"),
        ("private_key", "~nobody-of-that-name/x", "leads nowhere"),
    ],
)
def test_a_coordinator_that_cannot_be(key: str, value: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"\[coordinator\] {key}: .*{message}"):
        read_any_site(written(tmp_path, f'[site]\nname = "a"\n[coordinator]\n{key} = "{value}"'))


def test_the_path_of_a_socket_is_short(tmp_path: Path) -> None:
    text = '[site]\nname = "a"\n'
    assert read_any_site(written(tmp_path, text)).socket == tmp_path / "state/daemon.sock"
    longest = "/" + "s" * 106
    assert read_any_site(written(tmp_path, f'{text}socket = "{longest}"')).socket == Path(longest)
    for socket in (longest + "s", "/" + "ä" * 54):
        config = read_any_site(written(tmp_path, f'{text}socket = "{socket}"'))
        with pytest.raises(ConfigError, match=r"\[site\] socket: .* has 10[89] bytes, a socket's path at most 107"):
            _ = config.socket
    deep = read_any_site(written(tmp_path, f'{text}state = "/{"d" * 100}"'))
    with pytest.raises(ConfigError, match=r"\[site\] socket: .*daemon.sock has"):
        _ = deep.socket


def test_peers_are_users_of_this_machine(tmp_path: Path) -> None:
    text = '[site]\nname = "a"\npeers = '
    assert read_any_site(written(tmp_path, text + '["root", 1234]')).peers == {0, 1234}
    assert read_any_site(written(tmp_path, '[site]\nname = "a"')).peers == frozenset()
    with pytest.raises(ConfigError, match=r"\[site\] peers: this machine knows no user 'nobody-of-that-name'"):
        _ = read_any_site(written(tmp_path, text + '["nobody-of-that-name"]')).peers
    for wrong in ("[true]", "[1.5]", '"root"', "[-1]", '[""]', '["a\\u0000b"]'):
        with pytest.raises(ConfigError, match="peers"):
            _ = read_any_site(written(tmp_path, text + wrong)).peers


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ('strategies = ["fedprocks"]', r"\[policy\] strategies: got 'fedprocks', expected some of fedavg"),
        ("max_rounds = 0", r"\[policy\] max_rounds: got 0"),
        ("tasks = 3", r"\[policy\] tasks"),
        ('metrics = ["auc"]', r"\[policy\] metrics: got 'auc', expected some of confusion, histograms"),
        ('trunks = ["abc"]', r"\[policy\] trunks: got 'abc', expected the 64 hexadecimal digits"),
        ('coordinators = ["fl.example.org"]', r"\[policy\] coordinators: .*expected the SHA-256 fingerprint"),
        ("min_batch = 1", r"\[policy\] min_batch: got 1"),
        ("min_sites = 0", r"\[policy\] min_sites: got 0"),
        ("min_cell = -1", r"\[policy\] min_cell: got -1"),
        ("max_epsilon = 0", r"\[policy\] max_epsilon: got 0"),
        ("max_epsilon = inf", r"\[policy\] max_epsilon: got inf"),
        ("max_delta = 1.0", r"\[policy\] max_delta: got 1.0"),
        ("round_counts = 4", r"\[policy\] round_counts: got 4"),
        ('privacy = "on"', r"\[policy\] privacy: got 'on'"),
        ('hours = "20-6"', r"\[policy\] hours: got '20-6', expected hours such as"),
        ('hours = ["20:00-20:00"]', r"\[policy\] hours: .*no time at all"),
        ('hours = ["24:00-06:00"]', r"\[policy\] hours: got"),
        ("hours = 20.5", r"\[policy\] hours"),
        ("approval = 1", r"\[policy\] approval: got 1"),
        ('privacy = "required"\nallow_exact = true', r"policy.*contradict each other"),
    ],
)
def test_a_policy_that_cannot_be(policy: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_any_site(written(tmp_path, f'[site]\nname = "a"\n[policy]\n{policy}'))


def test_a_policy_is_kept_in_one_form(tmp_path: Path) -> None:
    fingerprint = ":".join(["AB"] * 32)
    text = f"""
[policy]
coordinators = ["{fingerprint}", "FL.example.org:443"]
trunks = ["{"AB" * 32}"]
hours = "20:00-06:00"
max_epsilon = 8
"""
    policy = read_any_site(written(tmp_path, f'[site]\nname = "a"\n{text}')).toml.policy
    assert policy.coordinators == ("ab" * 32, "fl.example.org:443")
    assert (policy.trunks, policy.hours, policy.max_epsilon) == (("ab" * 32,), ("20:00-06:00",), 8.0)
    assert PolicySection() == PolicySection.model_validate({"tasks": [], "hours": []})


def test_the_example_is_valid() -> None:
    config = read_site(Path(__file__).parent.parent / "deploy" / "site.toml")
    assert config.socket == Path("/run/consilium/site.sock")
    assert config.link_folder == Path("/var/lib/consilium-link")
    assert config.coordinator().ca_certificate == Path("/var/lib/consilium-link/ca.pem")
    assert config.toml.site.peers == ("consilium-link",)


def test_what_is_shown_of_a_value_is_short_and_one_line(tmp_path: Path) -> None:
    for text in (f"[site]\nname = [{'1, ' * 9000}]", f'[site]\nname = "a"\n"k\\n{"x" * 9000}" = 1'):
        with pytest.raises(ConfigError) as raised:
            read_any_site(written(tmp_path, text))
        assert len(str(raised.value)) < 400
        assert "\n" not in str(raised.value)

"""`consilium site`: exit codes, what is printed where, what lies in the state afterwards, and what never gets out."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import client.intake
import client.pacs
from client import audit, examination
from client.cli import site
from client.findings import FileFinding, Findings
from client.identity import Identity
from client.optout import optout
from client.secret import read_secret
from client.site_config import SiteConfig, read_site
from common import cli
from common.errors import CacheError, ConsiliumError, DataError

CANARIES = ("Doe^Jane", "19470113", "ward-7-oncology")

Run = Callable[..., tuple[int, str, str]]


@dataclass(frozen=True)
class Forgotten:
    images: int
    features: int
    files: int


@dataclass(frozen=True)
class Pulled:
    studies: int
    instances: int
    failed: int
    seconds: float


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run `consilium site ...` as the installed command would, and return exit code, stdout and stderr."""

    class Entry:
        name = "site"

        def load(self) -> Any:
            return site

    def entry_points(group: str, name: str | None = None) -> list[Entry]:
        return [Entry()] if group == cli.GROUP and name in (None, "site") else []

    def invoke(*arguments: object) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            patch.setattr(importlib.metadata, "entry_points", entry_points)
            patch.setattr(sys, "argv", ["consilium", "site", *map(str, arguments)])
            with pytest.raises(SystemExit) as ended:
                cli.main()
        printed = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, printed.out, printed.err

    return invoke


@pytest.fixture
def hospital(tmp_path: Path, run: Run) -> SiteConfig:
    """A site whose images are nowhere that a canary does not mark."""
    images = tmp_path / "ward-7-oncology"
    images.mkdir()
    table = tmp_path / "labels-Doe^Jane.csv"
    table.write_text("path,label,patient\na.png,normal,19470113\n")
    code, _, _ = run("init", tmp_path / "site", "--name", "st-anna", "--images", images, "--labels", table)
    assert code == 0
    return read_site(tmp_path / "site" / "site.toml")


@pytest.fixture
def intake(monkeypatch: pytest.MonkeyPatch, findings: Callable[..., Findings]) -> Callable[..., None]:
    """Let the examination find what is given."""

    def finds(**changes: Any) -> None:
        def examine(config: SiteConfig, progress: Callable[[str, int, int], None]) -> Findings:
            progress("reading", 3, 3)
            return findings(site=config.name, **changes)

        monkeypatch.setattr(client.intake, "examine", examine)

    finds()
    return finds


def fails(error: Exception) -> Callable[..., Any]:
    def examine(*_: Any) -> None:
        raise error

    return examine


def with_pacs(config: SiteConfig) -> None:
    text = config.path.read_text()
    config.path.write_text(text + '\n[data.dicomweb]\nurl = "https://pacs.example/dicom-web"\nstudies = "s.csv"\n')


def test_init_says_where_it_all_is(tmp_path: Path, run: Run) -> None:
    code, out, err = run("init", tmp_path / "site", "--json")
    assert (code, err) == (0, "")
    folder = tmp_path / "site"
    assert json.loads(out) == {"site": "site", "config": str(folder / "site.toml"), "state": str(folder / "state")}
    code, out, err = run("init", tmp_path / "site", "--json")
    assert (code, out) == (2, "")
    assert "already holds site.toml and state" in err
    assert err.count("\n") == 1


def test_init_then_check(tmp_path: Path, run: Run, intake: Any) -> None:
    assert run("init", tmp_path / "site")[0] == 0
    code, out, err = run("check", tmp_path / "site" / "site.toml")
    assert (code, out) == (2, "")
    assert err == (
        "consilium: site.toml: [data] images: missing - name the folder of the images, or a [data.dicomweb]\n"
    )


def test_check_prints_and_keeps_what_it_found(hospital: SiteConfig, run: Run, intake: Any) -> None:
    code, out, err = run("check", hospital.path)
    assert code == 0
    assert "st-anna" in out
    assert "damaged" in out
    assert str(hospital.state / "check.html") in out
    assert "reading" in err
    for name in ("check.json", "check.html"):
        assert stat.S_IMODE((hospital.state / name).stat().st_mode) == 0o600
    kept = json.loads((hospital.state / "check.json").read_text())
    assert kept["examples"] == {"train": 700, "validation": 150, "test": 151}
    assert "files" not in kept
    last = audit.read(hospital.audit)[-1]
    assert last.event == "check"
    assert last.facts == {
        "manifest_sha256": "ab" * 32,
        "preprocessing_id": "0123456789abcdef",
        "accepted": 1001,
        "patients": 812,
        "quarantine": {"damaged": 2, "no_pixels": 11},
        "ignored": {"report": 40, "hidden": 1},
        "stopped": 0,
    }


def test_json_is_all_that_is_printed(hospital: SiteConfig, run: Run, intake: Any) -> None:
    code, out, err = run("check", hospital.path, "--files", "--json", "--quiet")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    assert [file["status"] for file in json.loads(out)["files"]] == ["accepted", "quarantined", "ignored"]
    code, out, _ = run("check", hospital.path, "--json", "--quiet")
    assert code == 0
    assert "files" not in json.loads(out)


def test_names_that_are_no_unicode(hospital: SiteConfig, run: Run, intake: Any) -> None:
    intake(files=(FileFinding(os.fsdecode(b"caf\xe9.dcm"), "quarantined", "damaged"),))
    code, out, _ = run("check", hospital.path, "--files", "--json", "--quiet")
    assert code == 0
    assert json.loads(out)["files"][0]["path"] == r"caf\xe9.dcm"
    code, out, _ = run("check", hospital.path, "--files", "--quiet")
    assert code == 0
    assert r"caf\xe9.dcm" in out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_of_another_encoding(
    encoding: str, hospital: SiteConfig, intake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    intake(labels={"train": {"Pleuraerguß 胸水": 1000}}, months=None)
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding=encoding))
    site(["check", str(hospital.path), "--quiet"], standalone_mode=False)
    sys.stdout.flush()
    assert "1 000" in screen.getvalue().decode(encoding)


def test_a_folder_whose_name_is_no_unicode(tmp_path: Path, run: Run) -> None:
    code, out, err = run("init", Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")))
    assert (code, err) == (0, "")
    assert r"site caf: " in out
    assert r"caf\xe9/site.toml" in out


def test_data_that_may_not_be_used_are_shown_all_the_same(hospital: SiteConfig, run: Run, intake: Any) -> None:
    intake(stop="640 images are of patients who stand for nobody")
    code, out, err = run("check", hospital.path, "--json", "--quiet")
    assert code == 2
    assert json.loads(out)["stop"] == "640 images are of patients who stand for nobody"
    assert err == "consilium: 640 images are of patients who stand for nobody\n"
    code, out, err = run("check", hospital.path, "--quiet")
    assert code == 2
    assert "pneumonia" in out
    assert "640 images" in err
    assert audit.read(hospital.audit)[-1].facts["stopped"] == 1


@pytest.mark.parametrize(("error", "code"), [(DataError("why"), 2), (CacheError("why"), 1), (ConsiliumError("why"), 1)])
def test_what_fails_is_one_line(
    error: Exception, code: int, hospital: SiteConfig, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.intake, "examine", fails(error))
    assert run("check", hospital.path, "--quiet", "--json") == (code, "", "consilium: why\n")
    assert not (hospital.state / "check.html").exists()


def test_another_copy_of_the_page(hospital: SiteConfig, run: Run, intake: Any, tmp_path: Path) -> None:
    code, out, _ = run("check", hospital.path, "--output", tmp_path / "page.html", "--quiet")
    assert code == 0
    assert str(tmp_path / "page.html") in out
    assert stat.S_IMODE((tmp_path / "page.html").stat().st_mode) == 0o600
    assert (tmp_path / "page.html").read_bytes() == (hospital.state / "check.html").read_bytes()
    for nowhere in (tmp_path / "no" / "page.html", tmp_path):
        code, out, err = run("check", hospital.path, "--output", nowhere, "--quiet")
        assert (code, out) == (2, "")
        assert "--output" in err


def test_a_site_without_state_or_secret(hospital: SiteConfig, run: Run, intake: Any) -> None:
    hospital.secret.chmod(0o644)
    code, _, err = run("check", hospital.path, "--quiet")
    assert code == 2
    assert "chmod 600" in err
    hospital.secret.unlink()
    code, _, err = run("check", hospital.path, "--quiet")
    assert code == 2
    assert "missing" in err
    assert not hospital.secret.exists()
    hospital.state.rename(hospital.state.with_name("gone"))
    (hospital.path.parent / "out.csv").write_text("4711\n")
    code, _, err = run("forget", hospital.path.parent / "out.csv", "--site", hospital.path)
    assert code == 2
    assert "consilium site check" in err
    assert not hospital.state.exists()


@pytest.mark.parametrize("empty", [False, True])
def test_check_makes_the_state_of_a_site_that_was_written_by_hand(
    empty: bool, tmp_path: Path, run: Run, intake: Any
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "site.toml").write_text('[site]\nname = "st-anna"\nstate = "var/state"\n[data]\nimages = "images"\n')
    state = tmp_path / "var" / "state"
    if empty:
        state.mkdir(mode=0o755, parents=True)
    code, out, err = run("check", tmp_path / "site.toml", "--quiet", "--json")
    assert (code, err.count("\n")) == (0, 1)
    assert json.loads(out)["site"] == "st-anna"
    assert "new site" in err
    assert str(state) in err
    assert [stat.S_IMODE(path.stat().st_mode) for path in (state, state / "secret")] == [0o700, 0o600]
    assert [entry.event for entry in audit.read(state / "audit.jsonl")] == ["init", "check"]
    secret = (state / "secret").read_bytes()
    assert len(secret) == 32
    assert run("check", tmp_path / "site.toml", "--quiet", "--json")[2] == ""
    assert (state / "secret").read_bytes() == secret


@pytest.mark.parametrize("held", ["optout", "audit.jsonl", "cache", ".something"])
def test_a_state_that_lost_its_secret_never_gets_another(held: str, tmp_path: Path, run: Run, intake: Any) -> None:
    (tmp_path / "site.toml").write_text('[site]\nname = "a"\n[data]\nimages = "images"\n')
    (tmp_path / "images").mkdir()
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / held).touch()
    code, out, err = run("check", tmp_path / "site.toml", "--quiet")
    assert (code, out) == (2, "")
    assert "backup" in err
    assert [path.name for path in (tmp_path / "state").iterdir()] == [held]


def test_a_state_that_cannot_be_made(tmp_path: Path, run: Run, intake: Any) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "site.toml").write_text('[site]\nname = "a"\nstate = "file/state"\n[data]\nimages = "images"\n')
    code, out, err = run("check", tmp_path / "site.toml")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "cannot be made" in err


def test_check_pulls_first(hospital: SiteConfig, run: Run, intake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def pull(source: Any, base: Path, folder: Path, identity: Identity, progress: Any) -> Pulled:
        calls.append((source.url, base, folder, identity.secret))
        progress(1, 1)
        return Pulled(3, 9, 0, 1.5)

    monkeypatch.setattr(client.pacs, "pull", pull)
    code, _, err = run("pull", hospital.path)
    assert code == 2
    assert "no [data.dicomweb]" in err
    with_pacs(hospital)
    assert run("check", hospital.path, "--offline", "--quiet")[0] == 0
    assert calls == []
    assert run("check", hospital.path, "--quiet")[0] == 0
    expected = ("https://pacs.example/dicom-web", hospital.path.parent, hospital.images, read_secret(hospital.secret))
    assert calls == [expected]
    code, out, err = run("pull", hospital.path, "--json", "--quiet")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"studies": 3, "instances": 9, "failed": 0, "seconds": 1.5}
    assert audit.read(hospital.audit)[-1].facts == {"studies": 3, "instances": 9, "failed": 0}
    assert "instances" in run("pull", hospital.path, "--quiet")[1]
    monkeypatch.setattr(client.pacs, "pull", lambda *_: Pulled(3, 8, 1, 1.5))
    assert run("pull", hospital.path, "--quiet")[0] == 3


def test_forget(hospital: SiteConfig, run: Run, intake: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[set[bytes]] = []

    def forget(config: SiteConfig, persons: set[bytes]) -> Forgotten:
        assert optout(config) >= persons  # the list comes first
        assert not (config.state / "check.html").exists()  # it may show their images
        seen.append(persons)
        return Forgotten(5, 7, 6)

    monkeypatch.setattr(client.intake, "forget", forget)
    assert run("check", hospital.path, "--quiet")[0] == 0
    patients = tmp_path / "out.csv"
    patients.write_text("PatientID;Name\nDoe^Jane;x\n19470113;y\n")
    monkeypatch.chdir(hospital.path.parent)
    code, out, err = run("forget", patients, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"persons": 2, "new": 2, "images": 5, "features": 7, "files": 6}
    who = Identity(read_secret(hospital.secret))
    assert seen == [{who.person("Doe^Jane"), who.person("19470113")}]
    code, out, _ = run("forget", patients, "--site", hospital.path)
    assert code == 0
    assert "Taken out" in out
    last = audit.read(hospital.audit)[-1]
    assert (last.event, last.facts) == ("forget", {"persons": 2, "new": 0, "images": 5, "features": 7, "files": 6})
    for canary in CANARIES:
        assert canary not in out
        assert canary.encode() not in hospital.audit.read_bytes() + hospital.optout.read_bytes()


def test_a_forgetting_that_dies_is_mended_by_another(
    hospital: SiteConfig, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "out.csv").write_text("4711\n")
    monkeypatch.setattr(client.intake, "forget", fails(CacheError("no space")))
    assert run("forget", tmp_path / "out.csv", "--site", hospital.path)[0] == 1
    assert len(optout(hospital)) == 1
    assert [entry.event for entry in audit.read(hospital.audit)] == ["init"]
    monkeypatch.setattr(client.intake, "forget", lambda *_: Forgotten(1, 1, 1))
    assert run("forget", tmp_path / "out.csv", "--site", hospital.path)[0] == 0
    assert len(optout(hospital)) == 1


@pytest.mark.slow
def test_forgetting_waits_for_an_examination_to_end(hospital: SiteConfig, run: Run, tmp_path: Path) -> None:
    """Else the examination, which began before, would write the images and the page of who was forgotten."""
    (tmp_path / "out.csv").write_text("4711\n")
    arguments = ["site", "forget", str(tmp_path / "out.csv"), "--site", str(hospital.path)]
    script = f"import sys; sys.argv[1:] = {arguments!r}; from common.cli import main; main()"
    with examination.alone(hospital):
        forgetting = subprocess.Popen([sys.executable, "-P", "-c", script], stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            forgetting.wait(timeout=3)
        assert len(optout(hospital)) == 1
        (hospital.state / "check.html").write_text("their images")
    forgetting.communicate(timeout=30)
    assert forgetting.returncode == 0
    assert not (hospital.state / "check.html").exists()


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "PatientID\n"])
def test_a_list_of_nobody_changes_nothing(content: str, hospital: SiteConfig, run: Run, tmp_path: Path) -> None:
    (tmp_path / "out.csv").write_text(content)
    code, out, err = run("forget", tmp_path / "out.csv", "--site", hospital.path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert not hospital.optout.exists()
    assert run("forget", tmp_path / "none.csv", "--site", hospital.path)[0] == 2
    hospital.secret.chmod(0o666)
    assert "chmod 600" in run("forget", tmp_path / "out.csv", "--site", hospital.path)[2]


def test_audit_verify(hospital: SiteConfig, run: Run, intake: Any) -> None:
    run("check", hospital.path, "--quiet")
    code, out, err = run("audit", "verify", "--site", hospital.path, "--json")
    assert (code, err) == (0, "")
    last = audit.read(hospital.audit)[-1].sha256
    assert json.loads(out) == {"entries": 2, "torn_lines": 0, "sha256": last}
    code, out, _ = run("audit", "verify", "--site", hospital.path)
    assert code == 0
    assert "2 entries" in out
    assert last in out
    content = hospital.audit.read_bytes()
    hospital.audit.write_bytes(content.replace(b'"patients":812', b'"patients":813'))
    code, out, err = run("audit", "verify", "--site", hospital.path, "--json")
    assert (code, out) == (1, "")
    assert "line 2 does not hold" in err
    hospital.audit.unlink()
    assert run("audit", "verify", "--site", hospital.path)[0] == 1


def test_nothing_of_a_path_or_a_table_gets_into_what_is_kept(
    hospital: SiteConfig, run: Run, intake: Any, tmp_path: Path
) -> None:
    intake(files=tuple(FileFinding(f"{canary}/1.dcm", "accepted") for canary in CANARIES))
    for arguments in ([], ["--files"], ["--json"], ["--files", "--json"]):
        code, out, err = run("check", hospital.path, "--quiet", *arguments)
        assert code == 0
        for canary in CANARIES:
            assert canary not in err
            assert (canary in out) == (arguments == ["--files", "--json"])
    for path in hospital.state.rglob("*"):
        for canary in CANARIES:
            assert canary not in path.name
            assert path.is_dir() or canary.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["chekc"], "check"),
        (["xyz"], "Expected one of approve, audit, check, doctor, forget, init, join, ledger"),
        (["audit", "verfiy"], "verify"),
        (["check", "site.toml", "--fils"], "--files"),
        (["forget", "x.csv", "--stie", "x"], "--site"),
        (["init"], "DIR"),
    ],
)
def test_wrong_use_names_the_right_one(arguments: list[str], hint: str, run: Run) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert hint in err


def test_the_top_names_the_nearest_group(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["consilium", "simulat"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "Did you mean 'simulate'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [[], ["init"], ["check"], ["pull"], ["forget"], ["audit"], ["audit", "verify"]], ids=" ".join
)
def test_every_command_has_help_with_an_example(command: list[str], run: Run) -> None:
    code, out, err = run(*command, "--help")
    assert (code, err) == (0, "")
    assert "Example:\n    consilium site " in out
    assert max(map(len, out.splitlines())) <= 100


def test_a_hostile_configuration_does_not_steer_the_terminal(tmp_path: Path, run: Run) -> None:
    (tmp_path / "site.toml").write_text('[site]\nname = "a"\n"\\u001b[31mred\\u0007" = 1\n')
    code, _, err = run("check", tmp_path / "site.toml")
    assert code == 2
    assert "\x1b" not in err
    assert "\x07" not in err
    assert "unknown key" in err


def test_a_folder_in_place_of_the_configuration(tmp_path: Path, run: Run) -> None:
    for name in (tmp_path, tmp_path / "none.toml"):
        code, out, err = run("check", name)
        assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("arguments", [["--help"], ["check", "--help"], ["check", "SITE", "--quiet"]])
def test_nothing_heavy_is_imported(arguments: list[str], hospital: SiteConfig) -> None:
    """Not even when a check runs (here into the error of a table that is not there)."""
    (hospital.path.parent.parent / "labels-Doe^Jane.csv").unlink()
    given = [str(hospital.path) if word == "SITE" else word for word in arguments]
    heavy = (
        "torch",
        "timm",
        "flwr",
        "sklearn",
        "matplotlib",
        "pandas",
        "ray",
        *(["numpy"] if "--help" in given else []),
    )
    script = (
        "import sys\n"
        "from client.cli import site\n"
        "try:\n"
        f"    site({given!r}, standalone_mode=False)\n"
        "except BaseException as error:\n    print(type(error).__name__)\n"
        f"print('heavy:', sorted(set({heavy!r}) & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.endswith("heavy: []\n"), done.stdout + done.stderr


def test_the_entry_point_is_written_down() -> None:
    text = (Path(cli.__file__).parents[1] / "pyproject.toml").read_text()
    assert 'site = "client.cli:site"' in text
    assert '"client.report" = ["audit.html.j2", "check.html.j2"]' in text

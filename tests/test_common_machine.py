"""What both doctors share: the machine's room and versions, who may do what, and checks that never raise."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import access, machine
from common.doctor import LEVELS, Check, Found, Result, document, examine, failed, healthy, lines, passed, tally
from common.errors import ConfigError

ROOT = Path(__file__).parent.parent
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user, or mount a file system")


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that other users can enter; those that pytest makes are closed to them."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("this container may not mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# ---------------------------------------------------------------------------------------------------------- checks


def test_a_check_never_raises_and_tells_of_an_exception_its_class_alone() -> None:
    def patient(_case: object) -> Found:
        raise RuntimeError("/data/chest/meier.dcm")

    def configured(_case: object) -> Found:
        raise ConfigError("site.toml: wrong, expected right")

    checks = {
        "odd": Check("m", "r", patient),
        "known": Check("m", "r", configured),
        "bad": Check("m", "r", lambda _: failed("bad", "own")),
        "good": Check("m", "r", lambda _: passed("good")),
    }
    results = tuple(examine(checks, None))
    assert [(one.check, one.level) for one in results] == [
        ("odd", "fail"),
        ("known", "fail"),
        ("bad", "fail"),
        ("good", "pass"),
    ]
    assert results[0].said == "the check itself failed (RuntimeError)" and "meier" not in str(results[0])
    assert results[1].said == "site.toml: wrong, expected right"
    assert [one.remedy for one in results[1:]] == ["r", "own", ""]
    assert not healthy(results) and healthy(results[3:])
    assert tally(results) == "1 pass, 0 warn, 3 fail, 0 skip"
    assert document({"site": "x"}, results[3:]) == {
        "site": "x",
        "healthy": True,
        "checks": [{"check": "good", "level": "pass", "said": "good", "remedy": ""}],
    }


def test_lines_are_aligned_and_a_remedy_stands_below() -> None:
    printed = list(lines(Result("clock", "fail", "late", "hurry"), 8))
    assert printed == ["fail  clock    late", "               hurry"]
    assert printed[0].index("late") == printed[1].index("hurry")
    assert all(len(level) == 4 for level in LEVELS)


# ---------------------------------------------------------------------------------------------------------- memory


def tree(root: Path, available: int, cgroup: str = "0::/", files: dict[str, str] | None = None) -> Path:
    values = {"proc/meminfo": f"MemTotal: 9 kB\nMemAvailable: {available // 1024} kB\n", "proc/self/cgroup": cgroup}
    for name, text in {**values, **(files or {})}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


GB = machine.GB
ABOVE, BELOW = "sys/fs/cgroup/a", "sys/fs/cgroup/a/b"
V1 = "sys/fs/cgroup/memory/a"


@pytest.mark.parametrize(
    ("available", "cgroup", "files", "level", "words"),
    [
        (8 * GB, "0::/", {}, "pass", "8.0 GB available"),
        (3 * GB, "0::/", {}, "warn", "4.0 GB would be better"),
        (GB, "0::/", {}, "fail", "2.0 GB are needed"),
        (8 * GB, "0::/a/b", {f"{BELOW}/memory.max": "max", f"{BELOW}/memory.current": "5"}, "pass", "8.0 GB available"),
        (
            8 * GB,
            "0::/a/b",
            {f"{ABOVE}/memory.max": str(3 * GB), f"{ABOVE}/memory.current": str(2 * GB)},
            "fail",
            "1.0 GB available under the limit",
        ),
        (
            8 * GB,
            "0::/a/b",
            {
                f"{ABOVE}/memory.max": str(3 * GB),
                f"{ABOVE}/memory.current": str(2 * GB),
                f"{ABOVE}/memory.stat": f"anon 1\ninactive_file {3 * GB // 2}",
            },
            "warn",
            "2.5 GB available under the limit",
        ),
        (
            8 * GB,
            "4:memory:/a\n1:cpu:/",
            {f"{V1}/memory.limit_in_bytes": str(GB), f"{V1}/memory.usage_in_bytes": "0"},
            "fail",
            "1.0 GB available under the limit",
        ),
    ],
)
def test_memory_is_what_is_available_under_every_limit(
    tmp_path: Path, available: int, cgroup: str, files: dict[str, str], level: str, words: str
) -> None:
    found = machine.memory(2 * GB, 4 * GB, tree(tmp_path, available, cgroup, files))
    assert found.level == level and words in found.said


def test_the_memory_of_this_machine_can_be_told() -> None:
    found = machine.memory(1, 2)
    assert found.level == "pass" and "available" in found.said


# ------------------------------------------------------------------------------------------------------------ disks


@as_root
def test_a_full_disk_fails_and_a_small_one_warns(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=400m") as folder:
        assert machine.disk(folder, GB // 10, "caches").level == "pass"
        assert machine.disk(folder, GB, "caches").level == "warn"
        with (folder / "full").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 300 * 2**20)
        found = machine.disk(folder, GB, "caches")
        assert found.level == "fail" and found.said.endswith("caches may take 1.0 GB")


@as_root
def test_a_disk_on_which_no_file_can_be_made_fails(tmp_path: Path) -> None:
    with mounted(tmp_path / "odd", "size=400m,nr_inodes=3") as folder:
        (folder / "one").touch()
        (folder / "two").touch()
        found = machine.disk(folder, 0, "caches")
    assert found.level == "fail" and "no file can be made" in found.said


@as_root
def test_the_shared_memory_of_a_container_is_warned_of(tmp_path: Path) -> None:
    with mounted(tmp_path / "shm", "size=64m") as folder:
        found = machine.shared_memory(folder)
    assert found.level == "warn" and "67 MB, as containers have" in found.said
    assert machine.shared_memory(tmp_path / "none").level == "warn"
    with mounted(tmp_path / "shm", "size=1g") as folder:
        assert machine.shared_memory(folder).level == "pass"


@pytest.mark.parametrize(("limit", "level"), [(100, "fail"), (512, "warn"), (1024, "pass")])
def test_a_process_that_may_open_few_files_is_told(limit: int, level: str) -> None:
    code = (
        "import resource; hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1];"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, hard));"
        "from common import machine; import sys; print(machine.open_files().level, 'torch' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [level, "False"]  # and nothing heavy was imported


# --------------------------------------------------------------------------------------------------------- versions


def distribution(folder: Path, name: str, *requires: str, python: str = ">=3.11", modules: str = "") -> None:
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Python: {python}\n"
    (info / "METADATA").write_text(head + "".join(f"Requires-Dist: {one}\n" for one in requires))
    (info / "top_level.txt").write_text(modules)


@pytest.mark.parametrize(
    ("requires", "python", "said"),
    [
        (("click>=8", "nothing-of-the-kind; extra == 'x'"), ">=3.11", ""),
        (("nothing-of-the-kind",), ">=3.11", "nothing-of-the-kind is not installed"),
        (("click<2",), ">=3.11", r"click is .*, expected <2"),
        (("click",), ">=4", r"Python is 3\."),
        (("broken-wheel",), ">=3.11", r"broken-wheel 1\.0 cannot be imported \(OSError\)"),
    ],
)
def test_versions_are_compared_with_what_is_required_and_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requires: tuple[str, ...], python: str, said: str
) -> None:
    distribution(tmp_path, "product", *requires, python=python)
    distribution(tmp_path, "broken-wheel", modules="broken_wheel_module")
    (tmp_path / "broken_wheel_module.py").write_text("raise OSError('libcuda.so of /data/meier')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(machine, "_NAMED", ("click",))
    found = machine.versions("product")
    assert found.level == ("fail" if said else "pass")

    assert re.search(said or "1 packages as required", found.said) and "meier" not in found.said


@pytest.mark.slow
def test_this_installation_is_as_it_requires() -> None:
    found = machine.versions()
    assert found.level == "pass", found.said
    assert "consilium" in found.said and "flwr 1.41" in found.said and "torch" in found.said


# ---------------------------------------------------------------------------------------------------- time, chance


def test_the_kernel_is_asked_for_its_clock_and_for_chance() -> None:
    assert machine.randomness().level == "pass"
    told = {machine.clock().said for _ in range(3)}
    assert len(told) == 1 and machine.clock().level in ("pass", "warn", "skip")


# ----------------------------------------------------------------------------------------------------------- access


@as_root
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    folder=st.integers(0, 0o777),
    file=st.integers(0, 0o777),
    owner=st.sampled_from([0, NOBODY]),
    group=st.sampled_from([0, NOBODY]),
    want=st.sampled_from("rwx"),
)
def test_modes_are_judged_as_the_kernel_judges(
    shared_folder: Path, folder: int, file: int, owner: int, group: int, want: str
) -> None:
    inner = shared_folder / "inner"
    shutil.rmtree(inner, ignore_errors=True)
    inner.mkdir()
    (inner / "file").touch()
    for path, mode in ((inner, folder), (inner / "file", file)):
        os.chown(path, owner, group)
        path.chmod(mode)
    for path in (inner, inner / "file"):
        assert access._judged(NOBODY, path, want) == access._asked(NOBODY, path, want)


@as_root
def test_who_asks_about_themselves_or_root_is_told_at_once(shared_folder: Path) -> None:
    closed = shared_folder / "closed"
    closed.mkdir(mode=0o700)
    (closed / "file").touch()
    assert access.may(0, closed, "r") is True and access.may(NOBODY, closed, "r") is False
    os.seteuid(NOBODY)
    try:
        assert access.may(NOBODY, closed, "x") is False and access.may(0, closed, "x") is True
        assert access.may(1, closed / "file", "r") is False  # as the folder's mode says
        assert access.closed(closed / "file") and not access.closed(closed)
    finally:
        os.seteuid(0)


@as_root
@pytest.mark.skipif(shutil.which("setfacl") is None, reason="no setfacl (Debian: acl)")
def test_an_access_list_is_taken_into_account(shared_folder: Path) -> None:
    path = shared_folder / "images"
    path.mkdir(mode=0o700)
    if subprocess.run(["setfacl", "-m", f"u:{NOBODY}:rx", str(path)], capture_output=True).returncode:
        pytest.skip("this file system has no access lists")
    assert access.may(NOBODY, path, "r") is True
    assert access._judged(NOBODY, path, "r") is None


@pytest.mark.parametrize(("mode", "level"), [(0o700, "pass"), (0o750, "fail"), (0o701, "fail")])
def test_a_private_folder_is_its_owners_alone(tmp_path: Path, mode: int, level: str) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    folder.chmod(mode)
    found = access.private_folder(folder)
    assert found.level == level
    assert level == "pass" or found.remedy == f"Run: chmod 700 {folder}"
    assert stat.S_IMODE(folder.stat().st_mode) == mode


@as_root
def test_what_another_user_left_in_a_private_folder_is_found(shared_folder: Path) -> None:
    folder = shared_folder / "state"
    (folder / "cache").mkdir(parents=True)
    folder.chmod(0o700)
    for path in (folder, folder / "cache"):
        os.chown(path, NOBODY, NOBODY)
    assert access.private_folder(folder).level == "pass"
    (folder / "cache" / "records").touch()  # as `sudo consilium site check` leaves it
    found = access.private_folder(folder)
    assert found.level == "fail" and "chown -R nobody: " in found.remedy
    os.chown(folder, 0, 0)
    assert access.private_folder(folder).level == "warn"  # whatever belongs to whom, root can use it
    os.seteuid(1)
    try:
        assert access.private_folder(folder).level == "fail"
        assert "closed to this user" in access.private_folder(folder / "cache").said
    finally:
        os.seteuid(0)


def test_a_folder_that_is_not_there_fails(tmp_path: Path) -> None:
    assert "no such folder" in access.private_folder(tmp_path / "none").said

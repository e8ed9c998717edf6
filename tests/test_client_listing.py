"""Which files of a folder could be images: nothing is opened, nothing outside is reached, the order is stable."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.image import CODES, IGNORED
from client.listing import list_files
from common.errors import DataError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_what_could_be_dicom_stays_and_the_rest_is_counted(tmp_path: Path) -> None:
    kept = ["IM0001", "a/1.2.840.113619.2", "a/b/x.dcm", "x.PNG", "x.unknown", "scan.001", "noending.", "a.gif"]
    other = ["labels.CSV", "a/DICOMDIR", "a/dicomdir", "x.nii.gz", "r.pdf", "z.docx", "Thumbs.db", "x.npz", "v.mp4"]
    hidden = [".DS_Store", ".git/objects/1", "a/._x.png"]
    touch(tmp_path, *kept, *other, *hidden)
    found = list_files(tmp_path)
    assert sorted(found.paths) == sorted(kept)
    assert set(found.ignored) == {*other, *hidden}
    assert {name for name in other if found.ignored[name] == "directory"} == {"a/DICOMDIR", "a/dicomdir"}
    assert {found.ignored[name] for name in other} == {"directory", "other_suffix"}
    assert {found.ignored[name] for name in hidden} == {"hidden"}
    assert set(found.ignored.values()) <= set(IGNORED)
    assert found.quarantine == {}


def test_order_is_that_of_the_components(tmp_path: Path) -> None:
    touch(tmp_path, "b/1", "a/b/2", "a-b/1", "a/b.png", "a.png", "a/10", "a/1")
    paths = list_files(tmp_path).paths
    assert paths == tuple(sorted(paths, key=lambda path: Path(path).parts))
    assert paths == ("a/1", "a/10", "a/b/2", "a/b.png", "a-b/1", "a.png", "b/1")


def test_links_are_followed_to_files_inside_only(tmp_path: Path) -> None:
    root, outside = tmp_path / "data", tmp_path / "data-other"
    touch(root, "a/1.png")
    touch(outside, "secret.png")
    (root / "twin.png").symlink_to("a/1.png")
    (root / "out.png").symlink_to(outside / "secret.png")
    (root / "up.png").symlink_to("../data-other/secret.png")
    (root / "etc").symlink_to("/etc/hostname")
    (root / "gone.png").symlink_to("nothing.png")
    (root / "loop.png").symlink_to("loop.png")
    (root / "folder").symlink_to(outside)
    (root / "self").symlink_to(".")
    found = list_files(root)
    assert found.paths == ("a/1.png", "twin.png")
    outside_codes = dict.fromkeys(["etc", "out.png", "up.png"], "outside_root")
    assert found.quarantine == outside_codes | {"gone.png": "missing", "loop.png": "missing"}
    assert set(found.quarantine.values()) <= set(CODES)


def test_a_linked_root_is_a_root(tmp_path: Path) -> None:
    touch(tmp_path / "data", "1.png")
    (tmp_path / "data" / "2.png").symlink_to("1.png")
    (tmp_path / "link").symlink_to("data")
    assert list_files(tmp_path / "link").paths == ("1.png", "2.png")


def test_pipes_and_sockets_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        found = list_files(tmp_path)
    assert found.paths == ()
    assert found.quarantine == {"link": "missing", "pipe": "missing", "socket": "missing"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read any folder")
def test_a_folder_kept_shut_is_counted(tmp_path: Path) -> None:
    touch(tmp_path, "shut/1.png", "2.png")
    (tmp_path / "shut").chmod(0)
    try:
        found = list_files(tmp_path)
    finally:
        (tmp_path / "shut").chmod(0o700)
    assert (found.paths, found.quarantine) == (("2.png",), {"shut": "no_access"})


def test_names_that_are_no_utf_8_survive(tmp_path: Path) -> None:
    name = b"Stra\xdfe\n.dcm"
    with open(os.path.join(os.fsencode(tmp_path), name), "wb"):  # noqa: PTH118, PTH123  # Path takes no bytes
        pass
    found = list_files(tmp_path)
    assert [os.fsencode(path) for path in found.paths] == [name]
    assert (tmp_path / found.paths[0]).is_file()


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a folder"):
        list_files(tmp_path / "nothing")


def test_a_representation_shows_no_path(tmp_path: Path) -> None:
    touch(tmp_path, "secret.png")
    assert "secret" not in repr(list_files(tmp_path))


@given(st.sets(st.text("ab.-1", min_size=1, max_size=4).filter(lambda name: name.strip(".")), max_size=8))
def test_every_file_is_told_of_once(tmp_path_factory: pytest.TempPathFactory, names: set[str]) -> None:
    root = tmp_path_factory.mktemp("data")
    touch(root, *(f"d{len(name)}/{name}" for name in names))
    found = list_files(root)
    told = [*found.paths, *found.quarantine, *found.ignored]
    assert sorted(told) == sorted(f"d{len(name)}/{name}" for name in names)


@pytest.mark.slow
def test_a_hundred_thousand_files(tmp_path: Path) -> None:
    for folder in range(100):
        (tmp_path / str(folder)).mkdir()
        for number in range(1000):
            os.close(os.open(tmp_path / str(folder) / f"1.2.840.{number}", os.O_CREAT))
    start = time.perf_counter()
    assert len(list_files(tmp_path).paths) == 100_000
    print(f"{time.perf_counter() - start:.2f} s")  # noqa: T201  # a figure for the reader, no limit

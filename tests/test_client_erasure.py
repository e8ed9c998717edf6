"""Patients who were taken out: nothing made of their images is left in any byte, and they never come back."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import audit, dicom, erasure, examination, intake, optout
from client.augmentation import MOST_VIEWS, Augmentation, keys
from client.identity import Identity
from client.rowstore import RowStore
from client.secret import read_secret
from client.site_config import SiteConfig
from common.errors import CacheError
from common.presets import PRESETS

pytestmark = pytest.mark.slow

FEATURE = np.dtype(("<f2", (37,)))


def progress(*_: Any) -> None:
    """Nobody looks."""


def pixels(seed: int) -> np.ndarray:
    """Return pixels with noise in every one, so that no two rows of a cache are alike."""
    return np.random.default_rng(seed).integers(0, 250, (32, 32), np.uint8)


@pytest.fixture
def cards(ward: Any) -> Any:
    """Twelve DICOM files of four patients, two of them written with other zeros and another case in the list."""
    rows = []
    for number in range(12):
        name = f"{number:02d}.dcm"
        ward.dicom(name, pixels(number), bits=8, PatientID=("0007", "ab9", "P2", "P3")[number % 4])
        rows.append({"path": name, "label": "ab"[number // 6]})
    ward.table(rows)
    return ward


@pytest.fixture
def pictures(ward: Any) -> Any:
    """Twelve PNG files of four patients, whom the table alone tells."""
    rows = []
    for number in range(12):
        ward.picture(f"{number:02d}.png", pixels(number))
        rows.append({"path": f"{number:02d}.png", "label": "ab"[number // 6], "patient": f"00{number % 4 + 7}"})
    ward.table(rows)
    return ward


def with_features(config: SiteConfig) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Make features of every image and a few views, and return path -> preprocessed bytes, and one row of features."""
    taken = intake.take_in(config, progress)
    gathered, places = taken.gathered, taken.places
    digests = gathered.digests(places)
    store = RowStore(config.cache / "features" / "trunk-preprocessing", FEATURE)
    random = np.random.default_rng(5)
    names = [gathered.found.paths[place] for place in places.tolist()]
    rows = {}
    for view in (0, 1, MOST_VIEWS - 1):
        made = random.random((len(places), 37)).astype("<f2")
        store.append(keys(digests, view, Augmentation.of(PRESETS["chest-xray"])), made)
        rows |= {f"{name} {view}": row.tobytes() for name, row in zip(names, made, strict=True)}
    shown = taken.catalogue.source(gathered.kind)(taken.catalogue.rows(gathered.entries_of(places)))
    return {name: image.tobytes() for name, image in zip(names, shown, strict=True)}, rows


def kept(config: SiteConfig) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(config.state.rglob("*")) if path.is_file())


def forget(config: SiteConfig, *patients: str) -> dict[str, int]:
    (config.path.parent / "out.csv").write_text("\n".join(["PatientID", *patients]) + "\n")
    return examination.forget(config, config.path.parent / "out.csv")


def check_gone(config: SiteConfig, images: dict[str, bytes], features: dict[str, bytes], theirs: list[str]) -> None:
    """Theirs are in no byte of the state, the others' are all there."""
    content = kept(config)
    for name, image in images.items():
        assert (image in content) == (name not in theirs), name
    for name, row in features.items():
        assert (row in content) == (name.split()[0] not in theirs), name


@pytest.mark.parametrize("name", ["0007", "7", "00000007"])
def test_by_the_header(name: str, cards: Any) -> None:
    config = cards.site()
    images, features = with_features(config)
    theirs = [f"{number:02d}.dcm" for number in range(0, 12, 4)]
    counts = forget(config, name)
    assert counts == {"persons": 1, "new": 1, "images": 3, "features": 9, "files": 3}
    check_gone(config, images, features, theirs)
    outcomes = cards.outcomes()
    assert {path for path, found in outcomes.items() if found == ("ignored", "opted_out")} == set(theirs)
    assert cards.examine().patients == 3
    check_gone(config, images, features, theirs)


def test_case_does_not_matter(cards: Any) -> None:
    config = cards.site()
    images, features = with_features(config)
    assert forget(config, "AB9")["images"] == 3
    check_gone(config, images, features, [f"{number:02d}.dcm" for number in range(1, 12, 4)])


def test_by_the_table(pictures: Any) -> None:
    config = pictures.site()
    images, features = with_features(config)
    theirs = [f"{number:02d}.png" for number in range(0, 12, 4)]
    counts = forget(config, "7")
    assert (counts["images"], counts["features"]) == (3, 9)
    check_gone(config, images, features, theirs)
    outcomes = pictures.outcomes()
    assert {path for path, found in outcomes.items() if found == ("ignored", "opted_out")} == set(theirs)
    check_gone(config, images, features, theirs)


def test_a_check_is_enough_for_those_on_the_list(cards: Any, pictures: Any) -> None:
    """A forgetting that died right after the list was written is finished by the next examination, too."""
    config = pictures.site()
    images, features = with_features(config)
    optout.take_out(config, {Identity(read_secret(config.secret)).person("7")})
    intake.take_in(config, progress)
    theirs = [name for name in images if name.endswith(".png") and int(name[:2]) % 4 == 0]
    theirs += [name for name in images if name.endswith(".dcm") and int(name[:2]) % 4 == 0]
    check_gone(config, images, features, theirs)


def test_again_is_nothing_new(cards: Any) -> None:
    config = cards.site()
    images, features = with_features(config)
    forget(config, "7")
    assert forget(config, "7") == {"persons": 1, "new": 0, "images": 0, "features": 0, "files": 0}
    cards.examine()
    assert forget(config, "7")["images"] == 0
    check_gone(config, images, features, [f"{number:02d}.dcm" for number in range(0, 12, 4)])
    assert [entry.event for entry in audit.read(config.audit)] == ["forget"] * 3


@pytest.mark.parametrize("key", ["path", "SOPInstanceUID"])
def test_again_where_only_unlabelled_files_are_left(key: str, ward: Any) -> None:
    """The table then names no file that is known, which is no reason not to finish."""
    for number in range(3):
        ward.dicom(f"{number}.dcm", pixels(number), bits=8, PatientID=f"P{number}", SOPInstanceUID=f"1.2.3.{number}")
    named = {"path": "0.dcm", "SOPInstanceUID": "1.2.3.0"}
    other = {"path": "1.dcm", "SOPInstanceUID": "1.2.3.1"}
    ward.table([{key: named[key], "label": "a"}, {key: other[key], "label": "b"}])
    config = ward.site()
    images, _ = with_features(config)
    forget(config, "P0", "P1")
    assert forget(config, "P0", "P1")["images"] == 0
    assert not any(image in kept(config) for image in images.values())


def test_before_anything_was_examined(ward: Any) -> None:
    ward.dicom("0.dcm", pixels(0), bits=8, PatientID="P0", SOPInstanceUID="1.2.3.0")
    ward.table([{"SOPInstanceUID": "1.2.3.0", "label": "a"}])
    assert forget(ward.site(), "P0") == {"persons": 1, "new": 1, "images": 0, "features": 0, "files": 0}
    assert ward.outcomes() == {"0.dcm": ("ignored", "opted_out")}


@pytest.mark.parametrize("who", ["cards", "pictures"])
@pytest.mark.parametrize("step", range(9))
def test_a_forgetting_that_dies_anywhere_is_finished_by_another(
    step: int, who: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies before one of the things that it takes out of a store."""
    place = request.getfixturevalue(who)
    config = place.site()
    images, features = with_features(config)
    whole, calls = RowStore.remove, []

    def remove(store: RowStore, gone: Any) -> int:
        calls.append(store)
        if len(calls) > step:
            raise CacheError("killed")
        return whole(store, gone)

    with monkeypatch.context() as patch, suppress(CacheError):
        patch.setattr(RowStore, "remove", remove)
        forget(config, "7")
    assert calls
    forget(config, "7")
    check_gone(config, images, features, [name for name in images if int(name[:2]) % 4 == 0])
    audit.verify(config.audit)


def test_an_examination_that_was_killed_leaves_nothing_behind(cards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels are on disk before the record that counts on them: a kill in between leaves pixels without a name."""
    config = cards.site()
    whole = RowStore.append

    def append(store: RowStore, gone: Any, rows: Any) -> None:
        if store.folder.name.startswith("records"):
            raise CacheError("killed")
        whole(store, gone, rows)

    with monkeypatch.context() as patch:
        patch.setattr(RowStore, "append", append)
        with pytest.raises(CacheError):
            intake.take_in(config, progress)
    image = pixels(0).tobytes()
    assert image in kept(config)  # 32 x 32 pixels at the size of the site: shown as they are, but for the contrast
    forget(config, "7")
    assert image not in kept(config)


def test_images_of_files_that_are_gone_or_changed_are_no_refuge(pictures: Any) -> None:
    """The table names the patient of a file; nothing names that of a file that is there no more."""
    config = pictures.site()
    images, features = with_features(config)
    (pictures.images / "00.png").unlink()
    pictures.picture("04.png", pixels(99))
    pictures.examine()
    forget(config, "7")
    check_gone(config, images, features, ["00.png", "04.png", "08.png"])


def test_a_copy_that_belongs_to_another_patient_stays_and_is_right(pictures: Any) -> None:
    """One image under two patients: the other one's is still used, and is the image it was."""
    pictures.picture("01.png", pixels(0))  # the image of 00.png, of another patient
    config = pictures.site(split="split")
    text = (pictures.folder / "labels.csv").read_text().splitlines()
    (pictures.folder / "labels.csv").write_text("\n".join([f"{text[0]},split", *(f"{row},train" for row in text[1:])]))
    images, _ = with_features(config)
    forget(config, "7")
    cohort = intake.cohort(config, progress)
    assert len(cohort) == 9
    assert (cohort.rows >= 0).all()
    shown = {image.tobytes() for image in cohort.pixels(np.arange(len(cohort)))}
    assert shown == {image for name, image in images.items() if int(name[:2]) % 4}


def test_a_copy_is_right_in_the_very_examination_that_takes_a_patient_out(pictures: Any) -> None:
    pictures.picture("01.png", pixels(0))
    config = pictures.site()
    images, _ = with_features(config)
    optout.take_out(config, {Identity(read_secret(config.secret)).person("7")})
    cohort = intake.cohort(config, progress)
    assert (cohort.rows >= 0).all()
    shown = {image.tobytes() for image in cohort.pixels(np.arange(len(cohort)))}
    assert shown == {image for name, image in images.items() if int(name[:2]) % 4}


def test_no_file_of_theirs_is_decoded_again(cards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = cards.site()
    with_features(config)
    forget(config, "7")
    decoded = []
    whole = dicom.read_pixels

    def read_pixels(opened: Any, *rest: Any) -> Any:
        decoded.append(opened.dataset.PatientID)
        return whole(opened, *rest)

    monkeypatch.setattr(dicom, "read_pixels", read_pixels)
    cards.examine()
    cards.examine(preset="chest-xray")
    assert "0007" not in decoded
    assert cards.examine().from_cache == 12


@pytest.mark.parametrize("why", ["table", "folder", "no table"])
def test_where_nobody_can_tell_whose_images_are_whose_all_of_them_go(why: str, pictures: Any) -> None:
    config = pictures.site()
    images, features = with_features(config)
    if why == "table":
        (pictures.folder / "labels.csv").write_text('path,label\n"')
    elif why == "folder":
        pictures.images.rename(pictures.folder / "not mounted")
    else:
        (pictures.folder / "labels.csv").unlink()
    counts = forget(config, "7")
    assert (counts["images"], counts["features"], counts["files"]) == (12, 36, 12)
    check_gone(config, images, features, list(images))


@pytest.mark.parametrize("torn", [1, 5, 3 * 74, 1000])
def test_a_feature_store_with_a_torn_end(torn: int, cards: Any) -> None:
    """A killed process leaves rows without records: that must not hide how long a row is."""
    config = cards.site()
    images, features = with_features(config)
    with (config.cache / "features" / "trunk-preprocessing" / "rows.bin").open("ab") as file:
        file.write(bytes(range(1, 256)) * (torn // 255) + b"\7" * (torn % 255))
    forget(config, "7")
    check_gone(config, images, features, [f"{number:02d}.dcm" for number in range(0, 12, 4)])


def test_other_presets_and_sizes_are_cleared_as_well(cards: Any) -> None:
    config = cards.site()
    others = [cards.site(preset="chest-xray"), cards.site(image_size=48)]
    made = [with_features(one)[0] for one in (*others, config)]
    forget(cards.site(), "7")
    content = kept(config)
    for images in made:
        for name, image in images.items():
            assert (image in content) == (int(name[:2]) % 4 != 0)


def test_nothing_there_to_erase(tmp_path: Path) -> None:
    assert erasure.erase(tmp_path / "cache", {b"p" * 16}, set()) == erasure.Erased(0, 0, 0)


def test_whoever_has_the_caches_open_can_see_that_rows_were_deleted(cards: Any) -> None:
    config = cards.site()
    with_features(config)
    members = config.cache / erasure.MEMBERS
    members.write_bytes(b"digests")
    before = erasure.mark(config.cache)
    assert forget(config, "nobody")["images"] == 0
    assert (erasure.mark(config.cache), members.exists()) == (before, True)
    assert forget(config, "7")["images"] == 3
    after = erasure.mark(config.cache)
    assert (after != before, members.exists()) == (True, False)
    intake.take_in(config, progress)
    assert erasure.mark(config.cache) == after


def test_whoever_waits_for_the_caches_goes_first_when_they_may(cards: Any) -> None:
    config = cards.site()
    order: list[str] = []

    def other() -> None:
        with examination.alone(config):
            order.append("other")

    waiting = threading.Thread(target=other)
    with examination.alone(config) as give_way:
        give_way()  # nobody waits
        waiting.start()
        time.sleep(0.05)
        order.append("first")
        deadline = time.monotonic() + 20
        while "other" not in order and time.monotonic() < deadline:
            give_way()
        order.append("first again")
    waiting.join()
    assert order == ["first", "other", "first again"]

"""Partition: every example at one site, units whole, no site empty, one draw for equal arguments."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.cohort import Cohort
from common.errors import CacheError, ConfigError, DataError
from simulations.partition import Spec, parse_spec, partition
from simulations.splits import TRAIN, assign, units

SPECS = ("iid", "dirichlet:0.5", "dirichlet:0.01", "dirichlet:1e-300", "shards:1", "shards:2", "quantity:0.3")


def no_pixels(rows):
    raise AssertionError("partitioning reads no pixels")


def cohort_of(labels, images, patients, seed=0):
    """Return a cohort with splits; equal numbers in `images` are identical images."""
    labels = np.asarray(labels, dtype=np.int64)
    digests = b"".join(hashlib.sha256(str(image).encode()).digest() for image in images)
    digests = np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32)
    patients = np.asarray(patients, dtype=np.int64)
    names = tuple(str(label) for label in range(labels.max() + 1))
    splits = assign(labels, digests, patients, None, seed, names).splits
    return Cohort(no_pixels, np.arange(len(labels)), digests, labels, splits, patients, names, "none")


def simple(count, classes=2):
    return cohort_of(np.arange(count) % classes, range(count), range(count))


@st.composite
def cohorts(draw):
    """Cohorts with patients of several images, copies of images, and labels that differ inside a patient."""
    size = draw(st.integers(20, 60))
    labels = draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    images = draw(st.lists(st.integers(0, 200), min_size=size, max_size=size))
    patients = draw(st.lists(st.integers(0, 100), min_size=size, max_size=size))
    own = range(24)
    return cohort_of(
        [*labels, *(label % 3 for label in own)],
        [*images, *(1000 + image for image in own)],
        [*patients, *(1000 + patient for patient in own)],
    )


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cohorts(), st.sampled_from(SPECS), st.integers(1, 12), st.integers(0, 3))
def test_the_laws_of_a_partition(cohort, text, sites, seed):
    with tempfile.TemporaryDirectory() as folder:
        made = partition(cohort, None, parse_spec(text), sites, seed, Path(folder))
        again = partition(cohort, None, parse_spec(text), sites, seed, Path(folder))  # from the cache
    with tempfile.TemporaryDirectory() as folder:
        afresh = partition(cohort, None, parse_spec(text), sites, seed, Path(folder))
    assert sorted(np.concatenate(list(made.values())).tolist()) == list(range(len(cohort)))
    assert list(made) == sorted(made) and len(made) == sites
    unit = units(cohort.patients, cohort.digests)
    assert sum(len(np.unique(unit[indices])) for indices in made.values()) == len(np.unique(unit))
    for name, indices in made.items():
        assert (cohort.splits[indices] == TRAIN).any()
        assert indices.dtype == np.int64 and (np.diff(indices) > 0).all()
        assert np.array_equal(indices, again[name]) and np.array_equal(indices, afresh[name])


@settings(max_examples=15, deadline=None)
@given(cohorts(), st.integers(0, 3))
def test_natural_sites_are_taken_as_named_and_units_go_to_the_site_of_most(cohort, seed):
    unit = units(cohort.patients, cohort.digests)
    natural = tuple(("north", "south")[number % 2] for number in unit)
    made = partition(cohort, natural, Spec("natural"), 99, seed, Path("/nowhere"))
    assert list(made) == ["north", "south"]
    for name, indices in made.items():
        assert {natural[index] for index in indices} == {name}


def test_a_patient_at_two_natural_sites_stays_whole_at_the_one_with_more_images():
    cohort = cohort_of([0] * 8 + [1] * 8, range(16), [0, 0, 0, *range(3, 16)])
    natural = ["b", "b", "a", *"ab" * 6, "a"]
    made = partition(cohort, natural, Spec("natural"), 2, 0, Path("/nowhere"))
    assert {0, 1, 2} <= set(made["b"].tolist())


def test_natural_without_named_sites_says_which_data_name_them(tmp_path):
    with pytest.raises(ConfigError, match=r"phantoms.*manifest\.csv.*\.npz"):
        partition(simple(20), None, Spec("natural"), 2, 0, tmp_path)


def test_a_natural_site_without_training_examples_is_named(tmp_path):
    cohort = simple(40)
    natural = np.full(40, "large")
    natural[int(cohort.indices("test")[0])] = "tiny"
    with pytest.raises(DataError, match="'tiny'"):
        partition(cohort, natural, Spec("natural"), 2, 0, tmp_path)


@pytest.mark.slow
def test_names_are_padded_so_that_text_order_is_number_order(tmp_path):
    assert list(partition(simple(40), None, Spec("iid"), 9, 0, tmp_path))[::8] == ["site-1", "site-9"]
    assert list(partition(simple(40), None, Spec("iid"), 10, 0, tmp_path))[::9] == ["site-01", "site-10"]


def test_iid_sites_have_equal_sizes_and_the_label_mix_of_the_pool_in_each_split(tmp_path):
    cohort = cohort_of([0] * 600 + [1] * 300 + [2] * 100, range(1000), range(1000))
    for indices in partition(cohort, None, Spec("iid"), 5, 0, tmp_path).values():
        assert len(indices) == 200
        site = cohort.subset(indices)
        for split, share in (("train", 0.7), ("validation", 0.15), ("test", 0.15)):
            expected = np.array([120, 60, 20]) * share
            assert (np.abs(site.support(split) - expected) <= 2).all()


def mixes(cohort, made, split):
    """Return the share of each label at each site: (sites, labels)."""
    counts = np.array([cohort.subset(indices).support(split) for indices in made.values()], dtype=float)
    return counts / counts.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("text", ["dirichlet:0.5", "shards:2", "quantity:0.5"])
def test_validation_and_test_have_the_label_mix_of_their_own_training(tmp_path, text):
    cohort = simple(6000, classes=3)
    made = partition(cohort, None, parse_spec(text), 5, 3, tmp_path)
    large = {name: indices for name, indices in made.items() if len(indices) > 300}
    training = mixes(cohort, large, "train")
    for split in ("validation", "test"):
        assert np.abs(mixes(cohort, large, split) - training).max() < 0.05


@pytest.mark.slow
def test_dirichlet_sites_differ_more_the_smaller_the_concentration(tmp_path):
    cohort = simple(800, classes=4)
    spread = []
    for text in ("dirichlet:0.1", "dirichlet:1", "dirichlet:100"):
        draws = [partition(cohort, None, parse_spec(text), 5, seed, tmp_path) for seed in range(5)]
        spread.append(np.mean([mixes(cohort, made, "train").std(axis=0).mean() for made in draws]))
    assert spread[0] > 1.5 * spread[1] > 6 * spread[2]


def test_shards_give_each_site_as_many_runs_of_labels_as_asked(tmp_path):
    cohort = simple(1000, classes=10)
    made = partition(cohort, None, Spec("shards", 2), 5, 0, tmp_path)
    for indices in made.values():
        assert len(indices) == 200
        assert np.count_nonzero(np.bincount(cohort.labels[indices])) == 2


def test_shards_that_do_not_divide_the_pool_differ_by_one_unit_a_shard(tmp_path):
    made = partition(simple(103, classes=4), None, Spec("shards", 3), 5, 0, tmp_path)
    sizes = [len(indices) for indices in made.values()]
    assert sum(sizes) == 103 and min(sizes) >= 18 and max(sizes) <= 21


def test_quantity_sites_differ_in_size_and_not_in_labels(tmp_path):
    cohort = simple(3000)
    made = partition(cohort, None, Spec("quantity", 0.5), 5, 0, tmp_path)
    sizes = sorted(len(indices) for indices in made.values())
    assert sizes[-1] > 3 * sizes[0]
    large = {name: indices for name, indices in made.items() if len(indices) > 100}
    assert np.abs(mixes(cohort, large, "train") - 0.5).max() < 0.05


def test_another_seed_draws_another_partition(tmp_path):
    cohort = simple(200)
    for text in ("iid", "dirichlet:0.5", "shards:2", "quantity:0.5"):
        first, second = (partition(cohort, None, parse_spec(text), 4, seed, tmp_path) for seed in (0, 1))
        assert any(not np.array_equal(first[name], second[name]) for name in first)


def test_one_training_unit_a_site_is_enough_and_fewer_are_refused(tmp_path):
    cohort = simple(20)
    training = len(cohort.indices("train"))
    made = partition(cohort, None, Spec("dirichlet", 0.01), training, 0, tmp_path)
    assert all((cohort.splits[indices] == TRAIN).sum() == 1 for indices in made.values())
    with pytest.raises(DataError, match=f"have {training}"):
        partition(cohort, None, Spec("dirichlet", 0.01), training + 1, 0, tmp_path)


def test_more_shards_than_units_are_refused(tmp_path):
    with pytest.raises(DataError, match="needs 60"):
        partition(simple(50), None, Spec("shards", 12), 5, 0, tmp_path)


def test_fewer_than_one_site_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="at least 1"):
        partition(simple(20), None, Spec("iid"), 0, 0, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["iid", "shards:2", "dirichlet:0.5"])
def test_a_thousand_sites_of_five_images_all_train(tmp_path, text):
    cohort = simple(5000)
    made = partition(cohort, None, parse_spec(text), 1000, 0, tmp_path)
    assert min((cohort.splits[indices] == TRAIN).sum() for indices in made.values()) >= 1


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "pickle"])
def test_a_damaged_cache_is_drawn_again(tmp_path, damage):
    cohort = simple(60)
    made = partition(cohort, None, Spec("dirichlet", 0.5), 4, 0, tmp_path)
    (path,) = (tmp_path / "partitions").iterdir()
    whole = path.read_bytes()
    flipped = bytes([*whole[:200], whole[200] ^ 1, *whole[201:]])
    damaged = {"cut": whole[:-40], "flip": flipped, "empty": b"", "pickle": b"\x80\x04N."}[damage]
    path.write_bytes(damaged)
    again = partition(cohort, None, Spec("dirichlet", 0.5), 4, 0, tmp_path)
    assert all(np.array_equal(made[name], again[name]) for name in made)
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "partitions").write_text("in the way")
    with pytest.raises(CacheError, match="cannot write"):
        partition(simple(60), None, Spec("iid"), 4, 0, tmp_path)


@pytest.mark.slow
def test_a_partition_from_the_cache_imports_no_partitioner(tmp_path):
    code = (
        "import sys; sys.path.insert(0, '.'); from pathlib import Path\n"
        "import numpy as np; from client.cohort import Cohort; from simulations.partition import Spec, partition\n"
        "n = 40; digests = np.arange(n * 32).reshape(n, 32).astype(np.uint8); digests[:, 0] = np.arange(n)\n"
        "splits = (np.arange(n) % 3).astype(np.int8)\n"
        "cohort = Cohort(None, np.arange(n), digests, np.arange(n) % 2, splits, np.arange(n), ('a', 'b'), '')\n"
        "made = partition(cohort, None, Spec('iid'), 4, 0, Path(sys.argv[1]))\n"
        "sys.stdout.write(f\"{'flwr_datasets' in sys.modules} {[v.tolist() for v in made.values()]}\")\n"
    )
    root = Path(__file__).parents[1]
    first, second = (
        subprocess.run([sys.executable, "-c", code, tmp_path], cwd=root, capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    assert first.stdout.startswith("True") and second.stdout.startswith("False")
    assert first.stdout.split(" ", 1)[1] == second.stdout.split(" ", 1)[1]
    assert first.stderr == ""


def test_nothing_reaches_the_network(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for text in SPECS:
        partition(simple(60), None, parse_spec(text), 4, 0, tmp_path)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("iid", Spec("iid")),
        ("natural", Spec("natural")),
        ("dirichlet:0.5", Spec("dirichlet", 0.5)),
        ("quantity:2", Spec("quantity", 2.0)),
        ("shards:3", Spec("shards", 3.0)),
    ],
)
def test_specs_are_read_and_written(text, spec):
    assert parse_spec(text) == spec
    assert str(spec) == text


@settings(deadline=None)
@given(st.sampled_from(["dirichlet", "quantity"]), st.floats(1e-12, 1e6))
def test_a_concentration_survives_being_written(kind, value):
    assert parse_spec(str(Spec(kind, value))).value == value


@pytest.mark.parametrize(
    "text",
    [
        *("", "iid:", "iid:3", "natural:x", "dirichlet", "dirichlet:", "dirichlet:0", "dirichlet:-1", "dirichlet:nan"),
        *(
            "dirichlet:inf",
            "dirichlet:1e7",
            "dirichlet:x",
            "quantity:0",
            "shards",
            "shards:0",
            "shards:-1",
            "shards:2.5",
        ),
        *("shards:nan", "shards:²", "shards:" + "9" * 5000, "Dirichlet:0.5", "random"),
    ],
)
def test_bad_specs_are_refused(text):
    with pytest.raises(ConfigError):
        parse_spec(text)


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'dirichlet:A'"):
        parse_spec("dirichlett:0.5")


# Several labels an image


def several(count, seed=0):
    """Return a cohort of two images a patient, with a frequent and a rare finding."""
    stream = np.random.default_rng(seed)
    labels = (stream.random((count, 2)) < (0.5, 0.15)).astype(np.float32)
    labels[stream.random((count, 2)) < 0.1] = np.nan
    digests = np.frombuffer(stream.bytes(32 * count), np.uint8).reshape(-1, 32)
    patients = np.arange(count) // 2
    splits = assign(labels, digests, patients, None, seed, ("a", "b")).splits
    return Cohort(no_pixels, np.arange(count), digests, labels, splits, patients, ("a", "b"), "none")


@pytest.mark.slow
@pytest.mark.parametrize("text", SPECS)
def test_several_labels_are_dealt_by_the_same_laws(tmp_path, text):
    cohort = several(160)
    made = partition(cohort, None, parse_spec(text), 4, 0, tmp_path)
    again = partition(cohort, None, parse_spec(text), 4, 0, tmp_path / "afresh")
    assert sorted(np.concatenate(list(made.values())).tolist()) == list(range(160))
    assert sum(len(np.unique(cohort.patients[indices])) for indices in made.values()) == 80
    for name, indices in made.items():
        assert (cohort.splits[indices] == TRAIN).any()
        assert np.array_equal(indices, again[name])


def test_shards_of_several_labels_are_cut_by_the_rarest_finding(tmp_path):
    cohort = several(400)
    made = partition(cohort, None, parse_spec("shards:1"), 4, 0, tmp_path)
    shares = sorted(float((cohort.labels[indices, 1] == 1).mean()) for indices in made.values())
    assert shares[0] == 0 and shares[-1] > 0.3

"""Which hospital holds which examples: one pool of public data becomes the sites of a simulated federation.

Units (a patient, or copies of one image: see `simulations.splits`) are dealt whole. Before they are dealt they are put
into an order in which every stretch has its share of each label and each split, so that a site's validation and test
examples have the label mix of its training examples. The drawing itself is done by the partitioners of flwr-datasets.
Of several labels an image a unit stands for one: the rarest that is present in any of its images, or for none
(`simulations.splits.strata`); so `dirichlet` and `shards` skew sites by their rarest findings.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.cohort import Cohort
from common.errors import CacheError, ConfigError, DataError, unknown_value
from common.files import write_atomic
from common.seeds import derive, numpy_stream
from simulations.splits import TRAIN, rank_within, strata, unit_keys, unit_labels, units

VERSION = 1
"""Part of every cache key: raise it when the same arguments give another partition."""

FORMS = {"iid": "iid", "dirichlet": "dirichlet:A", "shards": "shards:K", "quantity": "quantity:A", "natural": "natural"}

MAX_CONCENTRATION = 1e6  # beyond it the shares are equal to six digits


@dataclass(frozen=True)
class Spec:
    """How the pool is divided."""

    kind: str  # a key of FORMS
    value: float = 0.0  # concentration A, or shards a site K; 0 where the kind takes none

    def __str__(self) -> str:
        """Return the text that `parse_spec` reads."""
        return f"{self.kind}:{self.value!r}".removesuffix(".0") if self.value else self.kind


@dataclass(frozen=True)
class _Units:
    """The pool as U units that are dealt whole."""

    of: NDArray[np.int64]  # (N,) unit of each example
    labels: NDArray[np.int64]  # (U,) by what each is dealt
    splits: NDArray[np.int8]  # (U,) training if any of its examples trains
    keys: NDArray[np.uint64]  # (U,) pseudo-random, from the images and the seed


def parse_spec(text: str) -> Spec:
    """Read `iid`, `natural`, `dirichlet:A`, `quantity:A` (0 < A <= 1e6) or `shards:K` (whole, K >= 1).

    Raises:
        ConfigError: an unknown kind, or a number that is missing, not wanted or out of range.

    Examples:
        >>> parse_spec("dirichlet:0.5")
        Spec(kind='dirichlet', value=0.5)
    """
    kind, colon, number = text.partition(":")
    if kind not in FORMS:
        unknown_value("--partition", text, list(FORMS.values()))
    if kind in ("iid", "natural"):
        if colon:
            raise ConfigError(f"--partition: got {text!r}, expected {kind!r} without a number")
        return Spec(kind)
    return Spec(kind, _shards(text, number) if kind == "shards" else _concentration(text, kind, number))


def partition(
    cohort: Cohort, natural: Sequence[str] | None, spec: Spec, sites: int, seed: int, cache: Path
) -> dict[str, NDArray[np.int64]]:
    """Return the examples of each site: name -> ascending indices into the cohort, each example in exactly one site.

    No unit is divided between sites, and each site has at least one training example; where the draw gives a site
    none, it gets a unit of the site that has most. A site may lack a label.

    Args:
        cohort: the whole pool, splits assigned.
        natural: the site that the data name for each example, or None.
        spec: how to divide.
        sites: number of sites, at least 1; `natural` ignores it and takes the names of the data. A unit that the data
            put at several natural sites goes to the one with most of its examples.
        seed: the run's seed.
        cache: folder where drawn partitions are kept, so that a repeated run needs no partitioner.

    Raises:
        ConfigError: fewer than one site, or `natural` on data that name no sites.
        DataError: fewer training units than sites, or fewer units than shards.
        CacheError: the cache folder cannot be written.
    """
    if spec.kind == "natural":
        return _natural(cohort, natural)
    if sites < 1:
        raise ConfigError(f"--sites: got {sites}, expected at least 1")
    pool = _pool(cohort, seed)
    _require_enough(pool, spec, sites)
    path = cache / "partitions" / f"{_cache_key(pool, spec, sites, seed)}.npy"
    site = _cached(path)
    if site is None:
        site = _repaired(_draw(pool, spec, sites, seed), pool, sites)
        _store(path, site)
    width = len(str(sites))
    return _by_site([f"site-{number:0{width}d}" for number in range(1, sites + 1)], site[pool.of])


def _concentration(text: str, kind: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 < value <= MAX_CONCENTRATION:
        raise ConfigError(f"--partition: got {text!r}, expected {kind}:A with 0 < A <= {MAX_CONCENTRATION:g}")
    return value


def _shards(text: str, number: str) -> float:
    if not (number.isascii() and number.isdigit() and len(number) <= 12 and int(number) > 0):
        raise ConfigError(f"--partition: got {text!r}, expected shards:K with K a whole number from 1")
    return float(number)


def _by_site(names: Sequence[str], site: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Group the example indices by site number: one sort for all sites."""
    order = np.argsort(site, kind="stable")
    ends = np.cumsum(np.bincount(site, minlength=len(names)))[:-1]
    return dict(zip(names, np.split(order, ends), strict=True))


def _natural(cohort: Cohort, natural: Sequence[str] | None) -> dict[str, NDArray[np.int64]]:
    if natural is None:
        raise ConfigError(
            "--partition: got 'natural', but these data name no sites; phantoms, a manifest.csv with a column 'site' "
            "and a flat .npz with an array 'site' do: use one of them, or iid or dirichlet:0.5"
        )
    names, number = np.unique(np.asarray(natural, dtype=np.str_), return_inverse=True)
    unit = units(cohort.patients, cohort.digests)
    site = unit_labels(unit, number.astype(np.int64))[unit]
    trained = np.bincount(site[cohort.splits == TRAIN], minlength=len(names))
    if not trained.all():
        name = str(names[int(trained.argmin())])
        raise DataError(f"--partition: natural site {name!r} has no training example left: merge it, or leave it out")
    return _by_site([str(name) for name in names], site)


def _pool(cohort: Cohort, seed: int) -> _Units:
    of = units(cohort.patients, cohort.digests)
    labels = strata(of, cohort.labels)
    splits = np.full(len(labels), np.iinfo(np.int8).max, dtype=np.int8)
    np.minimum.at(splits, of, cohort.splits)
    return _Units(of, labels, splits, unit_keys(of, cohort.digests, derive(seed, "partition", "units")))


def _require_enough(pool: _Units, spec: Spec, sites: int) -> None:
    training = int((pool.splits == TRAIN).sum())
    if training < sites:
        raise DataError(
            f"--sites: {sites} sites need as many patients (or distinct images where patients are unknown) in "
            f"training; these data have {training}: ask for fewer sites"
        )
    shards = int(spec.value) * sites
    if spec.kind == "shards" and len(pool.labels) < shards:
        raise DataError(
            f"--partition: {spec} at {sites} sites needs {shards} patients (or distinct images where patients are "
            f"unknown); these data have {len(pool.labels)}: ask for fewer shards"
        )


def _balanced_order(pool: _Units, seed: int) -> NDArray[np.int64]:
    """Return the units (U,) in an order whose every stretch holds its share of each label and each split.

    The i-th of the n units of one label and split stands at (i + u) / n, with one random u in [0, 1) for all of them:
    systematic sampling, which keeps the counts of any stretch within about one of their expectation.
    """
    groups = np.unique(pool.labels * 3 + pool.splits, return_inverse=True)[1].astype(np.int64)
    rank, size = rank_within(groups, pool.keys)
    start = numpy_stream(seed, "partition", "order").random(int(groups.max()) + 1)
    return np.lexsort((pool.keys, (rank + start[groups]) / size)).astype(np.int64)


def _draw(pool: _Units, spec: Spec, sites: int, seed: int) -> NDArray[np.int64]:
    """Return the site of each unit, (U,), as flwr-datasets draws it; sites may come out empty."""
    from flwr_datasets import partitioner  # takes seconds to import, and only the first run of its kind needs it

    order = _balanced_order(pool, seed)
    drawn = derive(seed, "partition", spec.kind)
    if spec.kind == "shards":
        return _draw_shards(pool, order, int(spec.value), sites, drawn)
    if spec.kind == "iid":
        chosen = partitioner.IidPartitioner(sites)
    elif spec.kind == "quantity":
        chosen = partitioner.SizePartitioner(_sizes(len(order), spec.value, sites, drawn))
    else:  # min_partition_size 0: `_repaired` fills empty sites, drawing again ends in an error for many small sites
        chosen = partitioner.DirichletPartitioner(
            sites, "label", spec.value, min_partition_size=0, self_balancing=False, shuffle=False, seed=drawn
        )
    return _deal(chosen, order, pool.labels[order], sites)


def _draw_shards(pool: _Units, order: NDArray[np.int64], each: int, sites: int, drawn: int) -> NDArray[np.int64]:
    """Cut the units, sorted by label, into equal shards (sizes differ by one at most) and deal the shards."""
    from flwr_datasets import partitioner

    count = each * sites
    shards = np.arange(count)
    chosen = partitioner.ShardPartitioner(
        sites, "label", num_shards_per_partition=each, shard_size=1, shuffle=False, seed=drawn
    )
    shard_site = _deal(chosen, shards, shards, sites)
    by_label = order[np.argsort(pool.labels[order], kind="stable")]
    site = np.empty(len(order), dtype=np.int64)
    site[by_label] = shard_site[np.arange(len(order)) * count // len(order)]
    return site


def _sizes(total: int, concentration: float, sites: int, drawn: int) -> list[int]:
    """Return site sizes (whole, at least 1, summing to `total`) in Dirichlet(concentration) proportions."""
    shares = np.random.default_rng(drawn).dirichlet(np.full(sites, concentration))
    edges = np.floor(np.cumsum(shares) / shares.sum() * (total - sites) + 0.5).astype(np.int64)
    edges[-1] = total - sites
    return [int(size) + 1 for size in np.diff(edges, prepend=0)]


def _deal(chosen: Any, rows: NDArray[np.int64], labels: NDArray[np.int64], sites: int) -> NDArray[np.int64]:
    """Let a flwr-datasets partitioner divide `rows` (a permutation of 0..n-1), and return the site of each: (n,)."""
    import datasets
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    datasets.disable_progress_bars()
    site = np.full(len(rows), -1, dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # datasets calls pyarrow's sort in its old form
        chosen.dataset = datasets.Dataset.from_dict({"label": labels, "row": rows}).with_format("numpy")
        for number in range(sites):
            site[np.asarray(chosen.load_partition(number)["row"][:], dtype=np.int64)] = number
    return site


def _repaired(site: NDArray[np.int64], pool: _Units, sites: int) -> NDArray[np.int64]:
    """Give each site without a training unit one of the site that has most; of those the one with the lowest key."""
    site = site.copy()
    training = np.flatnonzero(pool.splits == TRAIN)
    training = training[np.argsort(pool.keys[training], kind="stable")]
    counts = np.bincount(site[training], minlength=sites)
    for needy in np.flatnonzero(counts == 0):
        donor = int(counts.argmax())
        site[training[np.argmax(site[training] == donor)]] = needy
        counts[donor] -= 1
        counts[needy] += 1
    return site


def _cache_key(pool: _Units, spec: Spec, sites: int, seed: int) -> str:
    key = hashlib.sha256(json.dumps([VERSION, spec.kind, spec.value, sites, seed, len(pool.labels)]).encode())
    for array in (pool.of, pool.labels, pool.splits, pool.keys):
        key.update(array.tobytes())
    return key.hexdigest()


def _cached(path: Path) -> NDArray[np.int64] | None:
    """Return the stored site of each unit, or None where there is none or its checksum does not fit."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    body, checksum = content[:-32], content[-32:]
    if hashlib.sha256(body).digest() != checksum:
        return None
    stored: NDArray[np.int64] = np.load(io.BytesIO(body), allow_pickle=False)
    return stored


def _store(path: Path, site: NDArray[np.int64]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, site, allow_pickle=False)
    body = buffer.getvalue()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, body + hashlib.sha256(body).digest())
    except OSError as error:
        raise CacheError(f"cache: cannot write a partition: {error.strerror}; choose another cache folder") from error

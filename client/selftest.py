"""`consilium site selftest`: whether the guarantees of private training hold on this machine, tried on drawn data.

A site with a few drawn patients takes part in a run of its own: its model, its ledger and its source of noise are those
that real runs use. Nothing of the hospital's is read or written.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from client import clipping, private_training
from client.cohort import SPLITS, Cohort
from client.features import Features
from client.guard import Guard
from client.ledger import Ledger
from client.memory import Memory
from client.noise import Noise
from client.outbox import Outbox
from client.site import Site
from client.workshop import Bench, Workshop, choose_device
from common import checkpoint, codec, model, parameters
from common.messages import Describe, Freeze, InstallTrunk, Prepare, Train, Trained
from common.model import norm_statistics
from common.presets import PRESETS, preprocessing_id
from common.run_config import RunConfig

BACKBONE = "test_efficientnet"

CASES = ((BACKBONE, "head"), (BACKBONE, "stages:1"), ("test_resnet", "stages:1"), ("test_convnext", "stages:1"))
"""Small models with the layers of large ones: depthwise and grouped convolutions, running norms, permuted maps."""

SIDE, PATIENTS, LABELS = 32, 24, ("absent", "present")
SIGMA, CLIP, DELTA = 1.5, 1.0, 1e-3
_NO_STORE: Any = None  # features that are in memory are not looked for elsewhere

FALSE_ALARM = 6.0
"""Standard deviations by which the measured noise may differ: once in 10⁹ tries, if all is well."""


@dataclass(frozen=True)
class Check:
    """One thing that was tried."""

    name: str
    passed: bool
    said: str  # what was measured, in a sentence


def run(device: str) -> tuple[Check, ...]:
    """Try everything and return what came of it; nothing that goes wrong stops the rest.

    Args:
        device: auto, cpu or cuda.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    place = choose_device(device)
    checks: dict[str, Callable[[], str]] = {
        "gradients": lambda: gradients(place),
        "clipping": lambda: bound(place),
        "noise": lambda: noise_level(place),
        "randomness": lambda: two_runs(place),
        "norms": lambda: norms(place),
        "ledger": lambda: replay(place),
    }
    return tuple(_tried(name, check) for name, check in checks.items())


class Failed(Exception):
    """A guarantee does not hold; the text says what was measured."""


def _tried(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except Failed as error:
        return Check(name, False, str(error))
    except Exception as error:  # noqa: BLE001  whatever goes wrong is a guarantee that was not shown; the data are drawn
        return Check(name, False, f"{type(error).__name__}: {error}")


def gradients(device: str) -> str:
    """Compare the sum of clipped gradients with that of single records, one after another."""
    worst = 0.0
    for backbone, cut in CASES:
        upper = model.skeleton(drawn_run(backbone, cut)).upper.to(device)
        worst = max(worst, clipping.self_test(upper, upper.layout.width, len(LABELS), multi_label=False, clip=CLIP))
    if not worst <= clipping.MOST_ERROR:
        raise Failed(f"clipped gradients are off by {worst:.1e} of what single records give")
    return f"clipped gradients of {len(CASES)} models are those of single records, to {worst:.0e}"


def bound(device: str) -> str:
    """Take a step on one patient without noise: the update may be as long as C and no longer."""
    longest = max(_moved(backbone, cut, device) for backbone, cut in CASES)
    if not 0 < longest <= CLIP * (1 + 1e-4):
        raise Failed(f"one patient moved the weights by {longest:.4f}, allowed {CLIP}")
    return f"one patient moves the weights by {longest:.4f} at most, allowed {CLIP}"


def _moved(backbone: str, cut: str, device: str) -> float:
    """Return the norm of what one step on one drawn patient changes, noise off and the loss beyond all bounds."""
    settled = drawn_run(backbone, cut)
    upper = model.skeleton(settled).upper.to(device)
    rows = torch.randn(1, 1, upper.layout.width, generator=torch.Generator().manual_seed(0)).to(device)
    before = model.trainable_values(upper)
    private_training.fit(
        upper,
        Features(rows, _NO_STORE, np.zeros((1, 1), np.int64), torch.device(device)),
        torch.zeros(1, dtype=torch.int64, device=device),
        np.zeros(1, np.int64),
        settled.training,
        mechanism=private_training.Mechanism(0.0, 1.0, CLIP),
        round_number=1,
        class_weights=torch.full((len(LABELS),), 1e4, device=device),
        patients=np.zeros(1, np.int64),
        noise=Noise(),
    )
    return parameters.norm(parameters.subtract(model.trainable_values(upper), before))


def noise_level(device: str) -> str:
    """Measure the noise on what would be sent: what two rounds from the same weights differ by."""
    with _stage(device) as stage:
        patients = len(stage.site.cohort.indices("train"))
        difference = (stage.train(1) - stage.train(2)) * patients
    expected = 2 * (SIGMA * CLIP) ** 2
    ratio = float(np.mean(np.square(difference))) / expected
    if not abs(ratio - 1) < FALSE_ALARM * math.sqrt(2 / difference.size):
        raise Failed(f"the noise on the update has {ratio:.3f} of the variance that is accounted for")
    return (
        f"the noise on the update has {ratio:.3f} of the variance that is accounted for, over {difference.size} values"
    )


def two_runs(device: str) -> str:
    """Run the same configuration twice: the noise must not be the same."""
    found: list[NDArray[np.float32]] = []
    for _ in range(2):
        with _stage(device) as stage:
            found.append(stage.train(1))
    same = float(np.mean(found[0] == found[1]))
    if same > 0.01:
        raise Failed(f"two runs of one configuration send the same values in {same:.0%} of all places")
    return "two runs of one configuration differ"


def norms(device: str) -> str:
    """Train, and compare all running statistics before and after."""
    with _stage(device) as stage:
        upper = stage.bench.upper
        before = norm_statistics(upper)
        stage.train(1)
        inside = [norm.training for norm in upper.train().frozen_norms()]
        upper.eval()
        if norm_statistics(upper) != before or any(inside):
            raise Failed("norms with running statistics learnt from the batch")
    return f"{len(inside)} norms with running statistics stayed as they were"


def replay(device: str) -> str:
    """Compare the ledger with the rounds that were made, and its epsilon with that of another accountant."""
    rounds = 3
    with _stage(device) as stage:
        hashes = [hashlib.sha256(stage.train(number).tobytes()).hexdigest() for number in range(1, rounds + 1)]
        told = Ledger.read(stage.ledger, stage.owner)
        (spent,) = told.runs()
        found = told.epsilon(DELTA)
    if (spent.rounds, spent.lost, len(set(hashes))) != (rounds, 0, rounds):
        raise Failed(f"the ledger has {spent.rounds} rounds, {spent.lost} of them lost; {rounds} were made")
    expected = _replayed(rounds)
    if not math.isclose(found, expected, rel_tol=1e-6):
        raise Failed(f"the ledger comes to epsilon {found:.6f}, another accountant to {expected:.6f}")
    return f"the ledger has all {rounds} rounds and comes to epsilon {found:.4f}, as another accountant does"


def _replayed(rounds: int) -> float:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    for _ in range(rounds):
        accountant.step(noise_multiplier=SIGMA, sample_rate=1.0)
    return float(accountant.get_epsilon(DELTA))


# The stage


@dataclass(frozen=True)
class _Stage:
    """A site of drawn patients in a run of its own."""

    run: RunConfig
    site: Site
    bench: Bench
    weights: NDArray[np.generic]
    ledger: Path
    owner: str

    def train(self, number: int) -> NDArray[np.float32]:
        """Return the update of a round, always from the same weights."""
        edges = np.zeros((1, 0))
        reply = self.site.handle(Train(self.run.fingerprint(), number, self.weights, edges))
        assert isinstance(reply, Trained)  # noqa: S101  or it would have raised
        return np.asarray(reply.weights, np.float32)


@contextmanager
def _stage(device: str) -> Iterator[_Stage]:
    """Bring a site of drawn patients to where round 1 can begin."""
    with tempfile.TemporaryDirectory(prefix="consilium-selftest-") as scratch:
        folder, settled, owner = Path(scratch), drawn_run(BACKBONE, "stages:1"), "5e" * 32
        built = model.skeleton(settled)
        trunk = model.frozen_content(built, settled)
        named = settled.model.model_copy(update={"trunk_sha256": checkpoint.sha256(trunk)})
        settled = settled.model_copy(update={"model": named})
        ledger = folder / "ledger.jsonl"
        guard = Guard(lambda: Ledger.open(ledger, owner), Outbox(folder / "outbox"))
        workshop, cohort = Workshop(folder / "cache", device), drawn_cohort(settled)
        site = Site("selftest", cohort, workshop, Memory.at(folder / "memory", "selftest"), guard=guard)
        width, fingerprint = built.upper.head.linear.in_features, settled.fingerprint()
        site.handle(Describe(settled.to_toml()))
        site.handle(InstallTrunk(fingerprint, named.trunk_sha256, np.frombuffer(trunk, np.uint8)))
        site.handle(Prepare(fingerprint))
        site.handle(Freeze(fingerprint, np.zeros(width, np.float32), np.ones(width, np.float32), np.ones(len(LABELS))))
        bench = workshop.bench(settled, named.trunk_sha256, None, cohort)
        assert bench is not None  # noqa: S101  the trunk is there
        weights = codec.encode(model.trainable_values(built.upper), settled.wire.dtype)
        yield _Stage(settled, site, bench, weights, ledger, owner)


def drawn_run(backbone: str, cut: str) -> RunConfig:
    """Return a private run in which one step of a round sees every patient once, so that noise alone is random."""
    preset = "generic"
    values: dict[str, Any] = {
        "task": {"name": "selftest", "labels": LABELS},
        "data": {"preset": preset, "image_size": SIDE, "views": 1, "preprocessing": _preprocessing(preset)},
        "model": {"backbone": backbone, "weights": "none", "trainable": cut, "init": "zero", "scaling": "stages"},
        "training": {
            "rounds": 3,
            "local_steps": 1,
            "batch_size": 65_536,
            "draw": "patients",
            "optimizer": "sgd",
            "momentum": 0.0,
            "lr": 1.0,
            "schedule": "constant",
            "class_weights": "none",
        },
        "privacy": {"noise_multiplier": SIGMA, "delta": DELTA, "clip": CLIP, "centre": False},
        "sites": {"names": ("selftest",), "quorum": 1},
    }
    return RunConfig.model_validate(values)


def _preprocessing(preset: str) -> str:
    return preprocessing_id(PRESETS[preset], SIDE)


def drawn_cohort(settled: RunConfig) -> Cohort:
    """Return a few patients with one image of noise each."""
    stream = np.random.default_rng(0)
    pixels = stream.integers(0, 256, (PATIENTS, 1, SIDE, SIDE), np.uint8)
    digests = np.stack([np.frombuffer(hashlib.sha256(image.tobytes()).digest(), np.uint8) for image in pixels])
    splits = np.repeat(np.arange(len(SPLITS), dtype=np.int8), [PATIENTS - 8, 4, 4])
    return Cohort(
        source=lambda rows: pixels[rows],
        rows=np.arange(PATIENTS),
        digests=digests,
        labels=np.arange(PATIENTS) % len(LABELS),
        splits=splits,
        patients=np.arange(PATIENTS),
        label_names=LABELS,
        preprocessing=settled.data.preprocessing,
    )

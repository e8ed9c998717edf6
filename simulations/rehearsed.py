"""A hospital of a rehearsal: the site's own processes, over examples that a simulation dealt out.

python -P -m simulations.rehearsed up SITE.TOML        what `consilium site up` runs
python -P -m simulations.rehearsed daemon SITE.TOML    the site's daemon; its cohort lies beside the file
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client import up
from client.cohort import Cohort
from client.site_config import read_site
from common.errors import ConsiliumError
from common.supervisor import supervise

_ARRAYS = ("digests", "labels", "splits", "patients")
_FACTS, _PIXELS = "cohort.npz", "pixels.npy"
_CHUNK = 256


def write(folder: Path, cohort: Cohort) -> None:
    """Write a site's examples with their pixels."""
    facts = {"names": np.array(cohort.label_names), "preprocessing": np.array(cohort.preprocessing)}
    arrays: dict[str, Any] = {name: getattr(cohort, name) for name in _ARRAYS}
    np.savez(folder / _FACTS, allow_pickle=False, **facts, **arrays)
    if not len(cohort):
        raise ValueError("a site without examples")
    one = cohort.pixels(np.zeros(1, np.int64))
    shape = (len(cohort), *one.shape[1:])
    pixels: Any = np.lib.format.open_memmap(folder / _PIXELS, "w+", np.uint8, shape)
    for start in range(0, len(cohort), _CHUNK):
        indices = np.arange(start, min(start + _CHUNK, len(cohort)))
        pixels[indices] = cohort.pixels(indices)
    pixels.flush()


def read(folder: Path) -> Cohort:
    """Return the examples that `write` wrote."""
    pixels: NDArray[np.uint8] = np.load(folder / _PIXELS, mmap_mode="r")
    with np.load(folder / _FACTS, allow_pickle=False) as held:
        return Cohort(
            source=lambda rows: np.asarray(pixels[rows]),
            rows=np.arange(len(pixels)),
            **{name: held[name] for name in _ARRAYS},
            label_names=tuple(str(name) for name in held["names"]),
            preprocessing=str(held["preprocessing"]),
        )


def _up(path: Path) -> None:
    config = read_site(path)
    argv = (sys.executable, "-P", "-m", "simulations.rehearsed", "daemon", str(config.path))
    children = (
        dataclasses.replace(child, argv=argv) if child.name == "daemon" else child for child in up.children(config)
    )
    supervise(tuple(children), up.logs(config))


def _daemon(path: Path) -> None:
    from client import daemon  # takes seconds that the supervisor has no use for

    config = read_site(path)
    if not daemon.serve(config, lambda _progress: read(config.path.parent)):
        sys.stderr.flush()
        os._exit(0)  # as `client.daemon` does, and for its reason


_COMMANDS: dict[str, Callable[[Path], None]] = {"up": _up, "daemon": _daemon}


def main(arguments: list[str]) -> int:
    """Run one of the two."""
    command, path = arguments
    try:
        _COMMANDS[command](Path(path))
    except ConsiliumError as error:
        print(f"consilium: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Whether a site holds a run's trunk already, so that it need not be sent: from an earlier run, a file, or the wheel.

Whatever the place, its SHA-256 decides. A trunk that was carried here by hand goes into `trunks/<SHA-256>.safetensors`.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from client.memory import Memory
from common import checkpoint, model
from common.errors import ConsiliumError
from common.run_config import RunConfig
from common.weights import EMBEDDED_BACKBONE, EMBEDDED_PACKAGE

_log = logging.getLogger("consilium.site")


def take_up(memory: Memory, run: RunConfig, *, wheel: bool, weights: Path | None = None) -> bool:
    """Make the run's trunk the site's, if it is here, and return whether it is.

    Args:
        memory: the site's, where trunks of earlier runs are.
        run: with the hash of its trunk.
        wheel: whether the installed wheel of weights may be looked into.
        weights: a file of pretrained weights that this site has.
    """
    wanted = run.model.trunk_sha256
    if not memory.keeps(wanted):
        content = _made(run, wanted, wheel, weights)
        if content is None:
            return False
        memory.remember_trunk(wanted, content)
    memory.choose_trunk(wanted)
    return True


def _made(run: RunConfig, wanted: str, wheel: bool, weights: Path | None) -> bytes | None:
    """Return the trunk, made from weights that are here; None if none of them give it."""
    sources = ["embedded"] if wheel and _in_wheel(run) else []
    for source in [*sources, *([str(weights)] if weights else [])]:
        content = _frozen(run, source)
        if content is not None and checkpoint.sha256(content) == wanted:
            return content
    return None


def _in_wheel(run: RunConfig) -> bool:
    return run.model.backbone == EMBEDDED_BACKBONE and importlib.util.find_spec(EMBEDDED_PACKAGE) is not None


def _frozen(run: RunConfig, source: str) -> bytes | None:
    """Return the frozen tensors of the run's backbone under other weights; None where they do not fit it."""
    named = run.model_copy(update={"model": run.model.model_copy(update={"weights": source})})
    try:
        return model.frozen_content(model.pretrained(named), named)
    except ConsiliumError as error:
        _log.warning("weights at hand cannot be used for this run: %s", error)
        return None

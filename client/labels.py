"""How a label table is read: placeholder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """How the label table is read."""

    key: str
    label: tuple[str, ...]
    positive: tuple[str, ...]
    uncertain: str
    blank: str
    patient: str | None
    split: str | None
    words: Mapping[str, str]

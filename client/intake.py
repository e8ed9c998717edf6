"""A site's own data: placeholder."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from client.findings import Findings
    from client.site_config import SiteConfig


@dataclass(frozen=True)
class Forgotten:
    """What was taken out."""

    images: int
    files: int


def examine(config: SiteConfig, progress: Callable[[str, int, int], None]) -> Findings:
    """Read everything."""
    raise NotImplementedError


def forget(config: SiteConfig, persons: Set[bytes]) -> Forgotten:
    """Take patients out."""
    raise NotImplementedError

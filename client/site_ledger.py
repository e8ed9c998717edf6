"""The ledger of a real site: where it lies, whose it is, and what the audit trail knows of it."""

from __future__ import annotations

import hmac
from collections.abc import Iterator

from client import audit
from client.ledger import Ledger, Witness
from client.secret import read_secret
from client.site_config import SiteConfig
from common.errors import ConsiliumError

NAME = "ledger.jsonl"


def open_ledger(config: SiteConfig, *, write: bool) -> Ledger:
    """Return the site's ledger, which has to hold what the audit trail recorded of it.

    The ledger's own head shows that its end was cut off; the trail shows as well that both were put back to an earlier
    day. Only a machine that is restored as a whole forgets: note the hash that `consilium site ledger` prints.

    Args:
        config: the site.
        write: whether it is to be written; if not, one that is not there is empty.

    Raises:
        LedgerError: it cannot be used.
        ConfigError: the site's secret is missing or open to others.
    """
    opened = Ledger.open if write else Ledger.read
    return opened(config.state / NAME, owner(config), witnesses=list(_witnesses(config)))


def owner(config: SiteConfig) -> str:
    """Return what stands for the site's patients: 64 hexadecimal digits, made with its secret."""
    return hmac.digest(read_secret(config.secret), b"ledger", "sha256").hex()


def _witnesses(config: SiteConfig) -> Iterator[Witness]:
    """Yield the last head that the audit trail recorded; a trail that does not hold is told of by its own command."""
    entries = audit.latest(config.audit)
    heads = ((entry.facts.get("ledger_entries"), entry.facts.get("ledger_sha256")) for entry in entries)
    try:
        found = next((head for head in heads if None not in head), None)
    except ConsiliumError:
        return
    if found is not None:
        yield int(found[0] or 0), str(found[1])

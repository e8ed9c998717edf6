"""Names of patients, studies and devices as keyed digests: the only form in which they are kept or compared.

Every digest is an HMAC-SHA-256 under a secret that the site made for itself, so a cache, an index or an audit trail
that gets into other hands cannot be searched for a known patient (RFC 2104; FIPS 198-1).
"""

from __future__ import annotations

import hmac
import re
import unicodedata
from dataclasses import dataclass

PLACEHOLDER_PATIENTS = frozenset({"", "0", "ANON", "ANONYMOUS", "ANONYMIZED", "NONE", "UNKNOWN", "NA", "N/A"})
"""PatientIDs that stand for nobody; taken at their word they would make one patient of a whole hospital."""

_BLANKS = re.compile(r"[\s\0]+")
_ZEROS = re.compile(r"^0+(?=.)")


def tidy(text: str) -> str:
    """Return a text without the blanks and NULs around it, its inner blanks single, its characters composed (NFC)."""
    return _BLANKS.sub(" ", unicodedata.normalize("NFC", text)).strip()


def loosely(text: str) -> str:
    """Return a text as a spreadsheet may have left it: without case, and without leading zeros.

    Examples:
        >>> loosely(" 00A12 ") == loosely("a12")
        True
    """
    return _ZEROS.sub("", tidy(text).casefold())


def is_placeholder(patient: str) -> bool:
    """Return whether a PatientID stands for nobody.

    Examples:
        >>> is_placeholder(" anon "), is_placeholder("000"), is_placeholder("4711")
        (True, True, False)
    """
    known = tidy(patient).upper()
    return known in PLACEHOLDER_PATIENTS or not known.strip("0")


@dataclass(frozen=True, repr=False)
class Identity:
    """Makes the digests of one site.

    Args:
        secret: the site's, at least 16 bytes.
    """

    secret: bytes

    def patient(self, issuer: str, patient: str) -> bytes:
        """Return the 32-byte digest of IssuerOfPatientID and PatientID: it decides the patient's split."""
        return self._digest("patient", f"{tidy(issuer)}|{tidy(patient)}")

    def image(self, digest: bytes) -> bytes:
        """Return the 32-byte digest that stands for the patient of an image that names none."""
        return self._digest("image", digest.hex())

    def person(self, patient: str) -> bytes:
        """Return the 16-byte digest of a PatientID without issuer, case and leading zeros: what an opt-out names."""
        return self._digest("person", loosely(patient))[:16]

    def key(self, kind: str, text: str) -> bytes:
        """Return the 16-byte digest of a UID, an AccessionNumber or a path."""
        return self._digest(kind, tidy(text))[:16]

    def loose_key(self, kind: str, text: str) -> bytes:
        """Return the 16-byte digest of the same without case and leading zeros."""
        return self._digest(f"loose {kind}", loosely(text))[:16]

    def file(self, path: str, size: int, changed_ns: int) -> bytes:
        """Return the 32-byte digest of a file as it is now: its path, size and time of change."""
        return self._digest("file", f"{path}|{size}|{changed_ns}")

    def device(self, *names: str) -> bytes:
        """Return the 16-byte digest of what identifies a scanner."""
        return self._digest("device", "|".join(tidy(name) for name in names))[:16]

    def _digest(self, kind: str, text: str) -> bytes:
        return hmac.digest(self.secret, f"{kind}\0{text}".encode(errors="surrogatepass"), "sha256")

"""What a site may be called: the same rule where a hospital writes its name and where the coordinator records it."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

_FORM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def plain(value: str) -> str:
    """Return a name that can be one.

    Raises:
        ValueError: it cannot.

    Examples:
        >>> plain("st-anna")
        'st-anna'
    """
    if not _FORM.fullmatch(value):
        raise ValueError("expected 1 to 63 letters, digits, '.', '_' or '-', the first a letter or a digit")
    return value


Name = Annotated[str, AfterValidator(plain)]

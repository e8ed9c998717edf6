"""What can come of a request to a PACS, other than what was asked for; without a word about what that was."""

from __future__ import annotations


class Missing(Exception):
    """The server has no such thing."""


class Failed(Exception):
    """No usable answer, however often it was asked."""


class Rejected(Exception):
    """The answer is no DICOM file, or larger than allowed."""


class Gone(Exception):
    """The server does not answer any more."""


class TryAgain(Exception):
    """A passing trouble.

    Args:
        silent: the server as a whole gave no answer.
        wait: seconds that it asks for.
    """

    def __init__(self, *, silent: bool, wait: float = 0.0) -> None:
        super().__init__()
        self.silent, self.wait = silent, wait

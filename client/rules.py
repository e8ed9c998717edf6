"""How a hospital says its labels are to be read, and what may be the name of a label.

Label names are the only part of a table that leaves the site: they become names of the federation and stand in reports.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from client.identity import tidy
from client.table import Note
from common.errors import DataError

LEFT_OUT = ""  # as a label: the site does not want these rows, or this column
MAX_LABELS = 512
MAX_NAME = 64  # characters

_HIDING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # control, direction and zero width, surrogate, line ends


@dataclass(frozen=True)
class Rules:
    """How a label table is read; the values come from site.toml or run.toml."""

    key: str = "auto"  # a column, a kind of matching.KINDS, or auto
    label: tuple[str, ...] = ()  # one column of words, or several of 1, 0, -1 and blank; empty: found by itself
    positive: tuple[str, ...] = ()  # words of the one column that mean yes: makes two labels, negative and positive
    uncertain: Literal["ignore", "zeros", "ones", "soft"] = "ignore"  # what -1 means in columns of 1 and 0
    blank: Literal["zeros", "ignore"] = "zeros"  # what a blank means among several columns
    patient: str | None = None  # column to take in place of PatientID
    split: str | None = None  # None: a column called split, if there is one
    words: Mapping[str, str] = field(default_factory=dict)  # local word or column -> label; empty text: left out

    def renamed(self) -> dict[str, str]:
        """Return `words` by the folded local side.

        Raises:
            DataError: a local word stands twice.
        """
        renamed = {fold(local): tidy(label) for local, label in self.words.items()}
        if len(renamed) < len(self.words):
            raise DataError("[data] words: expected each local word once, upper and lower case being equal")
        return renamed


@dataclass(frozen=True, repr=False)
class Said:
    """What is said of each of K things."""

    names: tuple[str, ...]  # L labels
    values: NDArray[np.int64] | NDArray[np.float32]  # (K,) index into names, -1 for none; or (K, L) 1, 0, 0.5, NaN
    conflicts: NDArray[np.bool_]  # (K,) two things are said that exclude each other
    notes: tuple[Note, ...] = ()


def fold(word: str) -> str:
    """Return a word as `words` compares it: blanks tidied, without case."""
    return tidy(word).casefold()


def check_name(label: str, where: str) -> None:
    """Refuse a label whose name could hide something, or is a text rather than a name.

    Raises:
        DataError: control, direction or zero-width characters, or too long.
    """
    if any(unicodedata.category(letter) in _HIDING for letter in label):
        raise DataError(f"{where}: a label with invisible characters - write it anew, or map it in [data] words")
    if len(label) > MAX_NAME:
        raise DataError(
            f"{where}: a label of {len(label)} characters, expected at most {MAX_NAME}"
            " - name another column in [data] label, or map it in [data] words"
        )


def check_count(labels: int, where: str) -> None:
    """Refuse more labels than a classifier has.

    Raises:
        DataError: more than `MAX_LABELS`.
    """
    if labels > MAX_LABELS:
        raise DataError(
            f"{where}: {labels} different labels, expected at most {MAX_LABELS} - name another column in [data] label"
        )


def unknown_words(rules: Rules, known: Mapping[str, str], setting: str = "words") -> tuple[Note, ...]:
    """Return a warning for each local word of the rules that the data does not know.

    Args:
        rules: hold the words.
        known: folded local word -> where it first stands, for a hint that does not show it.
        setting: `words` or `positive`.
    """
    said = rules.words if setting == "words" else rules.positive
    notes = []
    for word in said:
        if fold(word) not in known:
            near = get_close_matches(fold(word), list(known)[:MAX_LABELS], n=1, cutoff=0.75)
            hint = f" (something like it stands in {known[near[0]]})" if near else ""
            notes.append(("unknown_words", f"[data] {setting} names {word!r}, which does not occur{hint}"))
    return tuple(notes)

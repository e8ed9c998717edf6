"""One label for each thing, from one column of words or from the names of folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from client.identity import loosely, tidy
from client.keys import whole_number
from client.marks import NO, UNCERTAIN, YES, mark, uncertain_notes
from client.matching import Match
from client.rules import LEFT_OUT, Rules, Said, check_count, check_name, fold, unknown_words
from client.table import Note, Table

NEGATIVE, POSITIVE = "negative", "positive"


@dataclass(frozen=True, repr=False)
class Vocabulary:
    """What local words mean, in the labels of the federation."""

    labels: Mapping[str, str]  # local word -> label, or LEFT_OUT
    always: frozenset[str]  # labels that exist even where no file has them
    places: Mapping[str, str]  # local word -> where it first stands, for messages
    notes: tuple[Note, ...] = ()


def vocabulary(words: Mapping[str, str], rules: Rules, marks: bool = False) -> Vocabulary:
    """Return what each local word means: what `words` says; else positive or negative, where these are asked for.

    Args:
        words: local word, not blank -> where it first stands.
        rules: of the site.
        marks: the words are 1 and 0.
    """
    renamed = rules.renamed()
    positive = {fold(word) for word in rules.positive}
    uncertain = {"zeros": NEGATIVE, "ones": POSITIVE}.get(rules.uncertain, LEFT_OUT)
    meaning = {NO: NEGATIVE, YES: POSITIVE, UNCERTAIN: uncertain}

    def label(word: str) -> str:
        local = fold(word)
        if local in renamed:
            return renamed[local]
        name = tidy(word)
        if positive:
            name = POSITIVE if local in positive else NEGATIVE
        elif marks:
            name = meaning[mark(word) or NO]
        return renamed.get(name, name)

    labels = {word: label(word) for word in words}
    pair = {renamed.get(name, name) for name in (NEGATIVE, POSITIVE)} if positive or marks else set()
    known = {fold(word): place for word, place in words.items()}
    notes = unknown_words(rules, known | dict.fromkeys(map(fold, pair and (NEGATIVE, POSITIVE)), ""))
    notes += unknown_words(rules, known, "positive")
    always = pair - {LEFT_OUT} if pair & {*labels.values()} else set()
    return Vocabulary(labels, frozenset(always), words, notes)


def read_words(table: Table, place: int, rules: Rules, match: Match, marks: bool = False) -> Said:
    """Return what one column says of each key.

    Rows of one key are joined: a blank gives way to a word, two different labels are a conflict.

    Raises:
        DataError: a label that cannot be named, or too many.
    """
    cells = table.columns[place]
    where = f"{table.where}, {table.shown(place)}"
    firsts: dict[str, str] = {}
    for line, cell in zip(table.lines, cells, strict=True):
        if cell and cell not in firsts:
            firsts[cell] = f"{where}, line {line}"
    known = vocabulary(firsts, rules, marks)
    names, numbers = _numbered(cells, known)
    values, conflicts = _joined(numbers, match)
    left_out = sum(known.labels[cell] == LEFT_OUT for cell in cells if cell)
    notes = known.notes + (uncertain_notes(table, place, rules) if marks else ())
    if left_out:
        notes += (("ignored_rows", f"{where}: {left_out} rows are left out, by [data] words or uncertain"),)
    return said(names, values, conflicts, match.matched, known, where, notes)


def said(
    names: Sequence[str],
    values: NDArray[np.int64],
    conflicts: NDArray[np.bool_],
    counts: NDArray[np.bool_],
    known: Vocabulary,
    where: str,
    notes: tuple[Note, ...],
) -> Said:
    """Return values with only the labels that something has, checked.

    Args:
        names: all labels, in text order.
        values: (K,) index into `names`, -1 for none.
        conflicts: (K,).
        counts: (K,) whether a thing has a file.
        known: what words mean.
        where: the column.
        notes: so far.
    """
    used = {names[value] for value in np.unique(values[counts & (values >= 0)])} | known.always
    check_count(len(used), where)
    for word, label in known.labels.items():
        if label in used:
            check_name(label, known.places[word])
    kept = tuple(name for name in names if name in used)
    moved = np.array([kept.index(name) if name in used else -1 for name in names] + [-1], np.int64)
    return Said(kept, moved[values], conflicts, notes + _similar(kept, where))


def _numbered(words: Iterable[str], known: Vocabulary) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return all labels in text order, and which of them each word means, -1 for none."""
    names = tuple(sorted({*known.labels.values(), *known.always} - {LEFT_OUT}))
    numbers = {name: number for number, name in enumerate(names)}
    by_word = {word: numbers.get(label, -1) for word, label in known.labels.items()}
    return names, np.array([by_word.get(word, -1) for word in words], np.int64)


def label_words(words: Sequence[str], rules: Rules, where: str) -> Said:
    """Return what one word says of each thing, blank for nothing.

    Raises:
        DataError: a label that cannot be named, or too many.
    """
    known = vocabulary({word: where for word in words if word}, rules)
    names, values = _numbered(words, known)
    nothing = np.zeros(len(values), bool)
    return said(names, values, nothing, ~nothing, known, where, known.notes)


def _joined(labels: NDArray[np.int64], match: Match) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the one label that the rows of each key have, -1 for none or several, and where there are several."""
    speaks = (match.row_keys >= 0) & (labels >= 0)
    keys, spoken = match.row_keys[speaks], labels[speaks]
    highest = np.full(match.keys, -1, np.int64)
    np.maximum.at(highest, keys, spoken)
    lowest = highest.copy()
    np.minimum.at(lowest, keys, spoken)
    conflicts = lowest != highest
    return np.where(conflicts, -1, highest), conflicts


def _similar(names: Sequence[str], where: str) -> tuple[Note, ...]:
    alike = Counter(loosely(whole_number(name) or name) for name in names)
    count = sum(times for times in alike.values() if times > 1)
    message = f"{where}: {count} labels differ only in case, leading zeros or decimals - join them in [data] words"
    return (("similar_words", message),) if count else ()

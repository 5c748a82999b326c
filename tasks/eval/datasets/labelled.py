"""A labelled set of sentences or pairs of sentences, as every loader of such a set gives it.

    made = labelled_set("xnli", source, ("entailment", "neutral", "contradiction"), splits, rule="…")
    made.train[0].first, made.counts["test"]["rows"], made.fingerprint

Called by tasks.cls_set and tasks.pair_set; tasks.ner_set, whose rows are words with tags, shares `hold_out`.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

from storage.errors import FatalError
from storage.fingerprint import canonical_json, sha256_bytes

SPLITS = ("train", "validation", "test")

Row = TypeVar("Row")


class Example(NamedTuple):
    """One text, or a pair of texts (`second` is "" for one alone), and the number of its label."""

    first: str
    second: str
    label: int


@dataclass(frozen=True)
class LabelledSet:
    """A set as the protocol uses it.

    `counts`: by split, rows as published and what became of them (`kept`, `dropped`, …); for the test split also how
    many of its texts stand in the train split too, which are counted and stay where the set's authors left them.
    `rule` says how a validation split was made and what was dropped.
    """

    name: str
    source: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    counts: Mapping[str, Mapping[str, int]]
    rule: str

    @cached_property
    def fingerprint(self) -> str:
        """Hash over all rows as they are used; where the set lies is not part of it."""
        parts = [digest([*row] for row in rows) for rows in (self.train, self.validation, self.test)]
        return sha256_bytes(canonical_json([self.labels, parts]))


def digest(rows: Iterable[Sequence[object]]) -> str:
    """sha256 over rows of plain values, one line of JSON each."""
    found = hashlib.sha256()
    for row in rows:
        found.update(canonical_json(row) + b"\n")
    return found.hexdigest()


def labelled_set(
    name: str,
    source: str,
    labels: tuple[str, ...],
    splits: Mapping[str, Sequence[Example]],
    counts: Mapping[str, Mapping[str, int]],
    rule: str,
) -> LabelledSet:
    """Checks the splits and counts what train and test share. FatalError: an empty split, a label nobody trains on."""
    for split in SPLITS:
        if not splits.get(split):
            raise FatalError(f"{source}: the {split} split of {name} has no rows; check the set", source)
    absent = set(range(len(labels))) - {row.label for row in splits["train"]}
    if absent:
        lacking = ", ".join(f"{number} ({labels[number]})" for number in sorted(absent))
        raise FatalError(f"{source}: no train row of {name} has label {lacking}; check the column label", source)
    trained = {row[:2] for row in splits["train"]}
    shared = sum(row[:2] in trained for row in splits["test"])
    found = {split: dict(counts[split]) for split in SPLITS}
    found["test"]["also_in_train"] = shared
    train, validation, test = (tuple(splits[split]) for split in SPLITS)
    return LabelledSet(name, source, labels, train, validation, test, found, rule)


def hold_out(rows: Sequence[Row], text: Callable[[Row], str], share: float) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out: those whose text has the lowest sha256, a `share` of all, at least one.

    So neither order nor seed matters, a row that is added moves hardly any other, and equal texts stay together.
    """
    hashes = [sha256_bytes(text(row).encode()) for row in rows]
    if not hashes:
        return [], []
    limit = sorted(hashes)[max(1, round(share * len(hashes))) - 1]
    pairs = list(zip(rows, hashes, strict=True))
    return [row for row, key in pairs if key > limit], [row for row, key in pairs if key <= limit]

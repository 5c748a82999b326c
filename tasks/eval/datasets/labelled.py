"""Defines a labelled data set of texts or text pairs, and holds out validation rows.

    data = labelled_set("xnli", source, ("entailment", "neutral", "contradiction"), splits, counts, rule="…")
    data.train[0].first, data.counts["test"]["rows"], data.fingerprint

The loaders of CLS, PAWS-X and XNLI return a `LabelledSet`; the loader of named entities also uses `hold_out`.
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
    """One text, or a pair of texts (`second` is "" for a single text), and the number of its label."""

    first: str
    second: str
    label: int


@dataclass(frozen=True)
class LabelledSet:
    """A labelled data set with three splits.

    `counts` contains per split the numbers of published rows (`rows`), of rows in use (`kept`) and of dropped rows
    (`dropped`), and for the test split the number of rows that also occur in the train split (`also_in_train`); these
    rows stay in both splits, as published. `rule` states how the validation split was made and which rows were dropped.
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
        """Hash of the label names and of all rows in use; does not depend on the location of the data set."""
        parts = [sha256_of_rows([*row] for row in rows) for rows in (self.train, self.validation, self.test)]
        return sha256_bytes(canonical_json([self.labels, parts]))


def sha256_of_rows(rows: Iterable[Sequence[object]]) -> str:
    """Returns the SHA-256 of rows of plain values, each hashed as one line of JSON."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(canonical_json(row) + b"\n")
    return digest.hexdigest()


def labelled_set(
    name: str,
    source: str,
    labels: tuple[str, ...],
    splits: Mapping[str, Sequence[Example]],
    counts: Mapping[str, Mapping[str, int]],
    rule: str,
) -> LabelledSet:
    """Builds a `LabelledSet`: checks the splits, and counts the test rows that also occur in the train split.

    FatalError if a split is empty or a label has no train row.
    """
    for split in SPLITS:
        if not splits.get(split):
            raise FatalError(f"{source}: the {split} split of {name} has no rows; download the set again", source)
    missing = set(range(len(labels))) - {row.label for row in splits["train"]}
    if missing:
        listed = ", ".join(f"{number} ({labels[number]})" for number in sorted(missing))
        raise FatalError(
            f"{source}: no train row of {name} has label {listed}; correct the labels or download the set again", source
        )
    train_texts = {row[:2] for row in splits["train"]}
    all_counts = {split: dict(counts[split]) for split in SPLITS}
    all_counts["test"]["also_in_train"] = sum(row[:2] in train_texts for row in splits["test"])
    train, validation, test = (tuple(splits[split]) for split in SPLITS)
    return LabelledSet(name, source, labels, train, validation, test, all_counts, rule)


def hold_out(rows: Sequence[Row], text: Callable[[Row], str], share: float) -> tuple[list[Row], list[Row]]:
    """Splits rows into train rows and held-out rows; at least one row is held out.

    The `share` of rows whose text has the lowest SHA-256 is held out. The split therefore depends neither on the order
    of the rows nor on a seed, an added row moves few other rows, and rows with the same text are never separated.
    """
    hashes = [sha256_bytes(text(row).encode()) for row in rows]
    if not hashes:
        return [], []
    threshold = sorted(hashes)[max(1, round(share * len(hashes))) - 1]
    pairs = list(zip(rows, hashes, strict=True))
    return [row for row, key in pairs if key > threshold], [row for row, key in pairs if key <= threshold]

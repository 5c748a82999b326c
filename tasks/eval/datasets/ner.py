"""Loads a named-entity set in the schema of Jean-Baptiste/wikiner_fr: columns tokens, ner_tags (and id), tags 0 to 4.

    ner = load_ner(Place("/data/wikineural/fr"))    # or any fsspec URL, or a hub id such as Jean-Baptiste/wikiner_fr

Sentences that occur twice, inside a split or across splits, are taken out and counted, so that no test sentence is
ever trained on. Where no validation split is published, a tenth of train is held out, by the hash of the words.
Called by tasks.sets.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import FatalError
from storage.fingerprint import canonical_json, sha256_bytes
from tasks.eval.datasets.files import Place, is_text, label_names, parquet_splits
from tasks.eval.datasets.labelled import digest, hold_out
from tasks.eval.metrics import LABELS

SPLITS = ("test", "validation", "train")
"""In the order in which they may keep a sentence that is in several: the test split stays as it is."""

VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Sentence:
    """Words and their tags (numbers in LABELS), as many of one as of the other."""

    words: tuple[str, ...]
    tags: tuple[int, ...]


@dataclass(frozen=True)
class NerSet:
    """A set without duplicates, and its test split as published beside it.

    `test_published` holds every test sentence; `distinct` are the places in it of those that stand in `test`.
    `counts`: rows as published, duplicates inside the split, rows that are in a split before it (test, validation,
    train), rows kept; by split. `rule` says the same in words.
    """

    name: str
    source: str
    train: tuple[Sentence, ...]
    validation: tuple[Sentence, ...]
    test_published: tuple[Sentence, ...]
    distinct: tuple[int, ...]
    counts: Mapping[str, Mapping[str, int]]
    rule: str

    @property
    def test(self) -> tuple[Sentence, ...]:
        """The test split, each sentence once."""
        return tuple(self.test_published[place] for place in self.distinct)

    @cached_property
    def fingerprint(self) -> str:
        """Hash over all sentences as they are used; where the set lies is not part of it."""
        splits = (self.train, self.validation, self.test_published)
        return sha256_bytes(canonical_json([digest((row.words, row.tags) for row in rows) for rows in splits]))


def load_ner(name: str, place: Place) -> NerSet:
    """Reads and checks a set. FatalError: nothing there, no train or test split, other columns or labels, bad rows.

    RetryableError where the network does not answer.
    """
    tables = parquet_splits(place, _columns)
    published = {split: tuple(_sentences(table, file)) for split, table, file in tables}
    for split in ("train", "test"):
        if not published.get(split):
            raise FatalError(
                f"{place.source}: no {split} sentences; the folder needs parquet files named train-… and test-…",
                place.source,
            )
    seen: set[tuple[str, ...]] = set()
    kept: dict[str, list[int]] = {}
    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        rows = published.get(split, ())
        kept[split], counts[split] = _distinct(rows, seen)
        seen |= {sentence.words for sentence in rows}
    train, validation = ([published.get(split, ())[row] for row in kept[split]] for split in ("train", "validation"))
    rule = "sentences that occur twice or in a split before theirs (test, validation, train) left out"
    if not validation:
        train, validation = hold_out(train, lambda sentence: "\n".join(sentence.words), VALIDATION_SHARE)
        counts["validation"]["kept"], counts["train"]["kept"] = len(validation), len(train)
        rule += "; a tenth of train held out for validation, by the lowest sha256 of the words"
    if not train:
        raise FatalError(f"{place.source}: no train sentence is left beside the other splits", place.source)
    return NerSet(
        name=name,
        source=place.source,
        train=tuple(train),
        validation=tuple(validation),
        test_published=published["test"],
        distinct=tuple(kept["test"]),
        counts=counts,
        rule=rule,
    )


def _distinct(rows: tuple[Sentence, ...], seen: set[tuple[str, ...]]) -> tuple[list[int], dict[str, int]]:
    """Places of sentences that are neither in `seen` nor earlier in `rows`, and counts. Words decide, not tags."""
    own: set[tuple[str, ...]] = set()
    kept = []
    elsewhere = 0
    for place, sentence in enumerate(rows):
        if sentence.words in own:
            continue
        own.add(sentence.words)
        if sentence.words in seen:
            elsewhere += 1
        else:
            kept.append(place)
    return kept, {"rows": len(rows), "duplicates": len(rows) - len(own), "in_other_split": elsewhere, "kept": len(kept)}


# ---- rows --------------------------------------------------------------------------------------------------


def _columns(file: pq.ParquetFile, path: str) -> pa.Table:
    """tokens and ner_tags of one file, after a look at their types and at the label names if the file has them."""
    schema = file.schema_arrow
    for name, fits in (("tokens", is_text), ("ner_tags", pa.types.is_integer)):
        kind = schema.field(name).type if name in schema.names else None
        if kind is None or not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not fits(kind.value_type):
            raise FatalError(
                f"{path}: column {name} should be a list of {'text' if name == 'tokens' else 'integers'} but is "
                f"{kind or 'not there'} (columns: {', '.join(schema.names)}); give a set in the schema of wikiner_fr",
                path,
            )
    names = label_names(schema, "ner_tags")
    if names and tuple(name.removeprefix("I-") for name in names) != LABELS:
        raise FatalError(f"{path}: ner_tags means {list(names)} and not {list(LABELS)}; renumber the tags", path)
    return file.read(["tokens", "ner_tags"]).cast(
        pa.schema([("tokens", pa.list_(pa.string())), ("ner_tags", pa.list_(pa.int64()))])
    )


def _sentences(table: pa.Table, file: str) -> Iterator[Sentence]:
    """Checked rows; those without a single word are left out."""
    columns = zip(table.column("tokens").to_pylist(), table.column("ner_tags").to_pylist(), strict=True)
    for row, (words, tags) in enumerate(columns):
        if not words and not tags:
            continue
        if len(words or ()) != len(tags or ()) or None in words:
            raise FatalError(f"{file}, row {row}: tokens and ner_tags are not of one length; mend the row", file, row)
        if not set(tags) <= set(range(len(LABELS))):
            raise FatalError(
                f"{file}, row {row}: ner_tags has {sorted(set(tags), key=str)} but only 0 to 4 are known "
                f"({', '.join(LABELS)}); give a set in the schema of wikiner_fr",
                file,
                row,
            )
        yield Sentence(tuple(words), tuple(tags))

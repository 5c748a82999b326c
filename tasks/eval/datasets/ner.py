"""Loads a named-entity data set in the schema of Jean-Baptiste/wikiner_fr: columns tokens and ner_tags, tags 0 to 4.

    ner = load_ner("ner", SetLocation("Jean-Baptiste/wikiner_fr"))    # or a folder, or any fsspec URL

WikiNER is Wikipedia text with automatic annotations (Nothman et al., 2013). Duplicate sentences, within a split or
across splits, are removed and counted, so that no test sentence is in the train split. If no validation split is
published, a tenth of the train split, selected by the hash of the words, is held out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import FatalError
from storage.fingerprint import canonical_json, sha256_bytes
from tasks.eval.datasets.dataset_files import SetLocation, is_text, label_names, parquet_splits
from tasks.eval.datasets.labelled import hold_out, sha256_of_rows
from tasks.eval.metrics import LABELS

SPLITS = ("test", "validation", "train")
"""In order of precedence: a sentence that occurs in several splits stays in the first of them."""

VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Sentence:
    """Words and their tags (indices into `LABELS`), one tag per word."""

    words: tuple[str, ...]
    tags: tuple[int, ...]


@dataclass(frozen=True)
class NerSet:
    """A named-entity data set without duplicate sentences, and its test split as published.

    `test_published` contains every test sentence; `distinct` contains the indices in it of the sentences of `test`.
    `counts` contains per split the numbers of published rows (`rows`), of duplicates in the split (`duplicates`), of
    rows that also occur in a split of higher precedence (`in_other_split`), and of rows in use (`kept`). `rule` states
    which sentences were removed and how the validation split was made.
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
        """The test split without duplicate sentences."""
        return tuple(self.test_published[row] for row in self.distinct)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the train and validation sentences in use and of the published test split, wherever they are read."""
        splits = (self.train, self.validation, self.test_published)
        return sha256_bytes(canonical_json([sha256_of_rows((row.words, row.tags) for row in rows) for rows in splits]))


def load_ner(name: str, location: SetLocation) -> NerSet:
    """Reads and checks a named-entity data set.

    FatalError if the train or test split is missing, or if columns, labels or rows violate the schema.
    RetryableError if the network does not respond.
    """
    tables = parquet_splits(location, _columns)
    published = {split: tuple(_sentences(table, file)) for split, table, file in tables}
    for split in ("train", "test"):
        if not published.get(split):
            raise FatalError(
                f"{location.source}: no {split} sentences; the folder must contain parquet files named train-… and "
                "test-…",
                location.source,
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
        raise FatalError(
            f"{location.source}: every train sentence also occurs in another split; download the set again",
            location.source,
        )
    return NerSet(
        name=name,
        source=location.source,
        train=tuple(train),
        validation=tuple(validation),
        test_published=published["test"],
        distinct=tuple(kept["test"]),
        counts=counts,
        rule=rule,
    )


def _distinct(rows: tuple[Sentence, ...], seen: set[tuple[str, ...]]) -> tuple[list[int], dict[str, int]]:
    """Returns the indices of the sentences that are neither in `seen` nor earlier in `rows`, and counts.

    Sentences are equal if their words are; tags are not compared.
    """
    own: set[tuple[str, ...]] = set()
    kept = []
    in_other_split = 0
    for row, sentence in enumerate(rows):
        if sentence.words in own:
            continue
        own.add(sentence.words)
        if sentence.words in seen:
            in_other_split += 1
        else:
            kept.append(row)
    counts = {"rows": len(rows), "duplicates": len(rows) - len(own), "in_other_split": in_other_split}
    return kept, counts | {"kept": len(kept)}


# ---- rows --------------------------------------------------------------------------------------------------


def _columns(file: pq.ParquetFile, path: str) -> pa.Table:
    """Reads the columns tokens and ner_tags of one file, and checks their types and the label names, if any."""
    schema = file.schema_arrow
    for name, fits in (("tokens", is_text), ("ner_tags", pa.types.is_integer)):
        kind = schema.field(name).type if name in schema.names else None
        if kind is None or not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not fits(kind.value_type):
            raise FatalError(
                f"{path}: column {name} should be a list of {'text' if name == 'tokens' else 'integers'} but is "
                f"{kind or 'missing'} (columns: {', '.join(schema.names)}); use a data set with the schema of "
                "wikiner_fr",
                path,
            )
    names = label_names(schema, "ner_tags")
    if names and tuple(name.removeprefix("I-") for name in names) != LABELS:
        raise FatalError(
            f"{path}: the labels of ner_tags are {list(names)} instead of {list(LABELS)}; renumber the tags", path
        )
    return file.read(["tokens", "ner_tags"]).cast(
        pa.schema([("tokens", pa.list_(pa.string())), ("ner_tags", pa.list_(pa.int64()))])
    )


def _sentences(table: pa.Table, file: str) -> Iterator[Sentence]:
    """Yields the checked rows and skips rows without words."""
    columns = zip(table.column("tokens").to_pylist(), table.column("ner_tags").to_pylist(), strict=True)
    for row, (words, tags) in enumerate(columns):
        if not words and not tags:
            continue
        if len(words or ()) != len(tags or ()) or None in words:
            raise FatalError(
                f"{file}, row {row}: tokens and ner_tags differ in length, or a token is null; correct the row",
                file,
                row,
            )
        if not set(tags) <= set(range(len(LABELS))):
            raise FatalError(
                f"{file}, row {row}: ner_tags contains {sorted(set(tags), key=str)}, but only 0 to 4 are valid "
                f"({', '.join(LABELS)}); use a data set with the schema of wikiner_fr",
                file,
                row,
            )
        yield Sentence(tuple(words), tuple(tags))

"""Loads the sentence pairs of PAWS-X and XNLI in their official parquet schemas.

    xnli = load_pairs("xnli", SetLocation("facebook/xnli", "fr"))       # premise, hypothesis, label 0 to 2
    paws = load_pairs("paws-x", SetLocation("/data/eval/paws-x/fr"))    # sentence1, sentence2, label 0 or 1

XNLI is natural language inference (Conneau et al., 2018), PAWS-X paraphrase identification (Yang et al., 2019). All
three splits are published. Rows of PAWS-X with an empty text or the text "NS" (not translated) are dropped and counted
in every split, as in FLUE (Le et al., 2020).
"""

from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import FatalError
from tasks.eval.datasets.dataset_files import SetLocation, is_text, label_names, parquet_splits
from tasks.eval.datasets.labelled import Example, LabelledSet, labelled_set


class Schema(NamedTuple):
    """The two text columns, the label names in the order of their numbers, and the texts that mark a missing text."""

    first: str
    second: str
    labels: tuple[str, ...]
    missing_texts: frozenset[str] = frozenset()

    @property
    def columns(self) -> tuple[str, str, str]:
        """The names of the columns to read."""
        return self.first, self.second, "label"


SCHEMAS = {
    "xnli": Schema("premise", "hypothesis", ("entailment", "neutral", "contradiction")),
    "paws-x": Schema("sentence1", "sentence2", ("different", "same"), frozenset(("", "NS"))),
}


def load_pairs(name: str, location: SetLocation) -> LabelledSet:
    """Reads and checks `xnli` or `paws-x`.

    FatalError if files or a split are missing, or if a column or a label violates the schema.
    RetryableError if the network does not respond.
    """
    schema = SCHEMAS[name]
    splits: dict[str, list[Example]] = {}
    counts: dict[str, dict[str, int]] = {}
    for split, table, file in parquet_splits(location, lambda parquet, path: _columns(schema, parquet, path)):
        rows = list(_rows(schema, table, file))
        splits[split] = [
            row for row in rows if schema.missing_texts.isdisjoint((row.first.strip(), row.second.strip()))
        ]
        counts[split] = {"rows": len(rows), "dropped": len(rows) - len(splits[split]), "kept": len(splits[split])}
    rule = "splits as published"
    if schema.missing_texts:
        rule += '; rows with an empty text or "NS" dropped'
    return labelled_set(name, location.source, schema.labels, splits, counts, rule)


def _columns(schema: Schema, file: pq.ParquetFile, path: str) -> pa.Table:
    columns = file.schema_arrow
    for name in schema.columns:
        kind = columns.field(name).type if name in columns.names else None
        fits = kind is not None and (pa.types.is_integer(kind) if name == "label" else is_text(kind))
        if not fits:
            raise FatalError(
                f"{path}: column {name} should be {'integers' if name == 'label' else 'text'} but is "
                f"{kind or 'missing'} (columns: {', '.join(columns.names)}); use the set in its official schema",
                path,
            )
    names = label_names(columns, "label")
    # PAWS-X is published with the names "0" and "1".
    if names and names not in (schema.labels, tuple(str(number) for number in range(len(schema.labels)))):
        raise FatalError(
            f"{path}: the labels are {list(names)} instead of {list(schema.labels)}; renumber the column label", path
        )
    types = [(name, pa.int64() if name == "label" else pa.string()) for name in schema.columns]
    return file.read(list(schema.columns)).cast(pa.schema(types))


def _rows(schema: Schema, table: pa.Table, file: str) -> Iterator[Example]:
    """Yields the checked rows. Null is read as an empty text, which is valid only with `missing_texts` (PAWS-X)."""
    columns = (table.column(name).to_pylist() for name in schema.columns)
    for row, (first, second, label) in enumerate(zip(*columns, strict=True)):
        if label not in range(len(schema.labels)):
            raise FatalError(
                f"{file}, row {row}: label is {label}, but only 0 to {len(schema.labels) - 1} are valid "
                f"({', '.join(schema.labels)}); correct the row",
                file,
                row,
            )
        for column, text in ((schema.first, first), (schema.second, second)):
            if not text and not schema.missing_texts:
                raise FatalError(f"{file}, row {row}: {column} is empty; correct the row", file, row)
        yield Example(first or "", second or "", label)

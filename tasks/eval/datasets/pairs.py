"""Loads PAWS-X and XNLI, pairs of sentences, in the official parquet schemas.

    xnli = load_pairs("xnli", Place("facebook/xnli", "fr"))           # premise, hypothesis, label 0 to 2
    paws = load_pairs("paws-x", Place("/data/eval/paws-x/fr"))        # sentence1, sentence2, label 0 and 1

All three splits are published. Rows of PAWS-X with an empty text or "NS" (not translated) are dropped and counted, in
every split, as FLUE does. Called by tasks.sets.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import FatalError
from tasks.eval.datasets.files import Place, is_text, label_names, parquet_splits
from tasks.eval.datasets.labelled import Example, LabelledSet, labelled_set


class Schema(NamedTuple):
    """The two text columns, the labels by number, and texts that mean that there is none."""

    first: str
    second: str
    labels: tuple[str, ...]
    void: frozenset[str] = frozenset()

    @property
    def columns(self) -> tuple[str, str, str]:
        """What is read."""
        return self.first, self.second, "label"


SCHEMAS = {
    "xnli": Schema("premise", "hypothesis", ("entailment", "neutral", "contradiction")),
    "paws-x": Schema("sentence1", "sentence2", ("different", "same"), frozenset(("", "NS"))),
}


def load_pairs(name: str, place: Place) -> LabelledSet:
    """Reads and checks a set. FatalError: nothing there, a split, a column or a label that does not fit.

    RetryableError where the network does not answer.
    """
    schema = SCHEMAS[name]
    splits: dict[str, list[Example]] = {}
    counts: dict[str, dict[str, int]] = {}
    for split, table, file in parquet_splits(place, lambda parquet, path: _columns(schema, parquet, path)):
        rows = list(_rows(schema, table, file))
        splits[split] = [row for row in rows if schema.void.isdisjoint((row.first.strip(), row.second.strip()))]
        counts[split] = {"rows": len(rows), "dropped": len(rows) - len(splits[split]), "kept": len(splits[split])}
    rule = "splits as published"
    if schema.void:
        rule += '; rows with an empty text or "NS" dropped'
    return labelled_set(name, place.source, schema.labels, splits, counts, rule)


def _columns(schema: Schema, file: pq.ParquetFile, path: str) -> pa.Table:
    found = file.schema_arrow
    for name in schema.columns:
        kind = found.field(name).type if name in found.names else None
        fits = kind is not None and (pa.types.is_integer(kind) if name == "label" else is_text(kind))
        if not fits:
            raise FatalError(
                f"{path}: column {name} should be {'integers' if name == 'label' else 'text'} but is "
                f"{kind or 'not there'} (columns: {', '.join(found.names)}); give the set in its official schema",
                path,
            )
    names = label_names(found, "label")
    # PAWS-X is published with the names "0" and "1".
    if names and names not in (schema.labels, tuple(str(number) for number in range(len(schema.labels)))):
        raise FatalError(f"{path}: label means {list(names)} and not {list(schema.labels)}; renumber it", path)
    types = [(name, pa.int64() if name == "label" else pa.string()) for name in schema.columns]
    return file.read(list(schema.columns)).cast(pa.schema(types))


def _rows(schema: Schema, table: pa.Table, file: str) -> Iterator[Example]:
    """Checked rows. A missing text is an empty one, as in PAWS-X; a set that knows no empty texts refuses it."""
    columns = (table.column(name).to_pylist() for name in schema.columns)
    for row, (first, second, label) in enumerate(zip(*columns, strict=True)):
        if label not in range(len(schema.labels)):
            raise FatalError(
                f"{file}, row {row}: label is {label} but only 0 to {len(schema.labels) - 1} are known "
                f"({', '.join(schema.labels)}); mend the row",
                file,
                row,
            )
        for column, text in ((schema.first, first), (schema.second, second)):
            if not text and not schema.void:
                raise FatalError(f"{file}, row {row}: {column} is empty; mend the row", file, row)
        yield Example(first or "", second or "", label)

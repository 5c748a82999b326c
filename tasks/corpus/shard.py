"""Filters the text of one source and stores it in shards: Arrow files of about `corpus.shard_bytes` bytes each.

    receipt = shard_source(store, source, recipe.corpus)
    shards_of(receipt), heldout_of(receipt)

One source is one unit of work, because compressed streams do not support seeking. The source is hashed first, so a
wrong checksum fails before any receipt is written. Then a single pass commits each shard as soon as it is full, and the
receipt of the source last. The bytes of a shard depend only on the source and the settings. tasks/corpus/filters.py
decides which documents are kept. The flows call this module in worker processes.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from hashlib import sha256
from typing import Any, Self

import numpy as np
import pyarrow as pa

from storage.arrow import TEXT_FILE, TEXT_SCHEMA, ArrowWriter
from storage.artifact import Receipt, Ref
from storage.fingerprint import key_of
from storage.store import Store
from tasks.corpus.document import Document
from tasks.corpus.fetch import fetched
from tasks.corpus.filters import DROP_REASONS, Deduplicator, drop_reason, is_heldout, quarantine_reason
from tasks.corpus.quarantine import DocumentCounts
from tasks.corpus.reader import read_documents
from tasks.corpus.snapshot import Source, remember_source_content, source_content
from tasks.recipe.config import CorpusSettings

SCHEMA = 1

BATCH_BYTES = 4 << 20
"""Bytes of text per record batch; limits the memory of the writer and the readers."""

BATCH_ROWS = 16_384
"""Maximum documents per record batch."""

SHARD_ROWS = 1_000_000
"""Maximum documents per shard; keeps the hashes for deduplication below 150 MB if documents are very short."""

_NOT_IN_KEY = {"url", "pattern", "max_bad_lines", "max_unpacked_ratio"}


def source_ref(source: Source, content: str, corpus: CorpusSettings) -> Ref:
    """Returns the reference to the artifact of a source. The key depends on `content`, the sha256, not URL or name."""
    return Ref("source", key_of("source", SCHEMA, _settings(source, corpus), [content]), source.label)


def shards_of(receipt: Receipt) -> tuple[Ref, ...]:
    """Returns references to the training shards that the receipt of a source lists, in order."""
    return tuple(Ref("shard", item["key"], item["label"]) for item in receipt.info["shards"])


def heldout_of(receipt: Receipt) -> tuple[Ref, ...]:
    """Returns the reference to the held-out shard that the receipt of a source lists; empty if it lists none."""
    return tuple(Ref("shard", item["key"], item["label"]) for item in receipt.info["heldout"])


def shard_source(store: Store, source: Source, corpus: CorpusSettings, *, force: bool = False) -> Receipt:
    """Writes the shards of one source, then its receipt, and returns the receipt.

    If the shards and the receipt exist already, only returns the receipt, unless `force` is set.

    Raises FatalError if the source is empty, truncated, damaged or of unknown schema, has a wrong checksum or too many
    bad lines, or if the store is full. Raises RetryableError if the source or the store does not respond, or if the
    source changes during the read.
    """
    content = source_content(store, source)
    if content and not force and (receipt := _complete_receipt(store, source_ref(source, content, corpus))):
        return receipt
    with store.scratch() as work, store.scratch() as out:
        started = time.perf_counter()
        with fetched(source, work) as (path, content):
            remember_source_content(store, source, content)
            ref = source_ref(source, content, corpus)
            if not force and (receipt := _complete_receipt(store, ref)):
                return receipt
            hashed = time.perf_counter()
            with ExitStack() as stack:
                companion = stack.enter_context(fetched(source.companion, work))[0] if source.companion else None
                counts = DocumentCounts(source.name, corpus, out / "quarantine.jsonl")
                documents = read_documents(path, source.name, corpus, counts, work, companion)
                info = _parse(store, ref, corpus, documents, counts)
        return store.commit(
            ref,
            out,
            schema=SCHEMA,
            rows=info["counts"]["kept"],
            tokens=0,
            settings=_settings(source, corpus),
            parents=[content],
            info=info,
            timings={"hash": hashed - started, "parse": time.perf_counter() - hashed},
        )


def _settings(source: Source, corpus: CorpusSettings) -> dict[str, Any]:
    """Returns the settings that change the bytes of the shards."""
    return corpus.in_key(_NOT_IN_KEY) | {"pair": source.companion is not None}


def _complete_receipt(store: Store, ref: Ref) -> Receipt | None:
    """Returns the receipt of a source if the store contains it and all shards that it lists, else None."""
    if not store.has(ref):
        return None
    receipt = store.receipt(ref)
    complete = all(store.has(shard) for shard in (*shards_of(receipt), *heldout_of(receipt)))
    return receipt if complete else None


# ---- one pass over a source --------------------------------------------------------------------------------


def _parse(
    store: Store, source: Ref, corpus: CorpusSettings, documents: Iterator[Document], counts: DocumentCounts
) -> dict[str, Any]:
    """Filters documents into shards and commits the shards. Returns the `info` of the receipt of the source."""
    dropped = Counter(dict.fromkeys(DROP_REASONS, 0))
    shards: list[_Shard] = []
    with ExitStack() as stack:
        heldout = stack.enter_context(_Shard(store, source, "heldout"))
        shard = stack.enter_context(_Shard(store, source, 0))
        for document in documents:
            if reason := quarantine_reason(document, corpus):
                counts.quarantine(document.line, reason, document.text)
                continue
            if reason := drop_reason(document, corpus):
                dropped[reason] += 1
                continue
            digest = sha256(document.text).digest()
            destination = heldout if is_heldout(digest, corpus.heldout_per_mille) else shard
            if corpus.deduplicate and destination.deduplicator.is_duplicate(digest):
                dropped["duplicate"] += 1
                continue
            destination.add(document)
            if shard.size >= corpus.shard_bytes or shard.rows >= SHARD_ROWS:
                shard.commit()
                shards.append(shard)
                shard = stack.enter_context(_Shard(store, source, len(shards)))
        counts.finish()
        shards += [shard] if shard.commit() else []
        heldout_shards = [heldout] if heldout.commit() else []
    return {
        "schema": counts.schema,
        "shards": [shard.summary for shard in shards],
        "heldout": [shard.summary for shard in heldout_shards],
        "counts": {
            "lines": counts.lines,
            "bad": counts.bad_lines,
            "documents": counts.documents,
            **dropped,
            "kept": sum(shard.rows for shard in shards),
            "heldout": heldout.rows,
            "bytes": sum(shard.size for shard in (*shards, heldout)),
        },
    }


class _Shard:
    """A shard that is being written. Only its last batch is in memory; its context manager removes scratch files."""

    def __init__(self, store: Store, source: Ref, index: int | str) -> None:
        suffix = f"{index:04d}" if isinstance(index, int) else index
        self.ref = Ref("shard", key_of("shard", SCHEMA, {"index": index}, [source.key]), f"{source.label}-{suffix}")
        self.rows = 0
        self.size = 0  # bytes of UTF-8 text
        self.deduplicator = Deduplicator()
        self._store, self._parent, self._index = store, source.key, index
        self._texts: list[bytes] = []
        self._lines: list[int] = []
        self._pending_bytes = 0
        self._started = time.perf_counter()

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self._folder = self._stack.enter_context(self._store.scratch())
        self._file = self._stack.enter_context(ExitStack())  # closed before the commit, but never twice
        self._writer = self._file.enter_context(ArrowWriter(self._folder / TEXT_FILE, TEXT_SCHEMA))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def summary(self) -> dict[str, Any]:
        """The entry of this shard in the receipt of its source."""
        return {"key": self.ref.key, "label": self.ref.label, "rows": self.rows, "bytes": self.size}

    def add(self, document: Document) -> None:
        """Appends one document to the shard."""
        self.rows += 1
        self.size += len(document.text)
        self._pending_bytes += len(document.text)
        self._texts.append(document.text)
        self._lines.append(document.line)
        if self._pending_bytes >= BATCH_BYTES or len(self._texts) >= BATCH_ROWS:
            self._flush()

    def commit(self) -> bool:
        """Commits the shard and frees its scratch space. Returns False, without a commit, if the shard is empty."""
        if not self.rows:
            return False
        self._flush()
        self._file.close()
        self._store.commit(
            self.ref,
            self._folder,
            schema=SCHEMA,
            rows=self.rows,
            tokens=0,
            settings={"index": self._index},
            parents=[self._parent],
            info={"bytes": self.size},
            timings={"shard": time.perf_counter() - self._started},
        )
        self._stack.close()
        self.deduplicator.clear()
        return True

    def _flush(self) -> None:
        if self._texts:
            self._writer.write({"text": _text_array(self._texts), "line": _int_array(self._lines)})
            self._texts, self._lines, self._pending_bytes = [], [], 0


def _text_array(texts: list[bytes]) -> pa.Array:
    """Builds an Arrow column of UTF-8 texts from buffers, since `pa.array` would check each text and import pandas."""
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    return pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(b"".join(texts)))


def _int_array(values: list[int]) -> pa.Array:
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(np.array(values, dtype=np.int64))])

"""Shards: the text of one source, filtered, about `corpus.shard_bytes` each, as Arrow files in the store.

    receipt = shard_source(store, source, recipe.corpus)
    shards_of(receipt), heldout_of(receipt)

One source is one unit of work: compressed streams do not seek. Its bytes are hashed first (a wrong checksum ends it
before any receipt), then one pass commits each shard as it fills and the source's own receipt last. The bytes of a
shard depend on nothing but the source and the settings. Called by the flows in worker processes.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from hashlib import sha256
from typing import Any, Self

import numpy as np
import pyarrow as pa

from storage.arrow import TEXT, ArrowWriter
from storage.artifact import Receipt, Ref
from storage.fingerprint import key_of
from storage.store import Store
from tasks.corpus.document import Document, Tally
from tasks.corpus.fetch import fetched
from tasks.corpus.reader import read_documents
from tasks.corpus.snapshot import Source, remember_source_content, source_content
from tasks.recipe.config import CorpusSettings

SCHEMA = 1

FILE = "text.arrow"

BATCH_BYTES = 4 << 20
"""Text in one record batch: bounds the memory of writer and readers."""

BATCH_ROWS = 16_384

SHARD_ROWS = 1_000_000
"""A shard of very short lines ends here: its hashes for de-duplication stay under 150 MB."""

_NOT_IN_KEY = {"url", "pattern", "max_bad_lines", "max_unpacked_ratio"}

_DROPS = ("language", "language_prob", "quality_warning", "harmful", "short")


def source_ref(source: Source, content: str, corpus: CorpusSettings) -> Ref:
    """The artifact that a source becomes; `content` is its sha256. Its key does not know where it lies or its name."""
    return Ref("source", key_of("source", SCHEMA, _settings(source, corpus), [content]), source.label)


def shards_of(receipt: Receipt) -> tuple[Ref, ...]:
    """The training shards that a source's receipt lists, in their order."""
    return tuple(Ref("shard", item["key"], item["label"]) for item in receipt.info["shards"])


def heldout_of(receipt: Receipt) -> tuple[Ref, ...]:
    """The held-out shard that a source's receipt lists, if it has one."""
    return tuple(Ref("shard", item["key"], item["label"]) for item in receipt.info["heldout"])


def is_heldout(digest: bytes, per_mille: int) -> bool:
    """True if a document with this sha256 of its UTF-8 text is never trained on."""
    return int.from_bytes(digest, "big") % 1000 < per_mille


def why_dropped(document: Document, corpus: CorpusSettings) -> str:
    """The filter that a document does not pass, or empty. What its schema does not say drops nothing."""
    labels = document.labels
    if labels:
        if corpus.language and labels.language and labels.language != corpus.language:
            return "language"
        if corpus.language and labels.prob is not None and labels.prob < corpus.min_language_prob:
            return "language_prob"
        if corpus.drop_warnings and not set(corpus.drop_warnings).isdisjoint(labels.warnings):
            return "quality_warning"
        harmful_pp, least = labels.harmful_pp, corpus.min_harmful_pp
        if least is not None and harmful_pp is not None and harmful_pp < least:
            return "harmful"
    return "short" if document.chars < corpus.min_chars else ""


def shard_source(store: Store, source: Source, corpus: CorpusSettings, *, force: bool = False) -> Receipt:
    """Makes every shard of one source and its receipt; does nothing if they are there (unless `force`).

    FatalError: wrong checksum, empty, unknown schema, archive cut short or damaged, too many bad lines, store full.
    RetryableError: the source or the store did not answer, or the source was changed while it was read.
    """
    content = source_content(store, source)
    if content and not force and (receipt := _done(store, source_ref(source, content, corpus))):
        return receipt
    with store.scratch() as work, store.scratch() as out:
        started = time.perf_counter()
        with fetched(source, work) as (path, content):
            remember_source_content(store, source, content)
            ref = source_ref(source, content, corpus)
            if not force and (receipt := _done(store, ref)):
                return receipt
            hashed = time.perf_counter()
            with ExitStack() as stack:
                companion = stack.enter_context(fetched(source.companion, work))[0] if source.companion else None
                tally = Tally(source.name, corpus, out / "quarantine.jsonl")
                info = _parse(
                    store, ref, corpus, read_documents(path, source.name, corpus, tally, work, companion), tally
                )
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
    """What changes the bytes of the shards."""
    return corpus.in_key(_NOT_IN_KEY) | {"pair": source.companion is not None}


def _done(store: Store, ref: Ref) -> Receipt | None:
    """The receipt of a source, if it and all that it lists are there."""
    if not store.has(ref):
        return None
    receipt = store.receipt(ref)
    whole = all(store.has(shard) for shard in (*shards_of(receipt), *heldout_of(receipt)))
    return receipt if whole else None


# ---- the one pass over a source ----------------------------------------------------------------------------


def _parse(
    store: Store, source: Ref, corpus: CorpusSettings, documents: Iterator[Document], tally: Tally
) -> dict[str, Any]:
    """Sorts documents into shards and commits these; returns the info of the source's receipt."""
    counts = Counter(dict.fromkeys((*_DROPS, "duplicate"), 0))
    shards: list[_Shard] = []
    with ExitStack() as stack:
        heldout = stack.enter_context(_Shard(store, source, "heldout"))
        shard = stack.enter_context(_Shard(store, source, 0))
        for document in documents:
            if document.chars > corpus.max_chars:
                tally.quarantine(document.line, f"a document of {document.chars:,} characters", document.text)
                continue
            if reason := why_dropped(document, corpus):
                counts[reason] += 1
                continue
            digest = sha256(document.text).digest()
            home = heldout if is_heldout(digest, corpus.heldout_per_mille) else shard
            if corpus.deduplicate and not home.is_new(digest):
                counts["duplicate"] += 1
                continue
            home.add(document)
            if shard.size >= corpus.shard_bytes or shard.rows >= SHARD_ROWS:
                shard.commit()
                shards.append(shard)
                shard = stack.enter_context(_Shard(store, source, len(shards)))
        tally.finish()
        shards += [shard] if shard.commit() else []
        kept_out = [heldout] if heldout.commit() else []
    return {
        "schema": tally.schema,
        "shards": [one.summary for one in shards],
        "heldout": [one.summary for one in kept_out],
        "counts": {
            "lines": tally.lines,
            "bad": tally.bad,
            "documents": tally.documents,
            **counts,
            "kept": sum(one.rows for one in shards),
            "heldout": heldout.rows,
            "bytes": sum(one.size for one in (*shards, heldout)),
        },
    }


class _Shard:
    """One shard being written, on disk but for the last batch; a context that leaves nothing behind."""

    def __init__(self, store: Store, source: Ref, index: int | str) -> None:
        suffix = f"{index:04d}" if isinstance(index, int) else index
        self.ref = Ref("shard", key_of("shard", SCHEMA, {"index": index}, [source.key]), f"{source.label}-{suffix}")
        self.rows = 0
        self.size = 0  # bytes of UTF-8 text
        self._store, self._parent, self._index = store, source.key, index
        self._seen: set[bytes] = set()
        self._texts: list[bytes] = []
        self._lines: list[int] = []
        self._held = 0
        self._started = time.perf_counter()

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self._folder = self._stack.enter_context(self._store.scratch())
        self._file = self._stack.enter_context(ExitStack())  # closed before the commit, and not twice
        self._writer = self._file.enter_context(ArrowWriter(self._folder / FILE, TEXT))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def summary(self) -> dict[str, Any]:
        """What the source's receipt says of this shard."""
        return {"key": self.ref.key, "label": self.ref.label, "rows": self.rows, "bytes": self.size}

    def is_new(self, digest: bytes) -> bool:
        """True the first time that a digest is shown."""
        before = len(self._seen)
        self._seen.add(digest)
        return len(self._seen) > before

    def add(self, document: Document) -> None:
        """Appends one document."""
        self.rows += 1
        self.size += len(document.text)
        self._held += len(document.text)
        self._texts.append(document.text)
        self._lines.append(document.line)
        if self._held >= BATCH_BYTES or len(self._texts) >= BATCH_ROWS:
            self._flush()

    def commit(self) -> bool:
        """Puts the shard into the store and frees its scratch space; False, and nothing is made, if it is empty."""
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
        self._seen.clear()
        return True

    def _flush(self) -> None:
        if self._texts:
            self._writer.write({"text": _text_array(self._texts), "line": _int_array(self._lines)})
            self._texts, self._lines, self._held = [], [], 0


def _text_array(texts: list[bytes]) -> pa.Array:
    """UTF-8 texts as one Arrow column, from its buffers: `pa.array` would check each and import pandas for it."""
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    return pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(b"".join(texts)))


def _int_array(values: list[int]) -> pa.Array:
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(np.array(values, dtype=np.int64))])

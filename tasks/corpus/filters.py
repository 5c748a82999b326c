"""Every rule that drops, quarantines or holds out a document. The rules have no state other than `Deduplicator`'s.

    quarantine_reason(document, corpus)    # "a document of 12,000,000 characters", or "" without a fault
    drop_reason(document, corpus)          # "quality_warning", or "" if the document is kept
    is_heldout(digest, per_mille)          # True if the document belongs in the held-out shard
    Deduplicator().is_duplicate(digest)    # True if the shard already holds the same text

The rules in the order in which they apply, with the key under which a source's receipt counts their documents:

    rule                                  setting (corpus.*)     effect                         count
    line or text of too many bytes        max_line_bytes         line quarantined               bad
    null, or not UTF-8                    -                      line quarantined               bad
    more characters than allowed          max_chars              document quarantined           bad
    another language                      language               document dropped               language
    language uncertain                    min_language_prob      document dropped               language_prob
    quality warning                       drop_warnings          document dropped               quality_warning
    low perplexity for harmful text       min_harmful_pp         document dropped               harmful
    fewer characters than required        min_chars              document dropped               short
    hash of the text below the rate       heldout_per_mille      document in the held-out shard heldout
    exact duplicate in the same shard     deduplicate            document dropped               duplicate
    too many bad lines, or 0.1 % of all   max_bad_lines          source fails                   -

Quarantined lines are written to quarantine.jsonl next to the receipt (tasks/corpus/quarantine.py). Lines that break the
format (not JSON, no text field) are quarantined by their reader. The limits that refuse a source for its bytes are in
tasks/corpus/fetch.py (checksum) and tasks/corpus/lines.py (unpacked size).
"""

from tasks.corpus.document import Document
from tasks.recipe.config import CorpusSettings

DROP_REASONS = ("language", "language_prob", "quality_warning", "harmful", "short", "duplicate")
"""Keys of the counts of dropped documents in a source's receipt."""

BAD_LINE_SHARE = 0.001
"""Share of a source's lines that may be bad if that is more than `corpus.max_bad_lines`."""

EARLY_STOP_MARGIN = 1000
"""A source fails before its end at this many bad lines more than the limit for the lines read so far."""


# ---- dropped -----------------------------------------------------------------------------------------------


def drop_reason(document: Document, corpus: CorpusSettings) -> str:
    """The first rule that drops a document, as its key in the receipt, or "". A missing label drops nothing."""
    labels = document.labels
    if labels:
        if corpus.language and labels.language and labels.language != corpus.language:
            return "language"
        if corpus.language and labels.language_prob is not None and labels.language_prob < corpus.min_language_prob:
            return "language_prob"
        if corpus.drop_warnings and not set(corpus.drop_warnings).isdisjoint(labels.warnings):
            return "quality_warning"
        harmful_pp, minimum = labels.harmful_pp, corpus.min_harmful_pp
        if minimum is not None and harmful_pp is not None and harmful_pp < minimum:
            return "harmful"
    return "short" if document.chars < corpus.min_chars else ""


class Deduplicator:
    """Finds exact duplicates inside one shard by the sha256 of their text; takes about 150 bytes per document."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def is_duplicate(self, digest: bytes) -> bool:
        """False the first time that a digest is given, True after that."""
        before = len(self._digests)
        self._digests.add(digest)
        return len(self._digests) == before

    def clear(self) -> None:
        """Forgets all digests and frees their memory."""
        self._digests.clear()


# ---- held out ----------------------------------------------------------------------------------------------


def is_heldout(digest: bytes, per_mille: int) -> bool:
    """True if a document is kept out of training; `digest` is the sha256 of its UTF-8 text.

    The rule depends on the text alone, so a document is held out in every corpus that contains it.
    """
    return int.from_bytes(digest, "big") % 1000 < per_mille


# ---- quarantined -------------------------------------------------------------------------------------------


def quarantine_reason(document: Document, corpus: CorpusSettings) -> str:
    """The fault of a document of more than `corpus.max_chars` characters, or ""."""
    return f"a document of {document.chars:,} characters" if document.chars > corpus.max_chars else ""


def long_line_reason(size: int) -> str:
    """The fault of a line of `size` bytes, which is more than `corpus.max_line_bytes`."""
    return f"a line of {size:,} bytes"


def long_document_reason(max_bytes: int) -> str:
    """The fault of a document of several lines that together exceed `corpus.max_line_bytes`."""
    return f"a document of more than {max_bytes:,} bytes"


def text_reason(text: bytes | None, max_bytes: int) -> tuple[str, int]:
    """(fault or "", number of characters) of a text that its format gives as raw bytes."""
    if text is None:
        return "null", 0
    if len(text) > max_bytes:
        return f"a text of {len(text):,} bytes", 0
    try:
        return "", len(text.decode())
    except UnicodeDecodeError as error:
        return _encoding_fault(error), 0


def utf8_reason(line: bytes) -> str:
    """The encoding fault of a line, or ""."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return _encoding_fault(error)
    return ""


def bad_line_limit(lines: int, corpus: CorpusSettings) -> int:
    """Bad lines that a source of `lines` lines may have: `corpus.max_bad_lines`, or 0.1 % if that is more."""
    return max(corpus.max_bad_lines, int(BAD_LINE_SHARE * lines))


def _encoding_fault(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 ({error.reason} at byte {error.start + 1})"

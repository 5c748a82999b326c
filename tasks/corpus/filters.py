"""Defines every rule that drops, quarantines or holds out a document. Only `Deduplicator` has state.

    quarantine_reason(document, corpus)    # "a document of 12,000,000 characters", or "" if it is valid
    drop_reason(document, corpus)          # "quality_warning", or "" if the document is kept
    is_heldout(digest, per_mille)          # True if the document belongs in the held-out shard
    Deduplicator().is_duplicate(digest)    # True if the shard already contains the same text

The rules apply in this order. The last column is the key under which the receipt of a source counts the documents:

    rule                                  setting (corpus.*)     effect                         count
    line or text with too many bytes      max_line_bytes         line quarantined               bad
    null, or not UTF-8                    -                      line quarantined               bad
    more characters than allowed          max_chars              document quarantined           bad
    different language                    language               document dropped               language
    language uncertain                    min_language_prob      document dropped               language_prob
    quality warning                       drop_warnings          document dropped               quality_warning
    low perplexity for harmful text       min_harmful_pp         document dropped               harmful
    fewer characters than required        min_chars              document dropped               short
    hash of the text below the rate       heldout_per_mille      document in the held-out shard heldout
    exact duplicate in the same shard     deduplicate            document dropped               duplicate
    too many bad lines, or 0.1 % of all   max_bad_lines          source fails                   -

Quarantined lines are written to quarantine.jsonl next to the receipt (tasks/corpus/quarantine.py). Lines that break the
format (not JSON, no text field) are quarantined by their reader. The checks that reject a complete source are in
tasks/corpus/fetch.py (checksum) and tasks/corpus/formats/lines.py (unpacked size).
"""

from tasks.corpus.document import Document
from tasks.recipe.config import CorpusSettings

DROP_REASONS = ("language", "language_prob", "quality_warning", "harmful", "short", "duplicate")
"""Keys under which the receipt of a source counts dropped documents."""

BAD_LINE_SHARE = 0.001
"""Share of the lines of a source that may be bad, if that is more than `corpus.max_bad_lines`."""

EARLY_STOP_MARGIN = 1000
"""Reading a source stops early if its bad lines exceed the limit for the lines read so far by more than this number."""


# ---- dropped -----------------------------------------------------------------------------------------------


def drop_reason(document: Document, corpus: CorpusSettings) -> str:
    """Returns the receipt key of the first rule that drops a document, or "". Missing labels never drop a document."""
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
    """Finds exact duplicates within one shard by the sha256 of their text. Uses about 150 bytes per document."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def is_duplicate(self, digest: bytes) -> bool:
        """Returns False for the first occurrence of a digest, True for every later one."""
        before = len(self._digests)
        self._digests.add(digest)
        return len(self._digests) == before

    def clear(self) -> None:
        """Removes all digests and frees their memory."""
        self._digests.clear()


# ---- held out ----------------------------------------------------------------------------------------------


def is_heldout(digest: bytes, per_mille: int) -> bool:
    """Returns True if a document is held out of training. `digest` is the sha256 of its UTF-8 text.

    The rule depends only on the text, so a document is held out in every corpus that contains it.
    """
    return int.from_bytes(digest, "big") % 1000 < per_mille


# ---- quarantined -------------------------------------------------------------------------------------------


def quarantine_reason(document: Document, corpus: CorpusSettings) -> str:
    """Describes the fault of a document of more than `corpus.max_chars` characters; "" for any other document."""
    return f"a document of {document.chars:,} characters" if document.chars > corpus.max_chars else ""


def long_line_reason(size: int) -> str:
    """Describes the fault of a line of `size` bytes, more than `corpus.max_line_bytes`."""
    return f"a line of {size:,} bytes"


def long_document_reason(max_bytes: int) -> str:
    """Describes the fault of a document whose lines together exceed `corpus.max_line_bytes`."""
    return f"a document of more than {max_bytes:,} bytes"


def text_reason(text: bytes | None, max_bytes: int) -> tuple[str, int]:
    """Returns the fault of a text in bytes, "" if it is valid, and its number of characters."""
    if text is None:
        return "null", 0
    if len(text) > max_bytes:
        return f"a text of {len(text):,} bytes", 0
    try:
        return "", len(text.decode())
    except UnicodeDecodeError as error:
        return _encoding_fault(error), 0


def utf8_reason(line: bytes) -> str:
    """Describes the encoding fault of a line; "" if it is valid UTF-8."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return _encoding_fault(error)
    return ""


def bad_line_limit(lines: int, corpus: CorpusSettings) -> int:
    """Returns the bad lines allowed in a source of `lines` lines: `corpus.max_bad_lines`, or 0.1 % if that is more."""
    return max(corpus.max_bad_lines, int(BAD_LINE_SHARE * lines))


def _encoding_fault(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 ({error.reason} at byte {error.start + 1})"

"""The rules that drop, quarantine and hold out documents, one by one. test_shard.py applies them to a source."""

import hashlib
from typing import Any

import pytest

from tasks.corpus.document import Document, Labels
from tasks.corpus.filters import (
    DROP_REASONS,
    Deduplicator,
    bad_line_limit,
    drop_reason,
    is_heldout,
    quarantine_reason,
    text_reason,
)
from tasks.recipe.config import CorpusSettings


def document(text: str = "Bonjour.", **labels: Any) -> Document:
    values: dict[str, Any] = {"language": "fr", "language_prob": 0.9, "harmful_pp": 500.0, "warnings": ()}
    return Document(text.encode(), len(text), 1, Labels(**(values | labels)))


@pytest.mark.parametrize(
    ("settings", "labels", "reason"),
    [
        ({}, {"language": "en"}, "language"),
        ({"language": ""}, {"language": "en"}, ""),
        ({"min_language_prob": 0.9}, {}, ""),
        ({"min_language_prob": 0.91}, {}, "language_prob"),
        ({"min_language_prob": 0.91}, {"language_prob": None}, ""),
        ({"drop_warnings": ("tiny", "header")}, {"warnings": ("noisy", "header")}, "quality_warning"),
        ({"drop_warnings": ("tiny",)}, {"warnings": ("noisy",)}, ""),
        ({"min_harmful_pp": 500}, {}, ""),
        ({"min_harmful_pp": 501}, {}, "harmful"),
        ({"min_harmful_pp": 501}, {"harmful_pp": None}, ""),
        ({"min_chars": 8}, {}, ""),
        ({"min_chars": 9}, {}, "short"),
    ],
)
def test_each_rule_drops_a_document_at_its_limit(settings: dict[str, Any], labels: dict[str, Any], reason: str) -> None:
    assert drop_reason(document(**labels), CorpusSettings(url="corpus", **settings)) == reason
    assert reason in ("", *DROP_REASONS)


def test_document_without_labels_is_only_dropped_by_length() -> None:
    strict = CorpusSettings(url="corpus", min_language_prob=1, drop_warnings=("tiny",), min_harmful_pp=1e9, min_chars=8)
    unlabelled = document()._replace(labels=None)
    assert drop_reason(unlabelled, strict) == ""
    assert drop_reason(unlabelled._replace(chars=7), strict) == "short"


def test_long_documents_and_invalid_texts_are_quarantined() -> None:
    assert quarantine_reason(document("x" * 40), CorpusSettings(url="corpus", max_chars=40)) == ""
    assert quarantine_reason(document("x" * 41), CorpusSettings(url="corpus", max_chars=40)) == (
        "a document of 41 characters"
    )
    assert text_reason("été".encode(), 5) == ("", 3)
    assert text_reason("étés".encode(), 5) == ("a text of 6 bytes", 0)
    assert text_reason(b"a\xff", 5) == ("not UTF-8 (invalid start byte at byte 2)", 0)
    assert text_reason(None, 5) == ("null", 0)


def test_heldout_documents_are_chosen_by_the_hash_of_their_text() -> None:
    digests = [hashlib.sha256(str(number).encode()).digest() for number in range(10_000)]
    assert not any(is_heldout(digest, 0) for digest in digests)
    assert 400 < sum(is_heldout(digest, 50) for digest in digests) < 600
    assert is_heldout((4).to_bytes(32, "big"), 5)
    assert not is_heldout((5).to_bytes(32, "big"), 5)


def test_deduplicator_finds_repeated_digests_until_it_is_cleared() -> None:
    deduplicator = Deduplicator()
    assert [deduplicator.is_duplicate(digest) for digest in (b"a", b"b", b"a")] == [False, False, True]
    deduplicator.clear()
    assert not deduplicator.is_duplicate(b"a")


def test_bad_line_limit_is_the_setting_or_one_per_mille() -> None:
    corpus = CorpusSettings(url="corpus", max_bad_lines=10)
    assert [bad_line_limit(lines, corpus) for lines in (0, 10_999, 11_000, 1_000_000)] == [10, 10, 11, 1000]

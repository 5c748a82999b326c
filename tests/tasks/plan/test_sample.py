"""A measured sample: small corpora are counted exactly, and the beginning of a file predicts the complete file."""

import random
from pathlib import Path

import pytest

from storage.errors import FatalError
from storage.store import Store
from tasks.corpus.shard import heldout_of, shard_source, shards_of
from tasks.corpus.snapshot import take_snapshot
from tasks.plan import sample as module
from tasks.plan.sample import Sample, take_sample
from tasks.recipe.config import BlockSettings, CorpusSettings, MaskSettings
from tasks.tokens.vocabulary import load_vocabulary
from tests.harness.tiny import documents, save_tokenizer
from tests.tasks.conftest import CorpusFolder

BIG = 300
"""Documents of a large source, 10,000 characters each."""


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    return str(save_tokenizer(tmp_path / "tokenizer"))


def sampled(store: Store, corpus: CorpusSettings, tokenizer: str, budget: int, *, skip_bad: bool = False) -> Sample:
    sources = take_snapshot(corpus).sources
    vocabulary = load_vocabulary(tokenizer)
    return take_sample(
        store, corpus, BlockSettings(length=32), MaskSettings(), vocabulary, sources, budget, skip_bad=skip_bad
    )


def hexadecimal(seed: int) -> list[str]:
    """Texts that compress badly, to half a byte per character."""
    draw = random.Random(seed)
    return [draw.randbytes(5_000).hex() for _ in range(BIG)]


def test_a_small_corpus_is_counted_exactly(store: Store, corpus: CorpusFolder, tokenizer: str, tmp_path: Path) -> None:
    for number in range(3):
        texts = documents(40, seed=number)
        corpus.oscar_2301(f"part_{number}.jsonl.zst", [*texts, texts[0]])
    settings = corpus.settings(heldout_per_mille=100)
    found = sampled(store, settings, tokenizer, 10_000_000)
    real = Store(tmp_path / "real")
    snapshot = take_snapshot(settings)
    receipts = [shard_source(real, source, settings) for source in snapshot.sources]
    shards = [real.receipt(ref) for one in receipts for ref in (*shards_of(one), *heldout_of(one))]
    assert found.sources == 3
    assert found.source_bytes == sum(source.size for source in snapshot.sources)
    assert found.documents == 123
    assert found.dropped == 3
    assert found.text_bytes == sum(one.info["counts"]["bytes"] for one in receipts)
    assert found.shard_bytes == sum(one.size for one in shards)
    assert found.heldout == sum(one.info["counts"]["heldout"] for one in receipts) > 0
    assert found.rows == sum(store.receipt(ref).rows for ref in found.blocks)


@pytest.mark.parametrize("name", ["big.jsonl.zst", "big.jsonl.gz", "big.jsonl", "big.parquet"])
def test_the_beginning_predicts_the_complete_source(
    name: str, store: Store, corpus: CorpusFolder, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MIN_BYTES", 300_000)
    texts = hexadecimal(1)
    if name.endswith("parquet"):
        corpus.parquet(name, {"text": texts})
    else:
        corpus.oscar_2301(name, texts)
    found = sampled(store, corpus.settings(), tokenizer, 100_000)
    assert 0 < found.documents < BIG / 2 if name != "big.jsonl.zst" else found.documents < BIG
    size = sum(source.size for source in take_snapshot(corpus.settings()).sources)
    assert size * found.text_bytes / found.source_bytes == pytest.approx(10_000 * BIG, rel=0.05)


def test_text_that_compresses_better_later_is_not_underestimated(
    store: Store, corpus: CorpusFolder, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second half of the beginning, which compresses well, predicts the rest."""
    monkeypatch.setattr(module, "MIN_BYTES", 700_000)
    fresh, known = hexadecimal(1)[:60], hexadecimal(1)[:6]
    corpus.oscar_2301("big.jsonl.zst", [*fresh, *(f"{a[:2000]}{b[:8000]}" for a in hexadecimal(2) for b in known)])
    settings = corpus.settings()
    found = sampled(store, settings, tokenizer, 100_000)
    size = take_snapshot(settings).sources[0].size
    whole = 60 * 10_000 + 6 * BIG * 10_000
    assert size * found.text_bytes / found.source_bytes == pytest.approx(whole, rel=0.2)


def test_a_source_with_a_companion_file_keeps_its_documents(store: Store, corpus: CorpusFolder, tokenizer: str) -> None:
    """Its text alone would look like one document per line."""
    corpus.oscar_2109(1, ["\n".join(f"Phrase {i}." for i in range(2000)), "Deux."])
    assert sampled(store, corpus.settings(), tokenizer, 10_000_000).documents == 2


def test_a_bad_source_is_an_error_or_skipped(store: Store, corpus: CorpusFolder, tokenizer: str) -> None:
    corpus.oscar_2301("good.jsonl", documents(20))
    corpus.write("bad.jsonl", b'{"title": 1}\n' * 30)
    with pytest.raises(FatalError, match=r"bad\.jsonl"):
        sampled(store, corpus.settings(), tokenizer, 10_000_000)
    assert sampled(store, corpus.settings(), tokenizer, 10_000_000, skip_bad=True).documents == 20

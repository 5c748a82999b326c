"""Shards of a source: the expected documents, reproducible bytes, and no receipt after an error."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
import zstandard

from storage.arrow import TEXT_FILE, open_arrow
from storage.artifact import Receipt, Ref
from storage.errors import FatalError, RetryableError
from storage.store import Store
from tasks.corpus.shard import heldout_of, shard_source, shards_of, source_ref
from tasks.corpus.snapshot import Source, source_content, take_snapshot
from tasks.recipe.config import CorpusSettings


def only_source(settings: CorpusSettings) -> Source:
    (source,) = take_snapshot(settings).sources
    return source


def shard(store: Store, settings: CorpusSettings, **options: Any) -> Receipt:
    return shard_source(store, only_source(settings), settings, **options)


def rows_of(store: Store, refs: tuple[Ref, ...]) -> list[tuple[str, int]]:
    tables = [open_arrow(store.verified_folder(store.receipt(ref)) / TEXT_FILE).read_all() for ref in refs]
    return [(row["text"], row["line"]) for table in tables for row in table.to_pylist()]


def is_heldout(text: str, per_mille: int) -> bool:
    return int(hashlib.sha256(text.encode("utf-8")).hexdigest(), 16) % 1000 < per_mille


# ---- documents that are kept -------------------------------------------------------------------------------


def test_text_and_line_numbers_arrive_unchanged(corpus: Any, store: Store) -> None:
    corpus.oscar_2301("fr_meta/fr_meta_part_3.jsonl.zst")
    receipt = shard(store, corpus.settings())
    assert rows_of(store, shards_of(receipt)) == [(text, line) for line, text in enumerate(corpus.texts, 1)]
    (ref,) = shards_of(receipt)
    assert (receipt.kind, receipt.label, ref.kind, ref.label) == (
        "source",
        "fr_meta_part_3",
        "shard",
        "fr_meta_part_3-0000",
    )
    assert heldout_of(receipt) == ()
    size = sum(len(text.encode()) for text in corpus.texts)
    assert receipt.info["shards"] == [{"key": ref.key, "label": ref.label, "rows": 3, "bytes": size}]
    assert receipt.rows == store.receipt(ref).rows == 3
    assert receipt.info["schema"] == "oscar-23.01"


def test_every_filter_counts_the_documents_that_it_drops(corpus: Any, store: Store) -> None:
    def record(text: str, **metadata: Any) -> dict[str, Any]:
        labels = {"identification": {"label": "fr", "prob": 0.9}, "harmful_pp": 500.0, "quality_warnings": None}
        return {"content": text, "metadata": labels | metadata}

    records = [
        record("kept, all is well"),
        record("an English text", identification={"label": "en", "prob": 0.9}),
        record("hardly French", identification={"label": "fr", "prob": 0.3}),
        record("with a warning", quality_warnings=["tiny", "noisy"]),
        record("harmful to read", harmful_pp=20.0),
        record("court"),
        record("kept, all is well"),
        record("kept, nothing is known", identification=None, harmful_pp=None),
        record("x" * 41),
        {"content": "kept, without metadata"},
    ]
    corpus.jsonl("a.jsonl", records)
    settings = corpus.settings(
        min_language_prob=0.5, drop_warnings=("noisy", "header"), min_harmful_pp=100, min_chars=6, max_chars=40
    )
    receipt = shard(store, settings)
    assert rows_of(store, shards_of(receipt)) == [
        ("kept, all is well", 1),
        ("kept, nothing is known", 8),
        ("kept, without metadata", 10),
    ]
    assert receipt.info["counts"] == {
        "lines": 10,
        "documents": 10,
        "bad": 1,
        "language": 1,
        "language_prob": 1,
        "quality_warning": 1,
        "harmful": 1,
        "short": 1,
        "duplicate": 1,
        "kept": 3,
        "heldout": 0,
        "bytes": 17 + 22 + 22,
    }
    quarantine = json.loads((store.local_folder(receipt) / "quarantine.jsonl").read_text("utf-8"))
    assert quarantine == {"line": 9, "reason": "a document of 41 characters", "excerpt": "x" * 41}


def test_disabled_filters_drop_nothing(corpus: Any, store: Store) -> None:
    corpus.oscar_2301("a.jsonl", ["un", "un"], identification={"label": "en", "prob": 0.1}, harmful_pp=1.0)
    receipt = shard(store, corpus.settings(language="", deduplicate=False))
    assert rows_of(store, shards_of(receipt)) == [("un", 1), ("un", 2)]


def test_heldout_documents_get_their_own_shard(corpus: Any, store: Store) -> None:
    texts = [f"Document numéro {i % 300}" for i in range(600)]
    corpus.jsonl("a.jsonl", [{"text": text} for text in texts])
    receipt = shard(store, corpus.settings(heldout_per_mille=100))
    kept, heldout = rows_of(store, shards_of(receipt)), rows_of(store, heldout_of(receipt))
    first = {text: line for line, text in reversed(list(enumerate(texts, 1)))}
    assert heldout == [
        (text, line) for text, line in sorted(first.items(), key=lambda row: row[1]) if is_heldout(text, 100)
    ]
    assert kept == [
        (text, line) for text, line in sorted(first.items(), key=lambda row: row[1]) if not is_heldout(text, 100)
    ]
    assert 10 < len(heldout) < 60
    assert [ref.label for ref in heldout_of(receipt)] == ["a-heldout"]
    assert (receipt.info["counts"]["heldout"], receipt.info["counts"]["duplicate"]) == (len(heldout), 300)


def test_source_without_kept_documents_has_no_shards(corpus: Any, store: Store) -> None:
    corpus.oscar_2301("a.jsonl", identification={"label": "en", "prob": 1.0})
    receipt = shard(store, corpus.settings())
    assert shards_of(receipt) == heldout_of(receipt) == ()
    assert (receipt.rows, receipt.info["counts"]["language"]) == (0, 3)


def test_large_source_is_cut_into_shards_of_about_shard_bytes(corpus: Any, store: Store) -> None:
    texts = [f"{i} {'mot ' * 200}" for i in range(200)]
    corpus.jsonl("a.jsonl", [{"text": text} for text in texts])
    receipt = shard(store, corpus.settings(shard_bytes=50_000))
    assert [ref.label for ref in shards_of(receipt)] == ["a-0000", "a-0001", "a-0002", "a-0003"]
    assert rows_of(store, shards_of(receipt)) == [(text, line) for line, text in enumerate(texts, 1)]
    *full, last = [item["bytes"] for item in receipt.info["shards"]]
    assert all(50_000 <= size < 51_000 for size in full)
    assert 0 < last < 50_000
    assert len({ref.key for ref in shards_of(receipt)}) == 4


def test_duplicates_are_dropped_within_one_shard_only(corpus: Any, store: Store) -> None:
    corpus.jsonl("a.jsonl", [{"text": "a" * 6000}, {"text": "b" * 6000}, {"text": "b" * 6000}, {"text": "b" * 6000}])
    receipt = shard(store, corpus.settings(shard_bytes=10_000))
    assert [text[0] for text, _ in rows_of(store, shards_of(receipt))] == ["a", "b", "b"]
    assert receipt.info["counts"]["duplicate"] == 1


def test_oscar_2109_pair_becomes_one_source(corpus: Any, store: Store) -> None:
    corpus.oscar_2109(1)
    corpus.checksums()
    receipt = shard(store, corpus.settings())
    assert [text for text, _ in rows_of(store, shards_of(receipt))] == list(corpus.texts)
    assert receipt.label == "fr_part_1"


def test_tiny_corpus_matches_a_plain_recount(shared_data: Path, store: Store) -> None:
    settings = CorpusSettings(url=str(shared_data / "corpus" / "tiny"))
    for source in take_snapshot(settings).sources:
        receipt = shard_source(store, source, settings)
        with Path(source.url).open("rb") as file:
            text = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8", newline="\n")
            documents = [json.loads(line)["content"] for line in text]
        unique = list(dict.fromkeys(documents))
        assert [text for text, _ in rows_of(store, shards_of(receipt))] == [t for t in unique if not is_heldout(t, 5)]
        assert [text for text, _ in rows_of(store, heldout_of(receipt))] == [t for t in unique if is_heldout(t, 5)]
        assert receipt.info["counts"]["bytes"] == sum(len(text.encode()) for text in unique)


# ---- reproducible bytes, made once -------------------------------------------------------------------------


def bytes_of(store: Store, receipt: Receipt) -> dict[str, str]:
    refs = (*shards_of(receipt), *heldout_of(receipt))
    return {ref.label: file.sha256 for ref in refs for file in store.receipt(ref).files}


def test_shards_are_byte_identical_on_any_file_system(corpus: Any, tmp_path: Path) -> None:
    corpus.jsonl("a.jsonl.zst", [{"text": f"{i} {'été ' * 50}"} for i in range(500)])
    settings = corpus.settings(shard_bytes=20_000, heldout_per_mille=50)
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/shard-test/a.jsonl.zst", (corpus.path / "a.jsonl.zst").read_bytes())
    local = Store(tmp_path / "one")
    first = shard(local, settings)
    remote = Store("memory://shard-test-store", cache=tmp_path / "cache")
    second = shard(remote, settings.model_copy(update={"url": "memory://shard-test", "max_bad_lines": 99}))
    assert first.key == second.key
    assert bytes_of(local, first) == bytes_of(remote, second)
    assert len(shards_of(first)) > 3
    assert len(heldout_of(first)) == 1
    assert list((tmp_path / "scratch").glob("*")) == []


def test_repeated_call_writes_nothing(corpus: Any, store: Store) -> None:
    corpus.oscar_2301("a.jsonl")
    settings = corpus.settings()
    first = shard(store, settings)
    before = {path: path.stat().st_mtime_ns for path in Path(store.root).rglob("*")}
    assert shard(store, settings) == first
    assert {path: path.stat().st_mtime_ns for path in Path(store.root).rglob("*")} == before
    assert shard(store, settings, force=True).key == first.key
    assert {path: path.stat().st_mtime_ns for path in Path(store.root).rglob("*")} != before


def test_same_content_with_another_name_or_mtime_is_the_same_artifact(corpus: Any, store: Store) -> None:
    path = corpus.oscar_2301("a.jsonl")
    first = shard(store, corpus.settings())
    path.rename(corpus.path / "b.jsonl")
    os.utime(corpus.path / "b.jsonl", (1, 1))
    assert shard(store, corpus.settings()) == first


def test_settings_that_change_the_bytes_change_the_key(corpus: Any, store: Store) -> None:
    corpus.oscar_2301("a.jsonl")
    source = only_source(corpus.settings())
    changes: list[dict[str, Any]] = [{}, {"min_chars": 5}, {"heldout_per_mille": 5}, {"deduplicate": False}]
    changes += [{"text": "lines"}, {"text": "paragraphs"}]
    keys = {source_ref(source, "c" * 64, corpus.settings(**change)).key for change in changes}
    assert len(keys) == len(changes)
    assert source_ref(source, "c" * 64, corpus.settings(pattern="*.jsonl")).key in keys


def test_newer_settings_leave_existing_keys_valid() -> None:
    source = Source("a.jsonl", url="/corpus/a.jsonl", size=1, stamp="", sha256=None, label="a")
    key = source_ref(source, "c" * 64, CorpusSettings(url="/corpus")).key
    assert key == "d877424993306b2136e5ab41ae67ac5a5d65f0d10a0d18195bfded2bf72ed139"


def test_withdrawn_shard_is_made_again(corpus: Any, store: Store) -> None:
    corpus.jsonl("a.jsonl", [{"text": f"{i} {'mot ' * 200}"} for i in range(50)])
    settings = corpus.settings(shard_bytes=10_000)
    receipt = shard(store, settings)
    store.withdraw(shards_of(receipt)[1])
    assert shard(store, settings).info == receipt.info
    assert store.missing(shards_of(receipt)) == []


# ---- errors, without a receipt -----------------------------------------------------------------------------


def store_is_empty(store: Store) -> bool:
    return not store.keys("source") and not store.keys("shard") and not any(Path(store.root).glob("scratch/*"))


def test_wrong_checksum_fails_before_any_receipt(corpus: Any, store: Store) -> None:
    path = corpus.oscar_2301("part_1.jsonl")
    corpus.checksums()
    path.write_bytes(path.read_bytes().replace(b"camembert", b"reblochon"))
    source = only_source(corpus.settings())
    with pytest.raises(FatalError, match=r"^part_1\.jsonl: its sha256 is .* but the checksum file says") as caught:
        shard_source(store, source, corpus.settings())
    assert caught.value.file == "part_1.jsonl"
    assert store_is_empty(store)


def test_checksum_of_pair_metadata_is_verified(corpus: Any, store: Store) -> None:
    _, metadata = corpus.oscar_2109(1)
    corpus.checksums()
    metadata.write_bytes(metadata.read_bytes() + b"x")
    with pytest.raises(FatalError, match=r"fr_meta_part_1\.jsonl\.gz: its sha256 is"):
        shard(store, corpus.settings())
    assert store_is_empty(store)


@pytest.mark.parametrize("name", ["part_1.jsonl.zst", "part_1.jsonl.gz"])
def test_truncated_archive_fails_and_succeeds_once_complete(corpus: Any, store: Store, name: str) -> None:
    path = corpus.jsonl(name, [{"text": f"{i} {i**7} {i**11}"} for i in range(3000)])
    complete = path.read_bytes()
    path.write_bytes(complete[:-50])
    with pytest.raises(FatalError, match=rf"{name} is truncated"):
        shard(store, corpus.settings())
    assert store_is_empty(store)
    path.write_bytes(complete)
    assert shard(store, corpus.settings()).rows == 3000


def test_empty_file_fails(corpus: Any, store: Store) -> None:
    corpus.write("part_1.jsonl", b"")
    with pytest.raises(FatalError, match=r"part_1\.jsonl is empty"):
        shard(store, corpus.settings())
    assert store_is_empty(store)


def test_oversized_documents_count_as_bad_lines(corpus: Any, store: Store) -> None:
    corpus.jsonl("part_1.jsonl", [{"text": "x" * 100 + str(i)} for i in range(12)])
    with pytest.raises(FatalError, match="12 of 12 lines are bad"):
        shard(store, corpus.settings(max_chars=50))
    assert store_is_empty(store)


def test_file_that_changes_or_disappears_during_the_read_fails(
    corpus: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = corpus.oscar_2301("part_1.jsonl")
    source = only_source(corpus.settings())

    def touch_instead(store: Store, source: Source, content: str) -> None:
        os.utime(path, (1, 1))

    monkeypatch.setattr("tasks.corpus.shard.remember_source_content", touch_instead)
    with pytest.raises(RetryableError, match=r"part_1\.jsonl changed while it was being read"):
        shard_source(store, source, corpus.settings())
    path.unlink()
    with pytest.raises(FatalError, match=r"part_1\.jsonl no longer exists"):
        shard_source(store, source, corpus.settings())
    assert not store.keys("source")


def test_content_hash_is_remembered_after_the_first_read(corpus: Any, store: Store) -> None:
    path = corpus.oscar_2301("part_1.jsonl")
    source = only_source(corpus.settings())
    shard_source(store, source, corpus.settings())
    assert source_content(store, source) == hashlib.sha256(path.read_bytes()).hexdigest()


# ---- memory ------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from storage.store import Store
from tasks.recipe.config import CorpusSettings
from tasks.corpus.shard import shard_source
from tasks.corpus.snapshot import take_snapshot
from tests.harness.peak import peak_megabytes

settings = CorpusSettings(url=sys.argv[1], max_chars=100_000_000, max_unpacked_ratio=10**6)  # its text repeats itself
(source,) = take_snapshot(settings).sources
receipt = shard_source(Store(sys.argv[2]), source, settings)
print(receipt.info["counts"]["documents"], len(receipt.info["shards"]), round(peak_megabytes()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "documents", "words", "shards"),
    [
        ("long.jsonl.zst", 300_000, 1200, 17),  # 2.1 GB
        ("short.txt.gz", 3_000_000, 3, 3),  # many hashes for deduplication
        ("blob.jsonl.zst", 20, 5_000_000, 4),  # lines of 30 MB
    ],
)
def test_huge_source_needs_less_than_1_gb(
    corpus: Any, tmp_path: Path, repo: Path, name: str, documents: int, words: int, shards: int
) -> None:
    form = '{"content": "%d %s"}\n' if "json" in name else "%d %s\n"
    filler = "mieux " * (words - 1) + "été"
    opened = zstandard.open if name.endswith(".zst") else gzip.open
    with opened(corpus.path / name, "wt", encoding="utf-8", newline="\n") as file:
        for number in range(documents):
            file.write(form % (number, filler))
    command = [sys.executable, "-c", MEASURE, str(corpus.path), str(tmp_path / "store")]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=True, timeout=600)
    documents_read, shards_made, megabytes = map(int, done.stdout.split())
    print(f"{name}: {megabytes} MB")
    assert documents_read == documents
    assert shards_made == shards
    assert megabytes < 1_000

"""Checks that decompression bombs are rejected by name in one sentence, with bounded memory and disk usage.

The files are full-size bombs (10 GB from 10 MB or less). Only the amount that is decompressed before a file is rejected
is scaled down, by `corpus.max_unpacked_ratio` and UNCHECKED_BYTES of lines.py. The test with full limits is `slow`.
"""

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from storage.errors import FatalError, RetryableError
from storage.store import Store
from tasks.corpus import fetch
from tasks.corpus.fetch import fetched
from tasks.corpus.shard import shard_source
from tasks.corpus.snapshot import Source, take_snapshot
from tasks.plan.sample import take_sample
from tasks.recipe.config import BlockSettings, CorpusSettings, MaskSettings
from tasks.tokens.vocabulary import load_vocabulary
from tests.conftest import REPO
from tests.harness.tiny import save_tokenizer

MB = 1 << 20
PIECE = 20 * MB
TIMES = 512
LIMIT_MEGABYTES = 150
"""Memory in MB that a rejected file may use in addition to the initial memory of the process."""

MEASURE = """
import sys
from pathlib import Path
from storage.errors import FatalError
from storage.store import Store
from tasks.corpus import shard
from tasks.corpus.formats import lines, parquet_pages as pages
from tasks.recipe.config import CorpusSettings
from tasks.corpus.snapshot import take_snapshot
from tests.harness.peak import peak_megabytes

corpus, place, ratio, scale = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
lines.UNCHECKED_BYTES //= scale
pages.MAX_BATCH_BYTES //= scale
pages.MAX_PAGE_BYTES //= scale
settings = CorpusSettings(url=corpus, max_unpacked_ratio=ratio, max_line_bytes=32_000_000 // scale)
before = peak_megabytes()
for source in take_snapshot(settings).sources:
    try:
        shard.shard_source(Store(place), source, settings)
        print(source.name, "was taken")
    except FatalError as error:
        print(f"{source.name}|{round(peak_megabytes() - before)}|{error}")
"""


def packed(piece: bytes, name: str) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(piece, 9, mtime=0)
    return zstandard.ZstdCompressor(level=3).compress(piece)


def write_bombs(folder: Path) -> dict[str, str]:
    """Writes files of a few MB or less to `folder`. Returns a pattern of the expected error of each, by name."""
    folder.mkdir()
    line = b'{"text": "' + b"mieux " * 1000 + b'"}\n'
    pieces = {
        "lines.jsonl": (line * (PIECE // len(line)), "unpacks to more than"),
        "blank.txt": (b"Un.\n" + b"\n" * PIECE, "unpacks to more than"),
        "endless.jsonl": (b'{"text": "' + b"a" * PIECE, "(a line does not end|unpacks to more than)"),
        "packed.parquet": (b"PAR1" + bytes(PIECE), "unpacks to more than"),
    }
    reasons = {}
    for stem, (piece, reason) in pieces.items():
        for suffix in (".gz", ".zst"):
            (folder / f"{stem}{suffix}").write_bytes(packed(piece, suffix) * TIMES)
            reasons[f"{stem}{suffix}"] = reason
    with (folder / "sparse.jsonl").open("wb") as file:
        file.write(b'{"text": "')
        os.truncate(file.fileno(), 60 * MB)  # 10 GB would only increase the time to hash
    texts = pa.array(["e" * (5 * MB)] * 3 + ["un"] * 10)
    pq.write_table(pa.table({"text": texts}), folder / "page.parquet", compression="zstd")
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 5_000, pa.int32()), pa.array(["mieux " * 200_000]))
    pq.write_table(pa.table({"text": rows}), folder / "rows.parquet", compression="zstd")
    return reasons | {
        "sparse.jsonl": "a line does not end after",
        "page.parquet": "a page of its column text unpacks to .* bytes",
        "rows.parquet": "unpacks to more than",
    }


def refusals(folder: Path, place: Path, ratio: int, scale: int) -> dict[str, tuple[int, str]]:
    """Returns, by file, the growth of the process in MB until its error, and the error message."""
    command = [sys.executable, "-c", MEASURE, str(folder), str(place), str(ratio), str(scale)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True, timeout=600)
    lines = [line.split("|", 2) for line in done.stdout.splitlines()]
    return {name: (int(megabytes), sentence) for name, megabytes, sentence in lines}


def test_each_bomb_is_refused_by_name_in_bounded_memory(tmp_path: Path) -> None:
    reasons = write_bombs(tmp_path / "corpus")
    assert max(path.stat().st_size for path in (tmp_path / "corpus").glob("*.*.*")) < 20 * MB
    found = refusals(tmp_path / "corpus", tmp_path / "store", ratio=1, scale=128)
    assert found.keys() == reasons.keys()
    for name, reason in reasons.items():
        megabytes, sentence = found[name]
        assert re.match(f"{re.escape(name)}:? {reason}", sentence), sentence
        assert megabytes < LIMIT_MEGABYTES, name
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file() and "notes" not in path.parts] == []


@pytest.mark.slow
def test_ten_gigabytes_out_of_ten_megabytes_at_real_limits(tmp_path: Path) -> None:
    """Reads a gzip bomb with a ratio of 1,000 to 1, and a zstd bomb with a higher one, with the default limits."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    piece = b'{"text": "' + b"a" * 1_000_000 + b'"}\n'
    for suffix in (".gz", ".zst"):
        (folder / f"bomb.jsonl{suffix}").write_bytes(packed(piece * 100, suffix) * 100)
    assert (folder / "bomb.jsonl.gz").stat().st_size < 12 * MB
    found = refusals(folder, tmp_path / "store", ratio=200, scale=1)
    for name, (megabytes, sentence) in found.items():
        assert sentence.startswith(f"{name} unpacks to more than 200 times its ")
        assert megabytes < 300
    assert len(found) == 2


def test_a_parquet_page_is_known_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page headers determine the sizes, not the footer, and a missing page header is reported as damage."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    path = folder / "a.parquet"
    pq.write_table(pa.table({"text": [f"{number} mieux" for number in range(2000)]}), path, use_dictionary=False)
    store, settings = Store(tmp_path / "store"), CorpusSettings(url=str(folder), heldout_per_mille=0)
    (source,) = take_snapshot(settings).sources
    monkeypatch.setattr("tasks.corpus.formats.parquet_pages.MAX_PAGE_BYTES", 1000)
    with pytest.raises(FatalError, match=r"^a\.parquet: a page of its column text unpacks to .* smaller pages"):
        shard_source(store, source, settings)
    monkeypatch.undo()
    monkeypatch.setattr("tasks.corpus.formats.parquet_pages.MAX_BATCH_BYTES", 1)  # row by row
    assert shard_source(store, source, settings).rows == 2000
    data = bytearray(path.read_bytes())
    data[4:12] = b"\xff" * 8  # the header of the first page
    path.write_bytes(data)
    (source,) = take_snapshot(settings).sources
    with pytest.raises(FatalError, match=r"^a\.parquet is damaged: no page at byte 4"):
        shard_source(store, source, settings)


@pytest.mark.parametrize("name", ["bomb.jsonl.gz", "bomb.jsonl.zst", "bomb.parquet"])
def test_a_plan_does_not_unpack_a_bomb_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("tasks.corpus.formats.lines.UNCHECKED_BYTES", MB)
    folder = tmp_path / "corpus"
    folder.mkdir()
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": ["mieux " * 50_000] * 100}), folder / name, compression="zstd")
    else:
        (folder / name).write_bytes(packed(b'{"text": "' + b"a" * PIECE + b'"}\n', name) * 60)
    settings = CorpusSettings(url=str(folder), max_unpacked_ratio=2)
    vocabulary = load_vocabulary(str(save_tokenizer(tmp_path / "tokenizer")))
    sources, store = take_snapshot(settings).sources, Store(tmp_path / "store")
    budget = sources[0].size - 1
    with pytest.raises(FatalError, match=rf"^{name} unpacks to more than 2 times its"):
        take_sample(store, settings, BlockSettings(length=32), MaskSettings(), vocabulary, sources, budget)


def test_a_server_that_never_ends_does_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(source: Source) -> Any:
        while True:
            yield bytes(MB)

    monkeypatch.setattr(fetch, "_download", endless)
    source = Source("a.jsonl", "memory://a.jsonl", 3 * MB, "", None, "a")
    with (
        pytest.raises(RetryableError, match=r"^a\.jsonl has more than the 3,145,728 bytes that were listed"),
        fetched(source, tmp_path),
    ):
        pass
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5 * MB

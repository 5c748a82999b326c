"""Real French text, the real CamemBERT tokenizer: sources and blocks counted independently, and a later snapshot."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard
from tokenizers import Tokenizer

from tests.harness.project import Project, Shell, make_project, new_artifacts

HELDOUT_PER_MILLE = 5
BATCH = 1000


@dataclass
class Count:
    """Documents and their tokens without special ones; held-out documents; duplicates in one source."""

    documents: int = 0
    tokens: int = 0
    heldout: int = 0
    duplicates: int = 0


def settings_of(shared_data: Path) -> tuple[str, ...]:
    """Plain MLM training, so that there is no teacher: only sources and blocks are to be made."""
    return (
        f"blocks.tokenizer={shared_data}/tokenizer/camembert-base",
        "blocks.length=512",
        "teacher.model=",
        "student.init=config",
        'student.config={model_type="roberta"}',
        "loss.distil=0",
        "loss.cosine=0",
        f"corpus.heldout_per_mille={HELDOUT_PER_MILLE}",
        "corpus.shard_bytes=128_000_000",
    )


def texts_of(path: Path) -> Iterator[str]:
    """The documents of a source, read with zstandard and json alone."""
    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        rest = b""
        while chunk := stream.read(1 << 20):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (json.loads(line)["content"] for line in lines if line)
        assert not rest


def count(path: Path, tokenizer: Tokenizer) -> Count:
    """The documents of a source, by plain Python: exact duplicates and one document in 200 are left out."""
    found, seen, batch = Count(), set(), []
    for text in texts_of(path):
        digest = hashlib.sha256(text.encode()).digest()
        if digest in seen:
            found.duplicates += 1
            continue
        seen.add(digest)
        if int.from_bytes(digest, "big") % 1000 < HELDOUT_PER_MILLE:
            found.heldout += 1
            continue
        found.documents += 1
        batch.append(text)
        if len(batch) == BATCH:
            found.tokens += tokens_of(batch, tokenizer)
            batch = []
    found.tokens += tokens_of(batch, tokenizer)
    return found


def tokens_of(texts: list[str], tokenizer: Tokenizer) -> int:
    return sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))


def check_counts(project: Project, corpus: Path, tokenizer_folder: Path) -> None:
    """Receipts of sources and blocks against the independent count."""
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.no_truncation()
    sources = {receipt.label: receipt.info["counts"] for receipt in project.receipts("source")}
    blocks = {receipt.label: receipt for receipt in project.receipts("blocks")}
    for path in sorted(corpus.rglob("*.zst")):
        label = path.name.split(".")[0]
        expected, counts = count(path, tokenizer), sources[label]
        assert expected.documents == counts["kept"]
        assert expected.heldout == counts["heldout"]
        assert expected.duplicates == counts["duplicate"]
        assert expected.documents == blocks[f"{label}-0000"].info["documents"]
        assert expected.tokens == blocks[f"{label}-0000"].info["text_tokens"]


def write_checksums(folder: Path) -> None:
    """The checksum file as OSCAR writes it, with one space."""
    names = sorted(path.name for path in folder.glob("*.zst"))
    hashes = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()} {name}\n" for name in names]
    (folder / "fr_sha256.txt").write_text("".join(hashes), encoding="utf-8")


def shorten(source: Path, target: Path, documents: int) -> None:
    """A source of the first documents of another."""
    lines = zstandard.ZstdDecompressor().decompressobj().decompress(source.read_bytes()).split(b"\n")[:documents]
    target.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(b"\n".join(lines) + b"\n"))


def prepare(shell: Shell, project: Project, corpus: Path, shared_data: Path) -> str:
    result = shell("prepare", project.recipe, *settings_of(shared_data), f"corpus.url={corpus}")
    assert result.status == 0, result.err
    return result.out


def test_counts_and_a_later_snapshot(shared_data: Path, shell: Shell, tmp_path: Path) -> None:
    corpus = Path(shutil.copytree(shared_data / "corpus" / "tiny", tmp_path / "corpus"))
    project = make_project(tmp_path / "project", corpus, Path("unused"))
    prepare(shell, project, corpus, shared_data)
    check_counts(project, corpus, shared_data / "tokenizer" / "camembert-base")
    before = project.creation_times()

    folder = corpus / "fr_meta"
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    shorten(folder / "fr_meta_part_1.jsonl.zst", folder / "fr_meta_part_4.jsonl.zst", 100)
    shorten(folder / "fr_meta_part_1.jsonl.zst", folder / "fr_meta_part_3.jsonl.zst", 200)
    write_checksums(folder)
    prepare(shell, project, corpus, shared_data)
    fresh = new_artifacts(before, project.creation_times())
    assert {label for kind, label in fresh if kind == "source"} == {"fr_meta_part_3", "fr_meta_part_4"}
    assert {kind for kind, _ in fresh} == {"source", "shard", "blocks"}
    assert "nothing to do" in prepare(shell, project, corpus, shared_data)


@pytest.mark.slow
def test_a_whole_corpus_and_its_next_month(shared_data: Path, shell: Shell, tmp_path: Path) -> None:
    subprocess.run([shared_data / "make_snapshots", tmp_path / "snapshots"], check=True)
    september, october = (tmp_path / "snapshots" / month for month in ("2026-09", "2026-10"))
    project = make_project(tmp_path / "project", september, Path("unused"))
    prepare(shell, project, september, shared_data)
    counts = [receipt.info["counts"] for receipt in project.receipts("source")]
    assert len(counts) == 14
    assert sum(one["documents"] for one in counts) == 111_470
    before = project.creation_times()
    assert "nothing to do" in prepare(shell, project, september, shared_data)
    assert project.creation_times() == before

    prepare(shell, project, october, shared_data)
    fresh = new_artifacts(before, project.creation_times())
    changed = {f"fr_meta_part_{number}" for number in (3, 15, 16)}
    assert {label for kind, label in fresh if kind == "source"} == changed
    assert {label.rsplit("-", 1)[0] for kind, label in fresh if kind != "source"} == changed

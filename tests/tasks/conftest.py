"""Fixtures for the tests of tasks/: small corpora of every schema, an empty store, and a teacher's folder.

def test_x(corpus: CorpusFolder, store: Store, folder: Path) -> None: ...
"""

import gzip
import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from storage.store import Store
from tasks.recipe.config import CorpusSettings

TEXTS = (
    "Le camembert est un fromage de Normandie.\nIl se mange à point.",
    "La loi du 9 décembre 1905 sépare les Églises et l'État.",
    "Élodie a reçu 12 € et un œuf ; « naïve », elle les a gardés.",
)


@dataclass(frozen=True)
class CorpusFolder:
    """A folder to write source files into; files whose names end in .gz or .zst are compressed."""

    path: Path
    texts: tuple[str, ...] = TEXTS

    def settings(self, **changes: Any) -> CorpusSettings:
        """The recipe section for this folder; holds out nothing by default."""
        return CorpusSettings(**({"url": str(self.path), "heldout_per_mille": 0} | changes))

    def write(self, name: str, data: bytes) -> Path:
        """Writes one file, compressed according to its name."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".gz"):
            data = gzip.compress(data, mtime=0)
        if name.endswith(".zst"):
            data = zstandard.ZstdCompressor(write_checksum=True).compress(data)
        path.write_bytes(data)
        return path

    def jsonl(self, name: str, records: Iterable[Any]) -> Path:
        """One JSON record per line; records of type bytes are written unchanged."""
        lines = [
            record if isinstance(record, bytes) else json.dumps(record, ensure_ascii=False).encode()
            for record in records
        ]
        return self.write(name, b"".join(line + b"\n" for line in lines))

    def oscar_2301(self, name: str, texts: Iterable[str] | None = None, **metadata: Any) -> Path:
        """A file of OSCAR 23.01 or Colossal OSCAR."""
        return self.jsonl(name, [record_2301(text, **metadata) for text in (texts or self.texts)])

    def oscar_2201(self, name: str, texts: Iterable[str] | None = None, **metadata: Any) -> Path:
        """A file of OSCAR 22.01."""
        labels = {"identification": {"label": "fr", "prob": 0.9}, "annotation": None, "sentence_identifications": []}
        records = [{"content": text, "warc_headers": {}, "metadata": labels | metadata} for text in texts or self.texts]
        return self.jsonl(name, records)

    def oscar_2109(self, number: int, texts: Iterable[str] | None = None) -> tuple[Path, Path]:
        """An OSCAR 21.09 pair: text with a blank line after each document, and its metadata file."""
        texts = tuple(texts or self.texts)
        metadata, offset = [], 0
        for text in texts:
            sentences = text.count("\n") + 1
            metadata.append({"headers": {"warc-type": "conversion"}, "offset": offset, "nb_sentences": sentences})
            offset += sentences + 1
        text_path = self.write(f"fr_part_{number}.txt.gz", "".join(f"{text}\n\n" for text in texts).encode())
        return text_path, self.jsonl(f"fr_meta_part_{number}.jsonl.gz", metadata)

    def parquet(self, name: str, columns: dict[str, Any]) -> Path:
        """A parquet file of several row groups."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path, row_group_size=2)
        return path

    def checksums(self, name: str = "fr_sha256.txt", mark: str = " ") -> Path:
        """A checksum file for every file of its folder, with one space between hash and name as in OSCAR."""
        folder = (self.path / name).parent
        files = sorted(path for path in folder.iterdir() if path.is_file() and "sha256" not in path.name)
        lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}{mark}{path.name}\n" for path in files]
        path = self.path / name
        path.write_text("".join(lines), encoding="utf-8")
        return path


def record_2301(text: str, **metadata: Any) -> dict[str, Any]:
    """One record of OSCAR 23.01, with the nulls of real records."""
    labels = {
        "identification": {"label": "fr", "prob": 0.9},
        "harmful_pp": None,
        "tlsh": None,
        "quality_warnings": None,
        "categories": None,
        "sentence_identifications": [None],
    }
    return {"content": text, "warc_headers": {"warc-type": "conversion"}, "metadata": labels | metadata}


@pytest.fixture
def corpus(tmp_path: Path) -> CorpusFolder:
    """An empty corpus folder."""
    folder = CorpusFolder(tmp_path / "corpus")
    folder.path.mkdir()
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty local store."""
    return Store(tmp_path / "store")


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny teacher, shared by a module: read-only for tests."""
    from tests.harness.tiny import make_teacher  # deferred: imports torch, which most of these tests do not need

    folder = tmp_path_factory.mktemp("original") / "teacher"
    make_teacher(folder)
    return folder


@pytest.fixture
def folder(teacher_folder: Path, tmp_path: Path) -> Path:
    """A copy of the teacher's folder that a test may damage."""
    return Path(shutil.copytree(teacher_folder, tmp_path / "copy"))

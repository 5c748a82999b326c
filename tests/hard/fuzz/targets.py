"""Defines the fuzzing targets of test_fuzz.py and guided.py: readers of external input, each as a call on bytes.

    TARGETS["jsonl"](data, folder)

A target may raise FatalError or RetryableError; any other exception is a finding.
"""

import gzip
import io
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from storage.artifact import failure_from_json, receipt_from_json
from storage.errors import DistilError
from tasks.corpus.checksums import parse_checksums
from tasks.corpus.quarantine import DocumentCounts
from tasks.corpus.reader import read_documents
from tasks.recipe.config import CorpusSettings, MaskSettings
from tasks.recipe.load import load_recipe
from tasks.targets.codec import Calibration, Codec
from tasks.tokens.mask import mask_rows
from tasks.tokens.vocabulary import Vocabulary

Target = Callable[[bytes, Path], None]
WIDTH, VOCABULARY = 48, 300
SETTINGS = CorpusSettings(url="corpus", max_line_bytes=5_000, max_unpacked_ratio=50)
SPECIALS = (0, 1, 2, 3, 4)


def read(data: bytes, folder: Path, name: str) -> None:
    """Reads all documents of a file with these bytes and checks their lengths and line numbers."""
    path = folder / name
    path.write_bytes(data)
    counts = DocumentCounts(name, SETTINGS, folder / "quarantine.jsonl")
    for document in read_documents(path, name, SETTINGS, counts, folder):
        if document.chars != len(document.text.decode()) or document.line < 1:
            raise ValueError(f"the length or line number of {document} is wrong")
    counts.finish()


def overridden(data: bytes, folder: Path) -> None:
    """Loads a recipe; the bytes before the first 0xff are its file, and each later part is an override."""
    first, *others = data.split(b"\xff")
    path = folder / "recipe.toml"
    path.write_bytes(first)
    load_recipe(path, [one.decode("utf-8", "surrogateescape") for one in others])


def coded(data: bytes, _: Path) -> None:
    """Encodes and decodes hidden states in every encoding, which must give finite values, and decodes any payload."""
    floats = np.frombuffer(data[: len(data) // (4 * WIDTH) * 4 * WIDTH], "<f4").astype(np.float32)
    hidden_ND = torch.from_numpy(np.nan_to_num(floats, nan=0, posinf=1e4, neginf=-1e4).clip(-1e4, 1e4))
    hidden_ND = hidden_ND.reshape(-1, WIDTH)
    calibration = Calibration(torch.zeros(WIDTH), torch.ones(WIDTH))
    for name in ("int8", "int4", "bf16"):
        codec = Codec(name, WIDTH, VOCABULARY, calibration=calibration)
        payload_NP = codec.encode(hidden_ND)
        back_ND = codec.decode(payload_NP)
        if payload_NP.shape != (len(hidden_ND), codec.bytes_per_position) or not bool(back_ND.isfinite().all()):
            raise ValueError(f"encoding {name}: the payload has a wrong shape, or the decoded values are not finite")
        size = codec.bytes_per_position
        whole = np.frombuffer(data[: len(data) // size * size], np.uint8).reshape(-1, size)
        codec.decode(torch.from_numpy(whole.copy()))
    topk = Codec("topk", WIDTH, VOCABULARY, top_k=5)
    size = topk.bytes_per_position
    whole = np.frombuffer(data[: len(data) // size * size], np.uint8).reshape(-1, size)
    topk.decode_topk(torch.from_numpy(whole.copy()))


def masked(data: bytes, _: Path) -> None:
    """Masks rows of any ids and lengths; no special or padding position may be masked, and no other id may change."""
    head, body = data[:2].ljust(2, b"\0"), data[2:]
    length = 1 + head[0] % 40
    ids = np.frombuffer(body[: len(body) // length * length], np.uint8).astype(np.int64).reshape(-1, length)
    lengths = (np.arange(len(ids)) * (head[1] + 1)) % (length + 1)
    vocabulary = Vocabulary("fuzz", "", "fuzz", VOCABULARY, 1, 0, 2, 4, 3, SPECIALS, (3,))
    kind, counts = ("uniform", None) if head[1] % 2 else ("smoothed", np.arange(VOCABULARY))
    found = mask_rows("ab" * 32, np.arange(len(ids)), ids, lengths, vocabulary, MaskSettings(kind=kind), counts, 0)
    chosen = np.zeros(ids.shape, dtype=bool)
    row, column = np.nonzero(found.valid)
    chosen[row, found.positions[row, column]] = True
    free = (ids > 4) & (np.arange(length) < lengths[:, None])
    if (chosen & ~free).any() or ((found.input_ids != ids) & ~chosen).any() or (found.labels[found.valid] <= 4).any():
        raise ValueError("a special or padding position was masked, or an unmasked position changed")


TARGETS: dict[str, Target] = {
    "jsonl": lambda data, folder: read(data, folder, "fuzz.jsonl"),
    "text": lambda data, folder: read(data, folder, "fuzz.txt"),
    "checksums": lambda data, _: void(parse_checksums(data.decode("utf-8", "surrogateescape"), "sums")),
    "receipt": lambda data, _: void(receipt_from_json(data, "receipt")),
    "failure": lambda data, _: void(failure_from_json(data, "failure")),
    "recipe": overridden,
    "codec": coded,
    "mask": masked,
}


def void(_: object) -> None:
    """Discards the result of a target."""


def attempt(target: str, data: bytes, folder: Path) -> None:
    """Calls a target once; FatalError and RetryableError are accepted results."""
    with suppress(DistilError):
        TARGETS[target](data, folder)


def seeds(target: str) -> list[bytes]:
    """Returns valid inputs that the fuzzer mutates."""
    lines = b'{"text": "Un."}\n{"content": "Deux.", "metadata": {"identification": {"label": "fr", "prob": 1}}}\n' * 9
    if target in ("jsonl", "text"):
        sink = io.BytesIO()
        pq.write_table(pa.table({"text": ["un", "deux"] * 20, "metadata": [{"harmful_pp": 1.0}] * 40}), sink)
        return [lines, gzip.compress(lines, mtime=0), pa.compress(lines, "zstd", asbytes=True), sink.getvalue()]
    known = {
        "checksums": b"a" * 64 + b"  a/b.txt\n" + b"B" * 64 + b" *c\r\n",
        "receipt": b'{"files": [{"name": "a", "size": 1, "sha256": "x"}], "kind": "shard", "seal": "x"}',
        "failure": b'{"kind": "shard", "key": "x", "line": 3}',
        "recipe": b'name = "a"\ncorpus.url = "b"\nteacher.model = "c"\n\xfftrain.lr=1e-3\xffloss={mlm=1}',
        "codec": bytes(range(256)) * 3,
        "mask": bytes(range(256)) * 2,
    }
    return [known[target]]

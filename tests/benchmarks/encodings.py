"""Fidelity, size and speed of each encoding of the teacher's hidden states, measured through the files on disk.

    python -m tests.benchmarks.encodings                                          the bundled demo teacher and corpus
    python -m tests.benchmarks.encodings --teacher FOLDER --corpus FOLDER --shards 9 --device cuda

Needs the project installed (`pip install -e .`). Every encoding is written by tasks.targets.compute into a store, read
back, decoded and compared with a live forward of the teacher in float32. Prints a table and writes it, as Markdown
and JSON, into tests/benchmarks/results/, named by date and hardware.

KL is mean KL(teacher || decoded) in nats at temperature 1, through the teacher's LM head, over the full vocabulary
(topk: the tail's probability is spread evenly, as in the trainer). centred 1-cos is computed after subtracting the
channel means of the live hidden states. Encode and decode times are relative to the teacher's forward over the same
blocks, in one run. The arithmetic is independent of tasks.targets.parity and in float64, so it also checks that module.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from storage.arrow import TARGETS_FILE
from storage.artifact import Receipt, Ref
from storage.store import Store
from tasks.corpus.shard import shard_source, shards_of
from tasks.corpus.snapshot import take_snapshot
from tasks.models.forward import logits_in_chunks
from tasks.recipe.config import BlockSettings, CorpusSettings, MaskSettings, TargetSettings, TeacherSettings
from tasks.targets.calibration import calibrate
from tasks.targets.capture import Capture, encode, hidden_states, masked_inputs, teacher_batches
from tasks.targets.codec import Codec, topk_logits
from tasks.targets.compute import make_targets, open_capture
from tasks.targets.keys import needs_calibration
from tasks.targets.targets_file import open_targets
from tasks.tokens.blocks import Blocks, make_blocks, open_blocks
from tasks.tokens.vocabulary import load_vocabulary
from tasks.train.flops import synchronize
from tests.benchmarks.results import CORPUS, RESULTS, TEACHER, facts_of, notes_of, save, shown

ENCODINGS = ("int8", "int4", "bf16", "topk")
REPEATS = 5


@dataclass(frozen=True)
class Figures:
    """One row of the table. `cosine` is None for topk, which keeps no hidden states; times are in teacher forwards."""

    encoding: str
    payload_bytes: int
    stored_bytes: float
    kl: float
    cosine: float | None
    encode: float
    decode: float
    positions: int


def blocks_of(store: Store, corpus: Path, teacher: Path, length: int, shard_bytes: int, shards: int) -> list[Receipt]:
    """Blocks of the first `shards` text shards of a corpus folder, taken in turn from its sources."""
    settings = CorpusSettings(url=str(corpus), shard_bytes=shard_bytes)
    vocabulary = load_vocabulary(str(teacher))
    of_source = [shards_of(shard_source(store, source, settings)) for source in take_snapshot(settings).sources]
    deepest = max(len(refs) for refs in of_source)
    in_turn = [refs[depth] for depth in range(deepest) for refs in of_source if depth < len(refs)]
    return [make_blocks(store, ref, BlockSettings(length=length), vocabulary) for ref in in_turn[:shards]]


def capture_of(
    store: Store, blocks: Sequence[Ref], teacher: Path, targets: TargetSettings, device: str = "cpu"
) -> Capture:
    """The teacher in float32, calibrated on `blocks` where the encoding needs it."""
    settings, vocabulary = TeacherSettings(model=str(teacher), dtype="float32"), load_vocabulary(str(teacher))
    capture = open_capture(store, settings, vocabulary, MaskSettings(), targets, device=device)
    if not needs_calibration(targets):
        return capture
    calibration = calibrate(store, blocks, capture).ref
    return open_capture(store, settings, vocabulary, MaskSettings(), targets, calibration=calibration, device=device)


def measure(
    store: Store, blocks: Sequence[Ref], teacher: Path, encodings: Sequence[str], device: str = "cpu"
) -> list[Figures]:
    """Writes targets of all blocks in each encoding, reads them back and compares them with one live forward."""
    choices = [TargetSettings.model_validate({"encoding": encoding}) for encoding in encodings]
    captures = [capture_of(store, blocks, teacher, targets, device) for targets in choices]
    live_ND, forward = _live(captures[0], [open_blocks(store, ref) for ref in blocks])
    return [_measure_one(store, blocks, capture, live_ND, forward) for capture in captures]


def _measure_one(store: Store, blocks: Sequence[Ref], capture: Capture, live_ND: Tensor, forward: float) -> Figures:
    receipts = [make_targets(store, ref, capture) for ref in blocks]
    opened = [open_targets(store, receipt.ref) for receipt in receipts]
    payload = np.concatenate([targets.payload(np.arange(len(targets))) for targets in opened])
    payload_NP = torch.from_numpy(payload).to(capture.teacher.device)
    codec = opened[0].codec
    stored = sum((store.local_folder(receipt) / TARGETS_FILE).stat().st_size for receipt in receipts)
    kl, cosine = compare(capture, codec, live_ND, payload_NP)
    decode = codec.decode_topk if codec.name == "topk" else codec.decode
    return Figures(
        codec.name,
        codec.bytes_per_position,
        stored / len(live_ND),
        kl,
        cosine,
        _seconds(lambda: encode(capture.teacher, codec, live_ND)) / forward,
        _seconds(lambda: decode(payload_NP)) / forward,
        len(live_ND),
    )


@torch.no_grad()
def compare(capture: Capture, codec: Codec, live_ND: Tensor, payload_NP: Tensor) -> tuple[float, float | None]:
    """Mean KL in nats and mean centred 1 - cos (None for topk), in float64."""
    teacher = capture.teacher
    if codec.name == "topk":
        kept = codec.decode_topk(payload_NP)
        live = list(logits_in_chunks(teacher.model, live_ND))
        ends = np.cumsum([len(part) for part in live]).tolist()
        parts = [
            topk_logits(kept, end - len(part), end, codec.vocab_size) for part, end in zip(live, ends, strict=True)
        ]
        return _kl(live, parts) / len(live_ND), None
    decoded_ND = codec.decode(payload_NP)
    kl = _kl(logits_in_chunks(teacher.model, live_ND), logits_in_chunks(teacher.model, decoded_ND)) / len(live_ND)
    centre_D = live_ND.double().mean(0)
    cosine_N = torch.cosine_similarity(live_ND.double() - centre_D, decoded_ND.double() - centre_D)
    return kl, float((1 - cosine_N).mean())


def _kl(live: Iterable[Tensor], decoded: Iterable[Tensor]) -> float:
    """Sum over positions of KL(live || decoded), from chunks of logits [n, V]."""
    total = 0.0
    for live_nV, decoded_nV in zip(live, decoded, strict=True):
        log_p_nV, log_q_nV = live_nV.double().log_softmax(-1), decoded_nV.double().log_softmax(-1)
        total += float((log_p_nV.exp() * (log_p_nV - log_q_nV)).sum())
    return total


def _live(capture: Capture, parts: Sequence[Blocks]) -> tuple[Tensor, float]:
    """Hidden states [N, D] of a live forward over all blocks, and its seconds without the time for masking."""
    inputs = [
        masked_inputs(capture, blocks, rows, 0)
        for blocks in parts
        for rows in teacher_batches(capture.teacher, np.arange(len(blocks)), blocks.input_ids.shape[1])
    ]
    hidden_states(capture.teacher, inputs[0])  # warm-up
    synchronize(capture.teacher.device)
    start = time.perf_counter()
    found = [hidden_states(capture.teacher, some) for some in inputs]
    synchronize(capture.teacher.device)
    return torch.cat(found), time.perf_counter() - start


def _seconds(function: Callable[[], object]) -> float:
    """The least seconds of a few calls."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


# ---- the report ----------------------------------------------------------------------------------------------


def markdown(table: Sequence[Figures], facts: dict[str, str]) -> str:
    """The table with the conditions of the measurement."""
    lines = ["# Encodings of the teacher's hidden states", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += [
        "",
        "| encoding | bytes per position (file) | payload | KL | centred 1-cos | encode/forward | decode/forward |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table:
        cosine = "-" if row.cosine is None else f"{row.cosine:.1e}"
        lines.append(
            f"| {row.encoding} | {row.stored_bytes:.1f} | {row.payload_bytes} | {row.kl:.1e} | {cosine} "
            f"| {row.encode:.2%} | {row.decode:.2%} |"
        )
    return "\n".join([*lines, "", notes_of(__doc__), ""])


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--teacher", type=Path, default=TEACHER, help="folder of a masked language model")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="folder of source files")
    parser.add_argument("--length", type=int, default=128, help="tokens per block")
    parser.add_argument("--shard-bytes", type=int, default=200_000, help="UTF-8 bytes of text per shard")
    parser.add_argument("--shards", type=int, default=3, help="number of text shards, taken in turn from all sources")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        store = Store(Path(home) / "store")
        made = blocks_of(store, given.corpus, given.teacher, given.length, given.shard_bytes, given.shards)
        blocks = [receipt.ref for receipt in made]
        table = measure(store, blocks, given.teacher, ENCODINGS, given.device)
    facts = facts_of(
        given.device,
        dtype="float32",
        teacher=shown(given.teacher),
        corpus=f"{shown(given.corpus)}, {sum(receipt.rows for receipt in made)} blocks of {given.length}, "
        f"{table[0].positions} masked positions",
    )
    text = markdown(table, facts)
    print(text)
    save(given.results, "encodings", given.device, text, {**facts, "encodings": [asdict(row) for row in table]})


if __name__ == "__main__":
    main()

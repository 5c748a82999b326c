"""Computes the cached targets: runs the teacher over the blocks of a shard and stores its encoded outputs.

    capture = open_capture(store, recipe.teacher, vocabulary, recipe.mask, recipe.targets, counts, calibration)
    receipt = make_targets(store, blocks, capture, variant=0)     # one call per shard; existing targets are kept

A process loads the teacher once for all of its shards. Every file must pass the parity probe against the live teacher
before it is committed.
"""

import hashlib
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

from storage.arrow import TARGETS_FILE, TARGETS_SCHEMA, ArrowWriter
from storage.artifact import Receipt, Ref
from storage.store import Store, reading_ahead
from tasks.models.teacher import shared_teacher
from tasks.recipe.config import MaskSettings, TargetSettings, TeacherSettings
from tasks.targets.calibration import read_calibration
from tasks.targets.capture import (
    Capture,
    TeacherInputs,
    check_finite,
    device_info,
    encode,
    forward_batches,
    prefetch_one,
)
from tasks.targets.codec import Codec, make_codec
from tasks.targets.keys import SCHEMA, parents_of, targets_ref, targets_settings
from tasks.targets.parity import Parity, probe
from tasks.targets.targets_file import TargetRows, file_metadata, read_targets, write_rows
from tasks.tokens.blocks import Blocks, open_blocks
from tasks.tokens.token_counts import read_counts
from tasks.tokens.vocabulary import Vocabulary, check_vocabulary_fits

R = TypeVar("R")


def open_capture(
    store: Store,
    teacher: TeacherSettings,
    vocabulary: Vocabulary,
    mask: MaskSettings,
    targets: TargetSettings,
    counts: Ref | None = None,
    calibration: Ref | None = None,
    device: str = "auto",
    before_forward: Callable[[], None] = lambda: None,
) -> Capture:
    """Loads the teacher (once per process), token counts and calibration; omit `calibration` to compute one.

    `before_forward` is called before each forward pass of the teacher and may raise an error to stop the work.

    FatalError: as in `load_teacher`, or the vocabulary does not fit the teacher.
    """
    model = shared_teacher(teacher, device)
    check_vocabulary_fits(vocabulary, model.vocab_size, teacher.model)
    return Capture(
        teacher=model,
        vocabulary=vocabulary,
        mask=mask,
        targets=targets,
        counts=read_counts(store, counts) if counts else None,
        counts_key=counts.key if counts else "",
        calibration=read_calibration(store, calibration) if calibration else None,
        calibration_key=calibration.key if calibration else "",
        before_forward=before_forward,
    )


def with_capture(fn: Callable[..., R], open_capture: Callable[[], Capture], *args: Any, **kwargs: Any) -> R:
    """Calls `fn(*args, capture=open_capture())`, so that a worker process loads the teacher itself and no model is
    pickled."""
    return fn(*args, capture=open_capture(), **kwargs)


def make_targets(
    store: Store,
    blocks: Ref,
    capture: Capture,
    variant: int = 0,
    *,
    following: Ref | None = None,
    force: bool = False,
) -> Receipt:
    """Runs the teacher over one shard's blocks and commits its encoded outputs. Keeps existing ones unless `force` is
    True.

    `following`: the blocks that will probably be needed next; they are copied from a remote store at the same time.
    Receipt: rows = blocks, tokens = attended tokens; info: positions, bytes per position, digest over all row digests,
    figures of the parity probe.

    FatalError: the teacher's output is NaN or infinite (the message contains shard and row), the blocks are longer than
    the teacher's maximum input, or the parity probe fails.
    """
    teacher = capture.teacher
    keys = (capture.calibration_key, capture.counts_key)
    ref = targets_ref(blocks, teacher.fingerprint, teacher.settings, capture.mask, capture.targets, *keys, variant)
    if not force and store.has(ref):
        return store.receipt(ref)
    started = time.perf_counter()
    source = open_blocks(store, blocks)
    codec = make_codec(capture.targets, teacher.width, capture.calibration, teacher.vocab_size)
    with reading_ahead(store, following), store.scratch() as folder:
        digest = _write(folder / TARGETS_FILE, ref, source, capture, codec, variant)
        written = read_targets(folder / TARGETS_FILE, ref)
        advice = (
            "use a more precise targets.encoding (int8, bf16)" if codec.name != "bf16" else "this is a bug: report it"
        )
        parity = probe(capture, source, written, variant, advice)
        info = _info(capture, written, digest, parity)
        return store.commit(
            ref,
            folder,
            schema=SCHEMA,
            rows=len(source),
            tokens=int(source.lengths.sum(dtype=np.int64)),
            settings=targets_settings(teacher.fingerprint, teacher.settings, capture.mask, capture.targets, variant),
            parents=parents_of(blocks, *keys),
            info=info,
            timings={"seconds": time.perf_counter() - started},
        )


def _write(path: Any, ref: Ref, blocks: Blocks, capture: Capture, codec: Codec, variant: int) -> str:
    """Runs the teacher over the shard batch by batch and writes the file; returns the digest over all row digests."""
    digest = hashlib.sha256()
    facts = {
        "blocks": blocks.key,
        "positions": capture.targets.positions,
        "mask_seed": str(capture.mask.seed),
        "variant": str(variant),
        "teacher": capture.teacher.fingerprint,
        "dtype": str(capture.teacher.dtype).removeprefix("torch."),
    }
    with ArrowWriter(path, TARGETS_SCHEMA, file_metadata(codec, ref, facts)) as writer:

        def write(batch: tuple[TeacherInputs, torch.Tensor, torch.Tensor]) -> list[bytes]:
            inputs, payload_NP, finite_N = batch
            check_finite(inputs, finite_N.cpu().numpy(), blocks, capture.teacher)
            write_rows(writer, inputs.digests, inputs.valid.sum(1), payload_NP.cpu().numpy())
            return inputs.digests

        batches = forward_batches(capture, blocks, np.arange(len(blocks)), variant)
        encoded = ((inputs, *encode(capture.teacher, codec, hidden_ND)) for inputs, hidden_ND in batches)
        for digests in prefetch_one(encoded, write):  # writes one batch while the teacher runs on the next
            digest.update(b"".join(digests))
    return digest.hexdigest()


def _info(capture: Capture, written: TargetRows, digest: str, parity: Parity) -> dict[str, Any]:
    return {
        "positions": int(written.counts.sum(dtype=np.int64)),
        "bytes": written.codec.bytes_per_position,
        "digest": digest,
        "probe": {"kl": parity.kl, "cosine": parity.cosine, "rows": parity.rows},
        **device_info(capture),
    }

"""The teacher's word on every shard: channel calibration once, then one targets file a shard.

    capture = open_capture(store, recipe.teacher, vocabulary, recipe.mask, recipe.targets, counts, calibration)
    calibrate(store, sample, capture)                 # Receipt; `sample` are the blocks that lineage pinned
    make_targets(store, blocks, capture, variant=0)   # Receipt; probed against the live teacher before it counts

Called by the flows, one call a shard, with one teacher loaded for all of them. What is there already is not made again.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from storage.ahead import reading_ahead
from storage.arrow import TARGETS, ArrowWriter, open_arrow
from storage.artifact import Receipt, Ref
from storage.error import FatalError
from storage.store import Store
from tasks.block import Blocks, open_blocks, read_counts
from tasks.capture import (
    Capture,
    Inputs,
    batches,
    check_length,
    encode,
    hidden_states,
    masked_inputs,
    one_ahead,
    refuse_nonfinite,
)
from tasks.codec import Calibration, Codec, fit_calibration, make_codec
from tasks.config import Mask, Targets, Teacher
from tasks.probe import Parity, probe
from tasks.target_refs import SCHEMA, calibration_ref, calibration_settings, parents_of, targets_ref, targets_settings
from tasks.targets import FILE, TargetRows, describe, read_targets, write_rows
from tasks.teacher import shared_teacher
from tasks.vocabulary import Vocabulary, fits

R = TypeVar("R")

CALIBRATION_FILE = "calibration.arrow"
_CALIBRATION = pa.schema([("mean", pa.float32()), ("sd", pa.float32())])


def open_capture(
    store: Store,
    teacher: Teacher,
    vocabulary: Vocabulary,
    mask: Mask,
    targets: Targets,
    counts: Ref | None = None,
    calibration: Ref | None = None,
    device: str = "auto",
    pulse: Callable[[], None] = lambda: None,
) -> Capture:
    """Loads the teacher (once a process) and what was estimated; leave `calibration` out to calibrate.

    `pulse` is called before each forward of the teacher, and may raise to end the work there.

    FatalError as tasks.teacher.load_teacher, and for a tokenizer of the blocks that does not fit the teacher.
    """
    model = shared_teacher(teacher, device)
    fits(vocabulary, model.vocab_size, teacher.model)
    return Capture(
        teacher=model,
        vocabulary=vocabulary,
        mask=mask,
        targets=targets,
        counts=read_counts(store, counts) if counts else None,
        counts_key=counts.key if counts else "",
        calibration=read_calibration(store, calibration) if calibration else None,
        calibration_key=calibration.key if calibration else "",
        pulse=pulse,
    )


def with_capture(fn: Callable[..., R], opened: Callable[[], Capture], *args: Any, **kwargs: Any) -> R:
    """`fn(*args, capture=opened())`, for another process: the teacher is loaded there, once, and does not travel."""
    return fn(*args, capture=opened(), **kwargs)


# ---- calibration ---------------------------------------------------------------------------------------------


def calibrate(store: Store, sample: Sequence[Ref], capture: Capture, *, force: bool = False) -> Receipt:
    """Mean and deviation of each channel over targets.calibration_rows blocks, spread evenly over the sample.

    FatalError: no block in the sample, NaN or infinity from the teacher.
    """
    teacher = capture.teacher
    ref = calibration_ref(
        sample, teacher.fingerprint, teacher.settings, capture.mask, capture.targets, capture.counts_key
    )
    if not force and store.has(ref):
        return store.receipt(ref)
    started = time.perf_counter()
    calibration, positions, rows = _estimate(store, sample, capture)
    with store.scratch() as folder:
        with ArrowWriter(folder / CALIBRATION_FILE, _CALIBRATION) as writer:
            writer.write({"mean": pa.array(calibration.mean.numpy()), "sd": pa.array(calibration.sd.numpy())})
        return store.commit(
            ref,
            folder,
            schema=SCHEMA,
            rows=rows,
            tokens=positions,
            settings=calibration_settings(teacher.fingerprint, teacher.settings, capture.mask, capture.targets),
            parents=[part.key for part in sample] + ([capture.counts_key] if capture.counts_key else []),
            info={"positions": positions, "width": teacher.width, **_machine(capture)},
            timings={"seconds": time.perf_counter() - started},
        )


def read_calibration(store: Store, ref: Ref) -> Calibration:
    """What `calibrate` kept. FatalError where there is none or its bytes changed."""
    table = open_arrow(store.check(store.receipt(ref)) / CALIBRATION_FILE).read_all()
    mean_D, sd_D = (torch.from_numpy(table.column(name).to_numpy().copy()) for name in ("mean", "sd"))
    return Calibration(mean_D, sd_D)


def _estimate(store: Store, sample: Sequence[Ref], capture: Capture) -> tuple[Calibration, int, int]:
    """The calibration, and how many positions and blocks it comes from."""
    opened = [open_blocks(store, ref) for ref in sample]
    owner = np.repeat(np.arange(len(opened)), [len(blocks) for blocks in opened])
    row = np.concatenate([np.arange(len(blocks)) for blocks in opened])
    wanted = min(capture.targets.calibration_rows, len(row))
    chosen = np.arange(wanted) * len(row) // max(1, wanted)
    count = 0
    sums = torch.zeros(2, capture.teacher.width, dtype=torch.float64)
    for number, blocks in enumerate(opened):
        rows = row[chosen[owner[chosen] == number]]
        for inputs, hidden_ND in _forward(capture, blocks, rows, 0):
            refuse_nonfinite(inputs, hidden_ND.isfinite().all(-1).cpu().numpy(), blocks, capture.teacher)
            wide_ND = hidden_ND.double()
            sums += torch.stack([wide_ND.sum(0), (wide_ND**2).sum(0)]).cpu()
            count += len(hidden_ND)
    if not count:
        raise FatalError(f"blocks {sample[0].label}: no position to calibrate on; is there any text in corpus.url?")
    return fit_calibration(count, sums[0], sums[1]), count, wanted


# ---- targets -------------------------------------------------------------------------------------------------


def make_targets(
    store: Store,
    blocks: Ref,
    capture: Capture,
    variant: int = 0,
    *,
    following: Ref | None = None,
    force: bool = False,
) -> Receipt:
    """Runs the teacher over one shard's blocks and keeps its encoded word. Does nothing where it is there.

    `following` are blocks that are likely to be next: of a remote store they are copied meanwhile.
    Receipt: rows = blocks, tokens = those read; info: positions, digest over all row digests, probe.
    FatalError: NaN or infinity (names block row and shard), a block too long, the parity probe fails.
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
        digest = _write(folder / FILE, ref, source, capture, codec, variant)
        written = read_targets(folder / FILE, ref)
        advice = "take a finer targets.encoding (int8, bf16)" if codec.name != "bf16" else "this is a fault: report it"
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
    """Streams the shard through the teacher into the file; returns the digest over all row digests."""
    digest = hashlib.sha256()
    facts = {
        "blocks": blocks.key,
        "positions": capture.targets.positions,
        "mask_seed": str(capture.mask.seed),
        "variant": str(variant),
        "teacher": capture.teacher.fingerprint,
        "dtype": str(capture.teacher.dtype).removeprefix("torch."),
    }
    with ArrowWriter(path, TARGETS, describe(codec, ref, facts)) as writer:

        def keep(read: tuple[Inputs, torch.Tensor, torch.Tensor]) -> list[bytes]:
            inputs, payload_NP, finite_N = read
            refuse_nonfinite(inputs, finite_N.cpu().numpy(), blocks, capture.teacher)
            write_rows(writer, inputs.digests, inputs.valid.sum(1), payload_NP.cpu().numpy())
            return inputs.digests

        forward = _forward(capture, blocks, np.arange(len(blocks)), variant)
        encoded = ((inputs, *encode(capture.teacher, codec, hidden_ND)) for inputs, hidden_ND in forward)
        for digests in one_ahead(encoded, keep):  # one batch is written while the teacher reads the next
            digest.update(b"".join(digests))
    return digest.hexdigest()


def _forward(
    capture: Capture, blocks: Blocks, rows: npt.NDArray[np.int64], variant: int
) -> Iterator[tuple[Inputs, torch.Tensor]]:
    """Batch by batch: what the teacher reads, masked one batch ahead, and its hidden states [N, D]."""
    length = blocks.input_ids.shape[1]
    check_length(capture.teacher, length)
    chosen = batches(capture.teacher, rows, length)
    for inputs in one_ahead(chosen, lambda some: masked_inputs(capture, blocks, some, variant)):
        capture.pulse()
        yield inputs, hidden_states(capture.teacher, inputs)


def _info(capture: Capture, written: TargetRows, digest: str, parity: Parity) -> dict[str, Any]:
    return {
        "positions": int(written.counts.sum(dtype=np.int64)),
        "bytes": written.codec.bytes_per_position,
        "digest": digest,
        "probe": {"kl": parity.kl, "cosine": parity.cosine, "rows": parity.rows},
        **_machine(capture),
    }


def _machine(capture: Capture) -> dict[str, str]:
    """What the bytes may depend on beyond the key."""
    device = capture.teacher.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "dtype": str(capture.teacher.dtype).removeprefix("torch.")}

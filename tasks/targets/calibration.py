"""Estimates the mean and standard deviation of each channel of the teacher's hidden states on sample blocks.

    receipt = calibrate(store, sample, capture)               # once per recipe; stored as an artifact
    calibration = read_calibration(store, receipt.ref)        # mean, std: float32 [D]

Both are the calibration, with which int8 and int4 targets standardize channels (tasks.targets.codec).
"""

import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from storage.arrow import ArrowWriter, open_arrow
from storage.artifact import Receipt, Ref
from storage.errors import FatalError
from storage.store import Store
from tasks.targets.capture import Capture, check_finite, device_info, forward_batches
from tasks.targets.codec import Calibration, fit_calibration
from tasks.targets.keys import SCHEMA, calibration_ref, calibration_settings
from tasks.tokens.blocks import open_blocks

CALIBRATION_FILE = "calibration.arrow"

_CALIBRATION = pa.schema([("mean", pa.float32()), ("sd", pa.float32())])


def calibrate(store: Store, sample: Sequence[Ref], capture: Capture, *, force: bool = False) -> Receipt:
    """Estimates the calibration on targets.calibration_rows blocks, spread evenly over the blocks of the sample.

    An existing artifact is kept unless `force` is True. Receipt: rows = blocks used, tokens = positions used.

    FatalError: the sample contains no blocks, or the teacher's output is NaN or infinite.
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
            writer.write({"mean": pa.array(calibration.mean.numpy()), "sd": pa.array(calibration.std.numpy())})
        return store.commit(
            ref,
            folder,
            schema=SCHEMA,
            rows=rows,
            tokens=positions,
            settings=calibration_settings(teacher.fingerprint, teacher.settings, capture.mask, capture.targets),
            parents=[part.key for part in sample] + ([capture.counts_key] if capture.counts_key else []),
            info={"positions": positions, "width": teacher.width, **device_info(capture)},
            timings={"seconds": time.perf_counter() - started},
        )


def read_calibration(store: Store, ref: Ref) -> Calibration:
    """Reads a calibration. FatalError: it is missing or damaged."""
    table = open_arrow(store.verified_folder(store.receipt(ref)) / CALIBRATION_FILE).read_all()
    mean_D, std_D = (torch.from_numpy(table.column(name).to_numpy().copy()) for name in ("mean", "sd"))
    return Calibration(mean_D, std_D)


def _estimate(store: Store, sample: Sequence[Ref], capture: Capture) -> tuple[Calibration, int, int]:
    """Estimates the calibration. Returns it with the numbers of positions and blocks used."""
    opened = [open_blocks(store, ref) for ref in sample]
    owner = np.repeat(np.arange(len(opened)), [len(blocks) for blocks in opened])
    row = np.concatenate([np.arange(len(blocks)) for blocks in opened])
    wanted = min(capture.targets.calibration_rows, len(row))
    chosen = np.arange(wanted) * len(row) // max(1, wanted)
    count = 0
    sums = torch.zeros(2, capture.teacher.width, dtype=torch.float64)
    for number, blocks in enumerate(opened):
        rows = row[chosen[owner[chosen] == number]]
        for inputs, hidden_ND in forward_batches(capture, blocks, rows, 0):
            check_finite(inputs, hidden_ND.isfinite().all(-1).cpu().numpy(), blocks, capture.teacher)
            wide_ND = hidden_ND.double()
            sums += torch.stack([wide_ND.sum(0), (wide_ND**2).sum(0)]).cpu()
            count += len(hidden_ND)
    if not count:
        raise FatalError(
            f"blocks {sample[0].label}: the sample has no position to calibrate on; check that corpus.url contains text"
        )
    return fit_calibration(count, sums[0], sums[1]), count, wanted

"""Runs the teacher on rows of a shard's blocks and encodes its outputs, in three separate steps: teacher capture.

    inputs = masked_inputs(capture, blocks, rows, variant)                 # CPU: mask, digest
    hidden_ND = hidden_states(capture.teacher, inputs)                     # device: encoder, last layer where needed
    payload_NP, finite_N = encode(capture.teacher, codec, hidden_ND)       # device: LM head for topk, then bytes

The last two steps never synchronise with the device, and `prefetch_one` runs the first step at the same time.
tasks.targets.compute captures all rows of a shard, tasks.targets.parity only a few rows.

Shapes: B blocks, L tokens, M chosen positions per block, N valid positions of all blocks, D hidden size, P bytes per
position.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from storage.errors import FatalError
from tasks.models.forward import hidden_rows, logits_in_chunks, longest_input
from tasks.models.teacher import TeacherModel
from tasks.recipe.config import MaskSettings, TargetSettings
from tasks.targets.codec import Calibration, Codec
from tasks.tokens.blocks import Blocks
from tasks.tokens.mask import mask_rows, row_digests
from tasks.tokens.vocabulary import Vocabulary

CPU_TOKENS = 8192
"""Tokens per forward pass on a CPU; larger batches are not faster."""

GPU_TOKENS = 262_144
"""Maximum number of tokens per forward pass on a GPU, if memory allows."""

Int64s = npt.NDArray[np.int64]

T = TypeVar("T")

R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Capture:
    """The inputs that the captures of all shards of a recipe share.

    `counts` [vocabulary size]: token counts, for smoothed masks only. `counts_key`, `calibration_key`: empty if not
    used. `before_forward` is called before each forward pass and may raise an error to stop the work.
    """

    teacher: TeacherModel
    vocabulary: Vocabulary
    mask: MaskSettings
    targets: TargetSettings
    counts: Int64s | None = None
    counts_key: str = ""
    calibration: Calibration | None = None
    calibration_key: str = ""
    before_forward: Callable[[], None] = lambda: None


class TeacherInputs(NamedTuple):
    """Masked blocks: rows, lengths and digests [B], input_ids [B, L], positions and valid [B, M].

    If `positions` is None, all L positions are used, in order, and `valid` is [B, L].
    """

    rows: npt.NDArray[Any]
    input_ids: Int64s
    lengths: npt.NDArray[Any]
    positions: Int64s | None
    valid: npt.NDArray[np.bool_]
    digests: list[bytes]


def masked_inputs(capture: Capture, blocks: Blocks, rows: npt.NDArray[Any], variant: int) -> TeacherInputs:
    """Masks rows as the dataloader does, and cuts off the columns that are padding in all of these rows."""
    lengths = np.asarray(blocks.lengths[rows])
    masked = mask_rows(
        blocks.key, rows, blocks.input_ids[rows], lengths, capture.vocabulary, capture.mask, capture.counts, variant
    )
    digests = row_digests(masked.input_ids, lengths)
    input_ids = masked.input_ids[:, : max(1, int(lengths.max()))]
    if capture.targets.positions == "masked":
        return TeacherInputs(rows, input_ids, lengths, masked.positions, masked.valid, digests)
    attended = np.arange(input_ids.shape[1]) < lengths[:, None]
    return TeacherInputs(rows, input_ids, lengths, None, attended, digests)


@torch.no_grad()
def hidden_states(teacher: TeacherModel, inputs: TeacherInputs) -> Tensor:
    """Returns the teacher's last hidden states [N, D] at the valid positions, block by block, on the teacher's
    device."""

    def on_device(array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(teacher.device, non_blocking=True)

    attended = np.arange(inputs.input_ids.shape[1]) < inputs.lengths[:, None]
    attention_mask = None if attended.all() else on_device(attended)
    positions = None if inputs.positions is None else on_device(inputs.positions)
    hidden_BMD = hidden_rows(
        teacher.model, on_device(np.ascontiguousarray(inputs.input_ids)), attention_mask, positions
    )
    flat_ND = hidden_BMD.flatten(0, 1)
    return flat_ND if inputs.valid.all() else flat_ND.index_select(0, on_device(np.flatnonzero(inputs.valid)))


@torch.no_grad()
def encode(teacher: TeacherModel, codec: Codec, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the payload, uint8 [N, P], and whether all encoded values of each position are finite, bool [N]."""
    if codec.name != "topk":
        return codec.encode(hidden_ND), hidden_ND.isfinite().all(-1)
    parts = [(codec.encode(logits), logits.isfinite().all(-1)) for logits in logits_in_chunks(teacher.model, hidden_ND)]
    if not parts:
        empty = torch.empty(0, codec.bytes_per_position, dtype=torch.uint8)
        return empty, torch.empty(0, dtype=torch.bool)
    return torch.cat([payload for payload, _ in parts]), torch.cat([finite for _, finite in parts])


def check_finite(inputs: TeacherInputs, finite: npt.NDArray[np.bool_], blocks: Blocks, teacher: TeacherModel) -> None:
    """Raises FatalError if the teacher's output is not finite at a position; `finite` [N].

    The message contains the label of the shard and the number of the first such row.
    """
    if finite.all():
        return
    number = np.repeat(np.arange(len(inputs.rows)), inputs.valid.sum(1))[np.flatnonzero(~finite)[0]]
    raise FatalError(
        f"blocks {blocks.label}, row {int(inputs.rows[number])}: the output of the teacher {teacher.settings.model} is "
        f'NaN or infinite in {teacher.dtype}; check its weights, or set teacher.dtype = "float32"',
        blocks.label,
    )


def teacher_batches(teacher: TeacherModel, rows: npt.NDArray[Any], length: int) -> Iterator[npt.NDArray[Any]]:
    """Splits rows into one batch per forward pass: teacher.batch_rows, or as many as fit into device memory."""
    size = teacher.settings.batch_rows or max(1, _tokens_at_once(teacher) // length)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def prefetch_one(items: Iterable[T], work: Callable[[T], R]) -> Iterator[R]:
    """Yields the results of `work` in order; a background thread computes each one while the caller uses the previous
    one.

    The iterator `items` advances in the caller's thread.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as worker:
        pending: deque[Future[R]] = deque()
        for item in items:
            pending.append(worker.submit(work, item))
            if len(pending) > 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def check_length(teacher: TeacherModel, length: int) -> None:
    """Raises FatalError if a block has more tokens than the teacher can read."""
    limit = longest_input(teacher.model)
    if length > limit:
        raise FatalError(
            f"blocks.length = {length}, but the teacher {teacher.settings.model} reads at most {limit} tokens; "
            "lower blocks.length"
        )


def _tokens_at_once(teacher: TeacherModel) -> int:
    if teacher.device.type != "cuda":
        return CPU_TOKENS
    free, _ = torch.cuda.mem_get_info(teacher.device)
    # At its peak, a layer needs about 24 vectors of width D per token; half of the memory stays free.
    token_bytes = 24 * teacher.width * teacher.dtype.itemsize
    return max(CPU_TOKENS, min(GPU_TOKENS, free // 2 // token_bytes))


def forward_batches(
    capture: Capture, blocks: Blocks, rows: npt.NDArray[np.int64], variant: int
) -> Iterator[tuple[TeacherInputs, torch.Tensor]]:
    """Runs the teacher on rows, batch by batch. Yields the masked inputs, prefetched by one batch, and hidden states
    [N, D].

    FatalError: the blocks are longer than the teacher's maximum input.
    """
    length = blocks.input_ids.shape[1]
    check_length(capture.teacher, length)
    batches = teacher_batches(capture.teacher, rows, length)
    for inputs in prefetch_one(batches, lambda batch: masked_inputs(capture, blocks, batch, variant)):
        capture.before_forward()
        yield inputs, hidden_states(capture.teacher, inputs)


def device_info(capture: Capture) -> dict[str, str]:
    """Returns device and dtype for receipts: they may change the last bits of a result, but are not part of its key."""
    device = capture.teacher.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "dtype": str(capture.teacher.dtype).removeprefix("torch.")}

"""Teacher capture: from rows of a shard's blocks to the teacher's word on their positions, in three separate steps.

    inputs = masked_inputs(capture, blocks, rows, variant)      # CPU: mask, digest
    hidden_ND = hidden_states(capture.teacher, inputs)          # device: encoder, last layer only where it is needed
    payload_NP = encode(capture.teacher, codec, hidden_ND)      # device: LM head for topk, then bytes

Nothing in the last two waits for the device; `one_ahead` lets the CPU's part run beside them. Called by tasks.teach
(all rows) and tasks.probe (a few).

Shapes: B blocks, L tokens, M chosen positions a block, N positions kept of all blocks, D hidden size, P bytes of one.
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
from torch.nn import functional as F

from storage.errors import FatalError
from tasks.models.forward import decoder_of, head_features, hidden_rows, longest_input
from tasks.models.teacher import TeacherModel
from tasks.recipe.config import MaskSettings, TargetSettings
from tasks.targets.codec import Calibration, Codec
from tasks.tokens.blocks import Blocks
from tasks.tokens.mask import mask_rows, row_digests
from tasks.tokens.vocabulary import Vocabulary

LOGIT_ROWS = 1024
"""Positions whose logits exist at once (32,005 pieces in float32: 131 MB)."""

CPU_TOKENS = 8192
"""Tokens of one forward on a CPU; more is no faster."""

GPU_TOKENS = 262_144
"""Most tokens of one forward on a GPU, where memory allows."""

Int64s = npt.NDArray[np.int64]

T = TypeVar("T")

R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Capture:
    """What all shards of a recipe share. `counts` [vocabulary size] only for smoothed masks; keys are "" without.

    `pulse` is called before each forward, and may raise to end the work there.
    """

    teacher: TeacherModel
    vocabulary: Vocabulary
    mask: MaskSettings
    targets: TargetSettings
    counts: Int64s | None = None
    counts_key: str = ""
    calibration: Calibration | None = None
    calibration_key: str = ""
    pulse: Callable[[], None] = lambda: None


class Inputs(NamedTuple):
    """Masked blocks: input_ids [B, L] and lengths [B]; positions [B, M] (None: all, in order) and which are valid."""

    rows: npt.NDArray[Any]
    input_ids: Int64s
    lengths: npt.NDArray[Any]
    positions: Int64s | None
    valid: npt.NDArray[np.bool_]
    digests: list[bytes]


def masked_inputs(capture: Capture, blocks: Blocks, rows: npt.NDArray[Any], variant: int) -> Inputs:
    """What teacher and student read of these rows; columns that are padding in all of them are cut off."""
    lengths = np.asarray(blocks.lengths[rows])
    masked = mask_rows(
        blocks.key, rows, blocks.input_ids[rows], lengths, capture.vocabulary, capture.mask, capture.counts, variant
    )
    digests = row_digests(masked.input_ids, lengths)
    input_ids = masked.input_ids[:, : max(1, int(lengths.max()))]
    if capture.targets.positions == "masked":
        return Inputs(rows, input_ids, lengths, masked.positions, masked.valid, digests)
    attended = np.arange(input_ids.shape[1]) < lengths[:, None]
    return Inputs(rows, input_ids, lengths, None, attended, digests)


@torch.no_grad()
def hidden_states(teacher: TeacherModel, inputs: Inputs) -> Tensor:
    """The teacher's last hidden states [N, D] at the valid positions, block after block, on its device."""

    def there(array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(teacher.device, non_blocking=True)

    attended = np.arange(inputs.input_ids.shape[1]) < inputs.lengths[:, None]
    attention_mask = None if attended.all() else there(attended)
    positions = None if inputs.positions is None else there(inputs.positions)
    hidden_BMD = hidden_rows(teacher.model, there(np.ascontiguousarray(inputs.input_ids)), attention_mask, positions)
    flat_ND = hidden_BMD.flatten(0, 1)
    return flat_ND if inputs.valid.all() else flat_ND.index_select(0, there(np.flatnonzero(inputs.valid)))


@torch.no_grad()
def logits_of(teacher: TeacherModel, hidden_ND: Tensor) -> Iterator[Tensor]:
    """The teacher's logits in float32, for LOGIT_ROWS positions at a time."""
    weight, bias = decoder_of(teacher.model)
    for part in torch.split(hidden_ND, LOGIT_ROWS):
        yield F.linear(head_features(teacher.model, part), weight, bias).float()


@torch.no_grad()
def encode(teacher: TeacherModel, codec: Codec, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes [N, P], and for each position whether all that was encoded is finite [N]."""
    if codec.name != "topk":
        return codec.encode(hidden_ND), hidden_ND.isfinite().all(-1)
    parts = [(codec.encode(logits), logits.isfinite().all(-1)) for logits in logits_of(teacher, hidden_ND)]
    if not parts:
        empty = torch.empty(0, codec.bytes_per_position, dtype=torch.uint8)
        return empty, torch.empty(0, dtype=torch.bool)
    return torch.cat([payload for payload, _ in parts]), torch.cat([finite for _, finite in parts])


def check_finite(inputs: Inputs, finite: npt.NDArray[np.bool_], blocks: Blocks, teacher: TeacherModel) -> None:
    """FatalError that names the shard and the first block where the teacher gave NaN or infinity."""
    if finite.all():
        return
    number = np.repeat(np.arange(len(inputs.rows)), inputs.valid.sum(1))[np.flatnonzero(~finite)[0]]
    raise FatalError(
        f"blocks {blocks.label}, row {int(inputs.rows[number])}: the teacher {teacher.settings.model} gave NaN or "
        f'infinity there ({teacher.dtype}); check its weights, or set teacher.dtype = "float32"',
        blocks.label,
    )


def teacher_batches(teacher: TeacherModel, rows: npt.NDArray[Any], length: int) -> Iterator[npt.NDArray[Any]]:
    """Splits rows into those of one forward: teacher.batch_rows of them, or as many as the device holds."""
    size = teacher.settings.batch_rows or max(1, _tokens_at_once(teacher) // length)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def prefetch_one(items: Iterable[T], work: Callable[[T], R]) -> Iterator[R]:
    """The results of `work` in order; a background thread makes each while the caller is busy with the one before it.

    `items` are taken in the caller's thread.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as worker:
        begun: deque[Future[R]] = deque()
        for item in items:
            begun.append(worker.submit(work, item))
            if len(begun) > 1:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()


def check_length(teacher: TeacherModel, length: int) -> None:
    """FatalError if the teacher has fewer positions than a block has tokens."""
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
    # About 24 vectors of width D a token live at the widest point of a layer; half of the memory stays free.
    a_token = 24 * teacher.width * teacher.dtype.itemsize
    return max(CPU_TOKENS, min(GPU_TOKENS, free // 2 // a_token))


def _forward(
    capture: Capture, blocks: Blocks, rows: npt.NDArray[np.int64], variant: int
) -> Iterator[tuple[Inputs, torch.Tensor]]:
    """Batch by batch: what the teacher reads, masked one batch ahead, and its hidden states [N, D]."""
    length = blocks.input_ids.shape[1]
    check_length(capture.teacher, length)
    chosen = teacher_batches(capture.teacher, rows, length)
    for inputs in prefetch_one(chosen, lambda some: masked_inputs(capture, blocks, some, variant)):
        capture.pulse()
        yield inputs, hidden_states(capture.teacher, inputs)


def _machine(capture: Capture) -> dict[str, str]:
    """What the bytes may depend on beyond the key."""
    device = capture.teacher.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "dtype": str(capture.teacher.dtype).removeprefix("torch.")}

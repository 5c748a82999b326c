"""Loads masked batches of tensors from the Arrow files of a manifest, prepared by background threads: the dataloader.

    read_ahead = ReadAhead(dataset, order, last=total_rows, variants=1)
    ranges = step_ranges(step, steps, batch_rows, micro_rows, rank, ranks)
    for micro_batches in BatchLoader(dataset, masking, order, ranges, read_ahead, prefetch=2, pin=True):
        ...

A row of a batch is one masked block and, with cached targets, the teacher's encoded vectors. The hashes of files are
verified when a part (a shard of the manifest) is opened; the digest of the teacher's input is verified for every row.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tasks.loader.dataset import BlockDataset
from tasks.loader.order import DataOrder, Indices
from tasks.loader.prefetch import ReadAhead
from tasks.recipe.config import MaskSettings
from tasks.targets.targets_file import check_digests
from tasks.tokens.mask import IGNORE_INDEX, MaskedRows, mask_rows, row_digests
from tasks.tokens.vocabulary import Vocabulary


class Batch(NamedTuple):
    """B masked blocks of length L with M chosen positions each; unused slots have valid = False and label -100."""

    input_ids: Tensor
    """[B, L] int64, masked."""
    attention_mask: Tensor | None
    """[B, L] bool, or None when every position is attended."""
    positions: Tensor | None
    """[B, M] int64: positions with a loss; None: all L positions, in order."""
    valid: Tensor
    """[B, M] bool."""
    labels: Tensor
    """[B, M] int64: the original id at masked positions, -100 elsewhere."""
    payload: Tensor | None
    """[B, M, P] uint8: the teacher's encoded vectors, P bytes per position; None without a cache."""
    tokens: int
    """Number of attended positions."""
    selected: int
    """Number of positions with the distil and cosine losses."""
    masked: int
    """Number of positions with the MLM loss."""

    def to(self, device: torch.device) -> "Batch":
        """Copies the batch to a device; copies from pinned memory overlap with computation."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """Copies the batch to page-locked (pinned) memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        moved: dict[str, Any] = self._asdict()
        moved |= {name: move(x) for name, x in moved.items() if isinstance(x, Tensor)}
        return Batch(**moved)


@dataclass(frozen=True)
class MaskingRule:
    """Settings that turn a block into a row of a batch.

    `every_position`: whether all attended positions have a loss, or only the masked ones. `counts` [vocabulary size]:
    token counts, for smoothed masks only.
    """

    vocabulary: Vocabulary
    mask: MaskSettings
    every_position: bool
    counts: NDArray[np.int64] | None = None


def make_batch(dataset: BlockDataset, masking: MaskingRule, parts: Indices, rows: Indices, variants: Indices) -> Batch:
    """Builds a batch of B rows: masks the blocks and adds the cached vectors, if any.

    `parts`, `rows`, `variants` [B]: part, row within the part, and mask variant of each row.

    FatalError: a file is damaged, or a row's targets belong to a different input.
    """
    stacked: dict[str, NDArray[Any]] = {}
    for part, variant in sorted(set(zip(parts.tolist(), variants.tolist(), strict=True))):
        slots = np.flatnonzero((parts == part) & (variants == variant))
        for name, values in _rows_of_part(dataset, masking, part, variant, rows[slots]).items():
            if name not in stacked:
                stacked[name] = np.empty((len(rows), *values.shape[1:]), values.dtype)
            stacked[name][slots] = values
    lengths = stacked["length"]
    length = stacked["input_ids"].shape[1]
    attended = np.arange(length) < lengths[:, None]
    labels = torch.from_numpy(stacked["labels"])
    return Batch(
        input_ids=torch.from_numpy(stacked["input_ids"]),
        attention_mask=None if attended.all() else torch.from_numpy(attended),
        positions=torch.from_numpy(stacked["positions"]) if "positions" in stacked else None,
        valid=torch.from_numpy(stacked["valid"]),
        labels=labels,
        payload=torch.from_numpy(stacked["payload"]) if "payload" in stacked else None,
        tokens=int(lengths.sum()),
        selected=int(stacked["valid"].sum()),
        masked=int((stacked["labels"] != IGNORE_INDEX).sum()),
    )


def _rows_of_part(
    dataset: BlockDataset, masking: MaskingRule, part: int, variant: int, rows: Indices
) -> dict[str, NDArray[Any]]:
    """Returns the rows of one part under one mask variant, as arrays with one entry per row."""
    blocks = dataset.blocks(part)
    input_ids, lengths = blocks.input_ids[rows], blocks.lengths[rows]
    masked = mask_rows(blocks.key, rows, input_ids, lengths, masking.vocabulary, masking.mask, masking.counts, variant)
    group: dict[str, NDArray[Any]] = {
        "input_ids": masked.input_ids,
        "length": lengths,
    }
    if masking.every_position:
        group |= _every_position(masked, lengths)
    else:
        group |= {"positions": masked.positions, "valid": masked.valid, "labels": masked.labels}
    if dataset.cached:
        targets = dataset.targets(part, variant)
        check_digests(targets, rows, row_digests(masked.input_ids, lengths))
        group["payload"] = _in_slots(targets.payload(rows), group["valid"])
    return group


def _in_slots(flat: NDArray[np.uint8], valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Scatters the vectors [N, P] of the valid slots to [B, M, P], zeros elsewhere; no copy if all slots are valid."""
    shape = (*valid.shape, flat.shape[1])
    if valid.all():
        return flat.reshape(shape)
    payload = np.zeros(shape, np.uint8)
    payload[valid] = flat
    return payload


def _every_position(masked: MaskedRows, lengths: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
    """Returns `valid` [B, L], True at all attended positions, and `labels` [B, L], the original ids at masked
    positions."""
    rows, length = masked.input_ids.shape
    labels = np.full((rows, length), IGNORE_INDEX, np.int64)
    row, slot = np.nonzero(masked.valid)
    labels[row, masked.positions[row, slot]] = masked.labels[row, slot]
    return {"valid": np.arange(length) < lengths[:, None], "labels": labels}


def step_ranges(
    step: int, steps: int, batch_rows: int, micro_rows: int, rank: int, ranks: int
) -> Iterator[list[range]]:
    """Yields the global rows of this rank's micro-batches for each step from `step` to `steps` - 1.

    Together, the ranks process every row exactly once. If `micro_rows` is 0, a rank has one micro-batch per step.
    """
    for number in range(step, steps):
        begin = number * batch_rows
        first, last = begin + batch_rows * rank // ranks, begin + batch_rows * (rank + 1) // ranks
        micro = micro_rows or max(1, last - first)
        yield [range(at, min(at + micro, last)) for at in range(first, last, micro)]


class BatchLoader:
    """Yields the list of micro-batches of each step, in order, prepared by background threads.

    `ranges`: global rows of each micro-batch, by step (`step_ranges`). `prefetch`: number of steps prepared in advance.
    `pin`: whether batches are copied to pinned memory. `waited`: seconds that the consumer has waited for data so far.
    """

    def __init__(
        self,
        dataset: BlockDataset,
        masking: MaskingRule,
        order: DataOrder,
        ranges: Iterable[list[range]],
        read_ahead: ReadAhead,
        *,
        prefetch: int,
        pin: bool,
    ) -> None:
        self.dataset, self.masking, self.order, self.ranges, self.read_ahead = (
            dataset,
            masking,
            order,
            ranges,
            read_ahead,
        )
        self.prefetch, self.pin = prefetch, pin
        self.waited = 0.0

    def __iter__(self) -> Iterator[list[Batch]]:
        with self.read_ahead, ThreadPoolExecutor(min(self.prefetch, 4), thread_name_prefix="batch") as pool:
            futures: deque[tuple[int, Future[list[Batch]]]] = deque()
            try:
                for spans in self.ranges:
                    first = futures[0][0] if futures else spans[0].start
                    self.read_ahead.move(first, spans[-1].stop)
                    futures.append((spans[0].start, pool.submit(self._step, spans)))
                    if len(futures) > self.prefetch:
                        yield self._next(futures)
                while futures:
                    yield self._next(futures)
            finally:
                for _, future in futures:
                    future.cancel()

    def _next(self, futures: deque[tuple[int, Future[list[Batch]]]]) -> list[Batch]:
        start = time.perf_counter()
        batches = futures.popleft()[1].result()
        self.waited += time.perf_counter() - start
        return batches

    def _step(self, spans: list[range]) -> list[Batch]:
        return [self._batch(span) for span in spans]

    def _batch(self, span: range) -> Batch:
        parts, rows, epochs = self.order.slice(span.start, span.stop)
        batch = make_batch(self.dataset, self.masking, parts, rows, epochs % self.masking.mask.variants)
        return batch.pinned() if self.pin else batch

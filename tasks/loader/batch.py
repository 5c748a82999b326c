"""Batches: from the manifest's Arrow files to tensors that a step can use, prepared ahead by background threads.

A row of a batch is one block, masked; with cached targets it carries the encoded vectors of the teacher too. What is
read is checked on first use: file hashes when a part is opened (tasks.corpus), and the digest of the teacher's input on
every row.
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
from tasks.targets.file import check_digests
from tasks.tokens.mask import IGNORE_INDEX, MaskedRows, mask_rows, row_digests
from tasks.tokens.vocabulary import Vocabulary


class Batch(NamedTuple):
    """B blocks of length L with M chosen positions each; unused slots of M have valid = False and label -100."""

    input_ids: Tensor
    """[B, L] int64, already masked."""
    attention_mask: Tensor | None
    """[B, L] bool, or None when every position is attended."""
    positions: Tensor | None
    """[B, M] int64: positions that carry loss; None when all L do, in order."""
    valid: Tensor
    """[B, M] bool."""
    labels: Tensor
    """[B, M] int64: the original token at masked positions, -100 elsewhere."""
    payload: Tensor | None
    """[B, M, bytes] uint8: the teacher's encoded vectors, or None when there is no cache."""
    tokens: int
    rows: int
    """Positions that carry distil and cosine loss."""
    masked: int
    """Positions that carry MLM loss."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; copies overlap with compute when it was pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The same batch in page-locked memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        moved: dict[str, Any] = self._asdict()
        moved |= {name: move(x) for name, x in moved.items() if isinstance(x, Tensor)}
        return Batch(**moved)


@dataclass(frozen=True)
class MaskingRule:
    """What turns a block into a row of a batch."""

    vocabulary: Vocabulary
    mask: MaskSettings
    every_position: bool
    counts: NDArray[np.int64] | None = None


def make_batch(corpus: BlockDataset, masking: MaskingRule, parts: Indices, rows: Indices, variants: Indices) -> Batch:
    """Gathers, masks and, with a cache, fetches and checks the teacher's vectors. Rows keep their order."""
    stacked: dict[str, NDArray[Any]] = {}
    for part, variant in sorted(set(zip(parts.tolist(), variants.tolist(), strict=True))):
        here = np.flatnonzero((parts == part) & (variants == variant))
        for name, values in _rows_of_part(corpus, masking, part, variant, rows[here]).items():
            if name not in stacked:
                stacked[name] = np.empty((len(rows), *values.shape[1:]), values.dtype)
            stacked[name][here] = values
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
        rows=int(stacked["valid"].sum()),
        masked=int((stacked["labels"] != IGNORE_INDEX).sum()),
    )


def _rows_of_part(
    corpus: BlockDataset, masking: MaskingRule, part: int, variant: int, rows: Indices
) -> dict[str, NDArray[Any]]:
    """The rows of one part under one mask variant, as arrays with one entry a row."""
    blocks = corpus.blocks(part)
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
    if corpus.cached:
        targets = corpus.targets(part, variant)
        check_digests(targets, rows, row_digests(masked.input_ids, lengths))
        group["payload"] = _in_slots(targets.payload(rows), group["valid"])
    return group


def _in_slots(flat: NDArray[np.uint8], valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Vectors [N, P] of the valid slots at their places in [B, M, P]; where all are valid nothing is copied."""
    shape = (*valid.shape, flat.shape[1])
    if valid.all():
        return flat.reshape(shape)
    payload = np.zeros(shape, np.uint8)
    payload[valid] = flat
    return payload


def _every_position(masked: MaskedRows, lengths: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
    """All attended positions carry loss; labels stand where a token is masked."""
    rows, length = masked.input_ids.shape
    spread = np.full((rows, length), IGNORE_INDEX, np.int64)
    row, slot = np.nonzero(masked.valid)
    spread[row, masked.positions[row, slot]] = masked.labels[row, slot]
    return {"valid": np.arange(length) < lengths[:, None], "labels": spread}


def step_ranges(
    step: int, steps: int, batch_rows: int, micro_rows: int, rank: int, ranks: int
) -> Iterator[list[range]]:
    """For each step, the global rows of this rank's micro-batches. Together the ranks take every row exactly once."""
    for number in range(step, steps):
        begin = number * batch_rows
        first, last = begin + batch_rows * rank // ranks, begin + batch_rows * (rank + 1) // ranks
        micro = micro_rows or max(1, last - first)
        yield [range(at, min(at + micro, last)) for at in range(first, last, micro)]


class BatchLoader:
    """Iterates over steps; each item is the list of a step's micro-batches, prepared by background threads in order.

    `waited` are the seconds that the consumer stood still for data.
    """

    def __init__(
        self,
        corpus: BlockDataset,
        masking: MaskingRule,
        order: DataOrder,
        plan: Iterable[list[range]],
        ahead: ReadAhead,
        *,
        prefetch: int,
        pin: bool,
    ) -> None:
        self.corpus, self.masking, self.order, self.plan, self.ahead = corpus, masking, order, plan, ahead
        self.prefetch, self.pin = prefetch, pin
        self.waited = 0.0

    def __iter__(self) -> Iterator[list[Batch]]:
        with self.ahead, ThreadPoolExecutor(min(self.prefetch, 4), thread_name_prefix="batch") as pool:
            futures: deque[tuple[int, Future[list[Batch]]]] = deque()
            try:
                for spans in self.plan:
                    first = futures[0][0] if futures else spans[0].start
                    self.ahead.move(first, spans[-1].stop)
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
        parts, rows, epochs = self.order.stretch(span.start, span.stop)
        batch = make_batch(self.corpus, self.masking, parts, rows, epochs % self.masking.mask.variants)
        return batch.pinned() if self.pin else batch

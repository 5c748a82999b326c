"""The dataloader over many shards and several epochs gives the batches that make_batch gives one at a time."""

from pathlib import Path

import torch

from storage.store import Store
from tasks.loader.batch import BatchLoader, MaskingRule, make_batch, step_ranges
from tasks.loader.dataset import BlockDataset
from tasks.loader.order import DataOrder
from tasks.loader.prefetch import ReadAhead
from tasks.recipe.config import MaskSettings
from tasks.tokens.vocabulary import load_vocabulary
from tests.harness.tiny import make_parts, make_teacher

SHARDS, WINDOW, ROWS, VARIANTS = 9, 2, 4, 2


def test_the_loader_yields_every_batch_of_every_epoch_under_its_mask_variant(tmp_path: Path) -> None:
    make_teacher(tmp_path / "teacher")
    store = Store(tmp_path / "store")
    parts = make_parts(store, tmp_path / "teacher", shards=SHARDS, texts=3)
    masking = MaskingRule(
        load_vocabulary(str(tmp_path / "teacher")), MaskSettings(variants=VARIANTS), every_position=False
    )
    order = DataOrder(tuple(part.rows for part in parts), WINDOW, seed=3)
    steps = 2 * order.rows // ROWS
    loaded, plain = BlockDataset(store, parts, cached=False), BlockDataset(store, parts, cached=False)
    read_ahead = ReadAhead(loaded, order, steps * ROWS, VARIANTS)
    ranges = step_ranges(0, steps, ROWS, 0, 0, 1)
    loader = BatchLoader(loaded, masking, order, ranges, read_ahead, prefetch=2, pin=False)
    for step, (batch,) in enumerate(loader):
        part, row, epoch = order.slice(step * ROWS, (step + 1) * ROWS)
        expected = make_batch(plain, masking, part, row, epoch % VARIANTS)
        assert torch.equal(batch.input_ids, expected.input_ids)
        assert torch.equal(batch.labels, expected.labels)
    assert step == steps - 1

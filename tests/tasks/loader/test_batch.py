"""The loader over many shards and several epochs: the same batches as one by one."""

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


def test_the_loader_gives_every_batch_of_every_epoch_under_its_own_mask(tmp_path: Path) -> None:
    make_teacher(tmp_path / "teacher")
    store = Store(tmp_path / "store")
    parts = make_parts(store, tmp_path / "teacher", shards=SHARDS, texts=3)
    masking = MaskingRule(
        load_vocabulary(str(tmp_path / "teacher")), MaskSettings(variants=VARIANTS), every_position=False
    )
    order = DataOrder(tuple(part.rows for part in parts), WINDOW, seed=3)
    steps = 2 * order.rows // ROWS
    loaded, plain = BlockDataset(store, parts, cached=False), BlockDataset(store, parts, cached=False)
    ahead = ReadAhead(loaded, order, steps * ROWS, VARIANTS)
    loader = BatchLoader(loaded, masking, order, step_ranges(0, steps, ROWS, 0, 0, 1), ahead, prefetch=2, pin=False)
    for step, (batch,) in enumerate(loader):
        part, row, epoch = order.stretch(step * ROWS, (step + 1) * ROWS)
        wanted = make_batch(plain, masking, part, row, epoch % VARIANTS)
        assert torch.equal(batch.input_ids, wanted.input_ids)
        assert torch.equal(batch.labels, wanted.labels)
    assert step == steps - 1

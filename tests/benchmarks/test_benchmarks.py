"""The benchmarks at tiny size: each runs, and both sides of a comparison compute the same. No speed is asserted."""

import json
from pathlib import Path

import pytest
import torch

from storage.artifact import Ref
from storage.store import Store
from tasks.corpus.snapshot import take_snapshot
from tasks.models.student import make_student
from tasks.recipe.config import CorpusSettings, LossSettings, TargetSettings
from tasks.tokens.vocabulary import load_vocabulary
from tests.benchmarks import corpus, imports, loader, rerun, step
from tests.benchmarks.gpu.flops import case_flops
from tests.benchmarks.reference import reference_batch, reference_losses
from tests.benchmarks.results import CORPUS, TEACHER, Report, Row, publish
from tests.benchmarks.synthetic import CAMEMBERT, TINY, Bench, first_batch, random_bench

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return random_bench(tmp_path_factory.mktemp("bench"), TINY, 16, "cpu")


def test_reference_computes_our_loss_over_all_positions(bench: Bench) -> None:
    batch = reference_batch(first_batch(bench, TargetSettings(), bench.parts, 8))
    student = make_student(bench.teacher.model, bench.teacher.vocabulary, layers=bench.layers)
    expected = float(reference_losses(bench.teacher.model, student, batch, LossSettings()).total.detach())
    ours = step.our_step(bench, "all", 8).run()
    assert ours == pytest.approx(expected, rel=2e-4)  # ours decodes int8 hidden states


def test_all_and_masked_positions_have_the_same_blocks_and_masks(bench: Bench) -> None:
    masked, everywhere = (
        reference_batch(first_batch(bench, TargetSettings.model_validate({"positions": positions}), bench.parts, 8))
        for positions in ("masked", "all")
    )
    assert torch.equal(masked.input_ids, everywhere.input_ids)
    assert torch.equal(masked.labels, everywhere.labels)


def test_flops_per_token_are_those_of_the_design() -> None:
    """MFLOP per token: training 279 (313 with a full last layer), capture 177 (188 with it)."""
    assert case_flops(CAMEMBERT, "cached", "masked") == pytest.approx(279e6, rel=0.01)
    assert case_flops(CAMEMBERT, "capture", "masked") == pytest.approx(177e6, rel=0.01)
    assert case_flops(CAMEMBERT, "reference") == pytest.approx(673e6, rel=0.01)


def test_a_report_is_written_as_table_and_json(tmp_path: Path) -> None:
    rows = [Row("speed", "tokens/s", 12_345.6, 1000.0, 12.3456, 2.0), Row("bytes", "B", 0.0)]
    publish(Report("name", "Title", {"date": "today"}, rows, "Notes."), tmp_path)
    (table,), (record,) = tmp_path.glob("*-name.md"), tmp_path.glob("*-name.json")
    assert "| speed | tokens/s | 12,346 | 1,000 | 12.3 | 2 |" in table.read_text(encoding="utf-8")
    assert json.loads(record.read_text(encoding="utf-8"))["rows"][0]["ours"] == 12_345.6


@pytest.mark.slow
def test_other_benchmarks_run(tmp_path: Path, bench: Bench) -> None:
    settings = CorpusSettings(url=str(CORPUS))
    place = corpus.Place(take_snapshot(settings).sources[:1], settings, load_vocabulary(str(TEACHER)), tmp_path)
    rows = [*corpus.shard_rows(place, 1), *step.step_rows(bench, 8, 1), loader.compare_with_step(bench, "masked", 8, 1)]
    rows += [loader.compare_with_gpu(bench, "all", 8, 1), *imports.measure(1)]
    assert all(row.ours > 0 for row in rows), rows


@pytest.mark.slow
def test_a_run_over_unchanged_shards_writes_nothing(tmp_path: Path) -> None:
    spent, written = rerun.measure(tmp_path, shards=40, tries=1)
    assert spent.ours > 0
    assert written.ours == 0
    store = Store(tmp_path / "store")
    assert len(store.keys("targets")) == 40
    assert not store.missing([Ref("shard", f"{number:064x}", "shard") for number in range(40)])

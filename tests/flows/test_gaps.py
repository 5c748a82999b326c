"""An artifact that is missing without a reported failure is never ignored, by a run or by gc."""

from pathlib import Path

import pytest

from flows.garbage_collection import artifacts_to_keep
from flows.pipeline.preparation import Prepared, StageResult, silently_missing
from storage.artifact import Ref
from storage.errors import FatalError
from storage.fingerprint import sha256_bytes
from storage.lease import Lease
from storage.store import Store
from tasks.corpus.shard import shard_source
from tasks.lineage import Workspace, vocabulary_of
from tasks.recipe.config import Recipe
from tasks.recipe.run_json import RUN_SCHEMA, model_ref
from tasks.tokens.blocks import make_blocks
from tests.harness.artifacts import put
from tests.harness.recipe_values import teacherless_recipe
from tests.harness.tiny import save_tokenizer, write_oscar


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    write_oscar(tmp_path / "corpus", parts=2, texts=8)
    values = {
        "name": "tiny",
        "corpus": {"url": str(tmp_path / "corpus"), "heldout_per_mille": 0},
    }
    return teacherless_recipe(save_tokenizer(tmp_path / "tokenizer"), **values)


@pytest.fixture
def store(tmp_path: Path, recipe: Recipe) -> Store:
    """A store with all shards and blocks of the recipe."""
    store = Store(tmp_path / "store")
    for source, _ in Workspace(store, recipe).lineage.sources:
        shard_source(store, source, recipe.corpus)
    for shard in Workspace(store, recipe).lineage.shards:
        make_blocks(store, shard, recipe.blocks, vocabulary_of(recipe))
    return store


def test_a_lost_artifact_is_a_gap_unless_its_failure_was_reported(store: Store, recipe: Recipe) -> None:
    lost = Workspace(store, recipe).lineage.training_blocks[1]
    store.withdraw(lost)
    workspace = Workspace(store, recipe)
    assert silently_missing(Prepared(workspace, ())) == [lost]
    failure = store.fail(lost, FatalError("no"))
    assert silently_missing(Prepared(workspace, (StageResult("blocks", 1, (failure,), 0.1),))) == []


def test_gc_refuses_while_the_shards_of_a_source_are_unknown(store: Store, recipe: Recipe) -> None:
    wanted = {(ref.kind, ref.key) for ref in Workspace(store, recipe).lineage.training_blocks}
    assert wanted <= artifacts_to_keep(store, [recipe])
    source = Workspace(store, recipe).lineage.sources[0][1]
    assert isinstance(source, Ref)
    store.withdraw(source)
    with pytest.raises(FatalError, match="fr_meta_part_1 has not been read"):
        artifacts_to_keep(store, [recipe])


def test_gc_keeps_what_a_running_training_of_an_older_snapshot_reads(store: Store, recipe: Recipe) -> None:
    old = put(store, "blocks of the snapshot before").ref
    assert (old.kind, old.key) not in artifacts_to_keep(store, [recipe])
    lease = Lease.take(store, "f" * 64, [old])
    assert (old.kind, old.key) in artifacts_to_keep(store, [recipe])
    lease.end()
    assert (old.kind, old.key) not in artifacts_to_keep(store, [recipe])


def test_gc_drops_the_checkpoints_of_a_finished_training(store: Store, recipe: Recipe) -> None:
    ended, going = (sha256_bytes(name) for name in (b"ended", b"going"))
    for ref in (*(Ref("checkpoint", f"{run}-{7:09d}", "step 7") for run in (ended, going)), model_ref(ended, "tiny")):
        with store.scratch() as folder:
            (folder / "weights").write_bytes(b"bytes")
            store.commit(
                ref, folder, schema=1, rows=1, tokens=1, settings={}, parents=[], info={"run_schema": RUN_SCHEMA}
            )
    checkpoints = {key for kind, key in artifacts_to_keep(store, [recipe]) if kind == "checkpoint"}
    assert checkpoints == {f"{going}-{7:09d}"}

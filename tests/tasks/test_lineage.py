"""Artifacts of a recipe: stable keys, a stable calibration sample, cached lineages."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from storage import layout
from storage.artifact import Ref
from storage.errors import FatalError
from storage.store import Store
from tasks.corpus.shard import shard_source
from tasks.lineage import (
    Workspace,
    _sample_name,
    check_teacher,
    freeze_sample,
    plan_training,
    training_key,
    vocabulary_of,
)
from tasks.recipe.config import Recipe
from tasks.recipe.load import make_recipe
from tasks.targets.calibration import calibrate
from tasks.targets.compute import open_capture
from tasks.tokens.blocks import make_blocks
from tests.harness.tiny import make_teacher, write_oscar


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and two snapshots that share only their second half."""
    folder = tmp_path_factory.mktemp("lineage")
    make_teacher(folder / "teacher")
    write_oscar(folder / "old", parts=4, texts=8)
    write_oscar(folder / "new", parts=4, texts=8)
    for number in (1, 2):
        (folder / "new" / f"fr_meta_part_{number}.jsonl").unlink()
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def recipe_of(place: Path, snapshot: str) -> Recipe:
    return make_recipe(
        {
            "name": "tiny",
            "corpus": {"url": str(place / snapshot), "heldout_per_mille": 0},
            "teacher": {"model": str(place / "teacher")},
            "blocks": {"length": 32},
            "targets": {"calibration_rows": 4},
            "train": {"device": "cpu"},
        },
        "test",
    )


def make_text(store: Store, recipe: Recipe) -> tuple[Ref, ...]:
    """Shards and blocks of a recipe; returns the blocks."""
    for source, _ in Workspace(store, recipe).lineage.sources:
        shard_source(store, source, recipe.corpus)
    for shard in Workspace(store, recipe).lineage.shards:
        make_blocks(store, shard, recipe.blocks, vocabulary_of(recipe))
    return Workspace(store, recipe).lineage.training_blocks


def test_a_pinned_sample_outlives_its_snapshot(place: Path, store: Store) -> None:
    old, new = recipe_of(place, "old"), recipe_of(place, "new")
    freeze_sample(Workspace(store, old), make_text(store, old)[:2])
    make_text(store, new)
    assert Workspace(store, new).lineage.sample == Workspace(store, old).lineage.sample
    assert Workspace(store, new).lineage.calibration == Workspace(store, old).lineage.calibration


def test_admitting_a_refused_source_does_not_change_the_sample(place: Path, store: Store) -> None:
    strict = recipe_of(place, "old")
    freeze_sample(Workspace(store, strict), make_text(store, strict)[2:])
    changes = {"corpus.max_bad_lines": 50, "corpus.max_unpacked_ratio": 900}
    lenient = Workspace(store, strict.with_changes(changes)).lineage
    assert len(lenient.sample) == 2
    assert (lenient.sample, lenient.targets) == (
        Workspace(store, strict).lineage.sample,
        Workspace(store, strict).lineage.targets,
    )


def test_home_and_store_are_in_no_key(place: Path, store: Store) -> None:
    here = recipe_of(place, "old")
    make_text(store, here)
    there = here.with_changes({"home": "/elsewhere", "store": "/elsewhere/store"})
    workspaces = [Workspace(store, recipe) for recipe in (here, there)]
    assert workspaces[0].lineage.stages() == workspaces[1].lineage.stages()
    assert training_key(workspaces[0]) == training_key(workspaces[1])


def test_the_name_of_a_pinned_sample_never_changes(place: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another name would lose the sample, and with it every target in the store."""
    monkeypatch.setattr("tasks.lineage.vocabulary_of", lambda recipe: SimpleNamespace(fingerprint="f" * 64))
    recipe = make_recipe({"name": "a", "corpus": {"url": str(place / "old")}, "teacher": {"model": "t"}}, "test")
    before = _sample_name(Workspace(store, recipe))
    assert before == "a0e4add7197e7ed0e10f1fc31d9146da91e280560395caa3197b0561c55e785b"
    lines = recipe.with_changes({"corpus.text": "lines"})
    assert _sample_name(Workspace(store, lines)) != before


def test_blocks_that_can_be_made_again_do_not_change_the_sample(place: Path, store: Store) -> None:
    old = recipe_of(place, "old")
    blocks = make_text(store, old)
    freeze_sample(Workspace(store, old), blocks[2:])
    before = Workspace(store, old).lineage
    store.withdraw(blocks[3])
    assert Workspace(store, old).lineage.targets == before.targets


def test_a_lost_sample_is_used_while_its_calibration_exists(place: Path, store: Store) -> None:
    old, new = recipe_of(place, "old"), recipe_of(place, "new")
    blocks = make_text(store, old)
    freeze_sample(Workspace(store, old), blocks[:2])
    make_text(store, new)
    capture = open_capture(store, new.teacher, vocabulary_of(new), new.mask, new.targets, device="cpu")
    receipt = calibrate(store, blocks[:2], capture)
    store.withdraw(blocks[0])  # of a source that the new snapshot no longer has
    assert Workspace(store, new).lineage.calibration == receipt.ref
    store.withdraw(receipt.ref)
    assert Workspace(store, new).lineage.sample == Workspace(store, new).lineage.training_blocks


def test_the_run_key_is_known_without_reading_the_store(place: Path, store: Store) -> None:
    values = recipe_of(place, "old").model_dump(by_alias=True) | {"targets": {"source": "online"}}
    recipe = make_recipe(values, "test")
    blocks = make_text(store, recipe)
    receipt = Path(store.path(layout.receipt_path("blocks", blocks[0].key)))
    receipt.write_bytes(replace(store.receipt(blocks[0]), rows=0).to_json())
    workspace = Workspace(store, recipe)
    run = plan_training(workspace)
    assert len(run.manifest) == len(blocks) - 1
    assert training_key(workspace) == run.run_key


def test_a_workspace_reads_the_store_once_until_it_is_refreshed(place: Path, store: Store) -> None:
    workspace = Workspace(store, recipe_of(place, "old"))
    assert workspace.lineage.shards == ()
    make_text(store, workspace.recipe)
    assert workspace.lineage.shards == ()
    assert workspace.refreshed().lineage == Workspace(store, workspace.recipe).lineage
    assert workspace.with_warm_start("elsewhere").lineage is workspace.lineage
    assert workspace.with_warm_start("elsewhere").recipe.train.warm_start == "elsewhere"
    assert workspace.with_changes({"blocks.length": 64}).lineage.shards != ()


def test_an_unusable_teacher_is_refused_before_the_corpus_is_read(place: Path, tmp_path: Path) -> None:
    recipe = recipe_of(place, "old")
    check_teacher(recipe)
    (tmp_path / "config.json").write_text('{"vocab_size": 100}')
    empty = recipe.with_changes({"teacher.model": str(tmp_path)})
    with pytest.raises(FatalError, match="no weights"):
        check_teacher(empty)
    (tmp_path / "model.safetensors").write_bytes(b"")
    foreign = empty.with_changes({"blocks.tokenizer": str(place / "teacher")})
    with pytest.raises(FatalError, match=r"set blocks\.tokenizer"):
        check_teacher(foreign)

"""Checks that every fault in an artifact's files or receipt is detected before the artifact is used.

    pytest tests/hard/corruption/test_corruption.py -s        prints the numbers of injected and missed faults by kind

A small pipeline is run once. Each fault of injected_faults.py is injected into a copy of its store, one at a time, for
one artifact of every kind, and must be detected twice: by the next stage (which raises a FatalError that names the
artifact, or finds it missing and makes it again) and by `verify`, which must report this artifact and no other. Forged
artifacts with a matching receipt can only be detected by the trainer, which must do so before the first gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from storage.artifact import KINDS, Receipt, Ref
from storage.errors import FatalError
from storage.store import Store
from storage.verify import verify
from tasks.corpus.shard import shard_source
from tasks.corpus.snapshot import take_snapshot
from tasks.eval.scores import ScoreKey, read_scores, store_scores
from tasks.lineage import Workspace, plan_training, vocabulary_of
from tasks.recipe.config import Recipe
from tasks.recipe.run_json import RunSpec
from tasks.targets.calibration import calibrate, read_calibration
from tasks.targets.capture import Capture
from tasks.targets.compute import make_targets, open_capture
from tasks.targets.targets_file import open_targets
from tasks.tokens.blocks import make_blocks
from tasks.tokens.token_counts import count_tokens, read_counts
from tasks.train.checkpoint import checkpoint_ref, load_checkpoint, steps_kept
from tasks.train.optimizer import make_optimizer
from tasks.train.process import StopSignal
from tasks.train.setup import set_up_training
from tasks.train.step import Ranks
from tasks.train.trainer import Trainer, train
from tests.hard.corruption.injected_faults import (
    InjectedFault,
    again,
    bytes_of,
    forge_targets,
    injected_faults,
    linked_copy,
    restored_copy,
    version,
)
from tests.hard.reliability import record
from tests.harness.recipe_values import simple_recipe
from tests.harness.tiny import make_teacher, write_oscar

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Chain:
    """A finished pipeline.

    `chosen` is the artifact of each kind that is damaged, `others` are more artifacts of that kind. `capture` makes the
    targets, and `bare` their calibration; `trainer` is ready for its first step.
    """

    store: Store
    recipe: Recipe
    run: RunSpec
    chosen: Mapping[str, Receipt]
    others: Mapping[str, list[Receipt]]
    bare: Capture
    capture: Capture
    trainer: Trainer

    @property
    def sample(self) -> list[Ref]:
        return [part.blocks_ref() for part in self.run.manifest]


def recipe_in(folder: Path) -> Recipe:
    values = {
        "home": str(folder / "home"),
        "store": str(folder / "store"),
        "corpus": {"url": str(folder / "corpus"), "heldout_per_mille": 100},
        "teacher": {"model": str(folder / "teacher")},
        "blocks": {"length": 32},
        "mask": {"kind": "smoothed"},
        "student": {"layers": 1},
        "train": {"batch_rows": 24, "checkpoint_steps": 1, "validate_steps": 0, "threads": 1, "device": "cpu"},
    }
    return simple_recipe(**values)


def captures(store: Store, recipe: Recipe, counts: Ref, sample: list[Ref]) -> tuple[Capture, Capture]:
    """Returns a capture without and one with calibration; makes the calibration if it does not exist."""
    vocabulary = vocabulary_of(recipe)
    bare = open_capture(store, recipe.teacher, vocabulary, recipe.mask, recipe.targets, counts, device="cpu")
    frozen = calibrate(store, sample, bare)
    return bare, replace(bare, calibration=read_calibration(store, frozen.ref), calibration_key=frozen.key)


def of_another_seed(store: Store, recipe: Recipe, counts: Ref, blocks: Ref) -> Receipt:
    """Makes the targets of the same blocks under a different mask."""
    other = recipe.model_copy(update={"mask": recipe.mask.model_copy(update={"seed": recipe.mask.seed + 1})})
    return make_targets(store, blocks, captures(store, other, counts, [blocks])[1])


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    make_teacher(folder / "teacher", layers=2)
    write_oscar(folder / "corpus", parts=2, texts=20)
    with (folder / "corpus" / "fr_meta_part_1.jsonl").open("a") as file:
        file.write("{not JSON\n")  # so that the source artifact has a file: its quarantine
    recipe = recipe_in(folder)
    store = Store(recipe.store)
    sources = [shard_source(store, source, recipe.corpus) for source in take_snapshot(recipe.corpus).sources]
    lineage = Workspace(store, recipe).lineage
    shards = [store.receipt(ref) for ref in lineage.shards]
    vocabulary = vocabulary_of(recipe)
    for ref in (*lineage.shards, *lineage.heldout_shards):
        make_blocks(store, ref, recipe.blocks, vocabulary)
    lineage = Workspace(store, recipe).lineage
    blocks = [store.receipt(ref) for ref in lineage.training_blocks]
    counts = count_tokens(store, lineage.sample, vocabulary)
    bare, capture = captures(store, recipe, counts.ref, list(lineage.sample))
    targets = [make_targets(store, one.ref, capture) for one in blocks]
    run = plan_training(Workspace(store, recipe))
    assert train(run, Ranks(), StopSignal())
    steps = [store.receipt(checkpoint_ref(run, step)) for step in steps_kept(store, run)]
    model = store.receipt(run.model_ref)
    trial = ScoreKey(model.key, {"name": "p"}, "set")
    scores = store_scores(store, trial, {"accuracy": 0.5, "by": {"x": 1.0}})
    first = [blocks[0].ref]
    other_model = version(store, model, replace(model.ref, key="a" * 64))
    chosen = dict(zip(KINDS, (sources[0], shards[0], counts, blocks[0]), strict=False))
    chosen |= {"calibration": store.receipt(Ref("calibration", capture.calibration_key, "c")), "targets": targets[0]}
    chosen |= {"checkpoint": steps[-1], "model": model, "scores": scores}
    others = {
        "source": [sources[1]],
        "shard": [shards[1], store.receipt(lineage.heldout_shards[0])],
        "counts": [count_tokens(store, first, vocabulary)],
        "blocks": [blocks[1]],
        "calibration": [calibrate(store, first, bare)],
        "targets": [targets[1], of_another_seed(store, recipe, counts.ref, first[0])],
        "checkpoint": [steps[0]],
        "model": [other_model],
        "scores": [store_scores(store, replace(trial, seed=1), {"accuracy": 0.6, "by": {"x": 2.0}})],
    }
    assert verify(store) == []
    built = set_up_training(run, store, CPU)
    trainer = Trainer(run, store, built, make_optimizer(built.student, run.train), Ranks(), None, CPU)
    return Chain(store, recipe, run, chosen, others, bare, capture, trainer)


# ---- who reads a kind ----------------------------------------------------------------------------------------


def read_source(chain: Chain, store: Store) -> None:
    source = take_snapshot(chain.recipe.corpus).sources[0]
    shard_source(store, source, chain.recipe.corpus)


def make_blocks_again(chain: Chain, store: Store) -> None:
    make_blocks(store, chain.chosen["shard"].ref, chain.recipe.blocks, vocabulary_of(chain.recipe), force=True)


def make_targets_again(chain: Chain, store: Store) -> None:
    make_targets(store, chain.chosen["blocks"].ref, chain.capture, force=True)


def count_again(chain: Chain, store: Store) -> None:
    count_tokens(store, chain.sample, vocabulary_of(chain.recipe), force=True)


def all_batches(chain: Chain, store: Store) -> None:
    """Reads every batch of the run, as the trainer does before each step."""
    chain.trainer.store = store
    for _ in chain.trainer._dataloader(0):
        pass


def resume(chain: Chain, store: Store) -> None:
    """Resumes, and raises the recorded failure of the newest checkpoint if an older one was loaded."""
    newest = chain.chosen["checkpoint"]
    progress = load_checkpoint(store, chain.run, chain.trainer.setup.student, chain.trainer.optimizer)
    if progress.step < int(newest.settings["step"]):
        raise FatalError(next((f.message for f in store.failures("checkpoint") if f.key == newest.key), "not noted"))


READERS: Mapping[str, tuple[Callable[[Chain, Store], object], ...]] = {
    "source": (read_source,),
    "shard": (make_blocks_again,),
    "blocks": (make_targets_again, count_again, all_batches),
    "counts": (lambda chain, store: read_counts(store, chain.chosen["counts"].ref),),
    "calibration": (lambda chain, store: read_calibration(store, chain.chosen["calibration"].ref),),
    "targets": (all_batches,),
    "checkpoint": (resume,),
    "model": (lambda chain, store: store.verified_folder(store.receipt(chain.chosen["model"].ref)),),
    "scores": (lambda chain, store: read_scores(store, chain.chosen["scores"].ref),),
}


OF_FILES = [f"receipt sealed: another {what}" for what in ("sha256", "size", "name of a file")]
"""Faults of a receipt that can only be detected by reading the files."""


def missed_by_stages(chain: Chain, kind: str, store: Store, fault: InjectedFault) -> list[str]:
    """Returns a sentence for each reader that did not reject the fault."""
    receipt = chain.chosen[kind]
    if store.missing([receipt.ref]):
        return []  # it is made again before anybody reads it
    if kind == "source" and (fault.name in OF_FILES or not fault.name.startswith(("receipt", "all exchanged"))):
        return []  # no stage reads the files of a source, its quarantine: only people do
    said = []
    for reader in READERS[kind]:
        try:
            reader(chain, store)
            said.append(f"{fault.name}: read without an error")
        except FatalError as error:
            if receipt.label not in str(error) and receipt.key not in str(error):
                said.append(f"{fault.name}: the error does not name the artifact: {error}")
        except Exception as error:  # noqa: BLE001  any other exception counts as a missed fault
            said.append(f"{fault.name}: {error!r}")
    return said


def missed_by_verify(chain: Chain, kind: str, store: Store, fault: InjectedFault) -> list[str]:
    keys = {chain.chosen[kind].key}
    about = keys | ({one.key for one in chain.others[kind]} if "exchanged" in fault.name else set())
    lost = bool(store.missing([chain.chosen[kind].ref]))
    try:
        found = {fault.ref.key for fault in verify(store)}
    except Exception as error:  # noqa: BLE001  as above
        return [f"{fault.name}: {error!r}"]
    if not (lost or keys <= found) or not found <= about:
        return [f"{fault.name}: {sorted(found)}"]
    return []


@pytest.mark.parametrize("kind", KINDS)
def test_every_damage_is_found_by_the_next_stage_and_by_verify(kind: str, chain: Chain, tmp_path: Path) -> None:
    injected = injected_faults(chain.store, chain.chosen[kind], chain.others[kind])
    missed: dict[str, list[str]] = {"stage": [], "verify": []}
    for fault in injected:
        for who, look in (("stage", missed_by_stages), ("verify", missed_by_verify)):
            store = restored_copy(chain.store, tmp_path / "store")
            fault.inject(store)
            missed[who] += look(chain, kind, store, fault)
    counts = ", ".join(f"{who} missed {len(names)}" for who, names in missed.items())
    print(f"\n{kind}: {len(injected)} injected, {counts}")
    record(
        "tests/hard/corruption/test_corruption.py",
        {"injected": len(injected), "missed": sum(map(len, missed.values()))},
    )
    assert len(injected) > 50
    assert missed == {"stage": [], "verify": []}


# ---- forged: the receipt fits ----------------------------------------------------------------------------------


def targets_file(store: Store, ref: Ref, of: Ref, **shifts: int) -> None:
    forge_targets(store, ref, open_targets(store, of), **shifts)


def in_place_of(store: Store, receipt: Receipt, other: Receipt, **changes: int) -> None:
    """Commits the files of another artifact (or the same one) with a matching receipt."""
    again(store, receipt, receipt.ref, bytes_of(store, other), **changes)


FORGED: Mapping[str, Callable[[Chain, Store], object]] = {
    "targets of another shard": lambda chain, store: targets_file(
        store, chain.chosen["targets"].ref, chain.others["targets"][0].ref
    ),
    "targets of another mask": lambda chain, store: targets_file(
        store, chain.chosen["targets"].ref, chain.others["targets"][1].ref
    ),
    "rows of targets shifted": lambda chain, store: targets_file(
        store, chain.chosen["targets"].ref, chain.chosen["targets"].ref, shift_rows=1
    ),
    "vectors of targets shifted": lambda chain, store: targets_file(
        store, chain.chosen["targets"].ref, chain.chosen["targets"].ref, shift_vectors=1
    ),
    "the file of another shard's targets": lambda chain, store: in_place_of(
        store, chain.chosen["targets"], chain.others["targets"][0]
    ),
    "blocks of another shard": lambda chain, store: in_place_of(
        store, chain.chosen["blocks"], chain.others["blocks"][0]
    ),
    "counts of another sample": lambda chain, store: in_place_of(
        store, chain.chosen["counts"], chain.others["counts"][0]
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_is_forged_is_found_before_a_gradient(
    name: str, chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = linked_copy(chain.store, tmp_path / "store")
    FORGED[name](chain, store)
    store.withdraw(chain.run.model_ref)
    for step in steps_kept(store, chain.run):
        store.withdraw(checkpoint_ref(chain.run, step))

    def touched(*_: object) -> None:
        raise AssertionError(f"{name}: a gradient was touched")

    monkeypatch.setattr("tasks.train.trainer.gradient_step", touched)
    run = chain.run.model_copy(update={"store": store.root, "folder": str(tmp_path / "run" / "x")})
    Path(run.folder).mkdir(parents=True)
    with pytest.raises(FatalError, match=r"fr_meta_part_\d-0000"):
        train(run, Ranks(), StopSignal())

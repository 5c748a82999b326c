"""Prepares every stage of the pipeline as a repeatable call, on a small store with the inputs of all stages.

    bench = make_bench(Store(disk / "store"), tmp_path)
    call = STAGES["targets"](bench)
    call()                                  # calls the function that the flows call

Used by tests of stages on a full or read-only disk, and on artifacts of an older version.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from storage.artifact import Ref
from storage.fingerprint import sha256_bytes
from storage.store import Store
from tasks.corpus.shard import shard_source
from tasks.corpus.snapshot import take_snapshot
from tasks.eval.scores import ScoreKey, store_scores
from tasks.models.model_files import fingerprint_of
from tasks.recipe.config import BlockSettings, CorpusSettings, MaskSettings, TargetSettings, TeacherSettings
from tasks.recipe.load import make_recipe
from tasks.recipe.run_json import Part, RunSpec, make_run
from tasks.targets.calibration import calibrate
from tasks.targets.compute import make_targets, open_capture
from tasks.tokens.blocks import make_blocks
from tasks.tokens.token_counts import count_tokens
from tasks.tokens.vocabulary import load_vocabulary
from tasks.train.process import StopSignal
from tasks.train.step import Ranks
from tasks.train.trainer import train
from tests.harness.tiny import documents, make_parts, make_teacher, save_text_shard, write_oscar


@dataclass(frozen=True)
class Bench:
    """A store with the inputs of all stages; teacher, corpus and run folders are in the folder `elsewhere`."""

    store: Store
    elsewhere: Path
    teacher: TeacherSettings
    parts: tuple[Part, ...]

    @property
    def sample(self) -> list[Ref]:
        return [part.blocks_ref() for part in self.parts]

    def run(self, home: Path, steps: int = 2) -> RunSpec:
        values = {
            "name": "tiny",
            "home": str(home),
            "store": self.store.root,
            "corpus": {"url": "unused"},
            "teacher": {"model": self.teacher.model},
            "blocks": {"length": 32},
            "targets": {"source": "online"},
            "student": {"layers": 1},
            "train": {"batch_rows": 4, "max_steps": steps, "validate_steps": 0, "threads": 1, "device": "cpu"},
        }
        recipe = make_recipe(values, "test")
        fingerprint = fingerprint_of(recipe.teacher)
        return make_run(recipe, manifest=self.parts, teacher_fingerprint=fingerprint, heldout=(), start="", counts="")


def make_bench(store: Store, elsewhere: Path) -> Bench:
    """Makes the blocks of two shards, and a teacher."""
    make_teacher(elsewhere / "teacher")
    parts = make_parts(store, elsewhere / "teacher", texts=8)
    return Bench(store, elsewhere, TeacherSettings(model=str(elsewhere / "teacher")), parts)


# ---- the stages, each as a call that can be repeated ----------------------------------------------------------


def source(bench: Bench) -> Callable[[], object]:
    corpus = CorpusSettings(url=str(write_oscar(bench.elsewhere / "corpus", parts=1)))
    (one,) = take_snapshot(corpus).sources
    return lambda: shard_source(bench.store, one, corpus)


def blocks(bench: Bench) -> Callable[[], object]:
    shard = save_text_shard(bench.store, documents(20, seed=9), "new-0000")
    return lambda: make_blocks(bench.store, shard, BlockSettings(length=32), load_vocabulary(bench.teacher.model))


def counts(bench: Bench) -> Callable[[], object]:
    return lambda: count_tokens(bench.store, bench.sample, load_vocabulary(bench.teacher.model))


def calibration(bench: Bench) -> Callable[[], object]:
    vocabulary = load_vocabulary(bench.teacher.model)
    capture = open_capture(bench.store, bench.teacher, vocabulary, MaskSettings(), TargetSettings(), device="cpu")
    return lambda: calibrate(bench.store, bench.sample, capture)


def targets(bench: Bench) -> Callable[[], object]:
    vocabulary = load_vocabulary(bench.teacher.model)
    bare = open_capture(bench.store, bench.teacher, vocabulary, MaskSettings(), TargetSettings(), device="cpu")
    frozen = calibrate(bench.store, bench.sample, bare).ref
    capture = open_capture(
        bench.store, bench.teacher, vocabulary, MaskSettings(), TargetSettings(), None, frozen, "cpu"
    )
    return lambda: make_targets(bench.store, bench.sample[0], capture)


def checkpoint(bench: Bench) -> Callable[[], object]:
    run = bench.run(bench.elsewhere / "home")
    return lambda: train(run, Ranks(), StopSignal())


def model(bench: Bench) -> Callable[[], object]:
    run = bench.run(bench.elsewhere / "home")
    train(run, Ranks(), StopSignal())
    receipt = bench.store.receipt(run.model_ref)
    bench.store.withdraw(receipt.ref)
    bench.store.drop_data(receipt)
    return lambda: train(run, Ranks(), StopSignal())


def metrics(bench: Bench) -> Callable[[], object]:
    """Puts the run folder next to the bench's store, and uses a store in a different folder."""
    run = bench.run(Path(bench.store.root).parent / "home")
    other = Store(bench.elsewhere / "store")
    make_parts(other, Path(bench.teacher.model), texts=8)
    return lambda: train(run.model_copy(update={"store": other.root}), Ranks(), StopSignal())


def scores(bench: Bench) -> Callable[[], object]:
    trial = ScoreKey(sha256_bytes(b"model"), {"name": "p"}, "set")
    return lambda: store_scores(bench.store, trial, {"accuracy": 0.5})


STAGES: Mapping[str, Callable[[Bench], Callable[[], object]]] = {
    "source": source,
    "blocks": blocks,
    "counts": counts,
    "calibration": calibration,
    "targets": targets,
    "checkpoint": checkpoint,
    "model": model,
    "metrics": metrics,
    "scores": scores,
}

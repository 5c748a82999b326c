"""RUN.json: everything that one training run needs, resolved. `flows` write it, `tasks.train` reads it.

The run key names the result: the settings that change weights, the manifest of blocks and targets, the teacher, and the
student's starting point. Device, micro-batch, ranks, threads and logging are not in it, so a run may move.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from storage.artifact import Ref
from storage.cache import LIMIT
from storage.disk import writing
from storage.errors import FatalError
from storage.fingerprint import key_of
from tasks.recipe.config import (
    BlockSettings,
    LossSettings,
    MaskSettings,
    Recipe,
    Section,
    StudentSettings,
    TargetSettings,
    TeacherSettings,
    TrainSettings,
)

METRICS = "metrics.jsonl"
"""File in the folder of a run: written by the trainer, followed by the flow."""
SCHEMA = 1

EXIT_RETRYABLE = 75
"""Exit status of a trainer after an error that may pass by itself (EX_TEMPFAIL), as when a store does not answer."""

SETTINGS_NOT_IN_KEY = {
    "device",
    "compile",
    "micro_rows",
    "ranks",
    "launcher",
    "threads",
    "prefetch",
    "log_steps",
    "checkpoint_steps",
    "keep_checkpoints",
    "validate_steps",
    "validate_rows",
    "warm_start",
}


class Part(Section):
    """One shard of the manifest: its blocks, and its targets by mask variant (none when the teacher is in the loop)."""

    label: str
    blocks: str
    targets: tuple[str, ...] = ()
    rows: int = Field(ge=0)
    tokens: int = Field(ge=0)

    def blocks_ref(self) -> Ref:
        """Names the blocks."""
        return Ref("blocks", self.blocks, self.label)

    def targets_ref(self, variant: int) -> Ref:
        """Names the targets of one mask variant."""
        return Ref("targets", self.targets[variant], self.label)


class RunSpec(Section):
    """One training run. `folder` is local and holds metrics.jsonl and result.json; `start` is the fingerprint of the
    model in train.warm_start, `counts` the key of the token counts (each "" without); `cache_bytes` bounds the local
    copies of a remote store's files."""

    run_key: str
    name: str
    store: str
    folder: str
    cache_bytes: int = Field(LIMIT, ge=0)
    blocks: BlockSettings
    mask: MaskSettings
    teacher: TeacherSettings
    targets: TargetSettings
    student: StudentSettings
    loss: LossSettings
    train: TrainSettings
    teacher_fingerprint: str
    start: str = ""
    counts: str = ""
    manifest: tuple[Part, ...]
    heldout: tuple[Part, ...] = ()

    @property
    def rows(self) -> int:
        """Blocks in one epoch."""
        return sum(part.rows for part in self.manifest)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return steps_of(self.train, self.rows)

    @property
    def model_ref(self) -> Ref:
        """Names the model that this run ends with."""
        return model_ref(self.run_key, self.name)

    def reads(self) -> Iterator[Ref]:
        """Names every artifact that the training reads."""
        for part in (*self.manifest, *self.heldout):
            yield part.blocks_ref()
            yield from (part.targets_ref(variant) for variant in range(len(part.targets)))
        if self.counts:
            yield Ref("counts", self.counts, "counts")


def model_ref(run_key: str, name: str) -> Ref:
    """Names the model that a run ends with."""
    return Ref("model", key_of("model", SCHEMA, {}, [run_key]), name)


def steps_of(train: TrainSettings, rows: float) -> int:
    """Optimizer steps over a corpus of so many blocks."""
    return train.max_steps or max(1, -int(-rows * train.epochs // train.batch_rows))


def make_run(
    recipe: Recipe,
    *,
    manifest: tuple[Part, ...],
    heldout: tuple[Part, ...],
    teacher_fingerprint: str,
    start: str,
    counts: str,
) -> RunSpec:
    """Resolves a recipe and its artifacts into a run; `start` is the fingerprint of a warm start's model, or "".

    Parts without a block are no part of the training, but of the key, which so is known before a receipt is read.
    """
    if not any(part.rows for part in manifest):
        raise FatalError(f"recipe {recipe.name}: there is not one block to train on; is corpus.url right?")
    made_of = [(part.blocks, *part.targets) for part in manifest]
    run_key = key_of_run(recipe, made_of, teacher_fingerprint=teacher_fingerprint, start=start, counts=counts)
    return RunSpec(
        run_key=run_key,
        name=recipe.name,
        store=recipe.store,
        folder=str(Path(recipe.home) / "run" / run_key[:16]),
        cache_bytes=recipe.run.cache_bytes,
        blocks=recipe.blocks,
        mask=recipe.mask,
        teacher=recipe.teacher,
        targets=recipe.targets,
        student=recipe.student,
        loss=recipe.loss,
        train=recipe.train,
        teacher_fingerprint=teacher_fingerprint,
        start=start,
        counts=counts,
        manifest=tuple(part for part in manifest if part.rows),
        heldout=tuple(part for part in heldout if part.rows),
    )


def key_of_run(
    recipe: Recipe, made_of: Iterable[Sequence[str]], *, teacher_fingerprint: str, start: str, counts: str
) -> str:
    """Key of a training run, from the keys of the blocks and targets of each of its parts."""
    settings = {
        "mask": recipe.mask.model_dump(mode="json"),
        "positions": recipe.targets.positions,
        "source": recipe.targets.source,
        "student": recipe.student.model_dump(mode="json"),
        "loss": recipe.loss.model_dump(mode="json"),
        "train": recipe.train.model_dump(mode="json", exclude=SETTINGS_NOT_IN_KEY),
        "start": start,
        "counts": counts,
    }
    if recipe.targets.source == "online" and recipe.loss.needs_teacher:
        # Cached targets have these in their own keys.
        settings["teacher"] = {"dtype": recipe.teacher.dtype, "attention": recipe.teacher.attention}
    parents = [key for part in made_of for key in part] + [teacher_fingerprint]
    return key_of("run", SCHEMA, settings, parents)


def write_run(run: RunSpec) -> Path:
    """Writes RUN.json into the run's folder and returns its path. FatalError: the disk is full or read-only."""
    folder = Path(run.folder)
    path = folder / "run.json"
    with writing(f"the run's folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(run.model_dump_json(indent=1), encoding="utf-8")
    return path


def read_run(path: str) -> RunSpec:
    """Reads RUN.json. FatalError that names the field where it does not fit."""
    try:
        return RunSpec.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise FatalError(f"{path}: cannot be read ({error}); give the path of a RUN.json", path) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FatalError(f"{path}: {where}: {first['msg']}", path) from error

"""RUN.json: everything that one training run needs, resolved. `flows` write it, `tasks.train` reads it.

The run key names the result: the settings that change weights, the manifest of blocks and targets, the teacher, and the
student's starting point. Device, micro-batch, ranks, threads and logging are not in it, so a run may move.
"""

from pathlib import Path

from pydantic import Field, ValidationError

from storage.artifact import Ref
from storage.error import FatalError
from storage.fingerprint import key_of
from tasks.config import Blocks, Loss, Mask, Recipe, Section, Student, Targets, Teacher, Train

SCHEMA = 1

SETTINGS_OUTSIDE_THE_KEY = {
    "device",
    "compile",
    "micro_rows",
    "ranks",
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
    model in train.warm_start, `counts` the key of the token counts (each "" without)."""

    run_key: str
    name: str
    store: str
    folder: str
    blocks: Blocks
    mask: Mask
    teacher: Teacher
    targets: Targets
    student: Student
    loss: Loss
    train: Train
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
        if self.train.max_steps:
            return self.train.max_steps
        return max(1, -int(-self.rows * self.train.epochs // self.train.batch_rows))

    @property
    def model_ref(self) -> Ref:
        """Names the model that this run ends with."""
        return Ref("model", key_of("model", SCHEMA, {}, [self.run_key]), self.name)


def make_run(
    recipe: Recipe,
    *,
    manifest: tuple[Part, ...],
    heldout: tuple[Part, ...],
    teacher_fingerprint: str,
    start: str,
    counts: str,
) -> RunSpec:
    """Resolves a recipe and its artifacts into a run; `start` is the fingerprint of a warm start's model, or ""."""
    if not any(part.rows for part in manifest):
        raise FatalError(f"recipe {recipe.name}: there is not one block to train on; is corpus.url right?")
    settings = {
        "mask": recipe.mask.model_dump(mode="json"),
        "positions": recipe.targets.positions,
        "source": recipe.targets.source,
        "student": recipe.student.model_dump(mode="json"),
        "loss": recipe.loss.model_dump(mode="json"),
        "train": recipe.train.model_dump(mode="json", exclude=SETTINGS_OUTSIDE_THE_KEY),
        "start": start,
        "counts": counts,
    }
    if recipe.targets.source == "online" and recipe.loss.needs_teacher:
        # Cached targets have these in their own keys.
        settings["teacher"] = {"dtype": recipe.teacher.dtype, "attention": recipe.teacher.attention}
    parents = [key for part in manifest for key in (part.blocks, *part.targets)] + [teacher_fingerprint]
    run_key = key_of("run", SCHEMA, settings, parents)
    return RunSpec(
        run_key=run_key,
        name=recipe.name,
        store=recipe.store,
        folder=str(Path(recipe.home) / "run" / run_key[:16]),
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
        manifest=manifest,
        heldout=heldout,
    )


def write_run(run: RunSpec) -> Path:
    """Writes RUN.json into the run's folder and returns its path."""
    folder = Path(run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
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

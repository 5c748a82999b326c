"""Writes and reads run.json, which contains all resolved settings of one training run. `tasks.train` reads it.

    run = make_run(recipe, manifest=parts, heldout=heldout, teacher_fingerprint=fingerprint, start="", counts="")
    path = write_run(run)                    # torchrun -m tasks.train PATH
    run = read_run(str(path))

The run key identifies the result. It covers the settings that change the weights, the keys of blocks and targets, the
teacher, and the model that the student starts from. Device, micro-batch, ranks, threads and logging are not part of the
key, so a run may resume on different hardware.

Since schema 2 of the run key, the data order is different (tasks/loader/order.py). Every run has a different key from
its key under schema 1, so an unfinished run restarts from step 0 and reuses all cached targets. Checkpoints of schema 1
cannot be resumed; `distil gc` deletes them (tasks/train/checkpoint.py: unfinished_checkpoints). Finished models stay
valid.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from storage.artifact import Ref
from storage.cache import DEFAULT_CACHE_BYTES
from storage.errors import FatalError
from storage.files.disk import writing
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
"""Metrics file in the run folder, to which the trainer appends and which the flow reads."""

SCHEMA = 1
"""Schema number of the artifacts `model` and `checkpoint`, in their receipts and in the model key."""

RUN_SCHEMA = 2
"""Schema number of the run key; a new number repeats every training run. 2: Philox determines the data order."""

EXIT_RETRYABLE = 75
"""Exit status of a trainer after a temporary error (EX_TEMPFAIL), such as a store that does not respond."""

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
"""Fields of `train` that do not change the weights of the last step. If train.result is "best", the validation settings
decide which weights are exported, so the key then includes them."""


class Part(Section):
    """One shard of the manifest, with the keys of its blocks and of its targets per mask variant.

    `targets` is empty if targets.source = "online".
    """

    label: str
    blocks: str
    targets: tuple[str, ...] = ()
    rows: int = Field(ge=0)
    tokens: int = Field(ge=0)

    def blocks_ref(self) -> Ref:
        """Returns the reference to the blocks."""
        return Ref("blocks", self.blocks, self.label)

    def targets_ref(self, variant: int) -> Ref:
        """Returns the reference to the targets of one mask variant."""
        return Ref("targets", self.targets[variant], self.label)


class RunSpec(Section):
    """One training run, as stored in run.json.

    `folder` is the local run folder, with metrics.jsonl and result.json. `start` is the fingerprint of the model in
    train.warm_start, and `counts` is the key of the token counts; both are "" if unused. `cache_bytes` limits the local
    copies of files from a remote store.
    """

    run_key: str
    name: str
    store: str
    folder: str
    cache_bytes: int = Field(DEFAULT_CACHE_BYTES, ge=0)
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
        """Blocks per epoch."""
        return sum(part.rows for part in self.manifest)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the complete run."""
        return steps_of(self.train, self.rows)

    @property
    def model_ref(self) -> Ref:
        """Reference to the model that this run exports."""
        return model_ref(self.run_key, self.name)

    def reads(self) -> Iterator[Ref]:
        """Yields references to all artifacts that the run reads."""
        for part in (*self.manifest, *self.heldout):
            yield part.blocks_ref()
            yield from (part.targets_ref(variant) for variant in range(len(part.targets)))
        if self.counts:
            yield Ref("counts", self.counts, "counts")


def model_ref(run_key: str, name: str) -> Ref:
    """Returns the reference to the model that a run exports."""
    return Ref("model", key_of("model", SCHEMA, {}, [run_key]), name)


def steps_of(train: TrainSettings, rows: float) -> int:
    """Returns the number of optimizer steps for a corpus of `rows` blocks."""
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
    """Resolves a recipe and its artifacts into a run. `start` is the fingerprint of the warm-start model, or "".

    The run excludes parts without blocks, but its key includes them, so that it can be computed without reading
    receipts. Raises FatalError if no part has a block.
    """
    if not any(part.rows for part in manifest):
        raise FatalError(
            f"recipe {recipe.name}: the corpus has no block to train on; check corpus.url and the filters in corpus"
        )
    made_of = [(part.blocks, *part.targets) for part in manifest]
    run_key = key_of_run(
        recipe,
        made_of,
        heldout=[part.blocks for part in heldout],
        teacher_fingerprint=teacher_fingerprint,
        start=start,
        counts=counts,
    )
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
    recipe: Recipe,
    made_of: Iterable[Sequence[str]],
    *,
    heldout: Iterable[str],
    teacher_fingerprint: str,
    start: str,
    counts: str,
) -> str:
    """Returns the key of a training run. `made_of` contains the keys of blocks and targets of each part.

    `heldout` contains the keys of the held-out blocks, which are part of the key only if train.result is "best".
    """
    settings = _settings_in_key(recipe, start, counts)
    if recipe.train.result == "best":
        train = recipe.train
        settings["validation"] = {"steps": train.validate_steps, "rows": train.validate_rows, "blocks": list(heldout)}
    return key_of("run", RUN_SCHEMA, settings, _parents(made_of, teacher_fingerprint))


def key_of_run_schema_1(
    recipe: Recipe, made_of: Iterable[Sequence[str]], *, teacher_fingerprint: str, start: str, counts: str
) -> str:
    """Returns the key of the same run under schema 1, before the data order changed and `train.result` was added.

    If a store contains the model of this key (`model_ref`), an older version of this project trained the run.
    """
    settings = _settings_in_key(recipe, start, counts)
    del settings["train"]["result"]
    return key_of("run", 1, settings, _parents(made_of, teacher_fingerprint))


def _settings_in_key(recipe: Recipe, start: str, counts: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
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
        # For cached targets, these are in the keys of the targets.
        settings["teacher"] = {"dtype": recipe.teacher.dtype, "attention": recipe.teacher.attention}
    return settings


def _parents(made_of: Iterable[Sequence[str]], teacher_fingerprint: str) -> list[str]:
    return [key for part in made_of for key in part] + [teacher_fingerprint]


def write_run(run: RunSpec) -> Path:
    """Writes run.json into the run folder. Returns its path. Raises FatalError if the disk is full or read-only."""
    folder = Path(run.folder)
    path = folder / "run.json"
    with writing(f"the run folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(run.model_dump_json(indent=1), encoding="utf-8")
    return path


def read_run(path: str) -> RunSpec:
    """Reads a run file. Raises FatalError if it is unreadable, or with the name of the first invalid field."""
    try:
        return RunSpec.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise FatalError(f"{path} cannot be read ({error}); pass the path of a run.json file", path) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FatalError(f"{path}: {where}: {first['msg']}", path) from error

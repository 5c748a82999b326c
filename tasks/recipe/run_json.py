"""RUN.json: everything that one training run needs, resolved. The flows write it; `tasks.train` reads it.

    run = make_run(recipe, manifest=parts, heldout=heldout, teacher_fingerprint=fingerprint, start="", counts="")
    path = write_run(run)                    # torchrun -m tasks.train PATH
    run = read_run(str(path))

The run key identifies the result. It covers the settings that change the weights, the keys of blocks and targets, the
teacher, and the model that the student starts from. Device, micro-batch, ranks, threads and logging are not part of
it, so a run may resume on other hardware.

Schema 2 of the run key: the data order changed (tasks/loader/order.py). Every run has another key than under schema 1,
so a run in flight starts again from step 0 and reuses all cached targets. Its checkpoints of schema 1 cannot be
resumed; `distil gc` drops them (tasks/train/checkpoint.py: unfinished_checkpoints). Finished models stay.
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
"""Metrics file in the run folder: the trainer appends to it, the flow follows it."""

SCHEMA = 1
"""Form of the artifacts `model` and `checkpoint`, in their receipts and in the model key."""

RUN_SCHEMA = 2
"""Meaning of a run key: a new number repeats every training. 2: the data order comes from Philox words."""

EXIT_RETRYABLE = 75
"""Exit status of a trainer after a transient error (EX_TEMPFAIL), such as a store that does not answer."""

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
"""Fields of `train` that do not change the weights of the last step. With train.result = "best" the validation settings
do change which weights are saved, so they are in the key then."""


class Part(Section):
    """One shard of the manifest: its blocks, and its targets per mask variant (none if targets.source = "online")."""

    label: str
    blocks: str
    targets: tuple[str, ...] = ()
    rows: int = Field(ge=0)
    tokens: int = Field(ge=0)

    def blocks_ref(self) -> Ref:
        """Reference to the blocks."""
        return Ref("blocks", self.blocks, self.label)

    def targets_ref(self, variant: int) -> Ref:
        """Reference to the targets of one mask variant."""
        return Ref("targets", self.targets[variant], self.label)


class RunSpec(Section):
    """One training run, as RUN.json stores it.

    `folder` is local and holds metrics.jsonl and result.json. `start` is the fingerprint of the model in
    train.warm_start and `counts` the key of the token counts; both are "" when unused. `cache_bytes` limits the local
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
        """Optimizer steps of the whole run."""
        return steps_of(self.train, self.rows)

    @property
    def model_ref(self) -> Ref:
        """Reference to the model that this run produces."""
        return model_ref(self.run_key, self.name)

    def reads(self) -> Iterator[Ref]:
        """References to every artifact that the training reads."""
        for part in (*self.manifest, *self.heldout):
            yield part.blocks_ref()
            yield from (part.targets_ref(variant) for variant in range(len(part.targets)))
        if self.counts:
            yield Ref("counts", self.counts, "counts")


def model_ref(run_key: str, name: str) -> Ref:
    """Reference to the model that a run produces."""
    return Ref("model", key_of("model", SCHEMA, {}, [run_key]), name)


def steps_of(train: TrainSettings, rows: float) -> int:
    """Optimizer steps for a corpus of `rows` blocks."""
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
    """Resolves a recipe and its artifacts into a run; `start` is the fingerprint of the warm-start model, or "".

    Parts without blocks are left out of the training but stay in the key, so that the key is known before any receipt
    is read. FatalError: no part has a block.
    """
    if not any(part.rows for part in manifest):
        raise FatalError(f"recipe {recipe.name}: no block to train on; check corpus.url")
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
    """Key of a training run; `made_of` holds the keys of blocks and targets of each part.

    `heldout` holds the keys of the held-out blocks. They count only with train.result = "best".
    """
    settings = _settings_in_key(recipe, start, counts)
    if recipe.train.result == "best":
        train = recipe.train
        settings["validation"] = {"steps": train.validate_steps, "rows": train.validate_rows, "blocks": list(heldout)}
    return key_of("run", RUN_SCHEMA, settings, _parents(made_of, teacher_fingerprint))


def key_of_run_schema_1(
    recipe: Recipe, made_of: Iterable[Sequence[str]], *, teacher_fingerprint: str, start: str, counts: str
) -> str:
    """Key of the same run under schema 1, before `train.result` existed and the data order changed.

    A store that has the model of this key (`model_ref`) trained this run with an older version.
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
        # Cached targets have these in their own keys.
        settings["teacher"] = {"dtype": recipe.teacher.dtype, "attention": recipe.teacher.attention}
    return settings


def _parents(made_of: Iterable[Sequence[str]], teacher_fingerprint: str) -> list[str]:
    return [key for part in made_of for key in part] + [teacher_fingerprint]


def write_run(run: RunSpec) -> Path:
    """Writes RUN.json into the run folder and returns its path. FatalError: the disk is full or read-only."""
    folder = Path(run.folder)
    path = folder / "run.json"
    with writing(f"the run folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(run.model_dump_json(indent=1), encoding="utf-8")
    return path


def read_run(path: str) -> RunSpec:
    """Reads RUN.json. FatalError: unreadable, or a field is invalid (the message names it)."""
    try:
        return RunSpec.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise FatalError(f"{path}: cannot be read ({error}); give the path of a RUN.json", path) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FatalError(f"{path}: {where}: {first['msg']}", path) from error

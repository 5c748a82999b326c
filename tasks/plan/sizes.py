"""How many bytes a recipe makes: what the store holds of it, and what is still to come, from a sample's ratios.

    inventory = take_inventory(workspace)
    forecast_sizes(inventory, sample, shape_of(recipe), recipe, training=True).bytes     # stage -> Amount(total, done)

Called by `distil plan` and by tasks.plan.free_space. Nothing is timed here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from storage.artifact import Ref
from storage.errors import FatalError
from storage.store import Store
from tasks.lineage import Workspace, caches_targets, vocabulary_of
from tasks.models.files import resolve_model
from tasks.models.student import make_fresh, make_student
from tasks.plan.sample import Sample
from tasks.recipe.config import Recipe, TeacherSettings
from tasks.recipe.run_spec import steps_of
from tasks.targets.codec import Codec
from tasks.train.export import tokenizer_bytes

ROW_BYTES = 20
"""Of a targets file, for each block: digest, number of positions, offset."""

KEPT = ("shard", "blocks", "targets", "model")
"""Kinds of artifacts that take room and stay."""

FILE_BYTES, CHANNEL_BYTES = 1_900, 22
"""Of a targets file, whatever it holds: two copies of the schema, and in them mean and deviation of each channel."""

ADAM = 3
"""A checkpoint holds so many numbers for each weight: itself and AdamW's two moments."""


@dataclass(frozen=True)
class Amount:
    """How much there will be in the end, and how much of it is there already."""

    total: float
    done: float = 0.0

    @property
    def left(self) -> float:
        """What is still to be made."""
        return max(0.0, self.total - self.done)


@dataclass(frozen=True)
class Inventory:
    """What a recipe is about. Bytes: of source files in all and of those that are not read yet (with the largest), of
    training and held-out text that was read, of such text that lacks blocks, of training text that lacks targets (once
    for each mask variant), and, by stage, of what is in the store."""

    sources: int
    source_bytes: int
    unread_bytes: int
    largest_unread: int
    text_bytes: int
    heldout_bytes: int
    unblocked_bytes: int
    untaught_bytes: int
    kept: Mapping[str, int]


@dataclass(frozen=True)
class ModelShape:
    """The teacher's width and decoder rows (0 without one), and the student's parameters."""

    width: int
    vocab_size: int
    parameters: int


def take_inventory(workspace: Workspace, model: Ref | None = None) -> Inventory:
    """Counts by listings and the sources' receipts; `model` is the run's result once it has a name."""
    store, recipe, lineage = workspace.store, workspace.recipe, workspace.lineage
    once = {ref.key if ref else source.url: (source, ref) for source, ref in reversed(lineage.sources)}
    there = {kind: store.sizes(kind) for kind in ("source", "shard", "blocks", "targets", "model", "checkpoint")}
    unread = [source.size for key, (source, _) in once.items() if key not in there["source"]]
    text = _texts(store, [ref for _, ref in once.values() if ref and ref.key in there["source"]])
    blocks = lineage.blocks or {}
    unblocked = [shard for shard, ref in blocks.items() if ref.key not in there["blocks"]]
    shard_of = {ref.key: shard for shard, ref in blocks.items()}
    lacking = [target for target in lineage.targets if target.ref.key not in there["targets"]]
    untaught = [shard_of[target.blocks.key] for target in lacking if variants_taught(recipe)]
    if not lineage.targets:
        untaught = list(lineage.shards) * variants_taught(recipe)
    stages = {name: [ref.key for ref in refs] for name, refs in lineage.stages().items()}
    stages["model"] = [model.key] if model else []
    return Inventory(
        sources=len(once),
        source_bytes=sum(source.size for source, _ in once.values()),
        unread_bytes=sum(unread),
        largest_unread=max(unread, default=0),
        text_bytes=sum(text.get(ref.key, 0) for ref in lineage.shards),
        heldout_bytes=sum(text.get(ref.key, 0) for ref in lineage.heldout_shards),
        unblocked_bytes=sum(text.get(ref.key, 0) for ref in unblocked),
        untaught_bytes=sum(text.get(ref.key, 0) for ref in untaught),
        kept={kind: sum(there[kind].get(key, 0) for key in stages[kind]) for kind in KEPT},
    )


def variants_taught(recipe: Recipe) -> int:
    """Masks under which a run lets the teacher read a text, to keep its word; 0 where it keeps none."""
    return recipe.mask.variants if caches_targets(recipe) and recipe.targets.on_missing == "compute" else 0


def _texts(store: Store, sources: Iterable[Ref]) -> dict[str, int]:
    """Bytes of text by key of every shard that these sources became."""
    infos = [receipt.info for receipt in store.receipts_of(sources)]
    return {item["key"]: item["bytes"] for info in infos for item in (*info["shards"], *info["heldout"])}


def shape_of(recipe: Recipe, *, training: bool = True) -> ModelShape:
    """Builds both models without memory for their weights; without `training` no student, whose parameters are 0 then.

    FatalError: a teacher that is no masked language model; a student that cannot be made of it.
    """
    with torch.device("meta"):
        teacher = _skeleton(recipe.teacher) if recipe.teacher.model else None
        student = _student(recipe, teacher) if training else None
    width, rows = (teacher.config.hidden_size, teacher.config.vocab_size) if teacher else (0, 0)
    return ModelShape(int(width), int(rows), sum(one.numel() for one in student.parameters()) if student else 0)


def _student(recipe: Recipe, teacher: PreTrainedModel | None) -> PreTrainedModel:
    settings, vocabulary = recipe.student, vocabulary_of(recipe)
    if recipe.train.warm_start:
        return _skeleton(TeacherSettings(model=recipe.train.warm_start))
    if settings.init == "config" or teacher is None:
        return make_fresh(settings.config, vocabulary)
    return make_student(teacher, vocabulary, layers=settings.layers, choice=settings.choice, init="scratch")


def _skeleton(teacher: TeacherSettings) -> PreTrainedModel:
    trust = teacher.trust_remote_code
    folder = resolve_model(teacher.model, teacher.revision)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
        model: PreTrainedModel = AutoModelForMaskedLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=trust
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FatalError(
            f"model {teacher.model}: its config.json is not that of a masked language model ({reason}); name another",
            teacher.model,
        ) from error
    return model


# ---- what it comes to --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SizeForecast:
    """What a recipe comes to. `text` is what is trained on, in bytes; `positions` are masked ones under one mask;
    `blocks` and `tokens` are those of the training text; `bytes` by stage: shard, blocks, targets, checkpoint, model.

    `coming` is text of sources that are not read yet. `unblocked` and `untaught` are text that is still to be
    tokenised, and taught (once for each mask variant). `steps` of the optimizer. `passing` bytes are there for a while
    only: a checkpoint beside those that are kept.
    """

    text: Amount
    blocks: Amount
    tokens: Amount
    positions: Amount
    coming: float
    unblocked: float
    untaught: float
    steps: int
    bytes: Mapping[str, Amount]
    passing: float

    @property
    def left(self) -> float:
        """Bytes that the store must have room for."""
        return sum(amount.left for amount in self.bytes.values()) + self.passing


def forecast_sizes(
    inventory: Inventory, sample: Sample, shape: ModelShape, recipe: Recipe, *, training: bool
) -> SizeForecast:
    """Multiplies the sample up; without `training` there are no steps, checkpoints and model."""
    a_byte = bytes_per_text_byte(sample)
    kept_in = 1 - recipe.corpus.heldout_per_mille / 1000
    coming = inventory.unread_bytes * sample.text_bytes / max(1.0, sample.source_bytes)
    text = inventory.text_bytes + coming * kept_in
    unblocked = inventory.unblocked_bytes + coming
    untaught = inventory.untaught_bytes + coming * kept_in * variants_taught(recipe)
    blocked = 1 - unblocked / max(1.0, text + inventory.heldout_bytes + coming * (1 - kept_in))
    rows = text * a_byte["rows"]
    steps = steps_of(recipe.train, rows) if training else 0
    trained = _trained(inventory, shape, recipe, steps) if training else {}
    still = {
        "shard": inventory.unread_bytes * sample.shard_bytes / max(1.0, sample.source_bytes),
        "blocks": unblocked * sample.block_bytes / max(1, sample.text_bytes),
        "targets": untaught * target_bytes(a_byte, shape, recipe, recipe.targets.encoding, recipe.targets.positions)
        + untaught / _file_text(inventory, recipe, text) * (FILE_BYTES + CHANNEL_BYTES * shape.width),
    }
    sizes_left = {kind: Amount(inventory.kept[kind] + left, inventory.kept[kind]) for kind, left in still.items()}
    return SizeForecast(
        text=Amount(text, inventory.text_bytes),
        blocks=Amount(rows, rows * blocked),
        tokens=Amount(text * a_byte["tokens"], text * a_byte["tokens"] * blocked),
        positions=Amount(text * a_byte["positions"], text * a_byte["positions"] * blocked),
        coming=coming,
        unblocked=unblocked,
        untaught=untaught,
        steps=steps,
        bytes=sizes_left | trained,
        passing=ADAM * 4.0 * shape.parameters if training and not inventory.kept["model"] else 0.0,
    )


def bytes_per_text_byte(sample: Sample) -> dict[str, float]:
    """Rows, tokens and masked positions of one byte of text."""
    return {name: getattr(sample, name) / max(1, sample.text_bytes) for name in ("rows", "tokens", "positions")}


def target_bytes(
    a_byte: Mapping[str, float], shape: ModelShape, recipe: Recipe, encoding: str, positions: str
) -> float:
    """Bytes of targets under one mask for each byte of text; `a_byte` as `bytes_per_text_byte` gives it."""
    kept = a_byte["positions" if positions == "masked" else "tokens"]
    return a_byte["rows"] * ROW_BYTES + kept * payload_bytes(shape, recipe, encoding)


def payload_bytes(shape: ModelShape, recipe: Recipe, encoding: str) -> int:
    """Bytes of one position in an encoding."""
    return Codec(
        encoding, shape.width, shape.vocab_size, min(recipe.targets.top_k, shape.vocab_size)
    ).bytes_per_position


def _file_text(inventory: Inventory, recipe: Recipe, text: float) -> float:
    """Bytes of text of one shard, about: a source ends its last shard."""
    return max(1.0, min(float(recipe.corpus.shard_bytes), text / max(1, inventory.sources)))


def _trained(inventory: Inventory, shape: ModelShape, recipe: Recipe, steps: int) -> dict[str, Amount]:
    """The checkpoints that stay (the best is among the newest while the held-out loss falls), and the model."""
    weights = 4.0 * shape.parameters
    count = min(recipe.train.keep_checkpoints, ceil(steps / recipe.train.checkpoint_steps))
    done = inventory.kept["model"]
    checkpoints = ADAM * weights * count
    return {
        "checkpoint": Amount(checkpoints, checkpoints if done else 0.0),
        "model": Amount(done or weights + tokenizer_bytes(Path(vocabulary_of(recipe).folder)), done),
    }

"""Forecasts the bytes of a recipe's artifacts: those in the store, and those still to be written by a sample's ratios.

    inventory = take_inventory(workspace)
    forecast_sizes(inventory, sample, shape_of(recipe), recipe, training=True).bytes     # stage -> Amount(total, done)

Called by `distil plan` and tasks.plan.free_space. Only bytes are forecast; nothing is timed.
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
from tasks.models.model_files import resolve_model
from tasks.models.student import make_fresh, make_student
from tasks.plan.sample import Sample
from tasks.recipe.config import Recipe, TeacherSettings
from tasks.recipe.run_json import steps_of
from tasks.targets.codec import Codec
from tasks.train.export import tokenizer_bytes

ROW_BYTES = 20
"""Bytes per block in a targets file: digest, number of positions, offset."""

KEPT = ("shard", "blocks", "targets", "model")
"""Kinds of large artifacts that stay in the store."""

FILE_BYTES, CHANNEL_BYTES = 1_900, 22
"""Bytes per targets file for two copies of the schema, and per channel for its mean and deviation in both copies."""

ADAM = 3
"""Numbers per weight in a checkpoint: the weight and AdamW's two moments."""


@dataclass(frozen=True)
class Amount:
    """A total, and how much of it is already done."""

    total: float
    done: float = 0.0

    @property
    def left(self) -> float:
        """The remaining amount, at least 0."""
        return max(0.0, self.total - self.done)


@dataclass(frozen=True)
class Inventory:
    """State of a recipe's artifacts: the number of sources, and bytes in all other fields.

    source_bytes               all source files
    unread_bytes               source files without a receipt; the largest has `largest_unread` bytes
    text_bytes, heldout_bytes  training and held-out text of the sources that were read
    bytes_without_blocks       training and held-out text without blocks
    bytes_without_targets      training text without targets, counted once per mask variant
    kept                       artifacts in the store, by kind
    """

    sources: int
    source_bytes: int
    unread_bytes: int
    largest_unread: int
    text_bytes: int
    heldout_bytes: int
    bytes_without_blocks: int
    bytes_without_targets: int
    kept: Mapping[str, int]


@dataclass(frozen=True)
class ModelShape:
    """The teacher's hidden size and vocabulary size (0 without a teacher), and the student's number of parameters."""

    width: int
    vocab_size: int
    parameters: int


def take_inventory(workspace: Workspace, model: Ref | None = None) -> Inventory:
    """Takes the inventory from store listings and the receipts of sources.

    `model` is the model of the run, or None if its key is not known yet.
    """
    store, recipe, lineage = workspace.store, workspace.recipe, workspace.lineage
    once = {ref.key if ref else source.url: (source, ref) for source, ref in reversed(lineage.sources)}
    there = {kind: store.sizes(kind) for kind in ("source", "shard", "blocks", "targets", "model", "checkpoint")}
    unread = [source.size for key, (source, _) in once.items() if key not in there["source"]]
    text = _texts(store, [ref for _, ref in once.values() if ref and ref.key in there["source"]])
    blocks = lineage.blocks or {}
    bytes_without_blocks = [shard for shard, ref in blocks.items() if ref.key not in there["blocks"]]
    shard_of = {ref.key: shard for shard, ref in blocks.items()}
    lacking = [target for target in lineage.targets if target.ref.key not in there["targets"]]
    bytes_without_targets = [shard_of[target.blocks.key] for target in lacking if cached_variants(recipe)]
    if not lineage.targets:
        bytes_without_targets = list(lineage.shards) * cached_variants(recipe)
    stages = {name: [ref.key for ref in refs] for name, refs in lineage.stages().items()}
    stages["model"] = [model.key] if model else []
    return Inventory(
        sources=len(once),
        source_bytes=sum(source.size for source, _ in once.values()),
        unread_bytes=sum(unread),
        largest_unread=max(unread, default=0),
        text_bytes=sum(text.get(ref.key, 0) for ref in lineage.shards),
        heldout_bytes=sum(text.get(ref.key, 0) for ref in lineage.heldout_shards),
        bytes_without_blocks=sum(text.get(ref.key, 0) for ref in bytes_without_blocks),
        bytes_without_targets=sum(text.get(ref.key, 0) for ref in bytes_without_targets),
        kept={kind: sum(there[kind].get(key, 0) for key in stages[kind]) for kind in KEPT},
    )


def cached_variants(recipe: Recipe) -> int:
    """Returns the number of mask variants for which a run computes targets; 0 if it caches no targets."""
    return recipe.mask.variants if caches_targets(recipe) and recipe.targets.on_missing == "compute" else 0


def _texts(store: Store, sources: Iterable[Ref]) -> dict[str, int]:
    """Returns the bytes of text of each shard of these sources, by key."""
    infos = [receipt.info for receipt in store.receipts_of(sources)]
    return {item["key"]: item["bytes"] for info in infos for item in (*info["shards"], *info["heldout"])}


def shape_of(recipe: Recipe, *, training: bool = True) -> ModelShape:
    """Measures both models on the meta device, without memory for weights; without `training`, `parameters` is 0.

    FatalError if the teacher is not a masked language model, or if the student cannot be made from it.
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
            f"model {teacher.model}: config.json does not describe a masked language model ({reason}); use a different "
            "model",
            teacher.model,
        ) from error
    return model


# ---- extrapolation -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SizeForecast:
    """Forecast of counts and bytes.

    text, blocks, tokens  bytes of training text, and the numbers of its blocks and tokens
    positions             number of its masked positions under one mask
    unread_text_bytes     bytes of text of the sources that were not read yet
    bytes_without_blocks  bytes of text without blocks
    bytes_without_targets bytes of training text without targets, counted once per mask variant
    steps                 number of optimizer steps
    bytes                 bytes by stage: shard, blocks, targets, checkpoint, model
    temporary_bytes       a new checkpoint exists together with the checkpoint that it replaces
    """

    text: Amount
    blocks: Amount
    tokens: Amount
    positions: Amount
    unread_text_bytes: float
    bytes_without_blocks: float
    bytes_without_targets: float
    steps: int
    bytes: Mapping[str, Amount]
    temporary_bytes: float

    @property
    def left(self) -> float:
        """Bytes that the store must have free."""
        return sum(amount.left for amount in self.bytes.values()) + self.temporary_bytes


def forecast_sizes(
    inventory: Inventory, sample: Sample, shape: ModelShape, recipe: Recipe, *, training: bool
) -> SizeForecast:
    """Extrapolates the sample to the corpus; without `training`, the forecast has no steps, checkpoints or model."""
    per_byte = counts_per_text_byte(sample)
    kept_in = 1 - recipe.corpus.heldout_per_mille / 1000
    unread_text_bytes = inventory.unread_bytes * sample.text_bytes / max(1.0, sample.source_bytes)
    text = inventory.text_bytes + unread_text_bytes * kept_in
    bytes_without_blocks = inventory.bytes_without_blocks + unread_text_bytes
    bytes_without_targets = inventory.bytes_without_targets + unread_text_bytes * kept_in * cached_variants(recipe)
    share_with_blocks = 1 - bytes_without_blocks / max(
        1.0, text + inventory.heldout_bytes + unread_text_bytes * (1 - kept_in)
    )
    rows = text * per_byte["rows"]
    steps = steps_of(recipe.train, rows) if training else 0
    trained = _trained(inventory, shape, recipe, steps) if training else {}
    still = {
        "shard": inventory.unread_bytes * sample.shard_bytes / max(1.0, sample.source_bytes),
        "blocks": bytes_without_blocks * sample.block_bytes / max(1, sample.text_bytes),
        "targets": bytes_without_targets
        * target_bytes(per_byte, shape, recipe, recipe.targets.encoding, recipe.targets.positions)
        + bytes_without_targets / _file_text(inventory, recipe, text) * (FILE_BYTES + CHANNEL_BYTES * shape.width),
    }
    sizes_left = {kind: Amount(inventory.kept[kind] + left, inventory.kept[kind]) for kind, left in still.items()}
    return SizeForecast(
        text=Amount(text, inventory.text_bytes),
        blocks=Amount(rows, rows * share_with_blocks),
        tokens=Amount(text * per_byte["tokens"], text * per_byte["tokens"] * share_with_blocks),
        positions=Amount(text * per_byte["positions"], text * per_byte["positions"] * share_with_blocks),
        unread_text_bytes=unread_text_bytes,
        bytes_without_blocks=bytes_without_blocks,
        bytes_without_targets=bytes_without_targets,
        steps=steps,
        bytes=sizes_left | trained,
        temporary_bytes=ADAM * 4.0 * shape.parameters if training and not inventory.kept["model"] else 0.0,
    )


def counts_per_text_byte(sample: Sample) -> dict[str, float]:
    """Returns the numbers of blocks (`rows`), `tokens` and masked `positions` per byte of text."""
    return {name: getattr(sample, name) / max(1, sample.text_bytes) for name in ("rows", "tokens", "positions")}


def target_bytes(
    per_byte: Mapping[str, float], shape: ModelShape, recipe: Recipe, encoding: str, positions: str
) -> float:
    """Returns the bytes of targets under one mask per byte of text; `per_byte` is from `counts_per_text_byte`."""
    kept = per_byte["positions" if positions == "masked" else "tokens"]
    return per_byte["rows"] * ROW_BYTES + kept * payload_bytes(shape, recipe, encoding)


def payload_bytes(shape: ModelShape, recipe: Recipe, encoding: str) -> int:
    """Returns the payload bytes per position in an encoding."""
    return Codec(
        encoding, shape.width, shape.vocab_size, min(recipe.targets.top_k, shape.vocab_size)
    ).bytes_per_position


def _file_text(inventory: Inventory, recipe: Recipe, text: float) -> float:
    """Estimates the bytes of text per shard; no shard spans two sources."""
    return max(1.0, min(float(recipe.corpus.shard_bytes), text / max(1, inventory.sources)))


def _trained(inventory: Inventory, shape: ModelShape, recipe: Recipe, steps: int) -> dict[str, Amount]:
    """Forecasts the bytes of the model and of the checkpoints that are kept."""
    train = recipe.train
    weights = 4.0 * shape.parameters
    written = ceil(steps / train.checkpoint_steps)
    if train.result == "best":  # each new best step is saved as a checkpoint, and the best one is kept in addition
        written += ceil(steps / max(1, train.validate_steps))
    count = min(train.keep_checkpoints, written) + (train.result == "best")
    done = inventory.kept["model"]
    checkpoints = ADAM * weights * count
    return {
        "checkpoint": Amount(checkpoints, checkpoints if done else 0.0),
        "model": Amount(done or weights + tokenizer_bytes(Path(vocabulary_of(recipe).folder)), done),
    }

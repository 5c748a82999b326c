"""Computes the key of every artifact of a recipe, from snapshot to targets, but none of the artifacts.

    workspace = Workspace(store, recipe)
    store.missing(workspace.lineage.blocks.values())

Used by the flows (to find missing artifacts), `distil status`, `verify`, `retry` and `gc`. The shards of a source are
known once its receipt exists; until then, its shards and everything made from them are missing from the lineage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from storage.artifact import Receipt, Ref
from storage.errors import FatalError
from storage.fingerprint import canonical_json, sha256_bytes
from storage.store import Store
from tasks.corpus.shard import heldout_of, shards_of, source_ref
from tasks.corpus.snapshot import Snapshot, Source, source_content, take_snapshot
from tasks.models.model_files import fingerprint_of, vocabulary_rows
from tasks.recipe.config import CorpusSettings, Recipe, TeacherSettings
from tasks.recipe.run_json import Part, RunSpec, key_of_run, key_of_run_schema_1, make_run
from tasks.targets.keys import calibration_ref, needs_calibration, targets_ref
from tasks.tokens.blocks import blocks_ref
from tasks.tokens.token_counts import counts_ref
from tasks.tokens.vocabulary import Vocabulary, check_vocabulary_fits, vocabulary_for

SAMPLE_SHARDS = 4
"""Number of shards that token counts and calibration are estimated from; the first run freezes the choice of shards."""


@dataclass(frozen=True)
class Target:
    """One targets artifact: the teacher's hidden states for the blocks of one shard under one mask variant."""

    blocks: Ref
    variant: int
    ref: Ref


@dataclass(frozen=True)
class Lineage:
    """All artifacts of a recipe whose keys are known. `blocks` maps each shard to its blocks."""

    snapshot: Snapshot
    sources: tuple[tuple[Source, Ref | None], ...]
    shards: tuple[Ref, ...] = ()
    heldout_shards: tuple[Ref, ...] = ()
    blocks: Mapping[Ref, Ref] | None = None
    sample: tuple[Ref, ...] = ()
    counts: Ref | None = None
    calibration: Ref | None = None
    targets: tuple[Target, ...] = ()

    @property
    def training_blocks(self) -> tuple[Ref, ...]:
        """Blocks to train on, in the order of sources and shards."""
        return tuple((self.blocks or {})[shard] for shard in self.shards)

    @property
    def heldout_blocks(self) -> tuple[Ref, ...]:
        """Blocks of held-out text, which are never used for training."""
        return tuple((self.blocks or {})[shard] for shard in self.heldout_shards)

    def stages(self) -> dict[str, tuple[Ref, ...]]:
        """Returns the artifacts of the recipe whose keys are known, by stage, in the order of the pipeline."""
        return {
            "source": tuple(ref for _, ref in self.sources if ref),
            "shard": (*self.shards, *self.heldout_shards),
            "blocks": (*self.training_blocks, *self.heldout_blocks),
            "counts": (self.counts,) if self.counts else (),
            "calibration": (self.calibration,) if self.calibration else (),
            "targets": tuple(target.ref for target in self.targets),
        }

    def lacks(self, store: Store, *stages: str) -> bool:
        """Returns True if a source was not read yet, or an artifact of these stages (default: all) does not exist."""
        if any(ref is None for _, ref in self.sources):
            return True
        named = self.stages()
        return bool(store.missing(ref for stage in stages or named for ref in named[stage]))


@dataclass(frozen=True)
class Workspace:
    """A recipe and the store of its artifacts.

    Lineage, vocabulary and teacher key are computed once per instance. Call `refreshed()` after artifacts were made.
    """

    store: Store
    recipe: Recipe

    @cached_property
    def lineage(self) -> Lineage:
        """All artifacts of the recipe whose keys are known."""
        return _compute_lineage(self)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the recipe's own tokenizer, or else of the teacher's."""
        return vocabulary_of(self.recipe)

    @cached_property
    def teacher_fingerprint(self) -> str:
        """Fingerprint of the teacher, or "" without a teacher."""
        return teacher_fingerprint(self.recipe)

    def refreshed(self) -> "Workspace":
        """Returns a workspace with the same store and recipe, which reads the lineage from the store again."""
        return replace(self)

    def with_changes(self, changes: Mapping[str, Any]) -> "Workspace":
        """Returns a workspace with the same store and a changed recipe, such as `{"train.lr": 1e-3}`."""
        return replace(self, recipe=self.recipe.with_changes(changes))

    def with_warm_start(self, model: str) -> "Workspace":
        """Returns a workspace with a different warm-start model; it keeps the lineage, which does not depend on it."""
        changed = self.with_changes({"train.warm_start": model})
        vars(changed)["lineage"] = self.lineage  # where cached_property keeps it
        return changed


def _compute_lineage(workspace: Workspace) -> Lineage:
    """Returns the lineage as far as the receipts of its sources exist; computes no artifact."""
    store, recipe = workspace.store, workspace.recipe
    snapshot = take_snapshot(recipe.corpus)
    sources = []
    for source in snapshot.sources:
        content = source_content(store, source)
        sources.append((source, source_ref(source, content, recipe.corpus) if content else None))
    receipts = _receipts(store, [ref for _, ref in sources if ref])
    shards = tuple(ref for receipt in receipts for ref in shards_of(receipt))
    heldout = tuple(ref for receipt in receipts for ref in heldout_of(receipt))
    blocks = {shard: blocks_ref(shard, recipe.blocks, workspace.vocabulary) for shard in (*shards, *heldout)}
    return _with_targets(workspace, Lineage(snapshot, tuple(sources), shards, heldout, blocks))


def vocabulary_of(recipe: Recipe) -> Vocabulary:
    """Returns the vocabulary of the recipe's own tokenizer, or else of the teacher's."""
    return vocabulary_for(recipe.blocks, recipe.teacher)


def check_teacher(recipe: Recipe) -> None:
    """Checks two small files of the teacher, so that an unusable teacher fails before hours of other work.

    FatalError if the teacher does not exist, has no weights, or does not fit the tokenizer.
    """
    if recipe.teacher.model:
        rows = vocabulary_rows(recipe.teacher)
        if rows is not None:
            check_vocabulary_fits(vocabulary_of(recipe), rows, recipe.teacher.model)


def caches_targets(recipe: Recipe) -> bool:
    """Returns True if the run trains from cached targets."""
    return recipe.targets.source == "cached" and recipe.loss.needs_teacher


def teacher_fingerprint(recipe: Recipe) -> str:
    """Returns the fingerprint of the teacher, or "" without a teacher."""
    return fingerprint_of(recipe.teacher) if recipe.teacher.model else ""


def plan_training(workspace: Workspace) -> RunSpec:
    """Returns the training run over all existing blocks and targets. Reads the receipts of all blocks.

    Blocks with missing targets are omitted from the run, or raise FatalError if targets.on_missing = raise. FatalError
    also if train.warm_start is neither a model folder nor a hub id (flows replace a registered model with its folder
    first).
    """
    store, recipe, lineage = workspace.store, workspace.recipe, workspace.lineage
    existing = store.keys("targets")
    wanted = []
    for ref, targets in _parts(lineage):
        lost = [target.ref.label for target in targets if target.ref.key not in existing]
        if lost and recipe.targets.on_missing == "raise":
            raise FatalError(f"targets of {lost[0]} are missing and targets.on_missing = raise; run `distil retry`")
        if not lost:
            wanted.append((ref, tuple(target.ref.key for target in targets)))
    blocks = [ref for ref, _ in wanted]
    receipts = {receipt.key: receipt for receipt in store.receipts_of([*blocks, *lineage.heldout_blocks])}
    return make_run(
        recipe,
        manifest=tuple(part_of(receipts[ref.key], targets) for ref, targets in wanted if ref.key in receipts),
        heldout=tuple(part_of(receipts[ref.key], ()) for ref in lineage.heldout_blocks if ref.key in receipts),
        teacher_fingerprint=workspace.teacher_fingerprint,
        start=_start(recipe),
        counts=lineage.counts.key if lineage.counts else "",
    )


def training_key(workspace: Workspace) -> str:
    """Returns the key of the run that `plan_training` returns if nothing is missing; reads only the lineage.

    FatalError if train.warm_start is not a model.
    """
    lineage = workspace.lineage
    return key_of_run(
        workspace.recipe,
        _keys_of_parts(lineage),
        heldout=[ref.key for ref in lineage.heldout_blocks],
        teacher_fingerprint=workspace.teacher_fingerprint,
        start=_start(workspace.recipe),
        counts=lineage.counts.key if lineage.counts else "",
    )


def training_key_schema_1(workspace: Workspace) -> str:
    """Returns the training key as run schema 1 computed it. FatalError if train.warm_start is not a model."""
    lineage = workspace.lineage
    return key_of_run_schema_1(
        workspace.recipe,
        _keys_of_parts(lineage),
        teacher_fingerprint=workspace.teacher_fingerprint,
        start=_start(workspace.recipe),
        counts=lineage.counts.key if lineage.counts else "",
    )


def _keys_of_parts(lineage: Lineage) -> list[tuple[str, ...]]:
    return [(ref.key, *(target.ref.key for target in targets)) for ref, targets in _parts(lineage)]


def _start(recipe: Recipe) -> str:
    """Returns the fingerprint of the warm-start model, or "": the run key depends on its content, not its folder."""
    return fingerprint_of(TeacherSettings(model=recipe.train.warm_start)) if recipe.train.warm_start else ""


def _parts(lineage: Lineage) -> list[tuple[Ref, list[Target]]]:
    """Returns the blocks to train on, each with its targets in the order of the mask variants."""
    targets: dict[str, list[Target]] = {}
    for target in lineage.targets:
        targets.setdefault(target.blocks.key, []).append(target)
    return [(ref, targets.get(ref.key, [])) for ref in lineage.training_blocks]


def freeze_sample(workspace: Workspace, sample: Sequence[Ref]) -> None:
    """Freezes the sample of blocks for calibration and token counts, for this and all later snapshots."""
    store, name = workspace.store, _sample_name(workspace)
    value = {"blocks": [{"key": ref.key, "label": ref.label} for ref in sample]}
    if store.recall("sample", name) != value:  # a run without remaining work must not write
        store.remember("sample", name, value)


def _with_targets(workspace: Workspace, lineage: Lineage) -> Lineage:
    recipe, sample = workspace.recipe, _sample(workspace, lineage)
    if not sample:
        return lineage
    counts, calibration = _estimates(workspace, sample)
    targets: list[Target] = []
    if caches_targets(recipe):
        for blocks in lineage.training_blocks:
            for variant in range(recipe.mask.variants):
                ref = targets_ref(
                    blocks,
                    workspace.teacher_fingerprint,
                    recipe.teacher,
                    recipe.mask,
                    recipe.targets,
                    calibration.key if calibration else "",
                    counts.key if counts else "",
                    variant,
                )
                targets.append(Target(blocks, variant, ref))
    return replace(lineage, sample=tuple(sample), counts=counts, calibration=calibration, targets=tuple(targets))


def _estimates(workspace: Workspace, sample: Sequence[Ref]) -> tuple[Ref | None, Ref | None]:
    """Returns the token counts and the calibration of this sample, each None if the recipe does not need it."""
    recipe = workspace.recipe
    counts = counts_ref(sample) if recipe.mask.kind == "smoothed" else None
    if not caches_targets(recipe) or not needs_calibration(recipe.targets):
        return counts, None
    counts_key = counts.key if counts else ""
    teacher, mask, targets = recipe.teacher, recipe.mask, recipe.targets
    return counts, calibration_ref(sample, workspace.teacher_fingerprint, teacher, mask, targets, counts_key)


def _sample(workspace: Workspace, lineage: Lineage) -> list[Ref]:
    """Returns the frozen sample, or the first blocks of this snapshot if none is frozen or it is unusable.

    A different sample changes the keys of all targets. The frozen sample is therefore kept although some of its blocks
    are lost, as long as they can be made again or the estimates from them exist.
    """
    store = workspace.store
    pinned = store.recall("sample", _sample_name(workspace))
    if pinned is not None:
        refs = [Ref("blocks", item["key"], item["label"]) for item in pinned["blocks"]]
        wanted = {ref.key for ref in lineage.training_blocks}
        lost = [ref for ref in store.missing(refs) if ref.key not in wanted]
        if not lost or not store.missing(ref for ref in _estimates(workspace, refs) if ref):
            return refs
    return list(lineage.training_blocks[:SAMPLE_SHARDS])


def _sample_name(workspace: Workspace) -> str:
    recipe = workspace.recipe
    # The defaults, so that raising a limit to accept a rejected source does not change the calibration of all others.
    limits = {name: CorpusSettings.model_fields[name].default for name in ("max_bad_lines", "max_unpacked_ratio")}
    settings = {
        "corpus": recipe.corpus.in_key({"url", "pattern"}) | limits,
        "blocks": recipe.blocks.model_dump(mode="json", exclude={"tokenizer"}),
        "tokenizer": workspace.vocabulary.fingerprint,
    }
    return sha256_bytes(canonical_json(settings))


def _receipts(store: Store, refs: Sequence[Ref]) -> list[Receipt]:
    """Returns the receipts of finished sources; two files with the same bytes are one source."""
    once = {ref.key: ref for ref in reversed(refs)}
    return store.receipts_of(ref for ref in refs if once[ref.key] is ref)


def part_of(receipt: Receipt, targets: tuple[str, ...]) -> Part:
    """Returns the entry of a training manifest for blocks and their targets (keys, one per mask variant)."""
    return Part(label=receipt.label, blocks=receipt.key, targets=targets, rows=receipt.rows, tokens=receipt.tokens)

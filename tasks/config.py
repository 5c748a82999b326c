"""Recipes: everything that a run needs to know, as Pydantic models. A recipe file is TOML with these sections.

    recipe = load_recipe("deployments/demo.toml", ["train.lr=1e-3", "corpus.url=/data/oscar"])

The same models are the parameter form of the Prefect deployments, so every field has a description and bounds.
What a single field cannot say (rules across fields) is checked in `Recipe`.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from storage.error import FatalError


class Section(BaseModel):
    """One section of a recipe: unknown names are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Corpus(Section):
    """Which text, and what of it is kept."""

    url: str = Field(min_length=1, description="Folder of source files: a path or any fsspec URL")
    pattern: str = Field("*", description="Take only sources whose file name fits this glob")
    language: str = Field("fr", description="Keep documents identified as this language; empty keeps all")
    min_language_prob: float = Field(0.0, ge=0, le=1, description="Least probability of that language")
    min_chars: int = Field(1, ge=1, description="Drop shorter documents (characters)")
    max_chars: int = Field(10_000_000, ge=1, description="Quarantine longer documents (characters)")
    drop_warnings: tuple[str, ...] = Field((), description="Drop documents with any of these quality warnings")
    min_harmful_pp: float | None = Field(
        None,
        ge=0,
        description="Drop documents whose harmful_pp is below this (a low perplexity reads like harmful text)",
    )
    deduplicate: bool = Field(True, description="Drop exact duplicates inside a shard")
    heldout_per_mille: int = Field(5, ge=0, le=500, description="Of 1000 documents, so many are never trained on")
    shard_bytes: int = Field(128_000_000, ge=10_000, description="UTF-8 bytes of text in one shard")
    max_bad_lines: int = Field(10, ge=0, description="A source with more bad lines than this and than 0.1 % is refused")
    max_line_bytes: int = Field(32_000_000, ge=1_000, description="A longer line is quarantined")


class Blocks(Section):
    """How text becomes token blocks of one length."""

    tokenizer: str = Field("", description="Folder or hub id; empty means the teacher's own")
    length: int = Field(512, ge=8, le=8192, description="Tokens in a block, special tokens included")
    packing: Literal["packed", "documents"] = Field(
        "packed", description="packed: documents joined and cut into full blocks; documents: one document a block"
    )


class Mask(Section):
    """Which positions are hidden from teacher and student."""

    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the masks; part of the key of the targets")
    rate: float = Field(0.15, gt=0, le=0.5, description="Share of the positions of a block that are chosen")
    kind: Literal["uniform", "smoothed"] = Field(
        "uniform", description="smoothed: rare tokens more often, by count ** -0.7 (the reference)"
    )
    variants: int = Field(1, ge=1, le=64, description="Different masks of the same block, one an epoch in turn")


class Teacher(Section):
    """The model that is distilled."""

    model: str = Field("", description="Folder or hub id of a masked language model; empty only for plain MLM training")
    revision: str = Field("", description="Commit or tag on the hub; empty means the newest")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on GPU, float32 on CPU")
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="Attention implementation; part of the key")
    batch_rows: int = Field(0, ge=0, description="Blocks in one teacher forward; 0 chooses by memory")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model; only if you trust it")


class Targets(Section):
    """What is kept of the teacher."""

    source: Literal["cached", "online"] = Field(
        "cached", description="cached: compute once, keep, train from it; online: teacher in the loop, nothing kept"
    )
    encoding: Literal["int8", "int4", "bf16", "topk"] = Field("int8", description="How a hidden state is stored")
    positions: Literal["masked", "all"] = Field("masked", description="Positions that carry distil and cosine loss")
    on_missing: Literal["compute", "raise", "skip"] = Field(
        "compute", description="Targets that are not in the store: compute them, end with an error, or train without"
    )
    top_k: int = Field(64, ge=1, le=4096, description="Logits kept a position (encoding topk)")
    calibration_rows: int = Field(256, ge=1, description="Blocks that channel means and deviations are estimated from")


class Student(Section):
    """The model that learns."""

    layers: int = Field(6, ge=1, le=96, description="Number of layers")
    choice: tuple[int, ...] = Field((), description="Teacher layers to copy; empty spreads them evenly")
    init: Literal["teacher", "scratch", "config"] = Field(
        "teacher", description="teacher: copy layers; scratch: same shape, random; config: a fresh model from `config`"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of hidden states and attention")
    config: dict[str, Any] = Field(
        default_factory=dict, description="Hugging Face config of a fresh model, model_type included (init = config)"
    )


class Loss(Section):
    """Weights of the three parts and the temperature of the first (paper: 0.5, 0.3, 0.2; reference: 2)."""

    distil: float = Field(0.5, ge=0, description="Weight of T^2 KL(teacher || student)")
    cosine: float = Field(0.3, ge=0, description="Weight of 1 - cos of last hidden states")
    mlm: float = Field(0.2, ge=0, description="Weight of the masked cross-entropy")
    temperature: float = Field(2.0, gt=0, le=100, description="Temperature of both distributions")

    @model_validator(mode="after")
    def _not_all_zero(self) -> Self:
        if self.distil == self.cosine == self.mlm == 0:
            raise ValueError("distil, cosine and mlm are all 0; give at least one a positive weight")
        return self

    @property
    def needs_teacher(self) -> bool:
        """False for plain MLM training (0/0/1)."""
        return self.distil > 0 or self.cosine > 0


class Train(Section):
    """How the student learns."""

    seed: int = Field(0, ge=0, lt=2**32, description="Seed of data order, dropout and fresh weights")
    epochs: float = Field(1.0, gt=0, description="Passes over the corpus (ignored if max_steps is set)")
    max_steps: int = Field(0, ge=0, description="Stop after so many steps; 0 means by epochs")
    batch_rows: int = Field(256, ge=1, description="Blocks in one optimizer step, over all ranks")
    micro_rows: int = Field(0, ge=0, description="Blocks in one forward on one rank; 0 means the whole step")
    lr: float = Field(5e-4, gt=0, le=1, description="Highest learning rate")
    schedule: Literal["linear", "wsd"] = Field("linear", description="linear decay, or warm-up-stable-decay")
    warmup: float = Field(0.05, ge=0, le=1, description="Share of the steps that warm up")
    decay: float = Field(0.2, ge=0, le=1, description="Share of the steps that decay (schedule wsd)")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW weight decay (matrices only)")
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW betas")
    eps: float = Field(1e-6, gt=0, description="AdamW epsilon")
    clip: float = Field(5.0, ge=0, description="Largest gradient norm; 0 means no clipping")
    window_shards: int = Field(4, ge=1, description="Shards whose rows are shuffled together")
    checkpoint_steps: int = Field(500, ge=1, description="Steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="Newest checkpoints kept (the best is kept too)")
    validate_steps: int = Field(250, ge=0, description="Steps between looks at held-out blocks; 0 means never")
    validate_rows: int = Field(64, ge=1, description="Held-out blocks in one look")
    log_steps: int = Field(10, ge=1, description="Steps between lines of metrics")
    warm_start: str = Field("", description="Start from this model folder instead of teacher layers")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train")
    compile: bool = Field(True, description="torch.compile (GPU only)")
    ranks: int = Field(1, ge=1, le=1024, description="Processes on this machine (torchrun)")
    threads: int = Field(0, ge=0, description="CPU threads a process; 0 leaves it to torch")
    prefetch: int = Field(4, ge=1, le=64, description="Batches prepared ahead")


class Register(Section):
    """Where the result is recorded."""

    name: str = Field("distilled", pattern=r"^[A-Za-z0-9._-]+$", description="Registered model in MLflow")
    experiment: str = Field("distil", min_length=1, description="MLflow experiment")
    tracking_uri: str = Field("", description="MLflow server or database; empty means the local one")


class Score(Section):
    """What the student is judged by."""

    heldout_rows: int = Field(256, ge=1, description="Held-out blocks that are scored")
    sentences: tuple[str, ...] = Field(
        ("Le camembert est <mask> :)", "Paris est la <mask> de la France.", "Il a signé un contrat de <mask>."),
        description="Sentences for the fill-mask sheet; <mask> stands for the tokenizer's own mask",
    )
    ner: str = Field("", description="Folder or hub id of a wikiner-schema set; empty: not run")
    ner_seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="Seeds of fine-tuning")
    ner_epochs: float = Field(3.0, gt=0, description="Epochs of fine-tuning")
    ner_lr: float = Field(5e-5, gt=0, description="Learning rate of fine-tuning")
    ner_train_rows: int = Field(0, ge=0, description="Train on so many sentences only; 0 means all")
    latency_runs: int = Field(30, ge=0, description="Timed forwards for latency; 0 means not run")


class Run(Section):
    """How the work is spread and what may fail."""

    workers: int = Field(2, ge=1, le=512, description="CPU worker processes for shards and blocks")
    window: int = Field(64, ge=1, le=5000, description="Shard tasks in flight at once")
    max_failed: int = Field(0, ge=0, description="So many shards may fail before the run ends Failed")
    retries: int = Field(2, ge=0, le=20, description="Retries of a task after a passing error")
    retry_seconds: float = Field(10.0, ge=0, description="First pause before a retry; doubles each time")
    shard_timeout: float = Field(3600.0, gt=0, description="Seconds after which a worker process is ended")


class Recipe(Section):
    """One whole recipe. `name` appears in runs, models and screens."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="Short name of the recipe")
    home: str = Field("", description="Folder of local state; empty means .distil in the current folder")
    store: str = Field("", description="Root of the artifacts, a path or any fsspec URL; empty means HOME/store")
    corpus: Corpus
    blocks: Blocks = Blocks()
    mask: Mask = Mask()
    teacher: Teacher = Teacher()
    targets: Targets = Targets()
    student: Student = Student()
    loss: Loss = Loss()
    train: Train = Train()
    register_as: Register = Field(Register(), alias="register")
    score: Score = Score()
    run: Run = Run()

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.targets.encoding == "topk" and self.targets.source == "cached" and self.loss.cosine > 0:
            raise ValueError(
                "targets.encoding = topk keeps no hidden states, so loss.cosine must be 0; set it to 0 or take int8"
            )
        if self.loss.needs_teacher and not self.teacher.model:
            raise ValueError("loss.distil or loss.cosine is above 0, so teacher.model must name a teacher")
        if not self.teacher.model and not self.blocks.tokenizer:
            raise ValueError("without teacher.model, blocks.tokenizer must name a tokenizer")
        if self.student.init != "config" and not self.teacher.model:
            raise ValueError('without teacher.model, student.init must be "config"')
        if self.student.init == "config" and "model_type" not in self.student.config:
            raise ValueError('student.init = "config" needs student.config with a model_type')
        if self.student.choice and len(self.student.choice) != self.student.layers:
            raise ValueError("student.choice must list as many layers as student.layers says")
        if self.corpus.max_chars < self.corpus.min_chars:
            raise ValueError("corpus.max_chars is below corpus.min_chars")
        return self


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and applies overrides such as `train.lr=1e-3`; relative paths are the file's own.

    FatalError that names the file and the field where something does not fit.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FatalError(f"{path}: no such recipe file", str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise FatalError(f"{path}: not a readable TOML file ({error})", str(path)) from error
    for override in overrides:
        _override(values, override)
    recipe = make_recipe(values, str(path))
    return _anchored(recipe, path.parent.resolve())


def make_recipe(values: dict[str, Any], where: str) -> Recipe:
    """Validates plain values. FatalError with one line a field."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in item['loc']) or 'recipe'}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        ]
        raise FatalError(f"{where}: {'; '.join(lines)}", where) from error


def _override(values: dict[str, Any], text: str) -> None:
    name, equals, raw = text.partition("=")
    if not equals or not name:
        raise FatalError(f"override {text!r}: write section.field=value")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw  # a bare word or path
    *sections, field = name.strip().split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise FatalError(f"override {text!r}: {section} is not a section")
        values = inner
    values[field] = value


def _anchored(recipe: Recipe, folder: Path) -> Recipe:
    """Makes paths that lie beside the recipe file absolute, so that the recipe works from any folder."""
    home = recipe.home or str(Path(".distil").absolute())
    return recipe.model_copy(
        update={
            "home": home,
            "store": recipe.store or f"{home}/store",
            "corpus": recipe.corpus.model_copy(update={"url": beside(recipe.corpus.url, folder)}),
            "blocks": recipe.blocks.model_copy(update={"tokenizer": beside(recipe.blocks.tokenizer, folder)}),
            "teacher": recipe.teacher.model_copy(update={"model": beside(recipe.teacher.model, folder)}),
            "train": recipe.train.model_copy(update={"warm_start": beside(recipe.train.warm_start, folder)}),
            "score": recipe.score.model_copy(update={"ner": beside(recipe.score.ner, folder)}),
        }
    )


def beside(name: str, folder: Path) -> str:
    """`name` as an absolute path if such a file or folder lies in `folder`, else unchanged (URL, hub id)."""
    if not name or "://" in name or Path(name).is_absolute():
        return name
    there = folder / name
    return str(there) if there.exists() else name

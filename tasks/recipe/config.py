"""Recipes: everything that a run needs to know, as Pydantic models. A recipe file is TOML with these sections, which
tasks/recipe/load.py reads.

The same models are the parameter form of the Prefect deployments, so every field has a description and bounds.
What a single field cannot say (rules across fields) is checked in `Recipe`.
"""

from collections.abc import Mapping, Set
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from storage.cache import LIMIT
from storage.filesystem import CREDENTIALS, has_password

Beta = Annotated[float, Field(ge=0, lt=1)]

Seed = Annotated[int, Field(ge=0, lt=2**32)]

Layer = Annotated[int, Field(ge=0, lt=1000)]

Dtype = Literal["auto", "float32", "bfloat16"]


class Section(BaseModel):
    """One section of a recipe: unknown names are refused, values never change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        # The heading of the section in Prefect's form.
        model_title_generator=lambda model: model.__name__.removesuffix("Settings"),
    )


S = TypeVar("S", bound=Section)


class CorpusSettings(Section):
    """Which text, and what of it is kept."""

    url: str = Field(min_length=1, description="Folder of source files: a path or any fsspec URL")
    pattern: str = Field("*", description="Take only sources whose file name fits this glob")
    language: str = Field("fr", description="Keep documents identified as this language; empty keeps all")
    min_language_prob: float = Field(0.0, ge=0, le=1, description="Least probability of that language")
    min_chars: int = Field(1, ge=1, le=1_000_000_000, description="Drop shorter documents (characters)")
    max_chars: int = Field(10_000_000, ge=1, le=1_000_000_000, description="Quarantine longer documents (characters)")
    drop_warnings: tuple[str, ...] = Field((), description="Drop documents with any of these quality warnings")
    min_harmful_pp: float | None = Field(
        None,
        ge=0,
        le=1e9,
        description="Drop documents whose harmful_pp is below this (a low perplexity reads like harmful text)",
    )
    deduplicate: bool = Field(True, description="Drop exact duplicates inside a shard")
    heldout_per_mille: int = Field(5, ge=0, le=500, description="Of 1000 documents, so many are never trained on")
    text: Literal["auto", "lines", "paragraphs"] = Field(
        "auto",
        description="How plain text without a metadata file parts into documents: one a line (2019), or by blank lines "
        "(21.09); auto looks at the beginning of each file",
    )
    shard_bytes: int = Field(128_000_000, ge=10_000, le=10**10, description="UTF-8 bytes of text in one shard")
    max_bad_lines: int = Field(
        10, ge=0, le=10**9, description="A source with more bad lines than this and than 0.1 % is refused"
    )
    max_line_bytes: int = Field(32_000_000, ge=1_000, le=2**31, description="A longer line is quarantined")
    max_unpacked_ratio: int = Field(
        200, ge=1, le=10**9, description="A packed source of more than so many times its size (and 256 MB) is refused"
    )

    def in_key(self, outside: Set[str]) -> dict[str, Any]:
        """The settings that make a key, all but `outside`; `text` only where it is set: stores are older than it."""
        return self.model_dump(mode="json", exclude={*outside, "text"} if self.text == "auto" else {*outside})


class BlockSettings(Section):
    """How text becomes token blocks of one length."""

    tokenizer: str = Field("", description="Folder or hub id; empty means the teacher's own")
    length: int = Field(512, ge=8, le=8192, description="Tokens in a block, special tokens included")
    packing: Literal["packed", "documents"] = Field(
        "packed", description="packed: documents joined and cut into full blocks; documents: one document a block"
    )


class MaskSettings(Section):
    """Which positions are hidden from teacher and student."""

    seed: Seed = Field(0, description="Seed of the masks; part of the key of the targets")
    rate: float = Field(0.15, gt=0, le=0.5, description="Share of the positions of a block that are chosen")
    kind: Literal["uniform", "smoothed"] = Field(
        "uniform", description="smoothed: rare tokens more often, by count ** -0.7 (the reference)"
    )
    variants: int = Field(1, ge=1, le=64, description="Different masks of the same block, one an epoch in turn")


class TeacherSettings(Section):
    """The model that is distilled."""

    model: str = Field("", description="Folder or hub id of a masked language model; empty only for plain MLM training")
    revision: str = Field("", description="Commit or tag on the hub; empty means the newest")
    dtype: Dtype = Field(
        "auto", description="auto: bfloat16 on GPU, float32 on CPU; in training its products are of train.dtype"
    )
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="Attention implementation; part of the key")
    batch_rows: int = Field(0, ge=0, le=100_000, description="Blocks in one teacher forward; 0 chooses by memory")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model; only if you trust it")


class TargetSettings(Section):
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
    calibration_rows: int = Field(
        256, ge=1, le=1_000_000, description="Blocks that channel means and deviations are estimated from"
    )


class StudentSettings(Section):
    """The model that learns."""

    layers: int = Field(6, ge=1, le=96, description="Number of layers")
    choice: tuple[Layer, ...] = Field((), description="Teacher layers to copy; empty spreads them evenly")
    init: Literal["teacher", "scratch", "config"] = Field(
        "teacher", description="teacher: copy layers; scratch: same shape, random; config: a fresh model from `config`"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of hidden states and attention")
    config: dict[str, Any] = Field(
        default_factory=dict, description="Hugging Face config of a fresh model, model_type included (init = config)"
    )


class LossSettings(Section):
    """Weights of the three parts and the temperature of the first (paper: 0.5, 0.3, 0.2; reference: 2)."""

    distil: float = Field(0.5, ge=0, le=1000, description="Weight of T^2 KL(teacher || student)")
    cosine: float = Field(0.3, ge=0, le=1000, description="Weight of 1 - cos of last hidden states")
    mlm: float = Field(0.2, ge=0, le=1000, description="Weight of the masked cross-entropy")
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


class TrainSettings(Section):
    """How the student learns."""

    seed: Seed = Field(0, description="Seed of data order, dropout and fresh weights")
    epochs: float = Field(1.0, gt=0, le=10_000, description="Passes over the corpus (ignored if max_steps is set)")
    max_steps: int = Field(0, ge=0, le=10**9, description="Stop after so many steps; 0 means by epochs")
    batch_rows: int = Field(256, ge=1, le=1_000_000, description="Blocks in one optimizer step, over all ranks")
    micro_rows: int = Field(
        0, ge=0, le=1_000_000, description="Blocks in one forward on one rank; 0 means the whole step"
    )
    lr: float = Field(5e-4, gt=0, le=1, description="Highest learning rate")
    schedule: Literal["linear", "wsd"] = Field("linear", description="linear decay, or warm-up-stable-decay")
    warmup: float = Field(0.05, ge=0, le=1, description="Share of the steps that warm up")
    decay: float = Field(0.2, ge=0, le=1, description="Share of the steps that decay (schedule wsd)")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW weight decay (matrices only)")
    betas: tuple[Beta, Beta] = Field((0.9, 0.98), description="AdamW betas")
    eps: float = Field(1e-6, gt=0, le=1, description="AdamW epsilon")
    clip: float = Field(5.0, ge=0, le=1e6, description="Largest gradient norm; 0 means no clipping")
    window_shards: int = Field(4, ge=1, le=10_000, description="Shards whose rows are shuffled together")
    checkpoint_steps: int = Field(500, ge=1, le=10**9, description="Steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, le=10_000, description="Newest checkpoints kept (the best is kept too)")
    validate_steps: int = Field(
        250, ge=0, le=10**9, description="Steps between looks at held-out blocks; 0 means never"
    )
    result: Literal["last", "best"] = Field(
        "last",
        description="Weights that are saved: those of the last step, or those with the lowest held-out loss",
    )
    validate_rows: int = Field(64, ge=1, le=1_000_000, description="Held-out blocks in one look")
    log_steps: int = Field(10, ge=1, le=10**9, description="Steps between lines of metrics")
    warm_start: str = Field(
        "", description="Start from this model instead of teacher layers: a folder, hub id or models:/NAME@champion"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train")
    dtype: Dtype = Field(
        "auto",
        description="Matrix products by autocast in this; auto: bfloat16 on GPU, float32 on CPU; weights stay float32",
    )
    compile: bool = Field(True, description="torch.compile (GPU only)")
    ranks: int = Field(1, ge=1, le=1024, description="Processes on this machine (torchrun)")
    launcher: tuple[str, ...] = Field(
        (),
        description="Command that starts the trainer on other machines and ends with it, as srun does; {run} in it "
        "stands for RUN.json and {folder} for its folder, below home: all of them must see it. Empty: on this machine",
    )
    threads: int = Field(0, ge=0, le=4096, description="CPU threads a process; 0 leaves it to torch")
    prefetch: int = Field(4, ge=1, le=64, description="Batches prepared ahead")

    @model_validator(mode="after")
    def _launches_the_run(self) -> Self:
        if self.launcher and not any("{run}" in word for word in self.launcher):
            raise ValueError("train.launcher must name the run: put {run} where the trainer's RUN.json belongs")
        return self


class RegisterSettings(Section):
    """Where the result is recorded."""

    name: str = Field(
        "distilled", max_length=100, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", description="Registered model in MLflow"
    )
    experiment: str = Field("distil", min_length=1, description="MLflow experiment")
    tracking_uri: str = Field("", description="MLflow server or database; empty means the local one")
    artifacts: str = Field(
        "",
        description="Where MLflow keeps models and files, such as s3://bucket/mlflow; empty: where it does by default",
    )
    license: str = Field("mit", min_length=1, description="License in the model card; the teacher's must allow it")
    dataset: str = Field("", description="Hub id of the corpus for the model card; empty: only its name is told")


class ScoreSettings(Section):
    """What the student is judged by."""

    heldout_rows: int = Field(256, ge=1, le=10**9, description="Held-out blocks that are scored")
    heldout_masks: int = Field(1, ge=1, le=64, description="Masks under which each of them is scored")
    sentences: tuple[str, ...] = Field(
        ("Le camembert est <mask> :)", "Paris est la <mask> de la France.", "Il a signé un contrat de <mask>."),
        description="Sentences for the fill-mask sheet; <mask> stands for the tokenizer's own mask",
    )
    protocol: str = Field(
        "", description="Protocol file of the fine-tuned sets (deployments/score/flue.toml); empty: they are not run"
    )
    sets: str = Field(
        "", description="Folder or URL that holds the protocol's sets; empty: those of the hub, where it names them"
    )
    control: str = Field(
        "",
        description="Model to score beside the student, as the same student without distillation: a folder, hub id or "
        "models:/NAME@ALIAS; empty: none",
    )
    latency_runs: int = Field(30, ge=0, le=100_000, description="Timed forwards for latency; 0 means not run")


class GateSettings(Section):
    """When a new version may become champion. Sets are named as the scores name them (heldout, ner, ...)."""

    # Not `required`: Prefect takes a field of that name for JSON Schema's keyword and then refuses every form.
    needed: tuple[str, ...] = Field(("heldout",), description="Sets that must have a score, whoever had one before")
    optional: tuple[str, ...] = Field((), description="Sets that may be missing; any other missing score blocks")
    floors: dict[str, float] = Field(
        default_factory=dict, description="Least score by set (0 to 1) where there is no champion to compare with"
    )
    deviations: float = Field(
        2.0, gt=0, le=10, description="A score may fall by so many standard deviations over seeds (pooled)"
    )
    min_tolerance: float = Field(
        0.005, ge=0, le=1, description="Least tolerance (0 to 1); all there is for a set with a single seed"
    )
    approval: bool = Field(False, description="Pause the flow until a person says yes in the Prefect UI")
    approval_hours: float = Field(72.0, gt=0, le=8760, description="How long it waits for that person")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        both = set(self.needed) & set(self.optional)
        if both:
            raise ValueError(f"gate.needed and gate.optional both name {', '.join(sorted(both))}")
        wrong = sorted(name for name, floor in self.floors.items() if not 0 <= floor <= 1)
        if wrong:
            raise ValueError(f"gate.floors of {', '.join(wrong)} must lie between 0 and 1")
        return self


class RunSettings(Section):
    """How the work is spread and what may fail."""

    engine: Literal["processes", "ray"] = Field(
        "processes", description="Who makes shards, blocks and targets: processes of this machine, or Ray tasks"
    )
    text_on: str = Field(
        "",
        description="Deployment that makes shards and blocks on another work pool, such as prepare/text; it and this "
        "run share the store. Empty: this run makes them",
    )
    workers: int = Field(2, ge=1, le=512, description="CPU worker processes for shards and blocks (engine processes)")
    window: int = Field(64, ge=1, le=5000, description="Shard tasks in flight at once")
    max_failed: int = Field(0, ge=0, le=10**9, description="So many shards may fail before the run ends Failed")
    retries: int = Field(2, ge=0, le=20, description="Retries of a task after a passing error")
    retry_seconds: float = Field(10.0, ge=0, le=86_400, description="First pause before a retry; doubles each time")
    shard_timeout: float = Field(
        3600.0, gt=0, le=31_536_000, description="Seconds after which a worker process is ended"
    )
    cache_bytes: int = Field(
        LIMIT,
        ge=0,
        le=10**15,
        description="Bytes of local copies of a remote store's files, read ahead of use",
    )
    task_seconds: float = Field(
        60.0,
        ge=0,
        le=86_400,
        description="Tiny shards share a task run until it takes about so long; 0 gives each its own",
    )


class RaySettings(Section):
    """Where shards, blocks and targets are made when run.engine = "ray", and what one task of each takes."""

    address: str = Field(
        "", description="Cluster to join: auto (this machine's) or HOST:6379; empty: Ray on this machine alone"
    )
    cpus: float = Field(1.0, gt=0, le=1024, description="CPUs of a task that makes shards or blocks")
    memory: int = Field(0, ge=0, le=2**50, description="Bytes of memory that such a task asks for; 0: does not say")
    teacher_cpus: float = Field(1.0, gt=0, le=1024, description="CPUs of a task of the teacher")
    teacher_gpus: float = Field(0.0, ge=0, le=64, description="GPUs of a task of the teacher")
    teacher_memory: int = Field(0, ge=0, le=2**50, description="Bytes of memory that it asks for; 0: does not say")


class WatchSettings(Section):
    """When a new snapshot of the corpus starts a run by itself."""

    cron: str = Field("0 * * * *", min_length=9, description="When to look for a new snapshot (cron, UTC)")
    active: bool = Field(False, description="Look on that schedule; otherwise only on the event or by hand")
    folder: str = Field(
        "", description="Folder whose subfolders are snapshots; empty: corpus.url is one snapshot, which grows"
    )
    settle_seconds: float = Field(
        60.0, ge=0, le=86_400, description="Two looks so far apart must see the same files before they count as whole"
    )
    warm_start: Literal["", "champion"] = Field(
        "", description="champion: the run goes on from the registered champion, if there is one; empty: it starts anew"
    )


class Recipe(Section):
    """One whole recipe. `name` appears in runs, models and screens."""

    name: str = Field(max_length=100, pattern=r"^[a-z0-9][a-z0-9._-]*$", description="Short name of the recipe")
    home: str = Field("", description="Folder of local state; empty means .distil in the current folder")
    store: str = Field("", description="Root of the artifacts, a path or any fsspec URL; empty means HOME/store")
    corpus: CorpusSettings
    blocks: BlockSettings = BlockSettings()
    mask: MaskSettings = MaskSettings()
    teacher: TeacherSettings = TeacherSettings()
    targets: TargetSettings = TargetSettings()
    student: StudentSettings = StudentSettings()
    loss: LossSettings = LossSettings()
    train: TrainSettings = TrainSettings()
    register_as: RegisterSettings = Field(RegisterSettings(), alias="register")
    score: ScoreSettings = ScoreSettings()
    gate: GateSettings = GateSettings()
    run: RunSettings = RunSettings()
    ray: RaySettings = RaySettings()
    watch: WatchSettings = WatchSettings()

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)

    def with_changes(self, changes: Mapping[str, Any]) -> Self:
        """A copy with some fields replaced: `{"train.lr": 1e-3}`. The new values are not validated."""
        copied: dict[str, Any] = {}
        for name, value in changes.items():
            section, _, field = name.rpartition(".")
            if not section:
                copied[field] = value
                continue
            section = "register_as" if section == "register" else section
            copied[section] = copied.get(section, getattr(self, section)).model_copy(update={field: value})
        return self.model_copy(update=copied)

    @model_validator(mode="after")
    def _no_password(self) -> Self:
        urls = {
            "store": self.store,
            "corpus.url": self.corpus.url,
            "watch.folder": self.watch.folder,
            "score.sets": self.score.sets,
            "register.artifacts": self.register_as.artifacts,
        }
        for field, url in urls.items():
            if has_password(url):
                raise ValueError(f"{field} holds a password; take it out: {CREDENTIALS}")
        if has_password(self.register_as.tracking_uri):  # a recipe is shown in forms, parameters and runs
            raise ValueError("register.tracking_uri holds a password; leave it empty and set MLFLOW_TRACKING_URI to it")
        return self

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

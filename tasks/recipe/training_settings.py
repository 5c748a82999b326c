"""Defines the sections of a recipe that determine the student: data, models, targets, losses and optimization.

    [corpus]
    url = "s3://bucket/oscar-2301"

Most fields of these sections change the result and are therefore part of a key. tasks/recipe/operation_settings.py
defines the sections that determine where results are recorded and how the work runs.
"""

from collections.abc import Set
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from tasks.recipe.section import Beta, Dtype, Layer, Section, Seed


class CorpusSettings(Section):
    """Source files, and the filters for their documents."""

    url: str = Field(min_length=1, description="Folder of the source files: a path or any fsspec URL")
    pattern: str = Field("*", description="Glob for the file names of sources, such as fr_meta_part_*.jsonl.zst")
    language: str = Field("fr", description="Language of the documents to keep; empty keeps every language")
    min_language_prob: float = Field(0.0, ge=0, le=1, description="Minimum probability of the language (0 to 1)")
    min_chars: int = Field(1, ge=1, le=1_000_000_000, description="Minimum characters per document; drops shorter ones")
    max_chars: int = Field(
        10_000_000, ge=1, le=1_000_000_000, description="Maximum characters per document; quarantines longer ones"
    )
    drop_warnings: tuple[str, ...] = Field(
        (), description="Quality warnings that drop a document, such as tiny, header or noisy"
    )
    min_harmful_pp: float | None = Field(
        None,
        ge=0,
        le=1e9,
        description="Minimum harmful_pp, the perplexity under a model of harmful text; drops documents below it",
    )
    deduplicate: bool = Field(True, description="Drop exact duplicates within each shard")
    heldout_per_mille: int = Field(5, ge=0, le=500, description="Documents held out per 1,000")
    text: Literal["auto", "lines", "paragraphs"] = Field(
        "auto",
        description="Documents of plain text without a metadata file: lines, one per line (OSCAR 2019); paragraphs, "
        "separated by blank lines (21.09); auto, detected from the first 4 MiB of each file",
    )
    shard_bytes: int = Field(128_000_000, ge=10_000, le=10**10, description="Bytes of UTF-8 text per shard")
    max_bad_lines: int = Field(
        10, ge=0, le=10**9, description="Bad lines allowed per source, or 0.1 % of its lines if that is more"
    )
    max_line_bytes: int = Field(
        32_000_000, ge=1_000, le=2**31, description="Maximum bytes per line; quarantines longer lines"
    )
    max_unpacked_ratio: int = Field(
        200,
        ge=1,
        le=10**9,
        description="Maximum unpacked bytes per packed byte of a source; not checked up to 256 MiB",
    )

    def in_key(self, outside: Set[str]) -> dict[str, Any]:
        """Returns the settings that are part of a key, which are all except `outside`.

        `text` is excluded while it is "auto", so that keys that are older than this field stay valid.
        """
        return self.model_dump(mode="json", exclude={*outside, "text"} if self.text == "auto" else {*outside})


class BlockSettings(Section):
    """How text is split into token blocks of equal length."""

    tokenizer: str = Field("", description="Tokenizer: a folder or Hub id; empty uses the tokenizer of the teacher")
    length: int = Field(512, ge=8, le=8192, description="Tokens per block, special tokens included")
    packing: Literal["packed", "documents"] = Field(
        "packed", description="packed: documents joined and cut into full blocks; documents: one document per block"
    )


class MaskSettings(Section):
    """How masked positions are chosen, for teacher and student alike."""

    seed: Seed = Field(0, description="Random seed of the masks; part of the key of the targets")
    rate: float = Field(0.15, gt=0, le=0.5, description="Share of the positions of a block that are masked (0 to 0.5)")
    kind: Literal["uniform", "smoothed"] = Field(
        "uniform",
        description="uniform: every token equally often; smoothed: weighted by token count ** -0.7, as in DistilBERT",
    )
    variants: int = Field(1, ge=1, le=64, description="Different masks per block; each epoch uses the next one")


class TeacherSettings(Section):
    """The model that is distilled."""

    model: str = Field(
        "", description="Masked language model: a folder or Hub id; may be empty only for plain MLM training"
    )
    revision: str = Field("", description="Commit or tag on the Hub; empty uses the newest")
    dtype: Dtype = Field(
        "auto",
        description="Precision of the forward pass that computes targets; auto: bfloat16 on GPU, float32 on CPU; an "
        "online teacher follows train.dtype",
    )
    attention: Literal["sdpa", "eager"] = Field(
        "sdpa", description="Attention implementation; part of the key of the targets"
    )
    batch_rows: int = Field(
        0, ge=0, le=100_000, description="Blocks per teacher forward pass; 0 derives the number from free memory"
    )
    trust_remote_code: bool = Field(
        False, description="Execute Python code from the model repository; enable only if you trust it"
    )


class TargetSettings(Section):
    """How the teacher's outputs are computed and stored."""

    source: Literal["cached", "online"] = Field(
        "cached",
        description="cached: compute and store targets once, then train on them; online: run the teacher in training",
    )
    encoding: Literal["int8", "int4", "bf16", "topk"] = Field(
        "int8", description="Encoding of cached targets: hidden states as int8, int4 or bf16, or the top-k logits"
    )
    positions: Literal["masked", "all"] = Field(
        "masked", description="Positions that enter the distillation and cosine losses"
    )
    on_missing: Literal["compute", "raise", "skip"] = Field(
        "compute",
        description="If targets are missing from the store: compute them, raise an error, or skip their shards",
    )
    top_k: int = Field(64, ge=1, le=4096, description="Logits stored per position (encoding topk)")
    calibration_rows: int = Field(
        256,
        ge=1,
        le=1_000_000,
        description="Blocks used to estimate the mean and deviation of each channel (int8 and int4)",
    )


class StudentSettings(Section):
    """The model that is trained."""

    layers: int = Field(6, ge=1, le=96, description="Number of transformer layers")
    choice: tuple[Layer, ...] = Field(
        (), description="Teacher layers to copy, counted from 0; empty spreads them evenly"
    )
    init: Literal["teacher", "scratch", "config"] = Field(
        "teacher",
        description="teacher: copy teacher layers; scratch: same architecture, random weights; config: random weights "
        "from student.config",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability of hidden states and attention")
    config: dict[str, Any] = Field(
        default_factory=dict, description="Hugging Face config of the model, with model_type (init = config)"
    )


class LossSettings(Section):
    """Weights of the three losses and the temperature (DistilCamemBERT: 0.5, 0.3, 0.2; temperature 2)."""

    distil: float = Field(0.5, ge=0, le=1000, description="Weight of the distillation loss, T^2 KL(teacher || student)")
    cosine: float = Field(
        0.3, ge=0, le=1000, description="Weight of the cosine loss, 1 - cos of the last hidden states"
    )
    mlm: float = Field(0.2, ge=0, le=1000, description="Weight of the masked cross-entropy")
    temperature: float = Field(2.0, gt=0, le=100, description="Softmax temperature T of the distillation loss")

    @model_validator(mode="after")
    def _not_all_zero(self) -> Self:
        if self.distil == self.cosine == self.mlm == 0:
            raise ValueError("distil, cosine and mlm are all 0; set at least one of them to a positive weight")
        return self

    @property
    def needs_teacher(self) -> bool:
        """True unless distil and cosine are 0 (plain MLM training)."""
        return self.distil > 0 or self.cosine > 0


class TrainSettings(Section):
    """Optimization, checkpoints, validation and hardware of the training run."""

    seed: Seed = Field(0, description="Random seed of data order, dropout and new weights")
    epochs: float = Field(1.0, gt=0, le=10_000, description="Passes over the corpus; ignored if max_steps is set")
    max_steps: int = Field(0, ge=0, le=10**9, description="Optimizer steps; 0 derives them from epochs")
    batch_rows: int = Field(256, ge=1, le=1_000_000, description="Blocks per optimizer step, over all ranks")
    micro_rows: int = Field(
        0, ge=0, le=1_000_000, description="Blocks per forward pass and rank; 0 processes all blocks of a step at once"
    )
    lr: float = Field(5e-4, gt=0, le=1, description="Peak learning rate")
    schedule: Literal["linear", "wsd"] = Field(
        "linear", description="Learning-rate schedule: linear decay, or wsd (warm-up, stable, decay)"
    )
    warmup: float = Field(0.05, ge=0, le=1, description="Share of steps used for warm-up (0 to 1)")
    decay: float = Field(0.2, ge=0, le=1, description="Share of steps used for decay (0 to 1; schedule wsd)")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW weight decay, applied to matrices only")
    betas: tuple[Beta, Beta] = Field((0.9, 0.98), description="AdamW betas")
    eps: float = Field(1e-6, gt=0, le=1, description="AdamW epsilon")
    clip: float = Field(5.0, ge=0, le=1e6, description="Maximum gradient norm; 0 disables clipping")
    window_shards: int = Field(4, ge=1, le=10_000, description="Shards whose blocks are shuffled together")
    checkpoint_steps: int = Field(500, ge=1, le=10**9, description="Steps between checkpoints")
    keep_checkpoints: int = Field(
        2,
        ge=1,
        le=10_000,
        description="Number of newest checkpoints to keep (the best one is also kept if train.result is best)",
    )
    validate_steps: int = Field(
        250, ge=0, le=10**9, description="Steps between evaluations on held-out blocks; 0 disables"
    )
    result: Literal["last", "best"] = Field(
        "last", description="Weights to export: those of the last step, or those with the lowest held-out loss"
    )
    validate_rows: int = Field(64, ge=1, le=1_000_000, description="Held-out blocks per evaluation")
    log_steps: int = Field(10, ge=1, le=10**9, description="Steps between log lines of metrics")
    warm_start: str = Field(
        "",
        description="Model to start from, instead of teacher layers: a folder, Hub id or models:/NAME@ALIAS",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Device; auto uses a GPU if the machine has one")
    dtype: Dtype = Field(
        "auto",
        description="Autocast precision; auto: bfloat16 on GPU, float32 on CPU; weights stay float32",
    )
    compile: bool = Field(True, description="Use torch.compile (GPU only)")
    ranks: int = Field(1, ge=1, le=1024, description="Training processes on this machine (torchrun)")
    launcher: tuple[str, ...] = Field(
        (),
        description="Command that runs the trainer on other machines and exits with it, such as srun; {run} is "
        "replaced by the path of the run file and {folder} by its folder, which all machines must share; empty: this "
        "machine",
    )
    threads: int = Field(0, ge=0, le=4096, description="CPU threads per process; 0 uses the default of PyTorch")
    prefetch: int = Field(4, ge=1, le=64, description="Steps whose batches are prepared in advance")

    @model_validator(mode="after")
    def _launcher_names_the_run(self) -> Self:
        if self.launcher and not any("{run}" in argument for argument in self.launcher):
            raise ValueError("train.launcher must contain {run}, which is replaced by the path of the run file")
        return self

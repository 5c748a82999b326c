"""Defines the sections of a recipe that determine how results are recorded, scored and released, and how work runs.

    [run]
    workers = 8

tasks/recipe/training_settings.py defines the sections that determine the student: data, models and optimization.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from storage.cache import DEFAULT_CACHE_BYTES
from tasks.recipe.section import Section


class RegisterSettings(Section):
    """Where results are recorded."""

    name: str = Field(
        "distilled",
        max_length=100,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$",
        description="Name of the registered model in MLflow",
    )
    experiment: str = Field("distil", min_length=1, description="MLflow experiment")
    tracking_uri: str = Field("", description="MLflow server or database; empty uses the local one")
    artifacts: str = Field(
        "", description="Where MLflow stores models and files, such as s3://bucket/mlflow; empty uses MLflow's default"
    )
    license: str = Field(
        "mit", min_length=1, description="License in the model card; the teacher's license must permit it"
    )
    dataset: str = Field(
        "", description="Hub id of the corpus for the model card; empty shows only the name of the corpus"
    )


class ScoreSettings(Section):
    """How the student is evaluated."""

    heldout_rows: int = Field(256, ge=1, le=10**9, description="Held-out blocks to evaluate")
    heldout_masks: int = Field(1, ge=1, le=64, description="Masks per held-out block")
    sentences: tuple[str, ...] = Field(
        ("Le camembert est <mask> :)", "Paris est la <mask> de la France.", "Il a signé un contrat de <mask>."),
        description="Sentences of the fill-mask table; <mask> is replaced by the tokenizer's mask token",
    )
    protocol: str = Field(
        "", description="Protocol file for fine-tuning, such as deployments/score/flue.toml; empty: no fine-tuning"
    )
    sets: str = Field(
        "", description="Folder or URL of the data sets of the protocol; empty downloads those that are on the Hub"
    )
    control: str = Field(
        "",
        description="Model to compare the student with, such as the same student without distillation: a folder, Hub "
        "id or models:/NAME@ALIAS; empty: none",
    )
    latency_runs: int = Field(30, ge=0, le=100_000, description="Timed forward passes for latency; 0 disables")


class GateSettings(Section):
    """When a new version may become champion. Data sets are identified by their names in scores (heldout, ner, ...)."""

    # Not `required`: Prefect confuses a field of that name with the JSON Schema keyword and rejects every form.
    needed: tuple[str, ...] = Field(("heldout",), description="Data sets on which every version must have a score")
    optional: tuple[str, ...] = Field(
        (), description="Data sets whose score may be missing; any other missing score blocks promotion"
    )
    floors: dict[str, float] = Field(
        default_factory=dict,
        description="Minimum score per data set (0 to 1), used if there is no score of a champion",
    )
    deviations: float = Field(
        2.0, gt=0, le=10, description="Tolerated drop of a score, in pooled standard deviations over seeds"
    )
    min_tolerance: float = Field(
        0.005,
        ge=0,
        le=1,
        description="Minimum tolerated drop (0 to 1); the only tolerance for a data set with a single seed",
    )
    approval: bool = Field(False, description="Pause the flow until a person approves in the Prefect UI")
    approval_hours: float = Field(72.0, gt=0, le=8760, description="Hours to wait for the approval")

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        both = set(self.needed) & set(self.optional)
        if both:
            raise ValueError(
                f"gate.needed and gate.optional both contain {', '.join(sorted(both))}; remove it from one of them"
            )
        wrong = sorted(name for name, floor in self.floors.items() if not 0 <= floor <= 1)
        if wrong:
            raise ValueError(f"gate.floors of {', '.join(wrong)} must be between 0 and 1")
        return self


class RunSettings(Section):
    """How the work is distributed, and which failures are tolerated."""

    engine: Literal["processes", "ray"] = Field(
        "processes", description="Executor for shards, blocks and targets: processes of this machine, or Ray tasks"
    )
    text_on: str = Field(
        "",
        description="Deployment that computes shards and blocks on another work pool, such as prepare/text; it must "
        "use the same store; empty: this run computes them",
    )
    workers: int = Field(2, ge=1, le=512, description="CPU worker processes for shards and blocks (engine processes)")
    window: int = Field(64, ge=1, le=5000, description="Maximum shard tasks in flight")
    max_failed: int = Field(0, ge=0, le=10**9, description="Number of failed shards above which the run ends as Failed")
    retries: int = Field(2, ge=0, le=20, description="Retries per task after a temporary error")
    retry_seconds: float = Field(
        10.0, ge=0, le=86_400, description="Seconds before the first retry; doubles with every retry"
    )
    shard_timeout: float = Field(
        3600.0,
        gt=0,
        le=31_536_000,
        description="Maximum seconds per source or shard; after that its worker process is killed",
    )
    cache_bytes: int = Field(
        DEFAULT_CACHE_BYTES, ge=0, le=10**15, description="Maximum bytes of local copies of files from a remote store"
    )
    task_seconds: float = Field(
        60.0,
        ge=0,
        le=86_400,
        description="Target seconds per task run; small shards are grouped up to it; 0: one task run per shard",
    )


class RaySettings(Section):
    """Ray cluster and resources per task, for run.engine = "ray"."""

    address: str = Field(
        "", description="Cluster to join: auto (the one on this machine) or HOST:6379; empty starts Ray on this machine"
    )
    cpus: float = Field(1.0, gt=0, le=1024, description="CPUs per task that computes shards or blocks")
    memory: int = Field(0, ge=0, le=2**50, description="Bytes of memory per task of shards or blocks; 0: unspecified")
    teacher_cpus: float = Field(1.0, gt=0, le=1024, description="CPUs per teacher task")
    teacher_gpus: float = Field(0.0, ge=0, le=64, description="GPUs per teacher task")
    teacher_memory: int = Field(0, ge=0, le=2**50, description="Bytes of memory per teacher task; 0: unspecified")


class WatchSettings(Section):
    """When a new snapshot of the corpus starts a run automatically."""

    cron: str = Field("0 * * * *", min_length=9, description="Schedule of the checks for a new snapshot (cron, UTC)")
    active: bool = Field(False, description="Check on the schedule; otherwise check only on an event or a manual start")
    folder: str = Field(
        "", description="Folder whose subfolders are snapshots; empty: corpus.url is a single snapshot that grows"
    )
    settle_seconds: float = Field(
        60.0, ge=0, le=86_400, description="Seconds without a change after which a snapshot counts as complete"
    )
    warm_start: Literal["", "champion"] = Field(
        "", description="champion: start from the registered champion if one exists; empty: use train.warm_start"
    )

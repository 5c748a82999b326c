"""Defines the fine-tuning protocol: the evaluation sets, and how each model is fine-tuned and tested on them.

    protocol = load_protocol("deployments/score/flue.toml")
    protocol.tuning_of("xnli").lr, protocol.seeds

Student, teacher, control and any other model are scored by the same protocol, so that a difference between scores is
a difference between models. The first seed trains with each learning rate of the grid and selects the best one on the
validation split; the other seeds train with the selected rate. Each fine-tuning run stops early and keeps its best
epoch on the validation split. The test split is predicted once per seed, after the selection.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, model_validator

from storage.errors import FatalError
from tasks.eval.datasets.dataset_files import SetLocation
from tasks.recipe.config import Section
from tasks.recipe.load import read_toml, validated

SetName = Literal["cls", "cls-books", "cls-dvd", "cls-music", "paws-x", "xnli", "ner"]

SCHEMA = 1
"""Must be increased when a change of the fine-tuning code or of the loaders changes the figures of a protocol."""


class Tuning(Section):
    """Fine-tuning settings of one set, the same for all compared models."""

    lr: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (1e-5, 3e-5, 5e-5), min_length=1, max_length=8, description="Peak learning rates to try; linear decay"
    )
    epochs: int = Field(3, ge=1, le=200, description="Maximum number of passes over the train split")
    patience: int = Field(
        2, ge=0, le=200, description="Stop after this many epochs without a better validation score; 0: never"
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the steps that are warm-up")
    batch_rows: int = Field(16, ge=1, le=100_000, description="Rows per training step")
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW weight decay")
    dropout: float = Field(0.1, ge=0, lt=1, description="Replaces every dropout probability in the model's config")
    max_tokens: int = Field(
        256, ge=8, le=8192, description="Longest input in sub-words; lower if the model accepts fewer"
    )
    train_rows: int = Field(0, ge=0, le=10**9, description="Train rows, evenly spaced over the split; 0 means all")
    labelled: Literal["all", "first"] = Field(
        "all",
        description="Named entities: sub-words of a word that carry loss and count in sub-word F1, all or the first",
    )


class SetPlan(Section):
    """Location of a set, and the fields of [tuning] that the set overrides."""

    hub: str = Field("", description="Id of the data set on the hub; empty if it is not on the hub")
    folder: str = Field("", description="Folder of the configuration on the hub")
    revision: str = Field("", description="Commit or tag on the hub; empty means the latest")
    path: str = Field("", description="Folder below score.sets; empty means the same folder as on the hub")
    rows: dict[Literal["train", "validation", "test"], int] = Field(
        default_factory=dict, description="Number of published rows that each split must have; empty means any number"
    )
    tuning: dict[str, Any] = Field(default_factory=dict, description="Fields of [tuning] that this set overrides")

    def location(self, name: str, root: str) -> SetLocation:
        """Returns the location below `root`, or on the hub if `root` is empty. FatalError if both are empty."""
        if root:
            return SetLocation(f"{root.rstrip('/')}/{self.path or self.folder}".rstrip("/"))
        if not self.hub:
            raise FatalError(f"{name} is not on the hub; set score.sets to the folder or URL that contains it")
        return SetLocation(self.hub, self.folder, self.revision)


class Protocol(Section):
    """All settings of an evaluation by fine-tuning: the sets, the seeds and the hyperparameters."""

    name: str = Field(
        max_length=100, pattern=r"^[a-z0-9][a-z0-9._-]*$", description="Short name, shown next to the figures"
    )
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(
        (0, 1, 2), min_length=3, max_length=100, description="Seeds of fine-tuning; the first selects the learning rate"
    )
    tuning: Tuning = Field(Tuning(), description="How models are fine-tuned on every set")
    sets: dict[SetName, SetPlan] = Field(min_length=1, description="Sets by name")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: contains a duplicate; remove it")
        for name in self.sets:
            self.tuning_of(name)
        return self

    def tuning_of(self, name: str) -> Tuning:
        """Returns the tuning of one set, including its overrides. ValueError if a field is invalid."""
        return Tuning.model_validate(self.tuning.model_dump() | self.sets[cast(SetName, name)].tuning)


def load_protocol(path: str | Path) -> Protocol:
    """Reads a protocol file. FatalError, which names the file and the field, if a value is invalid."""
    path = Path(path)
    return validated(Protocol, read_toml(path, "protocol"), str(path), "protocol")

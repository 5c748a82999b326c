"""The fine-tuning protocol: the evaluation sets, and how each model is fine-tuned and tested on them.

    protocol = load_protocol("deployments/score/flue.toml")
    protocol.tuning_of("xnli").lr, protocol.seeds

Student, teacher, control and any other model are scored by the same protocol, so that a difference between figures is
a difference between models. The first seed trains with each learning rate of the grid and selects the best on the
validation split; the other seeds train with the selected rate. Each training stops early and keeps its best epoch on
the validation split. The test split is predicted once per seed, after the selection.
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
"""Increases when a change of the fine-tuning code or of the loaders changes the figures of a protocol."""


class Tuning(Section):
    """How a model is fine-tuned on one set; the same for all compared models."""

    lr: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (1e-5, 3e-5, 5e-5), min_length=1, max_length=8, description="Peak learning rates to try; linear decay"
    )
    epochs: int = Field(3, ge=1, le=200, description="Maximum number of passes over the train split")
    patience: int = Field(2, ge=0, le=200, description="Stop after this many epochs without a better one; 0: never")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the steps that are warm-up")
    batch_rows: int = Field(16, ge=1, le=100_000, description="Rows in one step")
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW weight decay")
    dropout: float = Field(0.1, ge=0, lt=1, description="Replaces every dropout probability in the model's config")
    max_tokens: int = Field(256, ge=8, le=8192, description="Longest input in sub-words; the model may lower it")
    train_rows: int = Field(0, ge=0, le=10**9, description="Train rows, evenly spaced over the split; 0 means all")
    labelled: Literal["all", "first"] = Field(
        "all",
        description="Named entities: sub-words with loss that count in sub-word F1: all of a word, or its first",
    )


class SetPlan(Section):
    """Location of a set, and the fields of the protocol's tuning that the set changes."""

    hub: str = Field("", description="Id of the data set on the hub; empty: it is not on the hub")
    folder: str = Field("", description="Folder of the configuration on the hub")
    revision: str = Field("", description="Commit or tag on the hub; empty means the latest")
    path: str = Field("", description="Folder below score.sets; empty: the hub's folder")
    rows: dict[Literal["train", "validation", "test"], int] = Field(
        default_factory=dict, description="Number of rows that each split must have as published; empty: any number"
    )
    tuning: dict[str, Any] = Field(default_factory=dict, description="Fields of [tuning] that this set changes")

    def location(self, name: str, root: str) -> SetLocation:
        """Location of the files: below `root` if it is given, else on the hub. FatalError if neither is known."""
        if root:
            return SetLocation(f"{root.rstrip('/')}/{self.path or self.folder}".rstrip("/"))
        if not self.hub:
            raise FatalError(f"{name} is not on the hub; name the folder or URL that holds it in score.sets")
        return SetLocation(self.hub, self.folder, self.revision)


class Protocol(Section):
    """A complete fine-tuning protocol."""

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
            raise ValueError("seeds: one is named twice")
        for name in self.sets:
            self.tuning_of(name)
        return self

    def tuning_of(self, name: str) -> Tuning:
        """The tuning of one set, including the set's own changes. ValueError for an invalid field."""
        return Tuning.model_validate(self.tuning.model_dump() | self.sets[cast(SetName, name)].tuning)


def load_protocol(path: str | Path) -> Protocol:
    """Reads a protocol file. FatalError with the file and the field if a value is invalid."""
    path = Path(path)
    return validated(Protocol, read_toml(path, "protocol"), str(path), "protocol")

"""The protocol of the fine-tuned sets as data: which sets, and how every model is tuned and tested on them.

    protocol = load_protocol("deployments/score/flue.toml")
    protocol.tuning_of("xnli").lr, protocol.seeds

One protocol object scores student, teacher, control and any other model, so that a difference between figures is one
between models. How it reads: with the first seed, every learning rate of the grid is tried and the one that is best
on the validation split is taken; the other seeds train with that one. Each training keeps its best epoch by the
validation split and stops early; its test split is looked at once.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, model_validator

from storage.errors import FatalError
from tasks.eval.datasets.files import Place
from tasks.recipe.config import Section
from tasks.recipe.load import read_toml, validated

SetName = Literal["cls", "cls-books", "cls-dvd", "cls-music", "paws-x", "xnli", "ner"]

SCHEMA = 1
"""Changes when fine-tuning or loaders change what a protocol means."""


class Tuning(Section):
    """How a model is fine-tuned on one set; the same for every model that is compared."""

    lr: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (1e-5, 3e-5, 5e-5), min_length=1, max_length=8, description="Highest learning rates to try; linear decay"
    )
    epochs: int = Field(3, ge=1, le=200, description="Most passes over the train split")
    patience: int = Field(2, ge=0, le=200, description="Stop after as many epochs without a better one; 0: never")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the steps that warm up")
    batch_rows: int = Field(16, ge=1, le=100_000, description="Rows in one step")
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW weight decay")
    dropout: float = Field(0.1, ge=0, lt=1, description="Of every kind that the model has, whatever its config says")
    max_tokens: int = Field(256, ge=8, le=8192, description="Longer inputs are cut (and by what the model can read)")
    train_rows: int = Field(0, ge=0, le=10**9, description="Train on so many rows, evenly spread; 0 means all")
    labelled: Literal["all", "first"] = Field(
        "all",
        description="Named entities: sub-words that carry loss and count in sub-word F1, all of a word or its first",
    )


class SetPlan(Section):
    """Where a set is and what it changes of the protocol's tuning."""

    hub: str = Field("", description="Id of the data set on the hub; empty: it is not there")
    folder: str = Field("", description="Folder of the configuration on the hub")
    revision: str = Field("", description="Commit or tag on the hub; empty means the newest")
    path: str = Field("", description="Folder below score.sets; empty: the hub's folder")
    rows: dict[Literal["train", "validation", "test"], int] = Field(
        default_factory=dict, description="Rows that each split must have as published; empty: any number"
    )
    tuning: dict[str, Any] = Field(default_factory=dict, description="Fields of [tuning] that this set changes")

    def place(self, name: str, root: str) -> Place:
        """Where the files are: below `root` if it is given, else on the hub. FatalError if neither is known."""
        if root:
            return Place(f"{root.rstrip('/')}/{self.path or self.folder}".rstrip("/"))
        if not self.hub:
            raise FatalError(f"{name} is not on the hub; name the folder or URL that holds it in score.sets")
        return Place(self.hub, self.folder, self.revision)


class Protocol(Section):
    """One whole protocol."""

    name: str = Field(
        max_length=100, pattern=r"^[a-z0-9][a-z0-9._-]*$", description="Short name; it is shown beside the figures"
    )
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(
        (0, 1, 2), min_length=3, max_length=100, description="Seeds of fine-tuning; the first chooses the learning rate"
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
        """The tuning of one set, with what the set changes. ValueError for a field that does not fit."""
        return Tuning.model_validate(self.tuning.model_dump() | self.sets[cast(SetName, name)].tuning)


def load_protocol(path: str | Path) -> Protocol:
    """Reads a protocol file. FatalError that names the file and the field where something does not fit."""
    path = Path(path)
    return validated(Protocol, read_toml(path, "protocol"), str(path), "protocol")

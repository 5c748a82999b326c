"""Defines the recipe, which contains all settings of a run, with one Pydantic model per section of the TOML file.

    recipe = load_recipe("deployments/pilot.toml")             # tasks/recipe/load.py
    recipe.train.lr, recipe.with_changes({"train.lr": 1e-3})

The same models are the parameter form of the Prefect deployments. The sections are defined in
tasks/recipe/training_settings.py and tasks/recipe/operation_settings.py; `Recipe` checks the rules across sections.
"""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import ConfigDict, Field, model_validator

from storage.files.filesystem import CREDENTIALS, has_password
from tasks.recipe.operation_settings import (
    GateSettings,
    RaySettings,
    RegisterSettings,
    RunSettings,
    ScoreSettings,
    WatchSettings,
)
from tasks.recipe.section import Dtype, S, Section
from tasks.recipe.training_settings import (
    BlockSettings,
    CorpusSettings,
    LossSettings,
    MaskSettings,
    StudentSettings,
    TargetSettings,
    TeacherSettings,
    TrainSettings,
)

__all__ = [
    "BlockSettings",
    "CorpusSettings",
    "Dtype",
    "GateSettings",
    "LossSettings",
    "MaskSettings",
    "RaySettings",
    "Recipe",
    "RegisterSettings",
    "RunSettings",
    "S",
    "ScoreSettings",
    "Section",
    "StudentSettings",
    "TargetSettings",
    "TeacherSettings",
    "TrainSettings",
    "WatchSettings",
]


class Recipe(Section):
    """A recipe: the settings of one distillation, section by section."""

    name: str = Field(
        max_length=100, pattern=r"^[a-z0-9][a-z0-9._-]*$", description="Name of the recipe and of its runs"
    )
    home: str = Field("", description="Folder of local state; empty: .distil in the current folder")
    store: str = Field("", description="Root of the artifact store: a path or any fsspec URL; empty: HOME/store")
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

    model_config = ConfigDict(populate_by_name=True)

    def with_changes(self, changes: Mapping[str, Any]) -> Self:
        """Returns a copy with some fields replaced, such as `{"train.lr": 1e-3}`.

        The new values are not validated. Raises KeyError if the recipe has no such field.
        """
        updated: dict[str, Any] = {}
        for name, value in changes.items():
            section, _, field = name.rpartition(".")
            section = "register_as" if section == "register" else section
            if section and section not in Recipe.model_fields:
                raise KeyError(name)
            owner = updated.get(section, getattr(self, section)) if section else self
            if field not in type(owner).model_fields:
                raise KeyError(name)
            if section:
                updated[section] = owner.model_copy(update={field: value})
            else:
                updated[field] = value
        return self.model_copy(update=updated)

    @model_validator(mode="after")
    def _has_no_password(self) -> Self:
        urls = {
            "store": self.store,
            "corpus.url": self.corpus.url,
            "watch.folder": self.watch.folder,
            "score.sets": self.score.sets,
            "register.artifacts": self.register_as.artifacts,
        }
        for field, url in urls.items():
            if has_password(url):
                raise ValueError(f"{field} contains a password; remove it and {CREDENTIALS}")
        if has_password(self.register_as.tracking_uri):  # forms, parameters and runs show the recipe
            raise ValueError(
                "register.tracking_uri contains a password; clear it and set MLFLOW_TRACKING_URI to the URI instead"
            )
        return self

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.targets.encoding == "topk" and self.targets.source == "cached" and self.loss.cosine > 0:
            raise ValueError(
                "targets.encoding = topk stores no hidden states, so loss.cosine must be 0; otherwise use int8"
            )
        if self.loss.needs_teacher and not self.teacher.model:
            raise ValueError("loss.distil or loss.cosine is above 0, which requires a teacher; set teacher.model")
        if not self.teacher.model and not self.blocks.tokenizer:
            raise ValueError("blocks.tokenizer is required if teacher.model is empty")
        if self.student.init != "config" and not self.teacher.model:
            raise ValueError('student.init must be "config" if teacher.model is empty')
        if self.student.init == "config" and "model_type" not in self.student.config:
            raise ValueError('student.init = "config" requires a model_type in student.config')
        if self.student.choice and len(self.student.choice) != self.student.layers:
            raise ValueError("student.choice must list exactly student.layers layers")
        if self.corpus.max_chars < self.corpus.min_chars:
            raise ValueError("corpus.max_chars is below corpus.min_chars; raise it or lower corpus.min_chars")
        return self

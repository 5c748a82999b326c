"""Finds the models to score, by folder, hub id or registered name; their scores are keyed by model content.

find_model(recipe, "models:/distilled@champion")
teacher_of(recipe), control_of(recipe)              # None if the recipe has none
"""

from dataclasses import dataclass, replace
from pathlib import Path

from flows.home import REGISTERED
from flows.tracking.model_registry import fetch_model, open_registry
from storage.errors import FatalError
from tasks.eval.protocol import Protocol, load_protocol
from tasks.eval.scores import Scores
from tasks.lineage import vocabulary_of
from tasks.models.model_files import model_content_key, resolve_model
from tasks.recipe.config import Recipe
from tasks.release.results import TEACHER
from tasks.tokens.vocabulary import load_vocabulary

STUDENT, CONTROL = "student", "control"


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to score: its name in tables, the key of its scores, and its folder.

    `uri` is models:/NAME/VERSION for a registered model, else "".
    """

    name: str
    key: str
    folder: Path
    uri: str = ""


@dataclass(frozen=True)
class ScoredModels:
    """Scores by model and data set (values, or `not run` with a reason), and one sentence per failed score."""

    scores: dict[str, dict[str, Scores]]
    failures: tuple[str, ...] = ()


def protocol_of(recipe: Recipe) -> Protocol | None:
    """Loads the protocol of the fine-tuned data sets, or returns None if none is set. FatalError: it is invalid."""
    return load_protocol(recipe.score.protocol) if recipe.score.protocol else None


def teacher_of(recipe: Recipe) -> EvaluatedModel | None:
    """Returns the recipe's teacher as a model to compare with, or None if the recipe has no teacher."""
    if not recipe.teacher.model:
        return None
    folder = resolve_model(recipe.teacher.model, recipe.teacher.revision)
    return EvaluatedModel(
        TEACHER, model_content_key(folder, trust_remote_code=recipe.teacher.trust_remote_code), folder
    )


def control_of(recipe: Recipe) -> EvaluatedModel | None:
    """Returns the recipe's control as a model to compare with, or None if the recipe has no control.

    FatalError: the control and the student have different tokenizers.
    """
    if not recipe.score.control:
        return None
    control = find_model(recipe, recipe.score.control)
    if with_tokenizer_of(recipe, control.folder) is not recipe:
        raise FatalError(
            f"score.control = {recipe.score.control} has a different tokenizer from the student, so their scores on "
            "held-out text cannot be compared; use a model with the same tokenizer"
        )
    return replace(control, name=CONTROL)


def find_model(recipe: Recipe, model: str) -> EvaluatedModel:
    """Finds a model by folder, hub id or registered name, and returns it keyed by its content.

    FatalError: the model does not exist.
    """
    uri = open_registry(recipe).version_at(model).uri if model.startswith(REGISTERED) else ""
    folder = fetch_model(recipe, uri) if uri else resolve_model(model)
    return EvaluatedModel(
        model, model_content_key(folder, trust_remote_code=recipe.teacher.trust_remote_code), folder, uri
    )


def with_tokenizer_of(recipe: Recipe, folder: Path) -> Recipe:
    """Returns the recipe itself if the model in `folder` has the recipe's tokenizer.

    Else returns a recipe with the model's tokenizer and without a teacher.
    """
    if load_vocabulary(str(folder)).fingerprint == vocabulary_of(recipe).fingerprint:
        return recipe
    return recipe.with_changes({"blocks.tokenizer": str(folder), "teacher.model": ""})

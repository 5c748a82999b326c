"""Checks within seconds whether a recipe has anything left to do. Reads only the store; needs no server and no MLflow.

    done = all_done(workspace)              # None, or the final sentence and table of the earlier run
    show_done(workspace, done)              # prints the table with the paths and addresses of this machine

Called by `distil run` before it starts a server, and by the flow `distill`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flows.home import link_model, registry_name, tracking_uri
from flows.inventory import planned_key
from flows.views.links import MADE, MODEL, WHERE, location_rows
from flows.views.tables import Rows, Table, number, show_table
from storage.artifact import Ref
from storage.fingerprint import canonical_json, sha256_bytes
from tasks.eval.protocol import load_protocol
from tasks.lineage import Workspace
from tasks.recipe.config import Recipe
from tasks.recipe.run_json import RunSpec, model_ref

TOPIC = "finished-2"
"""Topic of the notes in the store. Notes of the first version do not contain the number of blocks."""

OLD_TABLE = "sheet"
"""Name of the table in notes that were written before 2026-11-28."""


@dataclass(frozen=True)
class Done:
    """The result of a finished recipe: a sentence for the user, the sections of its final table, and its model."""

    sentence: str
    sections: Mapping[str, Rows]
    model: Ref


def all_done(workspace: Workspace) -> Done | None:
    """Returns the result of the recipe, or None if any artifact, score or registration is missing."""
    store, recipe, lineage = workspace.store, workspace.recipe, workspace.lineage
    if not lineage.shards or lineage.lacks(store):
        return None
    run_key = planned_key(workspace)
    model = model_ref(run_key, recipe.name)
    note = store.recall(TOPIC, _name(recipe, run_key))
    if note is None or store.missing([model]):
        return None
    sentence = (
        f"nothing to do: {number(len(lineage.shards))} shards, {number(note['rows'])} blocks, "
        f"{number(len(lineage.targets))} targets and model {model.label} ({model.key[:12]}) already exist"
    )
    sections = {heading: [(name, text) for name, text in rows] for heading, rows in _table_of(note)}
    return Done(sentence, sections, model)


def show_done(workspace: Workspace, done: Done, command: str = "") -> None:
    """Prints the final table with the folders and servers of this home, and links HOME/models/NAME to the model again.

    Both may have changed since the model was trained: the store may be shared by several users, and the link may refer
    to a later model. FatalError: the model is incomplete.
    """
    store, recipe = workspace.store, workspace.recipe
    folder = link_model(recipe, store.verified_folder(store.receipt(done.model)))
    local = {(MADE, MODEL): str(folder)}
    sections: dict[str, Rows] = {
        heading: [(name, local.get((heading, name), text)) for name, text in rows]
        for heading, rows in done.sections.items()
    }
    sections[WHERE] = location_rows(recipe, folder, tracking_uri(recipe), command)
    show_table(Table(recipe.name, sections))


def remember_done(workspace: Workspace, run: RunSpec, sections: Mapping[str, Rows]) -> None:
    """Stores a note that training, registration and scoring of this run are done, with its final table."""
    value = {"rows": run.rows, "table": list(sections.items())}
    workspace.store.remember(TOPIC, _name(workspace.recipe, run.run_key), value)


def _table_of(note: Mapping[str, Any]) -> Any:
    """Returns the final table of a note. Notes of earlier versions store it under the name OLD_TABLE."""
    return note["table"] if "table" in note else note[OLD_TABLE]


def _name(recipe: Recipe, run_key: str) -> str:
    """Returns the name of the note: a hash of all settings that affect whether work is left."""
    protocol = load_protocol(recipe.score.protocol) if recipe.score.protocol else None
    settings = {
        "run": run_key,
        "protocol": protocol.model_dump(mode="json") if protocol else "",
        "score": recipe.score.model_dump(mode="json"),
        "register": recipe.register_as.model_dump(mode="json"),
        "mlflow": registry_name(recipe),
    }
    return sha256_bytes(canonical_json(settings))

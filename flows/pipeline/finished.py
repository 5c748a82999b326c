"""Whether a recipe has anything left to do, asked of the store alone: no server, no MLflow, within seconds.

    done = all_done(store, recipe)          # None, or the sentence and the table of then
    show_done(store, recipe, done)          # prints the table as it is here and now

Called by `distil run` before anything is started, and by the flow `distill`.
"""

from dataclasses import dataclass

from flows import inventory as start
from flows.home import link_model, registry_name, tracking_uri
from flows.views.places import LOOK, MADE, MODEL, places
from flows.views.tables import Rows, number, show_sheet
from storage.artifact import Ref
from storage.fingerprint import canonical_json, sha256_bytes
from storage.store import Store
from tasks.eval.protocol import load_protocol
from tasks.lineage import trace
from tasks.recipe.config import Recipe
from tasks.recipe.run_spec import RunSpec, model_ref

TOPIC = "finished-2"
"""The second: a note of the first form does not say how many blocks there were."""


@dataclass(frozen=True)
class Done:
    """A run with nothing left to do: the sentence that says so, the final table of when it was done, its model."""

    sentence: str
    sheet: dict[str, Rows]
    model: Ref


def all_done(store: Store, recipe: Recipe) -> Done | None:
    """What to say when everything that the recipe asks for is there already, else None."""
    lineage = trace(store, recipe)
    if not lineage.shards or lineage.lacks(store):
        return None
    run_key = start.planned_key(recipe, lineage)
    model = model_ref(run_key, recipe.name)
    noted = store.recall(TOPIC, _name(recipe, run_key))
    if noted is None or store.missing([model]):
        return None
    sentence = (
        f"nothing to do: {number(len(lineage.shards))} shards, {number(noted['rows'])} blocks, "
        f"{number(len(lineage.targets))} targets, model {model.label} ({model.key[:12]}) already there"
    )
    sheet: dict[str, Rows] = {heading: [(name, text) for name, text in rows] for heading, rows in noted["sheet"]}
    return Done(sentence, sheet, model)


def show_done(store: Store, recipe: Recipe, done: Done) -> None:
    """Prints the table with the folders and servers of this home: on a shared store another user may have made it all,
    or the run of another model since then. HOME/models/NAME leads to this model again.

    FatalError: the model is not whole.
    """
    folder = link_model(recipe, store.check(store.receipt(done.model)))
    here = {(MADE, MODEL): str(folder)}
    sheet: dict[str, Rows] = {
        heading: [(name, here.get((heading, name), text)) for name, text in rows]
        for heading, rows in done.sheet.items()
    }
    show_sheet(recipe.name, sheet | {LOOK: places(recipe, folder, tracking_uri(recipe))})


def remember_done(store: Store, recipe: Recipe, run: RunSpec, sheet: dict[str, Rows]) -> None:
    """Notes that training, registration and scores of this run are done."""
    store.remember(TOPIC, _name(recipe, run.run_key), {"rows": run.rows, "sheet": list(sheet.items())})


def _name(recipe: Recipe, run_key: str) -> str:
    protocol = load_protocol(recipe.score.protocol) if recipe.score.protocol else None
    settings = {
        "run": run_key,
        "protocol": protocol.model_dump(mode="json") if protocol else "",
        "score": recipe.score.model_dump(mode="json"),
        "register": recipe.register_as.model_dump(mode="json"),
        "mlflow": registry_name(recipe),
    }
    return sha256_bytes(canonical_json(settings))

"""Whether a recipe has anything left to do, asked of the store alone: no server, no MLflow, within seconds.

    done = all_done(store, recipe)          # None, or the sentence and the table to show

Called by `distil run` before anything is started, and by the flow `distill`.
"""

from dataclasses import dataclass

from flows.report import Rows, number
from storage.fingerprint import canonical_json, sha256_bytes
from storage.store import Store
from tasks.config import Recipe, Teacher
from tasks.lineage import plan_run, trace
from tasks.run import RunSpec
from tasks.teacher import fingerprint_of

TOPIC = "finished"


@dataclass(frozen=True)
class Done:
    """A run with nothing left to do: the sentence that says so, and the final table of when it was done."""

    sentence: str
    sheet: dict[str, Rows]


def warm_start(recipe: Recipe) -> str:
    """Fingerprint of the model that training starts from, or "" if none is named."""
    return fingerprint_of(Teacher(model=recipe.train.warm_start)) if recipe.train.warm_start else ""


def all_done(store: Store, recipe: Recipe) -> Done | None:
    """What to say when everything that the recipe asks for is there already, else None."""
    lineage = trace(store, recipe)
    wanted = [ref for refs in lineage.stages().values() for ref in refs]
    if any(ref is None for _, ref in lineage.sources) or not lineage.shards or store.missing(wanted):
        return None
    run = plan_run(store, recipe, lineage, warm_start=warm_start(recipe))
    noted = store.noted(TOPIC, _name(recipe, run))
    if noted is None or store.missing([run.model_ref]):
        return None
    sentence = (
        f"nothing to do: {number(len(lineage.shards))} shards, {number(run.rows)} blocks, "
        f"{number(len(lineage.targets))} targets, model {run.name} ({run.model_ref.key[:12]}) already there"
    )
    return Done(sentence, {heading: [(name, text) for name, text in rows] for heading, rows in noted["sheet"]})


def remember(store: Store, recipe: Recipe, run: RunSpec, sheet: dict[str, Rows]) -> None:
    """Notes that training, registration and scores of this run are done."""
    store.note(TOPIC, _name(recipe, run), {"sheet": list(sheet.items())})


def _name(recipe: Recipe, run: RunSpec) -> str:
    settings = {
        "run": run.run_key,
        "score": recipe.score.model_dump(mode="json"),
        "register": recipe.register_as.model_dump(mode="json"),
    }
    return sha256_bytes(canonical_json(settings))

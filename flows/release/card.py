"""Publishes the model card and the figure of a trained model.

    publish_card(mlflow_runs, run_id, result)

Both are written to three places: the MLflow run (its page shows the figure), `model/` of the registered version (so
that every download includes README.md), and HOME/models/NAME-card next to the link to the newest model. They are not
added to the model in the store, whose receipt lists its files.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flows.tracking.mlflow_runs import MlflowRuns
from flows.tracking.model_registry import Version
from tasks.eval.scores import Scores
from tasks.lineage import Workspace
from tasks.recipe.run_json import METRICS, RunSpec
from tasks.release.figure import render_figure
from tasks.release.model_card import CardFacts, model_card
from tasks.release.results import summarize_models
from tasks.train.metrics import read_metrics

CARD = "README.md"

FIGURE = "scores.png"


@dataclass(frozen=True)
class TrainedModel:
    """A trained, registered and scored student. `scores` maps each model to its scores; the student comes first."""

    workspace: Workspace
    run: RunSpec
    version: Version
    scores: Mapping[str, Mapping[str, Scores]]


def publish_card(mlflow_runs: MlflowRuns, run_id: str, result: TrainedModel) -> Path:
    """Makes card and figure, stores them with run and version, and returns their folder in the recipe's home."""
    recipe, facts = result.workspace.recipe, card_facts(result)
    files = {
        CARD: model_card(facts).encode("utf-8"),
        FIGURE: render_figure(str(result.version), facts.models),
    }
    mlflow_runs.log_files(run_id, files, result.version)
    folder = Path(recipe.home) / "models" / f"{recipe.name}-card"
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        fresh = folder / f".{name}-{os.getpid()}"
        fresh.write_bytes(data)
        fresh.replace(folder / name)
    return folder


def card_facts(result: TrainedModel) -> CardFacts:
    """Gathers the content of the card from the recipe, receipts, metrics and scores."""
    store, recipe, lineage = result.workspace.store, result.workspace.recipe, result.workspace.lineage
    run = result.run
    model = store.receipt(run.model_ref)
    shards = store.receipts_of(lineage.shards)
    heldout = store.receipts_of(lineage.heldout_shards)
    lines = read_metrics(Path(run.folder) / METRICS)
    return CardFacts(
        name=result.version.name,
        recipe=recipe,
        models=summarize_models(result.scores),
        snapshot=lineage.snapshot.fingerprint,
        sizes={
            "sources": len(lineage.sources),
            "shards": len(shards),
            "documents": sum(receipt.rows for receipt in shards),
            "documents held out": sum(receipt.rows for receipt in heldout),
            "blocks": run.rows,
            "tokens": sum(part.tokens for part in run.manifest),
        },
        layers=int(model.info["layers"]),
        steps=int(model.settings["steps"]),
        tokens=model.tokens,
        seconds=sum(float(line.get("seconds", 0.0)) for line in lines),
        hardware=str(model.info.get("hardware", "")),
        run_key=run.run_key,
        model_key=run.model_ref.key,
        versions=model.versions,
        figure=FIGURE,
    )

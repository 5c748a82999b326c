"""Records scores in MLflow as one child run per model and data set, which MLflow's UI can compare.

    record_scores(mlflow_runs, parent, key, scored)

The flows `distill` and `score` call it with their own run as parent.
"""

from collections.abc import Mapping
from typing import Any

from flows.scoring.evaluated_models import ScoredModels
from flows.tracking.mlflow_runs import MlflowRuns
from tasks.eval.scores import Scores, was_run

AGAINST = ("against_teacher", "against_first")


def record_scores(mlflow_runs: MlflowRuns, parent: str, key: str, scored: ScoredModels) -> None:
    """Records each data set of each model as a child run. Tags of the parent show which were run, or why not."""
    first = next(iter(scored.scores))
    for model, scores in scored.scores.items():
        suffix = "" if model == first else f"-{model}"
        outcomes = {
            part: "run" if was_run(figures) else f"not run: {figures['reason']}" for part, figures in scores.items()
        }
        mlflow_runs.set_tags(parent, {f"distil.score.{part}{suffix}": text for part, text in outcomes.items()})
        for part, figures in scores.items():
            if not was_run(figures):
                continue
            settings = {"model": model, "set": part}
            name = f"score-{part}{suffix}"
            child = mlflow_runs.start_or_resume_run(name, key, f"{model} {part}", parent=parent, settings=settings)
            mlflow_runs.log_metrics(child, plain_figures(figures))
            mlflow_runs.log_json(child, f"{part}.json", figures)
            mlflow_runs.end(child)


def plain_figures(figures: Scores) -> Scores:
    """Returns the values of a data set by flat name.

    A fine-tuned data set has mean, standard deviation and interval over seeds: `accuracy`, `accuracy.sd`,
    `accuracy.low` and `accuracy.high`. Comparisons are named `against_teacher.ratio`, `against_teacher.ratio.low` etc.
    """
    own = {name: value for name, value in figures.items() if name not in (*AGAINST, "by_block")}
    found = {"lr": figures["lr"]} | _with_means(figures["summary"]) if "summary" in figures else own
    for other in AGAINST:
        for name, values in figures.get(other, {}).items():
            bounds = {f"{other}.{name}.{bound}": values[bound] for bound in ("low", "high")}
            found |= {f"{other}.{name}": values["value"]} | bounds
    return found


def _with_means(summary: Mapping[str, Any], prefix: str = "") -> Scores:
    found: Scores = {}
    for name, values in summary.items():
        if "mean" in values:
            found[f"{prefix}{name}"] = values["mean"]
            found |= {f"{prefix}{name}.{part}": values[part] for part in ("sd", "low", "high") if part in values}
        else:
            found |= _with_means(values, f"{prefix}{name}.")
    return found

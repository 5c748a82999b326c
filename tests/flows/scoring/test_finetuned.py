"""Fine-tuned sets as task runs: names, missing pairs, an absent set, a seed that fails."""

from pathlib import Path
from typing import Any

import pytest
from prefect import flow

from flows.scoring import finetuned as module
from flows.scoring.evaluated_models import EvaluatedModel, ScoredModels
from flows.scoring.finetuned import SeedSelection, finetuned_scores
from storage.errors import FatalError
from storage.store import Store
from tasks.eval import finetuned_scores as work
from tasks.eval.protocol import Protocol
from tasks.lineage import Workspace
from tasks.recipe.config import Recipe
from tests.harness.eval_sets import write_pairs
from tests.harness.recipe_values import simple_recipe

PROTOCOL = Protocol(name="tiny", sets={"xnli": {"path": "xnli"}, "paws-x": {"path": "absent"}})
STUDENT, TEACHER = (
    EvaluatedModel("student", "a" * 64, Path("student")),
    EvaluatedModel("teacher", "b" * 64, Path("teacher")),
)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    write_pairs(tmp_path / "sets" / "xnli", train=12, test=6)
    return simple_recipe(score={"sets": str(tmp_path / "sets")}, run={"retries": 0})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(folder, seed) of every fine-tuning, which is replaced by a stub; seed 1 of the teacher fails."""
    found: list[tuple[str, int]] = []

    def tune(folder: Path, data: Any, task: Any, tuning: Any, seed: int, rates: Any, device: str) -> dict[str, Any]:
        found.append((str(folder), seed))
        if (str(folder), seed) == ("teacher", 1):
            raise FatalError("out of luck")
        gold = " ".join(str(row.label) for row in data.test)
        choice = {"lr": rates[0], "validation": 0.5, "epochs": 1.0, "grid": {}}
        return {"accuracy": 1.0, "macro_f1": 1.0, "predictions": {"gold": gold, "predicted": gold}, "choice": choice}

    monkeypatch.setattr(work, "finetune", tune)
    return found


def scored(
    store: Store, recipe: Recipe, seeds: SeedSelection = module.ALL_SEEDS, teacher: EvaluatedModel | None = TEACHER
) -> ScoredModels:
    @flow(persist_result=False)
    def run() -> None:
        found.append(finetuned_scores(Workspace(store, recipe), PROTOCOL, [STUDENT], teacher, seeds))

    found: list[ScoredModels] = []
    run()
    return found[0]


def test_every_pair_is_a_task_run_of_its_own(
    prefect_api: None, recipe: Recipe, asked: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    real = module.run_one
    monkeypatch.setattr(
        module, "run_one", lambda verb, label, *more: names.append(f"{verb} {label}") or real(verb, label, *more)
    )
    scored(Store(tmp_path / "store"), recipe, teacher=None)
    assert names == ["load xnli", *(f"score xnli seed {seed} student" for seed in (0, 1, 2)), "load paws-x"]


def test_an_absent_set_and_a_failed_seed_hold_back_nothing_else(
    prefect_api: None, recipe: Recipe, asked: list[tuple[str, int]], tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    found = scored(store, recipe)
    assert asked == [(name, seed) for name in ("student", "teacher") for seed in (0, 1, 2)]
    assert found.failures == ("xnli seed 1 of teacher: out of luck",)
    assert found.scores["student"]["xnli"]["summary"]["accuracy"]["mean"] == 1.0
    assert found.scores["teacher"]["xnli"] == {
        "status": "not run",
        "reason": "the scores of seed 1 are missing; repeat the command to compute them",
    }
    for model in ("student", "teacher"):
        assert "no such folder" in found.scores[model]["paws-x"]["reason"]
    asked.clear()
    scored(store, recipe)
    assert asked == [("teacher", 1)]


def test_one_pair_alone_and_forced(
    prefect_api: None, recipe: Recipe, asked: list[tuple[str, int]], tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    scored(store, recipe, SeedSelection("xnli seed 0"), teacher=None)
    assert asked == [("student", 0)]
    scored(store, recipe, SeedSelection("xnli seed 0"), teacher=None)
    assert asked == [("student", 0)]
    scored(store, recipe, SeedSelection("xnli seed 0", force=True), teacher=None)
    assert asked == [("student", 0)] * 2
    assert scored(store, recipe, SeedSelection("paws-x"), teacher=None).scores["student"]["xnli"]["status"] == "not run"
    assert asked == [("student", 0)] * 2

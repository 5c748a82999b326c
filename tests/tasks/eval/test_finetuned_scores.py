"""Fine-tuned scores in the store: keys, the learning rate from the first seed, and figures with intervals."""

import numpy as np
import pytest
import torch

from storage.errors import FatalError
from tasks.eval import finetuned_scores as module
from tasks.eval.datasets.dataset_files import SetLocation
from tasks.eval.datasets.pairs import load_pairs
from tasks.eval.finetuned_scores import (
    compare_models,
    missing_seeds,
    protocol_key,
    score_key_of,
    score_seed,
    scores_of_set,
)
from tasks.eval.protocol import Protocol
from tasks.release.results import results_of_sets
from tests.harness.eval_sets import write_pairs
from tests.harness.tiny import make_teacher

KEY, OTHER = "c" * 64, "d" * 64
PROTOCOL = Protocol(
    name="tiny",
    tuning={"lr": (1e-3, 1e-2), "epochs": 1, "batch_rows": 16, "max_tokens": 32},
    sets={"xnli": {"path": "."}},
)


@pytest.fixture(scope="module")
def xnli(tmp_path_factory):
    return load_pairs("xnli", SetLocation(str(write_pairs(tmp_path_factory.mktemp("xnli"), train=40, test=20))))


@pytest.fixture
def calls(monkeypatch):
    """Replaces fine-tuning by a function that records its calls: (folder, seed, rates)."""
    calls = []

    def tune(folder, data, task, tuning, seed, rates, device):
        calls.append((folder, seed, rates))
        wrong = 2 + seed + (3 if folder == "student" else 0)
        gold = [row.label for row in data.test]
        predicted = [(label + (row < wrong)) % 3 for row, label in enumerate(gold)]
        return {
            "accuracy": float(np.mean(np.array(gold) == predicted)),
            "macro_f1": 0.5,
            "predictions": {"gold": " ".join(map(str, gold)), "predicted": " ".join(map(str, predicted))},
            "choice": {"lr": 1e-2, "validation": 0.7, "epochs": 1.0, "grid": {"0.001": 0.6, "0.01": 0.7}},
        }

    monkeypatch.setattr(module, "finetune", tune)
    return calls


def test_first_seed_selects_the_rate_and_only_missing_scores_are_computed(store, xnli, calls):
    with pytest.raises(FatalError, match="run seed 0 first"):
        score_seed(store, KEY, "m", xnli, PROTOCOL, 1)
    for seed in (0, 2, 0, 1, 2):
        score_seed(store, KEY, "m", xnli, PROTOCOL, seed)
    assert calls == [("m", 0, (1e-3, 1e-2)), ("m", 2, (1e-2,)), ("m", 1, (1e-2,))]
    assert missing_seeds(store, KEY, xnli, PROTOCOL) == []
    assert missing_seeds(store, OTHER, xnli, PROTOCOL) == [0, 1, 2]
    score_seed(store, KEY, "m", xnli, PROTOCOL, 2, force=True)
    assert calls[3:] == [("m", 2, (1e-2,))]


def test_key_depends_on_model_tuning_content_and_seed(xnli, tmp_path):
    other_set = load_pairs("xnli", SetLocation(str(write_pairs(tmp_path, train=40, test=20, seed=5))))
    longer = PROTOCOL.model_copy(update={"tuning": PROTOCOL.tuning.model_copy(update={"epochs": 2})})
    keys = [
        score_key_of(KEY, xnli, PROTOCOL, 0),
        score_key_of(OTHER, xnli, PROTOCOL, 0),
        score_key_of(KEY, other_set, PROTOCOL, 0),
        score_key_of(KEY, xnli, longer, 0),
        score_key_of(KEY, xnli, PROTOCOL, 1),
    ]
    assert len({key.ref.key for key in keys}) == 5
    # An added seed or another name of the protocol changes no key.
    wider = PROTOCOL.model_copy(update={"seeds": (0, 1, 2, 3), "name": "wider"})
    assert score_key_of(KEY, xnli, wider, 0).ref == keys[0].ref
    # The key of the protocol covers all seeds.
    assert len({protocol_key(xnli, one) for one in (PROTOCOL, longer, wider)}) == 3
    assert protocol_key(xnli, PROTOCOL) != protocol_key(other_set, PROTOCOL)


def test_set_has_intervals_and_a_result(store, xnli, calls):
    for key, folder in ((KEY, "student"), (OTHER, "teacher")):
        for seed in PROTOCOL.seeds:
            score_seed(store, key, folder, xnli, PROTOCOL, seed)
    found = scores_of_set(store, KEY, xnli, PROTOCOL)
    assert [run["accuracy"] for run in found["runs"].values()] == pytest.approx([0.75, 0.7, 0.65])
    assert found["summary"]["accuracy"]["mean"] == pytest.approx(0.7)
    assert found["summary"]["accuracy"]["low"] < 0.65
    assert (found["metric"], found["lr"]) == ("accuracy", 1e-2)
    assert "predictions" not in str(found)
    (result,) = results_of_sets({"xnli": found})
    assert (result.set_name, result.metric) == ("xnli", "accuracy")
    assert result.values == pytest.approx((0.75, 0.7, 0.65))
    difference = compare_models(store, KEY, OTHER, xnli, PROTOCOL)
    assert difference["ratio"]["value"] == pytest.approx(0.7 / 0.85)
    assert difference["difference"]["rows_high"] <= 0


def test_real_fine_tuning(store, xnli, tmp_path):
    """A tiny model: the other seeds train with the rate that the first selected."""
    torch.set_num_threads(1)
    make_teacher(tmp_path / "model", "modernbert", layers=1)
    runs = [score_seed(store, KEY, tmp_path / "model", xnli, PROTOCOL, seed, device="cpu") for seed in PROTOCOL.seeds]
    assert len(runs[0]["choice"]["grid"]) == 2
    assert {run["choice"]["lr"] for run in runs} == {runs[0]["choice"]["lr"]}
    assert len(runs[1]["choice"]["grid"]) == 1
    assert scores_of_set(store, KEY, xnli, PROTOCOL)["summary"]["accuracy"]["seeds"] == 3

"""Scores in the store: keyed by model, protocol, set and seed; values that were not run are not stored."""

from storage.store import Store
from tasks.eval.scores import ScoreKey, make_scores, not_run

MODEL = "a" * 64


def test_scores_are_stored_by_model_protocol_set_and_seed(tmp_path):
    store = Store(tmp_path)
    calls = []

    def compute():
        calls.append(1)
        return {"top1": 0.25, "by": {"LOC": 1.0}}

    key = ScoreKey(MODEL, {"lr": 1e-3}, "heldout")
    assert make_scores(store, key, compute) == {"top1": 0.25, "by": {"LOC": 1.0}}
    assert make_scores(store, key, compute) == {"top1": 0.25, "by": {"LOC": 1.0}}
    assert len(calls) == 1
    for other in (
        ScoreKey("b" * 64, {"lr": 1e-3}, "heldout"),
        ScoreKey(MODEL, {"lr": 2e-3}, "heldout"),
        ScoreKey(MODEL, {"lr": 1e-3}, "ner"),
        ScoreKey(MODEL, {"lr": 1e-3}, "heldout", seed=1),
    ):
        make_scores(store, other, compute)
    assert len(calls) == 5
    make_scores(store, key, compute, force=True)
    assert len(calls) == 6


def test_not_run_is_not_stored(tmp_path):
    store, key = Store(tmp_path), ScoreKey(MODEL, {}, "ner")
    assert make_scores(store, key, lambda: not_run("no such set"))["reason"] == "no such set"
    assert not store.has(key.ref)
    assert make_scores(store, key, lambda: {"f1": 1.0}) == {"f1": 1.0}

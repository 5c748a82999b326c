"""Metrics against scikit-learn on the same predictions, and what every row adds to them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from tasks.eval.metrics import entity_scores, pack, row_counts, sentence_scores, unpack

LABELS = ("entailment", "neutral", "contradiction")
labels = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40)
sentence = st.integers(1, 9).flatmap(
    lambda length: st.tuples(*[st.lists(st.integers(0, 4), min_size=length, max_size=length)] * 2)
)


@settings(max_examples=60, deadline=None)
@given(labels)
def test_sentence_scores_equal_scikit_learn(pairs):
    gold, said = (np.array(side) for side in zip(*pairs, strict=True))
    found = sentence_scores(gold, said, LABELS)
    assert found["accuracy"] == pytest.approx(accuracy_score(gold, said))
    expected = f1_score(gold, said, labels=[0, 1, 2], average=None, zero_division=0)
    assert found["macro_f1"] == pytest.approx(np.mean(expected))
    assert [found["by_class"][name]["f1"] for name in LABELS] == pytest.approx(list(expected))
    assert sum(found["by_class"][name]["support"] for name in LABELS) == len(pairs)


@settings(max_examples=60, deadline=None)
@given(labels)
def test_rows_add_up_to_accuracy(pairs):
    gold, said = zip(*pairs, strict=True)
    counts = row_counts("accuracy", {"gold": pack([[one] for one in gold]), "predicted": pack([[one] for one in said])})
    assert counts.shape == (len(pairs), 2)
    assert counts[:, 0].sum() / counts[:, 1].sum() == pytest.approx(accuracy_score(gold, said))


@settings(max_examples=60, deadline=None)
@given(st.lists(sentence, min_size=1, max_size=6))
def test_rows_add_up_to_entity_f1(pairs):
    gold, said = zip(*pairs, strict=True)
    counts = row_counts("entity_f1", {"gold": pack(gold), "predicted": pack(said)}).sum(axis=0)
    assert counts[0] / max(counts[1], 1) == pytest.approx(entity_scores(gold, said)["f1"])


def test_packing_is_undone():
    rows = [[0, 1, 2], [4], [3, 3]]
    assert pack(rows) == "012 4 33"
    assert unpack(pack(rows)) == rows
    assert unpack("") == []

"""Metrics against scikit-learn, seqeval, a count without libraries, and a published model card."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import f1_score as seqeval_f1
from sklearn.metrics import accuracy_score, f1_score

from tasks.eval.metrics import (
    LABELS,
    class_scores,
    entity_scores,
    pack,
    row_counts,
    sentence_scores,
    to_iob,
    unpack,
    weighted_mean,
)

CARD = {  # F1 in per cent and support per class (cmarkea/distilcamembert-base-ner)
    "PER": (96.82, 23_754),
    "LOC": (93.82, 27_196),
    "ORG": (85.98, 6_526),
    "MISC": (86.69, 11_891),
    "O": (99.37, 309_409),
}

sentence = st.integers(1, 9).flatmap(
    lambda length: st.tuples(*[st.lists(st.integers(0, 4), min_size=length, max_size=length)] * 2)
)

NLI_LABELS = ("entailment", "neutral", "contradiction")
labels = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40)


# ---- named entities ----------------------------------------------------------------------------------------


def spans(tags):
    """Entities of one sentence without any library: (type, first word, last word)."""
    found, start = set(), 0
    for end in range(1, len(tags) + 1):
        if end == len(tags) or tags[end] != tags[start]:
            if tags[start]:
                found.add((tags[start], start, end - 1))
            start = end
    return found


def test_published_f1_is_the_mean_weighted_by_support_including_o():
    f1, support = zip(*CARD.values(), strict=True)
    assert round(weighted_mean(f1, support), 2) == 98.18
    assert round(sum(f1) / 5, 2) == 92.54
    assert round(weighted_mean(f1[:4], support[:4]), 2) == 92.89


def test_adjacent_words_of_one_type_are_one_entity():
    assert to_iob([0, 1, 1, 2, 1, 0, 4]) == ["O", "B-LOC", "I-LOC", "B-PER", "B-LOC", "O", "B-ORG"]
    found = entity_scores([[1, 1, 0, 2]], [[1, 1, 0, 2]])
    assert (found["f1"], found["support"]) == (1.0, 2.0)
    # A partly found entity does not count; a type that does not occur has F1 0 and support 0.
    found = entity_scores([[1, 1, 0, 2]], [[1, 0, 0, 2]])
    assert (found["precision"], found["recall"]) == (0.5, 0.5)
    assert found["by_type"]["LOC"]["f1"] == 0
    assert found["by_type"]["ORG"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}


def test_an_entity_ends_with_its_sentence():
    assert entity_scores([[1], [1]], [[1], [1]])["support"] == 2


def test_sentences_without_entities_have_f1_zero_and_different_lengths_fail():
    assert entity_scores([[0, 0]], [[0, 0]])["f1"] == 0
    with pytest.raises(ValueError, match="differ in number"):
        entity_scores([[0, 0]], [[0]])


@settings(max_examples=60, deadline=None)
@given(st.lists(sentence, min_size=1, max_size=6))
def test_entity_scores_equal_a_count_without_libraries_and_seqeval_on_io_tags(pairs):
    gold, predicted = [list(pair[0]) for pair in pairs], [list(pair[1]) for pair in pairs]
    found = entity_scores(gold, predicted)
    true = {(row, *span) for row, tags in enumerate(gold) for span in spans(tags)}
    chosen = {(row, *span) for row, tags in enumerate(predicted) for span in spans(tags)}
    assert found["precision"] == pytest.approx(len(true & chosen) / max(len(chosen), 1))
    assert found["recall"] == pytest.approx(len(true & chosen) / max(len(true), 1))
    assert found["support"] == len(true)
    assert found["f1"] == pytest.approx(2 * len(true & chosen) / max(len(true) + len(chosen), 1))
    for number, name in enumerate(LABELS[1:], start=1):
        of_type = {span for span in true if span[1] == number}
        assert found["by_type"][name]["support"] == len(of_type)
        recall = len(of_type & chosen) / max(len(of_type), 1)
        assert found["by_type"][name]["recall"] == pytest.approx(recall)
    io = [[["O" if tag == 0 else f"I-{LABELS[tag]}" for tag in tags] for tags in side] for side in (gold, predicted)]
    assert found["f1"] == pytest.approx(seqeval_f1(*io, zero_division=0))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_class_scores_equal_scikit_learn(pairs):
    gold, predicted = (np.array(side) for side in zip(*pairs, strict=True))
    found = class_scores(gold, predicted)
    assert found["weighted_f1"] == pytest.approx(f1_score(gold, predicted, average="weighted", zero_division=0))
    assert found["macro_f1"] == pytest.approx(f1_score(gold, predicted, average="macro", zero_division=0))
    by_class = f1_score(gold, predicted, average=None, labels=range(5), zero_division=0)
    assert [found["by_class"][name]["f1"] for name in LABELS] == pytest.approx(list(by_class))
    inside = f1_score(gold, predicted, average="weighted", labels=range(1, 5), zero_division=0)
    assert found["weighted_f1_without_o"] == pytest.approx(inside)


# ---- sentences and rows ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(labels)
def test_sentence_scores_equal_scikit_learn(pairs):
    gold, predicted = (np.array(side) for side in zip(*pairs, strict=True))
    found = sentence_scores(gold, predicted, NLI_LABELS)
    assert found["accuracy"] == pytest.approx(accuracy_score(gold, predicted))
    expected = f1_score(gold, predicted, labels=[0, 1, 2], average=None, zero_division=0)
    assert found["macro_f1"] == pytest.approx(np.mean(expected))
    assert [found["by_class"][name]["f1"] for name in NLI_LABELS] == pytest.approx(list(expected))
    assert sum(found["by_class"][name]["support"] for name in NLI_LABELS) == len(pairs)


@settings(max_examples=60, deadline=None)
@given(labels)
def test_row_counts_add_up_to_accuracy(pairs):
    gold, predicted = zip(*pairs, strict=True)
    counts = row_counts(
        "accuracy", {"gold": pack([[one] for one in gold]), "predicted": pack([[one] for one in predicted])}
    )
    assert counts.shape == (len(pairs), 2)
    assert counts[:, 0].sum() / counts[:, 1].sum() == pytest.approx(accuracy_score(gold, predicted))


@settings(max_examples=60, deadline=None)
@given(st.lists(sentence, min_size=1, max_size=6))
def test_row_counts_add_up_to_entity_f1(pairs):
    gold, predicted = zip(*pairs, strict=True)
    counts = row_counts("entity_f1", {"gold": pack(gold), "predicted": pack(predicted)}).sum(axis=0)
    assert counts[0] / max(counts[1], 1) == pytest.approx(entity_scores(gold, predicted)["f1"])


def test_unpack_reverses_pack():
    rows = [[0, 1, 2], [4], [3, 3]]
    assert pack(rows) == "012 4 33"
    assert unpack(pack(rows)) == rows
    assert unpack("") == []

"""Computes the metrics of the fine-tuned sets: accuracy and F1 of classes, and F1 of named entities.

    sentence_scores(gold, predicted, labels)["accuracy"]        # sentences: scikit-learn's accuracy and F1
    entity_scores(gold, predicted)["f1"]                        # named entities: seqeval's micro F1 over entities
    row_counts("entity_f1", {"gold": ..., "predicted": ...})    # numerator and denominator of the metric per test row

All figures except supports are between 0 and 1. An entity is correct if its type, its first word and its last word are
correct (the CoNLL-2003 definition, as in seqeval). Each metric is a ratio of two sums over test rows (accuracy: correct
rows / rows; entity F1: 2 x correct entities / (predicted + true entities)), so a bootstrap over rows needs only two
numbers per row.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from seqeval.metrics import classification_report
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

LABELS = ("O", "LOC", "PER", "MISC", "ORG")
"""Names of the tags by number, as in the data set Jean-Baptiste/wikiner_fr."""

Tags = Sequence[Sequence[int]]


def to_iob(tags: Sequence[int]) -> list[str]:
    """Converts the IO tags of one sentence to IOB2: a word begins an entity unless the previous word has its type."""
    names = []
    before = 0
    for tag in tags:
        names.append("O" if tag == 0 else f"{'I' if tag == before else 'B'}-{LABELS[tag]}")
        before = tag
    return names


def spans(tags: Sequence[int]) -> set[tuple[str, int, int]]:
    """Returns the entities of one sentence as (type, index of the first word, index of the last word)."""
    return set(get_entities(to_iob(tags)))


def entity_scores(gold: Tags, predicted: Tags) -> dict[str, Any]:
    """Computes entity-level precision, recall, F1 and support: the micro average over all types, and per type.

    {"precision": 0.89, "recall": 0.9, "f1": 0.895, "support": 5123, "by_type": {"LOC": {...}, ...}}

    A type that occurs in neither `gold` nor `predicted` has F1 0 and support 0. ValueError if the true and predicted
    tags of a sentence differ in number.
    """
    if any(len(one) != len(other) for one, other in zip(gold, predicted, strict=True)):
        raise ValueError("gold and predicted tags of a sentence differ in number")
    names = [[to_iob(tags) for tags in side] for side in (gold, predicted)]
    # Without any entity, seqeval averages empty lists and warns.
    no_entity = not any(tag for side in (gold, predicted) for tags in side for tag in tags)
    report = {} if no_entity else classification_report(*names, output_dict=True, zero_division=0)
    by_type = {name: _entry(report.get(name, {})) for name in LABELS[1:]}
    return {**_entry(report.get("micro avg", {})), "by_type": by_type}


def _entry(row: Mapping[str, float]) -> dict[str, float]:
    figures = {"precision": "precision", "recall": "recall", "f1": "f1-score", "support": "support"}
    return {name: float(row.get(column, 0.0)) for name, column in figures.items()}


def class_scores(gold: npt.NDArray[Any], predicted: npt.NDArray[Any]) -> dict[str, Any]:
    """Computes the F1 of the tag classes over positions [N] (sub-words or words).

    {"weighted_f1": 0.98, "macro_f1": 0.93, "weighted_f1_without_o": 0.93, "by_class": {"O": {"f1", "support"}, ...}}

    `weighted_f1` is the mean over classes weighted by support; `macro_f1` is the plain mean over the classes that occur
    in `gold` or `predicted`. Averages that include the frequent class O, as in some publications, exceed entity F1.
    """
    confusion = np.bincount(gold * len(LABELS) + predicted, minlength=len(LABELS) ** 2).reshape(len(LABELS), -1)
    correct, support, chosen = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    f1 = 2 * correct / np.maximum(support + chosen, 1)  # 2 TP / (2 TP + FP + FN)
    return {
        "weighted_f1": weighted_mean(f1, support),
        "weighted_f1_without_o": weighted_mean(f1[1:], support[1:]),
        "macro_f1": float(f1[support + chosen > 0].mean()) if len(gold) else 0.0,
        "by_class": {
            name: {"f1": float(f1[number]), "support": float(support[number])} for number, name in enumerate(LABELS)
        },
    }


def weighted_mean(values: Iterable[float], weights: Iterable[float]) -> float:
    """Returns the weighted mean of `values`; 0 if all weights are 0."""
    pairs = list(zip(values, weights, strict=True))
    total = sum(weight for _, weight in pairs)
    return float(sum(value * weight for value, weight in pairs) / total) if total else 0.0


def sentence_scores(gold: npt.NDArray[Any], predicted: npt.NDArray[Any], labels: Sequence[str]) -> dict[str, Any]:
    """Computes accuracy, macro F1 over all labels, and precision, recall, F1 and support per label with scikit-learn.

    `gold` and `predicted` are label numbers [N]. A label that occurs in neither has F1 0.
    """
    columns = precision_recall_fscore_support(gold, predicted, labels=range(len(labels)), zero_division=0)
    names = ("precision", "recall", "f1", "support")
    by_class = {
        label: {name: float(column[number]) for name, column in zip(names, columns, strict=True)}
        for number, label in enumerate(labels)
    }
    return {
        "accuracy": float(accuracy_score(gold, predicted)),
        "macro_f1": float(np.mean(columns[2])),
        "by_class": by_class,
    }


def pack(rows: Sequence[Sequence[int]]) -> str:
    """Formats the labels or tags (0 to 9) of all test rows as text: one digit each, rows separated by a space."""
    return " ".join("".join(map(str, row)) for row in rows)


def unpack(text: str) -> list[list[int]]:
    """Parses the result of `pack`."""
    return [[int(digit) for digit in row] for row in text.split(" ")] if text else []


def row_counts(metric: str, predictions: Mapping[str, str]) -> npt.NDArray[np.float64]:
    """Returns the numerator and denominator of a metric per test row: [N, 2].

    The metric is the ratio of the two column sums. `metric` is accuracy or entity_f1; `predictions` contains `gold` and
    `predicted` in the format of `pack`.
    """
    pairs = list(zip(unpack(predictions["gold"]), unpack(predictions["predicted"]), strict=True))
    if metric == "accuracy":
        return np.array([(float(gold == predicted), 1.0) for gold, predicted in pairs])
    entities = [(spans(gold), spans(predicted)) for gold, predicted in pairs]
    return np.array([(2.0 * len(gold & found), float(len(gold) + len(found))) for gold, found in entities])

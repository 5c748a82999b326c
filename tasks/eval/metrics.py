"""Metrics of sentence classification, and what each test row adds to a metric. Called by tasks.classify, tasks.tuned.

Accuracy and F1 are scikit-learn's; those of named entities are in tasks.entities. A metric here is a quotient of sums
over test rows (accuracy: right answers of 1 each; entity F1: twice the entities found, of those said and those there),
so a row is two numbers, and a bootstrap over rows needs no predictions any more.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from seqeval.metrics import classification_report
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

LABELS = ("O", "LOC", "PER", "MISC", "ORG")
"""Tag number -> name (Jean-Baptiste/wikiner_fr)."""

Tags = Sequence[Sequence[int]]


def to_iob(tags: Sequence[int]) -> list[str]:
    """IO tags of one sentence as IOB2: a word begins an entity unless the word before has the same type."""
    names = []
    before = 0
    for tag in tags:
        names.append("O" if tag == 0 else f"{'I' if tag == before else 'B'}-{LABELS[tag]}")
        before = tag
    return names


def spans(tags: Sequence[int]) -> set[tuple[str, int, int]]:
    """Entities of one sentence: type, first and last word."""
    return set(get_entities(to_iob(tags)))


def entity_scores(gold: Tags, predicted: Tags) -> dict[str, Any]:
    """Entity-level precision, recall, F1 and support over all types (micro), and the same by type.

    {"precision": 0.89, "recall": 0.9, "f1": 0.895, "support": 5123, "by_type": {"LOC": {...}, ...}}; all shares of 1.
    A type that is neither there nor predicted scores 0 with support 0. ValueError where lengths differ.
    """
    if any(len(one) != len(other) for one, other in zip(gold, predicted, strict=True)):
        raise ValueError("gold and predicted tags of a sentence differ in number")
    names = [[to_iob(tags) for tags in side] for side in (gold, predicted)]
    # Where there is no entity at all, seqeval takes means of nothing and warns.
    nowhere = not any(tag for side in (gold, predicted) for tags in side for tag in tags)
    report = {} if nowhere else classification_report(*names, output_dict=True, zero_division=0)
    by_type = {name: _entry(report.get(name, {})) for name in LABELS[1:]}
    return {**_entry(report.get("micro avg", {})), "by_type": by_type}


def _entry(row: Mapping[str, float]) -> dict[str, float]:
    figures = {"precision": "precision", "recall": "recall", "f1": "f1-score", "support": "support"}
    return {name: float(row.get(column, 0.0)) for name, column in figures.items()}


def class_scores(gold: npt.NDArray[Any], predicted: npt.NDArray[Any]) -> dict[str, Any]:
    """F1 over positions [N], a position being a sub-word (or a word): weighted by support, plain mean, by class.

    {"weighted_f1": 0.98, "macro_f1": 0.93, "weighted_f1_without_o": 0.93, "by_class": {"O": {"f1", "support"}, ...}}
    """
    confusion = np.bincount(gold * len(LABELS) + predicted, minlength=len(LABELS) ** 2).reshape(len(LABELS), -1)
    hits, support, said = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    f1 = 2 * hits / np.maximum(support + said, 1)  # 2 TP / (2 TP + FP + FN)
    return {
        "weighted_f1": weighted_mean(f1, support),
        "weighted_f1_without_o": weighted_mean(f1[1:], support[1:]),
        "macro_f1": float(f1[support + said > 0].mean()) if len(gold) else 0.0,
        "by_class": {
            name: {"f1": float(f1[number]), "support": float(support[number])} for number, name in enumerate(LABELS)
        },
    }


def weighted_mean(values: Iterable[float], weights: Iterable[float]) -> float:
    """Mean of `values`, each counted `weights` times; 0 where all weights are 0."""
    pairs = list(zip(values, weights, strict=True))
    total = sum(weight for _, weight in pairs)
    return float(sum(value * weight for value, weight in pairs) / total) if total else 0.0


def sentence_scores(gold: npt.NDArray[Any], predicted: npt.NDArray[Any], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy, macro F1 over all labels, and by label precision, recall, F1 and support; shares of 1.

    A label that is neither there nor predicted counts as F1 0.
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
    """Labels or tags (0 to 9) of all test rows as text: a digit each, a space between rows."""
    return " ".join("".join(map(str, row)) for row in rows)


def unpack(text: str) -> list[list[int]]:
    """The other way round."""
    return [[int(digit) for digit in row] for row in text.split(" ")] if text else []


def row_counts(metric: str, predictions: Mapping[str, str]) -> npt.NDArray[np.float64]:
    """What each test row adds, [N, 2]: the metric is the sum of the first column over the sum of the second.

    `predictions` are `gold` and `predicted`, packed.
    """
    pairs = list(zip(unpack(predictions["gold"]), unpack(predictions["predicted"]), strict=True))
    if metric == "accuracy":
        return np.array([(float(gold == said), 1.0) for gold, said in pairs])
    counted = [(spans(gold), spans(said)) for gold, said in pairs]
    return np.array([(2.0 * len(gold & said), float(len(gold) + len(said))) for gold, said in counted])

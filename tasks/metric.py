"""Metrics of sentence classification, and what each test row adds to a metric. Called by tasks.classify, tasks.tuned.

Accuracy and F1 are scikit-learn's; those of named entities are in tasks.entities. A metric here is a quotient of sums
over test rows (accuracy: right answers of 1 each; entity F1: twice the entities found, of those said and those there),
so a row is two numbers, and a bootstrap over rows needs no predictions any more.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from tasks.entities import spans


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

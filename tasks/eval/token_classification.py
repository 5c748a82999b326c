"""Defines the fine-tuning task for named entities: one tag per word, scored by F1 over entities.

    finetune(folder, data, TokenTask(), tuning, seed, rates)

The predicted tag of a word is that of its first sub-word. A word without sub-words, or beyond the longest input, is
tagged O. tasks/eval/metrics.py defines the metrics and the conversion of IO tags to entities.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification, PreTrainedTokenizerBase

from tasks.eval.datasets.ner import NerSet, Sentence
from tasks.eval.finetune import Encoded
from tasks.eval.metrics import LABELS, class_scores, entity_scores, pack
from tasks.eval.scores import Scores
from tasks.tokens.mask import IGNORE_INDEX

ENCODE_ROWS = 1000
"""Rows per tokenizer call."""


@dataclass(frozen=True)
class TokenTask:
    """A `FineTuneTask` for sets with one tag per word.

    `labelled` selects the sub-words of a word that carry loss and count in sub-word F1: all of them, or the first.
    """

    labelled: Literal["all", "first"] = "all"
    metric: str = "entity_f1"
    labels: tuple[str, ...] = LABELS

    @property
    def model_class(self) -> Any:
        """Adds a classification head to each sub-word."""
        return AutoModelForTokenClassification

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorForTokenClassification:
        """Pads rows and labels to the longest row of a batch."""
        return DataCollatorForTokenClassification(tokenizer)

    def encode(
        self, rows: Sequence[Sentence], tokenizer: PreTrainedTokenizerBase, limit: int, types: bool
    ) -> list[Encoded]:
        """Encodes all sentences, truncated to `limit` sub-words including special tokens."""
        return list(self._encode(rows, tokenizer, limit))

    def _encode(self, rows: Sequence[Sentence], tokenizer: Any, limit: int) -> Iterator[Encoded]:
        for start in range(0, len(rows), ENCODE_ROWS):
            part = rows[start : start + ENCODE_ROWS]
            words = [list(sentence.words) for sentence in part]
            batch = tokenizer(words, is_split_into_words=True, truncation=True, max_length=limit)
            for number, sentence in enumerate(part):
                input_ids, word_ids = batch["input_ids"][number], batch.word_ids(number)
                features = {
                    "input_ids": input_ids,
                    "attention_mask": [1] * len(input_ids),
                    "labels": subword_labels(sentence, word_ids, self.labelled),
                }
                yield Encoded(features, word_ids)

    def scores(self, rows: Sequence[Sentence], encoded: Sequence[Encoded], predicted: npt.NDArray[Any]) -> Scores:
        """Computes figures over entities and over sub-words.

        Returns `entity_f1`, `entity` (precision, recall and F1, also per type) and `subword` (F1 of the tag classes
        over sub-words).
        """
        word_level = [
            word_tags(sentence, one.word_ids, tags)
            for sentence, one, tags in zip(rows, encoded, predicted, strict=True)
        ]
        entity = entity_scores([sentence.tags for sentence in rows], word_level)
        labels = np.concatenate([one.features["labels"] for one in encoded])
        chosen = np.concatenate([tags[: len(one.word_ids)] for one, tags in zip(encoded, predicted, strict=True)])
        counted = labels != IGNORE_INDEX
        subword = class_scores(labels[counted], chosen[counted])
        return {"entity_f1": entity["f1"], "entity": entity, "subword": subword}

    def test_rows(self, data: NerSet) -> Sequence[Sentence]:
        """Returns the test split with duplicates, since figures with duplicates are reported as well."""
        return data.test_published

    def test_scores(self, data: NerSet, encoded: Sequence[Encoded], predicted: npt.NDArray[Any], limit: int) -> Scores:
        """Computes figures on the test split without duplicates.

        `as_published` contains the two main figures with duplicates. `cut_words` counts the words of the test split
        beyond the longest input.
        """
        rows = list(data.distinct)
        own = [encoded[row] for row in rows]
        published = self.scores(data.test_published, encoded, predicted)
        tags = [
            word_tags(sentence, one.word_ids, predicted[row])
            for sentence, one, row in zip(data.test, own, rows, strict=True)
        ]
        return self.scores(data.test, own, predicted[rows]) | {
            "as_published": {
                "entity_f1": published["entity_f1"],
                "subword_weighted_f1": published["subword"]["weighted_f1"],
            },
            "test_rows": len(rows),
            "cut_words": _cut_words(data.test, own, limit),
            "predictions": {"gold": pack([sentence.tags for sentence in data.test]), "predicted": pack(tags)},
        }


def word_tags(sentence: Sentence, word_ids: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """Returns one tag per word: the tag of its first sub-word, or O (0) if it has no sub-word."""
    result = [0] * len(sentence.words)
    for position, word in reversed(list(enumerate(word_ids))):
        if word is not None:
            result[word] = int(tags[position])  # in reverse order, so that the first sub-word is written last
    return result


def subword_labels(sentence: Sentence, word_ids: Sequence[int | None], labelled: str) -> list[int]:
    """Returns the true tag of each sub-word, or IGNORE_INDEX for special tokens.

    If `labelled` is "first", all sub-words of a word except the first have IGNORE_INDEX too.
    """
    labels = []
    before = None
    for word in word_ids:
        carries_loss = word is not None and (labelled == "all" or word != before)
        labels.append(sentence.tags[word] if carries_loss and word is not None else IGNORE_INDEX)
        before = word
    return labels


def _cut_words(sentences: Sequence[Sentence], encoded: Sequence[Encoded], limit: int) -> int:
    """Counts the words that truncation removed. Only an input of exactly `limit` sub-words can lack words."""
    cut = 0
    for sentence, one in zip(sentences, encoded, strict=True):
        if len(one.word_ids) == limit:
            last = max((word for word in one.word_ids if word is not None), default=-1)
            cut += len(sentence.words) - 1 - last
    return cut

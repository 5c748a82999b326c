"""Fine-tuning on words with tags: how they are read, and what is measured. A craft of tasks.finetune.

    finetune(folder, data, TagCraft(), tuning, seed, rates)

A word's tag is what its first sub-word is given; a word without sub-words, or behind the longest input, counts as O.
See tasks.entities for the metrics and the rule by which IO tags become entities.
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


@dataclass(frozen=True)
class TokenTask:
    """The craft of sets with a tag a word. `labelled`: sub-words that carry loss and count in sub-word F1."""

    labelled: Literal["all", "first"] = "all"
    metric: str = "entity_f1"
    labels: tuple[str, ...] = LABELS

    @property
    def model_class(self) -> Any:
        """A head on every sub-word."""
        return AutoModelForTokenClassification

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorForTokenClassification:
        """Pads rows and labels to the longest row of a batch."""
        return DataCollatorForTokenClassification(tokenizer)

    def encode(
        self, rows: Sequence[Sentence], tokenizer: PreTrainedTokenizerBase, limit: int, types: bool
    ) -> list[Encoded]:
        """Sub-words of each sentence, cut after `limit`, special tokens included."""
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
        """`entity_f1`; `entity`: precision, recall, F1, and by type; `subword`: F1 of classes over sub-words."""
        words = [
            word_tags(sentence, one.word_ids, tags)
            for sentence, one, tags in zip(rows, encoded, predicted, strict=True)
        ]
        entity = entity_scores([sentence.tags for sentence in rows], words)
        labels = np.concatenate([one.features["labels"] for one in encoded])
        said = np.concatenate([tags[: len(one.word_ids)] for one, tags in zip(encoded, predicted, strict=True)])
        counted = labels != IGNORE_INDEX
        subword = class_scores(labels[counted], said[counted])
        return {"entity_f1": entity["f1"], "entity": entity, "subword": subword}

    def test_rows(self, data: NerSet) -> Sequence[Sentence]:
        """The test split with its duplicates, so that figures with them can be given too."""
        return data.test_published

    def test_scores(self, data: NerSet, encoded: Sequence[Encoded], predicted: npt.NDArray[Any], limit: int) -> Scores:
        """Figures on the test split without duplicates, and `as_published` the two main ones with them.

        `cut_words` of the test split stand behind the longest input.
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
    """One tag a word: that of its first sub-word, O where it has none."""
    found = [0] * len(sentence.words)
    for place, word in reversed(list(enumerate(word_ids))):
        if word is not None:
            found[word] = int(tags[place])  # backwards, so the first sub-word has the last word
    return found


def subword_labels(sentence: Sentence, word_ids: Sequence[int | None], labelled: str) -> list[int]:
    """The true tag of every sub-word; IGNORED for special tokens and, when only the first is labelled, the others."""
    labels = []
    before = None
    for word in word_ids:
        counts = word is not None and (labelled == "all" or word != before)
        labels.append(sentence.tags[word] if counts and word is not None else IGNORE_INDEX)
        before = word
    return labels


def _cut_words(sentences: Sequence[Sentence], encoded: Sequence[Encoded], limit: int) -> int:
    """Words behind the last one that a full input holds."""
    cut = 0
    for sentence, one in zip(sentences, encoded, strict=True):
        if len(one.word_ids) == limit:
            last = max((word for word in one.word_ids if word is not None), default=-1)
            cut += len(sentence.words) - 1 - last
    return cut

"""Defines the fine-tuning task for sentences and sentence pairs: one label per row, scored by accuracy.

    finetune(folder, data, SentenceTask(data.labels), tuning, seed, rates)

A pair is encoded with the tokenizer's own template for pairs, and the longer text is truncated. For a tokenizer without
such a template, the template of CamemBERT is used: `<s> A </s></s> B </s>`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedTokenizerBase

from tasks.eval.datasets.labelled import Example, LabelledSet
from tasks.eval.finetune import Encoded
from tasks.eval.metrics import pack, sentence_scores
from tasks.eval.scores import Scores

ENCODE_ROWS = 1000
"""Rows per tokenizer call."""


@dataclass(frozen=True)
class SentenceTask:
    """A `FineTuneTask` for sets with one label per row."""

    labels: tuple[str, ...]
    metric: str = "accuracy"

    @property
    def model_class(self) -> Any:
        """Adds a classification head to the encoded text."""
        return AutoModelForSequenceClassification

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        """Pads to the longest row of a batch."""
        return DataCollatorWithPadding(tokenizer)

    def encode(
        self, rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase, limit: int, types: bool
    ) -> list[Encoded]:
        """Encodes all rows, truncated to `limit` sub-words; in a pair the longer text is truncated first."""
        pairs = any(row.second for row in rows)
        if pairs:
            add_pair_template(tokenizer)
        columns = ("input_ids", "attention_mask", *(("token_type_ids",) if types else ()))
        encoded: list[Encoded] = []
        for start in range(0, len(rows), ENCODE_ROWS):
            part = rows[start : start + ENCODE_ROWS]
            texts = [[row.first for row in part], *([[row.second for row in part]] if pairs else [])]
            batch = tokenizer(
                *texts, truncation=True, max_length=limit, return_attention_mask=True, return_token_type_ids=types
            )
            for number, row in enumerate(part):
                features = {name: batch[name][number] for name in columns}
                encoded.append(Encoded(features | {"labels": row.label}, []))
        return encoded

    def scores(self, rows: Sequence[Example], encoded: Sequence[Encoded], predicted: npt.NDArray[Any]) -> Scores:
        """Computes accuracy, macro F1 and figures per label."""
        return sentence_scores(np.array([row.label for row in rows]), predicted, self.labels)

    def test_rows(self, data: LabelledSet) -> Sequence[Example]:
        """Returns the complete test split."""
        return data.test

    def test_scores(
        self, data: LabelledSet, encoded: Sequence[Encoded], predicted: npt.NDArray[Any], limit: int
    ) -> Scores:
        """Computes figures on the test split; `cut_rows` counts rows of exactly `limit` sub-words, mostly truncated."""
        predictions = {
            "gold": pack([[row.label] for row in data.test]),
            "predicted": pack([[int(label)] for label in predicted]),
        }
        cut = sum(len(one.features["input_ids"]) == limit for one in encoded)
        figures = self.scores(data.test, encoded, predicted)
        return figures | {"test_rows": len(data.test), "cut_rows": cut, "predictions": predictions}


def add_pair_template(tokenizer: Any) -> None:
    """Adds a pair template to a tokenizer that inserts no token between two texts; other tokenizers do not change."""
    if tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False):
        return
    begin, end = tokenizer.cls_token or tokenizer.bos_token, tokenizer.sep_token or tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} {end} $B {end}",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in (begin, end)],
    )

"""Fine-tuning on sentences and pairs of sentences: how they are read, and what is measured. A craft of tasks.finetune.

    finetune(folder, data, SentenceCraft(data.labels), tuning, seed, rates)

Two texts are read as the tokenizer itself joins a pair, cut at the longer one; a tokenizer that has no form of pairs
gets CamemBERT's, `<s> A </s></s> B </s>`.
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


@dataclass(frozen=True)
class SentenceTask:
    """The craft of sets with one label a row."""

    labels: tuple[str, ...]
    metric: str = "accuracy"

    @property
    def model_class(self) -> Any:
        """A head on the whole text."""
        return AutoModelForSequenceClassification

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        """Pads to the longest row of a batch."""
        return DataCollatorWithPadding(tokenizer)

    def encode(
        self, rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase, limit: int, types: bool
    ) -> list[Encoded]:
        """All rows, cut after `limit` sub-words, the longer text of a pair first."""
        pairs = any(row.second for row in rows)
        if pairs:
            give_pair_form(tokenizer)
        wanted = ("input_ids", "attention_mask", *(("token_type_ids",) if types else ()))
        encoded: list[Encoded] = []
        for start in range(0, len(rows), ENCODE_ROWS):
            part = rows[start : start + ENCODE_ROWS]
            texts = [[row.first for row in part], *([[row.second for row in part]] if pairs else [])]
            batch = tokenizer(
                *texts, truncation=True, max_length=limit, return_attention_mask=True, return_token_type_ids=types
            )
            for number, row in enumerate(part):
                features = {name: batch[name][number] for name in wanted}
                encoded.append(Encoded(features | {"labels": row.label}, []))
        return encoded

    def scores(self, rows: Sequence[Example], encoded: Sequence[Encoded], predicted: npt.NDArray[Any]) -> Scores:
        """Accuracy, macro F1 and figures by label."""
        return sentence_scores(np.array([row.label for row in rows]), predicted, self.labels)

    def test_rows(self, data: LabelledSet) -> Sequence[Example]:
        """The test split as it is."""
        return data.test

    def test_scores(
        self, data: LabelledSet, encoded: Sequence[Encoded], predicted: npt.NDArray[Any], limit: int
    ) -> Scores:
        """Figures on the test split; `cut_rows` of it fill the limit: they were cut, or just fit."""
        predictions = {
            "gold": pack([[row.label] for row in data.test]),
            "predicted": pack([[int(label)] for label in predicted]),
        }
        cut = sum(len(one.features["input_ids"]) == limit for one in encoded)
        figures = self.scores(data.test, encoded, predicted)
        return figures | {"test_rows": len(data.test), "cut_rows": cut, "predictions": predictions}


def give_pair_form(tokenizer: Any) -> None:
    """A form of pairs for a tokenizer that puts nothing between two texts; one that has a form keeps it."""
    if tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False):
        return
    begin, end = tokenizer.cls_token or tokenizer.bos_token, tokenizer.sep_token or tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} {end} $B {end}",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in (begin, end)],
    )

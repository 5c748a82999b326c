"""Fine-tunes any encoder on a named-entity set and tests it: one protocol for student, teacher and every other model.

    ner = load_ner(recipe.score.ner)
    scores = finetune_ner(model_folder, ner, protocol_of(recipe.score), seed=0)      # one set, one seed
    scores = score_ner(store, model_key, model_folder, recipe.score)                 # all seeds, kept in the store

Called by the flows. Training sees train sentences only, for a fixed number of epochs; the model of the last step is
tested once, so nothing is selected on any split. A word's tag is what its first sub-word is given; a word without
sub-words, or behind the longest input, counts as O. See tasks.entities for the metrics.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from storage.error import FatalError
from storage.store import Store
from tasks.compare import quiet
from tasks.config import Score, Section
from tasks.encoder import longest_input
from tasks.entities import LABELS, class_scores, entity_scores, mean_and_sd
from tasks.mask import IGNORED
from tasks.ner_set import NerSet, Sentence, load_ner
from tasks.score import Scores, Trial, evaluating, make_scores, not_run, spread_rows

PREDICT_ROWS = 32
ENCODE_ROWS = 1000
_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "attention_dropout",
    "embedding_dropout",
    "mlp_dropout",
    "classifier_dropout",
)


class NerProtocol(Section):
    """How a model is fine-tuned and read; the same for every model that is compared."""

    epochs: float = Field(3.0, gt=0, description="Passes over the train split")
    lr: float = Field(5e-5, gt=0, le=1, description="Highest learning rate; linear decay")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the steps that warm up")
    batch_rows: int = Field(16, ge=1, description="Sentences in one step")
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW weight decay")
    dropout: float = Field(0.1, ge=0, lt=1, description="Of every kind that the model has, whatever its config says")
    max_tokens: int = Field(256, ge=8, description="Longer sentences are cut")
    labelled: Literal["all", "first"] = Field(
        "all", description="Sub-words that carry loss and count in sub-word F1: all of a word, or its first"
    )
    train_rows: int = Field(0, ge=0, description="Train on so many sentences, evenly spread; 0 means all")


class Encoded(NamedTuple):
    """One sentence as a model reads it."""

    input_ids: list[int]
    word_ids: list[int | None]
    """For each sub-word the place of its word, None for special tokens."""


def protocol_of(score: Score) -> NerProtocol:
    """The protocol that a recipe asks for."""
    return NerProtocol(epochs=score.ner_epochs, lr=score.ner_lr, train_rows=score.ner_train_rows)


def ner_trial(model_key: str, ner: NerSet, protocol: NerProtocol, seed: int) -> Trial:
    """Names the scores of one model and seed; the set goes in by its content."""
    settings = protocol.model_dump(mode="json") | {"content": ner.fingerprint}
    return Trial(model_key, settings, "ner", seed)


def score_ner(store: Store, model_key: str, folder: Path, score: Score, device: str = "auto") -> Scores:
    """All seeds of a recipe, those that are missing computed: {"set", "counts", "runs": by seed, "summary"}.

    `summary` holds mean and standard deviation of every figure. `not_run` with its reason for a set that is not named
    or cannot be used; RetryableError passes.
    """
    if not score.ner:
        return not_run("score.ner names no set")
    try:
        ner = load_ner(score.ner)
    except FatalError as error:
        return not_run(str(error))
    protocol = protocol_of(score)
    runs = {
        str(seed): make_scores(
            store,
            ner_trial(model_key, ner, protocol, seed),
            lambda seed=seed: finetune_ner(folder, ner, protocol, seed, device),  # type: ignore[misc]
        )
        for seed in score.ner_seeds
    }
    return {"set": score.ner, "counts": ner.counts, "runs": runs, "summary": mean_and_sd(list(runs.values()))}


def finetune_ner(folder: Path, ner: NerSet, protocol: NerProtocol, seed: int, device: str = "auto") -> Scores:
    """Fine-tunes the model of a folder with one seed and tests it.

    entity         entity-level precision, recall, F1, support, and by type, on the test split without duplicates
    subword        F1 of classes over sub-words: weighted (the card's figure), macro, by class; on the same rows
    as_published   entity F1 and weighted sub-word F1 on the test split with its duplicates
    train_rows, test_rows, cut_words   sentences trained and tested on; test words that the longest input cut off

    The same seed gives the same figures on a CPU with as many threads. Nothing is written outside a temporary folder.
    FatalError for a folder that holds no encoder.
    """
    use_cpu = device == "cpu" or not torch.cuda.is_available()
    set_seed(seed)  # before the fresh head is drawn
    model, tokenizer = _load(folder, protocol)
    limit = min(protocol.max_tokens, longest_input(model))
    train = [ner.train[row] for row in spread_rows(len(ner.train), protocol.train_rows or len(ner.train))]
    _train(model, tokenizer, _examples(train, tokenizer, limit, protocol), protocol, seed, use_cpu)
    encoded = list(encode(tokenizer, ner.test_published, limit))
    with evaluating(model):
        tags = predict(model, encoded, tokenizer.pad_token_id)
    counts = {"train_rows": len(train), "test_rows": len(ner.distinct), "cut_words": _cut_words(ner, encoded, limit)}
    return _test(ner, encoded, tags, protocol) | counts


def encode(tokenizer: PreTrainedTokenizerBase, sentences: Sequence[Sentence], limit: int) -> Iterator[Encoded]:
    """Sub-words of each sentence, cut after `limit`, special tokens included."""
    for start in range(0, len(sentences), ENCODE_ROWS):
        words = [list(sentence.words) for sentence in sentences[start : start + ENCODE_ROWS]]
        batch = tokenizer(words, is_split_into_words=True, truncation=True, max_length=limit)
        for row, input_ids in enumerate(batch["input_ids"]):
            yield Encoded(input_ids, batch.word_ids(row))


@torch.no_grad()
def predict(model: PreTrainedModel, encoded: Sequence[Encoded], pad: int) -> list[list[int]]:
    """The likeliest tag of every sub-word, sentences in their order. Rows of like length go together."""
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row].input_ids))
    tags: list[list[int]] = [[]] * len(encoded)
    for start in range(0, len(order), PREDICT_ROWS):
        rows = order[start : start + PREDICT_ROWS]
        sizes = [len(encoded[row].input_ids) for row in rows]
        input_ids = torch.full((len(rows), max(sizes)), pad)
        for line, row in enumerate(rows):
            input_ids[line, : sizes[line]] = torch.tensor(encoded[row].input_ids)
        attended = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
        logits = model(input_ids=input_ids.to(model.device), attention_mask=attended.long().to(model.device)).logits
        likeliest = logits.argmax(-1).tolist()
        for line, row in enumerate(rows):
            tags[row] = likeliest[line][: sizes[line]]
    return tags


def word_tags(sentence: Sentence, encoded: Encoded, tags: Sequence[int]) -> list[int]:
    """One tag a word: that of its first sub-word, O where it has none."""
    found = [0] * len(sentence.words)
    for place, word in reversed(list(enumerate(encoded.word_ids))):
        if word is not None:
            found[word] = tags[place]  # backwards, so the first sub-word has the last word
    return found


def subword_labels(sentence: Sentence, encoded: Encoded, labelled: str) -> list[int]:
    """The true tag of every sub-word; IGNORED for special tokens and, when only the first is labelled, the others."""
    labels = []
    before = None
    for word in encoded.word_ids:
        counts = word is not None and (labelled == "all" or word != before)
        labels.append(sentence.tags[word] if counts and word is not None else IGNORED)
        before = word
    return labels


# ---- training ----------------------------------------------------------------------------------------------


def _load(folder: Path, protocol: NerProtocol) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The encoder with a fresh head for the tags, in float32, and its tokenizer."""
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        for name in _DROPOUTS:
            # A student saved with dropout 0 must not be tuned without where its teacher is tuned with it.
            if hasattr(config, name):
                setattr(config, name, protocol.dropout)
        config.id2label = dict(enumerate(LABELS))
        config.label2id = {name: number for number, name in enumerate(LABELS)}
        with quiet():
            model: PreTrainedModel = AutoModelForTokenClassification.from_pretrained(
                folder, config=config, dtype=torch.float32, local_files_only=True
            )
            # RoBERTa's tokenizer takes words only with a space before each.
            tokenizer = AutoTokenizer.from_pretrained(folder, add_prefix_space=True, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        raise FatalError(f"{folder}: not an encoder that can be fine-tuned for tags ({first})", str(folder)) from error
    if not tokenizer.is_fast:
        raise FatalError(f"{folder}: the tokenizer cannot tell words from sub-words; add a tokenizer.json", str(folder))
    return model, tokenizer


def _examples(
    sentences: Sequence[Sentence], tokenizer: PreTrainedTokenizerBase, limit: int, protocol: NerProtocol
) -> list[dict[str, list[int]]]:
    encoded = encode(tokenizer, sentences, limit)
    return [
        {
            "input_ids": one.input_ids,
            "attention_mask": [1] * len(one.input_ids),
            "labels": subword_labels(sentence, one, protocol.labelled),
        }
        for sentence, one in zip(sentences, encoded, strict=True)
    ]


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict[str, list[int]]],
    protocol: NerProtocol,
    seed: int,
    use_cpu: bool,
) -> None:
    """Trains in place; the Trainer's folder is a temporary one and nothing reports anywhere."""
    with tempfile.TemporaryDirectory(prefix="distil-ner-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=protocol.epochs,
            learning_rate=protocol.lr,
            warmup_steps=protocol.warmup,  # below 1 it is a share of the steps
            weight_decay=protocol.weight_decay,
            per_device_train_batch_size=protocol.batch_rows,
            seed=seed,
            use_cpu=use_cpu,
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=examples,
            data_collator=DataCollatorForTokenClassification(tokenizer),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def _test(ner: NerSet, encoded: Sequence[Encoded], tags: Sequence[Sequence[int]], protocol: NerProtocol) -> Scores:
    entity, subword = _metrics(ner, encoded, tags, protocol, ner.distinct)
    published_entity, published_subword = _metrics(ner, encoded, tags, protocol, range(len(encoded)))
    return {
        "entity": entity,
        "subword": subword,
        "as_published": {
            "entity_f1": published_entity["f1"],
            "subword_weighted_f1": published_subword["weighted_f1"],
        },
    }


def _cut_words(ner: NerSet, encoded: Sequence[Encoded], limit: int) -> int:
    """Words of the test split behind the last one that a full input holds."""
    full = [row for row in ner.distinct if len(encoded[row].input_ids) == limit]
    last = [max((word for word in encoded[row].word_ids if word is not None), default=-1) for row in full]
    return sum(len(ner.test_published[row].words) - 1 for row in full) - sum(last)


def _metrics(
    ner: NerSet,
    encoded: Sequence[Encoded],
    tags: Sequence[Sequence[int]],
    protocol: NerProtocol,
    rows: Sequence[int],
) -> tuple[Scores, Scores]:
    """Entity scores and class scores over some test rows."""
    sentences = [ner.test_published[row] for row in rows]
    words = [word_tags(sentence, encoded[row], tags[row]) for sentence, row in zip(sentences, rows, strict=True)]
    entity = entity_scores([sentence.tags for sentence in sentences], words)
    labels = np.concatenate(
        [
            subword_labels(sentence, encoded[row], protocol.labelled)
            for sentence, row in zip(sentences, rows, strict=True)
        ]
    )
    said = np.concatenate([tags[row] for row in rows])
    counted = labels != IGNORED
    return entity, class_scores(labels[counted], said[counted])

"""Fine-tunes any encoder on one set with one seed and tests it, by transformers' Trainer.

    scores = finetune(folder, data, craft, tuning, seed=0, rates=tuning.lr)

A craft is what sets of one sort need (tasks.classify: sentences and pairs, tasks.ner: words with tags): a head, an
encoding, the metric on predictions. Of each learning rate in `rates` the best epoch on the validation split is kept,
and of the rates the best; only that model sees the test split, once. Called by tasks.tuned.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers import (
    AutoConfig,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from storage.errors import FatalError
from tasks.eval.heldout import spread_rows
from tasks.eval.protocol import Tuning
from tasks.eval.scores import Scores
from tasks.eval.side_by_side import silenced
from tasks.models.forward import longest_input
from tasks.models.tokenizer import exact_tokenizer

PREDICT_ROWS = 64

_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "attention_dropout",
    "embedding_dropout",
    "mlp_dropout",
    "classifier_dropout",
    "dropout",
    "seq_classif_dropout",
)


class Encoded(NamedTuple):
    """One row as a model reads it."""

    features: dict[str, Any]
    """input_ids, attention_mask and labels, as the Trainer takes them."""
    word_ids: list[int | None]
    """For each sub-word the place of its word, None for special tokens; empty for rows that are no list of words."""


class FineTuneTask(Protocol):
    """What sets of one sort need. Rows are those of the set's splits, whatever they are."""

    @property
    def metric(self) -> str:
        """Chooses epoch and learning rate on the validation split, and is the figure that the set is judged by."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of what the head tells apart."""

    @property
    def model_class(self) -> Any:
        """The transformers class that puts a fresh head on an encoder."""

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Pads a batch."""

    def encode(self, rows: Sequence[Any], tokenizer: PreTrainedTokenizerBase, limit: int, types: bool) -> list[Encoded]:
        """All rows, cut after `limit` sub-words; `types`: the model tells first and second text apart."""

    def scores(self, rows: Sequence[Any], encoded: Sequence[Encoded], predicted: npt.NDArray[Any]) -> Scores:
        """Figures, `metric` among them, from the likeliest label of every row (and sub-word)."""

    def test_rows(self, data: Any) -> Sequence[Any]:
        """Rows that are predicted."""

    def test_scores(self, data: Any, encoded: Sequence[Encoded], predicted: npt.NDArray[Any], limit: int) -> Scores:
        """Figures on the test split, and `predictions`: `gold` and `predicted`, packed."""


class _Tuned(NamedTuple):
    """A model at its best epoch."""

    trainer: Trainer
    lr: float
    validation: float
    epochs: float


def finetune(
    folder: Path,
    data: Any,
    craft: FineTuneTask,
    tuning: Tuning,
    seed: int,
    rates: Sequence[float],
    device: str = "auto",
) -> Scores:
    """The figures of one seed on the test split.

    Besides what the craft gives: `predictions` (see there), `train_rows`, `test_rows`, and `choice`: the learning rate
    that was taken, its best validation figure, the epoch of that, and the best validation figure of every rate.
    The same seed gives the same figures on a CPU with as many threads. Nothing is written outside a temporary folder.
    FatalError for a folder that holds no encoder.
    """
    use_cpu = device == "cpu" or not torch.cuda.is_available()
    train = [data.train[row] for row in spread_rows(len(data.train), tuning.train_rows or len(data.train))]
    with tempfile.TemporaryDirectory(prefix="distil-tune-") as scratch:
        best: _Tuned | None = None
        grid: dict[str, float] = {}
        for lr in rates:
            tuned = _tune(folder, train, data.validation, craft, tuning, seed, lr, use_cpu, Path(scratch) / f"{lr:g}")
            grid[f"{lr:g}"] = tuned.validation
            if best is None or tuned.validation > best.validation:
                best = tuned
        assert best is not None, "a tuning has at least one learning rate"
        scores = _test(best.trainer, folder, data, craft, tuning)
    choice = {"lr": best.lr, "validation": best.validation, "epochs": best.epochs, "grid": grid}
    return scores | {"train_rows": len(train), "choice": choice}


def _tune(
    folder: Path,
    train: Sequence[Any],
    validation: Sequence[Any],
    craft: FineTuneTask,
    tuning: Tuning,
    seed: int,
    lr: float,
    use_cpu: bool,
    scratch: Path,
) -> _Tuned:
    """Trains with one learning rate; the model that comes back is that of its best epoch."""
    set_seed(seed)  # before the fresh head is drawn
    model, tokenizer = load_for(folder, craft, tuning)
    limit, types = _reading(model, tuning)
    encoded = craft.encode(validation, tokenizer, limit, types)

    def judge(found: EvalPrediction) -> dict[str, float]:
        return {craft.metric: float(craft.scores(validation, encoded, np.asarray(found.predictions))[craft.metric])}

    trainer = Trainer(
        model=model,
        args=_arguments(tuning, craft.metric, seed, lr, use_cpu, scratch),
        train_dataset=[one.features for one in craft.encode(train, tokenizer, limit, types)],
        eval_dataset=[one.features for one in encoded],
        data_collator=craft.collator(tokenizer),
        compute_metrics=judge,
        preprocess_logits_for_metrics=lambda logits, _labels: logits.argmax(-1),
        callbacks=[EarlyStoppingCallback(tuning.patience)] if tuning.patience else [],
    )
    trainer.remove_callback(PrinterCallback)
    with silenced():
        trainer.train()
    history = [line for line in trainer.state.log_history if f"eval_{craft.metric}" in line]
    best = max(history, key=lambda line: line[f"eval_{craft.metric}"])
    return _Tuned(trainer, lr, float(best[f"eval_{craft.metric}"]), float(best["epoch"]))


def _arguments(tuning: Tuning, metric: str, seed: int, lr: float, use_cpu: bool, scratch: Path) -> TrainingArguments:
    """Checkpoints are weights only, in a temporary folder, to go back to the best epoch; nothing reports anywhere.

    One GPU, however many there are: transformers would feed each of them a batch, which is another protocol.
    """
    arguments = TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=tuning.epochs,
        learning_rate=lr,
        warmup_steps=tuning.warmup,  # below 1 it is a share of the steps
        weight_decay=tuning.weight_decay,
        per_device_train_batch_size=tuning.batch_rows,
        per_device_eval_batch_size=PREDICT_ROWS,
        seed=seed,
        use_cpu=use_cpu,
        dataloader_pin_memory=not use_cpu,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_only_model=True,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=True,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _test(trainer: Trainer, folder: Path, data: Any, craft: FineTuneTask, tuning: Tuning) -> Scores:
    _, tokenizer = _tokenizer_of(folder)
    limit, types = _reading(trainer.model, tuning)
    rows = craft.test_rows(data)
    encoded = craft.encode(rows, tokenizer, limit, types)
    trainer.compute_metrics = None  # it judges the validation rows
    features: Any = [one.features for one in encoded]
    with silenced():
        predicted = trainer.predict(features).predictions
    return craft.test_scores(data, encoded, np.asarray(predicted), limit)


def load_for(folder: Path, craft: FineTuneTask, tuning: Tuning) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The encoder with a fresh head, in float32, and its tokenizer. FatalError if the folder holds none."""
    config, tokenizer = _tokenizer_of(folder)
    for name in _DROPOUTS:
        # A student saved with dropout 0 must not be tuned without where its teacher is tuned with it.
        if hasattr(config, name):
            setattr(config, name, tuning.dropout)
    config.id2label = dict(enumerate(craft.labels))
    config.label2id = {name: number for number, name in enumerate(craft.labels)}
    try:
        with silenced():
            model: PreTrainedModel = craft.model_class.from_pretrained(
                folder, config=config, dtype=torch.float32, local_files_only=True
            )
    except (OSError, ValueError, KeyError) as error:
        raise FatalError(_no_encoder(folder, error), str(folder)) from error
    return model, tokenizer


def _tokenizer_of(folder: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """Configuration and tokenizer of a model folder."""
    try:
        with silenced():
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            # RoBERTa's tokenizer takes words only with a space before each.
            tokenizer = exact_tokenizer(folder, add_prefix_space=True)
    except (OSError, ValueError, KeyError) as error:
        raise FatalError(_no_encoder(folder, error), str(folder)) from error
    if not tokenizer.is_fast:
        raise FatalError(f"{folder}: the tokenizer cannot tell words from sub-words; add a tokenizer.json", str(folder))
    return config, tokenizer


def _no_encoder(folder: Path, error: Exception) -> str:
    return f"{folder}: not an encoder that can be fine-tuned ({str(error).strip().splitlines()[0]})"


def _reading(model: Any, tuning: Tuning) -> tuple[int, bool]:
    """Most sub-words of a row, and whether the model tells first and second text apart."""
    types = int(getattr(model.config, "type_vocab_size", 0) or 0) > 1
    return min(tuning.max_tokens, longest_input(model)), types

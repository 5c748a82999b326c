"""Fine-tunes an encoder on one evaluation set with one seed and scores it on the test split.

    scores = finetune(folder, data, SentenceTask(data.labels), tuning, seed=0, rates=tuning.lr)

A `FineTuneTask` supplies the head, the encoding and the metric: tasks/eval/sentence_classification.py for sentences and
pairs, tasks/eval/token_classification.py for words with tags. For each learning rate of `rates`, the epoch with the
best validation score is kept; the rate with the best validation score is selected, and only its model predicts the test
split. Training uses the Trainer of transformers.
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
from tasks.eval.heldout import evenly_spaced_rows
from tasks.eval.loaded_model import silenced
from tasks.eval.protocol import Tuning
from tasks.eval.scores import Scores
from tasks.models.forward import longest_input
from tasks.models.student import set_dropout
from tasks.models.tokenizer import exact_tokenizer

PREDICT_ROWS = 64

_CLASSIFIER_DROPOUTS = ("classifier_dropout", "seq_classif_dropout")
"""Names that configs use for the dropout of the new head; `set_dropout` sets all others."""


class Encoded(NamedTuple):
    """One encoded row."""

    features: dict[str, Any]
    """input_ids, attention_mask and labels, in the format of the Trainer."""
    word_ids: list[int | None]
    """Word index of each sub-word, None for special tokens; empty for rows that are not lists of words."""


class FineTuneTask(Protocol):
    """Head, encoding and metric of one kind of evaluation set. Rows have the type of the rows in the set's splits."""

    @property
    def metric(self) -> str:
        """Name of the figure that selects the epoch and the learning rate, and that summarizes the set."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers."""

    @property
    def model_class(self) -> Any:
        """The transformers model class that adds a new head to an encoder."""

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Returns the data collator that pads a batch."""

    def encode(self, rows: Sequence[Any], tokenizer: PreTrainedTokenizerBase, limit: int, types: bool) -> list[Encoded]:
        """Encodes rows, truncated to `limit` sub-words, with token type ids if `types` is True."""

    def scores(self, rows: Sequence[Any], encoded: Sequence[Encoded], predicted: npt.NDArray[Any]) -> Scores:
        """Computes figures, including `metric`, from the most probable label of each row (or of each sub-word)."""

    def test_rows(self, data: Any) -> Sequence[Any]:
        """Returns the rows of the test split to predict."""

    def test_scores(self, data: Any, encoded: Sequence[Encoded], predicted: npt.NDArray[Any], limit: int) -> Scores:
        """Computes figures on the test split, with `predictions`: `gold` and `predicted` in the format of `pack`."""


class _FineTuned(NamedTuple):
    """A trainer with the model of its best epoch, the learning rate, and the score and number of that epoch."""

    trainer: Trainer
    lr: float
    validation: float
    epochs: float


def finetune(
    folder: Path,
    data: Any,
    task: FineTuneTask,
    tuning: Tuning,
    seed: int,
    rates: Sequence[float],
    device: str = "auto",
) -> Scores:
    """Fine-tunes with one seed and returns the figures on the test split.

    Adds to the figures of `task.test_scores`: `train_rows`, and `choice`: the selected learning rate (`lr`), its best
    validation score (`validation`), the epoch of that score (`epochs`), and the best validation score of each rate
    (`grid`). `device` is "auto" (one GPU if CUDA is available) or "cpu". On a CPU, the same seed and number of threads
    give the same figures. Writes to a temporary folder only. FatalError if the folder contains no encoder.
    """
    use_cpu = device == "cpu" or not torch.cuda.is_available()
    train = [data.train[row] for row in evenly_spaced_rows(len(data.train), tuning.train_rows or len(data.train))]
    with tempfile.TemporaryDirectory(prefix="distil-tune-") as scratch:
        best: _FineTuned | None = None
        grid: dict[str, float] = {}
        for lr in rates:
            output = Path(scratch) / f"{lr:g}"
            tuned = _train(folder, train, data.validation, task, tuning, seed, lr, use_cpu, output)
            grid[f"{lr:g}"] = tuned.validation
            if best is None or tuned.validation > best.validation:
                best = tuned
        assert best is not None, "`rates` must contain at least one learning rate"
        scores = _test(best.trainer, folder, data, task, tuning)
    choice = {"lr": best.lr, "validation": best.validation, "epochs": best.epochs, "grid": grid}
    return scores | {"train_rows": len(train), "choice": choice}


def _train(
    folder: Path,
    train: Sequence[Any],
    validation: Sequence[Any],
    task: FineTuneTask,
    tuning: Tuning,
    seed: int,
    lr: float,
    use_cpu: bool,
    output: Path,
) -> _FineTuned:
    """Trains with one learning rate and restores the best epoch."""
    set_seed(seed)  # before the new head is initialized
    model, tokenizer = load_with_head(folder, task, tuning)
    limit, types = _input_format(model, tuning)
    encoded = task.encode(validation, tokenizer, limit, types)

    def validation_score(result: EvalPrediction) -> dict[str, float]:
        figures = task.scores(validation, encoded, np.asarray(result.predictions))
        return {task.metric: float(figures[task.metric])}

    trainer = Trainer(
        model=model,
        args=_arguments(tuning, task.metric, seed, lr, use_cpu, output),
        train_dataset=[one.features for one in task.encode(train, tokenizer, limit, types)],
        eval_dataset=[one.features for one in encoded],
        data_collator=task.collator(tokenizer),
        compute_metrics=validation_score,
        preprocess_logits_for_metrics=lambda logits, _labels: logits.argmax(-1),
        callbacks=[EarlyStoppingCallback(tuning.patience)] if tuning.patience else [],
    )
    trainer.remove_callback(PrinterCallback)
    with silenced():
        trainer.train()
    history = [line for line in trainer.state.log_history if f"eval_{task.metric}" in line]
    best = max(history, key=lambda line: line[f"eval_{task.metric}"])
    return _FineTuned(trainer, lr, float(best[f"eval_{task.metric}"]), float(best["epoch"]))


def _arguments(tuning: Tuning, metric: str, seed: int, lr: float, use_cpu: bool, output: Path) -> TrainingArguments:
    """Returns the Trainer's arguments: weights-only checkpoints in the folder `output`, and no reporting.

    Uses one GPU even if the machine has more: with several GPUs, transformers would multiply the batch size, which is
    part of the protocol.
    """
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=tuning.epochs,
        learning_rate=lr,
        warmup_steps=tuning.warmup,  # a value below 1 is a share of the steps
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


def _test(trainer: Trainer, folder: Path, data: Any, task: FineTuneTask, tuning: Tuning) -> Scores:
    _, tokenizer = _tokenizer_of(folder)
    limit, types = _input_format(trainer.model, tuning)
    rows = task.test_rows(data)
    encoded = task.encode(rows, tokenizer, limit, types)
    trainer.compute_metrics = None  # the metrics function applies to the validation rows only
    features: Any = [one.features for one in encoded]
    with silenced():
        predicted = trainer.predict(features).predictions
    return task.test_scores(data, encoded, np.asarray(predicted), limit)


def load_with_head(folder: Path, task: FineTuneTask, tuning: Tuning) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the encoder in float32 with a new head, and its tokenizer. FatalError if the folder has no encoder."""
    config, tokenizer = _tokenizer_of(folder)
    # A student saved with dropout 0 must be fine-tuned with the same dropout as its teacher.
    set_dropout(config, tuning.dropout)
    for name in _CLASSIFIER_DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, tuning.dropout)
    config.id2label = dict(enumerate(task.labels))
    config.label2id = {name: number for number, name in enumerate(task.labels)}
    try:
        with silenced():
            model: PreTrainedModel = task.model_class.from_pretrained(
                folder, config=config, dtype=torch.float32, local_files_only=True
            )
    except (OSError, ValueError, KeyError) as error:
        raise FatalError(_no_encoder(folder, error), str(folder)) from error
    return model, tokenizer


def _tokenizer_of(folder: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """Loads the configuration and the tokenizer of a model folder."""
    try:
        with silenced():
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            # RoBERTa's tokenizer accepts lists of words only with a space before each.
            tokenizer = exact_tokenizer(folder, add_prefix_space=True)
    except (OSError, ValueError, KeyError) as error:
        raise FatalError(_no_encoder(folder, error), str(folder)) from error
    if not tokenizer.is_fast:
        raise FatalError(
            f"{folder}: the tokenizer cannot map sub-words to words; add the tokenizer.json of a fast tokenizer",
            str(folder),
        )
    return config, tokenizer


def _no_encoder(folder: Path, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0]
    return f"{folder}: not an encoder that can be fine-tuned ({reason}); use the folder of a saved model"


def _input_format(model: Any, tuning: Tuning) -> tuple[int, bool]:
    """Returns the largest number of sub-words in a row, and True if the model uses token type ids."""
    types = int(getattr(model.config, "type_vocab_size", 0) or 0) > 1
    return min(tuning.max_tokens, longest_input(model)), types

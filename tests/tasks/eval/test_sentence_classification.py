"""Fine-tuning on sentence pairs: learning, selection on the validation split only, and scores as in scikit-learn."""

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, TrainingArguments

from tasks.eval import finetune as module
from tasks.eval.datasets.dataset_files import SetLocation
from tasks.eval.datasets.labelled import Example
from tasks.eval.datasets.pairs import load_pairs
from tasks.eval.finetune import _arguments, finetune
from tasks.eval.metrics import unpack
from tasks.eval.protocol import Tuning
from tasks.eval.sentence_classification import SentenceTask, add_pair_template
from tests.harness.eval_sets import write_pairs
from tests.harness.tiny import make_teacher

TUNING = Tuning(lr=(1e-2,), epochs=4, batch_rows=8, dropout=0.0, patience=0, max_tokens=48)
SHORT = TUNING.model_copy(update={"epochs": 1})
MARKER = "Le marqueur planté"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    made = tmp_path_factory.mktemp("model")
    make_teacher(made, "modernbert", layers=2)
    return made


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return load_pairs("xnli", SetLocation(str(write_pairs(tmp_path_factory.mktemp("xnli")))))


def tune(folder, data, tuning=TUNING, seed=0):
    return finetune(folder, data, SentenceTask(data.labels), tuning, seed, tuning.lr, "cpu")


def test_model_learns_and_scores_equal_scikit_learn(folder, pairs):
    found = tune(folder, pairs)
    assert found["accuracy"] > 0.8
    assert (found["train_rows"], found["test_rows"], found["cut_rows"]) == (120, 30, 0)
    gold, predicted = ([row[0] for row in unpack(found["predictions"][side])] for side in ("gold", "predicted"))
    assert gold == [row.label for row in pairs.test]
    assert found["accuracy"] == pytest.approx(accuracy_score(gold, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(gold, predicted, average="macro"))


def test_best_learning_rate_on_validation_is_selected(folder, pairs):
    found = tune(folder, pairs, SHORT.model_copy(update={"lr": (1e-9, 1e-2)}))
    assert set(found["choice"]["grid"]) == {"1e-09", "0.01"}
    assert found["choice"]["lr"] == 1e-2
    assert found["choice"]["validation"] == max(found["choice"]["grid"].values())
    alone = tune(folder, pairs, SHORT)
    assert (found["accuracy"], found["predictions"]) == (alone["accuracy"], alone["predictions"])


def test_training_stops_early_and_restores_the_best_epoch(folder, pairs, monkeypatch):
    """With a falling validation figure, training ends after the second epoch and keeps the first."""
    figures = iter((0.9, 0.5, 0.4, 0.3))
    epochs = []

    class Spy(module.Trainer):
        def evaluate(self, *args, **kwargs):
            epochs.append(self.state.epoch)
            return super().evaluate(*args, **kwargs)

    monkeypatch.setattr(module, "Trainer", Spy)
    monkeypatch.setattr(SentenceTask, "scores", lambda *args: {"accuracy": next(figures)})
    monkeypatch.setattr(SentenceTask, "test_scores", lambda *args: {})
    found = tune(folder, pairs, TUNING.model_copy(update={"patience": 1, "lr": (1e-4,)}))
    assert epochs == [1, 2]
    assert (found["choice"]["epochs"], found["choice"]["validation"]) == (1, 0.9)


def test_test_rows_never_reach_training_or_selection(folder, pairs, monkeypatch):
    datasets = []

    class Spy(module.Trainer):
        def __init__(self, *args, **kwargs):
            datasets.append((kwargs["train_dataset"], kwargs["eval_dataset"]))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(module, "Trainer", Spy)
    planted = (*pairs.test, Example(MARKER, MARKER, 0))
    data = pairs.__class__(**{**vars(pairs), "test": planted})
    found = tune(folder, data, SHORT.model_copy(update={"lr": (1e-3, 1e-2)}))
    assert found["test_rows"] == 31
    tokenizer = AutoTokenizer.from_pretrained(folder)
    add_pair_template(tokenizer)
    marker = tokenizer(MARKER, MARKER)["input_ids"]
    assert len(datasets) == 2
    for trained, selected in datasets:
        assert (len(trained), len(selected)) == (120, 30)
        assert marker not in [one["input_ids"] for one in (*trained, *selected)]


def test_number_of_train_rows_can_be_limited(folder, pairs):
    assert tune(folder, pairs, SHORT.model_copy(update={"train_rows": 20}))["train_rows"] == 20


def test_pair_has_the_template_of_the_tokenizer_or_of_camembert(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    one = SentenceTask(("a", "b"))
    ids = one.encode([Example("Le juge", "refuse", 1)], tokenizer, 20, False)[0].features["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁Le", "▁juge", "</s>", "</s>", "▁refuse", "</s>"]
    before = str(tokenizer.backend_tokenizer.post_processor)
    add_pair_template(tokenizer)
    assert str(tokenizer.backend_tokenizer.post_processor) == before
    cut = one.encode([Example("Le juge refuse " * 9, "refuse", 1)], tokenizer, 12, False)[0].features["input_ids"]
    assert len(cut) == 12
    assert tokenizer.convert_ids_to_tokens(cut)[-3:] == ["</s>", "▁refuse", "</s>"]


def test_bert_gets_token_type_ids(folder, pairs, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    features = SentenceTask(("a", "b")).encode([Example("Le juge", "refuse", 1)], tokenizer, 20, True)[0].features
    assert len(features["token_type_ids"]) == len(features["input_ids"])
    assert 0 <= tune(tmp_path, pairs, SHORT)["accuracy"] <= 1


def test_batch_size_is_that_of_the_protocol_on_several_gpus(monkeypatch, tmp_path):
    tuning = Tuning(batch_rows=6)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    plain = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=6)
    assert plain.train_batch_size == 48, "otherwise the limit to one GPU is not needed"
    assert _arguments(tuning, "accuracy", 0, 1e-3, use_cpu=False, output=tmp_path).train_batch_size == 6

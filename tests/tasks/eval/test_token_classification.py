"""Fine-tuning for named entities: learning, repeatability, no test sentence in training, and no files left."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from seqeval.metrics import f1_score as seqeval_f1
from sklearn.metrics import f1_score
from transformers import AutoTokenizer

from storage.errors import FatalError
from tasks.eval import finetune as module
from tasks.eval.datasets.dataset_files import SetLocation
from tasks.eval.datasets.ner import Sentence, load_ner
from tasks.eval.finetune import finetune, load_with_head
from tasks.eval.metrics import LABELS, entity_scores, unpack
from tasks.eval.protocol import Tuning
from tasks.eval.token_classification import TokenTask, subword_labels, word_tags
from tests.harness.eval_sets import write_ner
from tests.harness.tiny import make_teacher

TUNING = Tuning(lr=(1e-2,), epochs=6, batch_rows=8, dropout=0.0, patience=0)
SHORT = TUNING.model_copy(update={"epochs": 1})


def load(folder):
    return load_ner("ner", SetLocation(str(folder)))


def tune(folder, data, tuning=TUNING, seed=0):
    return finetune(folder, data, TokenTask(tuning.labelled), tuning, seed, tuning.lr, "cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.set_num_threads(1)
    made = {}
    for family in ("camembert", "modernbert"):
        made[family] = tmp_path_factory.mktemp(family)
        make_teacher(made[family], family, layers=2)
    return made


@pytest.fixture(scope="module")
def ner(tmp_path_factory):
    return load(write_ner(tmp_path_factory.mktemp("ner")))


@pytest.mark.parametrize("family", ["camembert", "modernbert"])
@pytest.mark.parametrize("labelled", ["all", "first"])
def test_model_learns(folders, ner, family, labelled):
    scores = tune(folders[family], ner, TUNING.model_copy(update={"labelled": labelled}))
    # A post-norm model with large random weights learns slowly, but exceeds the F1 of 0 from predicting only O.
    only_o = entity_scores([s.tags for s in ner.test], [[0] * len(s.tags) for s in ner.test])
    assert only_o["f1"] == 0
    assert scores["entity"]["f1"] == scores["entity_f1"] > (0.9 if family == "modernbert" else 0.5)
    assert scores["entity"]["support"] == only_o["support"]
    assert (scores["train_rows"], scores["test_rows"], scores["cut_words"]) == (len(ner.train), len(ner.test), 0)


def test_equal_seeds_give_equal_figures_and_other_seeds_give_others(folders, ner):
    tuning = SHORT.model_copy(update={"dropout": 0.1})
    first, again, other = (tune(folders["camembert"], ner, tuning, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_nothing_is_written_or_printed(folders, ner, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {path: os.stat(path).st_mtime_ns for path in folders["camembert"].iterdir()}
    tune(folders["camembert"], ner, SHORT)
    assert list(tmp_path.iterdir()) == []
    assert {path: os.stat(path).st_mtime_ns for path in folders["camembert"].iterdir()} == before
    assert capsys.readouterr().out == ""


def test_test_sentences_never_reach_training_or_selection(folders, tmp_path, monkeypatch):
    """A marker sentence is in the test split and, as a leak, in the train split."""
    marker = ["préfecture"] * 3 + ["convention"] * 3
    source = write_ner(tmp_path / "ner", train=40, test=10, extra_test=(marker,))
    train = pq.read_table(source / "train-00000-of-00001.parquet").to_pylist()
    train += [{"id": 99, "tokens": marker, "ner_tags": [0] * 6}]
    pq.write_table(pa.Table.from_pylist(train), source / "train-00000-of-00001.parquet")
    datasets = []

    class Spy(module.Trainer):
        def __init__(self, *args, **kwargs):
            datasets.append((kwargs["train_dataset"], kwargs["eval_dataset"]))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(module, "Trainer", Spy)
    loaded = load(source)
    tune(folders["camembert"], loaded, SHORT.model_copy(update={"lr": (1e-3, 1e-2)}))
    tokenizer = AutoTokenizer.from_pretrained(folders["camembert"])
    assert len(datasets) == 2
    for trained, selected in datasets:
        seen = {tuple(example["input_ids"]) for example in (*trained, *selected)}
        for sentence in loaded.test:
            assert tuple(tokenizer(list(sentence.words), is_split_into_words=True)["input_ids"]) not in seen
        assert (len(trained), len(selected)) == (len(loaded.train), len(loaded.validation))
    assert loaded.counts["train"]["in_other_split"] >= 1


def test_dropout_of_the_protocol_replaces_that_of_the_model(folders):
    """A student saved with dropout 0 is fine-tuned with the same dropout as its teacher."""
    for family in folders:
        model, _ = load_with_head(folders[family], TokenTask(), Tuning(dropout=0.25))
        rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
        assert rates == {0.25}


def test_first_sub_word_gives_the_tag_of_a_word():
    """Sub-words [s, Par, is, est, s]: a word without a sub-word gets O."""
    sentence = Sentence(("Paris", "\u200b", "est", "loin"), (1, 4, 0, 2))
    word_ids = [None, 0, 0, 2, None]  # "loin" is cut off
    assert word_tags(sentence, word_ids, [3, 1, 4, 0, 3]) == [1, 0, 0, 0]
    assert subword_labels(sentence, word_ids, "all") == [-100, 1, 1, 0, -100]
    assert subword_labels(sentence, word_ids, "first") == [-100, 1, -100, 0, -100]


def test_truncated_words_are_counted_and_figures_with_duplicates_are_reported(folders, tmp_path):
    long = ["convention", "préfecture"] * 20
    loaded = load(write_ner(tmp_path / "ner", train=20, test=5, extra_test=(long, long)))
    scores = tune(folders["modernbert"], loaded, TUNING.model_copy(update={"max_tokens": 16}))
    tokenizer = AutoTokenizer.from_pretrained(folders["modernbert"])
    cut = 0
    for sentence in loaded.test:
        ids = tokenizer(list(sentence.words), is_split_into_words=True, truncation=True, max_length=16)
        cut += len(set(range(len(sentence.words))) - set(ids.word_ids()))
    assert scores["cut_words"] == cut > 20
    assert scores["test_rows"] == len(loaded.test_published) - loaded.counts["test"]["duplicates"]
    assert scores["as_published"]["entity_f1"] != scores["entity"]["f1"]


def test_figures_equal_seqeval_and_scikit_learn_on_the_same_predictions(folders, ner, monkeypatch):
    """Entity F1 and, with one labelled sub-word per word, sub-word F1 from the stored predictions."""
    scores = tune(folders["camembert"], ner, SHORT)
    gold, predicted = (unpack(scores["predictions"][side]) for side in ("gold", "predicted"))
    assert gold == [list(sentence.tags) for sentence in ner.test]
    io = [[["O" if tag == 0 else f"I-{LABELS[tag]}" for tag in tags] for tags in side] for side in (gold, predicted)]
    assert scores["entity_f1"] == pytest.approx(seqeval_f1(*io, zero_division=0))
    first = tune(folders["camembert"], ner, SHORT.model_copy(update={"labelled": "first"}))
    flat = [
        np.concatenate([np.array(tags) for tags in unpack(first["predictions"][side])])
        for side in ("gold", "predicted")
    ]
    assert first["subword"]["weighted_f1"] == pytest.approx(f1_score(*flat, average="weighted", zero_division=0))


def test_folder_without_a_model_fails(ner, tmp_path):
    with pytest.raises(FatalError, match="not an encoder"):
        tune(tmp_path, ner)

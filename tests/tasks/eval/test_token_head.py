"""Fine-tuning for named entities: it learns, it repeats, it sees no test sentence, it leaves nothing behind."""

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
from tasks.eval.datasets.files import Place
from tasks.eval.datasets.ner import Sentence, load_ner
from tasks.eval.finetune import finetune, load_for
from tasks.eval.metrics import LABELS, entity_scores, unpack
from tasks.eval.protocol import Tuning
from tasks.eval.token_head import TokenTask, subword_labels, word_tags
from tests.harness.eval_sets import write_ner
from tests.harness.tiny import make_teacher

TUNING = Tuning(lr=(1e-2,), epochs=6, batch_rows=8, dropout=0.0, patience=0)
SHORT = TUNING.model_copy(update={"epochs": 1})


def load(folder):
    return load_ner("ner", Place(str(folder)))


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
def test_it_learns_what_can_be_learned(folders, ner, family, labelled):
    found = tune(folders[family], ner, TUNING.model_copy(update={"labelled": labelled}))
    # A post-norm model with wild random weights learns slowly; it still leaves saying O, which scores 0, far behind.
    always_o = entity_scores([s.tags for s in ner.test], [[0] * len(s.tags) for s in ner.test])
    assert always_o["f1"] == 0
    assert found["entity"]["f1"] == found["entity_f1"] > (0.9 if family == "modernbert" else 0.5)
    assert found["entity"]["support"] == always_o["support"]
    assert (found["train_rows"], found["test_rows"], found["cut_words"]) == (len(ner.train), len(ner.test), 0)


def test_a_seed_gives_the_same_figures_and_another_seed_others(folders, ner):
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
    """A marker sentence is planted in the test split and, as a leak, in the train split."""
    marker = ["préfecture"] * 3 + ["convention"] * 3
    source = write_ner(tmp_path / "ner", train=40, test=10, extra_test=(marker,))
    train = pq.read_table(source / "train-00000-of-00001.parquet").to_pylist()
    train += [{"id": 99, "tokens": marker, "ner_tags": [0] * 6}]
    pq.write_table(pa.Table.from_pylist(train), source / "train-00000-of-00001.parquet")
    given = []

    class Spy(module.Trainer):
        def __init__(self, *args, **kwargs):
            given.append((kwargs["train_dataset"], kwargs["eval_dataset"]))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(module, "Trainer", Spy)
    loaded = load(source)
    tune(folders["camembert"], loaded, SHORT.model_copy(update={"lr": (1e-3, 1e-2)}))
    tokenizer = AutoTokenizer.from_pretrained(folders["camembert"])
    assert len(given) == 2
    for trained, selected in given:
        seen = {tuple(example["input_ids"]) for example in (*trained, *selected)}
        for sentence in loaded.test:
            assert tuple(tokenizer(list(sentence.words), is_split_into_words=True)["input_ids"]) not in seen
        assert (len(trained), len(selected)) == (len(loaded.train), len(loaded.validation))
    assert loaded.counts["train"]["in_other_split"] >= 1


def test_the_dropout_of_the_protocol_replaces_that_of_the_model(folders):
    """A student saved with dropout 0 is tuned like its teacher."""
    for family in folders:
        model, _ = load_for(folders[family], TokenTask(), Tuning(dropout=0.25))
        rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
        assert rates == {0.25}


def test_figures_follow_from_sub_words_as_stated():
    """Sub-words [s, Par, is, est, s]: the first sub-word gives the tag of a word; a word without one is O."""
    sentence = Sentence(("Paris", "\u200b", "est", "loin"), (1, 4, 0, 2))
    word_ids = [None, 0, 0, 2, None]  # "loin" is cut off
    assert word_tags(sentence, word_ids, [3, 1, 4, 0, 3]) == [1, 0, 0, 0]
    assert subword_labels(sentence, word_ids, "all") == [-100, 1, 1, 0, -100]
    assert subword_labels(sentence, word_ids, "first") == [-100, 1, -100, 0, -100]


def test_cut_words_are_counted_and_duplicates_shown_beside(folders, tmp_path):
    long = ["convention", "préfecture"] * 20
    loaded = load(write_ner(tmp_path / "ner", train=20, test=5, extra_test=(long, long)))
    found = tune(folders["modernbert"], loaded, TUNING.model_copy(update={"max_tokens": 16}))
    tokenizer = AutoTokenizer.from_pretrained(folders["modernbert"])
    cut = 0
    for sentence in loaded.test:
        ids = tokenizer(list(sentence.words), is_split_into_words=True, truncation=True, max_length=16)
        cut += len(set(range(len(sentence.words))) - set(ids.word_ids()))
    assert found["cut_words"] == cut > 20
    assert found["test_rows"] == len(loaded.test_published) - loaded.counts["test"]["duplicates"]
    assert found["as_published"]["entity_f1"] != found["entity"]["f1"]


def test_figures_equal_seqeval_and_scikit_learn_on_the_same_predictions(folders, ner, monkeypatch):
    """Entities from the predictions that are kept; sub-words, where every word is one, from the same."""
    found = tune(folders["camembert"], ner, SHORT)
    gold, said = (unpack(found["predictions"][side]) for side in ("gold", "predicted"))
    assert gold == [list(sentence.tags) for sentence in ner.test]
    io = [[["O" if tag == 0 else f"I-{LABELS[tag]}" for tag in tags] for tags in side] for side in (gold, said)]
    assert found["entity_f1"] == pytest.approx(seqeval_f1(*io, zero_division=0))
    first = tune(folders["camembert"], ner, SHORT.model_copy(update={"labelled": "first"}))
    flat = [
        np.concatenate([np.array(tags) for tags in unpack(first["predictions"][side])])
        for side in ("gold", "predicted")
    ]
    assert first["subword"]["weighted_f1"] == pytest.approx(f1_score(*flat, average="weighted", zero_division=0))


def test_a_folder_without_a_model_is_refused(ner, tmp_path):
    with pytest.raises(FatalError, match="not an encoder"):
        tune(tmp_path, ner)

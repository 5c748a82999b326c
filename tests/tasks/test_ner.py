"""Fine-tuning for named entities: it learns, it repeats, it sees no test sentence, it leaves nothing behind."""

import os
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import f1_score
from transformers import AutoTokenizer

from storage.error import FatalError
from storage.store import Store
from tasks import ner as ner_module
from tasks.config import Score
from tasks.entities import entity_scores
from tasks.ner import Encoded, NerProtocol, encode, finetune_ner, score_ner, subword_labels, word_tags
from tasks.ner_set import Sentence, load_ner
from tests.tiny import make_teacher

# The tag of a word follows from the word alone, so that a tiny model learns it in a few steps.
TYPES = {"juge": 2, "médecin": 2, "préfecture": 1, "convention": 3, "employeur": 4}
PLAIN = ("le", "signe", "refuse", "vérifie", "attestation", "un", "avant")
PROTOCOL = NerProtocol(epochs=6, lr=1e-2, batch_rows=8, dropout=0.0)
KEY = "c" * 64


def write_ner(folder, train=200, test=30, seed=0, extra_test=()):
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        tokens = [draw.choices((*TYPES, *PLAIN), k=draw.randint(2, 6)) for _ in range(rows)]
        tokens += list(extra_test) if split == "test" else []
        tags = [[TYPES.get(word, 0) for word in words] for words in tokens]
        table = pa.table({"id": list(range(len(tokens))), "tokens": tokens, "ner_tags": tags})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


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
    return load_ner(write_ner(tmp_path_factory.mktemp("ner")))


@pytest.mark.parametrize("family", ["camembert", "modernbert"])
@pytest.mark.parametrize("labelled", ["all", "first"])
def test_it_learns_what_can_be_learned(folders, ner, family, labelled):
    protocol = PROTOCOL.model_copy(update={"labelled": labelled})
    found = finetune_ner(folders[family], ner, protocol, seed=0, device="cpu")
    # A post-norm model with wild random weights learns slowly; it still leaves saying O, which scores 0, far behind.
    always_o = entity_scores([s.tags for s in ner.test], [[0] * len(s.tags) for s in ner.test])
    assert always_o["f1"] == 0
    assert found["entity"]["f1"] > (0.9 if family == "modernbert" else 0.5)
    assert found["entity"]["support"] == always_o["support"]
    assert (found["train_rows"], found["test_rows"], found["cut_words"]) == (len(ner.train), len(ner.test), 0)


def test_a_seed_gives_the_same_figures_and_another_seed_others(folders, ner):
    protocol = PROTOCOL.model_copy(update={"epochs": 1.0, "dropout": 0.1})
    first, again, other = (finetune_ner(folders["camembert"], ner, protocol, seed, "cpu") for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_nothing_is_written_or_printed(folders, ner, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {path: os.stat(path).st_mtime_ns for path in folders["camembert"].iterdir()}
    finetune_ner(folders["camembert"], ner, PROTOCOL.model_copy(update={"epochs": 0.2}), 0, "cpu")
    assert list(tmp_path.iterdir()) == []
    assert {path: os.stat(path).st_mtime_ns for path in folders["camembert"].iterdir()} == before
    assert capsys.readouterr().out == ""


def test_test_sentences_never_reach_training(folders, tmp_path, monkeypatch):
    """A marker sentence is planted in the test split and, as a leak, in the train split."""
    marker = ["préfecture"] * 3 + ["convention"] * 3
    source = tmp_path / "ner"
    write_ner(source, train=40, test=10, extra_test=[marker])
    train = pq.read_table(source / "train-00000-of-00001.parquet").to_pylist()
    train += [{"id": 99, "tokens": marker, "ner_tags": [0] * 6}]
    pq.write_table(pa.Table.from_pylist(train), source / "train-00000-of-00001.parquet")
    given = []

    class Spy(ner_module.Trainer):
        def __init__(self, *args, **kwargs):
            given.extend([kwargs["train_dataset"], kwargs.get("eval_dataset")])
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(ner_module, "Trainer", Spy)
    loaded = load_ner(str(source))
    finetune_ner(folders["camembert"], loaded, PROTOCOL.model_copy(update={"epochs": 0.5}), 0, "cpu")
    trained, selected_by = given
    tokenizer = AutoTokenizer.from_pretrained(folders["camembert"])
    seen = {tuple(example["input_ids"]) for example in trained}
    for sentence in loaded.test:
        assert tuple(tokenizer(list(sentence.words), is_split_into_words=True)["input_ids"]) not in seen
    assert len(seen) == len(loaded.train)
    assert selected_by is None
    assert loaded.counts["train"]["in_other_split"] >= 1


def test_the_dropout_of_the_protocol_replaces_that_of_the_model(folders):
    """A student saved with dropout 0 is tuned like its teacher."""
    for family in folders:
        model, _ = ner_module._load(folders[family], NerProtocol(dropout=0.25))
        rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
        assert rates == {0.25}


def test_figures_follow_from_sub_words_as_stated():
    """Sub-words [s, Par, is, est, s]: the first sub-word gives the tag of a word; a word without one is O."""
    sentence = Sentence(("Paris", "\u200b", "est", "loin"), (1, 4, 0, 2))
    encoded = Encoded([0, 10, 11, 12, 2], [None, 0, 0, 2, None])  # "loin" is cut off
    assert word_tags(sentence, encoded, [3, 1, 4, 0, 3]) == [1, 0, 0, 0]
    assert subword_labels(sentence, encoded, "all") == [-100, 1, 1, 0, -100]
    assert subword_labels(sentence, encoded, "first") == [-100, 1, -100, 0, -100]


def test_cut_words_are_counted_and_duplicates_shown_beside(folders, tmp_path):
    long = ["convention", "préfecture"] * 20
    loaded = load_ner(write_ner(tmp_path / "ner", train=20, test=5, extra_test=[long, long]))
    found = finetune_ner(folders["modernbert"], loaded, PROTOCOL.model_copy(update={"max_tokens": 16}), 0, "cpu")
    tokenizer = AutoTokenizer.from_pretrained(folders["modernbert"])
    cut = 0
    for sentence in loaded.test:
        ids = tokenizer(list(sentence.words), is_split_into_words=True, truncation=True, max_length=16)
        cut += len(set(range(len(sentence.words))) - set(ids.word_ids()))
    assert found["cut_words"] == cut > 20
    assert found["test_rows"] == len(loaded.test_published) - loaded.counts["test"]["duplicates"]
    assert found["as_published"]["entity_f1"] != found["entity"]["f1"]


def test_sub_word_f1_equals_scikit_learn_on_the_predictions(folders, ner, monkeypatch):
    kept = []
    real = ner_module.predict
    monkeypatch.setattr(ner_module, "predict", lambda *args: kept.append(real(*args)) or kept[-1])
    found = finetune_ner(folders["camembert"], ner, PROTOCOL.model_copy(update={"epochs": 0.5}), 0, "cpu")
    tokenizer = AutoTokenizer.from_pretrained(folders["camembert"])
    encoded = list(encode(tokenizer, ner.test_published, 128))
    pairs = [
        (ner.test_published[row].tags[word], tag)
        for row in ner.distinct
        for word, tag in zip(encoded[row].word_ids, kept[0][row], strict=True)
        if word is not None
    ]
    gold, said = (np.array(side) for side in zip(*pairs, strict=True))
    expected = f1_score(gold, said, average="weighted", zero_division=0)
    assert found["subword"]["weighted_f1"] == pytest.approx(expected)


def test_seeds_are_kept_and_summed_up(folders, tmp_path, monkeypatch):
    source = write_ner(tmp_path / "ner", train=40, test=10)
    store = Store(tmp_path / "store")
    settings = Score(ner=source, ner_seeds=(0, 1), ner_epochs=1, ner_lr=1e-3, ner_train_rows=20)
    first = score_ner(store, KEY, folders["camembert"], settings, "cpu")
    assert set(first["runs"]) == {"0", "1"}
    assert first["runs"]["0"]["train_rows"] == 20
    values = [run["entity"]["f1"] for run in first["runs"].values()]
    assert first["summary"]["entity"]["f1"]["mean"] == pytest.approx(np.mean(values))

    monkeypatch.setattr(ner_module, "finetune_ner", lambda *args: first["runs"]["0"] | {"train_rows": 7})
    assert score_ner(store, KEY, folders["camembert"], settings, "cpu") == first
    more = score_ner(store, KEY, folders["camembert"], settings.model_copy(update={"ner_seeds": (0, 1, 2)}), "cpu")
    assert more["runs"]["2"]["train_rows"] == 7
    assert more["runs"]["0"] == first["runs"]["0"]


def test_a_set_that_is_not_there_is_not_run(folders, tmp_path):
    store = Store(tmp_path / "store")
    assert score_ner(store, KEY, folders["camembert"], Score())["status"] == "not run"
    absent = score_ner(store, KEY, folders["camembert"], Score(ner=str(tmp_path / "absent")))
    assert absent["status"] == "not run"
    assert "no such folder" in absent["reason"]


def test_a_folder_without_a_model_is_refused(ner, tmp_path):
    with pytest.raises(FatalError, match="not an encoder"):
        finetune_ner(tmp_path, ner, PROTOCOL, 0, "cpu")

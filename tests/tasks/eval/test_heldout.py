"""Held-out figures against a plain computation from full logits; scores kept by (model, protocol, set, seed)."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from storage.errors import FatalError
from storage.store import Store
from tasks.eval import heldout as score
from tasks.eval.heldout import block_counts, clustered_error, heldout_protocol, score_heldout, score_mask, spread_rows
from tasks.eval.scores import ScoreKey, make_scores, not_run
from tasks.models.student import make_student
from tasks.recipe.config import MaskSettings
from tasks.tokens.blocks import open_blocks
from tasks.tokens.mask import mask_rows
from tasks.tokens.vocabulary import load_vocabulary
from tests.harness.tiny import make_parts, make_teacher

MASK = MaskSettings()
KEY = "a" * 64


@pytest.fixture(scope="module", params=["camembert", "modernbert"])
def scene(request, tmp_path_factory):
    """Student, teacher, vocabulary and the blocks of two shards (the last block of each is padded)."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    teacher = make_teacher(folder / "teacher", request.param)
    vocabulary = load_vocabulary(str(folder / "teacher"))
    student = make_student(teacher, vocabulary, layers=2).float().eval()
    store = Store(folder / "store")
    parts = make_parts(store, folder / "teacher", shards=2, texts=6)
    blocks = [open_blocks(store, part.blocks_ref()) for part in parts]
    return student, teacher, vocabulary, blocks


def flat(figures):
    """The figures without the sums by block."""
    return {name: value for name, value in figures.items() if name != "by_block"}


def every_position(model, vocabulary, blocks):
    """Log-probabilities [n, V] and labels [n] of every masked position, from the model's own whole forward."""
    log_probs, labels = [], []
    for part in blocks:
        rows = np.arange(len(part))
        masked = mask_rows(part.key, rows, part.input_ids[rows], part.lengths, vocabulary, score_mask(MASK), None, 0)
        for row in rows:
            length = int(part.lengths[row])
            with torch.no_grad():
                logits = model(input_ids=torch.from_numpy(masked.input_ids[row : row + 1, :length])).logits[0]
            for position, label in zip(masked.positions[row], masked.labels[row], strict=True):
                if label != -100:
                    log_probs.append(F.log_softmax(logits[position].double(), -1))
                    labels.append(int(label))
    return torch.stack(log_probs), torch.tensor(labels)


def test_figures_equal_a_plain_computation_from_full_logits(scene):
    student, teacher, vocabulary, blocks = scene
    found = score_heldout(student, vocabulary, blocks, MASK, 10_000, teacher)
    own, labels = every_position(student, vocabulary, blocks)
    told, _ = every_position(teacher, vocabulary, blocks)
    top1 = float((own.argmax(-1) == labels).double().mean())
    teacher_top1 = float((told.argmax(-1) == labels).double().mean())
    frequent = Counter(labels.tolist()).most_common(1)[0][1] / len(labels)
    assert found["positions"] == len(labels)
    assert found["blocks"] == sum(map(len, blocks))
    assert found["top1"] == pytest.approx(top1)
    assert found["teacher_top1"] == pytest.approx(teacher_top1)
    assert found["frequent_top1"] == pytest.approx(frequent)
    assert found["mlm_loss"] == pytest.approx(float(F.nll_loss(own, labels)), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(float(F.nll_loss(own, labels))), rel=1e-4)
    assert found["teacher_perplexity"] == pytest.approx(math.exp(float(F.nll_loss(told, labels))), rel=1e-4)
    kl = F.kl_div(own, told, reduction="batchmean", log_target=True)
    assert found["kl"] == pytest.approx(float(kl), rel=1e-4)
    assert found["agreement"] == pytest.approx(float((own.argmax(-1) == told.argmax(-1)).double().mean()))
    assert all(isinstance(value, float) for value in flat(found).values())


def test_sums_by_block_give_the_figures_back(scene):
    student, teacher, vocabulary, blocks = scene
    found = score_heldout(student, vocabulary, blocks, MASK, 10_000, teacher)
    for name, figure in (("hits", "top1"), ("teacher_hits", "teacher_top1"), ("kl", "kl")):
        counts = block_counts(found, name)
        assert counts.shape == (1, found["blocks"], 2)
        assert counts[0, :, 0].sum() / counts[0, :, 1].sum() == pytest.approx(found[figure])


def test_the_size_of_chunks_changes_nothing(scene, monkeypatch):
    student, teacher, vocabulary, blocks = scene
    whole = score_heldout(student, vocabulary, blocks, MASK, 10_000, teacher)
    monkeypatch.setattr(score, "CHUNK_ROWS", 7)
    monkeypatch.setattr(score, "FORWARD_TOKENS", 96)
    pieces = score_heldout(student, vocabulary, blocks, MASK, 10_000, teacher)
    assert flat(pieces) == pytest.approx(flat(whole), rel=1e-5)


def test_a_model_agrees_with_itself(scene):
    _, teacher, vocabulary, blocks = scene
    found = score_heldout(teacher, vocabulary, blocks, MASK, 10_000, teacher)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["agreement"] == 1
    assert found["top1"] == found["teacher_top1"]


def test_kept_counts_from_the_most_frequent_token():
    label = np.array([3, 3, 3, 3, 5, 6, 7, 8, 9, 10])
    seen = {
        "label": label,
        "block": np.arange(10) // 2,
        "at_mask": np.ones(10, bool),
        "loss": np.ones(10),
        "teacher_loss": np.ones(10),
        "hit": np.arange(10) < 6,
        "teacher_hit": np.arange(10) < 8,
        "kl": np.zeros(10),
        "agree": np.ones(10),
    }
    assert score._figures(seen)["kept"] == pytest.approx((0.6 - 0.4) / (0.8 - 0.4))
    seen["teacher_hit"] = np.arange(10) < 4
    assert "kept" not in score._figures(seen)


def test_masks_are_the_same_for_all_recipes_and_never_those_of_training(scene):
    student, _, vocabulary, blocks = scene
    plain = score_heldout(student, vocabulary, blocks, MASK, 10_000)
    other = score_heldout(student, vocabulary, blocks, MaskSettings(seed=7, kind="smoothed", variants=3), 10_000)
    assert plain == other
    for seed in (0, 7, score.MASK_SEED):
        assert score_mask(MaskSettings(seed=seed)).seed != seed


def test_dropout_is_off_while_scoring_and_the_mode_comes_back(scene):
    _, teacher, vocabulary, blocks = scene
    student = make_student(teacher, vocabulary, layers=2, dropout=0.5).float().train()
    first = score_heldout(student, vocabulary, blocks, MASK, 8)
    assert first == score_heldout(student, vocabulary, blocks, MASK, 8)
    assert student.training


def test_the_limit_takes_blocks_evenly_from_all_shards(scene):
    student, _, vocabulary, blocks = scene
    found = score_heldout(student, vocabulary, blocks, MASK, 3)
    assert found["blocks"] == 3
    assert spread_rows(10, 3).tolist() == [0, 3, 6]
    assert spread_rows(3, 10).tolist() == [0, 1, 2]


def test_several_masks_show_every_block_again_elsewhere(scene):
    student, teacher, vocabulary, blocks = scene
    once = score_heldout(student, vocabulary, blocks, MASK, 8, teacher)
    found = score_heldout(student, vocabulary, blocks, MASK, 8, teacher, masks=3)
    assert found["blocks"] == once["blocks"] == 8
    assert found["positions"] == 3 * once["positions"]
    assert [3 * count for count in once["by_block"]["positions"]] == found["by_block"]["positions"]
    assert [3 * total for total in once["by_block"]["kl"]] != pytest.approx(found["by_block"]["kl"], rel=1e-3)
    assert heldout_protocol(blocks, MASK, 8, masks=3) != heldout_protocol(blocks, MASK, 8)


def test_rows_that_pad_the_decoder_do_not_count(scene):
    student, teacher, vocabulary, blocks = scene
    before = score_heldout(student, vocabulary, blocks, MASK, 8, teacher)
    wider = make_student(teacher, vocabulary, layers=2).float().eval()
    wider.load_state_dict(student.state_dict())
    wider.resize_token_embeddings(vocabulary.size + 13)
    with torch.no_grad():
        wider.get_output_embeddings().bias[vocabulary.size :] = 100.0
    found = score_heldout(wider, vocabulary, blocks, MASK, 8, teacher)
    assert flat(found) == pytest.approx(flat(before), rel=1e-5)


def test_nothing_to_score_is_said_and_broken_weights_are_refused(scene):
    _, teacher, vocabulary, blocks = scene
    assert score_heldout(teacher, vocabulary, [], MASK, 8)["status"] == "not run"
    broken = make_student(teacher, vocabulary, layers=2).float()
    with torch.no_grad():
        broken.get_output_embeddings().bias[0] = float("nan")
    with pytest.raises(FatalError, match="not finite"):
        score_heldout(broken, vocabulary, blocks, MASK, 8)


def test_clustered_error_is_that_of_block_means_for_equal_blocks():
    values = np.random.default_rng(0).random(60)
    means = values.reshape(12, 5).mean(axis=1)
    assert clustered_error(values, np.repeat(np.arange(12), 5)) == pytest.approx(means.std(ddof=1) / math.sqrt(12))
    hanging_together = np.repeat(means > 0.5, 5).astype(float)
    alone = clustered_error(hanging_together, np.arange(60))
    assert clustered_error(hanging_together, np.repeat(np.arange(12), 5)) > 2 * alone


def test_scores_are_kept_by_model_protocol_set_and_seed(tmp_path):
    store = Store(tmp_path)
    asked = []

    def compute():
        asked.append(1)
        return {"top1": 0.25, "by": {"LOC": 1.0}}

    trial = ScoreKey(KEY, {"lr": 1e-3}, "heldout")
    assert make_scores(store, trial, compute) == {"top1": 0.25, "by": {"LOC": 1.0}}
    assert make_scores(store, trial, compute) == {"top1": 0.25, "by": {"LOC": 1.0}}
    assert len(asked) == 1
    for other in (
        ScoreKey("b" * 64, {"lr": 1e-3}, "heldout"),
        ScoreKey(KEY, {"lr": 2e-3}, "heldout"),
        ScoreKey(KEY, {"lr": 1e-3}, "ner"),
        ScoreKey(KEY, {"lr": 1e-3}, "heldout", seed=1),
    ):
        make_scores(store, other, compute)
    assert len(asked) == 5
    make_scores(store, trial, compute, force=True)
    assert len(asked) == 6


def test_what_was_not_run_is_not_kept(tmp_path):
    store, trial = Store(tmp_path), ScoreKey(KEY, {}, "ner")
    assert make_scores(store, trial, lambda: not_run("no such set"))["reason"] == "no such set"
    assert not store.has(trial.ref)
    assert make_scores(store, trial, lambda: {"f1": 1.0}) == {"f1": 1.0}


def test_new_heldout_text_makes_new_scores(scene):
    *_, blocks = scene
    settings = [heldout_protocol(part, MASK, 8, "t") for part in (blocks, blocks[:1])]
    refs = {ScoreKey(KEY, protocol, "heldout").ref for protocol in settings}
    assert len(refs) == 2

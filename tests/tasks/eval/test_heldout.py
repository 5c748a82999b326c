"""Held-out figures against a direct computation from full logits."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from storage.errors import FatalError
from storage.store import Store
from tasks.eval import heldout
from tasks.eval.heldout import (
    block_counts,
    clustered_standard_error,
    evenly_spaced_rows,
    heldout_protocol,
    score_heldout,
    score_mask,
)
from tasks.eval.scores import ScoreKey
from tasks.models.student import make_student
from tasks.recipe.config import MaskSettings
from tasks.tokens.blocks import open_blocks
from tasks.tokens.mask import mask_rows
from tasks.tokens.vocabulary import load_vocabulary
from tests.harness.tiny import make_parts, make_teacher

MASK = MaskSettings()
KEY = "a" * 64


@pytest.fixture(scope="module", params=["camembert", "modernbert"])
def inputs(request, tmp_path_factory):
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
    """The figures without the sums per block."""
    return {name: value for name, value in figures.items() if name != "by_block"}


def every_position(model, vocabulary, blocks):
    """Log-probabilities [n, V] and labels [n] of every masked position, from the model's own full forward pass."""
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


def test_figures_equal_a_direct_computation_from_full_logits(inputs):
    student, teacher, vocabulary, blocks = inputs
    found = score_heldout(student, vocabulary, blocks, MASK, 10_000, teacher)
    own, labels = every_position(student, vocabulary, blocks)
    of_teacher, _ = every_position(teacher, vocabulary, blocks)
    top1 = float((own.argmax(-1) == labels).double().mean())
    teacher_top1 = float((of_teacher.argmax(-1) == labels).double().mean())
    frequent = Counter(labels.tolist()).most_common(1)[0][1] / len(labels)
    assert found["positions"] == len(labels)
    assert found["blocks"] == sum(map(len, blocks))
    assert found["top1"] == pytest.approx(top1)
    assert found["teacher_top1"] == pytest.approx(teacher_top1)
    assert found["frequent_top1"] == pytest.approx(frequent)
    assert found["mlm_loss"] == pytest.approx(float(F.nll_loss(own, labels)), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(float(F.nll_loss(own, labels))), rel=1e-4)
    assert found["teacher_perplexity"] == pytest.approx(math.exp(float(F.nll_loss(of_teacher, labels))), rel=1e-4)
    kl = F.kl_div(own, of_teacher, reduction="batchmean", log_target=True)
    assert found["kl"] == pytest.approx(float(kl), rel=1e-4)
    assert found["agreement"] == pytest.approx(float((own.argmax(-1) == of_teacher.argmax(-1)).double().mean()))
    assert all(isinstance(value, float) for value in flat(found).values())


def test_sums_per_block_add_up_to_the_figures(inputs):
    student, teacher, vocabulary, blocks = inputs
    found = score_heldout(student, vocabulary, blocks, MASK, 10_000, teacher)
    for name, figure in (("hits", "top1"), ("teacher_hits", "teacher_top1"), ("kl", "kl")):
        counts = block_counts(found, name)
        assert counts.shape == (1, found["blocks"], 2)
        assert counts[0, :, 0].sum() / counts[0, :, 1].sum() == pytest.approx(found[figure])


def test_chunk_size_does_not_change_the_figures(inputs, monkeypatch):
    student, teacher, vocabulary, blocks = inputs
    one_chunk = score_heldout(student, vocabulary, blocks, MASK, 10_000, teacher)
    monkeypatch.setattr(heldout, "CHUNK_POSITIONS", 7)
    monkeypatch.setattr(heldout, "FORWARD_TOKENS", 96)
    many_chunks = score_heldout(student, vocabulary, blocks, MASK, 10_000, teacher)
    assert flat(many_chunks) == pytest.approx(flat(one_chunk), rel=1e-5)


def test_model_agrees_with_itself(inputs):
    _, teacher, vocabulary, blocks = inputs
    found = score_heldout(teacher, vocabulary, blocks, MASK, 10_000, teacher)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["agreement"] == 1
    assert found["top1"] == found["teacher_top1"]


def test_kept_is_relative_to_the_most_frequent_token():
    label = np.array([3, 3, 3, 3, 5, 6, 7, 8, 9, 10])
    columns = {
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
    assert heldout._figures(columns)["kept"] == pytest.approx((0.6 - 0.4) / (0.8 - 0.4))
    columns["teacher_hit"] = np.arange(10) < 4
    assert "kept" not in heldout._figures(columns)


def test_masks_are_equal_for_all_recipes_and_differ_from_training_masks(inputs):
    student, _, vocabulary, blocks = inputs
    plain = score_heldout(student, vocabulary, blocks, MASK, 10_000)
    other = score_heldout(student, vocabulary, blocks, MaskSettings(seed=7, kind="smoothed", variants=3), 10_000)
    assert plain == other
    for seed in (0, 7, heldout.MASK_SEED):
        assert score_mask(MaskSettings(seed=seed)).seed != seed


def test_dropout_is_off_while_scoring_and_the_training_mode_is_restored(inputs):
    _, teacher, vocabulary, blocks = inputs
    student = make_student(teacher, vocabulary, layers=2, dropout=0.5).float().train()
    first = score_heldout(student, vocabulary, blocks, MASK, 8)
    assert first == score_heldout(student, vocabulary, blocks, MASK, 8)
    assert student.training


def test_limit_takes_evenly_spaced_blocks_of_all_shards(inputs):
    student, _, vocabulary, blocks = inputs
    found = score_heldout(student, vocabulary, blocks, MASK, 3)
    assert found["blocks"] == 3
    assert evenly_spaced_rows(10, 3).tolist() == [0, 3, 6]
    assert evenly_spaced_rows(3, 10).tolist() == [0, 1, 2]


def test_several_masks_score_each_block_at_different_positions(inputs):
    student, teacher, vocabulary, blocks = inputs
    once = score_heldout(student, vocabulary, blocks, MASK, 8, teacher)
    found = score_heldout(student, vocabulary, blocks, MASK, 8, teacher, masks=3)
    assert found["blocks"] == once["blocks"] == 8
    assert found["positions"] == 3 * once["positions"]
    assert [3 * count for count in once["by_block"]["positions"]] == found["by_block"]["positions"]
    assert [3 * total for total in once["by_block"]["kl"]] != pytest.approx(found["by_block"]["kl"], rel=1e-3)
    assert heldout_protocol(blocks, MASK, 8, masks=3) != heldout_protocol(blocks, MASK, 8)


def test_padding_rows_of_the_decoder_do_not_count(inputs):
    student, teacher, vocabulary, blocks = inputs
    before = score_heldout(student, vocabulary, blocks, MASK, 8, teacher)
    wider = make_student(teacher, vocabulary, layers=2).float().eval()
    wider.load_state_dict(student.state_dict())
    wider.resize_token_embeddings(vocabulary.size + 13)
    with torch.no_grad():
        wider.get_output_embeddings().bias[vocabulary.size :] = 100.0
    found = score_heldout(wider, vocabulary, blocks, MASK, 8, teacher)
    assert flat(found) == pytest.approx(flat(before), rel=1e-5)


def test_no_text_is_not_run_and_broken_weights_fail(inputs):
    _, teacher, vocabulary, blocks = inputs
    assert score_heldout(teacher, vocabulary, [], MASK, 8)["status"] == "not run"
    broken = make_student(teacher, vocabulary, layers=2).float()
    with torch.no_grad():
        broken.get_output_embeddings().bias[0] = float("nan")
    with pytest.raises(FatalError, match="not finite"):
        score_heldout(broken, vocabulary, blocks, MASK, 8)


def test_clustered_standard_error_is_that_of_block_means_for_equal_blocks():
    values = np.random.default_rng(0).random(60)
    means = values.reshape(12, 5).mean(axis=1)
    assert clustered_standard_error(values, np.repeat(np.arange(12), 5)) == pytest.approx(
        means.std(ddof=1) / math.sqrt(12)
    )
    correlated = np.repeat(means > 0.5, 5).astype(float)
    independent = clustered_standard_error(correlated, np.arange(60))
    assert clustered_standard_error(correlated, np.repeat(np.arange(12), 5)) > 2 * independent


def test_new_heldout_text_changes_the_key(inputs):
    *_, blocks = inputs
    settings = [heldout_protocol(part, MASK, 8, "t") for part in (blocks, blocks[:1])]
    refs = {ScoreKey(KEY, protocol, "heldout").ref for protocol in settings}
    assert len(refs) == 2

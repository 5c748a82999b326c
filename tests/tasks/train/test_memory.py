"""Peak memory of a training step at the size of camembert-base, traced with fake tensors (shapes without data).

The memory that the loss adds to the encoder's must not grow with rows x vocabulary beyond one chunk (256 rows).
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CamembertConfig, CamembertForMaskedLM

from tasks.loader.batch import Batch
from tasks.models.forward import decoder_of, head_features
from tasks.recipe.config import LossSettings
from tasks.train.loss import RowCounts, Weights, decoder_logits, fused_loss
from tasks.train.step import StudentWithLoss
from tasks.train.teacher_signal import TeacherSignal
from tests.harness.live_tensors import LiveTensors

VOCABULARY, WIDTH, LENGTH = 32_005, 768, 512
CHUNK = 256
"""Rows per chunk on a CPU."""
MAX_ALIVE = 7
"""Tensors [chunk, V] that may be alive at once: logits, log-probabilities and gradients of student and teacher."""
FLOAT = 4


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    """Every tensor of a test is fake, so 16,384 rows take no memory and no time."""
    with FakeTensorMode():
        yield


def camembert(vocabulary: int) -> Any:
    """A student of six layers, without data."""
    config = CamembertConfig(
        vocab_size=vocabulary,
        num_hidden_layers=6,
        max_position_embeddings=LENGTH + 2,
        type_vocab_size=1,
        pad_token_id=1,
    )
    return CamembertForMaskedLM(config)


def batch_of(blocks: int) -> Batch:
    """All positions of full blocks carry loss."""
    ids = torch.empty(blocks, LENGTH, dtype=torch.int64)
    valid = torch.empty(blocks, LENGTH, dtype=torch.bool)
    tokens = blocks * LENGTH
    return Batch(ids, None, None, valid, ids.clone(), None, tokens, tokens, tokens)


def trace(blocks: int, vocabulary: int) -> LiveTensors:
    """Forward, loss and backward of one micro-batch, with the teacher's hidden states from a cache."""
    student, batch = camembert(vocabulary), batch_of(blocks)
    student_with_loss = StudentWithLoss(student, LossSettings(), compile_encoder=False)
    hidden_ND = torch.empty(batch.selected, WIDTH)
    with LiveTensors() as live:
        with torch.no_grad():
            signal = TeacherSignal(decoder_logits(head_features(student, hidden_ND), *decoder_of(student)), hidden_ND)
        losses = student_with_loss(batch, signal, RowCounts(float(batch.selected), float(batch.masked)))
        losses.total.backward()
    return live


@pytest.mark.slow
def test_the_step_does_not_grow_with_rows_times_vocabulary() -> None:
    """A full vocabulary adds the same memory to that of an eight-token vocabulary for 16 k rows as for 4 k rows."""
    peaks = {(blocks, size): trace(blocks, size).peak for blocks in (8, 32) for size in (8, VOCABULARY)}
    few, many = (peaks[blocks, VOCABULARY] - peaks[blocks, 8] for blocks in (8, 32))
    one_chunk = CHUNK * VOCABULARY * FLOAT
    full_size = 32 * LENGTH * VOCABULARY * FLOAT
    decoder = VOCABULARY * WIDTH * FLOAT
    print(
        f"\n16,384 rows: {many / 1e6:,.0f} MB, 4,096 rows: {few / 1e6:,.0f} MB; one [N, V]: {full_size / 1e6:,.0f} MB"
    )
    assert many < MAX_ALIVE * one_chunk + 3 * decoder < full_size
    assert many - few < 0.05 * one_chunk


@pytest.mark.parametrize("rows", [4096, 16_384])
def test_only_a_few_chunks_of_logits_are_alive_at_once(rows: int) -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape).requires_grad_()

    features, weight, bias, hidden = empty(rows, WIDTH), empty(VOCABULARY, WIDTH), empty(VOCABULARY), empty(rows, WIDTH)
    with LiveTensors() as live:
        losses = fused_loss(
            features,
            weight,
            bias,
            torch.empty(rows, dtype=torch.int64),
            weights=Weights(0.5, 0.3, 0.2),
            temperature=2.0,
            counts=RowCounts(rows, rows),
            teacher_logits=decoder_logits(features.detach(), weight.detach(), bias.detach()),
            student_hidden_ND=hidden,
            teacher_hidden_ND=hidden.detach(),
        )
        losses.total.backward()
    print(f"\n{live.most((CHUNK, VOCABULARY))} of [{CHUNK}, {VOCABULARY}] at once")
    assert 2 <= live.most((CHUNK, VOCABULARY)) <= MAX_ALIVE
    assert live.most((rows, VOCABULARY)) == 0

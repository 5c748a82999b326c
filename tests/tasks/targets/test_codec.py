"""Encodings: documented sizes, reconstruction errors, odd widths, outlier channels, large vocabularies."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor
from torch.nn import functional as F

from storage.errors import FatalError
from tasks.recipe.config import TargetSettings
from tasks.targets.codec import Calibration, Codec, fit_calibration, make_codec, topk_logits

HIDDEN = ["int8", "int4", "bf16"]
NOISE = {"int8": 1e-4, "int4": 1.5e-2, "bf16": 1e-4}
"""Maximum squared error, relative to the variance of a channel."""


def hidden_like(rows: int, width: int, seed: int = 0) -> Tensor:
    """Output of a final layer norm: channels with different means and standard deviations."""
    draw = torch.Generator().manual_seed(seed)
    gain, shift = torch.rand(width, generator=draw) + 0.5, torch.randn(width, generator=draw)
    return torch.randn(rows, width, generator=draw) * gain + shift


def calibrated(x_ND: Tensor) -> Calibration:
    wide = x_ND.double()
    return fit_calibration(len(wide), wide.sum(0), (wide**2).sum(0))


def codec_for(encoding: str, x_ND: Tensor, vocab_size: int = 1000) -> Codec:
    return make_codec(TargetSettings(encoding=encoding), x_ND.shape[1], calibrated(x_ND), vocab_size)


@pytest.mark.parametrize(("encoding", "size"), [("int8", 770), ("int4", 408), ("bf16", 1536)])
def test_bytes_per_position_at_width_768(encoding, size):
    codec = codec_for(encoding, hidden_like(4, 768))
    payload = codec.encode(hidden_like(4, 768))
    assert payload.shape == (4, size)
    assert payload.dtype == torch.uint8
    assert codec.bytes_per_position == size


@pytest.mark.parametrize(("vocab_size", "size"), [(32_005, 2 + 4 * 64), (65_535, 2 + 4 * 64), (65_536, 2 + 6 * 64)])
def test_bytes_per_position_of_topk(vocab_size, size):
    codec = make_codec(TargetSettings(encoding="topk"), 768, None, vocab_size)
    assert codec.bytes_per_position == size
    assert codec.encode(torch.randn(2, vocab_size)).shape == (2, size)


@pytest.mark.parametrize("width", [768, 192, 100, 33, 1])
@pytest.mark.parametrize("encoding", HIDDEN)
def test_decoded_hidden_states_are_close_to_the_original(encoding, width):
    x_ND = hidden_like(300, width)
    codec = codec_for(encoding, x_ND)
    back_ND = codec.decode(codec.encode(x_ND))
    error_D = ((back_ND - x_ND) ** 2).mean(0) / x_ND.var(0)
    assert back_ND.shape == x_ND.shape
    assert float(error_D.max()) < 2 * NOISE[encoding]  # a single channel
    assert float(error_D.mean()) < NOISE[encoding]


@pytest.mark.parametrize("encoding", HIDDEN)
def test_positions_are_encoded_independently(encoding):
    x_ND = hidden_like(9, 40)
    codec = codec_for(encoding, x_ND)
    payload = codec.encode(x_ND)
    for rows in ([3], [8, 0, 3], []):
        assert torch.equal(codec.encode(x_ND[rows]), payload[rows])
        assert torch.equal(codec.decode(payload[rows]), codec.decode(payload)[rows])
        assert codec.decode(payload[rows]).shape == (len(rows), 40)


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_two_outlier_channels_do_not_increase_the_error(encoding):
    x_ND = hidden_like(500, 96)
    scale_D = torch.ones(96)
    scale_D[[5, 70]] = 50
    plain, scaled = codec_for(encoding, x_ND), codec_for(encoding, x_ND * scale_D)
    back_ND = plain.decode(plain.encode(x_ND))
    back_scaled_ND = scaled.decode(scaled.encode(x_ND * scale_D)) / scale_D
    step_D = (back_ND - x_ND).abs().max() * torch.ones(96)
    assert bool(((back_scaled_ND - x_ND).abs() <= 1.01 * step_D).all())


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_constant_channels_are_decoded(encoding):
    x_ND = hidden_like(50, 64)
    x_ND[:, 3], x_ND[:, 4] = 7.0, 0.0
    codec = codec_for(encoding, x_ND)
    back_ND = codec.decode(codec.encode(x_ND))
    assert float((back_ND[:, 3] - 7).abs().max()) < 7e-3
    assert float(back_ND[:, 4].abs().max()) < 1e-3
    assert bool(codec.decode(codec.encode(torch.zeros(2, 64))).isfinite().all())


def test_decodes_into_the_requested_dtype():
    x_ND = hidden_like(4, 32)
    for encoding in HIDDEN:
        codec = codec_for(encoding, x_ND)
        assert codec.decode(codec.encode(x_ND), torch.bfloat16).dtype == torch.bfloat16
        assert codec.decode(codec.encode(x_ND.bfloat16())).dtype == torch.float32


@pytest.mark.parametrize("encoding", [*HIDDEN, "topk"])
def test_unused_slots_of_zero_bytes_decode_to_finite_numbers(encoding):
    codec = codec_for(encoding, hidden_like(8, 32))
    zeros = torch.zeros(3, codec.bytes_per_position, dtype=torch.uint8)
    if encoding == "topk":
        assert bool(topk_logits(codec.decode_topk(zeros), 0, 3, 1000).isfinite().all())
    else:
        assert bool(codec.decode(zeros).isfinite().all())


@settings(deadline=None, max_examples=60)
@given(
    arrays.arrays(np.float32, (3, 40), elements=st.floats(-3e4, 3e4, width=32)),
    st.sampled_from(["int8", "int4"]),
)
def test_any_finite_values_are_decoded_within_one_step(values, encoding):
    """Also far outside the calibrated range: no overflow, no wrap-around."""
    x_ND = torch.from_numpy(values)
    codec = codec_for(encoding, hidden_like(50, 40))
    mean_D, std_D = codec.calibration.mean, codec.calibration.std
    error = ((codec.decode(codec.encode(x_ND)) - x_ND) / std_D).abs()
    largest = ((x_ND - mean_D) / std_D).abs().amax(-1, keepdim=True)
    relative = 0.0045 if encoding == "int8" else 0.13
    assert bool((error <= relative * largest + 2e-3).all())


# ---- topk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [500, 70_000])
def test_topk_stores_the_largest_logits_and_the_tail_mass(vocab_size):
    logits_NV = 3 * torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(1))
    logits_NV[:, -1] = 20.0  # the highest id, above 65,535 in the larger vocabulary
    codec = make_codec(TargetSettings(encoding="topk", top_k=16), 32, None, vocab_size)
    kept = codec.decode_topk(codec.encode(logits_NV))
    log_p_NV = logits_NV.log_softmax(-1)
    assert torch.equal(kept.ids, log_p_NV.topk(16).indices)
    torch.testing.assert_close(kept.log_probs, log_p_NV.topk(16).values, rtol=1e-3, atol=1e-3)
    tail_N = 1 - log_p_NV.topk(16).values.exp().sum(-1)
    torch.testing.assert_close(kept.log_tail.exp(), tail_N, rtol=2e-2, atol=1e-6)


def test_topk_logits_are_a_distribution_that_matches_the_stored_tokens():
    logits_NV = 3 * torch.randn(6, 300, generator=torch.Generator().manual_seed(2))
    codec = make_codec(TargetSettings(encoding="topk", top_k=32), 8, None, 300)
    kept = codec.decode_topk(codec.encode(logits_NV))
    spread_nV = topk_logits(kept, 2, 5, 300)
    p_nV = F.softmax(logits_NV[2:5], dim=-1)
    torch.testing.assert_close(spread_nV.exp().sum(-1), torch.ones(3), rtol=2e-3, atol=0)
    torch.testing.assert_close(
        spread_nV.exp().gather(1, kept.ids[2:5]), p_nV.gather(1, kept.ids[2:5]), rtol=2e-2, atol=0
    )
    outside = spread_nV.scatter(1, kept.ids[2:5], torch.nan)
    assert [len(row[~row.isnan()].unique()) for row in outside] == [1, 1, 1]


def test_topk_of_a_full_vocabulary_and_of_a_token_of_probability_1():
    logits_NV = torch.tensor([[0.0, 90.0, -90.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    codec = make_codec(TargetSettings(encoding="topk", top_k=64), 8, None, 4)
    kept = codec.decode_topk(codec.encode(logits_NV))
    assert codec.top_k == 4
    spread_NV = topk_logits(kept, 0, 2, 4)
    assert bool(spread_NV.isfinite().all())
    torch.testing.assert_close(spread_NV.softmax(-1), logits_NV.softmax(-1), rtol=1e-3, atol=1e-6)


def test_topk_refuses_to_decode_hidden_states():
    codec = make_codec(TargetSettings(encoding="topk"), 8, None, 100)
    with pytest.raises(ValueError, match="decode_topk"):
        codec.decode(codec.encode(torch.randn(2, 100)))


# ---- calibration ---------------------------------------------------------------------------------------------


def test_calibration_is_mean_and_std_and_survives_serialisation():
    x_ND = hidden_like(400, 20) * 1e3
    calibration = calibrated(x_ND)
    torch.testing.assert_close(calibration.mean, x_ND.mean(0), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(calibration.std, x_ND.std(0, correction=0), rtol=1e-5, atol=0)
    again = Calibration.from_text(calibration.to_text())
    assert torch.equal(again.mean, calibration.mean)
    assert torch.equal(again.std, calibration.std)


@pytest.mark.parametrize("text", ["not base64!", "AAAAAAA=", "AAAAAAAAAAAAAAAA"])
def test_invalid_calibration_text_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        Calibration.from_text(text)


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_a_calibrated_encoding_needs_a_calibration_of_its_width(encoding):
    with pytest.raises(FatalError, match=f"targets.encoding = {encoding} needs a calibration of 32 channels"):
        make_codec(TargetSettings(encoding=encoding), 32, None, 100)
    with pytest.raises(FatalError, match="has 16"):
        make_codec(TargetSettings(encoding=encoding), 32, calibrated(hidden_like(5, 16)), 100)


def test_different_codecs_have_different_fingerprints():
    x_ND = hidden_like(30, 32)
    same = {codec_for("int8", x_ND).fingerprint for _ in range(2)}
    others = {codec_for("int4", x_ND).fingerprint, codec_for("int8", x_ND + 1).fingerprint}
    assert len(same) == 1
    assert len(same | others) == 3

"""Encodes the teacher's output at one position as bytes, and decodes it: quantized hidden states, or top-k logits.

    codec = make_codec(recipe.targets, width=768, calibration=calibration, vocab_size=32005)
    payload_NP = codec.encode(hidden_ND)              # uint8, P = codec.bytes_per_position
    hidden_ND = codec.decode(payload_NP, torch.bfloat16)

    int8   D + 2 bytes per position. Absmax quantization of calibrated channels (z = (x - mean) / std): 255 levels from
           -127 to 127, one fp16 scale per position.
    int4   D / 2 + D / 32 bytes. Group-wise quantization of the same channels: 16 levels, two per byte, with one 8-bit
           logarithmic scale per group of 32 channels.
    bf16   2 D bytes. Hidden states as bfloat16, the reference for the others.
    topk   2 + 4 k bytes. The k largest log-probabilities (fp16), their token ids (uint16), and the log of the remaining
           probability mass, the tail (fp16). 2 + 6 k bytes with uint32 ids, for 65,536 tokens or more.

The trainer applies the teacher's own LM head to decoded hidden states, so they give logits over the full vocabulary.
Per-channel calibration keeps outlier channels (Dettmers et al., "LLM.int8()", 2022) from setting the scale of all
others. Encoding and decoding run on the device of their input, so a batch is copied to the GPU as bytes. All integers
and floats are little-endian.

Shapes: N positions, D hidden size, V vocabulary, P bytes per position, G groups of 32 channels, k logits stored.
"""

import base64
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from storage.arrow import WIDE_VOCABULARY
from storage.errors import FatalError
from storage.fingerprint import canonical_json, sha256_bytes
from tasks.recipe.config import TargetSettings
from tasks.targets.keys import needs_calibration

GROUP = 32
"""Channels per scale in int4."""

STEPS_PER_OCTAVE, SCALE_BIAS = 8, 128
"""A scale of int4 is 2 ** ((byte - SCALE_BIAS) / STEPS_PER_OCTAVE): 9 % apart, from 2^-16 to 2^15.9."""

MIN_SCALE = 2.0**-14
"""Smallest normal fp16: the minimum scale of int8, so that a position equal to the mean does not divide by zero."""

MIN_LOG_PROB = -1e4
"""Log-probability used for probability zero; finite in fp16 and in every softmax."""

MIN_STD = 1e-4
"""Minimum standard deviation of a channel, relative to the median deviation and to the channel's own mean (bfloat16
rounds by 4e-3)."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Mean and standard deviation of each channel of the teacher's last hidden state; float32 [D] on the CPU."""

    mean: Tensor
    std: Tensor

    def to_text(self) -> str:
        """Returns mean and standard deviation as base64 of little-endian float32, for a file's metadata."""
        both = torch.cat([self.mean, self.std]).numpy().astype("<f4")
        return base64.b64encode(both.tobytes()).decode()

    @staticmethod
    def from_text(text: str) -> "Calibration":
        """Parses the result of `to_text`. ValueError: any other text."""
        both = torch.from_numpy(np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32))
        if len(both) % 2:
            raise ValueError("means and deviations differ in length")
        mean_D, std_D = both.chunk(2)
        return Calibration(mean_D.clone(), std_D.clone())


def fit_calibration(count: int, sum_D: Tensor, squares_D: Tensor) -> Calibration:
    """Computes the calibration from the number of positions and the float64 sums of x and x² [D].

    A constant channel gets a small standard deviation instead of 0.
    """
    mean_D = sum_D / count
    std_D = (squares_D / count - mean_D**2).clamp(min=0).sqrt()
    min_std_D = MIN_STD * torch.maximum(std_D.median(), mean_D.abs())
    return Calibration(mean_D.float(), torch.maximum(std_D, min_std_D.clamp(min=1e-12)).float())


class TopK(NamedTuple):
    """Top-k log-probabilities of N positions.

    `ids`, `log_probs` [N, k]: the stored tokens, most probable first. `log_tail` [N]: log-probability of all other
    tokens.
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor


@dataclass(frozen=True, eq=False)
class Codec:
    """One encoding for one teacher. `width` is D; topk encodes logits [N, V] instead of hidden states."""

    name: str
    width: int
    vocab_size: int
    top_k: int = 0
    calibration: Calibration | None = None
    _on_device: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @cached_property
    def bytes_per_position(self) -> int:
        """P: payload bytes per position."""
        groups = -(-self.width // GROUP)
        sizes = {
            "int8": self.width + 2,
            "int4": -(-self.width // 2) + groups,
            "bf16": 2 * self.width,
            "topk": 2 + (2 + self.id_bytes) * self.top_k,
        }
        return sizes[self.name]

    @property
    def id_bytes(self) -> int:
        """Bytes per token id in topk."""
        return 4 if self.vocab_size >= WIDE_VOCABULARY else 2

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the decoder: payloads of files with the same fingerprint may be decoded in one call."""
        calibration = self.calibration.to_text() if self.calibration else ""
        return sha256_bytes(canonical_json([self.name, self.width, self.vocab_size, self.top_k, calibration]))

    def encode(self, x_NX: Tensor) -> Tensor:
        """Encodes hidden states [N, D], or logits [N, V] for topk, as uint8 [N, P]. All values must be finite."""
        return _ENCODERS[self.name](self, x_NX)

    def decode(self, payload_NP: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decodes uint8 [N, P] to hidden states [N, D]. ValueError: the codec is topk, which stores no hidden
        states."""
        if self.name == "topk":
            raise ValueError("topk stores logits, not hidden states; call decode_topk")
        return _DECODERS[self.name](self, payload_NP).to(dtype)

    def decode_topk(self, payload_NP: Tensor) -> TopK:
        """Decodes uint8 [N, P] of topk to token ids (int64), log-probabilities and tail (float32)."""
        split = self.id_bytes * self.top_k
        bytes_Nkb = payload_NP[:, :split].reshape(len(payload_NP), self.top_k, self.id_bytes).long()
        shifts_b = 8 * torch.arange(self.id_bytes, device=payload_NP.device)
        ids_Nk = (bytes_Nkb << shifts_b).sum(-1)
        logs_NK = _as_half(payload_NP[:, split:])
        return TopK(ids_Nk, logs_NK[:, :-1], logs_NK[:, -1])

    def statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation [D] on a device, copied there once. ValueError: no calibration exists."""
        if self.calibration is None:
            raise ValueError(f"{self.name} has no calibration")
        if device not in self._on_device:
            self._on_device[device] = (self.calibration.mean.to(device), self.calibration.std.to(device))
        return self._on_device[device]


def make_codec(targets: TargetSettings, width: int, calibration: Calibration | None, vocab_size: int) -> Codec:
    """Creates the codec of a recipe for a teacher of this width (D) and vocabulary (V).

    FatalError: the encoding needs a calibration, and `calibration` is None or has a different width.
    """
    name = targets.encoding
    if not needs_calibration(targets):
        return Codec(name, width, vocab_size, min(targets.top_k, vocab_size) if name == "topk" else 0)
    if calibration is None or len(calibration.mean) != width:
        found = "there is none" if calibration is None else f"it has {len(calibration.mean)}"
        raise FatalError(
            f"targets.encoding = {name} needs a calibration of {width} channels, but {found}; run `distil retry` with "
            "--stage calibration --force"
        )
    return Codec(name, width, vocab_size, calibration=calibration)


def topk_logits(topk: TopK, start: int, stop: int, vocab_size: int) -> Tensor:
    """Returns logits [stop - start, V] of rows start to stop - 1; the tail's mass is spread evenly over all other
    tokens."""
    ids_nk, log_probs_nk, log_tail_n = (part[start:stop] for part in topk)
    others = max(1, vocab_size - ids_nk.shape[1])
    logits_nV = (log_tail_n - math.log(others))[:, None].repeat(1, vocab_size)
    return logits_nV.scatter_(1, ids_nk, log_probs_nk)


# ---- int8 ----------------------------------------------------------------------------------------------------


def _encode_int8(codec: Codec, x_ND: Tensor) -> Tensor:
    """Returns D int8 levels, then the fp16 scale: [N, D + 2]."""
    z_ND = _standardized(codec, x_ND)
    scale_N1 = (z_ND.abs().amax(-1, keepdim=True) / 127).clamp(MIN_SCALE, 65504).half()
    steps_ND = (z_ND / scale_N1.float()).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat([steps_ND.view(torch.uint8), scale_N1.view(torch.uint8)], dim=-1)


def _decode_int8(codec: Codec, payload_NP: Tensor) -> Tensor:
    steps_ND = payload_NP[:, : codec.width].view(torch.int8).float()
    return _destandardized(codec, steps_ND * _as_half(payload_NP[:, codec.width :]))


# ---- int4 ----------------------------------------------------------------------------------------------------


def _encode_int4(codec: Codec, x_ND: Tensor) -> Tensor:
    """Returns ceil(D / 2) bytes of levels, then G scales: [N, P].

    Byte i contains channels i (low bits) and i + ceil(D / 2). The mid-rise levels, -7.5 to 7.5 times the scale, use all
    16 codes in a range that is symmetric around zero.
    """
    padded_NE = F.pad(_standardized(codec, x_ND), (0, -codec.width % GROUP))
    z_NGg = padded_NE.view(len(padded_NE), padded_NE.shape[1] // GROUP, GROUP)
    step_NG = z_NGg.abs().amax(-1) / 8
    scale_NG = (step_NG.clamp(min=2.0**-20).log2() * STEPS_PER_OCTAVE + SCALE_BIAS).round_().clamp_(0, 255)
    nibbles_NGg = (z_NGg / _scale(scale_NG)[..., None]).floor_().clamp_(-8, 7) + 8
    nibbles_NE = nibbles_NGg.flatten(1)[:, : codec.width].to(torch.uint8)
    low_NH, high_NH = F.pad(nibbles_NE, (0, codec.width % 2)).chunk(2, dim=-1)
    return torch.cat([low_NH | (high_NH << 4), scale_NG.to(torch.uint8)], dim=-1)


def _decode_int4(codec: Codec, payload_NP: Tensor) -> Tensor:
    half = -(-codec.width // 2)
    packed_NH, scale_NG = payload_NP[:, :half], payload_NP[:, half:].float()
    nibbles_ND = torch.cat([packed_NH & 15, packed_NH >> 4], dim=-1)[:, : codec.width].float()
    scale_ND = _scale(scale_NG).repeat_interleave(GROUP, dim=-1, output_size=GROUP * scale_NG.shape[1])
    return _destandardized(codec, (nibbles_ND - 7.5) * scale_ND[:, : codec.width])


def _scale(scale_byte: Tensor) -> Tensor:
    return ((scale_byte - SCALE_BIAS) / STEPS_PER_OCTAVE).exp2()


# ---- bf16 and topk -------------------------------------------------------------------------------------------


def _encode_bf16(codec: Codec, x_ND: Tensor) -> Tensor:
    del codec
    return x_ND.to(torch.bfloat16).contiguous().view(torch.uint8)


def _decode_bf16(codec: Codec, payload_NP: Tensor) -> Tensor:
    del codec
    return payload_NP.clone(memory_format=torch.contiguous_format).view(torch.bfloat16)


def _encode_topk(codec: Codec, logits_NV: Tensor) -> Tensor:
    """Returns k token ids, then k log-probabilities and the log of the tail's mass, all logs in fp16: [N, P]."""
    log_probs_NV = logits_NV.float().log_softmax(-1)
    best = log_probs_NV.topk(codec.top_k)
    log_tail_N1 = log_probs_NV.scatter(1, best.indices, -math.inf).logsumexp(-1, keepdim=True)
    logs_NK = torch.cat([best.values, log_tail_N1], dim=-1).clamp(MIN_LOG_PROB, 0).half()
    ids_Nkb = best.indices.to(torch.int32)[..., None].view(torch.uint8)[..., : codec.id_bytes]
    return torch.cat([ids_Nkb.flatten(1), logs_NK.view(torch.uint8)], dim=-1)


_ENCODERS = {"int8": _encode_int8, "int4": _encode_int4, "bf16": _encode_bf16, "topk": _encode_topk}

_DECODERS = {"int8": _decode_int8, "int4": _decode_int4, "bf16": _decode_bf16}


# ---- shared --------------------------------------------------------------------------------------------------


def _standardized(codec: Codec, x_ND: Tensor) -> Tensor:
    mean_D, std_D = codec.statistics(x_ND.device)
    return (x_ND.float() - mean_D) / std_D


def _destandardized(codec: Codec, z_ND: Tensor) -> Tensor:
    mean_D, std_D = codec.statistics(z_ND.device)
    return torch.addcmul(mean_D, z_ND, std_D)


def _as_half(bytes_NP: Tensor) -> Tensor:
    """Reads fp16 values from uint8 [N, 2 n] as float32 [N, n]; copies first, since they may start at an odd address."""
    return bytes_NP.clone(memory_format=torch.contiguous_format).view(torch.float16).float()

"""How the teacher's word on one position becomes bytes, and back.

    codec = make_codec(recipe.targets, width=768, calibration=calibration, vocab_size=32005)
    payload_NP = codec.encode(hidden_ND)              # uint8, P = codec.bytes_per_position
    hidden_ND = codec.decode(payload_NP, torch.bfloat16)

    int8   D + 2 bytes        channels calibrated to mean 0 and deviation 1, one fp16 scale a position
    int4   D / 2 + D / 32     the same channels, one 8-bit logarithmic scale for every 32 of them
    bf16   2 D                the reference to compare with
    topk   2 + 4 k            logits: ids, log-probabilities and the tail's mass (2 + 6 k from 65,536 pieces on)

Everything runs on the device of its input, so that the cache travels as bytes and is decoded where it is used.
Little-endian throughout. Called by tasks.teach, tasks.supervision and tasks.probe.

Shapes: N positions, D hidden size, V vocabulary, P bytes a position, G groups of 32 channels, k logits kept.
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
"""Channels that share a scale in int4."""

OCTAVE, MIDDLE = 8, 128
"""A scale of int4 is 2 ** ((byte - MIDDLE) / OCTAVE): 9 % apart, from 2^-16 to 2^15.9."""

SMALLEST = 2.0**-14
"""Smallest normal fp16: the least scale of int8, so that a position of all means does not divide by zero."""

LEAST = -1e4
"""Log-probability that stands for zero; finite in fp16 and in every softmax."""

FLOOR = 1e-4
"""Least deviation of a channel, against the typical deviation and against its own mean (what bf16 blurs by 4e-3)."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Mean and deviation of each channel of the teacher's last hidden state; float32 [D] on the CPU."""

    mean: Tensor
    sd: Tensor

    def to_text(self) -> str:
        """Both as base64 of little-endian float32, for the metadata of a file."""
        both = torch.cat([self.mean, self.sd]).numpy().astype("<f4")
        return base64.b64encode(both.tobytes()).decode()

    @staticmethod
    def from_text(text: str) -> "Calibration":
        """The reverse of `to_text`. ValueError if it is not that."""
        both = torch.from_numpy(np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32))
        if len(both) % 2:
            raise ValueError("means and deviations are not of one length")
        mean_D, sd_D = both.chunk(2)
        return Calibration(mean_D.clone(), sd_D.clone())


def fit_calibration(count: int, sum_D: Tensor, squares_D: Tensor) -> Calibration:
    """From the number of positions and the float64 sums of x and x². A constant channel gets a small deviation."""
    mean_D = sum_D / count
    sd_D = (squares_D / count - mean_D**2).clamp(min=0).sqrt()
    least_D = FLOOR * torch.maximum(sd_D.median(), mean_D.abs())
    return Calibration(mean_D.float(), torch.maximum(sd_D, least_D.clamp(min=1e-12)).float())


class TopK(NamedTuple):
    """The kept logits of N positions as log-probabilities: ids and log_probs [N, k], best first; log_tail [N]."""

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor


@dataclass(frozen=True, eq=False)
class Codec:
    """One encoding for one model. `width` is D; topk encodes logits [N, vocab_size] instead of hidden states."""

    name: str
    width: int
    vocab_size: int
    top_k: int = 0
    calibration: Calibration | None = None
    _on_device: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @cached_property
    def bytes_per_position(self) -> int:
        """P: payload bytes of one position."""
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
        """Bytes of one token id in topk."""
        return 4 if self.vocab_size >= WIDE_VOCABULARY else 2

    @cached_property
    def fingerprint(self) -> str:
        """Names what decodes the bytes: two files with the same one may be decoded together."""
        calibration = self.calibration.to_text() if self.calibration else ""
        return sha256_bytes(canonical_json([self.name, self.width, self.vocab_size, self.top_k, calibration]))

    def encode(self, x_NX: Tensor) -> Tensor:
        """Hidden states [N, D], or logits [N, V] for topk, to uint8 [N, P]. All values must be finite."""
        return _ENCODERS[self.name](self, x_NX)

    def decode(self, payload_NP: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 [N, P] to hidden states [N, D]. ValueError for topk, which keeps none."""
        if self.name == "topk":
            raise ValueError("topk keeps logits, not hidden states; call decode_topk")
        return _DECODERS[self.name](self, payload_NP).to(dtype)

    def decode_topk(self, payload_NP: Tensor) -> TopK:
        """uint8 [N, P] of topk to ids (int64), log-probabilities and tail (float32)."""
        split = self.id_bytes * self.top_k
        bytes_Nkb = payload_NP[:, :split].reshape(len(payload_NP), self.top_k, self.id_bytes).long()
        shifts_b = 8 * torch.arange(self.id_bytes, device=payload_NP.device)
        ids_Nk = (bytes_Nkb << shifts_b).sum(-1)
        logs_NK = _as_half(payload_NP[:, split:])
        return TopK(ids_Nk, logs_NK[:, :-1], logs_NK[:, -1])

    def statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation [D] on a device, copied there once."""
        if self.calibration is None:
            raise ValueError(f"{self.name} has no calibration")
        if device not in self._on_device:
            self._on_device[device] = (self.calibration.mean.to(device), self.calibration.sd.to(device))
        return self._on_device[device]


def make_codec(targets: TargetSettings, width: int, calibration: Calibration | None, vocab_size: int) -> Codec:
    """The codec that a recipe asks for, for a model of this width and vocabulary.

    FatalError if the encoding is calibrated and there is no calibration, or one of another width.
    """
    name = targets.encoding
    if not needs_calibration(targets):
        return Codec(name, width, vocab_size, min(targets.top_k, vocab_size) if name == "topk" else 0)
    if calibration is None or len(calibration.mean) != width:
        found = "none was given" if calibration is None else f"that one has {len(calibration.mean)}"
        raise FatalError(f"targets.encoding = {name} needs a calibration of {width} channels, but {found}")
    return Codec(name, width, vocab_size, calibration=calibration)


def topk_logits(kept: TopK, start: int, stop: int, vocab_size: int) -> Tensor:
    """Logits [stop - start, V] of rows of topk: what was kept, and the tail's mass evenly over all other tokens."""
    ids_nk, log_probs_nk, log_tail_n = (part[start:stop] for part in kept)
    others = max(1, vocab_size - ids_nk.shape[1])
    logits_nV = (log_tail_n - math.log(others))[:, None].repeat(1, vocab_size)
    return logits_nV.scatter_(1, ids_nk, log_probs_nk)


# ---- int8 ----------------------------------------------------------------------------------------------------


def _encode_int8(codec: Codec, x_ND: Tensor) -> Tensor:
    z_ND = _normalised(codec, x_ND)
    scale_N1 = (z_ND.abs().amax(-1, keepdim=True) / 127).clamp(SMALLEST, 65504).half()
    steps_ND = (z_ND / scale_N1.float()).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat([steps_ND.view(torch.uint8), scale_N1.view(torch.uint8)], dim=-1)


def _decode_int8(codec: Codec, payload_NP: Tensor) -> Tensor:
    steps_ND = payload_NP[:, : codec.width].view(torch.int8).float()
    return _restored(codec, steps_ND * _as_half(payload_NP[:, codec.width :]))


# ---- int4 ----------------------------------------------------------------------------------------------------


def _encode_int4(codec: Codec, x_ND: Tensor) -> Tensor:
    """16 steps between -top and top of each group, none of them at zero: all of them are used."""
    padded_NE = F.pad(_normalised(codec, x_ND), (0, -codec.width % GROUP))
    z_NGg = padded_NE.view(len(padded_NE), padded_NE.shape[1] // GROUP, GROUP)
    step_NG = z_NGg.abs().amax(-1) / 8
    scale_NG = (step_NG.clamp(min=2.0**-20).log2() * OCTAVE + MIDDLE).round_().clamp_(0, 255)
    nibbles_NGg = (z_NGg / _step(scale_NG)[..., None]).floor_().clamp_(-8, 7) + 8
    nibbles_NE = nibbles_NGg.flatten(1)[:, : codec.width].to(torch.uint8)
    low_NH, high_NH = F.pad(nibbles_NE, (0, codec.width % 2)).chunk(2, dim=-1)
    return torch.cat([low_NH | (high_NH << 4), scale_NG.to(torch.uint8)], dim=-1)


def _decode_int4(codec: Codec, payload_NP: Tensor) -> Tensor:
    half = -(-codec.width // 2)
    packed_NH, scale_NG = payload_NP[:, :half], payload_NP[:, half:].float()
    nibbles_ND = torch.cat([packed_NH & 15, packed_NH >> 4], dim=-1)[:, : codec.width].float()
    steps_ND = _step(scale_NG).repeat_interleave(GROUP, dim=-1, output_size=GROUP * scale_NG.shape[1])
    return _restored(codec, (nibbles_ND - 7.5) * steps_ND[:, : codec.width])


def _step(scale: Tensor) -> Tensor:
    return ((scale - MIDDLE) / OCTAVE).exp2()


# ---- bf16 and topk -------------------------------------------------------------------------------------------


def _encode_bf16(codec: Codec, x_ND: Tensor) -> Tensor:
    del codec
    return x_ND.to(torch.bfloat16).contiguous().view(torch.uint8)


def _decode_bf16(codec: Codec, payload_NP: Tensor) -> Tensor:
    del codec
    return payload_NP.clone(memory_format=torch.contiguous_format).view(torch.bfloat16)


def _encode_topk(codec: Codec, logits_NV: Tensor) -> Tensor:
    log_probs_NV = logits_NV.float().log_softmax(-1)
    best = log_probs_NV.topk(codec.top_k)
    log_tail_N1 = log_probs_NV.scatter(1, best.indices, -math.inf).logsumexp(-1, keepdim=True)
    logs_NK = torch.cat([best.values, log_tail_N1], dim=-1).clamp(LEAST, 0).half()
    ids_Nkb = best.indices.to(torch.int32)[..., None].view(torch.uint8)[..., : codec.id_bytes]
    return torch.cat([ids_Nkb.flatten(1), logs_NK.view(torch.uint8)], dim=-1)


_ENCODERS = {"int8": _encode_int8, "int4": _encode_int4, "bf16": _encode_bf16, "topk": _encode_topk}

_DECODERS = {"int8": _decode_int8, "int4": _decode_int4, "bf16": _decode_bf16}


# ---- shared --------------------------------------------------------------------------------------------------


def _normalised(codec: Codec, x_ND: Tensor) -> Tensor:
    mean_D, sd_D = codec.statistics(x_ND.device)
    return (x_ND.float() - mean_D) / sd_D


def _restored(codec: Codec, z_ND: Tensor) -> Tensor:
    mean_D, sd_D = codec.statistics(z_ND.device)
    return torch.addcmul(mean_D, z_ND, sd_D)


def _as_half(bytes_NP: Tensor) -> Tensor:
    """uint8 [N, 2 n] to float32 [N, n]; copied first, as two bytes may begin at an odd address."""
    return bytes_NP.clone(memory_format=torch.contiguous_format).view(torch.float16).float()

"""Compares the targets in a file with the outputs of the live teacher on a few rows: the parity probe.

    parity = probe(capture, blocks, targets, variant)      # Parity(kl=…, cosine=…, rows=…), FatalError above 1e-2
    probe_cache(store, run, teacher)                       # before training reads its cache

Targets of a different shard, mask or teacher, or with shifted rows, fail the probe. `fidelity` measures all encodings
on the same positions.

KL is the mean KL(teacher || decoded) in nats through the teacher's LM head at temperature 1. Cosine is the mean of
1 - cos between hidden states from which the channel means are subtracted: a large common mean would hide every
difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from storage.artifact import Ref
from storage.errors import FatalError
from storage.store import Store
from tasks.models.forward import logits_in_chunks
from tasks.models.teacher import TeacherModel
from tasks.recipe.config import TargetSettings
from tasks.recipe.run_json import RunSpec
from tasks.targets.capture import Capture, encode, hidden_states, masked_inputs
from tasks.targets.codec import Codec, TopK, fit_calibration, make_codec, topk_logits
from tasks.targets.targets_file import TargetRows, check_digests, open_targets
from tasks.tokens.blocks import Blocks, open_blocks
from tasks.tokens.token_counts import read_counts
from tasks.tokens.vocabulary import vocabulary_for

LIMIT = 1e-2
"""Maximum of both figures. Rounding noise of the dtype and every encoding with a good calibration stay below it."""

NEAR_MEAN = 1e-4
"""Distance from the mean, relative to a hidden state's norm, below which the state counts as equal to the mean."""

PROBE_ROWS = 6
"""Rows per probe."""

PROBE_PARTS = 3
"""Shards probed before training. During training, the digest of every row is checked when the row is read."""


@dataclass(frozen=True)
class Parity:
    """Figures of a probe over `rows` blocks; `cosine` is 0 for topk, which stores no hidden states."""

    kl: float
    cosine: float
    rows: int


@dataclass(frozen=True)
class Fidelity:
    """Error of an encoding, measured on a number of `positions`.

    `bytes`: payload per position (a targets file adds 20 bytes per block). `cosine`: None for topk.
    """

    encoding: str
    bytes: int
    kl: float
    cosine: float | None
    positions: int


def probe(capture: Capture, blocks: Blocks, targets: TargetRows, variant: int, advice: str = "") -> Parity:
    """Compares up to PROBE_ROWS rows, spread over the shard, with a forward pass of the live teacher.

    FatalError: the number of rows, a digest or the number of positions differs, or a figure exceeds LIMIT. The message
    contains the label of the shard; `advice` replaces the remedy for a figure that exceeds LIMIT.
    """
    if len(blocks) != len(targets):
        raise FatalError(
            f"targets {targets.label}: {len(targets)} rows are stored, but the shard has {len(blocks)} blocks; run "
            "`distil verify`, then `distil retry`",
            targets.label,
        )
    rows = np.unique(np.linspace(0, max(0, len(blocks) - 1), PROBE_ROWS).astype(np.int64))[: len(blocks)]
    if not len(rows) or not targets.counts[rows].any():
        return Parity(0.0, 0.0, 0)
    inputs = masked_inputs(capture, blocks, rows, variant)
    check_digests(targets, rows, inputs.digests)
    live_ND = hidden_states(capture.teacher, inputs)
    payload_NP = torch.from_numpy(targets.payload(rows)).to(capture.teacher.device)
    if len(payload_NP) != len(live_ND):
        raise FatalError(
            f"targets {targets.label}: {len(payload_NP)} positions are stored, but the masks select {len(live_ND)}; "
            "run `distil verify`, then `distil retry`",
            targets.label,
        )
    parity = Parity(*_compare(capture.teacher, targets.codec, live_ND, payload_NP), len(rows))
    if not (parity.kl <= LIMIT and parity.cosine <= LIMIT):
        advice = advice or "they are damaged or of a different teacher: run `distil verify`, then `distil retry`"
        raise FatalError(
            f"targets {targets.label} differ from the live teacher {capture.teacher.settings.model} "
            f"(KL {parity.kl:.2g}, centred 1-cos {parity.cosine:.2g}, limit {LIMIT:g}); {advice}",
            targets.label,
        )
    return parity


def probe_cache(store: Store, run: RunSpec, teacher: TeacherModel) -> list[Parity]:
    """Probes the first mask variant of up to PROBE_PARTS shards, spread over the manifest, before training.

    FatalError: as in `probe`, or a file is damaged.
    """
    counts = read_counts(store, Ref("counts", run.counts, "counts")) if run.counts else None
    capture = Capture(teacher, vocabulary_for(run.blocks, run.teacher), run.mask, run.targets, counts)
    chosen = np.unique(np.linspace(0, len(run.manifest) - 1, PROBE_PARTS).astype(np.int64))
    parts = [run.manifest[number] for number in chosen.tolist()]
    return [
        probe(
            capture,
            open_blocks(store, part.blocks_ref()),
            open_targets(store, part.targets_ref(0)),
            variant=0,
        )
        for part in parts
    ]


@torch.no_grad()
def fidelity(
    capture: Capture, blocks: Blocks, rows: npt.NDArray[np.int64], encodings: Sequence[TargetSettings]
) -> list[Fidelity]:
    """Encodes and decodes the same positions with every encoding; the calibration is computed on rows other than
    `rows`.

    topk is measured over the complete vocabulary with its tail spread evenly, as the trainer uses it.
    """
    others = np.setdiff1d(np.arange(len(blocks)), rows)[: 4 * len(rows)]
    sample_ND = hidden_states(capture.teacher, masked_inputs(capture, blocks, others, 0)).double()
    calibration = fit_calibration(len(sample_ND), sample_ND.sum(0).cpu(), (sample_ND**2).sum(0).cpu())
    live_ND = hidden_states(capture.teacher, masked_inputs(capture, blocks, rows, 0))
    table = []
    for targets in encodings:
        codec = make_codec(targets, capture.teacher.width, calibration, capture.teacher.vocab_size)
        payload_NP, _ = encode(capture.teacher, codec, live_ND)
        if codec.name == "topk":
            kl, cosine = _topk_kl(capture.teacher, codec, live_ND, payload_NP, full_vocabulary=True), None
        else:
            kl, cosine = _compare(capture.teacher, codec, live_ND, payload_NP)
        table.append(Fidelity(codec.name, codec.bytes_per_position, kl, cosine, len(live_ND)))
    return table


@torch.no_grad()
def _compare(teacher: TeacherModel, codec: Codec, live_ND: Tensor, payload_NP: Tensor) -> tuple[float, float]:
    """Returns the mean KL and the mean centred 1 - cos."""
    if codec.name == "topk":
        return _topk_kl(teacher, codec, live_ND, payload_NP, full_vocabulary=False), 0.0
    decoded_ND = codec.decode(payload_NP, teacher.dtype)
    kl = sum(
        float(_kl(live_nV.log_softmax(-1), decoded_nV.log_softmax(-1)))
        for live_nV, decoded_nV in zip(
            logits_in_chunks(teacher.model, live_ND), logits_in_chunks(teacher.model, decoded_ND), strict=True
        )
    )
    if codec.calibration is not None:
        centre_D = codec.statistics(live_ND.device)[0]
    else:
        centre_D = live_ND.float().mean(0) if len(live_ND) > 1 else torch.zeros_like(live_ND[0], dtype=torch.float32)
    # A state equal to the mean has no direction relative to it. One more coordinate, equal in both states and far
    # smaller than the state itself, keeps the cosine defined.
    floor_N1 = NEAR_MEAN * live_ND.float().norm(dim=-1, keepdim=True)
    left_N, right_N = (torch.cat([states_ND.float() - centre_D, floor_N1], -1) for states_ND in (live_ND, decoded_ND))
    return _at_least_0(kl / len(live_ND)), float((1 - F.cosine_similarity(left_N, right_N)).mean())


def _topk_kl(teacher: TeacherModel, codec: Codec, live_ND: Tensor, payload_NP: Tensor, full_vocabulary: bool) -> float:
    """Returns the mean KL of topk over the full vocabulary, or over the k stored tokens and the tail as one event.

    The probe uses the latter, since topk drops the other logits by design and this is not damage.
    """
    stored = codec.decode_topk(payload_NP)
    total, start = 0.0, 0
    for live_nV in logits_in_chunks(teacher.model, live_ND):
        stop = start + len(live_nV)
        log_p_nV = live_nV.log_softmax(-1)
        if full_vocabulary:
            total += float(_kl(log_p_nV, topk_logits(stored, start, stop, codec.vocab_size).log_softmax(-1)))
        else:
            part = TopK(*(values[start:stop] for values in stored))
            log_tail_n1 = log_p_nV.scatter(1, part.ids, -math.inf).logsumexp(-1, keepdim=True)
            log_p_nK = torch.cat([log_p_nV.gather(1, part.ids), log_tail_n1], dim=-1)
            log_q_nK = torch.cat([part.log_probs, part.log_tail[:, None]], dim=-1).log_softmax(-1)
            total += float(_kl(log_p_nK, log_q_nK))
        start = stop
    return _at_least_0(total / len(live_ND))


def _at_least_0(kl: float) -> float:
    """Replaces a KL that rounding made negative with 0. NaN stays NaN; max(0, …) would make it a perfect match."""
    return 0.0 if kl < 0 else kl


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Returns the sum over rows of KL(p || q) in nats; tokens with p = 0 add nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).double().sum()

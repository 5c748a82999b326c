"""The loss: golden values of the DistilBERT code, the fused form against the plain one, and its edge cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tasks.train.loss import (
    Losses,
    RowCounts,
    Weights,
    combined_loss,
    decoder_logits,
    fused_loss,
    pad_decoder,
)

WEIGHTS = Weights(distil=0.5, cosine=0.3, mlm=0.2)


def count_rows(labels_N: Tensor, valid_N: Tensor | None = None) -> RowCounts:
    """Selected and masked rows of one micro-batch, as tensors on its device."""
    masked_N = labels_N != -100
    if valid_N is None:
        return RowCounts(torch.full((), labels_N.numel(), device=labels_N.device), masked_N.sum())
    return RowCounts(valid_N.sum(), (masked_N & valid_N).sum())


pytestmark = pytest.mark.usefixtures("one_thread")


def golden_inputs() -> dict[str, Tensor]:
    """The golden case, computed with the DistilBERT code: B=2, L=5, V=11, H=4, lengths 5 and 3, float64."""

    def wave(function, size, *shape):
        return function(torch.arange(size, dtype=torch.float64)).reshape(*shape)

    labels = torch.full((2, 5), -100)
    labels[0, 1], labels[0, 3], labels[1, 1] = 7, 2, 10
    return {
        "student_logits": wave(lambda i: 3 * torch.sin(0.37 * i), 110, 2, 5, 11),
        "teacher_logits": wave(lambda i: 4 * torch.cos(0.23 * i), 110, 2, 5, 11),
        "student_hidden": wave(lambda i: torch.sin(0.91 * i + 0.5), 40, 2, 5, 4),
        "teacher_hidden": wave(lambda i: torch.cos(0.53 * i), 40, 2, 5, 4),
        "labels": labels,
        "attended": torch.arange(5)[None] < torch.tensor([[5], [3]]),
    }


def plain(leaves, case, keep):
    return combined_loss(
        leaves[0][keep],
        case["teacher_logits"][keep],
        leaves[1][keep],
        case["teacher_hidden"][keep],
        case["labels"][keep],
        WEIGHTS,
        2.0,
    )


def fused_on_selected(leaves, case, keep):
    return fused_with_identity(leaves, case, keep, None)


def fused_with_identity(leaves, case, keep, valid):
    """The fused loss on given logits: features are the logits, the decoder is the identity."""
    student_NV, hidden_ND = leaves[0][keep], leaves[1][keep]
    teacher_NV, labels_N = case["teacher_logits"][keep], case["labels"][keep]
    eye, zero = torch.eye(11, dtype=torch.float64), torch.zeros(11, dtype=torch.float64)
    return fused_loss(
        student_NV,
        eye,
        zero,
        labels_N,
        weights=WEIGHTS,
        temperature=2.0,
        counts=count_rows(labels_N, valid),
        teacher_logits=decoder_logits(teacher_NV, eye, zero),
        student_hidden_ND=hidden_ND,
        teacher_hidden_ND=case["teacher_hidden"][keep],
        valid_N=valid,
        chunk_rows=3,
    )


def fused_on_all(leaves, case, keep):
    """All ten positions, the padding as unused slots."""
    flat = {name: tensor.flatten(0, 1) for name, tensor in case.items()}
    return fused_with_identity([leaf.flatten(0, 1) for leaf in leaves], flat, slice(None), keep.flatten())


@pytest.mark.parametrize("form", [plain, fused_on_selected, fused_on_all])
def test_golden_values_of_the_distilbert_code(form):
    case = golden_inputs()
    leaves = [case[name].clone().requires_grad_() for name in ("student_logits", "student_hidden")]
    losses = form(leaves, case, case["attended"])
    losses.total.backward()
    expected = Losses(1.8979562767, 1.8759749474, 0.9818416794, 3.3270814956)
    for name, value in expected._asdict().items():
        assert float(getattr(losses, name).detach()) == pytest.approx(value, abs=1e-9), name
    assert float(leaves[0].grad.norm()) == pytest.approx(0.1852626441, abs=1e-9)
    assert float(leaves[1].grad.norm()) == pytest.approx(0.0536376873, abs=1e-9)
    for leaf in leaves:
        assert torch.equal(leaf.grad[~case["attended"]], torch.zeros_like(leaf.grad[~case["attended"]]))


WRONG_DEFINITIONS = {"no T^2": 0.46899, "mean over V": 0.17054, "padding included": 1.61714, "3-D batchmean": 8.08572}
WRONG_DEFINITIONS |= {"reverse KL": 1.74377, "cross-entropy": 10.23332}


def test_the_golden_values_exclude_wrong_definitions_of_the_loss():
    """Each wrong definition gives a known other value, so the golden value excludes them all."""
    case = golden_inputs()
    keep = case["attended"]
    log_q, log_p = ((case[name] / 2).log_softmax(-1) for name in ("student_logits", "teacher_logits"))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    computed = {
        "no T^2": kl[keep].mean(),
        "mean over V": kl[keep].mean() * 4 / 11,
        "padding included": kl.mean() * 4,
        "3-D batchmean": kl.sum() * 4 / 2,
        "reverse KL": (log_q.exp() * (log_q - log_p)).sum(-1)[keep].mean() * 4,
        "cross-entropy": -(log_p.exp() * log_q).sum(-1)[keep].mean() * 4,
    }
    ours = float(plain([case["student_logits"], case["student_hidden"]], case, keep).distil)
    for name, value in WRONG_DEFINITIONS.items():
        assert float(computed[name]) == pytest.approx(value, abs=2e-5), name
        assert abs(ours - value) > 0.1, name


class Case:
    """Random rows, heads and decoders of any shape; `plain` and `fused` compute both forms of the loss."""

    def __init__(self, rows, vocabulary, features, hidden, seed=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.features = normal(rows, features).requires_grad_()
        self.weight = normal(vocabulary, features).requires_grad_()
        self.bias = normal(vocabulary).requires_grad_()
        self.hidden = normal(rows, hidden).requires_grad_()
        self.teacher = (normal(rows, features + 1), normal(vocabulary, features + 1), normal(vocabulary))
        self.teacher_hidden = normal(rows, hidden)
        labels = torch.randint(0, vocabulary, (rows,), generator=generator)
        self.labels = labels.masked_fill(torch.rand(rows, generator=generator) < 0.4, -100)

    @property
    def leaves(self):
        return [self.features, self.weight, self.bias, self.hidden]

    def gradients(self, total):
        """Gradients to features, weight, bias and hidden."""
        grads = torch.autograd.grad(total, self.leaves, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, self.leaves, strict=True)]

    def teacher_logits(self, keep, multiple):
        return decoder_logits(self.teacher[0][keep], *self.teacher[1:], vocab_multiple=multiple)

    def plain(self, weights=WEIGHTS, temperature=2.0, keep=slice(None)):
        student = self.features[keep] @ self.weight.T + self.bias
        teacher = self.teacher[0][keep] @ self.teacher[1].T + self.teacher[2]
        hidden, labels = self.hidden[keep], self.labels[keep]
        return combined_loss(student, teacher, hidden, self.teacher_hidden[keep], labels, weights, temperature)

    def fused(self, weights=WEIGHTS, temperature=2.0, keep=slice(None), counts=None, **options):
        labels = self.labels[keep]
        return fused_loss(
            self.features[keep],
            self.weight,
            self.bias,
            labels,
            weights=weights,
            temperature=temperature,
            counts=counts or count_rows(labels, options.get("valid_N")),
            teacher_logits=self.teacher_logits(keep, options.get("vocab_multiple", 1)) if weights.distil else None,
            student_hidden_ND=self.hidden[keep],
            teacher_hidden_ND=self.teacher_hidden[keep],
            **options,
        )


def assert_same(case, first, second, tolerance=1e-10):
    assert float(first.total.detach()) == pytest.approx(float(second.total.detach()), rel=tolerance)
    for one, other in zip(case.gradients(first.total), case.gradients(second.total), strict=True):
        assert float((one - other).norm()) <= tolerance * (1 + float(other.norm()))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 9),
    vocabulary=st.integers(2, 17),
    features=st.integers(1, 6),
    temperature=st.floats(0.5, 10),
    weights=st.tuples(*[st.sampled_from([0.0, 0.2, 1.0])] * 3).filter(any),
    chunk_rows=st.integers(1, 10),
    vocab_multiple=st.sampled_from([1, 8]),
    seed=st.integers(0, 2**32),
)
def test_fused_equals_plain(rows, vocabulary, features, temperature, weights, chunk_rows, vocab_multiple, seed):
    case, weights = Case(rows, vocabulary, features, 5, seed), Weights(*weights)
    fused = case.fused(weights, temperature, chunk_rows=chunk_rows, vocab_multiple=vocab_multiple)
    plainly = case.plain(weights, temperature)
    assert_same(case, fused, plainly)
    for weight, ours, theirs in zip(weights, fused[1:], plainly[1:], strict=True):
        if weight:
            assert float(ours) == pytest.approx(float(theirs.detach()), rel=1e-10)


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_micro_batches_add_up_to_the_step(pieces):
    case = Case(rows=16, vocabulary=13, features=4, hidden=5, dtype=torch.float32)
    expected = case.gradients(case.plain().total)
    counts = count_rows(case.labels)
    summed = [torch.zeros_like(leaf) for leaf in case.leaves]
    total = 0.0
    for keep in torch.arange(16).tensor_split(torch.tensor([3, 4, 11])[: pieces - 1]):  # of different sizes
        losses = case.fused(keep=keep, counts=counts)
        total += float(losses.total.detach())
        summed = [one + other for one, other in zip(summed, case.gradients(losses.total), strict=True)]
    assert total == pytest.approx(float(case.plain().total.detach()), rel=1e-6)
    for one, other in zip(summed, expected, strict=True):
        assert float((one - other).norm() / other.norm()) <= 1e-6


def test_unused_slots_add_exactly_nothing_even_if_nan():
    case = Case(rows=6, vocabulary=9, features=3, hidden=4)
    valid = torch.tensor([True, False, True, True, False, False])
    expected = case.fused(keep=valid)
    grads = case.gradients(expected.total)
    with torch.no_grad():
        for tensor in (case.features, case.hidden, case.teacher[0], case.teacher_hidden):
            tensor[~valid] = math.nan
        case.labels[1] = 5
    padded = case.fused(valid_N=valid, chunk_rows=4)
    for one, other in zip(padded, expected, strict=True):
        assert float(one.detach()) == pytest.approx(float(other.detach()), rel=1e-12)
    padded_grads = case.gradients(padded.total)
    for one, other in zip(padded_grads, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert torch.equal(padded_grads[0][~valid], torch.zeros(3, 3, dtype=torch.float64))
    assert torch.equal(padded_grads[3][~valid], torch.zeros(3, 4, dtype=torch.float64))


def test_a_micro_batch_of_unused_slots_gives_zero_and_no_nan():
    case = Case(rows=4, vocabulary=9, features=3, hidden=4)
    valid = torch.zeros(4, dtype=torch.bool)
    losses = case.fused(valid_N=valid)
    assert [float(part.detach()) for part in losses] == [0, 0, 0, 0]
    assert all(not gradient.any() for gradient in case.gradients(losses.total))


def test_no_masked_row_gives_no_mlm_loss():
    case = Case(rows=4, vocabulary=9, features=3, hidden=4)
    case.labels.fill_(-100)
    assert float(case.fused().mlm.detach()) == float(case.plain().mlm.detach()) == 0
    assert_same(case, case.fused(), case.plain())


def test_equal_logits_have_no_distil_loss():
    logits = torch.full((3, 7), 2.5, dtype=torch.float64)
    hidden = torch.ones(3, 4, dtype=torch.float64)
    labels = torch.tensor([1, -100, 2])
    losses = combined_loss(logits, logits, hidden, hidden, labels, WEIGHTS, 2.0)
    assert float(losses.distil) == pytest.approx(0, abs=1e-12)
    assert float(losses.cosine) == pytest.approx(0, abs=1e-12)
    assert float(losses.mlm) == pytest.approx(math.log(7))


@pytest.mark.parametrize("temperature", [0.5, 2.0, 10.0])
def test_padding_rows_of_the_decoder_change_nothing(temperature):
    case = Case(rows=5, vocabulary=13, features=3, hidden=4, dtype=torch.float32)
    expected = case.plain(temperature=temperature)
    weight, bias = pad_decoder(case.weight, case.bias, 8)
    teacher_weight, teacher_bias = pad_decoder(*case.teacher[1:], 8)
    assert (weight.shape, teacher_weight.shape) == ((16, 3), (16, 4))
    padded = fused_loss(
        case.features,
        weight,
        bias,
        case.labels,
        weights=WEIGHTS,
        temperature=temperature,
        counts=count_rows(case.labels),
        teacher_logits=decoder_logits(case.teacher[0], teacher_weight, teacher_bias),
        student_hidden_ND=case.hidden,
        teacher_hidden_ND=case.teacher_hidden,
    )
    assert_same(case, padded, expected, tolerance=2e-6)


def test_top_k_targets():
    """The target provider scatters its top-k logits into full rows; the loss needs nothing else."""
    case = Case(rows=5, vocabulary=9, features=3, hidden=4)
    full = torch.full((5, 9), -30.0, dtype=torch.float64)
    full[:, :3] = torch.log_softmax(case.teacher[0][:, :3], -1)
    losses = fused_loss(
        case.features,
        case.weight,
        case.bias,
        case.labels,
        weights=Weights(1, 0, 0),
        temperature=1.0,
        counts=count_rows(case.labels),
        teacher_logits=lambda start, stop: full[start:stop],
        chunk_rows=2,
    )
    student = case.features @ case.weight.T + case.bias
    hidden = case.hidden
    expected = combined_loss(student, full, hidden, hidden, case.labels, Weights(1, 0, 0), 1.0)
    assert float(losses.total.detach()) == pytest.approx(float(expected.total.detach()), rel=1e-12)


def test_plain_mlm_training_needs_no_teacher():
    case = Case(rows=5, vocabulary=9, features=3, hidden=4)
    student = case.features @ case.weight.T + case.bias
    losses = fused_loss(
        case.features,
        case.weight,
        case.bias,
        case.labels,
        weights=Weights(0, 0, 1),
        temperature=2.0,
        counts=count_rows(case.labels),
    )
    expected = torch.nn.functional.cross_entropy(student, case.labels)
    assert float(losses.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    for one, other in zip(case.gradients(losses.total), case.gradients(expected), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("weights", [Weights(1, 0, 0), Weights(0, 1, 0)])
def test_a_term_with_weight_needs_its_teacher_input(weights):
    case = Case(rows=2, vocabulary=3, features=2, hidden=2)
    arguments = {"weights": weights, "temperature": 2.0, "counts": RowCounts(2, 1)}
    with pytest.raises(ValueError, match="needs"):
        fused_loss(case.features, case.weight, case.bias, case.labels, **arguments)
    with pytest.raises(ValueError, match="temperature"):
        case.fused(temperature=0.0)


def test_a_factor_on_the_total_scales_the_gradient():
    case = Case(rows=5, vocabulary=9, features=3, hidden=4)
    once, twice = case.gradients(case.fused().total), case.gradients(case.fused().total * 2)
    for one, other in zip(once, twice, strict=True):
        torch.testing.assert_close(one * 2, other)


def test_no_grad_gives_the_same_values():
    case = Case(rows=5, vocabulary=9, features=3, hidden=4)
    expected = case.fused()
    with torch.no_grad():
        losses = case.fused()
    assert not losses.total.requires_grad
    assert [float(part) for part in losses] == [float(part.detach()) for part in expected]


def test_bfloat16_autocast_stays_near_float32():
    case = Case(rows=32, vocabulary=50, features=16, hidden=16, dtype=torch.float32)
    expected = case.fused()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = case.fused(vocab_multiple=16)
    assert losses.total.dtype == torch.float32
    assert float(losses.total.detach()) == pytest.approx(float(expected.total.detach()), rel=1e-2)
    for one, other in zip(case.gradients(losses.total), case.gradients(expected.total), strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).norm() / other.norm()) < 2e-2


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor):
                self.largest = max(self.largest, item.numel())
        return result


def test_no_tensor_of_rows_times_vocabulary_is_created():
    case = Case(rows=512, vocabulary=300, features=8, hidden=8, dtype=torch.float32)
    with LargestTensor() as fused:
        case.fused(chunk_rows=32).total.backward()
    with LargestTensor() as plainly:
        case.plain().total.backward()
    assert fused.largest == 32 * 300
    assert plainly.largest == 512 * 300


def test_the_loss_compiles_to_one_graph():
    """No graph break: nothing in the loss reads a value back from the device."""
    case = Case(rows=12, vocabulary=9, features=3, hidden=4)
    valid = torch.arange(12) < 9

    def step(counts):
        return case.fused(counts=counts, valid_N=valid, chunk_rows=8)

    counts = count_rows(case.labels, valid)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert_same(case, compiled(counts), step(counts))

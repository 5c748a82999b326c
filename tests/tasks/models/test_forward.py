"""The fast path of every family against the model's own forward: values, gradients, padding, dropout, compilation."""

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from storage.errors import FatalError
from tasks.models.forward import decoder_of, head_features, hidden_rows, logits_in_chunks, longest_input, supports
from tests.harness.logits import logits_rows

SIZES = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
ROBERTA = SIZES | {"num_hidden_layers": 3, "max_position_embeddings": 34, "pad_token_id": 1, "initializer_range": 0.3}
FAMILIES = {
    "camembert": ("Camembert", ROBERTA),
    "roberta": ("Roberta", ROBERTA),
    "xlm-roberta": ("XLMRoberta", ROBERTA),
    "bert": ("Bert", ROBERTA | {"pad_token_id": 0}),
    # Sliding layers attend two tokens to each side; the number of layers decides if the last one is full or sliding.
    "modernbert-sliding": ("ModernBert", ROBERTA | {"local_attention": 4}),
    "modernbert-full": ("ModernBert", ROBERTA | {"local_attention": 4, "num_hidden_layers": 4}),
    "modernbert-biases": ("ModernBert", ROBERTA | {"local_attention": 128, "attention_bias": True, "norm_bias": True}),
}
LENGTH = 20


pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(family: str, attention: str = "sdpa", dropout: float = 0.0, double: bool = False):
    """A tiny model with random weights, biases and norms."""
    name, sizes = FAMILIES[family]
    dropouts = ("embedding_dropout", "mlp_dropout", "attention_dropout") if name == "ModernBert" else ()
    dropouts = dropouts or ("hidden_dropout_prob", "attention_probs_dropout_prob")
    config = getattr(transformers, f"{name}Config")(
        **sizes, **dict.fromkeys(dropouts, dropout), attn_implementation=attention
    )
    torch.manual_seed(3)
    model = getattr(transformers, f"{name}ForMaskedLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double() if double else model


def make_batch(pad: int = 1, padded: bool = True) -> tuple[Tensor, Tensor | None, Tensor]:
    """Three blocks, two of them with padding; five positions each, unsorted, the last one an unused slot."""
    generator = torch.Generator().manual_seed(5)
    input_ids = torch.randint(5, 60, (3, LENGTH), generator=generator)
    lengths = torch.tensor([LENGTH, 13, 6])
    mask = torch.arange(LENGTH)[None] < lengths[:, None]
    positions = torch.tensor([[7, 1, 19, 2, 0], [12, 0, 5, 3, 0], [5, 4, 1, 2, 0]])
    if not padded:
        return input_ids, None, positions
    return input_ids.masked_fill(~mask, pad), mask.long(), positions


def pick(x_BLD: Tensor, positions: Tensor) -> Tensor:
    return x_BLD[torch.arange(len(positions))[:, None], positions]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_equal_the_full_forward(family, attention, padded):
    model = make_model(family, attention)
    input_ids, mask, positions = make_batch(model.config.pad_token_id, padded)
    assert supports(model)
    with torch.no_grad():
        full = model(input_ids=input_ids, attention_mask=mask, output_hidden_states=True)
        hidden = hidden_rows(model, input_ids, mask, positions)
        logits = logits_rows(model, input_ids, mask, positions)
        everywhere = hidden_rows(model, input_ids, mask, None)
    torch.testing.assert_close(hidden, pick(full.hidden_states[-1], positions), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, pick(full.logits, positions), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(everywhere, full.hidden_states[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_the_full_forward(family, attention):
    double = "modernbert" not in family  # which computes parts in float32 for weights of any dtype
    model = make_model(family, attention, double=double)
    input_ids, mask, positions = make_batch(model.config.pad_token_id)
    target = torch.randn(3, 5, 60, generator=torch.Generator().manual_seed(1), dtype=next(model.parameters()).dtype)
    target[:, -1] = 0  # the last slot carries no loss

    def gradients(logits: Tensor) -> dict[str, Tensor | None]:
        model.zero_grad()
        (logits * target).sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    full = {
        name: None if grad is None else grad.clone()
        for name, grad in gradients(pick(model(input_ids=input_ids, attention_mask=mask).logits, positions)).items()
    }
    rows = gradients(logits_rows(model, input_ids, mask, positions))
    scale = max(float(grad.norm()) for grad in full.values() if grad is not None)
    for name, grad in full.items():
        assert (grad is None) == (rows[name] is None), name
        if grad is not None:
            assert float((rows[name] - grad).norm()) <= (1e-10 if double else 1e-5) * scale, name


def dropout_modules(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout) and module.p > 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_path_applies_every_dropout_of_the_model(family):
    """Every dropout module that the full forward calls is called on the fast path too, and attention drops as well."""
    model = make_model(family, dropout=0.5).train()
    input_ids, mask, positions = make_batch(model.config.pad_token_id)
    called: dict[str, int] = {}
    rates: list[float] = []
    for name in dropout_modules(model):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: called.__setitem__(name, called.get(name, 0) + 1))
    original = F.scaled_dot_product_attention

    def record(*args, **kwargs):
        rates.append(kwargs["dropout_p"])
        return original(*args, **kwargs)

    def run(function) -> tuple[dict[str, int], list[float]]:
        called.clear()
        rates.clear()
        function()
        return dict(called), list(rates)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", record)
        full = run(lambda: model(input_ids=input_ids, attention_mask=mask))
        rows = run(lambda: hidden_rows(model, input_ids, mask, positions))
        model.eval()
        in_evaluation = run(lambda: hidden_rows(model, input_ids, mask, positions))
    assert full == rows
    assert set(full[1]) == {0.5}
    assert set(in_evaluation[1]) == {0.0}


@pytest.mark.parametrize("family", ["camembert", "modernbert-full"])
def test_dropout_keeps_the_mean(family):
    model = make_model(family, dropout=0.1).train()
    input_ids, mask, positions = make_batch()
    torch.manual_seed(0)
    with torch.no_grad():
        rows = torch.stack([hidden_rows(model, input_ids, mask, positions) for _ in range(400)])
        full = torch.stack([pick(model.base_model(input_ids, mask)[0], positions) for _ in range(400)])
    spread = (full.var(0) / 400 + rows.var(0) / 400).sqrt()
    assert float(full.var(0).min()) > 0
    assert float(((rows.mean(0) - full.mean(0)) / spread).abs().max()) < 5
    torch.testing.assert_close(rows.std(0).mean(), full.std(0).mean(), rtol=0.05, atol=0)


@pytest.mark.parametrize("family", ["camembert", "bert", "modernbert-sliding"])
def test_head_and_decoder_give_the_logits(family):
    model = make_model(family)
    input_ids, _, _ = make_batch(padded=False)
    with torch.no_grad():
        output = model(input_ids=input_ids, output_hidden_states=True)
        weight, bias = decoder_of(model)
        logits = head_features(model, output.hidden_states[-1]) @ weight.T + bias
    assert weight is model.get_output_embeddings().weight
    torch.testing.assert_close(logits, output.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocabulary_size", [None, 57])
def test_logits_in_chunks_join_to_the_logits_of_the_model(vocabulary_size):
    model = make_model("camembert")
    input_ids, _, _ = make_batch(padded=False)
    with torch.no_grad():
        output = model(input_ids=input_ids, output_hidden_states=True)
    hidden_ND = output.hidden_states[-1].flatten(0, 1)
    chunks = list(logits_in_chunks(model, hidden_ND, chunk_rows=25, vocabulary_size=vocabulary_size))
    assert [len(chunk) for chunk in chunks] == [25, 25, 10]
    assert {chunk.dtype for chunk in chunks} == {torch.float32}
    assert not any(chunk.requires_grad for chunk in chunks)
    expected = output.logits.flatten(0, 1)[:, :vocabulary_size]
    torch.testing.assert_close(torch.cat(chunks), expected, rtol=1e-5, atol=1e-5)
    assert sum(len(chunk) for chunk in logits_in_chunks(model, hidden_ND[:0])) == 0


def test_a_decoder_without_bias_gets_zeros():
    config = transformers.ModernBertConfig(**FAMILIES["modernbert-full"][1], decoder_bias=False)
    weight, bias = decoder_of(transformers.ModernBertForMaskedLM(config))
    assert bias.shape == weight.shape[:1]
    assert not bias.any()


def test_an_unknown_head_fails_with_its_class_name():
    sizes = {"vocab_size": 60, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32}
    model = transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**sizes))
    assert not supports(model)
    with pytest.raises(FatalError, match="DistilBertForMaskedLM"):
        head_features(model, torch.zeros(1, 16))
    with pytest.raises(FatalError, match="DistilBertForMaskedLM"):
        decoder_of(model)


def test_without_fast_path_all_positions_are_computed_and_selected():
    sizes = {"vocab_size": 60, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32}
    model = transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**sizes)).eval()
    input_ids, mask, positions = make_batch(0)
    with torch.no_grad():
        full = model(input_ids=input_ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        rows = hidden_rows(model, input_ids, mask, positions)
    torch.testing.assert_close(rows, pick(full, positions))


def test_a_block_of_padding_only_stays_finite():
    """Static shapes may need an empty block: its rows are ignored, but must not add NaN to the gradients."""
    for family in FAMILIES:
        for attention in ("sdpa", "eager"):
            model = make_model(family, attention)
            input_ids, mask, positions = make_batch(model.config.pad_token_id)
            mask[2] = 0
            logits = logits_rows(model, input_ids, mask, positions)
            logits[:2].sum().backward()
            assert torch.isfinite(logits).all()
            assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_longest_input_of_each_family():
    assert longest_input(make_model("camembert")) == 32  # 34 positions less pad id and one
    assert longest_input(make_model("bert")) == 34
    assert longest_input(make_model("modernbert-full")) == 34


@pytest.mark.parametrize("family", ["camembert", "modernbert-sliding"])
def test_the_fast_path_compiles_to_one_graph(family):
    """No graph break, with and without a mask: the fast path never reads a value from the device."""
    model = make_model(family)
    compiled = torch.compile(logits_rows, backend="eager", fullgraph=True)
    for padded in (True, False):
        input_ids, mask, positions = make_batch(padded=padded)
        with torch.no_grad():
            result = compiled(model, input_ids, mask, positions)
            expected = logits_rows(model, input_ids, mask, positions)
        torch.testing.assert_close(result, expected)

"""The student: choice of layers, copied weights, and saving and loading."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from storage.errors import FatalError
from tasks.models.student import layer_choice, make_fresh, make_student
from tasks.tokens.vocabulary import Vocabulary

SIZES = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
SIZES |= {"num_hidden_layers": 5, "max_position_embeddings": 34, "pad_token_id": 1, "initializer_range": 0.3}
FAMILIES = ["Camembert", "Roberta", "XLMRoberta", "Bert", "ModernBert"]


def make_vocabulary(**changes) -> Vocabulary:
    """A vocabulary with the special ids of camembert-base: bos 5 and eos 6, not 0 and 2."""
    ids = {"pad": 1, "bos": 5, "eos": 6, "mask": 59, "unk": 3, "specials": (0, 1, 2, 3, 4, 5, 6, 59), "unknowns": (3,)}
    return Vocabulary(**({"name": "tiny", "folder": "", "fingerprint": "f", "size": 60} | ids | changes))


def make_teacher(family: str, **changes):
    """A tiny model with random weights, biases and norms; sliding layers attend two tokens to each side."""
    sizes = SIZES | ({"local_attention": 4} if family == "ModernBert" else {}) | changes
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForMaskedLM")(getattr(transformers, f"{family}Config")(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits_of(model):
    input_ids = torch.randint(7, 59, (2, 12), generator=torch.Generator().manual_seed(0))
    return model(input_ids=input_ids).logits


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        (12, 6, [0, 2, 4, 7, 9, 11]),  # as in DistilBERT
        (12, 12, list(range(12))),
        (12, 1, [0]),
        (4, 2, [0, 3]),
        (12, 3, [0, 6, 11]),
    ],
)
def test_layers_are_chosen_evenly(teacher, student, expected):
    assert layer_choice(teacher, student) == expected


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 96).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_chosen_layers_ascend_from_the_first_to_the_last(sizes):
    teacher, student = sizes
    chosen = layer_choice(teacher, student)
    assert len(chosen) == student
    assert chosen == sorted(set(chosen))
    assert chosen[0] == 0
    assert chosen[-1] == (teacher - 1 if student > 1 else 0)


def test_an_explicit_choice_of_layers_is_used():
    assert layer_choice(12, 3, (1, 5, 11)) == [1, 5, 11]


@pytest.mark.parametrize(
    ("layers", "choice", "field"),
    [
        (13, (), "student.layers"),
        (0, (), "student.layers"),
        (3, (0, 1), "student.choice"),
        (2, (0, 12), "student.choice"),
        (2, (-1, 3), "student.choice"),
        (2, (3, 1), "student.choice"),
        (2, (3, 3), "student.choice"),
    ],
)
def test_an_invalid_choice_of_layers_names_its_field(layers, choice, field):
    with pytest.raises(FatalError, match=field):
        layer_choice(12, layers, choice)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_with_all_layers_equals_the_teacher(family):
    """Includes lm_head.dense and its norm; with random ones these logits would differ."""
    teacher = make_teacher(family)
    student = make_student(teacher, make_vocabulary(), layers=5)
    assert torch.equal(logits_of(student), logits_of(teacher))
    mine = dict(student.named_parameters())
    assert mine.keys() == dict(teacher.named_parameters()).keys()
    for name, parameter in teacher.named_parameters():
        assert torch.equal(mine[name], parameter), name
        assert mine[name].data_ptr() != parameter.data_ptr(), name


def test_a_random_lm_head_has_a_large_initial_kl():
    """Checks that the test above can fail: with dense layer and norm at initial values, the KL is far from 0."""
    teacher = make_teacher("Camembert")
    student = make_student(teacher, make_vocabulary(), layers=5)
    with torch.no_grad():
        student.lm_head.dense.weight.normal_(std=0.02)
        student.lm_head.layer_norm.weight.fill_(1)
        student.lm_head.layer_norm.bias.zero_()
    log_q, log_p = logits_of(student).log_softmax(-1), logits_of(teacher).log_softmax(-1)
    assert float(F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("layers", "choice"), [(3, ()), (2, (0, 2)), (1, ())])
def test_each_student_layer_is_the_chosen_teacher_layer(family, layers, choice):
    """The student equals the teacher without the other layers."""
    teacher = make_teacher(family)
    student = make_student(teacher, make_vocabulary(), layers=layers, choice=choice)
    chosen = layer_choice(5, layers, choice)
    stack = teacher.model if family == "ModernBert" else teacher.base_model.encoder
    name = "layers" if family == "ModernBert" else "layer"
    setattr(stack, name, torch.nn.ModuleList([getattr(stack, name)[index] for index in chosen]))
    assert student.config.num_hidden_layers == layers
    torch.testing.assert_close(logits_of(student), logits_of(teacher), rtol=0, atol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_student_loads_unchanged(family, tied, tmp_path):
    student = make_student(
        make_teacher(family, tie_word_embeddings=tied), make_vocabulary(), layers=2, choice=(0, 2), dropout=0.1
    )
    student.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(student)
    assert torch.equal(logits_of(loaded), logits_of(student))
    for model in (student, loaded):
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
        config = model.config
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 5, 6)
        assert config.num_hidden_layers == 2
    if family == "ModernBert":
        assert loaded.config.layer_types == ["full_attention", "sliding_attention"]
        assert (loaded.config.cls_token_id, loaded.config.sep_token_id) == (5, 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_set_by_the_recipe(family):
    for dropout in (0.0, 0.25):
        student = make_student(make_teacher(family), make_vocabulary(), layers=2, dropout=dropout)
        rates = {module.p for module in student.modules() if isinstance(module, torch.nn.Dropout)}
        assert rates == {dropout}
        student.train()
        torch.manual_seed(0)
        assert torch.equal(logits_of(student), logits_of(student)) is (dropout == 0)
    if family == "ModernBert":
        assert student.config.attention_dropout == 0.25
    else:
        assert student.config.attention_probs_dropout_prob == student.config.hidden_dropout_prob == 0.25


def test_a_modernbert_student_keeps_layer_0():
    with pytest.raises(FatalError, match="layer 0"):
        make_student(make_teacher("ModernBert"), make_vocabulary(), layers=2, choice=(1, 4))
    make_student(make_teacher("Camembert"), make_vocabulary(), layers=2, choice=(1, 4))


def test_another_pad_id_fails_if_positions_depend_on_it():
    with pytest.raises(FatalError, match="pad id"):
        make_student(make_teacher("Camembert"), make_vocabulary(pad=0), layers=2)
    student = make_student(make_teacher("Bert"), make_vocabulary(pad=0), layers=5)
    assert student.config.pad_token_id == 0


def test_a_bfloat16_teacher_gives_a_float32_student():
    student = make_student(make_teacher("Camembert").bfloat16(), make_vocabulary(), layers=2)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert student.config.dtype == torch.float32


def test_random_initialisation_depends_on_the_seed_alone():
    teacher = make_teacher("Camembert")

    def weights(seed, init="scratch"):
        student = make_student(teacher, make_vocabulary(), layers=2, init=init, seed=seed)
        return student.lm_head.dense.weight

    before = torch.get_rng_state()
    first = weights(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(weights(1), first)
    assert not torch.equal(weights(2), first)
    assert not torch.equal(teacher.lm_head.dense.weight, first)
    assert torch.equal(teacher.lm_head.dense.weight, weights(1, "teacher"))


FRESH = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
FRESH |= {"max_position_embeddings": 34}


@pytest.mark.parametrize("model_type", ["roberta", "camembert", "modernbert", "bert"])
def test_a_fresh_model_fits_the_tokenizer(model_type):
    model = make_fresh({"model_type": model_type, **FRESH}, make_vocabulary(), seed=4)
    again = make_fresh({"model_type": model_type, **FRESH}, make_vocabulary(), seed=4)
    assert logits_of(model).shape == (2, 12, 60)
    assert torch.equal(logits_of(model), logits_of(again))
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (1, 5, 6)


def test_a_fresh_modernbert_accepts_global_attn_every_n_layers():
    config = {"model_type": "modernbert", "global_attn_every_n_layers": 2, **FRESH, "vocab_size": 64}
    model = make_fresh(config, make_vocabulary())
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    assert logits_of(model).shape == (2, 12, 64)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({}, "student.config.model_type"),
        ({"model_type": "robberta"}, "student.config.model_type"),
        ({"model_type": "roberta", "hiden_size": 16}, "student.config.hiden_size"),
        ({"model_type": "roberta", "vocab_size": 59}, "student.config.vocab_size"),
        ({"model_type": "roberta", "hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "roberta", "hidden_size": 16, "num_attention_heads": 3}, "attention"),
        ({"model_type": "gpt2"}, "masked language model"),
    ],
)
def test_an_invalid_student_config_names_its_field(config, field):
    with pytest.raises(FatalError, match=field):
        make_fresh(config, make_vocabulary())


def test_the_published_sizes_of_distilcamembert():
    """68,128,261 parameters with LM head, 67,504,128 without; the teacher has 110,655,493. Counted, not allocated."""
    sizes = {"vocab_size": 32005, "max_position_embeddings": 514, "type_vocab_size": 1}
    with torch.device("meta"):
        teacher = transformers.CamembertForMaskedLM(transformers.CamembertConfig(**sizes))
        student = make_student(teacher, make_vocabulary(size=32005), layers=6, init="scratch")
    assert teacher.num_parameters() == 110_655_493
    assert student.num_parameters() == 68_128_261
    assert sum(parameter.numel() for parameter in student.base_model.parameters()) == 67_504_128

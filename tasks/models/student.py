"""Initialises the student: the teacher's architecture with a subset of its layers, or a new model from a config.

    student = make_student(teacher, vocabulary, layers=6, dropout=0.1)
    model = make_fresh({"model_type": "modernbert", "hidden_size": 192, ...}, vocabulary)

Layers are copied from the teacher as in DistilBERT (Sanh et al., 2019). The complete LM head is copied too:
with a random dense layer and norm, the KL at the first step is 2.0 nats higher.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from storage.errors import FatalError
from tasks.tokens.vocabulary import Vocabulary

_DROPOUT_FIELDS = (
    # BERT and RoBERTa, then ModernBERT, then DistilBERT. Classifier dropout belongs to fine-tuning.
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "embedding_dropout",
    "mlp_dropout",
    "attention_dropout",
    "dropout",
)


def layer_choice(teacher_layers: int, student_layers: int, explicit: Sequence[int] = ()) -> list[int]:
    """Returns the teacher layer that initialises each student layer: floor(i (T-1) / (S-1) + 1/2), or the explicit
    list.

    From 12 to 6 layers this is DistilBERT's choice 0, 2, 4, 7, 9, 11; a student of one layer gets layer 0.

    FatalError: the student is deeper than the teacher, or the list is not an ascending subset of the teacher's layers.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise FatalError(
            f"student.layers = {student_layers}, but the teacher has {teacher_layers} layers; "
            f"set a number between 1 and {teacher_layers}"
        )
    if not explicit:
        steps = max(student_layers - 1, 1)
        return [(2 * i * (teacher_layers - 1) + steps) // (2 * steps) for i in range(student_layers)]
    chosen = list(explicit)
    if chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= teacher_layers:
        raise FatalError(
            f"student.choice = {chosen} is not a valid list of teacher layers; list layers from 0 to "
            f"{teacher_layers - 1}, each once and in ascending order"
        )
    if len(chosen) != student_layers:
        raise FatalError(
            f"student.choice lists {len(chosen)} layers, but student.layers = {student_layers}; make the numbers equal"
        )
    return chosen


def make_student(
    teacher: PreTrainedModel,
    vocabulary: Vocabulary,
    *,
    layers: int,
    choice: Sequence[int] = (),
    dropout: float = 0.0,
    init: Literal["teacher", "scratch"] = "teacher",
    seed: int = 0,
) -> PreTrainedModel:
    """Creates a model of the teacher's class with `layers` layers, in float32 on the CPU, in evaluation mode.

    init "teacher" copies embeddings, the chosen layers and the LM head; "scratch" draws random weights from `seed`.
    Each layer keeps its attention type (ModernBERT: full or sliding). The config gets the tokenizer's special ids, and
    embedding and decoder are tied if they are in the teacher.

    FatalError: the choice of layers is invalid, or the tokenizer's pad id would shift the positions (`check_pad_id`).
    """
    path, teacher_stack = _layer_stack(teacher)
    chosen = layer_choice(len(teacher_stack), layers, choice)
    if teacher.config.model_type == "modernbert" and chosen[0] != 0:
        raise FatalError(
            f"student.choice = {chosen}, but a ModernBERT student needs layer 0, which has no attention norm; start "
            "the list with 0"
        )
    check_pad_id(teacher, vocabulary)
    config = _student_config(teacher, vocabulary, chosen, dropout)
    student = _build(type(teacher), config, seed)
    if init == "teacher":
        source = teacher.state_dict()
        student.load_state_dict({name: source[_teacher_name(name, path, chosen)] for name in student.state_dict()})
    return student


def make_fresh(config: Mapping[str, Any], vocabulary: Vocabulary, seed: int = 0) -> PreTrainedModel:
    """Creates a model with random weights from `config`: model_type and any fields of its Hugging Face config class.

    `vocab_size` defaults to the size of the tokenizer and may be larger. Special ids are always those of the tokenizer.

    FatalError: the model type or a field is unknown, a value is invalid, or the tokenizer has more tokens than the
    model has embedding rows.
    """
    rest = dict(config)
    model_type = rest.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise FatalError(f"student.config.model_type = {model_type!r} is unknown; set a model type such as 'roberta'")
    config_class = CONFIG_MAPPING[model_type]
    known = {field.name for field in fields(config_class)} | {"global_attn_every_n_layers"}
    for name in rest:
        if name not in known:
            raise FatalError(f"student.config.{name} is not a field of {config_class.__name__}; correct or remove it")
    rest.setdefault("vocab_size", vocabulary.size)
    if rest["vocab_size"] < vocabulary.size:
        raise FatalError(
            f"student.config.vocab_size = {rest['vocab_size']}, but the tokenizer has {vocabulary.size} tokens; "
            f"remove the field, or set at least {vocabulary.size}"
        )
    rest.update({name: value for name, value in _special_ids(vocabulary).items() if name in known})
    try:
        return _build(AutoModelForMaskedLM.from_config, config_class(**rest), seed)
    except (StrictDataclassError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise FatalError(f"student.config is not valid for a masked language model ({reason}); correct it") from error


def _build(make: Any, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Builds a float32 model whose weights depend on the seed alone; leaves the caller's random state unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = make(config)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _student_config(
    teacher: PreTrainedModel, vocabulary: Vocabulary, chosen: list[int], dropout: float
) -> PreTrainedConfig:
    config: Any = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(chosen)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        config.layer_types = [kinds[index] for index in chosen]
    set_dropout(config, dropout)
    config.tie_word_embeddings = _is_tied(teacher)
    config.dtype = torch.float32
    config._name_or_path = ""  # else the saved config contains a local path
    for name, token in _special_ids(vocabulary).items():
        if hasattr(config, name):
            setattr(config, name, token)
    return config  # type: ignore[no-any-return]


def set_dropout(config: Any, dropout: float) -> None:
    """Sets the dropout of hidden states and attention, by the field names of all supported families."""
    for name in _DROPOUT_FIELDS:
        if hasattr(config, name):
            setattr(config, name, float(dropout))


def _special_ids(vocabulary: Vocabulary) -> dict[str, int]:
    """Returns the tokenizer's special ids, under every field name that a config may use for them."""
    return {
        "pad_token_id": vocabulary.pad,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "cls_token_id": vocabulary.bos,
        "sep_token_id": vocabulary.eos,
    }


def _layer_stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Finds the encoder's layers and their prefix in the state dict."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return name, module
    raise FatalError(f"{type(model).__name__} has no list of layers to choose from; use a different teacher")


def _teacher_name(name: str, path: str, chosen: list[int]) -> str:
    """Returns the teacher's name of a student tensor: only the layer number differs."""
    if not name.startswith(path + "."):
        return name
    index, rest = name[len(path) + 1 :].split(".", 1)
    return f"{path}.{chosen[int(index)]}.{rest}"


def _is_tied(model: PreTrainedModel) -> bool:
    embedding: Any = model.get_input_embeddings()
    decoder: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return decoder is not None and decoder.weight is embedding.weight


def check_pad_id(teacher: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Raises FatalError if the tokenizer's pad id differs from the one after which the RoBERTa family numbers
    positions."""
    embeddings = getattr(teacher.base_model, "embeddings", None)
    pad = getattr(embeddings, "padding_idx", None)
    if pad is not None and pad != vocabulary.pad:
        raise FatalError(
            f"the tokenizer's pad id is {vocabulary.pad}, but the model numbers positions from pad id {pad}; "
            "set blocks.tokenizer to the tokenizer of this model"
        )

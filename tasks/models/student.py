"""Initialises the student: the teacher's architecture with a subset of its layers, or a new model from a config.

    student = make_student(teacher, vocabulary, layers=6, dropout=0.1)
    model = make_fresh({"model_type": "modernbert", "hidden_size": 192, ...}, vocabulary)

Layers are copied from the teacher as in DistilBERT (Sanh et al., 2019). The complete LM head is copied too:
with a random dense layer and norm, the KL at the first step is 2.0 higher.
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
    """The teacher layer that initialises each student layer: floor(i (T-1) / (S-1) + 1/2), or the explicit list.

    12 to 6 layers gives DistilBERT's choice 0, 2, 4, 7, 9, 11; a student of one layer takes the first.
    FatalError if the student is deeper than the teacher, or the list is not an ascending subset of its layers.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise FatalError(
            f"student.layers is {student_layers} but the teacher has {teacher_layers}; "
            f"choose a number between 1 and {teacher_layers}."
        )
    if not explicit:
        steps = max(student_layers - 1, 1)
        return [(2 * i * (teacher_layers - 1) + steps) // (2 * steps) for i in range(student_layers)]
    chosen = list(explicit)
    if chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= teacher_layers:
        raise FatalError(
            f"student.choice is {chosen}; it must name layers of the teacher, from 0 to {teacher_layers - 1}, "
            "each once and in ascending order."
        )
    if len(chosen) != student_layers:
        raise FatalError(
            f"student.choice names {len(chosen)} layers but student.layers is {student_layers}; make them agree."
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
    """A model of the teacher's class with `layers` layers, in float32 on the CPU, in evaluation mode.

    init "teacher" copies embeddings, the chosen layers and the LM head; "scratch" draws all weights from `seed`.
    Each layer keeps its attention type (ModernBERT: full or sliding). The config holds the tokenizer's special ids and
    ties embedding and decoder if the teacher does.
    FatalError for an invalid choice of layers, or a tokenizer whose pad id would shift the positions (`check_pad_id`).
    """
    path, teacher_stack = _layer_stack(teacher)
    chosen = layer_choice(len(teacher_stack), layers, choice)
    if teacher.config.model_type == "modernbert" and chosen[0] != 0:
        raise FatalError(
            f"student.choice is {chosen}; a ModernBERT student must keep layer 0, the one without an attention norm."
        )
    check_pad_id(teacher, vocabulary)
    config = _student_config(teacher, vocabulary, chosen, dropout)
    student = _build(type(teacher), config, seed)
    if init == "teacher":
        source = teacher.state_dict()
        student.load_state_dict({name: source[_teacher_name(name, path, chosen)] for name in student.state_dict()})
    return student


def make_fresh(config: Mapping[str, Any], vocabulary: Vocabulary, seed: int = 0) -> PreTrainedModel:
    """A new model with random weights from `config`: model_type and any fields of its Hugging Face config class.

    `vocab_size` defaults to the tokenizer's and may be larger. Special ids are always the tokenizer's.
    FatalError for an unknown model type, an unknown or invalid field, or too few embedding rows.
    """
    rest = dict(config)
    model_type = rest.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise FatalError(f"student.config.model_type is {model_type!r}; set it to a model type such as 'roberta'.")
    config_class = CONFIG_MAPPING[model_type]
    known = {field.name for field in fields(config_class)} | {"global_attn_every_n_layers"}
    for name in rest:
        if name not in known:
            raise FatalError(f"student.config.{name} is not a field of {config_class.__name__}; fix or remove it.")
    rest.setdefault("vocab_size", vocabulary.size)
    if rest["vocab_size"] < vocabulary.size:
        raise FatalError(
            f"student.config.vocab_size is {rest['vocab_size']} but the tokenizer has {vocabulary.size} tokens; "
            "remove the field or raise it."
        )
    rest.update({name: value for name, value in _special_ids(vocabulary).items() if name in known})
    try:
        return _build(AutoModelForMaskedLM.from_config, config_class(**rest), seed)
    except (StrictDataclassError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise FatalError(f"student.config does not make a masked language model: {reason}") from error


def _build(make: Any, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A float32 model whose weights depend on the seed alone; the caller's random state is unchanged."""
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
    """The tokenizer's special ids, under every field name that a config may have for them."""
    return {
        "pad_token_id": vocabulary.pad,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "cls_token_id": vocabulary.bos,
        "sep_token_id": vocabulary.eos,
    }


def _layer_stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The encoder's layers and their prefix in the state dict."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return name, module
    raise FatalError(f"{type(model).__name__} has no list of layers to choose from; take another teacher.")


def _teacher_name(name: str, path: str, chosen: list[int]) -> str:
    """The teacher's name of a student tensor: the same except for the layer number."""
    if not name.startswith(path + "."):
        return name
    index, rest = name[len(path) + 1 :].split(".", 1)
    return f"{path}.{chosen[int(index)]}.{rest}"


def _is_tied(model: PreTrainedModel) -> bool:
    embedding: Any = model.get_input_embeddings()
    decoder: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return decoder is not None and decoder.weight is embedding.weight


def check_pad_id(teacher: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """FatalError if the tokenizer's pad id is not the one from which the RoBERTa family counts positions."""
    embeddings = getattr(teacher.base_model, "embeddings", None)
    pad = getattr(embeddings, "padding_idx", None)
    if pad is not None and pad != vocabulary.pad:
        raise FatalError(
            f"The tokenizer's pad id is {vocabulary.pad} but the teacher's positions count from pad id {pad}; "
            "give blocks.tokenizer the tokenizer that belongs to the teacher."
        )

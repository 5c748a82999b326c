"""Compares the tokens that several models predict for `<mask>` in example sentences.

    models = {"student": load_model(folder), "teacher": load_model(other_folder)}
    answers = fill_mask_answers(models, recipe.score.sentences)

The result contains plain JSON values only.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from storage.errors import FatalError
from tasks.eval.loaded_model import LoadedModel, eval_mode
from tasks.eval.scores import Scores
from tasks.models.forward import longest_input

MASK = "<mask>"
"""The mask token in the example sentences; it is replaced by the mask token of each model's tokenizer."""


def fill_mask_answers(models: Mapping[str, LoadedModel], sentences: Sequence[str], top: int = 5) -> Scores:
    """Returns the `top` most probable tokens of each model at `<mask>`, with their probabilities.

    {"top": 5, "sentences": 3, "same_first": 2, "shared": 3.7, "rows": [{"sentence": ..., "same_first": True,
    "shared": 4, "answers": {"student": [{"token": "bon", "probability": 0.31}, ...], ...}}, ...]}

    With two or more models, each row also has `same_first` (whether all models predict the same first token) and
    `shared` (the number of tokens that occur in the list of every model). At the top level, `same_first` is the number
    of sentences with the same first token, and `shared` is the mean over the sentences.

    FatalError if a sentence does not contain exactly one `<mask>` or is too long for a model.
    """
    rows = [_compare_sentence(models, sentence, top) for sentence in sentences]
    scores: Scores = {"top": top, "sentences": len(rows), "rows": rows}
    if len(models) > 1 and rows:
        scores["same_first"] = sum(row["same_first"] for row in rows)
        scores["shared"] = sum(row["shared"] for row in rows) / len(rows)
    return scores


def _compare_sentence(models: Mapping[str, LoadedModel], sentence: str, top: int) -> dict[str, Any]:
    if sentence.count(MASK) != 1:
        raise FatalError(f"score.sentences: {sentence!r} must contain {MASK} exactly once")
    answers = {name: _top_tokens(loaded, sentence, top) for name, loaded in models.items()}
    row: dict[str, Any] = {"sentence": sentence, "answers": answers}
    if len(models) > 1:
        tokens = [[answer["token"] for answer in listed] for listed in answers.values()]
        row["same_first"] = len({listed[0] for listed in tokens}) == 1
        row["shared"] = len(set.intersection(*map(set, tokens)))
    return row


@torch.no_grad()
def _top_tokens(loaded: LoadedModel, sentence: str, top: int) -> list[dict[str, Any]]:
    model, tokenizer = loaded.model, loaded.tokenizer
    text = sentence.replace(MASK, str(tokenizer.mask_token))
    ids = tokenizer(text)["input_ids"][: longest_input(model)]
    if ids.count(tokenizer.mask_token_id) != 1:
        raise FatalError(f"score.sentences: {sentence!r} is too long for the model in {loaded.folder}; shorten it")
    with eval_mode(model):
        logits_LV = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]
    logits_V = logits_LV[ids.index(tokenizer.mask_token_id), : len(tokenizer)].float()
    probabilities, tokens = logits_V.softmax(-1).topk(top)
    pairs = zip(tokens.tolist(), probabilities.tolist(), strict=True)
    return [{"token": _readable_token(tokenizer, token), "probability": share} for token, share in pairs]


def _readable_token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Returns the decoded token, or its raw vocabulary entry if the decoded token is blank."""
    text = str(tokenizer.decode([token])).strip()
    return text or str(tokenizer.convert_ids_to_tokens(token))

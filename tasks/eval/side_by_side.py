"""Models side by side: what they say under the mask, how fast they are on a CPU, how large they are.

    models = {"student": load_contender(folder), "teacher": load_contender(other)}
    sheet = fill_mask_sheet(models, recipe.score.sentences)
    times = latency(models, runs=30)

Called by the flows after training, for folders in the Hugging Face layout. All figures are plain JSON values.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from storage.errors import FatalError
from tasks.eval.heldout import evaluating
from tasks.eval.scores import Scores, not_run
from tasks.models.forward import longest_input
from tasks.models.tokenizer import exact_tokenizer

MASK = "<mask>"
"""Stands in sentences for the mask token of whatever tokenizer reads them."""

LATENCY_TOKENS = 128

WARM_UP = 2
"""Forwards before the clock runs, a model and batch size."""


@dataclass(frozen=True)
class LoadedModel:
    """A masked language model with its tokenizer, and the folder that both came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path


def load_model(
    folder: str | Path, *, device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> LoadedModel:
    """Loads a folder in float32. FatalError if it holds no masked language model or no tokenizer."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FatalError(f"{folder}: no such model folder; give the folder that a run made", str(folder))
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        with silenced():
            model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32, **options)
            tokenizer = exact_tokenizer(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        raise FatalError(f"{folder}: not a masked language model with its tokenizer ({first})", str(folder)) from error
    if tokenizer.mask_token_id is None:
        raise FatalError(f"{folder}: the tokenizer has no mask token; take a masked language model", str(folder))
    return LoadedModel(model.to(device).eval(), tokenizer, folder)


@contextmanager
def silenced() -> Iterator[None]:
    """No progress bars of transformers, and no reports about heads that are fresh or left over: they are meant here."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


# ---- fill-mask ---------------------------------------------------------------------------------------------


def fill_mask_answers(models: Mapping[str, LoadedModel], sentences: Sequence[str], top: int = 5) -> Scores:
    """What each model puts in the place of `<mask>`: its `top` tokens with probabilities, model by model.

    {"top": 5, "sentences": 3, "same_first": 2, "shared": 3.7, "rows": [{"sentence": ..., "same_first": True,
    "shared": 4, "answers": {"student": [{"token": "bon", "probability": 0.31}, ...], ...}}, ...]}

    Agreement over all models, where there are two or more: `same_first` is whether (in how many sentences) the first
    tokens are the same, `shared` how many tokens stand in every model's list (mean over the sentences).
    FatalError for a sentence without exactly one `<mask>`.
    """
    rows = [_sheet_row(models, sentence, top) for sentence in sentences]
    sheet: Scores = {"top": top, "sentences": len(rows), "rows": rows}
    if len(models) > 1 and rows:
        sheet["same_first"] = sum(row["same_first"] for row in rows)
        sheet["shared"] = sum(row["shared"] for row in rows) / len(rows)
    return sheet


def _sheet_row(models: Mapping[str, LoadedModel], sentence: str, top: int) -> dict[str, Any]:
    if sentence.count(MASK) != 1:
        raise FatalError(f"score.sentences: {sentence!r} needs {MASK} exactly once")
    answers = {name: _answers(contender, sentence, top) for name, contender in models.items()}
    row: dict[str, Any] = {"sentence": sentence, "answers": answers}
    if len(models) > 1:
        tokens = [[answer["token"] for answer in listed] for listed in answers.values()]
        row["same_first"] = len({listed[0] for listed in tokens}) == 1
        row["shared"] = len(set.intersection(*map(set, tokens)))
    return row


@torch.no_grad()
def _answers(contender: LoadedModel, sentence: str, top: int) -> list[dict[str, Any]]:
    model, tokenizer = contender.model, contender.tokenizer
    text = sentence.replace(MASK, str(tokenizer.mask_token))
    ids = tokenizer(text)["input_ids"][: longest_input(model)]
    if ids.count(tokenizer.mask_token_id) != 1:
        raise FatalError(f"score.sentences: {sentence!r} is too long for the model in {contender.folder}")
    with evaluating(model):
        logits_LV = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]
    logits_V = logits_LV[ids.index(tokenizer.mask_token_id), : len(tokenizer)].float()
    probabilities, tokens = logits_V.softmax(-1).topk(top)
    pairs = zip(tokens.tolist(), probabilities.tolist(), strict=True)
    return [{"token": _spelling(tokenizer, token), "probability": share} for token, share in pairs]


def _spelling(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The token as a reader knows it; the raw piece where nothing would be seen."""
    text = str(tokenizer.decode([token])).strip()
    return text or str(tokenizer.convert_ids_to_tokens(token))


# ---- speed and size ----------------------------------------------------------------------------------------


def latency(
    models: Mapping[str, LoadedModel],
    batch_sizes: Sequence[int] = (1, 32),
    runs: int = 30,
    tokens: int = LATENCY_TOKENS,
    budget: float = 60.0,
) -> Scores:
    """Median milliseconds of one forward of each encoder on the CPU, measured side by side.

    {"tokens": 128, "threads": 2, "runs": {"1": 30, "32": 12}, "ms": {"student": {"1": 9.1, "32": 210.0}, ...}}

    The encoder without a head, as every fine-tuned model runs it, in float32 on full rows of `tokens`. The models take
    turns run by run, so that a busy machine hurts all alike. A batch size ends after `runs` rounds, or after `budget`
    seconds once it has three.
    """
    if runs == 0:
        return not_run("score.latency_runs is 0")
    length = min([tokens, *(longest_input(contender.model) for contender in models.values())])
    before = {name: contender.model.device for name, contender in models.items()}
    found: Scores = {
        "tokens": length,
        "threads": torch.get_num_threads(),
        "runs": {},
        "ms": {name: {} for name in models},
    }
    for contender in models.values():
        nn.Module.to(contender.model, "cpu")
    encoders = {name: contender.model.base_model for name, contender in models.items()}
    try:
        with evaluating(*(contender.model for contender in models.values())):
            for batch_size in batch_sizes:
                inputs = {name: _random_ids(models[name], batch_size, length) for name in models}
                times = _take_turns(encoders, inputs, runs, budget)
                found["runs"][str(batch_size)] = len(next(iter(times.values()), []))
                for name, seconds in times.items():
                    found["ms"][name][str(batch_size)] = 1000 * median(seconds)
    finally:
        for name, contender in models.items():
            nn.Module.to(contender.model, before[name])
    return found


@torch.inference_mode()
def _take_turns(
    encoders: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], runs: int, budget: float
) -> dict[str, list[float]]:
    """Seconds of each forward."""
    for name, encoder in encoders.items():
        for _ in range(WARM_UP):
            encoder(input_ids=inputs[name])
    times: dict[str, list[float]] = {name: [] for name in encoders}
    begin = time.perf_counter()
    for number in range(runs):
        if number >= min(3, runs) and time.perf_counter() - begin > budget:
            break
        for name, encoder in encoders.items():
            start = time.perf_counter()
            encoder(input_ids=inputs[name])
            times[name].append(time.perf_counter() - start)
    return times


def _random_ids(contender: LoadedModel, batch_size: int, length: int) -> Tensor:
    """Ordinary pieces [batch_size, length]; never padding, which a model may treat apart."""
    size = min(int(contender.model.config.vocab_size), len(contender.tokenizer))
    ordinary = np.setdiff1d(np.arange(size), contender.tokenizer.all_special_ids)
    return torch.from_numpy(np.random.default_rng(0).choice(ordinary, (batch_size, length)))


def parameters(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of the whole model and of its encoder alone; a tied matrix counts once, where it is used first."""
    return {"with_head": _count(model), "without_head": _count(model.base_model)}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def size_on_disk(folder: str | Path) -> int:
    """Bytes of the weight files in a model folder: safetensors, or where there are none, .bin."""
    for pattern in ("*.safetensors", "*.bin"):
        if sizes := [path.stat().st_size for path in Path(folder).glob(pattern)]:
            return sum(sizes)
    raise FatalError(f"{folder}: no weights (*.safetensors) in this folder; copy the model again", str(folder))

"""The model card: metadata for the hub, text for readers, and the escaping of untrusted text."""

import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard, ModelCardData

from tasks.recipe.config import Recipe
from tasks.recipe.load import make_recipe
from tasks.release.model_card import CardFacts, model_card
from tasks.release.redact import public_name
from tasks.release.results import ModelSummary, SetResult

STUDENT = ModelSummary(
    "student",
    (
        SetResult("heldout", "top1", (0.469,)),
        SetResult("ner", "entity_f1", (0.871, 0.874, 0.869)),
        SetResult("cls", "accuracy", (), "score.cls names no set"),
    ),
    parameters=68_128_261,
    size=272_513_044,
    milliseconds={1: 43.4, 32: 1302.0},
)
TEACHER = ModelSummary(
    "teacher",
    (SetResult("heldout", "top1", (0.502,)), SetResult("ner", "entity_f1", (0.891, 0.895, 0.889))),
    parameters=110_655_493,
    milliseconds={1: 88.5, 32: 2750.0},
)


def recipe(**sections: object) -> Recipe:
    values = {
        "name": "pilot",
        "corpus": {"url": "/data/secret-place/oscar-2301"},
        "teacher": {"model": "almanach/camembert-base"},
        "register": {"name": "distilled", "license": "mit", "dataset": "oscar-corpus/OSCAR-2301"},
    }
    return make_recipe(values | sections, "test")


def facts(**changes: object) -> CardFacts:
    made = CardFacts(
        name="distilled",
        recipe=recipe(),
        models=(STUDENT, TEACHER),
        snapshot="f" * 64,
        sizes={"documents": 1_234_567, "tokens": 99},
        layers=6,
        steps=500,
        tokens=65_536_000,
        seconds=8100.0,
        hardware="1 x NVIDIA H200",
        run_key="a" * 64,
        model_key="b" * 64,
        versions={"torch": "2.13.0"},
        figure="scores.png",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_front_matter_is_valid_for_the_hub() -> None:
    card = ModelCard(model_card(facts()))
    assert isinstance(card.data, ModelCardData)
    assert card.data.to_dict() == {
        "language": "fr",
        "license": "mit",
        "base_model": "almanach/camembert-base",
        "datasets": ["oscar-corpus/OSCAR-2301"],
        "metrics": ["accuracy", "f1"],
        "pipeline_tag": "fill-mask",
        "library_name": "transformers",
        "tags": ["distillation", "masked-language-model", "pilot"],
    }


def test_scores_appear_next_to_those_of_the_teacher() -> None:
    text = model_card(facts())
    assert "| heldout, top1 | 46.9 | 50.2 |" in text
    assert "| ner, entity\\_f1 | 87.1 ± 0.6 (3) | 89.2 ± 0.8 (3) |" in text
    assert "| cls, accuracy | not run | not run |" in text
    assert "- cls (student): score.cls names no set" in text
    assert "| weights, MB | 272.5 | not measured |" in text
    assert "| CPU, batch 1, ms | 43.4 | 88.5 |" in text


def test_ratios_have_an_interval_and_the_control_has_a_column() -> None:
    student = replace(STUDENT, ratios={"ner": {"value": 0.9765, "low": 0.961, "high": 0.99}})
    control = ModelSummary("control", (SetResult("heldout", "top1", (0.459,), error=0.01),), parameters=68_128_261)
    text = model_card(facts(models=(student, TEACHER, control)))
    assert "| set, metric | student | teacher | control | student / teacher |" in text
    assert "| heldout, top1 | 46.9 | 50.2 | 45.9 ± 2.0 |  |" in text
    assert "| ner, entity\\_f1 | 87.1 ± 0.6 (3) | 89.2 ± 0.8 (3) | not run | 0.977 (0.961 to 0.990) |" in text
    assert "| parameters, million | 68.1 | 110.7 | 68.1 | 0.62 |" in text
    assert "It retains 95.6 % of the scores of its teacher" in text


@pytest.mark.parametrize(
    "expected",
    [
        "0.5 × T² × KL(teacher ‖ student)",
        "| temperature | 2 |",
        "cached, hidden states as int8",
        "| positions with distillation and cosine loss | masked |",
        "| documents | 1,234,567 |",
        "| time in training steps | 2 h 15 min |",
        "1 x NVIDIA H200",
        "layers of the teacher, evenly spaced",
        "![Scores, size and speed](scores.png)",
        'pipeline("fill-mask", model="distilled")',
        "torch 2.13.0",
    ],
)
def test_card_states_how_the_model_was_made(expected: str) -> None:
    assert expected in model_card(facts())


def test_warm_start_is_named_instead_of_the_teachers_layers() -> None:
    text = model_card(facts(recipe=recipe(train={"warm_start": "models:/distilled@champion"})))
    assert "warm start, all weights of distilled@champion" in text
    assert "layers of the teacher" not in text


def test_paths_and_urls_are_removed() -> None:
    bare = recipe(
        teacher={"model": "/home/marie/models/teacher"},
        corpus={"url": "s3://bucket/oscar-2301?token=abc"},
        register={"name": "distilled"},
    )
    text = model_card(facts(recipe=bare))
    assert not re.search("marie|bucket|key:word|token=abc", text)
    assert ModelCard(text).data.base_model == "teacher"
    away = "score.ner: /data/marie/wikiner: no such folder; give another, or s3://key:word@bucket/sets/ner?token=abc"
    text = model_card(facts(models=(ModelSummary("student", (SetResult("ner", "entity_f1", (), away),)),)))
    assert "score.ner: wikiner: no such folder; give another, or ner" in text
    assert not re.search("marie|bucket|token=", text)
    assert public_name("almanach/camembert-base") == "almanach/camembert-base"


HOSTILE = "x\n---\nlicense: apache-2.0\n# Heading | cell <script>alert(1)</script> [a](http://b) `c` ${d}: - *"


def test_untrusted_text_cannot_break_out_of_its_place() -> None:
    model = ModelSummary("stu|dent\n# no", (SetResult("n|er", "f<1>", (), HOSTILE),))
    hostile = recipe(
        corpus={"url": HOSTILE, "language": HOSTILE},
        teacher={"model": HOSTILE, "revision": HOSTILE},
        register={"name": "distilled", "license": HOSTILE, "dataset": HOSTILE},
        score={"sentences": [f"``` {HOSTILE} <mask>"]},
    )
    text = model_card(
        facts(recipe=hostile, models=(model,), hardware=HOSTILE, name=HOSTILE, versions={HOSTILE: HOSTILE})
    )
    data = ModelCard(text).data.to_dict()
    assert data["license"] == data["language"] == HOSTILE
    assert data["datasets"] == [HOSTILE]
    body = ModelCard(text).text
    prose = re.sub(r"(?ms)^(`{3,})python\n.*?^\1$", "", body)
    assert prose.count("```") == 0
    headings = [line for line in prose.splitlines() if line.startswith("#")]
    assert headings[0].startswith("# x --- license: apache-2.0 \\# Heading \\| cell")
    assert headings[1:] == [
        "## Scores",
        "### Not run",
        "## Use",
        "## How it was made",
        "### Corpus",
        "### Teacher and student",
        "### Objective",
        "### Training",
    ]
    assert "<script>" not in re.sub(r"`[^`]*`", "", prose)
    for line in prose.splitlines():
        if line.startswith("| ") and "Heading" in line:
            assert len(re.findall(r"(?<!\\)\|", line)) == 3, line


def test_model_without_a_teacher_has_a_card() -> None:
    values = {
        "loss": {"distil": 0, "cosine": 0, "mlm": 1},
        "teacher": {"model": ""},
        "blocks": {"tokenizer": "tok"},
        "student": {"init": "config", "config": {"model_type": "camembert"}, "layers": 4},
    }
    text = model_card(facts(recipe=recipe(**values), models=(STUDENT,), layers=4, seconds=0.0, hardware=""))
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "trained without a teacher" in text
    assert "| hardware | not recorded |" in text

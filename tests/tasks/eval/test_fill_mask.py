"""Predictions at the mask: equal to the fill-mask pipeline, with counts of agreement."""

import pytest
from transformers import pipeline

from storage.errors import FatalError
from tasks.eval.fill_mask import fill_mask_answers

SENTENCES = ("Le maire signe <mask> dossier.", "Un employeur refuse un congé <mask> par écrit.")


def test_answers_equal_those_of_the_pipeline(models):
    found = fill_mask_answers(models, SENTENCES)
    for name, loaded in models.items():
        fill = pipeline("fill-mask", model=str(loaded.folder), top_k=5)
        for row in found["rows"]:
            expected = fill(row["sentence"].replace("<mask>", fill.tokenizer.mask_token))
            answers = row["answers"][name]
            assert [answer["probability"] for answer in answers] == pytest.approx(
                [answer["score"] for answer in expected], rel=1e-4
            )
            assert [answer["token"] for answer in answers] == [
                answer["token_str"].strip() or loaded.tokenizer.convert_ids_to_tokens(answer["token"])
                for answer in expected
            ]


def test_agreement_is_counted(models):
    same = fill_mask_answers({"a": models["teacher"], "b": models["teacher"]}, SENTENCES)
    assert same["same_first"] == same["sentences"] == 2
    assert same["shared"] == 5
    different = fill_mask_answers(models, SENTENCES)
    assert different["same_first"] == sum(
        row["answers"]["student"][0]["token"] == row["answers"]["teacher"][0]["token"] for row in different["rows"]
    )
    assert "same_first" not in fill_mask_answers({"alone": models["student"]}, SENTENCES)


@pytest.mark.parametrize("sentence", ["Pas de masque.", "<mask> et <mask>.", "un congé " * 200 + "<mask>"])
def test_sentence_needs_exactly_one_mask_within_the_longest_input(models, sentence):
    with pytest.raises(FatalError, match=r"score\.sentences"):
        fill_mask_answers(models, [sentence])

"""Models side by side: answers as the fill-mask pipeline gives them, fair timing, counts of parameters."""

import pytest
import torch
from transformers import AutoModelForMaskedLM, CamembertConfig, pipeline

from storage.errors import FatalError
from tasks.eval.side_by_side import fill_mask_answers, latency, load_model, parameters, size_on_disk
from tests.harness.tiny import make_teacher

SENTENCES = ("Le maire signe <mask> dossier.", "Un employeur refuse un congé <mask> par écrit.")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    make_teacher(folder / "student", "modernbert", layers=2)
    make_teacher(folder / "teacher", "camembert", layers=3)
    return {name: load_model(folder / name) for name in ("student", "teacher")}


def test_answers_are_those_of_the_pipeline(models):
    sheet = fill_mask_answers(models, SENTENCES)
    for name, contender in models.items():
        ask = pipeline("fill-mask", model=str(contender.folder), top_k=5)
        for row in sheet["rows"]:
            expected = ask(row["sentence"].replace("<mask>", ask.tokenizer.mask_token))
            answers = row["answers"][name]
            assert [answer["probability"] for answer in answers] == pytest.approx(
                [answer["score"] for answer in expected], rel=1e-4
            )
            assert [answer["token"] for answer in answers] == [
                answer["token_str"].strip() or contender.tokenizer.convert_ids_to_tokens(answer["token"])
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
def test_a_sentence_needs_one_mask_within_reach(models, sentence):
    with pytest.raises(FatalError, match=r"score\.sentences"):
        fill_mask_answers(models, [sentence])


def test_latency_takes_turns_and_reports_every_model_and_batch_size(models):
    order = []
    hooks = [
        contender.model.base_model.register_forward_pre_hook(
            lambda _, __, inputs, name=name: order.append((name, tuple(inputs["input_ids"].shape))), with_kwargs=True
        )
        for name, contender in models.items()
    ]
    found = latency(models, batch_sizes=(1, 3), runs=4, tokens=16)
    for hook in hooks:
        hook.remove()
    timed = [call for call in order if call[1] == (3, 16)][4:]  # after two forwards each to warm up
    assert timed == [("student", (3, 16)), ("teacher", (3, 16))] * 4
    assert found["runs"] == {"1": 4, "3": 4}
    assert all(found["ms"][name][size] > 0 for name in models for size in ("1", "3"))


def test_latency_stops_at_its_budget_after_three_rounds(models):
    assert latency(models, batch_sizes=(1,), runs=50, tokens=8, budget=0.0)["runs"] == {"1": 3}
    assert latency(models, runs=0)["status"] == "not run"


def test_parameters_are_those_of_the_published_models():
    """FACTS: camembert-base and its student with six layers."""
    published = {12: (110_655_493, 110_031_360), 6: (68_128_261, 67_504_128)}
    for layers, counts in published.items():
        config = CamembertConfig(
            vocab_size=32_005, num_hidden_layers=layers, max_position_embeddings=514, type_vocab_size=1
        )
        with torch.device("meta"):
            model = AutoModelForMaskedLM.from_config(config)
        assert tuple(parameters(model).values()) == counts


def test_size_is_that_of_the_weights(models):
    folder = models["student"].folder
    assert size_on_disk(folder) == (folder / "model.safetensors").stat().st_size
    with pytest.raises(FatalError, match="no weights"):
        size_on_disk(folder.parent)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(FatalError, match="no such model folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(FatalError, match="not a masked language model"):
        load_model(tmp_path)

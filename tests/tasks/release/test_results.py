"""Results from scores: the metric of each set, protocol keys, sets that were not run, and summaries of all models."""

from tasks.eval.scores import not_run
from tasks.release.results import SetResult, protocol_keys, results_of_sets, summarize_models, teacher_among

RATIO = {"value": 0.9, "low": 0.8, "high": 1.0}
STUDENT = {
    "heldout": {"top1": 0.4, "top1_se": 0.01, "teacher_top1": 0.5, "teacher_top1_se": 0.02},
    "size-and-speed": {
        "parameters": {"student": {"with_head": 5}, "control": {"with_head": 5}, "teacher": {"with_head": 9}},
        "bytes": {"student": 20, "control": 20, "teacher": 36},
        "latency": {"ms": {"student": {"1": 2.5}, "teacher": {"1": 5.0}}},
    },
    "xnli": {"runs": {"0": {"accuracy": 0.5}, "1": {"accuracy": 0.7}}, "against_teacher": {"ratio": RATIO}},
}
CONTROL = {"heldout": {"top1": 0.3, "top1_se": 0.01}, "xnli": not_run("seed 2 is missing")}


def test_result_of_every_set() -> None:
    scores = {
        "heldout": {"top1": 0.5, "top1_se": 0.01, "kl": 0.3, "protocol": "p"},
        "fill-mask": {"rows": []},
        "size-and-speed": {"parameters": {}},
        "xnli": {"runs": {"0": {"accuracy": 0.7, "macro_f1": 0.6}, "1": {"accuracy": 0.8, "macro_f1": 0.6}}},
        "ner": {"runs": {"0": {"entity_f1": 0.9}}},
        "paws-x": not_run("no such folder"),
        "fine-tuning": not_run("no protocol"),
    }
    results = results_of_sets(scores)
    assert results == (
        SetResult("heldout", "top1", (0.5,), error=0.01),
        SetResult("xnli", "accuracy", (0.7, 0.8)),
        SetResult("ner", "entity_f1", (0.9,)),
        SetResult("paws-x", "accuracy", reason="no such folder"),
        SetResult("fine-tuning", "", reason="no protocol"),
    )
    assert protocol_keys(scores) == {one.set_name: "p" if one.set_name == "heldout" else "none" for one in results}
    assert [SetResult.from_json(one.to_json()) for one in results] == list(results)


def test_teacher_comes_second_with_its_figures_on_the_same_blocks() -> None:
    student, teacher, control = summaries = summarize_models({"student": STUDENT, "control": CONTROL})
    assert [model.name for model in summaries] == ["student", "teacher", "control"]
    assert teacher_among(summaries) is teacher
    assert [(one.set_name, one.values, one.error) for one in teacher.set_results] == [("heldout", (0.5,), 0.02)]
    assert (teacher.parameters, teacher.size, teacher.milliseconds) == (9, 36, {1: 5.0})
    assert student.ratios == {"xnli": RATIO}
    assert control.result_on("xnli") is None
    assert control.milliseconds == {}


def test_fine_tuned_teacher_has_its_own_scores() -> None:
    scores = {"student": STUDENT, "teacher": {"heldout": {"top1": 0.5}, "xnli": {"runs": {"0": {"accuracy": 0.8}}}}}
    teacher = teacher_among(summarize_models(scores))
    assert teacher is not None
    assert [one.mean for one in teacher.set_results] == [0.5, 0.8]


def test_single_model_has_no_teacher_and_missing_measurements_are_zero() -> None:
    alone = {"teacher": {"heldout": {"top1": 0.5}, "size-and-speed": not_run("broken")}}
    assert teacher_among(summarize_models(alone)) is None
    assert summarize_models(alone)[0].parameters == 0

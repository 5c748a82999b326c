"""What card and picture are made from: all models of a comparison, from their scores."""

from tasks.eval.scores import not_run
from tasks.release.results import summarize_models, teacher_among

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


def test_the_teacher_comes_second_with_its_figures_of_the_same_blocks() -> None:
    student, teacher, control = found = summarize_models({"student": STUDENT, "control": CONTROL})
    assert [model.name for model in found] == ["student", "teacher", "control"]
    assert teacher_among(found) is teacher
    assert [(one.set_name, one.values, one.error) for one in teacher.set_results] == [("heldout", (0.5,), 0.02)]
    assert (teacher.parameters, teacher.size, teacher.milliseconds) == (9, 36, {1: 5.0})
    assert student.ratios == {"xnli": RATIO}
    assert control.standing("xnli") is None
    assert control.milliseconds == {}


def test_scores_of_the_teacher_itself_are_taken_where_it_was_fine_tuned() -> None:
    scores = {"student": STUDENT, "teacher": {"heldout": {"top1": 0.5}, "xnli": {"runs": {"0": {"accuracy": 0.8}}}}}
    teacher = teacher_among(summarize_models(scores))
    assert teacher is not None
    assert [one.mean for one in teacher.set_results] == [0.5, 0.8]


def test_a_model_alone_has_no_teacher_and_what_was_not_timed_is_left_out() -> None:
    alone = {"teacher": {"heldout": {"top1": 0.5}, "size-and-speed": not_run("broken")}}
    assert teacher_among(summarize_models(alone)) is None
    assert summarize_models(alone)[0].parameters == 0

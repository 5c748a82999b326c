"""The figure of the scores: a PNG of the documented size that holds every number."""

import io
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from PIL import Image

from tasks.release.figure import draw_figure, headline, render_figure
from tasks.release.results import ModelSummary, SetResult, half_width, retained_share

NER = (0.871, 0.874, 0.869)
STUDENT = ModelSummary(
    "student",
    (
        SetResult("heldout", "top1", (0.469,)),
        SetResult("ner", "entity_f1", NER),
        SetResult("cls", "accuracy", (), "score.cls names no set"),
    ),
    parameters=68_128_261,
    milliseconds={1: 40.0, 32: 1300.0},
)
TEACHER = ModelSummary(
    "teacher",
    (SetResult("heldout", "top1", (0.5,)), SetResult("ner", "entity_f1", (0.891, 0.895, 0.889))),
    parameters=110_655_493,
    milliseconds={1: 80.0, 32: 2700.0},
)
CONTROL = ModelSummary("contrôle", (SetResult("ner", "entity_f1", (0.84, 0.85, 0.83)),), parameters=68_128_261)


def pixels(png: bytes) -> "np.typing.NDArray[np.uint8]":
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


@pytest.mark.parametrize("models", [(STUDENT, TEACHER, CONTROL), (STUDENT,), (ModelSummary("student"),)])
def test_figure_is_a_png_1200_pixels_wide_and_not_blank(models: tuple[ModelSummary, ...]) -> None:
    image = pixels(render_figure("Modèle élève — français, 5 $ de plus_que $x", models))
    assert image.shape[1] == 1200
    assert 300 < image.shape[0] < 1200
    assert image.std() > 5


def test_equal_results_give_equal_bytes() -> None:
    assert render_figure("a", (STUDENT, TEACHER)) == render_figure("a", (STUDENT, TEACHER))
    assert render_figure("a", (STUDENT, TEACHER)) != render_figure("a", (TEACHER, STUDENT))


def test_means_over_seeds_have_error_bars_and_single_runs_have_none() -> None:
    scores = draw_figure("a", (STUDENT, TEACHER, CONTROL)).axes[0]
    points = [one for one in scores.containers if isinstance(one, ErrorbarContainer)]
    assert len(points) == 5  # heldout of two, ner of three
    with_bars = [one for one in points if one.has_xerr]
    assert len(with_bars) == 3
    (segment,) = with_bars[0].lines[2][0].get_segments()
    half = half_width(SetResult("ner", "entity_f1", NER))
    assert half == pytest.approx(4.3026527 * np.std(NER, ddof=1) / np.sqrt(3))
    assert segment[:, 0] == pytest.approx([100 * (np.mean(NER) - half), 100 * (np.mean(NER) + half)])


def test_every_number_and_every_reason_appears() -> None:
    figure = draw_figure("a", (STUDENT, TEACHER, CONTROL))
    written = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert {"46.9", "50.0", "87.1", "84.0", "68.1", "40.0", "2,700", "not measured"} <= written
    assert "not run: score.cls names no set" in written
    assert [label.get_text() for label in figure.legends[0].get_texts()] == ["student", "teacher", "contrôle"]


def test_headline_leaves_out_unmeasured_parts() -> None:
    assert headline((STUDENT, TEACHER)) == (
        "The student retains 96 % of its teacher's scores, is 2.0 times as fast on a CPU "
        "and has 62 % of its parameters."
    )
    fast = ModelSummary("student", (), milliseconds={1: 40.0})
    assert headline((fast, TEACHER)) == "The student is 2.0 times as fast on a CPU."
    assert headline((STUDENT,)) == headline((CONTROL, ModelSummary("teacher"))) == ""
    assert retained_share(STUDENT, ModelSummary("teacher")) is None


RATIO = {"value": 0.977, "low": 0.961, "high": 0.99}


def test_ratio_to_the_teacher_has_its_interval_and_a_single_run_has_the_interval_over_blocks() -> None:
    student = replace(STUDENT, ratios={"ner": RATIO}, set_results=(SetResult("heldout", "top1", (0.469,), error=0.01),))
    assert half_width(student.set_results[0]) == pytest.approx(0.0196)
    axes = draw_figure("a", (student, CONTROL, TEACHER)).axes[0]
    assert "98 % [96, 99]" in {text.get_text() for text in axes.texts}
    assert headline((student, CONTROL, TEACHER)).startswith("The student retains 94 % of its teacher's scores")


def test_paths_in_reasons_are_removed() -> None:
    away = ModelSummary("student", (SetResult("cls", "accuracy", (), "/data/marie/sets/cls: no such folder"),))
    assert "not run: cls: no such folder" in {text.get_text() for text in draw_figure("a", (away,)).axes[0].texts}

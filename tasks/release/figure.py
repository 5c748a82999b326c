"""Draws a figure of the scores of student, teacher and control with their intervals, their size and their speed.

    png = render_figure("distil-demo", (student, teacher, control))       # ModelSummary values -> PNG bytes

The PNG is 1,200 pixels wide. Scores are points on a shared axis that need not begin at 0; sizes and times are bars,
which begin at 0. Error bars are 95 % intervals, over seeds or, for a single run, over blocks of held-out text.
"""

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tasks.release.redact import without_paths
from tasks.release.results import ModelSummary, SetResult, half_width, names_of_sets, retained_share, teacher_among

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


WIDTH, DPI = 12.0, 100
"""Width in inches, and dots per inch: 1,200 pixels."""

COLOURS = ("#0072b2", "#6b6b6b", "#e69f00", "#009e73", "#cc79a7")
"""Palette of Okabe and Ito (2008), which colour-blind readers can distinguish."""

MARKERS = ("o", "D", "s", "^", "v")

TEXT_COLOUR, NOTE_COLOUR = "#222222", "#8a8a8a"

LANE_HEIGHT = 0.24
"""Height of one model's lane, where the row of a set has the height 1."""

MIN_SPAN = 15.0
"""Minimum length of the score axis in percentage points; on a shorter axis, noise would look like a difference."""

TITLES = {
    "heldout": "held-out text,\nmasked top-1",
    "ner": "named entities,\nentity F1",
    "cls": "FLUE CLS,\naccuracy",
    "cls-books": "CLS books,\naccuracy",
    "cls-dvd": "CLS DVDs,\naccuracy",
    "cls-music": "CLS music,\naccuracy",
    "fine-tuning": "fine-tuned sets",
    "paws-x": "PAWS-X,\naccuracy",
    "xnli": "XNLI,\naccuracy",
}

REASON_CHARACTERS = 70

PANELS: tuple[tuple[str, Callable[[ModelSummary], float]], ...] = (
    ("Parameters, millions", lambda model: model.parameters / 1e6),
    ("CPU time, batch 1, ms", lambda model: model.milliseconds.get(1, 0.0)),
    ("CPU time, batch 32, ms", lambda model: model.milliseconds.get(32, 0.0)),
)
"""Titles and values of the bar charts."""


def render_figure(title: str, models: Sequence[ModelSummary]) -> bytes:
    """Returns the figure as PNG. The first model is the subject; its teacher is identified by the name "teacher"."""
    buffer = io.BytesIO()
    # Without the library version in the metadata, the same input gives the same bytes.
    draw_figure(title, models).savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def draw_figure(title: str, models: Sequence[ModelSummary]) -> "Figure":
    """Returns the figure as a matplotlib `Figure` with the Agg backend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = tuple(models)
    names = names_of_sets(models)
    rows = max(len(names), 2)
    figure = Figure(figsize=(WIDTH, 2.6 + (0.42 + LANE_HEIGHT * len(models)) * rows), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    height = figure.get_figheight()
    figure.text(0.02, 1 - 0.42 / height, _plain(title), fontsize=19, fontweight="bold", color=TEXT_COLOUR, va="center")
    figure.text(0.02, 1 - 0.80 / height, _plain(headline(models)), fontsize=12.5, color=TEXT_COLOUR, va="center")
    bottom, top = 0.85 / height, 1 - 1.55 / height
    _draw_scores(figure.add_axes((0.135, bottom, 0.475, top - bottom)), models, names)
    gap = 0.42 / height
    panel_height = (top - bottom - 2 * gap) / len(PANELS)
    for number, (panel, value) in enumerate(PANELS):
        axes = figure.add_axes((0.725, top - panel_height - number * (panel_height + gap), 0.2, panel_height))
        _draw_bars(axes, panel, models, value)
    _draw_legend(figure, models, 1 - 1.17 / height)
    figure.text(0.02, 0.2 / height, _note(models), fontsize=10, color=NOTE_COLOUR, va="center")
    return figure


def headline(models: Sequence[ModelSummary]) -> str:
    """Returns one sentence on the student's scores, speed and size relative to its teacher, as far as measured.

    The sentence is empty without a teacher or measurements.
    """
    student, teacher = models[0], teacher_among(models)
    if teacher is None:
        return ""
    parts = []
    share = retained_share(student, teacher)
    if share is not None:
        parts.append(f"retains {100 * share:.0f} % of its {teacher.name}'s scores")
    if student.milliseconds.get(1) and teacher.milliseconds.get(1):
        parts.append(f"is {teacher.milliseconds[1] / student.milliseconds[1]:.1f} times as fast on a CPU")
    if student.parameters and teacher.parameters:
        parts.append(f"has {100 * student.parameters / teacher.parameters:.0f} % of its parameters")
    if not parts:
        return ""
    *first, last = parts
    return f"The {student.name} " + (f"{', '.join(first)} and {last}" if first else last) + "."


def _note(models: Sequence[ModelSummary]) -> str:
    note = "Error bars: 95 % interval over seeds (Student's t); for held-out text over blocks."
    if models[0].ratios:
        note += f" Grey: score of {_plain(models[0].name)} / teacher, with its paired 95 % interval."
    return note


# ---- scores ------------------------------------------------------------------------------------------------


def _draw_scores(axes: "Axes", models: tuple[ModelSummary, ...], names: Sequence[str]) -> None:
    """Draws one row per set, with one lane per model."""
    extents: list[float] = []
    for row, name in enumerate(names):
        for lane, model in enumerate(models):
            y = row + (lane - (len(models) - 1) / 2) * LANE_HEIGHT
            result = model.result_on(name)
            if result:
                extents += _draw_point(axes, result, y, lane)
        ratio = models[0].ratios.get(name)
        if ratio:
            value, low, high = (100 * ratio[part] for part in ("value", "low", "high"))
            share = f"{value:.0f} % [{low:.0f}, {high:.0f}]"
            axes.text(0.995, row - 0.4, share, transform=axes.get_yaxis_transform(), **_note_style("right"))
        if not any(model.result_on(name) for model in models):
            reason = _plain(_shortened(_reason(models, name)))
            axes.text(0.5, row, reason, transform=axes.get_yaxis_transform(), **_note_style("center"))
    axes.set_yticks(range(len(names)), [_plain(TITLES.get(name, name)) for name in names], fontsize=11.5)
    axes.set_ylim(len(names) - 0.5 if names else 0.5, -0.5)
    low, high = (min(extents), max(extents)) if extents else (0.0, 100.0)
    margin = max(0.12 * (high - low), (MIN_SPAN - (high - low)) / 2)
    axes.set_xlim(max(0.0, low - margin), min(high + 1.6 * margin, 112.0))
    axes.set_xlabel("score, %", fontsize=11)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for row in range(1, len(names)):
        axes.axhline(row - 0.5, color="#d0d0d0", linewidth=0.8)
    _hide_spines(axes, ("top", "right", "left"))


def _draw_point(axes: "Axes", result: SetResult, y: float, lane: int) -> tuple[float, float]:
    """Draws a mean with its interval and its value as text; returns both ends of the interval in percent."""
    mean, half = 100 * result.mean, half_width(result)
    width = 0.0 if half is None else 100 * half
    colour = COLOURS[lane % len(COLOURS)]
    axes.errorbar(
        mean,
        y,
        xerr=None if half is None else width,
        fmt=MARKERS[lane % len(MARKERS)],
        color=colour,
        markersize=8,
        elinewidth=2.2,
        capsize=4,
        capthick=2.2,
        clip_on=False,
    )
    _label(axes, f"{mean:.1f}", (mean + width, y), 9, colour)
    return mean - width, mean + width


def _reason(models: Sequence[ModelSummary], name: str) -> str:
    reasons = [one.reason for model in models for one in model.set_results if one.set_name == name and one.reason]
    return f"not run: {without_paths(reasons[0])}" if reasons else "not run"


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= REASON_CHARACTERS else line[: REASON_CHARACTERS - 1] + "…"


# ---- size and speed ----------------------------------------------------------------------------------------


def _draw_bars(
    axes: "Axes", title: str, models: Sequence[ModelSummary], value: Callable[[ModelSummary], float]
) -> None:
    """Draws one bar per model, labelled with its value."""
    values = [value(model) for model in models]
    axes.set_title(title, fontsize=11.5, loc="left", color=TEXT_COLOUR, pad=5)
    for lane, (model, length) in enumerate(zip(models, values, strict=True)):
        colour = COLOURS[lane % len(COLOURS)]
        axes.barh(lane, length, height=0.62, color=colour)
        _label(axes, _number(length) if length else "not measured", (length, lane), 5, colour)
        _label(axes, _plain(model.name), (0, lane), -6, TEXT_COLOUR)
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.set_xlim(0, max([*values, 1e-9]) * 1.22)
    axes.set_xticks([])
    axes.set_yticks([])
    _hide_spines(axes, ("top", "right", "bottom"))


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


# ---- parts -------------------------------------------------------------------------------------------------


def _draw_legend(figure: "Figure", models: Sequence[ModelSummary], y: float) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], linestyle="", markersize=9, marker=MARKERS[lane % len(MARKERS)], color=COLOURS[lane % len(COLOURS)]
        )
        for lane in range(len(models))
    ]
    figure.legend(
        handles,
        [_plain(model.name) for model in models],
        loc="center left",
        bbox_to_anchor=(0.01, y),
        ncols=6,
        frameon=False,
        fontsize=12,
        handletextpad=0.3,
    )


def _label(axes: "Axes", text: str, point: tuple[float, float], offset: int, colour: str) -> None:
    """Writes text `offset` points to the right of a data point, or to the left if `offset` is negative."""
    side = "left" if offset > 0 else "right"
    axes.annotate(
        text,
        point,
        xytext=(offset, 0),
        textcoords="offset points",
        va="center",
        ha=side,
        fontsize=10.5,
        color=colour,
    )


def _hide_spines(axes: "Axes", sides: Sequence[str]) -> None:
    for side in sides:
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)


def _note_style(side: str) -> dict[str, Any]:
    return {"ha": side, "va": "center", "fontsize": 10.5, "color": NOTE_COLOUR, "style": "italic"}


def _plain(text: str) -> str:
    """Escapes dollar signs, which start mathematical notation in matplotlib."""
    return text.replace("$", r"\$")

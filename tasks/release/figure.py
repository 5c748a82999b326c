"""One picture of a result: scores of student, teacher and control with their intervals, size and speed beside them.

    png = picture("distil-demo", (student, teacher, control))       # Measured values -> PNG, 1200 pixels wide

Called by the flows after scoring. Scores are points on a shared axis, not bars, so that the axis need not begin at 0;
sizes and times are bars that do. The bars on the points are 95 % intervals over seeds, of a single run over its rows.
"""

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tasks.release.model_card import without_places
from tasks.release.results import ModelSummary, SetResult, half_width, kept, set_names, teacher_among

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


WIDTH, DPI = 12.0, 100
"""Inches and dots an inch: 1200 pixels."""

COLOURS = ("#0072b2", "#6b6b6b", "#e69f00", "#009e73", "#cc79a7")
"""Okabe and Ito's, which people who are colour-blind tell apart."""

MARKERS = ("o", "D", "s", "^", "v")

INK, PALE = "#222222", "#8a8a8a"

LANE = 0.24
"""Height of one model's lane within the row of a set."""

LEAST_SPAN = 15.0
"""Points of the score axis; a shorter one would make noise look like a difference."""

TITLES = {
    "heldout": "masked top-1,\nheld-out text",
    "ner": "named entities,\nentity F1",
    "cls": "FLUE CLS,\naccuracy",
    "cls-books": "CLS books,\naccuracy",
    "cls-dvd": "CLS dvd,\naccuracy",
    "cls-music": "CLS music,\naccuracy",
    "fine-tuning": "fine-tuned sets",
    "paws-x": "PAWS-X,\naccuracy",
    "xnli": "XNLI,\naccuracy",
}

REASON_CHARACTERS = 70

BOUNDS = ("value", "low", "high")


def render_figure(title: str, models: Sequence[ModelSummary]) -> bytes:
    """The picture as PNG. The first model is the one it is about; its teacher is named so."""
    buffer = io.BytesIO()
    # Without the name of the library and the time in it, the same figures give the same bytes.
    draw_figure(title, models).savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def draw_figure(title: str, models: Sequence[ModelSummary]) -> "Figure":
    """The picture as a matplotlib figure, drawn by Agg."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = tuple(models)
    names = set_names(models)
    rows = max(len(names), 2)
    figure = Figure(figsize=(WIDTH, 2.6 + (0.42 + LANE * len(models)) * rows), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    height = figure.get_figheight()
    figure.text(0.02, 1 - 0.42 / height, _plain(title), fontsize=19, fontweight="bold", color=INK, va="center")
    figure.text(0.02, 1 - 0.80 / height, _plain(headline(models)), fontsize=12.5, color=INK, va="center")
    bottom, top = 0.85 / height, 1 - 1.55 / height
    left = figure.add_axes((0.135, bottom, 0.475, top - bottom))
    _scores(left, models, names)
    panels = [
        ("Parameters, million", lambda model: model.parameters / 1e6),
        ("CPU, batch 1, ms", lambda model: model.milliseconds.get(1, 0.0)),
        ("CPU, batch 32, ms", lambda model: model.milliseconds.get(32, 0.0)),
    ]
    gap = 0.42 / height
    each = (top - bottom - 2 * gap) / 3
    for place, (label, value) in enumerate(panels):
        axes = figure.add_axes((0.725, top - each - place * (each + gap), 0.2, each))
        _bars(axes, label, models, value)
    _legend(figure, models, 1 - 1.17 / height)
    figure.text(0.02, 0.2 / height, _note(models), fontsize=10, color=PALE, va="center")
    return figure


def headline(models: Sequence[ModelSummary]) -> str:
    """What the student keeps of its teacher, and what that costs; what was not measured is left out."""
    student, teacher = models[0], teacher_among(models)
    if teacher is None:
        return ""
    said = []
    share = kept(student, teacher)
    if share is not None:
        said.append(f"keeps {100 * share:.0f} % of its {teacher.name}'s scores")
    if student.milliseconds.get(1) and teacher.milliseconds.get(1):
        said.append(f"is {teacher.milliseconds[1] / student.milliseconds[1]:.1f} times as fast on a CPU")
    if student.parameters and teacher.parameters:
        said.append(f"has {100 * student.parameters / teacher.parameters:.0f} % of its parameters")
    return f"The {student.name} " + ", ".join(said) if said else ""


def _note(models: Sequence[ModelSummary]) -> str:
    note = "Bars on the points: 95 % interval over seeds (Student's t), on held-out text over blocks."
    if models[0].ratios:
        note += f" Shares: {_plain(models[0].name)} of teacher, with a paired 95 % interval."
    return note


def _scores(axes: "Axes", models: tuple[ModelSummary, ...], names: Sequence[str]) -> None:
    """One row a set, one lane a model in it."""
    edges: list[float] = []
    for row, name in enumerate(names):
        for lane, model in enumerate(models):
            y = row + (lane - (len(models) - 1) / 2) * LANE
            standing = model.standing(name)
            if standing:
                edges += _point(axes, standing, y, lane)
        ratio = models[0].ratios.get(name)
        if ratio:
            share = "{value:.0f} % [{low:.0f}, {high:.0f}]".format(**{part: 100 * ratio[part] for part in BOUNDS})
            axes.text(0.995, row - 0.4, share, transform=axes.get_yaxis_transform(), **_quiet("right"))
        if not any(model.standing(name) for model in models):
            reason = _plain(_shortened(_reason(models, name)))
            axes.text(0.5, row, reason, transform=axes.get_yaxis_transform(), **_quiet("center"))
    axes.set_yticks(range(len(names)), [_plain(TITLES.get(name, name)) for name in names], fontsize=11.5)
    axes.set_ylim(len(names) - 0.5 if names else 0.5, -0.5)
    low, high = (min(edges), max(edges)) if edges else (0.0, 100.0)
    room = max(0.12 * (high - low), (LEAST_SPAN - (high - low)) / 2)
    axes.set_xlim(max(0.0, low - room), min(high + 1.6 * room, 112.0))
    axes.set_xlabel("%", fontsize=11)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for row in range(1, len(names)):
        axes.axhline(row - 0.5, color="#d0d0d0", linewidth=0.8)
    _bare(axes, ("top", "right", "left"))


def _point(axes: "Axes", standing: SetResult, y: float, lane: int) -> tuple[float, float]:
    """Draws a mean with its interval and its number; where it begins and ends on the axis."""
    mean, half = 100 * standing.mean, half_width(standing)
    width = 0.0 if half is None else 100 * half
    axes.errorbar(
        mean,
        y,
        xerr=None if half is None else width,
        fmt=MARKERS[lane % len(MARKERS)],
        color=COLOURS[lane % len(COLOURS)],
        markersize=8,
        elinewidth=2.2,
        capsize=4,
        capthick=2.2,
        clip_on=False,
    )
    axes.annotate(
        f"{mean:.1f}",
        (mean + width, y),
        xytext=(9, 0),
        textcoords="offset points",
        va="center",
        fontsize=10.5,
        color=COLOURS[lane % len(COLOURS)],
    )
    return mean - width, mean + width


def _bars(axes: "Axes", label: str, models: Sequence[ModelSummary], value: Callable[[ModelSummary], float]) -> None:
    """One bar a model, each with its number."""
    values = [value(model) for model in models]
    axes.set_title(label, fontsize=11.5, loc="left", color=INK, pad=5)
    for lane, (model, figure) in enumerate(zip(models, values, strict=True)):
        colour = COLOURS[lane % len(COLOURS)]
        text = _short(figure) if figure else "not measured"
        axes.barh(lane, figure, height=0.62, color=colour)
        axes.annotate(
            text, (figure, lane), xytext=(5, 0), textcoords="offset points", va="center", fontsize=10.5, color=colour
        )
        axes.annotate(
            _plain(model.name),
            (0, lane),
            xytext=(-6, 0),
            textcoords="offset points",
            va="center",
            ha="right",
            fontsize=10.5,
            color=INK,
        )
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.set_xlim(0, max([*values, 1e-9]) * 1.22)
    axes.set_xticks([])
    axes.set_yticks([])
    _bare(axes, ("top", "right", "bottom"))


def _legend(figure: "Figure", models: Sequence[ModelSummary], y: float) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], linestyle="", markersize=9, marker=MARKERS[lane % len(MARKERS)], color=COLOURS[lane % len(COLOURS)]
        )
        for lane in range(len(models))
    ]
    labels = [_plain(model.name) for model in models]
    figure.legend(
        handles,
        labels,
        loc="center left",
        bbox_to_anchor=(0.01, y),
        ncols=6,
        frameon=False,
        fontsize=12,
        handletextpad=0.3,
    )


def _bare(axes: "Axes", sides: Sequence[str]) -> None:
    for side in sides:
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)


def _quiet(side: str) -> dict[str, Any]:
    return {"ha": side, "va": "center", "fontsize": 10.5, "color": PALE, "style": "italic"}


def _reason(models: Sequence[ModelSummary], name: str) -> str:
    reasons = [one.reason for model in models for one in model.set_results if one.set_name == name and one.reason]
    return f"not run: {without_places(reasons[0])}" if reasons else "not run"


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= REASON_CHARACTERS else line[: REASON_CHARACTERS - 1] + "…"


def _short(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _plain(text: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")

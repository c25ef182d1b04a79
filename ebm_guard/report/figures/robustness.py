"""Robustness: what withstands the attack, and what unknown images gain by one, against epsilon."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ebm_guard.report.figures.style import (
    ACCENT,
    DASHES,
    INK,
    LINE,
    MARKERS,
    OVER,
    PAPER,
    SERIES,
    UNDER,
    shorten,
    styled,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

PANEL, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 2.45, 3.1, 0.74, 1.2, 0.34, 0.5  # inches
NORM_LABELS = {
    "linf": "epsilon: largest change of a pixel (linf)",
    "l2": "epsilon: length of the whole change (l2)",
}
# Share of the axis that two labels need between them.
_ROOM = 0.075


@dataclass(frozen=True)
class Line:
    """One line of a panel.

    Args:
        name: written beside its end.
        points: (epsilon, metric), ascending.
        colour: of the theme.
        dash: of matplotlib.
        marker: of matplotlib.
    """

    name: str
    points: Sequence[tuple[float, Mapping[str, Any]]]
    colour: str
    dash: Any
    marker: str


@styled
def robustness_curve(section: Mapping[str, Any], norm: str | None = None) -> Figure:
    """Draw the share of images that withstand the attack, one panel for each norm.

    ``section`` is ``robustness`` of a report; ``norm`` chooses one panel.
    """
    norms = [
        item
        for item in section["norms"]
        if norm in (None, item["norm"]) and curve_lines(section, item)
    ]
    step = LEFT + PANEL + RIGHT
    figure = Figure(figsize=(step * len(norms), HEIGHT))
    for number, item in enumerate(norms):
        ax = _panel(figure, number, step * len(norms))
        lines = curve_lines(section, item)
        scale = _Scale.of(item["epsilons"])
        _reference(ax, item, scale)
        _draw(ax, lines, scale)
        ax.set_ylabel("images that withstand the attack")
        _axes(ax, item, scale)
    return figure


@styled
def robustness_ood(section: Mapping[str, Any]) -> Figure:
    """Draw the share of unknown images that the gate accepts when they are attacked."""
    norm = section["norms"][0]
    figure = Figure(figsize=(LEFT + PANEL + RIGHT, HEIGHT))
    ax = _panel(figure, 0, LEFT + PANEL + RIGHT)
    lines = [
        Line(
            shorten(name, 15),
            [(row["epsilon"], row["accepted"]) for row in found["rows"]],
            SERIES[place % len(SERIES)],
            DASHES[place % len(DASHES)],
            MARKERS[place % len(MARKERS)],
        )
        for place, (name, found) in enumerate(section["ood"].items())
    ]
    scale = _Scale.of(norm["epsilons"])
    _reference(ax, norm, scale)
    _draw(ax, lines, scale)
    ax.set_ylabel("unknown images accepted")
    _axes(ax, norm, scale)
    return figure


def curve_lines(section: Mapping[str, Any], norm: Mapping[str, Any]) -> list[Line]:
    """List the lines of a norm that there are numbers for, the clean value at epsilon 0."""
    rows = norm["epsilons"]
    known, unknown = (
        [(row["epsilon"], (row["gated"] or {}).get(key)) for row in rows]
        for key in ("aware", "plain")
    )
    worst = [(row["epsilon"], row["worst_case"]) for row in rows]
    choices = (
        ("gate, attacker\nunaware of it", section["clean_gated"], unknown, UNDER, DASHES[1], "s"),
        ("no gate", section["clean"], worst, INK, "-", "o"),
        ("gate, attacker\nknows it", section["clean_gated"], known, OVER, DASHES[2], "D"),
    )
    lines = []
    for name, clean, found, colour, dash, marker in choices:
        points = [(epsilon, metric) for epsilon, metric in found if metric is not None]
        if points and clean is not None:
            lines.append(Line(name, [(0.0, clean), *points], colour, dash, marker))
    return lines


@dataclass(frozen=True)
class _Scale:
    """Where an epsilon lies on the axis: as it is, or its root where small ones crowd.

    Args:
        root: whether the root is taken.
    """

    root: bool

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> _Scale:
        values = [0.0, *(row["epsilon"] for row in rows)]
        gaps = [high - low for low, high in pairwise(values)]
        return cls(min(gaps) < _ROOM * values[-1])

    def __call__(self, epsilon: float) -> float:
        return sqrt(epsilon) if self.root else epsilon


def _panel(figure: Figure, number: int, width: float) -> Axes:
    step = LEFT + PANEL + RIGHT
    left, height = number * step + LEFT, HEIGHT - TOP - BOTTOM
    return figure.add_axes((left / width, BOTTOM / HEIGHT, PANEL / width, height / HEIGHT))


def _reference(ax: Axes, norm: Mapping[str, Any], scale: _Scale) -> None:
    """Mark the epsilon that the verdict speaks of."""
    row = next(row for row in norm["epsilons"] if row["text"] == norm["reference"])
    place = scale(row["epsilon"])
    ax.axvline(place, color=ACCENT, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
    end = scale(norm["epsilons"][-1]["epsilon"])
    ax.annotate(
        f"{norm['norm']} {row['text']}",
        (place, 1),
        (0, 4),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="center" if place < 0.9 * end else "right",
        va="bottom",
        color=ACCENT,
        fontsize=8.0,
        annotation_clip=False,
    )


def _draw(ax: Axes, lines: Sequence[Line], scale: _Scale) -> None:
    """Draw lines with their bands, and their names beside the last points."""
    for line in lines:
        places = [scale(epsilon) for epsilon, _ in line.points]
        banded = [
            (place, metric["low"], metric["high"])
            for place, (_, metric) in zip(places, line.points, strict=True)
            if metric["low"] is not None
        ]
        if banded:
            at, low, high = zip(*banded, strict=True)
            ax.fill_between(at, low, high, color=line.colour, alpha=0.13, linewidth=0, zorder=2)
        ax.plot(
            places,
            [metric["value"] for _, metric in line.points],
            color=line.colour,
            linestyle=line.dash,
            linewidth=1.8,
            marker=line.marker,
            markersize=4.6,
            markeredgecolor=PAPER,
            markeredgewidth=0.6,
            label=line.name.replace("\n", " "),
            zorder=4,
            clip_on=False,
        )
    _names(ax, lines)


def _axes(ax: Axes, norm: Mapping[str, Any], scale: _Scale) -> None:
    """Label the axes: each epsilon by its text, where there is room for it."""
    texts = [row["text"] for row in norm["epsilons"]]
    places = [scale(row["epsilon"]) for row in norm["epsilons"]]
    of = _common_denominator(texts)
    labels = ["0", *(text.removesuffix(of) for text in texts)]
    shown, last = [], 2 * places[-1]
    # From the right: the largest epsilon keeps its label.
    for place, label in reversed(list(zip([0.0, *places], labels, strict=True))):
        room = last - place >= _ROOM * places[-1] * max(1.0, len(label) / 3)
        shown.append((place, label if room else ""))
        last = place if room else last
    ax.set_xticks(*zip(*shown, strict=True))
    ax.set(xlim=(0, places[-1]), ylim=(0, 1))
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    ax.yaxis.set_major_formatter(FuncFormatter(_percent))
    ax.grid(axis="y", color=LINE, linewidth=0.5, zorder=0)
    ax.set_axisbelow(True)
    unit = f", in 1{of}" if of else ""
    ax.set_xlabel(NORM_LABELS.get(norm["norm"], norm["norm"]) + unit)


def _common_denominator(texts: Sequence[str]) -> str:
    """Return the ``/255`` that all texts end with, or ''.

    Example:
        >>> _common_denominator(["1/255", "8/255"]), _common_denominator(["0.1", "8/255"])
        ('/255', '')
    """
    ends = {text.partition("/")[2] for text in texts}
    end = ends.pop() if len(ends) == 1 else ""
    return f"/{end}" if end else ""


def _percent(value: float, _: int | None = None) -> str:
    return "0" if value == 0 else f"{100 * value:.3g} %"


def _names(ax: Axes, lines: Sequence[Line]) -> None:
    """Write each line's name in its colour beside its end, the names moved apart."""
    height = HEIGHT - TOP - BOTTOM
    ordered = sorted(lines, key=lambda line: float(line.points[-1][1]["value"]))
    sizes = [(1 + line.name.count("\n")) * 0.155 / height for line in ordered]
    middles: list[float] = []
    floor = -0.02
    for line, size in zip(ordered, sizes, strict=True):
        middle = max(float(line.points[-1][1]["value"]), floor + size / 2)
        middles.append(middle)
        floor = middle + size / 2 + 0.02
    # What went above the top is pushed down again, the highest first.
    ceiling = 1.04
    for place in range(len(middles) - 1, -1, -1):
        middles[place] = min(middles[place], ceiling - sizes[place] / 2)
        ceiling = middles[place] - sizes[place] / 2 - 0.02
    for line, middle in zip(ordered, middles, strict=True):
        ax.annotate(
            line.name,
            (1, middle),
            (8, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            color=line.colour,
            fontsize=8.5,
            fontweight="bold" if line.name == "no gate" else "normal",
            va="center",
            linespacing=1.15,
            annotation_clip=False,
        )

"""How well each score tells unknown images apart: ROC curves and a dot plot of AUROC."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ebm_guard.report.figures.style import (
    ACCENT,
    DASHES,
    INK,
    LINE,
    MARKERS,
    MUTED,
    PAPER,
    SERIES,
    add_legend,
    shorten,
    styled,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

PANEL, LEFT, RIGHT, TOP, BOTTOM = 2.7, 0.72, 0.24, 0.32, 0.48  # inches
NAMED = 6  # more curves than this cannot be told apart: the rest is grey


@styled
def roc(ood: Mapping[str, Any], *, titles: bool = True) -> Figure:
    """Draw one ROC panel for each OOD set; energy is the thick line."""
    names = [name for name, entry in ood.items() if entry.get("roc")]
    columns = min(3, max(1, len(names)))
    lines = max(1, ceil(len(names) / columns))
    top = TOP if titles else 0.12
    step_x, step_y = LEFT + PANEL + RIGHT, top + PANEL + BOTTOM
    width, height = columns * step_x, lines * step_y
    figure = Figure(figsize=(width, height))
    for number, name in enumerate(names):
        line, column = divmod(number, columns)
        ax = figure.add_axes(
            (
                (column * step_x + LEFT) / width,
                ((lines - 1 - line) * step_y + BOTTOM) / height,
                PANEL / width,
                PANEL / height,
            )
        )
        _roc_panel(ax, ood[name])
        if titles:
            ax.set_title(shorten(name), loc="left", fontsize=9.5, fontweight="bold", pad=6)
    return figure


def auroc(entry: Mapping[str, Any], score: str) -> float | None:
    """Read the AUROC of a score, or None where the score did not run."""
    metric = entry["scores"].get(score, {}).get("auroc")
    value: float | None = None if metric is None else metric["value"]
    return value


def _roc_panel(ax: Axes, entry: Mapping[str, Any]) -> None:
    """Draw the curves of one OOD set, energy on top, and name them with their AUROC."""
    ax.set(xlim=(0, 1), ylim=(0, 1), box_aspect=1)
    ax.set(xlabel="share of your images refused", ylabel="share of OOD images caught")
    ax.plot([0, 1], [0, 1], color=LINE, linewidth=1.0, zorder=1)
    others = sorted(
        (score for score in entry["roc"] if score != "energy"),
        key=lambda score: -(auroc(entry, score) or 0.0),
    )
    handles, names = [], []
    order = [score for score in ["energy", *others] if score in entry["roc"]]
    for number, score in enumerate(order):
        curve, main, named = entry["roc"][score], score == "energy", number <= NAMED
        (handle,) = ax.plot(
            curve["fpr"],
            curve["tpr"],
            color=ACCENT if main else SERIES[(number - 1) % len(SERIES)] if named else LINE,
            linestyle="-" if main else DASHES[number % len(DASHES)] if named else "-",
            linewidth=2.4 if main else 1.2,
            zorder=10 if main else 5 if named else 2,
        )
        if named:
            value = auroc(entry, score)
            handles.append(handle)
            names.append(shorten(score, 16) + ("" if value is None else f"  {value:.3f}"))
        elif number == NAMED + 1:
            handles.append(handle)
            names.append(f"{len(order) - number} other scores")
    add_legend(ax, handles, names, loc="lower right")
    ax.set_xticks([0, 0.5, 1.0], ["0", "50 %", "100 %"])
    ax.set_yticks([0, 0.5, 1.0], ["0", "50 %", "100 %"])


@styled
def score_ranking(report: Mapping[str, Any]) -> Figure:
    """Draw the AUROC of each score on each OOD set with its interval, best score on top."""
    ood = report["ood"]
    sets = list(ood)
    scores = ranked_scores(report)
    step = min(0.13, 0.5 / max(1, len(sets)))  # inches between the dots of two sets
    row = 0.2 + step * max(1, len(sets))
    left = 0.35 + 0.075 * max([4, *(len(shorten(score, 20)) for score in scores)])
    width, legend = 4.6, 0.14 + 0.17 * ceil(len(sets) / 2)
    height = legend + row * max(1, len(scores)) + 0.48
    figure = Figure(figsize=(width, height))
    ax = figure.add_axes(
        (left / width, 0.48 / height, (width - left - 0.2) / width, row * len(scores) / height)
    )
    lows: list[float] = []
    for place, name in enumerate(sets):
        offset = (place - (len(sets) - 1) / 2) * step / row
        lows += _dots(ax, ood[name], scores, place, offset)
    for line in range(1, len(scores)):
        ax.axhline(line - 0.5, color=LINE, linewidth=0.5, zorder=0)
    low = min([0.9, *lows])
    ax.set(xlim=(max(0.0, low - 0.03), 1.005), ylim=(len(scores) - 0.5, -0.5))
    if ax.get_xlim()[0] < 0.5:
        ax.axvline(0.5, color=MUTED, linewidth=0.8, linestyle=DASHES[1], zorder=0)
    ax.set_xlabel("AUROC  (0.5: chance, 1: perfect)")
    ax.set_yticks(range(len(scores)), [shorten(score, 20) for score in scores])
    ax.tick_params(axis="y", length=0, labelcolor=INK, labelsize=8.5)
    for text, score in zip(ax.get_yticklabels(), scores, strict=True):
        if score == "energy":
            text.set(fontweight="bold", color=ACCENT)
    ax.spines["left"].set_visible(False)
    handles = [_handle(place) for place in range(len(sets))]
    add_legend(
        ax,
        handles,
        [shorten(name, 22) for name in sets],
        loc="lower left",
        anchor=((0.1 - left) / (width - left - 0.2), 1.0),
        columns=min(2, max(1, len(sets))),
    )
    return figure


def ranked_scores(report: Mapping[str, Any]) -> list[str]:
    """List the scores, best first: by the report's ranking, else by their mean AUROC."""
    ood = report["ood"]
    known = [score for entry in ood.values() for score in entry["scores"]]
    names = [
        score
        for score in dict.fromkeys(known)
        if any(auroc(entry, score) is not None for entry in ood.values())
    ]
    ranking = report["energy"].get("ranking") or {"scores": []}
    place = {entry["name"]: entry["rank"] for entry in ranking["scores"]}

    def key(score: str) -> tuple[float, float]:
        values = [value for entry in ood.values() if (value := auroc(entry, score)) is not None]
        return place.get(score, len(place) + 1), -sum(values) / len(values)

    return sorted(names, key=key)


def _handle(place: int) -> Line2D:
    return Line2D(
        [],
        [],
        color=SERIES[place % len(SERIES)],
        marker=MARKERS[(place + place // len(SERIES)) % len(MARKERS)],
        markersize=5.5,
        linewidth=1.3,
        markeredgecolor=PAPER,
        markeredgewidth=0.5,
    )


def _dots(
    ax: Axes, entry: Mapping[str, Any], scores: Sequence[str], place: int, offset: float
) -> list[float]:
    """Draw the dots of one OOD set and return their lowest ends."""
    lows = []
    for line, score in enumerate(scores):
        value = auroc(entry, score)
        if value is None:
            continue
        metric, style = entry["scores"][score]["auroc"], _handle(place)
        colour, y = style.get_color(), line + offset
        if metric["low"] is not None:
            ax.plot([metric["low"], metric["high"]], [y, y], color=colour, lw=1.3, zorder=3)
        ax.plot(
            [value],
            [y],
            color=colour,
            marker=style.get_marker(),
            markersize=5.5,
            zorder=4,
            markeredgecolor=PAPER,
            markeredgewidth=0.5,
            linestyle="none",
            clip_on=False,
        )
        lows.append(value if metric["low"] is None else metric["low"])
    return lows

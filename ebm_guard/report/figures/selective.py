"""Selective prediction: risk against coverage, and where the wrong answers lie."""

from __future__ import annotations

from math import log1p, log10, sqrt
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ebm_guard.report.figures.style import (
    ACCENT,
    DASHES,
    INK,
    LINE,
    MUTED,
    OVER,
    PAPER,
    SERIES,
    UNDER,
    styled,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 4.6, 3.1, 0.62, 1.02, 0.14, 0.48  # inches
FROM = 0.05  # below this coverage a curve is the luck of a few rows
CURVES = (
    ("energy", SERIES[0], DASHES[1], 1.5),
    ("oracle", MUTED, DASHES[2], 1.2),
    ("confidence", ACCENT, "-", 2.2),
)
NAMES = {"confidence": "confidence", "energy": "energy", "oracle": "best possible"}


@styled
def risk_coverage(selective: Mapping[str, Any]) -> Figure:
    """Draw the share of wrong answers against the share of images answered."""
    figure = Figure(figsize=(WIDTH, HEIGHT))
    ax = figure.add_axes(
        (
            LEFT / WIDTH,
            BOTTOM / HEIGHT,
            (WIDTH - LEFT - RIGHT) / WIDTH,
            (HEIGHT - TOP - BOTTOM) / HEIGHT,
        )
    )
    curves = {name: _points(selective["curves"].get(name)) for name, *_ in CURVES}
    _band(ax, selective["curves"]["confidence"])
    ends, tallest = {}, 0.0
    for name, colour, dash, width in CURVES:
        points = curves[name]
        if points:
            coverage, risk = zip(*points, strict=True)
            ax.plot(coverage, risk, color=colour, linestyle=dash, linewidth=width, zorder=4)
            tallest = max(tallest, *risk)
            ends[name] = (points, colour)
    top = max(tallest * 1.12, 0.01)
    ax.set(xlim=(0, 1), ylim=(0, top))
    ax.set(xlabel="share of images answered", ylabel="share of answers that are wrong")
    ax.xaxis.set_major_formatter(FuncFormatter(_percent))
    ax.yaxis.set_major_formatter(FuncFormatter(_percent))
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    _promises(ax, selective)
    _names(ax, ends, top)
    return figure


def _percent(value: float, _: int | None = None) -> str:
    return "0" if value == 0 else f"{100 * value:.3g} %"


def _points(curve: Mapping[str, Any] | None) -> list[tuple[float, float]]:
    if curve is None:
        return []
    pairs = list(zip(curve["coverage"], curve["risk"], strict=True))
    return [pair for pair in pairs if pair[0] >= FROM] or pairs[-1:]


def _band(ax: Axes, curve: Mapping[str, Any]) -> None:
    """Draw the pointwise intervals of the confidence curve."""
    rows = [
        row
        for row in zip(curve["coverage"], curve["low"], curve["high"], strict=True)
        if row[0] >= FROM and row[1] is not None
    ]
    if rows:
        coverage, low, high = zip(*rows, strict=True)
        ax.fill_between(coverage, low, high, color=ACCENT, alpha=0.15, linewidth=0, zorder=2)


def _promises(ax: Axes, selective: Mapping[str, Any]) -> None:
    """Mark what is certified by confidence: no more wrong answers than the height of the mark."""
    marks = [
        (entry["coverage"], entry["risk"])
        for entry in selective["certificates"]
        if entry["by"] == "confidence" and entry["coverage"] is not None
    ]
    top = ax.get_ylim()[1]
    marks = [(coverage, risk) for coverage, risk in marks if risk <= top]
    for coverage, risk in marks:
        ax.plot([0, coverage], [risk, risk], color=UNDER, linewidth=0.8, zorder=3)
        ax.plot(
            [coverage],
            [risk],
            color=UNDER,
            marker="D",
            markersize=4.5,
            markeredgecolor=PAPER,
            markeredgewidth=0.6,
            zorder=6,
            clip_on=False,
        )
    if marks:
        coverage, risk = max(marks, key=lambda mark: mark[1])
        ax.annotate(
            "certified",
            (0, risk),
            (4, 3),
            textcoords="offset points",
            color=UNDER,
            fontsize=8.0,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.6},
            zorder=5,
        )


def _names(ax: Axes, ends: Mapping[str, Any], top: float) -> None:
    """Write each curve's name in its colour, beside the curve where it leaves the others."""
    _, height = ax.get_position().size * ax.figure.get_size_inches()  # type: ignore[union-attr]
    gap = 0.17 / height * top
    wanted = []
    for name, (points, colour) in ends.items():
        # All curves meet at full coverage, so they are named by their height at 80 %.
        wanted.append([_height(points, 0.8), name, colour])
    wanted.sort(key=lambda item: item[0])
    final = max(points[-1][1] for points, _ in ends.values())
    start = max(0.02 * top, min(final - gap * (len(wanted) - 1) / 2, top - gap * len(wanted)))
    for number, (_, name, colour) in enumerate(wanted):
        ax.annotate(
            NAMES[name],
            (1, start + gap * number),
            (7, 0),
            textcoords="offset points",
            color=colour,
            fontsize=8.5,
            fontweight="bold" if name == "confidence" else "normal",
            va="center",
            annotation_clip=False,
        )


def _height(points: Sequence[tuple[float, float]], coverage: float) -> float:
    return next((risk for at, risk in points if at >= coverage), points[-1][1])


CELL, MAP_LEFT, MAP_BOTTOM, MAP_RIGHT, MAP_TOP = 0.285, 0.74, 0.5, 0.62, 0.42  # inches


@styled
def joint_map(selective: Mapping[str, Any]) -> Figure:
    """Draw the rows by confidence and energy: the larger a square, the more; orange = wrong.

    The numbers at the right are the share of wrong rows in each band of confidence.
    """
    joint = selective["joint"]
    right, wrong, edges = joint["right"], joint["wrong"], joint["confidence_edges"]
    first = next(
        (place for place, row in enumerate(right) if any(row) or any(wrong[place])), 0
    )  # no empty rows at the bottom
    lines, columns = len(right) - first, len(right[0])
    width = MAP_LEFT + columns * CELL + MAP_RIGHT
    height = MAP_BOTTOM + lines * CELL + MAP_TOP
    figure = Figure(figsize=(width, height))
    ax = figure.add_axes(
        (
            MAP_LEFT / width,
            MAP_BOTTOM / height,
            columns * CELL / width,
            lines * CELL / height,
        )
    )
    cells = (
        a + b for one, two in zip(right, wrong, strict=True) for a, b in zip(one, two, strict=True)
    )
    largest = max(1, *cells)
    ax.set(xlim=(0, columns), ylim=(0, lines))
    for line in range(lines):
        ax.axhline(line, color=LINE, linewidth=0.4, zorder=0)
        for column in range(columns):
            _square(
                ax,
                (column, line),
                right[first + line][column],
                wrong[first + line][column],
                largest,
            )
        _share(ax, (columns, line), sum(right[first + line]), sum(wrong[first + line]))
    ax.set_yticks(range(lines + 1), [_percent(edge) for edge in edges[first:]])
    ax.set_ylabel("confidence")
    _energy_ticks(ax, joint["energy_edges"], columns)
    ax.set_xlabel("energy  (lower: more like the training data)")
    ax.text(
        columns + 2.05, lines + 0.16, "wrong", ha="right", va="bottom", color=OVER, fontsize=8.0
    )
    _key(ax, lines, largest)
    return figure


def _square(ax: Axes, corner: tuple[float, float], right: int, wrong: int, largest: int) -> None:
    """Draw one cell: area by the logarithm of its rows, filled with the wrong share from below."""
    total = right + wrong
    if not total:
        return
    side = 0.22 + 0.7 * sqrt(log1p(total) / log1p(largest))
    x, y = corner[0] + (1 - side) / 2, corner[1] + (1 - side) / 2
    share = wrong / total
    ax.add_patch(Rectangle((x, y), side, side, facecolor=UNDER, alpha=0.35, linewidth=0, zorder=2))
    if wrong:
        ax.add_patch(Rectangle((x, y), side, side * share, facecolor=OVER, linewidth=0, zorder=3))


def _share(ax: Axes, corner: tuple[float, float], right: int, wrong: int) -> None:
    """Write the share of wrong rows of a band of confidence beside it."""
    if right + wrong:
        ax.text(
            corner[0] + 2.05,
            corner[1] + 0.5,
            f"{100 * wrong / (right + wrong):.1f} %",
            ha="right",
            va="center",
            color=OVER,
            fontsize=8.0,
        )


def _energy_ticks(ax: Axes, edges: Sequence[float], columns: int) -> None:
    low, high = edges[0], edges[-1]
    values = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    values = [value for value in values if low <= value <= high]
    places = [(value - low) / (high - low) * columns for value in values]
    ax.set_xticks(places, [f"{value:g}".replace("-", "−") for value in values])


def _key(ax: Axes, lines: int, largest: int) -> None:
    """Explain the squares above the map."""
    y = lines + 0.42
    place = 0.0
    for colour, alpha, word in ((UNDER, 0.35, "right"), (OVER, 1.0, "wrong")):
        ax.add_patch(
            Rectangle(
                (place, y), 0.42, 0.42, facecolor=colour, alpha=alpha, linewidth=0, clip_on=False
            )
        )
        ax.text(place + 0.58, y + 0.21, word, va="center", color=INK, fontsize=8.5)
        place += 2.4
    counts = sorted({1, _round(sqrt(largest)), _round(largest)})
    for count in counts:
        side = 0.22 + 0.7 * sqrt(log1p(count) / log1p(largest))
        ax.add_patch(
            Rectangle(
                (place, y + 0.21 - side / 2),
                side,
                side,
                facecolor="none",
                edgecolor=MUTED,
                linewidth=0.8,
                clip_on=False,
            )
        )
        ax.text(place + side + 0.15, y + 0.21, f"{count:,}", va="center", color=MUTED, fontsize=8.0)
        place += side + 0.5 + 0.3 * len(f"{count:,}")
    ax.text(place - 0.2, y + 0.21, "images", va="center", color=MUTED, fontsize=8.0)


def _round(count: float) -> int:
    """Keep one digit, so that the key holds round numbers.

    Example:
        >>> _round(853)
        800
    """
    power = 10 ** int(log10(max(count, 1)))
    return int(count // power) * power or 1

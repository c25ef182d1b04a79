"""Reliability diagram: how often the model is right against how sure it is."""

from __future__ import annotations

from math import log10, sqrt
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from ebm_guard.report.figures.style import INK, LINE, MUTED, OVER, PAPER, UNDER, styled

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

PANEL, HIST = 2.85, 0.6  # inches: side of the square, height of the histogram
LEFT, RIGHT, TOP, BOTTOM, BETWEEN = 0.62, 0.12, 0.3, 0.46, 0.14


@styled
def reliability(
    before: Mapping[str, Any],
    after: Mapping[str, Any] | None = None,
    *,
    names: tuple[str, str] = ("Before calibration", "After calibration"),
) -> Figure:
    """Draw one or two reliability diagrams, side by side with the same limits.

    ``before`` and ``after`` are ``calibration.before`` and ``calibration.after`` of a report, or
    their curves.
    """
    curves = [_curve(item) for item in (before, after) if item is not None]
    largest = max([1, *(row["count"] for curve in curves for row in curve["bins"])])
    step = LEFT + PANEL + RIGHT
    top = TOP if after is not None else RIGHT
    width, height = step * len(curves), BOTTOM + HIST + BETWEEN + PANEL + top
    figure = Figure(figsize=(width, height))
    for number, curve in enumerate(curves):
        left = (number * step + LEFT) / width
        ax = figure.add_axes(
            (left, (BOTTOM + HIST + BETWEEN) / height, PANEL / width, PANEL / height)
        )
        below = figure.add_axes((left, BOTTOM / height, PANEL / width, HIST / height))
        _diagram(ax, curve)
        _histogram(below, curve, largest)
        if after is not None:
            ax.set_title(names[number], loc="left", fontsize=9.5, fontweight="bold", pad=6)
    return figure


def _curve(item: Mapping[str, Any]) -> Mapping[str, Any]:
    curve: Mapping[str, Any] = item.get("curve", item)
    return curve


def _diagram(ax: Axes, curve: Mapping[str, Any]) -> None:
    """Draw the diagonal, the gaps and the dots."""
    ax.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    ax.plot([0, 1], [0, 1], color=LINE, linewidth=1.0, zorder=1)
    rows = [row for row in curve["bins"] if row["count"]]
    largest = max((row["count"] for row in rows), default=1)
    _band(ax, rows)
    for row in rows:
        confidence, accuracy = row["confidence"], row["accuracy"]
        # A gap inside the band may be chance: it is drawn paler.
        inside = row["band_low"] <= accuracy <= row["band_high"]
        ax.bar(
            row["lo"],
            accuracy - confidence,
            width=row["hi"] - row["lo"],
            bottom=confidence,
            align="edge",
            color=OVER if confidence > accuracy else UNDER,
            alpha=0.14 if inside else 0.38,
            linewidth=0,
            zorder=2,
        )
        ax.plot([confidence] * 2, [row["low"], row["high"]], color=INK, lw=1.0, zorder=3)
        ax.scatter(
            [confidence],
            [accuracy],
            s=8 + 44 * sqrt(row["count"] / largest),
            color=INK,
            edgecolors=PAPER,
            linewidths=0.7,
            zorder=4,
            clip_on=False,
        )
    ax.text(0.03, 0.97, "underconfident", color=UNDER, va="top", fontsize=8.0)
    ax.text(0.97, 0.03, "overconfident", color=OVER, ha="right", fontsize=8.0)
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    ax.set_xticks(ticks, [])
    ax.set_yticks(ticks, ["0", "0.2", "0.4", "0.6", "0.8", "1"])


def _band(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw where 95 % of the dots of a perfect model of this size would lie."""
    for row in rows:
        ax.fill_between(
            [row["lo"], row["hi"]],
            row["band_low"],
            row["band_high"],
            color=LINE,
            alpha=0.6,
            linewidth=0,
            zorder=0,
        )


def _histogram(ax: Axes, curve: Mapping[str, Any], largest: int) -> None:
    """Draw how many images fall in each bin, on a log axis."""
    for row in curve["bins"]:
        if row["count"]:
            ax.bar(
                row["lo"],
                row["count"],
                width=row["hi"] - row["lo"],
                align="edge",
                color=MUTED,
                edgecolor=PAPER,
                linewidth=0.6,
            )
    power = max(1, int(log10(largest)))
    ax.set_yscale("log")
    ax.set(xlim=(0, 1), ylim=(0.7, max(10**power, largest) * 1.5), xlabel="confidence")
    ax.set_ylabel("images")
    ax.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0], ["0", "0.2", "0.4", "0.6", "0.8", "1"])
    ax.set_yticks([1, 10**power])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))

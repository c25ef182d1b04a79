"""Energy histogram: your images against each set of unknown images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ebm_guard.report.figures.style import ID, INK, MUTED, PAPER, SERIES, shorten, styled

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

WIDTH, MARGIN, ROW, TITLE, BOTTOM = 4.6, 0.18, 0.82, 0.27, 0.47  # inches
ROLES = {"near_ood": "near OOD", "far_ood": "far OOD", "ood": "OOD"}


@styled
def energy_histogram(energy: Mapping[str, Any]) -> Figure:
    """Draw one row for each OOD set, each over the same ID histogram, with the threshold.

    One row for each set stays legible with ten sets, where outlines in one panel do not.
    """
    histogram = energy["histogram"]
    edges, counts = histogram["edges"], histogram["counts"]
    others = [name for name in counts if name != "evaluation"]
    rows: list[str | None] = [*others] or [None]
    threshold = energy.get("threshold")
    head = 0.3 + (0.24 if threshold is not None else 0.0)
    height = head + len(rows) * (ROW + TITLE) + BOTTOM
    figure = Figure(figsize=(WIDTH, height))
    own = density(counts["evaluation"], edges) if "evaluation" in counts else None
    for number, name in enumerate(rows):
        bottom = BOTTOM + (len(rows) - 1 - number) * (ROW + TITLE)
        ax = figure.add_axes(
            (MARGIN / WIDTH, bottom / height, 1 - 2 * MARGIN / WIDTH, ROW / height)
        )
        other = density(counts[name], edges) if name is not None else []
        _row(ax, edges, own, max([*(own or []), *other], default=0.0))
        if name is not None:
            colour = SERIES[number % len(SERIES)]
            _outline(ax, other, edges, colour)
            _label(ax, name, energy["sets"].get(name, {}), colour)
        if threshold is not None:
            # Room for 'accept' and 'refuse' beside a threshold at the end of the axis.
            room = 0.14 * (edges[-1] - edges[0])
            ax.set_xlim(min(edges[0], threshold - room), max(edges[-1], threshold + room))
            ax.axvline(threshold, color=INK, linewidth=1.1, zorder=5)
        last = number == len(rows) - 1
        ax.tick_params(labelbottom=last)
        if last:
            ax.set_xlabel("energy  (lower: more like the training data)")
        if number == 0:
            _head(ax, energy, height=ROW, title=TITLE if name is not None else 0.08)
    return figure


def density(counts: Sequence[int], edges: Sequence[float]) -> list[float]:
    """Turn counts into densities, so that sets of different sizes can be compared.

    Example:
        >>> density([1, 3], [0.0, 1.0, 2.0])
        [0.25, 0.75]
    """
    total = sum(counts)
    if not total:
        return [0.0] * len(counts)
    return [
        count / total / (high - low) if high > low else 0.0
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
    ]


def _row(ax: Axes, edges: Sequence[float], own: Sequence[float] | None, tallest: float) -> None:
    """Prepare the axes of one row and draw the ID histogram."""
    ax.set(xlim=(edges[0], edges[-1]), ylim=(0, (tallest or 1.0) * 1.06), yticks=[])
    ax.spines["left"].set_visible(False)
    if own is not None:
        ax.stairs(own, edges, fill=True, color=ID, alpha=0.26, linewidth=0, zorder=2)
        ax.stairs(own, edges, color=ID, linewidth=0.9, zorder=3)


def _outline(ax: Axes, values: Sequence[float], edges: Sequence[float], colour: str) -> None:
    ax.stairs(values, edges, fill=True, color=colour, alpha=0.13, linewidth=0, zorder=3)
    ax.stairs(values, edges, color=colour, linewidth=1.6, zorder=4)


def _label(ax: Axes, name: str, entry: Mapping[str, Any], colour: str) -> None:
    """Write the name of the set over its row, in its colour."""
    card = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.0}  # the threshold passes behind
    text = ax.annotate(
        shorten(name),
        (0, 1),
        (0, 4),
        xycoords="axes fraction",
        textcoords="offset points",
        color=colour,
        fontweight="bold",
        fontsize=9.0,
        bbox=card,
        zorder=8,
    )
    if entry:
        ax.annotate(
            f"{ROLES.get(entry['role'], entry['role'])},  n = {entry['n']:,}",
            (1, 0),
            (8, 2.0),
            xycoords=text,
            textcoords="offset points",
            color=MUTED,
            fontsize=8.0,
            bbox=card,
            zorder=8,
        )


def _head(ax: Axes, energy: Mapping[str, Any], *, height: float, title: float) -> None:
    """Write the legend of the ID set and the two sides of the threshold."""
    top = 1 + title / height
    if energy.get("threshold") is not None:
        threshold = energy["threshold"]
        ax.plot(
            [threshold] * 2,
            [1, top + 0.2 / height],
            color=INK,
            lw=1.1,
            clip_on=False,
            transform=ax.get_xaxis_transform(),
        )
        y = top + 0.04 / height
        for word, side, shift in (("◂ accept", "right", -4), ("refuse ▸", "left", 4)):
            ax.annotate(
                word,
                (threshold, y),
                (shift, 0),
                xycoords=ax.get_xaxis_transform(),
                textcoords="offset points",
                ha=side,
                annotation_clip=False,
            )
        top += 0.24 / height
    entry = energy["sets"].get("evaluation")
    if entry is None:
        return
    points, width = ax.transAxes, WIDTH - 2 * MARGIN
    corner, edge = (0.0, top + 0.06 / height), 0.11
    square = Rectangle(
        corner,
        edge / width,
        edge / height,
        transform=points,
        clip_on=False,
        facecolor=ID,
        alpha=0.7,
    )
    ax.add_patch(square)
    ax.text(
        0.17 / width,
        top + 0.115 / height,
        f"your images (in-distribution),  n = {entry['n']:,}",
        transform=points,
        va="center",
        fontsize=8.5,
    )

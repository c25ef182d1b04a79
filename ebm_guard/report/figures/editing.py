"""Edits: sheets of strips, errors image by image, and the way of a morph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from ebm_guard.report.figures.style import ACCENT, ID, INK, LINE, MUTED, OVER, shorten, styled

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

WIDTH, HEIGHT = 4.0, 2.8  # inches of a panel
_TILE, _LABEL, _HEAD = 0.62, 1.25, 0.24
# Of a section: the axis, and the two ends of the diagonal's words.
_ERRORS = {
    "rmse": ("RMSE of the smooth fill", "RMSE of the chains", "below: chains are nearer"),
    "psnr": ("PSNR of the filter, dB", "PSNR of the chains, dB", "above: chains are nearer"),
}


@styled
def edit_sheet(sheet: NDArray[np.uint8], heads: Sequence[str], names: Sequence[str]) -> Figure:
    """Draw strips of images, one row each.

    Args:
        sheet: (N, K, H, W, 3).
        heads: (K,) words above the columns.
        names: (N,) words before the rows.
    """
    rows, columns = sheet.shape[:2]
    wide = _TILE * sheet.shape[3] / sheet.shape[2]
    if columns < 6:
        # Room for the words above.
        wide = max(wide, 0.95)
    width, height = _LABEL + columns * wide + 0.06, rows * _TILE + _HEAD
    figure = Figure(figsize=(width, height))
    for column, head in enumerate(heads):
        place = (_LABEL + (column + 0.47) * wide) / width
        figure.text(
            place, 1 - 0.07 / height, head, ha="center", va="top", color=MUTED, fontsize=7.2
        )
    for row, name in enumerate(names):
        middle = height - _HEAD - (row + 0.5) * _TILE
        figure.text(
            (_LABEL - 0.1) / width, middle / height, shorten(name, 16), ha="right", va="center"
        )
    # One picture and not one for each tile: those are slow to draw.
    box = (_LABEL / width, 0.0, columns * wide / width, rows * _TILE / height)
    ax = figure.add_axes(box)
    ax.imshow(grid(sheet, wide / _TILE), interpolation="none", aspect="auto")
    ax.axis("off")
    return figure


def grid(sheet: NDArray[np.uint8], ratio: float = 1.0) -> NDArray[np.uint8]:
    """Put images (N, K, H, W, 3) into one, white between them.

    Args:
        sheet: the images.
        ratio: width of a cell over its height; what an image leaves of it is white.

    Example:
        >>> grid(np.zeros((2, 3, 8, 8, 3), np.uint8), ratio=1.5).shape
        (136, 306, 3)
    """
    rows, columns, height, width = sheet.shape[:4]
    scale = max(1, -(-64 // max(height, width)))
    gap = max(1, max(height, width) * scale // 16)
    large = sheet.repeat(scale, axis=2).repeat(scale, axis=3)
    tall = large.shape[2] + gap
    wide = max(round(tall * ratio), large.shape[3] + gap)
    left = (wide - gap - large.shape[3]) // 2
    right = wide - large.shape[3] - left
    sides = ((0, 0), (0, 0), (0, gap), (left, right), (0, 0))
    edged = np.pad(large, sides, constant_values=255)
    return edged.swapaxes(1, 2).reshape(rows * tall, columns * wide, 3)


@styled
def edit_errors(section: Mapping[str, Any]) -> Figure:
    """Draw a dot for each image: its error by the trivial method and by the chains."""
    rows = section["rows"]
    trivial = np.array([row["errors"]["trivial"] for row in rows])
    chains = np.array([row["errors"]["chains"] for row in rows])
    figure = Figure(figsize=(WIDTH, 3.6))
    ax = figure.add_axes((0.17, 0.13, 0.79, 0.83))
    low, high = float(min(trivial.min(), chains.min())), float(max(trivial.max(), chains.max()))
    room = max(0.06 * (high - low), 1e-3)
    ends = (low - room, high + room)
    ax.plot(ends, ends, color=ID, linewidth=1.0, zorder=2)
    nearer = chains < trivial if section["measure"] == "rmse" else chains > trivial
    for keep, colour, marker in ((nearer, ACCENT, "o"), (~nearer, OVER, "X")):
        ax.plot(
            trivial[keep], chains[keep], marker, color=colour, markersize=5, alpha=0.75,
            markeredgewidth=0, linestyle="none", zorder=3,
        )  # fmt: skip
    ax.set_xlim(*ends)
    ax.set_ylim(*ends)
    across, up, words = _ERRORS[section["measure"]]
    ax.set_xlabel(across)
    ax.set_ylabel(up)
    corner = (1, 0.02) if section["measure"] == "rmse" else (0.02, 1)
    ax.annotate(
        words, corner, (-2 if corner[0] else 2, 2 if corner[0] else -4), xycoords="axes fraction",
        textcoords="offset points", ha="right" if corner[0] == 1 else "left",
        va="bottom" if corner[0] == 1 else "top", color=MUTED, fontsize=7.6,
    )  # fmt: skip
    ax.grid(color=LINE, linewidth=0.5, zorder=0)
    ax.set_axisbelow(True)
    return figure


@styled
def morph_path(section: Mapping[str, Any]) -> Figure:
    """Draw the probabilities of both classes, and how far the pixels are, from t = 0 to 1."""
    figure = Figure(figsize=(WIDTH, 1.9 * HEIGHT))
    upper = figure.add_axes((0.18, 0.56, 0.78, 0.4))
    lower = figure.add_axes((0.18, 0.09, 0.78, 0.36))
    t = section["t"]
    for number, (key, colour) in enumerate((("probability_a", OVER), ("probability_b", ACCENT))):
        _band(upper, t, section[key], colour)
        median = section[key]["median"]
        at = 0 if number == 0 else -1
        upper.annotate(
            f"p({shorten(section['names'][number], 14)})", (t[at], median[at]),
            (6 if number == 0 else -6, 6 if median[at] < 0.5 else -6), textcoords="offset points",
            ha="left" if number == 0 else "right", va="bottom" if median[at] < 0.5 else "top",
            color=colour,
        )  # fmt: skip
    upper.set_ylim(-0.03, 1.03)
    upper.set_ylabel("probability by the net")
    _band(lower, t, section["moved"], INK)
    if section["nearest"] is not None:
        near = section["nearest"]["value"]
        lower.axhline(near, color=ID, linewidth=1.2, zorder=2)
        lower.annotate(
            f"nearest real {shorten(section['names'][1], 14)}", (1, near), (-2, 3),
            xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
            color=ID, fontsize=7.8,
        )  # fmt: skip
    lower.set_ylim(0, None)
    lower.set_ylabel("RMSE from the start")
    lower.set_xlabel("t")
    for ax in (upper, lower):
        ax.grid(axis="y", color=LINE, linewidth=0.5, zorder=0)
        ax.set_axisbelow(True)
        ax.margins(x=0.02)
    return figure


def _band(ax: Axes, t: Sequence[float], found: Mapping[str, Any], colour: str) -> None:
    ax.fill_between(t, found["low"], found["high"], color=colour, alpha=0.16, linewidth=0, zorder=2)
    ax.plot(t, found["median"], color=colour, linewidth=1.8, zorder=3)

"""Samples: the sheet by class, the traces of the chains, and the energies they ended at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ebm_guard.report.figures.style import ACCENT, ID, INK, LINE, MUTED, OVER, shorten, styled

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

WIDTH, HEIGHT = 4.0, 2.8  # inches of a panel
LEFT, RIGHT, TOP, BOTTOM = 0.72, 0.16, 0.16, 0.5
PANELS = {
    "energy": "energy of the chains",
    "gradient_norm": "length of the gradient",
    "saturation": "values at the edge of [0, 1]",
    "acceptance": "proposals accepted",
}
_TILE, _LABEL, _ROW = 0.62, 1.25, 0.26


@styled
def sample_sheet(
    images: NDArray[np.uint8], labels: Sequence[int], names: Mapping[int, str]
) -> Figure:
    """Draw samples in a row for each class.

    Args:
        images: (N, H, W, C), C = 1 or 3.
        labels: (N,) the class that each was asked for.
        names: of the classes.
    """
    classes = list(dict.fromkeys(int(label) for label in labels))
    rows = {label: np.flatnonzero(np.asarray(labels) == label) for label in classes}
    columns = max(len(row) for row in rows.values())
    wide = images.shape[2] / images.shape[1]
    width, height = _LABEL + columns * _TILE * wide + 0.06, len(classes) * _TILE + 0.06
    figure = Figure(figsize=(width, height))
    for place, (label, found) in enumerate(rows.items()):
        bottom = (height - 0.03 - (place + 1) * _TILE) / height
        figure.text(
            (_LABEL - 0.1) / width, bottom + _TILE / height / 2, shorten(names[label], 16),
            ha="right", va="center",
        )  # fmt: skip
        for column, number in enumerate(found):
            left = (_LABEL + column * _TILE * wide) / width
            size = 0.94 * _TILE * wide / width, 0.94 * _TILE / height
            ax = figure.add_axes((left, bottom + 0.03 * _TILE / height, *size))
            image = images[number]
            grey = image.shape[2] == 1
            ax.imshow(
                image[..., 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=255,
                interpolation="none", aspect="auto",
            )  # fmt: skip
            ax.axis("off")
    return figure


def trace_panels(trace: Mapping[str, Any]) -> list[str]:
    """List the panels that a trace has numbers for."""
    return [
        name
        for name in PANELS
        if trace[name] is not None and len(trace[name]["median" if _spread(name) else "mean"]) > 1
    ]


@styled
def sample_traces(trace: Mapping[str, Any], panel: str | None = None) -> Figure:
    """Draw what the chains did step by step, one panel in a row after another.

    ``trace`` is that of a report; ``panel`` chooses one.
    """
    names = [name for name in trace_panels(trace) if panel in (None, name)]
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(columns * WIDTH, lines * HEIGHT))
    for number, name in enumerate(names):
        row, column = divmod(number, columns)
        ax = figure.add_axes(
            (
                (column + LEFT / WIDTH) / columns,
                (lines - 1 - row + BOTTOM / HEIGHT) / lines,
                (WIDTH - LEFT - RIGHT) / WIDTH / columns,
                (HEIGHT - TOP - BOTTOM) / HEIGHT / lines,
            )
        )
        if _spread(name):
            _band(ax, trace[name])
        else:
            values = trace[name]["mean"]
            ax.plot(range(len(values)), values, color=ACCENT, linewidth=1.8, zorder=3)
            ax.set_ylim(-0.02, 1.02)
            ax.yaxis.set_major_formatter(FuncFormatter(_percent))
        ax.set_ylabel(PANELS[name])
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.grid(axis="y", color=LINE, linewidth=0.5, zorder=0)
        ax.set_axisbelow(True)
        ax.margins(x=0.02)
    return figure


@styled
def sample_energies(report: Mapping[str, Any]) -> Figure:
    """Draw where the chains ended, class by class, beside the energies of real images."""
    rows, known = report["classes"], report["reference"]
    high = max(0.9, _ROW * len(rows))
    left = 0.3 + 0.075 * max(len(shorten(row["name"], 18)) for row in rows)
    width, height = left + 3.5 + 0.2, high + 0.8
    figure = Figure(figsize=(width, height))
    ax = figure.add_axes((left / width, 0.46 / height, 3.5 / width, high / height))
    if known is not None:
        low, _, middle, _, top = known["quantiles"]
        ax.axvspan(low, top, color=ID, alpha=0.14, linewidth=0, zorder=1)
        ax.axvline(middle, color=ID, linewidth=1.2, zorder=2)
        ax.annotate(
            "your images: 90 %", (middle, 1), (0, 4), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", color=ID, fontsize=7.8, annotation_clip=False,
        )  # fmt: skip
    for place, row in enumerate(rows):
        energies = np.asarray(row["energies"])
        right = np.asarray(row["agrees"], dtype=bool)
        for keep, colour, marker in ((right, ACCENT, "o"), (~right, OVER, "X")):
            ax.plot(
                energies[keep], np.full(keep.sum(), place), marker, color=colour, markersize=5,
                alpha=0.75, markeredgewidth=0, zorder=3,
            )  # fmt: skip
    ax.set_yticks(range(len(rows)), [shorten(row["name"], 18) for row in rows])
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel("energy (lower = more familiar to the net)")
    ax.grid(axis="x", color=LINE, linewidth=0.5, zorder=0)
    ax.set_axisbelow(True)
    return figure


def _spread(name: str) -> bool:
    """Tell whether a panel has a value for each chain, and so a band."""
    return name in ("energy", "gradient_norm")


def _band(ax: Axes, found: Mapping[str, Any]) -> None:
    steps = range(len(found["median"]))
    ax.fill_between(
        steps, found["low"], found["high"], color=ACCENT, alpha=0.16, linewidth=0, zorder=2
    )
    ax.plot(steps, found["median"], color=ACCENT, linewidth=1.8, zorder=3)
    ax.annotate(
        "median and 90 % of the chains", (1, 1), (-2, -4), xycoords="axes fraction",
        textcoords="offset points", ha="right", va="top", color=MUTED, fontsize=7.6,
    )  # fmt: skip


def _percent(value: float, _: int | None = None) -> str:
    return f"{100 * value:.4g} %"

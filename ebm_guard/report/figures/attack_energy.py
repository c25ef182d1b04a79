"""The energy along an attack: step by step, and at its three moments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ebm_guard.report.figures.style import (
    ACCENT,
    ID,
    INK,
    LINE,
    OVER,
    PAPER,
    UNDER,
    styled,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

PANEL, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 3.1, 3.0, 0.62, 0.24, 0.16, 0.5  # inches
PARTS = ("steps", "moments")
MOMENTS = (
    ("clean", "as it is", ID),
    ("first_flip", "at the first\nwrong label", OVER),
    ("end", "at the end of\nthe attack", UNDER),
)
LABEL = "energy  (lower: looks more familiar)"
_GOLDEN = 0.618034


@styled
def robustness_energy(path: Mapping[str, Any], part: str | None = None) -> Figure:
    """Draw quantiles of the energy at each step, and the energies of three moments.

    ``path`` is ``robustness.energy_path`` of a report; ``part`` chooses one panel, ``steps`` or
    ``moments``.
    """
    parts = [name for name in PARTS if part in (None, name)]
    step = LEFT + PANEL + RIGHT
    width = step * len(parts)
    figure = Figure(figsize=(width, HEIGHT))
    limits = _limits(path)
    for number, name in enumerate(parts):
        ax = figure.add_axes(
            (
                (number * step + LEFT) / width,
                BOTTOM / HEIGHT,
                PANEL / width,
                (HEIGHT - TOP - BOTTOM) / HEIGHT,
            )
        )
        (_fan if name == "steps" else _moments)(ax, path)
        ax.set(ylim=limits, ylabel=LABEL)
        ax.yaxis.set_major_locator(MaxNLocator(6))
        ax.grid(axis="y", color=LINE, linewidth=0.5)
        ax.set_axisbelow(True)
    return figure


def _limits(path: Mapping[str, Any]) -> tuple[float, float]:
    """Give both panels the same room."""
    values = [value for row in path["quantiles"] for value in row if value is not None]
    values += [value for key, *_ in MOMENTS for value in path["energy"][key] if value is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.06 * ((high - low) or 1.0)
    return low - room, high + room


def _fan(ax: Axes, path: Mapping[str, Any]) -> None:
    """Draw the median, the middle half and the middle 90 % of the energy at each step."""
    kept = [
        (step, row) for step, row in enumerate(path["quantiles"]) if all(v is not None for v in row)
    ]
    steps = [step for step, _ in kept]
    columns = [[row[place] for _, row in kept] for place in range(5)]
    for low, high, alpha in ((0, 4, 0.16), (1, 3, 0.26)):
        ax.fill_between(
            steps, columns[low], columns[high], color=ACCENT, alpha=alpha, linewidth=0, zorder=2
        )
    ax.plot(steps, columns[2], color=ACCENT, linewidth=2.0, label="median", zorder=4)
    if steps:
        _band_names(ax, steps, columns)
    ax.set(xlim=(0, path["num_steps"]), xlabel="step of the attack")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _band_names(ax: Axes, steps: Sequence[int], columns: Sequence[Sequence[float]]) -> None:
    """Name the bands inside them, where the last steps are wide enough."""
    at = steps[-1]
    names = (
        (columns[2][-1], "median", "bold"),
        (columns[3][-1], "half of the images", "normal"),
        (columns[4][-1], "90 % of the images", "normal"),
    )
    for value, name, weight in names:
        ax.annotate(
            name,
            (at, value),
            (-4, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=ACCENT if weight == "bold" else INK,
            fontsize=8.0,
            fontweight=weight,
            zorder=6,
        )


def _moments(ax: Axes, path: Mapping[str, Any]) -> None:
    """Draw one dot for each image at each moment, spread sideways, with the median as a bar."""
    for place, (key, _, colour) in enumerate(MOMENTS):
        values = [value for value in path["energy"][key] if value is not None]
        # A low-discrepancy sequence spreads the dots evenly, and equally in every run.
        across = [place + 0.56 * ((_GOLDEN * (rank + 1)) % 1 - 0.5) for rank in range(len(values))]
        ax.scatter(
            across, values, s=13, color=colour, alpha=0.55, linewidths=0, zorder=3, label=key
        )
        median = path["median"][key]
        if median is not None:
            ax.plot(
                [place - 0.36, place + 0.36],
                [median] * 2,
                color=PAPER,
                linewidth=4.4,
                zorder=4,
                solid_capstyle="butt",
            )
            ax.plot([place - 0.36, place + 0.36], [median] * 2, color=INK, linewidth=2.2, zorder=5)
    ax.set_xlim(-0.5, len(MOMENTS) - 0.5)
    ax.set_xticks(range(len(MOMENTS)), [name for _, name, _ in MOMENTS])
    ax.tick_params(axis="x", length=0, labelcolor=INK)

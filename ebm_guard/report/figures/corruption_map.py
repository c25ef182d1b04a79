"""Heat map of corruptions: type by severity, for accuracy, calibration and the gate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ebm_guard.report.figures.style import INK, LINE, MUTED, OVER, UNDER, shorten, styled

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

CELL_HEIGHT = 0.27  # inches
# Of a cell, by the number of severities beside each other.
CELL_WIDTHS = {1: 0.95, 2: 0.6, 3: 0.48, 4: 0.42, 5: 0.4}
LEFT, RIGHT, TOP, BOTTOM, TITLE = 0.28, 0.12, 0.34, 0.5, 0.3
# The strongest tint: text in INK keeps a contrast of 4.5 on it, on light and on dark paper.
STRONGEST = 0.42
# Key of the metric, heading, colour, and whether a high value is what the tint shows.
METRICS: dict[str, tuple[str, str, bool]] = {
    "accuracy": ("Accuracy", OVER, False),
    "ece": ("Calibration error (ECE)", OVER, True),
    "coverage": ("Accepted by the gate", UNDER, False),
}


def corruption_tables(section: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """List the tables of a robustness section: the built-in set, and published ones."""
    built_in = section["corruptions"]
    return [*([] if built_in is None else [built_in]), *section["published"]]


def shown_metrics(table: Mapping[str, Any]) -> list[str]:
    """List the panels that a table has numbers for."""
    rows = [table["clean"], *table["cells"]]
    return [name for name in METRICS if any(row[name] is not None for row in rows)]


@styled
def robustness_corruptions(
    tables: Sequence[Mapping[str, Any]], metric: str | None = None
) -> Figure:
    """Draw type by severity: tables under each other, one panel for each metric.

    ``tables`` are ``robustness.corruptions`` and ``robustness.published`` of a report; ``metric``
    chooses one panel.
    """
    sizes = [_size(table, metric, titled=len(tables) > 1) for table in tables]
    width, height = max(size[0] for size in sizes), sum(size[1] for size in sizes)
    figure = Figure(figsize=(width, height))
    top = height
    for table, size in zip(tables, sizes, strict=True):
        top -= size[1]
        _draw(figure, table, metric, top)
        if len(tables) > 1:
            figure.text(
                LEFT / width,
                (top + size[1] - 0.16) / height,
                shorten(table["source"], 60),
                color=INK,
                fontsize=9.5,
                fontweight="bold",
                va="top",
            )
    return figure


def _size(
    table: Mapping[str, Any], metric: str | None, *, titled: bool = False
) -> tuple[float, float]:
    """Return width and height of a table's panels in inches."""
    metrics = [name for name in shown_metrics(table) if metric in (None, name)]
    rows = CELL_HEIGHT * (len(table["names"]) + 1.2)
    height = TOP + rows + BOTTOM + (TITLE if titled else 0.0)
    return _label(table) + (_inner(table) + RIGHT) * len(metrics), height


def _label(table: Mapping[str, Any]) -> float:
    """Return the inches that the longest name needs."""
    return LEFT + 0.068 * max(len(shorten(words(name), 22)) for name in (*table["names"], "clean"))


def _inner(table: Mapping[str, Any]) -> float:
    """Return the inches of one panel's cells."""
    columns = len(table["severities"])
    return max(CELL_WIDTHS[columns] * columns, 1.7)


def _draw(figure: Figure, table: Mapping[str, Any], metric: str | None, bottom: float) -> None:
    """Draw the panels of one table, its lower edge at ``bottom`` inches."""
    width, height = figure.get_size_inches()
    rows, inner = CELL_HEIGHT * (len(table["names"]) + 1.2), _inner(table)
    metrics = [name for name in shown_metrics(table) if metric in (None, name)]
    for number, name in enumerate(metrics):
        left = _label(table) + number * (inner + RIGHT)
        ax = figure.add_axes(
            (left / width, (bottom + BOTTOM) / height, inner / width, rows / height)
        )
        _panel(ax, table, name)
        if number == 0:
            _row_names(ax, table["names"])


def words(name: str) -> str:
    """Write the name of a corruption as words.

    Example:
        >>> words("gaussian_noise")
        'gaussian noise'
    """
    return name.replace("_", " ")


def tint(value: float, clean: float | None, *, high: bool) -> float:
    """Return the strength of a cell's colour: 0 as good as clean, ``STRONGEST`` all lost.

    Args:
        value: of the cell, a share.
        clean: the same of the clean images.
        high: whether high values are tinted, else low ones relative to clean.

    Example:
        >>> tint(0.9, 0.9, high=False), tint(0.0, 0.9, high=False), tint(0.6, 0.0, high=True)
        (0.0, 0.42, 0.42)
    """
    lost = value / 0.5 if high else 1 - value / clean if clean else 1 - value
    return STRONGEST * min(1.0, max(0.0, lost))


def _panel(ax: Axes, table: Mapping[str, Any], metric: str) -> None:
    """Draw one metric: a row for the clean images, a row for each corruption."""
    heading, colour, high = METRICS[metric]
    names, severities = table["names"], table["severities"]
    columns = len(severities)
    clean = table["clean"][metric]
    base = None if clean is None else clean["value"]
    ax.set(xlim=(0, columns), ylim=(len(names) + 1.2, 0))
    _cell(ax, (0, 0, columns), base, 0.0, colour)
    found = {(cell["name"], cell["severity"]): cell[metric] for cell in table["cells"]}
    for row, name in enumerate(names):
        for column, severity in enumerate(severities):
            entry = found.get((name, severity))
            value = None if entry is None else entry["value"]
            strength = 0.0 if value is None else tint(value, base, high=high)
            _cell(ax, (column, row + 1.2, 1), value, strength, colour)
    ax.set_title(heading, loc="left", fontsize=9.0, fontweight="bold", pad=6)
    ax.set_xticks([column + 0.5 for column in range(columns)], [str(item) for item in severities])
    ax.set_yticks([])
    ax.set_xlabel("severity")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _cell(
    ax: Axes,
    place: tuple[float, float, float],
    value: float | None,
    strength: float,
    colour: str,
) -> None:
    """Draw one cell with its number in percent."""
    x, y, width = place
    ax.add_artist(
        Rectangle(
            (x + 0.02, y + 0.04), width - 0.04, 0.92, fill=False, edgecolor=LINE, linewidth=0.6
        )
    )
    if strength:
        ax.add_artist(
            Rectangle(
                (x + 0.02, y + 0.04), width - 0.04, 0.92, color=colour, alpha=strength, linewidth=0
            )
        )
    ax.text(
        x + width / 2,
        y + 0.5,
        "–" if value is None else f"{100 * value:.0f} %",
        ha="center",
        va="center_baseline",
        fontsize=8.0,
        color=MUTED if value is None else INK,
    )


def _row_names(ax: Axes, names: Sequence[str]) -> None:
    """Write what each row is, at the left."""
    for place, name in [
        (0.5, "clean"),
        *((row + 1.7, words(name)) for row, name in enumerate(names)),
    ]:
        ax.annotate(
            shorten(name, 22),
            (0, place),
            (-5, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="center",
            color=INK,
            fontsize=8.5,
            fontweight="bold" if place == 0.5 else "normal",
            annotation_clip=False,
        )

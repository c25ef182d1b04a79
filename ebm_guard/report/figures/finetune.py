"""Fine-tuning: the course of a run, and both nets on the same rows."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ebm_guard.report.figures.style import (
    ACCENT,
    DASHES,
    ID,
    INK,
    LINE,
    MARKERS,
    MUTED,
    OVER,
    PAPER,
    SERIES,
    UNDER,
    add_legend,
    shorten,
    styled,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

WIDTH, HEIGHT = 4.4, 3.0  # inches of a panel
LEFT, RIGHT, TOP, BOTTOM = 0.66, 0.14, 0.46, 0.5
PANELS = ("energy", "auroc", "accuracy", "loss")
TITLES = {
    "energy": "mean energy of a batch",
    "auroc": "energy AUROC on the selection rows",
    "accuracy": "accuracy on the selection rows",
    "loss": "parts of the loss",
}
# Rows of the dumbbell figure, in inches.
_ROW, _SPAN, _NUMBERS = 0.3, 1.7, 1.56
_LETTER, _LONGEST = 0.074, 24


def training_panels(section: Mapping[str, Any]) -> list[str]:
    """List the panels that a training section has numbers for."""
    updates, evaluations = section["updates"], section["evaluations"]
    there = {
        "energy": _known(updates["energy_data"]) > 1,
        "auroc": sum(row["mean_auroc"] is not None for row in evaluations) > 1,
        "accuracy": sum(row["accuracy"] is not None for row in evaluations) > 1,
        "loss": _known(updates["loss"]) > 1,
    }
    return [name for name in PANELS if there[name]]


@styled
def finetune_training(section: Mapping[str, Any], panel: str | None = None) -> Figure:
    """Draw the course of a run, two panels in a row.

    ``section`` is ``training`` of a report; ``panel`` chooses one. What a rollback undid is drawn
    thin.
    """
    names = [name for name in training_panels(section) if panel in (None, name)]
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(columns * WIDTH, lines * HEIGHT))
    draw = {
        "energy": _energy_panel,
        "auroc": _auroc_panel,
        "accuracy": _accuracy_panel,
        "loss": _loss_panel,
    }
    for number, name in enumerate(names):
        row, column = divmod(number, columns)
        left = (column + LEFT / WIDTH) / columns
        bottom = (lines - 1 - row + BOTTOM / HEIGHT) / lines
        wide = (WIDTH - LEFT - RIGHT) / WIDTH / columns
        high = (HEIGHT - TOP - BOTTOM) / HEIGHT / lines
        ax = figure.add_axes((left, bottom, wide, high))
        draw[name](ax, section)
        ax.set_ylabel(TITLES[name])
        ax.set_xlabel("update")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.grid(axis="y", color=LINE, linewidth=0.5, zorder=0)
        ax.set_axisbelow(True)
        ax.margins(x=0.02)
        _rollbacks(ax, section)
    return figure


@styled
def finetune_ood(report: Mapping[str, Any]) -> Figure:
    """Draw the AUROC of both nets on each OOD set, and the difference with its interval."""
    rows = ood_order(report["ood"])
    high = _ROW * len(rows)
    longest = max(len(shorten(name, _LONGEST)) for name, _ in rows)
    # The legend above begins over the names and needs some room of its own.
    left = max(1.1, 0.2 + _LETTER * longest)
    width, height = left + _SPAN + _NUMBERS, high + 0.92
    figure = Figure(figsize=(width, height))
    ax = figure.add_axes((left / width, 0.46 / height, _SPAN / width, high / height))
    for place, (name, found) in enumerate(rows):
        _dumbbell(ax, place, name, found["auroc"])
    ax.set(ylim=(len(rows) - 0.5, -0.5), yticks=[])
    ax.spines["left"].set_visible(False)
    values = [found["auroc"][side]["value"] for _, found in rows for side in ("start", "candidate")]
    low, high_value = min(values), max(1.0, *values)
    room = 0.06 * max(high_value - low, 0.02)
    ax.set_xlim(low - room, high_value + room)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.grid(axis="x", color=LINE, linewidth=0.5, zorder=0)
    ax.set_axisbelow(True)
    ax.set_xlabel("AUROC of the energy")
    handles = [
        ax.plot([], [], "o", color=PAPER, markeredgecolor=ID, markeredgewidth=1.4, markersize=6)[0],
        *(ax.plot([], [], "o", color=colour, markersize=6.4)[0] for colour in (UNDER, OVER, MUTED)),
    ]
    names = ("start", "candidate: better", "worse", "no clear change")
    add_legend(ax, handles, names, loc="lower left", anchor=(0.05 - left / _SPAN, 1.0), columns=4)
    return figure


@styled
def finetune_robustness(section: Mapping[str, Any], norm: str | None = None) -> Figure:
    """Draw the accuracy that all attacks left of both nets, one panel for each norm."""
    norms = [item for item in robust_norms(section) if norm in (None, item["norm"])]
    figure = Figure(figsize=(WIDTH * len(norms), HEIGHT))
    for number, item in enumerate(norms):
        ax = figure.add_axes(
            (
                (number + LEFT / WIDTH) / len(norms),
                BOTTOM / HEIGHT,
                (WIDTH - LEFT - RIGHT) / WIDTH / len(norms),
                (HEIGHT - TOP - BOTTOM) / HEIGHT,
            )
        )
        rows = [row for row in item["rows"] if row["worst_case"] is not None]
        texts = ["0", *(row["text"] for row in rows)]
        lines = []
        sides = (("start", ID, DASHES[1], "s"), ("candidate", ACCENT, "-", "o"))
        for side, colour, dash, marker in sides:
            metrics = [section["clean"][side], *(row["worst_case"][side] for row in rows)]
            lines.append(_curve(ax, metrics, colour, dash, marker))
        ax.set_xticks(range(len(texts)), texts)
        ax.set(ylim=(-0.02, 1.02))
        ax.yaxis.set_major_formatter(FuncFormatter(_percent))
        ax.set_ylabel("right after all attacks")
        ax.set_xlabel(f"epsilon, {item['norm']}")
        ax.grid(axis="y", color=LINE, linewidth=0.5, zorder=0)
        ax.set_axisbelow(True)
        add_legend(ax, lines, ["start", "candidate"], loc="lower left", anchor=(0, 1.0), columns=2)
    return figure


def robust_norms(section: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """List the norms of which at least one budget was compared."""
    return [
        item
        for item in section.get("norms", ())
        if any(row["worst_case"] is not None for row in item["rows"])
    ]


def ood_order(ood: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """List the OOD sets: those never seen first, those trained on last."""
    order = ("unseen", "validation", "guard_kind", "trained_on")
    return sorted(ood.items(), key=lambda item: order.index(item[1]["role"]))


def _curve(
    ax: Axes, metrics: Sequence[Mapping[str, Any]], colour: str, dash: Any, marker: str
) -> Any:
    places = np.arange(len(metrics))
    if all(item["low"] is not None for item in metrics):
        low, high = ([item[end] for item in metrics] for end in ("low", "high"))
        ax.fill_between(places, low, high, color=colour, alpha=0.13, linewidth=0, zorder=2)
    values = [item["value"] for item in metrics]
    (line,) = ax.plot(
        places, values, color=colour, linestyle=dash, linewidth=1.8, marker=marker, markersize=5,
        markeredgecolor=PAPER, markeredgewidth=0.6, zorder=4, clip_on=False,
    )  # fmt: skip
    return line


def _dumbbell(ax: Axes, place: int, name: str, found: Mapping[str, Any]) -> None:
    start, candidate = found["start"]["value"], found["candidate"]["value"]
    colour = {True: UNDER, False: OVER, None: MUTED}[found["better"]]
    ax.plot([start, candidate], [place, place], color=colour, linewidth=2.0, zorder=3)
    ax.plot(
        start, place, "o", color=PAPER, markeredgecolor=ID, markeredgewidth=1.4, markersize=6,
        zorder=4, clip_on=False,
    )  # fmt: skip
    ax.plot(candidate, place, "o", color=colour, markersize=6.4, zorder=5, clip_on=False)
    outside: dict[str, Any] = {
        "xycoords": ("axes fraction", "data"),
        "annotation_clip": False,
        "va": "center",
    }
    ax.annotate(
        shorten(name, _LONGEST),
        (0, place),
        (-8, 0),
        textcoords="offset points",
        ha="right",
        **outside,
    )
    difference = found["difference"]
    text = _signed(difference["value"])
    if difference["low"] is not None:
        text += f"  [{_signed(difference['low'])}, {_signed(difference['high'])}]"
    ax.annotate(
        text, (1, place), (8, 0), textcoords="offset points", ha="left", color=colour,
        fontsize=7.6, **outside,
    )  # fmt: skip


def _energy_panel(ax: Axes, section: Mapping[str, Any]) -> None:
    lines, names = [], []
    series = (("energy_negatives", "negatives", OVER, DASHES[1]), ("energy_data", "data", ID, "-"))
    for key, name, colour, dash in series:
        if _known(section["updates"][key]):
            lines.append(_strokes(ax, section["updates"], key, colour, dash))
            names.append(name)
    add_legend(ax, lines, names, loc="lower left", anchor=(0, 1.0), columns=2)


def _loss_panel(ax: Axes, section: Mapping[str, Any]) -> None:
    updates = section["updates"]
    lines = [_strokes(ax, updates, "loss", INK, "-", width=1.6)]
    names = ["total"]
    parts = updates["parts"]
    for place, name in enumerate(parts if len(parts) > 1 else ()):
        colour, dash = SERIES[place % len(SERIES)], DASHES[(place + 1) % len(DASHES)]
        lines.append(_strokes(ax, {**updates, name: parts[name]}, name, colour, dash))
        names.append(shorten(name.replace("_", " "), 16))
    columns = 3 if len(names) < 7 else 4
    add_legend(ax, lines, names, loc="lower left", anchor=(0, 1.0), columns=columns)


def _auroc_panel(ax: Axes, section: Mapping[str, Any]) -> None:
    rows = section["evaluations"]
    kinds = list(dict.fromkeys(name for row in rows for name in row["auroc"]))
    mean = _evaluated(ax, rows, [row["mean_auroc"] for row in rows], INK, "-", 2.0)
    lines, names = [mean], ["mean"]
    for place, kind in enumerate(kinds if len(kinds) > 1 else ()):
        values = [row["auroc"].get(kind) for row in rows]
        colour, dash = SERIES[place % len(SERIES)], DASHES[(place + 1) % len(DASHES)]
        lines.append(_evaluated(ax, rows, values, colour, dash, 1.1))
        names.append(shorten(kind.replace("_", " "), 15))
    _best(ax, rows, "mean_auroc")
    add_legend(ax, lines, names, loc="lower left", anchor=(0, 1.0), columns=3)


def _accuracy_panel(ax: Axes, section: Mapping[str, Any]) -> None:
    rows = section["evaluations"]
    _evaluated(ax, rows, [row["accuracy"] for row in rows], ACCENT, "-", 2.0)
    refused = [row for row in rows if not row["eligible"] and row["accuracy"] is not None]
    handles, names = [], []
    if refused:
        handles += ax.plot(
            [row["update"] for row in refused],
            [row["accuracy"] for row in refused],
            "X", color=OVER, markersize=6.5, markeredgecolor=PAPER, markeredgewidth=0.6, zorder=6,
        )  # fmt: skip
        names.append("not eligible")
    best = _best(ax, rows, "accuracy")
    if best is not None:
        handles.insert(0, best)
        names.insert(0, "chosen state")
    if handles:
        add_legend(ax, handles, names, loc="lower left", anchor=(0, 1.0), columns=2)
    ax.yaxis.set_major_formatter(FuncFormatter(_percent))


def _best(ax: Axes, rows: Sequence[Mapping[str, Any]], key: str) -> Any:
    """Mark the state that was chosen: the last that was the best so far."""
    chosen = [row for row in rows if row["best"] and row[key] is not None]
    if not chosen:
        return None
    (mark,) = ax.plot(
        chosen[-1]["update"], chosen[-1][key], MARKERS[2], color=ACCENT, markersize=7.5,
        markeredgecolor=PAPER, markeredgewidth=0.8, linestyle="none", zorder=7, clip_on=False,
    )  # fmt: skip
    return mark


def _strokes(
    ax: Axes, columns: Mapping[str, Any], key: str, colour: str, dash: Any, width: float = 1.4
) -> Any:
    """Draw a column; what a rollback undid is thin. Return the last line."""
    line: Any = None
    attempts, updates = columns["attempt"], columns["update"]
    last = max(attempts, default=0)
    starts = [
        min(
            (update for update, of in zip(updates, attempts, strict=True) if of > attempt),
            default=None,
        )
        for attempt in range(last + 1)
    ]
    for attempt, undone in enumerate(starts):
        points = [
            (update, value)
            for update, value, of in zip(updates, columns[key], attempts, strict=True)
            if of == attempt and value is not None
        ]
        kept = [point for point in points if undone is None or point[0] < undone]
        lost = points[max(0, len(kept) - 1) :] if len(kept) < len(points) else []
        for stretch, thick in ((lost, False), (kept, True)):
            (line,) = ax.plot(
                [update for update, _ in stretch],
                [value for _, value in stretch],
                color=colour,
                linestyle=dash,
                linewidth=width if thick else 0.7,
                alpha=1.0 if thick else 0.5,
                zorder=4,
            )
    return line


def _evaluated(
    ax: Axes,
    rows: Sequence[Mapping[str, Any]],
    values: Sequence[float | None],
    colour: str,
    dash: Any,
    width: float,
) -> Any:
    columns = {
        "update": [row["update"] for row in rows],
        "attempt": [row["attempt"] for row in rows],
        "value": values,
    }
    line = _strokes(ax, columns, "value", colour, dash, width)
    if len(rows) <= 40:
        line.set(marker=".", markersize=5)
    return line


def _rollbacks(ax: Axes, section: Mapping[str, Any]) -> None:
    """Mark the updates after which a run was rolled back."""
    attempts, updates = section["updates"]["attempt"], section["updates"]["update"]
    for place, (one, two) in enumerate(pairwise(attempts)):
        if one != two:
            ax.axvline(updates[place], color=OVER, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)


def _known(values: Sequence[float | None]) -> int:
    return sum(value is not None for value in values)


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _percent(value: float, _: int | None = None) -> str:
    return f"{100 * value:.4g} %"

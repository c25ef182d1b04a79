"""Colours, sizes and the drawing context that all figures share."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import matplotlib as mpl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.legend import Legend

Params = ParamSpec("Params")
Result = TypeVar("Result")

INK, MUTED, LINE, PAPER = "#1f2933", "#5a6672", "#c9d0d8", "#ffffff"
ID, OVER, UNDER, ACCENT = "#4a5a6b", "#c4500c", "#0b6aa8", "#1d5fa6"
# Okabe-Ito hues, darkened until each has 4.5:1 contrast on white, as text needs.
SERIES = ("#bf5510", "#0a7f60", "#9b4f8c", "#8a6d0a", "#2377b0", "#a8323e")
MARKERS = ("o", "s", "D", "^", "v", "P")
DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = (
    "-",
    (0, (4.0, 1.4)),
    (0, (1.2, 1.2)),
    (0, (5.0, 1.4, 1.2, 1.4)),
    (0, (2.4, 1.0)),
    (0, (7.0, 2.0)),
)

# A page that inlines the SVG maps each colour to a CSS variable, so that dark mode can replace it.
THEME = {
    INK: "--fig-ink",
    MUTED: "--fig-muted",
    LINE: "--fig-line",
    PAPER: "--fig-paper",
    ID: "--fig-id",
    OVER: "--fig-over",
    UNDER: "--fig-under",
    ACCENT: "--fig-accent",
    **{colour: f"--fig-series-{number}" for number, colour in enumerate(SERIES, 1)},
}

STYLE = {
    "font.family": ["DejaVu Sans"],  # shipped with matplotlib: the same widths on every machine
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,  # a data set may be called "a$b$"
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "xtick.major.size": 3.0,
    "ytick.major.size": 3.0,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
    "path.simplify": True,
}


@contextmanager
def drawing(**settings: str) -> Iterator[None]:
    """Draw with our style alone, whatever the user's matplotlibrc says."""
    with mpl.rc_context(), warnings.catch_warnings():
        # A data set may have a name in any script; the browser has the glyphs that DejaVu lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        mpl.rcdefaults()
        chosen: Any = {**STYLE, **settings}  # newer matplotlib types the keys, older does not
        mpl.rcParams.update(chosen)
        yield


def styled(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Run a drawing function inside our style."""

    @wraps(function)
    def wrapper(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        with drawing():
            return function(*args, **kwargs)

    return wrapper


def add_legend(
    ax: Axes,
    handles: Sequence[Artist],
    names: Sequence[str],
    *,
    loc: Literal["lower left", "lower right"],
    anchor: tuple[float, float] | None = None,
    columns: int = 1,
) -> Legend:
    """Draw a frameless legend whose names may start with an underscore."""
    legend: Legend = ax.legend(
        handles,
        ["name"] * len(names),
        loc=loc,
        bbox_to_anchor=anchor,
        ncols=columns,
        fontsize=8.0,
        frameon=False,
        handlelength=1.9,
        handletextpad=0.6,
        columnspacing=1.4,
        labelspacing=0.35,
        borderaxespad=0.2,
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)
    return legend


def shorten(name: str, length: int = 28) -> str:
    """Cut a long name in the middle, where two similar names differ least.

    Example:
        >>> shorten("a_very_long_name_of_a_set", 11)
        'a_ver…a_set'
    """
    if len(name) <= length:
        return name
    half = (length - 1) // 2
    return f"{name[: length - 1 - half]}…{name[-half:]}"

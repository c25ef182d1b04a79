"""Checks of settings, for samplers and for the training that uses them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from ebm_guard.errors import InvalidInputError, suggest


def check_number(
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Return a setting as a float.

    Args:
        name: of the setting.
        value: anything; text, flags and None are no numbers.
        low: least value, or ``-math.inf``.
        high: largest value.
        open_low: refuse ``low`` itself.
        open_high: refuse ``high`` itself.

    Raises:
        InvalidInputError: not a finite number, or outside of the range.

    Example:
        >>> check_number("weight", 1)
        1.0
    """
    known = not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    outside = not known or not low <= value <= high
    if outside or (open_low and value == low) or (open_high and value == high):
        least = "" if low == -math.inf else f" {'>' if open_low else '>='} {low:g}"
        most = "" if high == math.inf else f" {'<' if open_high else '<='} {high:g}"
        both = f"{least} and{most}" if least and most else least or most
        raise InvalidInputError(f"got {name}={value!r}; needed a finite number{both}")
    return float(value)


def check_positive(name: str, value: Any) -> float:
    """Return a finite number above 0, or refuse it.

    Raises:
        InvalidInputError: not a finite number, or not above 0.

    Example:
        >>> check_positive("step_size", 0.25)
        0.25
    """
    return check_number(name, value, open_low=True)


def check_whole(name: str, value: Any, least: int = 0) -> int:
    """Return a setting as a whole number; 3.0 is one.

    Raises:
        InvalidInputError: not a whole number, or smaller than ``least``.

    Example:
        >>> check_whole("num_steps", 3)
        3
    """
    known = isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())
    if not known or isinstance(value, bool) or value < least:
        raise InvalidInputError(f"got {name}={value!r}; needed a whole number >= {least}")
    return int(value)


def check_choice(name: str, value: Any, known: Sequence[str]) -> str:
    """Return one of some words.

    Raises:
        InvalidInputError: none of them.

    Example:
        >>> check_choice("form", "raw", ("raw", "normalised"))
        'raw'
    """
    if not isinstance(value, str) or value not in known:
        raise InvalidInputError(
            f"got {name}={value!r}; known are {', '.join(known)}{suggest(str(value), known)}"
        )
    return value


def check_box(box: Any) -> tuple[float, float] | None:
    """Return (low, high) as floats, or refuse what is no box.

    Raises:
        InvalidInputError: not two finite numbers with low < high.

    Example:
        >>> check_box([0, 1])
        (0.0, 1.0)
    """
    if box is None:
        return None
    if not isinstance(box, Sequence) or isinstance(box, str) or len(box) != 2:
        raise InvalidInputError(f"got box={box!r}; needed (low, high) with low < high, or None")
    low, high = (check_number("box", side, low=-math.inf) for side in box)
    if not low < high:
        raise InvalidInputError(f"got box={box!r}; needed (low, high) with low < high, or None")
    return low, high

"""Numbers as people read them: sensible digits, intervals in brackets, never NaN."""

from __future__ import annotations

import re
from math import floor, log10
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from markupsafe import Markup

    Metric = Mapping[str, Any]

NOTHING = "n/a"


def percent(value: float | None, *, signed: bool = False, digits: int | None = None) -> str:
    """Write a share in percent: two decimals below 10 %, else one.

    Example:
        >>> percent(0.01052), percent(0.9134), percent(1.0)
        ('1.05 %', '91.3 %', '100 %')
    """
    if value is None:
        return NOTHING
    chosen = _digits(value) if digits is None else digits
    if digits is None and round(100 * value, chosen) >= 100 > 100 * value:
        return "> 99.99 %"  # never a certainty that was not measured
    return f"{_scaled(value, chosen, signed=signed)} %"


def points(value: float | None) -> str:
    """Write a signed difference of two shares in percentage points.

    Example:
        >>> points(-0.0213)
        '−2.13 points'
    """
    if value is None:
        return NOTHING
    return f"{_scaled(value, _digits(value), signed=True)} points"


def score(value: float | None) -> str:
    """Write an AUROC or AUPR with three decimals; never '1.000' for less than one.

    Example:
        >>> score(0.89912), score(0.99996), score(1.0)
        ('0.899', '0.99996', '1.000')
    """
    if value is None:
        return NOTHING
    digits = 3
    while round(value, digits) >= 1.0 > value and digits < 7:
        digits += 1
    return f"{value:.{digits}f}".replace("-", "−")


def number(value: float | None, *, significant: int = 4) -> str:
    """Write a plain number with few significant digits.

    Example:
        >>> number(0.123456), number(272474), number(-11.5)
        ('0.1235', '272,474', '−11.5')
    """
    if value is None:
        return NOTHING
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "−")
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        return f"{value:.{significant - 1}e}".replace("-", "−")
    digits = max(0, significant - 1 - floor(log10(abs(value))))
    text = f"{value:,.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", "−")


def fixed(value: float | None) -> str:
    """Write a loss, such as the NLL, with three decimals."""
    return NOTHING if value is None else f"{value:.3f}".replace("-", "−")


def small(value: float | None) -> str:
    """Write a small score, such as a part of the Brier score, with four decimals."""
    return NOTHING if value is None else f"{value:.4f}".replace("-", "−")


def interval(metric: Metric | None, kind: str = "percent") -> str:
    """Write the interval of a metric in brackets, with the digits of its value.

    Example:
        >>> interval({"value": 0.0105, "low": 0.009, "high": 0.0121})
        '[0.90, 1.21]'
    """
    if metric is None or metric["value"] is None or metric["low"] is None or metric["high"] is None:
        return ""
    ends = (metric["low"], metric["high"])
    if kind in ("percent", "points"):
        digits = _digits(metric["value"]) or 1
        low, high = (_scaled(end, digits, signed=kind == "points") for end in ends)
    else:
        low, high = (KINDS[kind](end) for end in ends)
    return f"[{low}, {high}]"


def value(metric: Metric | None, kind: str = "percent") -> str:
    """Write the value of a metric."""
    return NOTHING if metric is None else KINDS[kind](metric["value"])


def metric(entry: Metric | None, kind: str = "percent") -> str:
    """Write a metric with its interval.

    Example:
        >>> metric({"value": 0.899, "low": 0.893, "high": 0.905}, "score")
        '0.899 [0.893, 0.905]'
    """
    return f"{value(entry, kind)} {interval(entry, kind)}".rstrip()


def energy(value: float | None) -> str:
    """Write an energy with two decimals, so that a column of them lines up.

    Example:
        >>> energy(-5.0), energy(250000.0)
        ('−5.00', '250,000')
    """
    if value is None or not (value == 0 or 0.1 <= abs(value) < 1e5):
        return number(value)
    return f"{value:,.2f}".replace("-", "−")


def unbroken(text: str) -> str:
    r"""Keep a number and its unit on one line, always with a space between.

    Example:
        >>> unbroken("95 % of n = 10")
        '95\xa0% of n\xa0=\xa010'
    """
    return re.sub(r"\bn = (?=\d)", "n\u00a0=\u00a0", re.sub(r"(?<=\d) ?%", "\u00a0%", text))


def count(amount: float | None) -> str:
    """Write a count with thousands separators."""
    return NOTHING if amount is None else f"{amount:,.0f}"


def kind_of(path: str) -> str:
    """Guess from the path of a requirement how its value is written."""
    name = path.rsplit(".", 1)[-1]
    if name in ("auroc", "aupr_in", "aupr_out", "mean_auroc", "worst_auroc"):
        return "score"
    if name == "overconfidence":
        return "points"
    if name == "difference" and "." in path:
        of = path.split(".")[-2]
        return "points" if of in ("ece", "accuracy", "fpr95") else "score"
    shares = r"ece|accuracy|coverage|fpr95|accept|reject|risk"
    return "percent" if re.search(shares, path.rsplit("scores.", 1)[-1]) else "number"


def markdown(text: object) -> str:
    """Escape a text of the user for Markdown, tables included."""
    line = " ".join(str(text).split())
    line = re.sub(r"&(?=[#\w])", "&amp;", line)
    line = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", line)
    line = re.sub(r"([\\`*|~$])", r"\\\1", line)
    line = re.sub(r"\[(?![^\[\]A-Za-z]*\](?![(\[:]))", r"\[", line)  # an interval is no link
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\_", line)


def prose_markdown(text: str) -> str:
    r"""Escape a sentence for Markdown, but keep its `code` as code.

    Example:
        >>> prose_markdown("`a|b` is new")
        '`a\\|b` is new'
    """
    parts = re.split(r"`([^`]+)`", text)
    return "".join(
        code(part) if place % 2 else _keep_ends(part) for place, part in enumerate(parts)
    )


def _keep_ends(text: str) -> str:
    """Escape a part of a sentence without losing the spaces around it."""
    start, end = text[:1].isspace(), text[-1:].isspace()
    return f"{' ' if start else ''}{markdown(text)}{' ' if end and text.strip() else ''}"


def prose_html(text: str) -> Markup:
    """Escape a sentence for HTML, show its `code` as code, and keep numbers with their units."""
    from markupsafe import Markup, escape

    parts = re.split(r"`([^`]+)`", text)
    escaped = [escape(unbroken(part)) for part in parts]
    escaped[1::2] = [Markup("<code>{}</code>").format(part) for part in parts[1::2]]
    return Markup("").join(escaped)


def code(text: object) -> str:
    """Write a text of the user as inline code for Markdown, tables included."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def _digits(value: float) -> int:
    if abs(value) in (0.0, 1.0):
        return 0
    return 2 if abs(value) < 0.1 or abs(value) > 0.9995 else 1


def _scaled(value: float, digits: int, *, signed: bool = False) -> str:
    text = f"{100 * value:{'+' if signed else ''}.{digits}f}"
    if float(text) == 0 and not signed:
        text = text.lstrip("-")
    return text.replace("-", "−")


KINDS: dict[str, Callable[[float | None], str]] = {
    "percent": percent,
    "points": points,
    "score": score,
    "fixed": fixed,
    "small": small,
    "number": number,
}

"""What a model must hold, its verdict and the exit code: bounds, and limits on regressions."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.report.bounds import Bound, judge_bound, parse_bound
from ebm_guard.report.record import Requirement
from ebm_guard.report.regression import (
    PREFIX,
    MaxRegression,
    judge_regression,
    parse_regression,
)


class Outcome(NamedTuple):
    """The verdict over all requirements.

    Args:
        code: 0 when all hold, else 1: the exit code.
        line: the verdict in one line, which names what does not hold; '' without requirements.
    """

    code: int
    line: str


def parse_requirement(text: str) -> Bound | MaxRegression:
    """Parse a bound such as ``ece<=0.05@upper``, or ``max-regression ece=0.005``.

    Raises:
        InvalidInputError: neither; see :func:`parse_bound` and :func:`parse_regression`.

    Example:
        >>> parse_requirement("ece <= 0.05").bound
        0.05
        >>> parse_requirement("max-regression accuracy=0.01").amount
        0.01
    """
    first, _, rest = text.strip().partition(" ")
    return parse_regression(rest) if first == PREFIX else parse_bound(text)


def read_requirements(path: str | Path) -> list[str]:
    """Read the requirements of a TOML file.

    The table ``[requirements]`` maps metric paths to an operator and a number, or to a list of
    such; ``[max-regression]`` maps metrics to amounts::

        [requirements]
        ece = "<=0.05@upper"
        ood.far_photos.scores.energy.auroc = ">=0.9"
        coverage = [">=0.93", "<=0.98"]

        [max-regression]
        accuracy = 0.01

    Returns:
        The requirements as :func:`parse_requirement` takes them, in their order.

    Raises:
        DataError: the file is missing or is no TOML.
        InvalidInputError: it has other tables, or none of them, or values of another kind.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read the requirements in {path}: {error}") from None
    tables = ("requirements", PREFIX)
    other = [name for name in content if name not in tables]
    if other or not content or not all(isinstance(part, dict) for part in content.values()):
        raise InvalidInputError(
            f"{path} has {', '.join(map(repr, other)) or 'no table of requirements'}; needed the "
            f"tables [requirements] and [{PREFIX}], and no others"
        )
    return [
        *(f"{metric}{rule}" for metric, rule in _flat(path, content.get(tables[0], {}), str)),
        *(
            f"{PREFIX} {metric}={amount}"
            for metric, amount in _flat(path, content.get(PREFIX, {}), (int, float))
        ),
    ]


def judge(
    requirements: Sequence[Bound | MaxRegression], report: Mapping[str, Any]
) -> list[Requirement]:
    """Judge requirements on a report.

    Args:
        requirements: as :func:`parse_requirement` returns them.
        report: the report as JSON types.

    Returns:
        One record each; see :func:`judge_bound` and :func:`judge_regression`.

    Raises:
        InvalidInputError: a path that this report does not have, or an end that a metric lacks.
    """
    return [
        judge_regression(item, report)
        if isinstance(item, MaxRegression)
        else judge_bound(item, report)
        for item in requirements
    ]


def holds(status: str, *, allow_unclear: bool = False) -> bool:
    """Return whether a requirement of this status lets a run pass.

    Example:
        >>> holds("unclear"), holds("unclear", allow_unclear=True)
        (False, True)
    """
    return status == "met" or (allow_unclear and status == "unclear")


def outcome(requirements: Sequence[Requirement], *, allow_unclear: bool = False) -> Outcome:
    """Sum up judged requirements: the one place that gives verdict and exit code.

    Example:
        >>> outcome([])
        Outcome(code=0, line='')
    """
    if not requirements:
        return Outcome(0, "")
    missed = [item for item in requirements if not holds(item.status, allow_unclear=allow_unclear)]
    total = f"{len(requirements)} requirement{'' if len(requirements) == 1 else 's'}"
    if missed:
        names = "; ".join(f"{item.text} ({item.status})" for item in missed)
        return Outcome(1, f"{len(missed)} of {total} not met: {names}")
    unclear = sum(item.status == "unclear" for item in requirements)
    allowed = f", {unclear} of them unclear, which --allow-unclear lets pass" if unclear else ""
    return Outcome(0, f"{total} passed{allowed}")


def _flat(
    path: str | Path, table: Mapping[str, Any], kind: type | tuple[type, ...], start: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value); TOML reads a bare dotted key as tables inside tables."""
    for key, value in table.items():
        name = f"{start}{key}"
        if isinstance(value, dict):
            yield from _flat(path, value, kind, f"{name}.")
            continue
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, kind) or isinstance(item, bool):
                raise InvalidInputError(
                    f"{path} has {name} = {item!r}; needed an operator and a number in quotes, "
                    f'such as "<=0.05", or a plain number in [{PREFIX}]'
                )
            yield name, item

"""The course of a training run, from its history: what the figures of the report draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ebm_guard.report.record import Record

# Points of a curve: more than a figure of this width can show.
_POINTS = 300
_NUMBERS = (
    "loss",
    "gap",
    "energy_data",
    "energy_negatives",
    "gradient_norm",
    "saturation",
    "learning_rate",
)
_EVALUATED = ("accuracy", "nll", "ece", "temperature", "mean_auroc")


@dataclass(frozen=True)
class TrainingSection(Record):
    """The course of a run.

    Args:
        made: updates, those rolled back included.
        averaged: neighbouring updates that one point of a curve is the mean of.
        updates: columns of one length: ``update``, ``attempt`` and the measured numbers; ``parts``
            holds a column for each part of the loss.
        evaluations: on the selection rows, in order; with their ``attempt``.
        events: ``update`` and ``text``, such as rollbacks.
    """

    made: int
    averaged: int
    updates: Mapping[str, Any]
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]


def training_section(history: Sequence[Mapping[str, Any]]) -> TrainingSection:
    """Sort a history by what its lines are of.

    After a rollback the numbers of the updates start again from an older one: each such stretch is
    an attempt of its own, also where the lines do not say so.

    Example:
        >>> lines = [{"kind": "update", "update": n, "loss": 1.0} for n in (1, 2, 3, 2, 3)]
        >>> training_section(lines).updates["attempt"]
        [0, 0, 0, 1, 1]
    """
    attempt, last = 0, -1
    rows: list[tuple[int, Mapping[str, Any]]] = []
    evaluations, events = [], []
    for line in history:
        number = int(line["update"])
        if line["kind"] == "update":
            attempt = int(line.get("attempt", attempt + (number <= last)))
            last = number
            rows.append((attempt, line))
        elif line["kind"] == "evaluation":
            evaluations.append(_evaluation(line, attempt))
        else:
            events.append({"update": number, "text": str(line["text"])})
    step = max(1, -(-len(rows) // _POINTS))
    return TrainingSection(len(rows), step, _columns(_blocks(rows, step)), evaluations, events)


def _blocks(
    rows: list[tuple[int, Mapping[str, Any]]], step: int
) -> list[tuple[int, list[Mapping[str, Any]]]]:
    """Group neighbouring updates of one attempt, at most ``step`` together."""
    blocks: list[tuple[int, list[Mapping[str, Any]]]] = []
    for attempt, line in rows:
        if not blocks or blocks[-1][0] != attempt or len(blocks[-1][1]) == step:
            blocks.append((attempt, []))
        blocks[-1][1].append(line)
    return blocks


def _columns(blocks: list[tuple[int, list[Mapping[str, Any]]]]) -> dict[str, Any]:
    parts = dict.fromkeys(
        name for _, lines in blocks for line in lines for name in line.get("parts") or {}
    )
    return {
        "update": [int(lines[-1]["update"]) for _, lines in blocks],
        "attempt": [attempt for attempt, _ in blocks],
        **{
            name: [_mean([line.get(name) for line in lines]) for _, lines in blocks]
            for name in _NUMBERS
        },
        "parts": {
            name: [
                _mean([(line.get("parts") or {}).get(name) for line in lines])
                for _, lines in blocks
            ]
            for name in parts
        },
    }


def _evaluation(line: Mapping[str, Any], attempt: int) -> dict[str, Any]:
    return {
        "update": int(line["update"]),
        "attempt": attempt,
        **{name: _number(line.get(name)) for name in _EVALUATED},
        "auroc": {str(name): _number(value) for name, value in (line.get("auroc") or {}).items()},
        "eligible": bool(line.get("eligible")),
        "best": bool(line.get("best")),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in map(_number, values) if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None) -> float | None:
    """Return a finite number; what a run that blew up left behind is not known."""
    if value is None:
        return None
    number = float(value)
    return number if abs(number) < float("inf") else None

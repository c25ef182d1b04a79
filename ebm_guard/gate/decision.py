"""What a guard says about each row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from html import escape
from typing import Any

import torch
from torch import Tensor

REJECT, ACCEPT, INVALID = 0, 1, 2
_SHOWN = 20
STATUS_NAMES = {REJECT: "REJECT", ACCEPT: "ACCEPT", INVALID: "INVALID"}


@dataclass(frozen=True)
class Decision:
    """One row per input; tensors lie on the model's device.

    Args:
        status: (B,) int8: ``ACCEPT``, ``REJECT``, or ``INVALID`` for a row with a NaN or infinite
            logit, feature or score.
        label: (B,) int64, the predicted class: argmax of the logits, or of the calibrated
            probabilities where the calibrator may change it (vector, dirichlet); -1 where INVALID.
        confidence: (B,), probability of that class after calibration; 0 where INVALID.
        energy: (B,), E(x) at temperature 1, higher = more OOD; as computed, also where INVALID.
        score: (B,) float64, the gate's score, higher = more OOD; as computed.
        p_value: (B,) float64, marginal conformal p-value of the score; 0 where INVALID. It does
            not decide ``accept``.
        logits: (B, C), bit-identical to the model's own.
        cut: (B,) float64, the threshold that the row's score was compared with.
        certified: (B,) bool, whether the certified rule answers the row; True where the gate has
            no such rule.
        score_name: the gate's score, for the reasons.
        rule: the certified rule in words, for the reasons.
    """

    status: Tensor
    label: Tensor
    confidence: Tensor
    energy: Tensor
    score: Tensor
    p_value: Tensor
    logits: Tensor = field(repr=False)
    cut: Tensor = field(repr=False)
    certified: Tensor = field(repr=False)
    score_name: str = "energy"
    rule: str = ""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.status)

    @property
    def accept(self) -> Tensor:
        """(B,) bool: status is ACCEPT."""
        return self.status == ACCEPT

    @cached_property
    def reason(self) -> tuple[str, ...]:
        """One sentence per row, '' where accepted."""
        return tuple(self.reason_of(row) for row in range(len(self)))

    def reason_of(self, row: int) -> str:
        """Say why one row is refused, '' where it is accepted."""
        status = int(self.status[row])
        if status == ACCEPT:
            return ""
        if status == INVALID:
            return "non-finite logits, features or score"
        score, cut = float(self.score[row]), float(self.cut[row])
        if cut == -math.inf:
            return "no calibration row was predicted as this class"
        if not score <= cut:
            return f"{self.score_name} {score:.6g} is above the threshold {cut:.6g}"
        return (
            f"confidence {float(self.confidence[row]):.6g} and {self.score_name} {score:.6g} are "
            f"outside the certified rule {self.rule}"
        )

    def rows(self, ids: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Return one JSON-ready dict per row; non-finite numbers become None.

        Args:
            ids: one name per row.
        """
        columns = {
            name: getattr(self, name).tolist()
            for name in ("label", "confidence", "energy", "score", "p_value", "accept")
        }
        result = []
        for index, status in enumerate(self.status.tolist()):
            row: dict[str, Any] = {"id": ids[index]} if ids is not None else {}
            row["status"] = STATUS_NAMES[status]
            row |= {name: _json_number(values[index]) for name, values in columns.items()}
            row["reason"] = self.reason[index]
            result.append(row)
        return result

    def _repr_html_(self) -> str:
        """Show the first rows as a table in a notebook."""
        rows = self.rows()
        head = "".join(f"<th>{escape(name)}</th>" for name in rows[0]) if rows else ""
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(_cell(value))}</td>" for value in row.values()) + "</tr>"
            for row in rows[:_SHOWN]
        )
        rest = len(rows) - _SHOWN
        more = f"<p>and {rest:,} more rows</p>" if rest > 0 else ""
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"

    @staticmethod
    def concatenate(parts: Sequence[Decision]) -> Decision:
        """Join the decisions of several batches of one guard."""
        tensors = {
            item.name: torch.cat([getattr(part, item.name) for part in parts])
            for item in fields(Decision)
            if isinstance(getattr(parts[0], item.name), Tensor)
        }
        return Decision(**tensors, score_name=parts[0].score_name, rule=parts[0].rule)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _json_number(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

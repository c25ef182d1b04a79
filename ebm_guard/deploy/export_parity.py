"""Compare an exported program with the guard it was made of, row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ebm_guard.deploy.exported import OUTPUTS, ExportedOutput
from ebm_guard.energy import log_probabilities
from ebm_guard.errors import UnsupportedModelError
from ebm_guard.gate import INVALID, Decision, Guard
from ebm_guard.gate.class_conditional import require_threshold

ROWS = 256
# Relative to the largest logit or score of the rows: float32 kernels differ by about 1e-6.
SAME_DEVICE, OTHER_DEVICE, HALF = 1e-4, 1e-2, 3e-2
# Of probabilities computed from the same logits.
PROBABILITY = 1e-4
_BATCH = 64


@dataclass(frozen=True)
class Reference:
    """What the guard says about the rows of the comparison, on the CPU.

    Args:
        inputs: (N, ...), the program's input.
        decision: of the guard.
        tolerance: relative.
    """

    inputs: Tensor
    decision: Decision
    tolerance: float


def parity_inputs(example: Tensor, *, pixels: bool, rows: int = ROWS) -> Tensor:
    """Return the rows that are compared: the example's, and as many made of them as it takes.

    Made rows are mixes of two of the example's, half of them with noise, so that scores spread
    around the threshold.

    Args:
        example: (N, ...), the program's input.
        pixels: keep values in [0, 1].
        rows: wanted.
    """
    missing = rows - len(example)
    if missing <= 0:
        return example[:rows].clone()
    generator = torch.Generator().manual_seed(0)
    wide = example.double()
    one, other = torch.randint(len(example), (2, missing), generator=generator)
    ones = [1] * (example.ndim - 1)
    share = torch.rand(missing, *ones, generator=generator, dtype=torch.float64)
    made = share * wide[one] + (1 - share) * wide[other]
    noise = torch.randn(made.shape, generator=generator, dtype=torch.float64)
    loud = torch.rand(missing, *ones, generator=generator, dtype=torch.float64).sub(0.5).clamp(0)
    # Values of one row's scale, 1 where the example is constant.
    made = made + loud * noise * (float(wide.std()) or 1.0)
    if pixels:
        made = made.clamp(0, 1)
    return torch.cat([example, made.to(example.dtype)])


def reference(guard: Guard, inputs: Tensor, *, pixels: bool) -> Reference:
    """Let the guard decide on the rows."""
    parts = [guard.pixels(part) if pixels else guard(part) for part in batches(inputs)]
    decision = Decision.concatenate(parts)
    device, dtype = decision.logits.device.type, decision.logits.dtype
    half = dtype in (torch.float16, torch.bfloat16)
    tolerance = HALF if half else SAME_DEVICE if device == "cpu" else OTHER_DEVICE
    return Reference(inputs, decision, tolerance)


def batches(inputs: Tensor) -> list[Tensor]:
    """Cut rows into batches of 1, 63, 64, 64, ... rows."""
    edges = [0, 1, *range(_BATCH, len(inputs), _BATCH), len(inputs)]
    return [inputs[start:end] for start, end in pairwise(edges) if end > start]


@torch.no_grad()
def check_parity(
    guard: Guard, wanted: Reference, run: Callable[[Tensor], ExportedOutput]
) -> dict[str, Any]:
    """Compare the program with the guard, and say what was compared.

    Decisions must be equal but where a score or a confidence lies within the tolerance of its cut,
    or the two largest logits within it of each other: those rows are counted. A p-value must be
    one that the guard gives within the tolerance of the score, and probabilities those of the
    calibrator for the program's own logits. Rows with a NaN or infinite input must be refused, and
    must not change their neighbours.

    Raises:
        UnsupportedModelError: they differ.
    """
    parts = [run(part) for part in batches(wanted.inputs)]
    outputs = tuple(torch.cat([getattr(part, name) for part in parts]) for name in OUTPUTS)
    found = ExportedOutput.of(outputs, parts[0].keeps_prediction)
    return _Comparison(guard, wanted, found).facts() | _check_bad_rows(wanted, found, run)


class _Comparison:
    def __init__(self, guard: Guard, wanted: Reference, found: ExportedOutput) -> None:
        self.guard, self.found, self.tolerance = guard, found, wanted.tolerance
        decision = wanted.decision
        self.decision, self.device = decision, decision.logits.device
        self.valid = (decision.status != INVALID).cpu()
        self.logits, self.score = decision.logits.cpu(), decision.score.cpu()
        if not bool(self.valid.any()):
            raise UnsupportedModelError(
                "the guard calls every row of the example INVALID (non-finite logits or scores), "
                "so nothing can be compared; give an example of real inputs"
            )
        self.logit_gap = self.tolerance * _largest(self.logits[self.valid])
        # Scores may lie far from zero and close together: never looser than half their spread.
        scores = self.score[self.valid]
        fitted = require_threshold(guard.threshold).scores
        spread = float(fitted.max() - fitted.min()) or _largest(scores)
        self.score_gap = min(self.tolerance * max(_largest(scores), spread), spread / 2)

    def facts(self) -> dict[str, Any]:
        found, valid = self.found, self.valid
        gaps = {
            "logits": self._gap("logits", self.logits, found.logits, self.logit_gap),
            "energy": self._gap("energy", self.decision.energy.cpu(), found.energy, self.logit_gap),
            "score": self._gap("score", self.score, found.score, self.score_gap),
            "probabilities": self._gap(
                "probabilities", self._probabilities(), found.probabilities, self._allowed()
            ),
        }
        near = self._near()
        self._check_p_values(near)
        eager = self.decision.accept.cpu()
        differ = found.accept != eager
        if bool((differ & ~near).any()) or not torch.equal(found.p_value > 0, valid):
            self._fail(
                f"{int((differ & ~near).sum())} of {len(differ)} decisions differ, with the score "
                "away from its cut"
            )
        return {
            "rows": len(differ),
            "accepted": int(eager.sum()),
            "near_the_cut": int((near & valid).sum()),
            "decisions_that_differ": int(differ.sum()),
            "largest_difference": gaps,
            "tolerance": {
                "logits": self.logit_gap,
                "energy": self.logit_gap,
                "score": self.score_gap,
                "probabilities": self._allowed(),
            },
        }

    def _allowed(self) -> float:
        return max(PROBABILITY, HALF if self.tolerance == HALF else 0.0)

    def _gap(self, name: str, wanted: Tensor, found: Tensor, allowed: float) -> float:
        if wanted.shape != found.shape or wanted.dtype != found.dtype:
            self._fail(
                f"{name} of shape {tuple(found.shape)} and {found.dtype} where the guard gives "
                f"{tuple(wanted.shape)} and {wanted.dtype}"
            )
        gap = _largest((wanted - found)[self.valid])
        if not gap <= allowed:
            self._fail(f"{name} differ by {gap:.3g}, and {allowed:.3g} is allowed")
        return gap

    def _probabilities(self) -> Tensor:
        """Return the calibrator's for the program's own logits: an isotonic curve may be steep."""
        logits = self.found.logits.to(self.device)
        calibrator = self.guard.calibrator
        log_p = (
            log_probabilities(logits)
            if calibrator is None
            else calibrator.log_probabilities(logits)
        )
        return log_p.exp().cpu()

    def _near(self) -> Tensor:
        cut = self.decision.cut.cpu()
        near = (self.score - cut).abs() <= self.score_gap
        top = self.logits.double().topk(2, dim=1).values
        near |= top[:, 0] - top[:, 1] <= 2 * self.logit_gap
        if self.guard.rule is not None:
            low, high = self.guard.rule.cuts.cpu().unbind()
            near |= (self.score - high).abs() <= self.score_gap
            confidence = self.decision.confidence.cpu()
            moved = (confidence - self.found.confidence).abs() + self._allowed()
            near |= (confidence - low).abs() <= moved
        return near

    def _check_p_values(self, near: Tensor) -> None:
        threshold = require_threshold(self.guard.threshold)
        classes = self.logits.argmax(dim=1).to(self.device)
        score, found = self.decision.score, self.found.p_value
        high, low = (
            threshold.p_value(score + gap, classes).cpu()
            for gap in (-self.score_gap, self.score_gap)
        )
        wrong = ((found < low - 1e-9) | (found > high + 1e-9)) & self.valid & ~near
        if bool(wrong.any()):
            self._fail(f"{int(wrong.sum())} of {len(wrong)} p-values are not those of the scores")

    def _fail(self, what: str) -> None:
        raise UnsupportedModelError(
            f"the exported program does not agree with the guard: {what}. No file was written; the "
            "model computes something that the exporter does not keep"
        )


def _check_bad_rows(
    wanted: Reference, found: ExportedOutput, run: Callable[[Tensor], ExportedOutput]
) -> dict[str, Any]:
    rows = wanted.inputs[:1].repeat(4, *[1] * (wanted.inputs.ndim - 1))
    values = (torch.nan, torch.inf, -torch.inf)
    for row, value in enumerate(values, start=1):
        rows[row].view(-1)[row] = value
    got = run(rows)
    refused = not bool(got.accept[1:].any()) and not bool((got.p_value[1:] > 0).any())
    scale = _largest(found.logits[:1]) or 1.0
    moved = _largest(got.logits[:1] - found.logits[:1])
    if not refused or not moved <= wanted.tolerance * scale:
        raise UnsupportedModelError(
            "the exported program does not refuse rows with NaN or infinite inputs, or lets them "
            "change their neighbours. No file was written"
        )
    return {"rows_with_bad_input_refused": len(values)}


def _largest(values: Tensor) -> float:
    return float(values.double().abs().max()) if values.numel() else 0.0

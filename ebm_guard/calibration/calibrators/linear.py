"""Linear maps of the log-probabilities: the fit that vector scaling and Dirichlet share.

With l = log softmax(f/T), T from temperature scaling, both are p = softmax(W l + b), and minimise::

    mean_i w_i NLL_i + 1/2 sum_kj P_kj (W - I)_kj^2 + 1/2 sum_k P_k b_k^2

over all of W, or over its diagonal alone. W = I and b = 0 is temperature scaling itself, so the
penalty P draws to it. Everything is relative to l, hence nothing depends on a constant added to a
row of logits or on the scale of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_guard.calibration.calibrators.base import CHUNK, Rows
from ebm_guard.intervals import Array

MAX_ITERATIONS = 2000
# Relative fall of the NLL at which L-BFGS stops: exact for the fit that is kept, and far below a
# standard error of the NLL where folds only compare penalties.
EXACT, ROUGH = 1e-12, 1e-6
# Length of the gradient that counts as zero: half its square is about what the loss could still
# fall.
SMALL = 1e-4


@dataclass(frozen=True)
class Penalty:
    """Strengths per squared entry of W - I and b, in units of the mean NLL."""

    diagonal: float
    off_diagonal: float | None = None


@dataclass(frozen=True)
class Fitted:
    """W - I with b as its last column, (C, C + 1), or its diagonal and b, (C, 2)."""

    change: Tensor
    converged: bool


class Problem:
    """The objective over some rows, with its gradient; one pass over the rows each.

    Args:
        rows: to fit on.
        temperature: T of l = log softmax(f/T).
        full: whether all of W is free, and not its diagonal alone.
    """

    def __init__(self, rows: Rows, temperature: float, full: bool) -> None:
        self.rows, self.temperature, self.full = rows, temperature, full
        # Only the (n,) row constants logsumexp(f/T) are kept, and small problems whole.
        self._constants = torch.zeros(len(rows), 1, dtype=torch.float64)
        for part, _, _, place in rows.parts():
            scaled = torch.from_numpy(part).div_(temperature)
            self._constants[place] = torch.logsumexp(scaled, dim=1, keepdim=True)
        small = len(rows) * rows.num_classes <= CHUNK * 10
        self._kept = list(self._read()) if small else None

    def _read(self) -> Any:
        for part, labels, weights, place in self.rows.parts():
            yield (
                torch.from_numpy(part).div_(self.temperature).sub_(self._constants[place]),
                torch.from_numpy(np.array(labels)),
                None if weights is None else torch.from_numpy(np.array(weights)),
                place,
            )

    def parts(self) -> Any:
        """Yield l (B, C), labels (B,), weights (B,) or None, and the place of each chunk."""
        return self._read() if self._kept is None else self._kept

    def start(self) -> Tensor:
        """Return no change: temperature scaling."""
        classes = self.rows.num_classes
        return torch.zeros(classes, classes + 1 if self.full else 2, dtype=torch.float64)

    def strengths(self, penalty: Penalty) -> Tensor:
        """Return P in the shape of the change."""
        strengths = torch.full_like(self.start(), penalty.diagonal)
        if self.full and penalty.off_diagonal is not None:
            square = strengths[:, :-1]
            square.fill_(penalty.off_diagonal).fill_diagonal_(penalty.diagonal)
        return strengths

    def row_nll(self, change: Tensor) -> Array:
        """Return the NLL (n,) of each row."""
        found = np.empty(len(self.rows))
        for values, labels, _, place in self.parts():
            log_p = torch.log_softmax(apply_change(values, change), dim=1)
            found[place] = -log_p.gather(1, labels[:, None]).squeeze(1).numpy()
        return found

    def loss(self, change: Tensor) -> tuple[float, Tensor]:
        """Return the weighted mean NLL and its gradient in the change."""
        total, gradient = 0.0, torch.zeros_like(change)
        for values, labels, weights, _ in self.parts():
            p = apply_change(values, change)
            p.sub_(p.amax(dim=1, keepdim=True))
            nll = p.gather(1, labels[:, None]).neg_()
            scale = p.exp_().sum(dim=1, keepdim=True)
            nll += scale.log()
            p.div_(scale)
            p.scatter_add_(1, labels[:, None], torch.full_like(nll, -1.0))
            if weights is not None:
                nll.mul_(weights[:, None])
                p.mul_(weights[:, None])
            total += float(nll.sum())
            gradient[:, -1] += p.sum(dim=0)
            if self.full:
                gradient[:, :-1].addmm_(p.T, values)
            else:
                gradient[:, 0] += p.mul_(values).sum(dim=0)
        return total / len(self.rows), gradient / len(self.rows)

    def fit(self, penalty: Penalty, start: Tensor | None = None, stop: float = EXACT) -> Fitted:
        """Minimise the penalised loss; it is strictly convex, so there is one minimum.

        L-BFGS in coordinates in which the Hessian at W = I, b = 0 is close to the identity, which
        halves the passes.
        """
        from scipy import optimize

        strengths = self.strengths(penalty)
        to_change, to_gradient, to_coordinates = self._coordinates(strengths)
        change = self.start() if start is None else start

        def objective(point: Array) -> tuple[float, Array]:
            change = to_change(torch.from_numpy(point).view_as(strengths))
            value, gradient = self.loss(change)
            value += 0.5 * float((strengths * change * change).sum())
            gradient = to_gradient(gradient + strengths * change)
            return value, np.asarray(gradient.reshape(-1).numpy())

        result = optimize.minimize(
            objective,
            to_coordinates(change).reshape(-1).numpy(),
            jac=True,
            method="L-BFGS-B",
            options={
                "maxiter": MAX_ITERATIONS,
                "maxfun": 2 * MAX_ITERATIONS,
                "maxcor": 20,
                "ftol": stop,
                "gtol": 1e-9,
            },
        )
        change = to_change(torch.from_numpy(np.array(result.x)).view_as(strengths))
        return Fitted(change, bool(np.linalg.norm(result.jac) < SMALL))

    def _coordinates(self, strengths: Tensor) -> tuple[Callable[[Tensor], Tensor], ...]:
        """Return maps point -> change, gradient -> its own, and change -> point.

        The Hessian's block of class k is E[p_k (1 - p_k) (l, 1) (l, 1)'], taken as h_k A for the
        full map, and exactly, 2 x 2, for the diagonal one.
        """
        if not self.full:
            blocks = self._blocks() + torch.diag_embed(strengths)
            lower = torch.linalg.cholesky(blocks)

            def solve(change: Tensor, transpose: bool) -> Tensor:
                side = lower.mT if transpose else lower
                column = change[:, :, None]
                solved: Tensor = torch.linalg.solve_triangular(side, column, upper=transpose)
                return solved[:, :, 0]

            return (
                lambda point: solve(point, transpose=True),
                lambda gradient: solve(gradient, transpose=False),
                lambda change: (lower.mT @ change[:, :, None])[:, :, 0],
            )
        by_class, second = self._second_moment()
        spread, axes = torch.linalg.eigh(second)
        off_diagonal = strengths[0, 1]
        scale = (by_class[:, None] * spread.clamp_min(0) + off_diagonal).rsqrt()
        return (
            lambda point: (point * scale) @ axes.T,
            lambda gradient: (gradient @ axes) * scale,
            lambda change: (change @ axes) / scale,
        )

    def _blocks(self) -> Tensor:
        """Return E[p_k (1 - p_k) (l_k, 1) (l_k, 1)'], (C, 2, 2)."""
        total = torch.zeros(self.rows.num_classes, 2, 2, dtype=torch.float64)
        for values, _, weights, _ in self.parts():
            share = _uncertainty(values, weights)
            total[:, 1, 1] += share.sum(dim=0)
            share = share * values
            total[:, 0, 1] += share.sum(dim=0)
            total[:, 0, 0] += (share * values).sum(dim=0)
        total[:, 1, 0] = total[:, 0, 1]
        # Where a class never gets any probability the block is zero, up to rounding.
        return total / len(self.rows)

    def _second_moment(self) -> tuple[Tensor, Tensor]:
        """Return E[p_k (1 - p_k)], (C,), and the mean of (l, 1)(l, 1)' by uncertainty."""
        size = self.rows.num_classes + 1
        by_class = torch.zeros(size - 1, dtype=torch.float64)
        second = torch.zeros(size, size, dtype=torch.float64)
        for values, _, weights, _ in self.parts():
            share = _uncertainty(values, weights)
            by_class += share.sum(dim=0)
            with_one = torch.nn.functional.pad(values, (0, 1), value=1.0)
            second.addmm_((with_one * share.sum(dim=1, keepdim=True)).T, with_one)
        return by_class / len(self.rows), second / by_class.sum().clamp_min(1e-300)


def apply_change(values: Tensor, change: Tensor) -> Tensor:
    """Compute W l + b from l (B, C), with W = I + change: all of it (C, C + 1), or (C, 2)."""
    if change.shape[1] == 2:
        return torch.addcmul(change[:, 1], values, change[:, 0] + 1)
    return torch.addmm(values + change[:, -1], values, change[:, :-1].T)


def _uncertainty(values: Tensor, weights: Tensor | None) -> Tensor:
    share = values.exp()
    share.addcmul_(share, share, value=-1)
    return share if weights is None else share.mul_(weights[:, None])

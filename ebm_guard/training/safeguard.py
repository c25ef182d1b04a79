"""What ends an attempt: signs of a collapse at every update, and of harm at every evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from ebm_guard.intervals import LEVEL
from ebm_guard.training.bounds import loss_upper
from ebm_guard.training.options import FineTuneOptions
from ebm_guard.training.selection import Evaluation, Look
from ebm_guard.training.temperatures import Temperatures

# |gap| and gradient norms beyond these multiples of their usual size are a runaway.
GAP_FACTOR = 10.0
NORM_FACTOR = 100.0
MOST_SATURATION = 0.5
# At a high learning rate a net may be beyond its limits for a while and come back.
HARM_FACTOR = 3.0
# One wild batch is no collapse; this many in a row are.
_PATIENCE = 3
_FIRST = 5
_REMEMBERED = 50


class Safeguard:
    """Watch the updates of one attempt.

    Ends it at once when the loss or the gradient is not finite; and after three updates in a row
    with an energy gap |mean E(x-) - mean E(x+)| beyond 10 times its first size (or the spread of
    the data's energies, if that is larger), a gradient norm beyond 100 times its usual one, or
    more than half of the negatives' values on the edge of [0, 1] (of those that the data leave
    inside).

    Args:
        spread: standard deviation of the energies of the data before training.

    Example:
        >>> Safeguard(1.0).judge(math.nan, 1.0, None, None)
        'the loss is not finite'
    """

    def __init__(self, spread: float) -> None:
        self._spread = spread
        self.restart()

    def restart(self) -> None:
        """Forget all of it, for a new attempt."""
        self._gaps: list[float] = []
        self._norms: list[float] = []
        self._streaks = {"gap": 0, "norm": 0, "saturation": 0}

    def judge(
        self,
        loss: float,
        gradient_norm: float,
        gap: float | None,
        saturation: float | None,
        data_saturation: float = 0.0,
    ) -> str | None:
        """Look at the numbers of one update, before its step is made.

        Args:
            loss: of the update.
            gradient_norm: before clipping.
            gap: mean energy of the negatives minus that of the data, or None.
            saturation: share of the negatives' values on the edge of [0, 1], or None.
            data_saturation: that of the data.

        Returns:
            Why the attempt must end, or None.
        """
        if not math.isfinite(loss):
            return "the loss is not finite"
        if not math.isfinite(gradient_norm):
            return "the gradient is not finite"
        found = [
            self._gap(gap),
            self._norm(gradient_norm),
            self._saturation(saturation, data_saturation),
        ]
        return next((reason for reason in found if reason), None)

    def _gap(self, gap: float | None) -> str | None:
        if gap is None:
            return None
        if not math.isfinite(gap):
            return "the energies are not finite"
        if len(self._gaps) < _FIRST:
            self._gaps.append(abs(gap))
        scale = max(self._spread, median(self._gaps))
        if not self._again("gap", wild=abs(gap) > GAP_FACTOR * scale):
            return None
        return (
            f"the energy gap between negatives and data is {gap:.3g}, more than {GAP_FACTOR:g} "
            f"times the {scale:.3g} that it began with"
        )

    def _norm(self, norm: float) -> str | None:
        usual = median(self._norms) if len(self._norms) >= _FIRST else math.inf
        wild = norm > NORM_FACTOR * usual
        if not wild:
            self._norms = [*self._norms, norm][-_REMEMBERED:]
        if not self._again("norm", wild=wild):
            return None
        return (
            f"the gradient norm is {norm:.3g}, more than {NORM_FACTOR:g} times its usual "
            f"{usual:.3g}"
        )

    def _saturation(self, share: float | None, of_data: float) -> str | None:
        limit = of_data + (1 - of_data) * MOST_SATURATION
        wild = share is not None and share > limit
        if not self._again("saturation", wild=wild):
            return None
        return f"{share:.0%} of the negatives' values lie on the edge of [0, 1]"

    def _again(self, name: str, *, wild: bool) -> bool:
        self._streaks[name] = self._streaks[name] + 1 if wild else 0
        return self._streaks[name] >= _PATIENCE

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, as JSON types."""
        return {
            "gaps": list(self._gaps),
            "norms": list(self._norms),
            "streaks": dict(self._streaks),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        gaps: Sequence[float] = state["gaps"]
        norms: Sequence[float] = state["norms"]
        self._gaps, self._norms = list(gaps), list(norms)
        self._streaks = dict(state["streaks"])


def within_limits(start: Evaluation, found: Evaluation, options: FineTuneOptions) -> bool:
    """Whether a state may be chosen: accuracy, NLL and ECE within their limits, as estimated.

    Args:
        start: at its temperature of the pair; see :class:`Temperatures`.
        found: at the other.
        options: with the limits.
    """
    rounding = 1e-9
    return (
        start.accuracy - found.accuracy <= options.max_acc_drop + rounding
        and found.nll - start.nll <= options.max_nll_rise
        and found.ece - start.ece <= options.max_ece_rise
    )


def harm(start: Look, look: Look, options: FineTuneOptions) -> str | None:
    """Say why a net is surely beyond three times the limits, by one-sided 95 % bounds, or None.

    A net that is beyond the limits by less, or perhaps by chance alone, is not chosen; but the
    run goes on, because it may come back as the learning rate falls.

    Args:
        start: on the selection rows.
        look: of the net that is trained, on the same rows.
        options: with the limits.
    """
    from scipy import stats

    before, after = start.correct, look.correct
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    least = -loss_upper(gained, lost, len(before))
    if least > HARM_FACTOR * options.max_acc_drop:
        return (
            f"the accuracy on {len(before):,} selection rows fell from {before.mean():.3f} to "
            f"{after.mean():.3f}"
        )
    pair = Temperatures.of(start.fit, look.fit)
    old, new = start.nll(pair.start), look.nll(pair.candidate)
    rise = new - old
    error = float(rise.std(ddof=1)) / len(rise) ** 0.5
    least = float(rise.mean()) - float(stats.t.ppf(LEVEL, len(rise) - 1)) * error
    if least > HARM_FACTOR * options.max_nll_rise:
        return (
            f"the NLL after temperature on {len(before):,} selection rows rose from "
            f"{old.mean():.3f} to {new.mean():.3f}"
        )
    return None

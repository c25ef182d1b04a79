"""The monitor itself: fed with the scores of live traffic, saved, resumed, merged."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.errors import ArtifactError, InvalidInputError
from ebm_guard.gate.drift.distances import (
    N_BINS,
    PSI,
    Counts,
    Floats,
    QuantileBins,
    clopper_pearson,
    ks,
    psi,
)
from ebm_guard.gate.drift.evidence import merge_evidence
from ebm_guard.gate.drift.martingale import Bettor, smoothed_p_values
from ebm_guard.gate.drift.ranks import OnlineRanks
from ebm_guard.gate.drift.record import DriftReport, DriftState, MergedDrift
from ebm_guard.gate.drift.storage import read_monitor, write_monitor
from ebm_guard.gate.thresholds import Threshold
from ebm_guard.intervals import Array, Metric

if TYPE_CHECKING:
    from typing import Self

WINDOW = 1000
EPOCH_LENGTH = 1_000_000
_LEAST_REFERENCE = 20
_SETTINGS = (
    "cut",
    "false_reject_rate",
    "delta",
    "window",
    "n_bins",
    "epoch_length",
)


class DriftMonitor:
    """Watch the scores of live traffic, one by one or in batches.

    Four things are kept: the reject rate with an exact interval, PSI and KS of a window against
    the reference, and a conformal test martingale. Only the martingale may be looked at after
    every score: it alarms at 1/delta, with probability at most delta ever, if reference and
    traffic are exchangeable (any score, any model, ties included). The others are for one look.

    Each epoch of ``epoch_length`` scores begins with the reference alone, so that memory is
    bounded (8 bytes a score of the epoch) and a drift long ago does not hide a new one. Epoch k
    starts with the capital 1 / (k (k + 1)), so that over all epochs the chance of a false alarm
    stays at delta.

    Args:
        reference_scores: (n,) finite scores of held-out ID inputs: the calibration scores.
        cut: scores above it are refused.
        false_reject_rate: what the gate promises, in (0, 1).
        delta: chance of a false alarm, ever, in (0, 1).
        window: recent scores that PSI, KS and the recent reject rate look at, >= 1.
        n_bins: bins of PSI, >= 2.
        epoch_length: scores an epoch, >= 1; None never starts anew and puts all capital at once.
        seed: of the generator that breaks ties.

    Raises:
        InvalidInputError: too few or non-finite reference scores, or settings out of range.

    References:
        Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005, chapter 8;
        Fedorova et al., Plug-in Martingales for Testing Exchangeability On-line, ICML 2012;
        Volkhonskiy et al., Inductive Conformal Martingales for Change-Point Detection, COPA 2017.

    Differs:
        The inductive form of 2017 ranks against a fixed set, which over-alarms given that set; see
        :mod:`ebm_guard.gate.drift.martingale`. What a growing reference costs: after a change the
        new scores join it, so a small shift that is missed for as many scores as came before it
        fades (within its epoch).

    Example:
        >>> rng = np.random.default_rng(0)
        >>> monitor = DriftMonitor(rng.normal(size=500), cut=1.7)
        >>> monitor.update(rng.normal(size=300)).alarm
        False
        >>> monitor.update(rng.normal(1, 1, size=100)).alarm
        True
    """

    _ranks: OnlineRanks
    _bettor: Bettor

    def __init__(
        self,
        reference_scores: Array | Tensor,
        *,
        cut: float,
        false_reject_rate: float = 0.05,
        delta: float = 0.05,
        window: int = WINDOW,
        n_bins: int = N_BINS,
        epoch_length: int | None = EPOCH_LENGTH,
        seed: int = 0,
    ) -> None:
        self.reference = np.sort(_scores(reference_scores))
        self.cut, self.false_reject_rate, self.delta = float(cut), false_reject_rate, delta
        self.window, self.n_bins = window, n_bins
        self.epoch_length = epoch_length
        self._check()
        self._bins = QuantileBins(self.reference, n_bins)
        self._generator = np.random.default_rng(seed)
        self._counts: Counts = np.zeros_like(self._bins.reference)
        self._recent: Floats = np.empty(0)
        self._n = self._refused = self._invalid = 0
        self._alarm_at: int | None = None
        self._alarm_direction = ""
        self._highest_before = 0.0
        self._epoch = 0
        self._start_epoch()
        self._lock = threading.Lock()

    @classmethod
    def from_threshold(cls, threshold: Threshold, **settings: Any) -> Self:
        """Watch the gate of a fitted threshold: its calibration scores, cut and promise.

        Args:
            threshold: such as ``guard.threshold``.
            settings: the other arguments of the class.

        Example:
            >>> threshold = Threshold.fit(np.arange(100.0))
            >>> DriftMonitor.from_threshold(threshold, delta=0.01).cut
            98.0
        """
        rate = threshold.false_reject_rate
        cut = float(threshold.cut)
        return cls(threshold.scores, cut=cut, false_reject_rate=rate, **settings)

    def _check(self) -> None:
        bad = int((~np.isfinite(self.reference)).sum())
        if bad:
            raise InvalidInputError(
                f"got {bad} of {len(self.reference)} reference scores that are not finite; needed "
                "the calibration scores of a gate, which are finite"
            )
        if len(self.reference) < _LEAST_REFERENCE:
            raise InvalidInputError(
                f"got {len(self.reference)} reference scores; needed at least {_LEAST_REFERENCE}"
            )
        for name in ("false_reject_rate", "delta"):
            if not 0 < getattr(self, name) < 1:
                raise InvalidInputError(f"got {name} {getattr(self, name)!r}; needed (0, 1)")
        limits = {"window": 1, "n_bins": 2, "epoch_length": 1}
        for name, least in limits.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidInputError(f"got {name} {value!r}; needed >= {least}")
        if not math.isfinite(self.cut):
            raise InvalidInputError(f"got cut {self.cut}; needed a finite number")

    def _start_epoch(self) -> None:
        if self._epoch:
            self._highest_before = max(self._highest_before, self._bettor.highest)
        self._epoch += 1
        k = self._epoch
        capital = 1.0 if self.epoch_length is None else 1 / (k * (k + 1))
        self._ranks = OnlineRanks(self.reference)
        self._bettor = Bettor(capital)

    def update(self, scores: Array | Tensor | float | Sequence[float]) -> DriftState:
        """Add scores in the order in which they came.

        A batch and the same scores one by one lead to the same state, to the last bit. Calls from
        several threads are taken one after the other.

        Args:
            scores: one score or (B,); non-finite ones count as invalid and as refused, and the
                martingale, PSI and KS leave them out.

        Raises:
            InvalidInputError: not one-dimensional.
        """
        values = _scores(scores)
        with self._lock:
            finite = np.isfinite(values)
            before = self._n
            self._n += len(values)
            self._invalid += int((~finite).sum())
            # NaN is not <= the cut.
            self._refused += int((~(finite & (values <= self.cut))).sum())
            self._recent = np.concatenate([self._recent, values])[-self.window :]
            self._counts = self._counts + self._bins.count(values[finite])
            self._play(values[finite], before + 1 + np.flatnonzero(finite))
            return self._state()

    def _play(self, scores: Floats, numbers: NDArray[np.int64]) -> None:
        at = 0
        while at < len(scores):
            room = len(scores) - at
            if self.epoch_length is not None:
                if self._bettor.steps >= self.epoch_length:
                    self._start_epoch()
                room = min(room, self.epoch_length - self._bettor.steps)
            p, q = smoothed_p_values(self._ranks, scores[at : at + room], self._generator)
            crossing = self._bettor.play(p, q, self.line)
            if crossing is not None and self._alarm_at is None:
                self._alarm_at = int(numbers[at + crossing.place])
                self._alarm_direction = crossing.direction
            at += room

    @property
    def line(self) -> float:
        """The wealth at which the martingale alarms, 1 / delta."""
        return 1 / self.delta

    @property
    def state(self) -> DriftState:
        """Where the monitor stands."""
        with self._lock:
            return self._state()

    def _state(self) -> DriftState:
        return DriftState(
            n=self._n,
            refused=self._refused,
            invalid=self._invalid,
            wealth=self._bettor.wealth,
            highest=max(self._highest_before, self._bettor.highest),
            line=self.line,
            delta=self.delta,
            alarm=self._alarm_at is not None,
            alarm_at=self._alarm_at,
            direction=self._alarm_direction or self._bettor.strongest,
            epoch=self._epoch,
        )

    def report(self) -> DriftReport:
        """Compute all figures at this look."""
        with self._lock:
            state, recent, counts = self._state(), self._recent, self._counts
        finite = recent[np.isfinite(recent)]
        refused = len(recent) - int((finite <= self.cut).sum())
        return DriftReport(
            state=state,
            false_reject_rate=self.false_reject_rate,
            reject_rate=_rate(state.refused, state.n),
            recent_reject_rate=_rate(refused, len(recent)),
            psi=self._psi(self._bins.count(finite)),
            ks=ks(self.reference, finite) if len(finite) else None,
            total_psi=self._psi(counts),
        )

    def _psi(self, counts: Counts) -> PSI | None:
        return psi(self._bins.reference, counts) if counts.sum() else None

    @staticmethod
    def merge(monitors: Iterable[DriftMonitor], *, replicas: int | None = None) -> MergedDrift:
        """Put several monitors of one gate together; ``map(DriftMonitor.load, paths)`` will do.

        Counts and PSI's histograms add up exactly. Martingales do not merge, because all share
        one reference; their evidence does, see
        :func:`~ebm_guard.gate.drift.evidence.merge_evidence`.

        Args:
            monitors: of the same reference scores, cut, promise, delta and bins; held one by one.
            replicas: how many will ever have run; without it those that are given.

        Raises:
            InvalidInputError: none, monitors of different gates, or too small ``replicas``.
        """
        first: DriftMonitor | None = None
        states: list[DriftState] = []
        counts = np.zeros(0, np.int64)
        for monitor in monitors:
            first = first or monitor
            if not first._same_gate(monitor):
                raise InvalidInputError(
                    "got monitors of different gates; needed the same reference scores, cut, "
                    "false_reject_rate, delta and n_bins"
                )
            with monitor._lock:
                states.append(monitor._state())
                counts = monitor._counts + (counts if len(counts) else 0)
        if first is None:
            raise InvalidInputError("got no monitors to merge; needed at least one")
        n, refused = (sum(getattr(state, name) for state in states) for name in ("n", "refused"))
        return MergedDrift(
            n=n,
            refused=refused,
            invalid=sum(state.invalid for state in states),
            false_reject_rate=first.false_reject_rate,
            reject_rate=_rate(refused, n),
            psi=first._psi(counts),
            evidence=merge_evidence(
                [state.highest for state in states],
                [state.wealth for state in states],
                delta=first.delta,
                replicas=replicas,
            ),
        )

    def _same_gate(self, other: DriftMonitor) -> bool:
        names = ("cut", "false_reject_rate", "delta", "n_bins")
        same = all(getattr(self, name) == getattr(other, name) for name in names)
        return same and np.array_equal(self.reference, other.reference)

    def save(self, path: str | Path) -> Path:
        """Write the state, generator included, as one ``.safetensors`` file, whole or not at all.

        Raises:
            DataError: the place cannot be written.
        """
        with self._lock:
            arrays, settings = self.arrays(), self.settings()
        return write_monitor(path, arrays, settings)

    @classmethod
    def load(cls, path: str | Path) -> DriftMonitor:
        """Resume a saved monitor; it goes on exactly as the saved one would have.

        Raises:
            ArtifactError: missing, damaged, or no monitor's state.
        """
        arrays, settings = read_monitor(path)
        try:
            return cls.from_state(arrays, settings)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ArtifactError(
                f"{path} lacks what this version needs ({error}); start a new monitor"
            ) from None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays of the state."""
        return {
            "reference": self.reference,
            "recent": self._recent,
            "counts": self._counts,
            "ranked": self._ranks.values(),
        }

    def settings(self) -> dict[str, Any]:
        """Return all of the state but its arrays, as JSON types."""
        own = {name: getattr(self, name) for name in _SETTINGS}
        return {
            "own": own,
            "n": self._n,
            "refused": self._refused,
            "invalid": self._invalid,
            "alarm_at": self._alarm_at,
            "alarm_direction": self._alarm_direction,
            "highest_before": self._highest_before,
            "epoch": self._epoch,
            "bettor": self._bettor.settings(),
            "generator": self._generator.bit_generator.state,
        }

    @classmethod
    def from_state(
        cls, arrays: Mapping[str, NDArray[Any]], settings: Mapping[str, Any]
    ) -> DriftMonitor:
        """Rebuild a monitor.

        Raises:
            ValueError: arrays and settings do not belong together.
        """
        own = settings["own"]
        monitor = cls(arrays["reference"], **{name: own[name] for name in _SETTINGS})
        ranked, counts = arrays["ranked"], arrays["counts"]
        monitor._bettor = Bettor.from_settings(settings["bettor"])
        missing = len(monitor.reference) + monitor._bettor.steps - len(ranked)
        if missing or counts.shape != monitor._counts.shape:
            raise ValueError(f"{len(ranked)} scores and {counts.shape} counts")
        monitor._ranks = OnlineRanks(ranked)
        monitor._counts, monitor._recent = counts.astype(np.int64), arrays["recent"]
        monitor._n, monitor._refused = int(settings["n"]), int(settings["refused"])
        monitor._invalid, monitor._epoch = int(settings["invalid"]), int(settings["epoch"])
        if min(monitor._n, monitor._refused, monitor._invalid, monitor._epoch) < 0:
            raise ValueError("a count below 0")
        monitor._alarm_at = settings["alarm_at"]
        monitor._alarm_direction = str(settings["alarm_direction"])
        monitor._highest_before = float(settings["highest_before"])
        monitor._generator.bit_generator.state = settings["generator"]
        return monitor


def _rate(refused: int, n: int) -> Metric | None:
    return clopper_pearson(refused, n) if n else None


def _scores(scores: Array | Tensor | float | Sequence[float]) -> Floats:
    if isinstance(scores, Tensor):
        scores = scores.detach().double().cpu().numpy()
    values = np.atleast_1d(np.asarray(scores, dtype=np.float64))
    if values.ndim != 1:
        raise InvalidInputError(f"got scores of shape {values.shape}; needed one or (B,)")
    return values

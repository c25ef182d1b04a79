"""Counters and histograms of one server, in Prometheus' text format and in their own registry."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product

from ebm_guard.deploy.serve.refusal import STATUS
from ebm_guard.gate import Decision, DriftMonitor
from ebm_guard.gate.decision import INVALID, STATUS_NAMES

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_WORDS = {name: name.lower() for name in STATUS_NAMES.values()}


class Metrics:
    """What ``/metrics`` shows. Nothing is kept outside this object.

    All names begin with ``ebm_guard_``. Counters of several replicas add up.

    Args:
        energy_edges: of the energy histogram.
    """

    def __init__(self, energy_edges: Sequence[float]) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self.registry = own = CollectorRegistry()
        ProcessCollector(registry=own)
        self._info = Gauge(
            "ebm_guard_artifact_info",
            "1 for each artefact that runs here.",
            ["role", "sha256", "model", "score", "version"],
            registry=own,
        )
        self._decisions = Counter(
            "ebm_guard_decisions", "Rows decided, by status.", ["status"], registry=own
        )
        self._responses = Counter(
            "ebm_guard_responses", "Answers of /predict, by HTTP status.", ["code"], registry=own
        )
        self._refused = Counter(
            "ebm_guard_refused", "Requests without a decision.", ["reason"], registry=own
        )
        self._model_errors = Counter(
            "ebm_guard_model_errors", "Requests on which the model raised.", registry=own
        )
        self._shadow = Counter(
            "ebm_guard_shadow_rows",
            "Rows by the status of the live gate and of the one in the shadow.",
            ["live", "shadow"],
            registry=own,
        )
        self._shadow_labels = Counter(
            "ebm_guard_shadow_labels_differ", "Rows valid to both with another label.", registry=own
        )
        self._shadow_errors = Counter(
            "ebm_guard_shadow_errors", "Batches on which the gate in the shadow raised.",
            registry=own,
        )  # fmt: skip
        self._energy = Histogram(
            "ebm_guard_energy", "E(x) of valid rows.", buckets=tuple(energy_edges), registry=own
        )
        self._seconds = Histogram(
            "ebm_guard_request_seconds", "From the first byte to the answer.", buckets=_SECONDS,
            registry=own,
        )  # fmt: skip
        self._model_seconds = Histogram(
            "ebm_guard_model_seconds", "One batch: model and gate.", buckets=_SECONDS, registry=own
        )
        self._rows = Histogram(
            "ebm_guard_batch_rows", "Rows of a batch.", buckets=_ROWS, registry=own
        )
        for word in _WORDS.values():
            self._decisions.labels(word)
        for reason in STATUS:
            self._refused.labels(reason)

    def artifact(self, role: str, facts: Mapping[str, str]) -> None:
        """Name an artefact: ``live`` or ``shadow``."""
        self._info.labels(role=role, **facts).set(1)
        if role == "shadow":
            for one, other in product(_WORDS.values(), repeat=2):
                self._shadow.labels(one, other)

    def gauge(self, name: str, words: str, value: Callable[[], float]) -> None:
        """Show a number that is read when it is asked for."""
        from prometheus_client import Gauge

        Gauge(f"ebm_guard_{name}", words, registry=self.registry).set_function(value)

    def watch(self, monitor: DriftMonitor) -> None:
        """Show where a drift monitor stands."""
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "alarm": ("1 once drift was found.", lambda: float(monitor.state.alarm)),
            "wealth": ("Evidence for drift now.", lambda: monitor.state.wealth),
            "highest": ("Highest evidence so far.", lambda: monitor.state.highest),
            "line": ("Evidence at which the alarm goes.", lambda: monitor.line),
            "scores": ("Scores seen.", lambda: float(monitor.state.n)),
        }
        for name, (words, value) in gauges.items():
            self.gauge(f"drift_{name}", words, value)

    def decided(self, decision: Decision, seconds: float) -> None:
        """Count a batch."""
        self._rows.observe(len(decision))
        self._model_seconds.observe(seconds)
        for status, energy in zip(decision.status.tolist(), decision.energy.tolist(), strict=True):
            self._decisions.labels(_WORDS[STATUS_NAMES[status]]).inc()
            if status != INVALID and math.isfinite(energy):
                self._energy.observe(energy)

    def failed(self, rows: int, *, invalid: bool) -> None:
        """Count a request on which the model raised, and its rows where they are answered."""
        self._model_errors.inc()
        if invalid:
            self._decisions.labels("invalid").inc(rows)

    def refused(self, reason: str) -> None:
        """Count a request without a decision."""
        self._refused.labels(reason).inc()

    def answered(self, code: int, seconds: float) -> None:
        """Count an answer of ``/predict``."""
        self._responses.labels(str(code)).inc()
        self._seconds.observe(seconds)

    def compared(self, live: Decision, shadow: Decision) -> None:
        """Count how the gate in the shadow would have decided."""
        labels = (live.label.tolist(), shadow.label.tolist())
        for one, other in zip(live.status.tolist(), shadow.status.tolist(), strict=True):
            self._shadow.labels(_WORDS[STATUS_NAMES[one]], _WORDS[STATUS_NAMES[other]]).inc()
        differ = sum(a != b and min(a, b) >= 0 for a, b in zip(*labels, strict=True))
        self._shadow_labels.inc(differ)

    def shadow_failed(self) -> None:
        """Count a batch on which the gate in the shadow raised."""
        self._shadow_errors.inc()

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)

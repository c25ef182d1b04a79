"""The ``/metrics`` pages of many replicas, put together: counters, histograms, drift."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.gate.drift.distances import clopper_pearson
from ebm_guard.gate.drift.evidence import MergedEvidence, merge_evidence
from ebm_guard.intervals import Metric

_OURS = "ebm_guard_"
# Gauges that add up; of the others a sum says nothing.
_ADDED = ("ebm_guard_queue_depth", "ebm_guard_requests_inside")
_DRIFT = ("ebm_guard_drift_highest", "ebm_guard_drift_wealth", "ebm_guard_drift_line")
_INFO = "ebm_guard_artifact_info"
_STATUSES = ("accept", "reject", "invalid")


@dataclass(frozen=True)
class MergedScrapes:
    """What the servers of one gate counted together.

    Args:
        replicas: pages that were merged.
        totals: sample name with its labels -> sum: counters, the buckets, counts and sums of
            histograms, and the two gauges that add up (requests inside and waiting).
        artifacts: hash of a live artefact -> replicas that answer with it; more than one while
            an artefact is rolled out.
        reject_rate: share of decided rows that were refused, invalid ones included, or None.
        evidence: of the drift monitors together, or None where no page shows one.
    """

    replicas: int
    totals: Mapping[str, float]
    artifacts: Mapping[str, int]
    reject_rate: Metric | None
    evidence: MergedEvidence | None

    @property
    def sentence(self) -> str:
        """The figures in plain words."""
        parts = [f"{self.replicas:,} replicas with {len(self.artifacts)} live artefact(s)."]
        rate = self.reject_rate
        if rate is not None:
            parts.append(
                f"{rate.value:.2%} [{rate.low:.2%}, {rate.high:.2%}] of {rate.n:,} rows were "
                "refused."
            )
        if self.evidence is not None:
            parts.append(self.evidence.sentence)
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {
            "replicas": self.replicas,
            "totals": dict(self.totals),
            "artifacts": dict(self.artifacts),
            "reject_rate": None if self.reject_rate is None else self.reject_rate.to_dict(),
            "evidence": None if self.evidence is None else self.evidence.to_dict(),
            "sentence": self.sentence,
        }


@dataclass
class _Sums:
    parts: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    artifacts: Counter[str] = field(default_factory=Counter)
    drift: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in _DRIFT})
    edges: dict[str, frozenset[str]] = field(default_factory=dict)


def merge_scrapes(texts: Iterable[str], *, replicas: int | None = None) -> MergedScrapes:
    """Add up the ``/metrics`` pages of the replicas of one gate, and merge their drift evidence.

    Counts are whole numbers below 2^53, so their sums are exactly those of one server that had
    seen all requests; sums of seconds and of energies are rounded once. Where every page shows
    the same edges, so are histograms. A counter starts at 0 when its server starts: for sums over
    restarts keep the last page of each server that ended, and give it too.

    Args:
        texts: one page for each replica; held one at a time.
        replicas: how many will ever have run, see
            :func:`~ebm_guard.gate.drift.evidence.merge_evidence`.

    Raises:
        InvalidInputError: no page, or ``prometheus_client`` (extra ``serve``) is not installed.
        DataError: a page cannot be read, is no page of this server, or has other edges or another
            drift line than the pages before it.

    Example:
        >>> page = '''# TYPE ebm_guard_decisions_total counter
        ... ebm_guard_decisions_total{status="accept"} 95.0
        ... ebm_guard_decisions_total{status="reject"} 5.0
        ... ebm_guard_decisions_total{status="invalid"} 0.0
        ... '''
        >>> merged = merge_scrapes([page, page])
        >>> merged.totals['ebm_guard_decisions_total{status="accept"}'], merged.reject_rate.value
        (190.0, 0.05)
    """
    sums, count = _Sums(), 0
    for text in texts:
        _add(sums, text, f"page {count}")
        count += 1
    if not count:
        raise InvalidInputError("got no pages to merge; needed the /metrics text of one replica")
    totals = {name: math.fsum(values) for name, values in sums.parts.items()}
    decided = [round(totals.get(_decisions(word), 0)) for word in _STATUSES]
    n = sum(decided)
    highest, wealth, lines = (sums.drift[name] for name in _DRIFT)
    evidence = None
    if highest:
        planned = count if replicas is None else replicas
        evidence = merge_evidence(highest, wealth, delta=1 / lines[0], replicas=planned)
    return MergedScrapes(
        replicas=count,
        totals=totals,
        artifacts=dict(sums.artifacts),
        reject_rate=clopper_pearson(n - decided[0], n) if n else None,
        evidence=evidence,
    )


def _decisions(word: str) -> str:
    return f'ebm_guard_decisions_total{{status="{word}"}}'


def _add(sums: _Sums, text: str, where: str) -> None:
    added: dict[str, float] = {}
    drift: dict[str, float] = {}
    edges: dict[str, set[str]] = defaultdict(set)
    for name, labels, value, kind in _samples(text, where):
        if name == _INFO and labels.get("role") == "live":
            sums.artifacts[labels.get("sha256", "")] += 1
        elif name in _DRIFT:
            drift[name] = value
        elif kind in ("counter", "histogram") or name in _ADDED:
            key = _key(name, labels)
            if key in added:
                raise DataError(f"{where} shows {key} twice; needed the page of one replica")
            added[key] = value
            if "le" in labels:
                edges[name].add(labels["le"])
    if not added:
        raise DataError(f"{where} shows no counter {_OURS}...; needed the text of /metrics")
    for key, value in added.items():
        sums.parts[key].append(value)
    for name, found in edges.items():
        if sums.edges.setdefault(name, frozenset(found)) != found:
            raise DataError(
                f"{where} counts {name} with other edges than the pages before; histograms add up "
                "only where all replicas run with the same energy_edges"
            )
    if drift:
        _add_drift(sums, drift, where)


def _add_drift(sums: _Sums, drift: Mapping[str, float], where: str) -> None:
    if len(drift) < len(_DRIFT):
        raise DataError(f"{where} shows {sorted(drift)}; needed all of {', '.join(_DRIFT)}")
    line = drift[_DRIFT[2]]
    if not (line > 1 and line == (sums.drift[_DRIFT[2]] or [line])[0]):
        raise DataError(
            f"{where} says that drift alarms at {line:g}; needed the same line, above 1, on all "
            "pages"
        )
    for name, value in drift.items():
        sums.drift[name].append(value)


def _key(name: str, labels: Mapping[str, str]) -> str:
    inner = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    return f"{name}{{{inner}}}" if inner else name


def _samples(text: str, where: str) -> Iterable[tuple[str, Mapping[str, str], float, str]]:
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError:
        raise InvalidInputError(
            "merging pages needs prometheus_client, which is not installed: "
            "pip install 'ebm-guard[serve]'"
        ) from None
    try:
        families = list(text_string_to_metric_families(text))
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise DataError(f"{where} is not in Prometheus' text format: {error}") from None
    for family in families:
        for sample in family.samples:
            if sample.name.startswith(_OURS) and not sample.name.endswith("_created"):
                least = -math.inf if sample.name.endswith("_sum") else 0.0
                if not (math.isfinite(sample.value) and sample.value >= least):
                    raise DataError(f"{where} says {sample.name} is {sample.value}")
                yield sample.name, sample.labels, float(sample.value), family.type

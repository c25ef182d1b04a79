"""Drift of live traffic: reject rate, PSI with its null value, KS, and a martingale that alarms.

Of many replicas: ``DriftMonitor.merge`` on their saved monitors, ``merge_scrapes`` on the text of
their ``/metrics``, ``merge_evidence`` on the bare numbers.
"""

from ebm_guard.gate.drift.distances import KS, PSI, clopper_pearson, ks, psi
from ebm_guard.gate.drift.evidence import MergedEvidence, merge_evidence
from ebm_guard.gate.drift.monitor import DriftMonitor
from ebm_guard.gate.drift.record import DriftReport, DriftState, MergedDrift
from ebm_guard.gate.drift.scrapes import MergedScrapes, merge_scrapes

__all__ = [
    "KS",
    "PSI",
    "DriftMonitor",
    "DriftReport",
    "DriftState",
    "MergedDrift",
    "MergedEvidence",
    "MergedScrapes",
    "clopper_pearson",
    "ks",
    "merge_evidence",
    "merge_scrapes",
    "psi",
]

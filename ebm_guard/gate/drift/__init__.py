"""Drift of live traffic: reject rate, PSI with its null value, KS, and a martingale that alarms."""

from ebm_guard.gate.drift.distances import KS, PSI, clopper_pearson, ks, psi
from ebm_guard.gate.drift.monitor import DriftMonitor
from ebm_guard.gate.drift.record import DriftReport, DriftState, MergedDrift

__all__ = [
    "KS",
    "PSI",
    "DriftMonitor",
    "DriftReport",
    "DriftState",
    "MergedDrift",
    "clopper_pearson",
    "ks",
    "psi",
]

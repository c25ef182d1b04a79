"""False alarms and delays of a fleet of drift monitors, simulated.

Quiet fleets: how often each rule alarms, ever, with the exact binomial test of "at most delta".
Drifting fleets: after how many scores each rule alarms. All replicas share one reference of 200
scores and one seed for ties, as servers of one artefact do; mirrored replicas see the same traffic.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from ebm_guard.gate import DriftMonitor
from ebm_guard.gate.drift.evidence import adjusted

sys.path.insert(0, str(Path(__file__).parent))
import fleet

DELTA, REFERENCE = 0.05, 200
LEVEL = 1e-3  # of the binomial test
QUIET = 100  # scores before a drift
Floats = fleet.Floats


def rules(wealth: Floats) -> dict[str, Floats]:
    """Return, for each rule, what it compares with 1 / delta, (T,) over time."""
    replicas = len(wealth)
    top = np.maximum.accumulate(wealth, axis=1)
    with np.errstate(over="ignore"):
        product = np.exp(np.log(wealth / fleet.CAPITAL).sum(axis=0))
    return {
        "merged": adjusted(top, replicas / DELTA / 0.9).mean(axis=0),
        "bonferroni": top.max(axis=0) / replicas,
        "mean_at_every_look": wealth.mean(axis=0),
        "any_alone": top.max(axis=0),
        "product": product,
    }


def quiet(replicas: int, steps: int, runs: int, *, mirrored: bool = False) -> dict[str, Any]:
    """Count the runs in which each rule ever alarms while nothing drifts."""
    alarms: dict[str, int] = defaultdict(int)
    alone = []
    for run in range(runs):
        rng = np.random.default_rng([run, replicas, mirrored])
        reference = rng.normal(size=REFERENCE)
        rows = rng.normal(size=(1 if mirrored else replicas, steps))
        wealth = fleet.play(reference, rows, rng)
        alone.append(float((wealth.max(axis=1) >= 1 / DELTA).mean()))
        wealth = np.broadcast_to(wealth, (replicas, steps))
        for name, values in rules(wealth).items():
            alarms[name] += bool((values >= 1 / DELTA).any())
        alarms["mean_at_one_look"] += bool(wealth[:, -1].mean() >= 1 / DELTA)
    tests = {}
    for name, count in alarms.items():
        p = float(binomtest(count, runs, DELTA, alternative="greater").pvalue)
        tests[name] = {"alarms": count, "p_value": p, "keeps_level": p > LEVEL}
    return {
        "replicas": replicas,
        "scores_each": steps,
        "runs": runs,
        "mirrored": mirrored,
        "replicas_that_alarm_alone": float(np.mean(alone)),
        "rules": tests,
    }


def drifting(shift: float, who: str, replicas: int, steps: int, runs: int) -> dict[str, Any]:
    """Return the median number of scores, of one replica, from the drift to each alarm."""
    delays: dict[str, list[float]] = defaultdict(list)
    for run in range(runs):
        rng = np.random.default_rng([run, replicas, 7])
        reference = rng.normal(size=REFERENCE)
        scores = rng.normal(size=(replicas, steps))
        scores[: 1 if who == "one" else replicas, QUIET:] += shift
        wealth = fleet.play(reference, scores, rng)
        found = rules(wealth)
        found["the_drifting_replica_alone"] = wealth[0]
        for name in ("merged", "bonferroni", "the_drifting_replica_alone"):
            delays[name].append(_delay(found[name]))
        delays["one_monitor_of_all_traffic"].append(_central(reference, scores))
    return {
        "shift_in_sd": shift,
        "drifting_replicas": who,
        "replicas": replicas,
        "runs": runs,
        "median_scores_of_a_replica_to_the_alarm": {
            name: None if np.isinf(middle := float(np.median(values))) else middle
            for name, values in delays.items()
        },
        "share_of_runs_with_an_alarm": {
            name: float(np.isfinite(values).mean()) for name, values in delays.items()
        },
    }


def _delay(values: Floats) -> float:
    over = np.flatnonzero(values >= 1 / DELTA)
    return float(over[0] + 1 - QUIET) if len(over) and over[0] >= QUIET else np.inf


def _central(reference: Floats, scores: Floats) -> float:
    monitor = DriftMonitor(reference, cut=1.6, delta=DELTA)
    replicas, steps = scores.shape
    for step in range(0, steps, 10):
        if monitor.update(scores[:, step : step + 10].T.ravel()).alarm:
            at = monitor.state.alarm_at
            late = np.ceil((at or 0) / replicas) - QUIET
            return float(late) if late > 0 else np.inf
    return np.inf


def measure(scale: float = 1.0) -> dict[str, Any]:
    """Run everything; ``scale`` multiplies the numbers of runs."""
    n = max(2, round(400 * scale))
    few = max(2, round(10 * scale))
    return {
        "delta": DELTA,
        "reference_scores": REFERENCE,
        "quiet": [
            quiet(10, 300, n),
            quiet(100, 300, n),
            quiet(1000, 300, n),
            quiet(1000, 300, n, mirrored=True),
        ],
        "drifting": [
            drifting(0.5, "all", 1000, 700, few),
            drifting(1.0, "all", 1000, 400, few),
            drifting(1.0, "one", 1000, 700, few),
            drifting(2.0, "one", 1000, 400, few),
        ],
    }

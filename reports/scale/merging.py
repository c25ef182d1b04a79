"""What it costs to put 1,000 replicas together: pages of /metrics, and saved monitors."""

from __future__ import annotations

import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ebm_guard.deploy.serve.metrics import Metrics
from ebm_guard.deploy.serve.settings import ENERGY_EDGES
from ebm_guard.gate import ACCEPT, REJECT, Decision, DriftMonitor
from ebm_guard.gate.drift import merge_scrapes

REFERENCE, SCORES = 5000, 1000
SIZES = (10, 100, 1000)


def page(rng: np.random.Generator, reference: np.ndarray) -> tuple[str, DriftMonitor]:
    metrics, monitor = Metrics(ENERGY_EDGES), DriftMonitor(reference, cut=1.6)
    facts = {"sha256": "0" * 64, "model": "ResNet", "score": "energy", "version": "0"}
    metrics.artifact("live", facts)
    metrics.watch(monitor)
    scores = rng.normal(size=SCORES)
    monitor.update(scores)
    ones = torch.ones(SCORES, dtype=torch.float64)
    decision = Decision(
        status=torch.where(torch.tensor(scores) <= 1.6, ACCEPT, REJECT).to(torch.int8),
        label=torch.zeros(SCORES, dtype=torch.int64),
        confidence=ones, energy=torch.tensor(scores), score=torch.tensor(scores), p_value=ones,
        logits=torch.zeros(SCORES, 2), cut=ones, certified=torch.ones(SCORES, dtype=torch.bool),
    )  # fmt: skip
    metrics.decided(decision, 0.01)
    for _ in range(SCORES):
        metrics.answered(200, 0.01)
    return metrics.text().decode(), monitor


def measure() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=REFERENCE)
    made = [page(rng, reference) for _ in range(20)]
    found: dict[str, Any] = {
        "reference_scores": REFERENCE,
        "scores_of_a_replica": SCORES,
        "page_bytes": len(made[0][0]),
        "series_of_a_page": sum(not line.startswith("#") for line in made[0][0].splitlines()),
    }
    merge_scrapes([made[0][0]])  # the parser is imported at the first page
    with tempfile.TemporaryDirectory() as name:
        paths = [
            monitor.save(Path(name) / f"{place}.safetensors")
            for place, (_, monitor) in enumerate(made)
        ]
        found["saved_monitor_bytes"] = paths[0].stat().st_size
        for size in SIZES:
            start = time.process_time()
            merge_scrapes(islice(cycle(text for text, _ in made), size))
            middle = time.process_time()
            DriftMonitor.merge(map(DriftMonitor.load, islice(cycle(paths), size)))
            found[f"{size} replicas"] = {
                "pages_cpu_seconds": middle - start,
                "saved_monitors_cpu_seconds": time.process_time() - middle,
            }
    start = time.process_time()
    monitor = made[0][1]
    for score in rng.normal(size=2000):
        monitor.update(score)
    found["monitor_cpu_seconds_per_million_scores_one_by_one"] = (
        (time.process_time() - start) / 2000 * 1e6
    )
    start = time.process_time()
    for _ in range(100):
        monitor.update(rng.normal(size=64))
    found["monitor_cpu_seconds_per_million_scores_by_64"] = (
        (time.process_time() - start) / 6400 * 1e6
    )
    return found

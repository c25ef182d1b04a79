"""What calibration costs against scikit-learn, torchmetrics and relplot: CPU time, paired ratios.

Run: OMP_NUM_THREADS=1 python tests/benchmarks/bench_calibration.py [--rounds 5] [--rows 1000000]
     [--relplot-python PYTHON] [--output FILE.json]

Each round times ours and theirs one after the other, in an order that alternates, in process CPU
seconds on one thread; the ratio theirs / ours is taken within the round, and the median is given.
relplot runs in a process of its own, as it may be installed elsewhere: the process is timed inside.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from ebm_guard.calibration import TemperatureScaling, row_statistics
from ebm_guard.calibration.cells import CellTable
from ebm_guard.calibration.metrics import (
    accuracy,
    brier,
    calibration_metrics,
    class_table,
    ece,
    ece_classwise,
    nll,
    smooth_ece_value,
)

BINS = 15

RELPLOT = """
import sys, time, warnings
warnings.simplefilter("ignore")
import numpy as np
import relplot
stored = np.load(sys.argv[1])
confidence, correct = stored["confidence"], stored["correct"].astype(float)
relplot.smECE(confidence[:1000], correct[:1000])
for _ in range(int(sys.argv[2])):
    start = time.process_time()
    value = relplot.smECE(confidence, correct)
    print(time.process_time() - start, value)
"""


def cpu(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def paired(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> dict:
    ours()
    times: dict[Callable[[], object], list[float]] = {ours: [], theirs: []}
    for number in range(rounds):
        for run in (ours, theirs) if number % 2 == 0 else (theirs, ours):
            times[run].append(cpu(run))
    ratios = [their / our for their, our in zip(times[theirs], times[ours], strict=True)]
    return {
        "ours_cpu_s": round(statistics.median(times[ours]), 4),
        "theirs_cpu_s": round(statistics.median(times[theirs]), 4),
        "ratio_median": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
    }


def sample(rows: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of an overconfident network: labels drawn at T = 1.7."""
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((rows, classes), dtype=np.float32)
    noise = 1.7 * rng.gumbel(size=logits.shape)
    return logits, (logits + noise).argmax(axis=1)


def bench_temperature(logits: np.ndarray, labels: np.ndarray, rounds: int) -> dict:
    """Against what scikit-learn's users call, and against the fit inside it alone."""
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.calibration import CalibratedClassifierCV, _TemperatureScaling
    from sklearn.frozen import FrozenEstimator

    class Logits(ClassifierMixin, BaseEstimator):
        """The fitted classifier that scikit-learn wants: its logits are its input."""

        def fit(self, x: np.ndarray, y: np.ndarray) -> Logits:
            self.classes_ = np.unique(y)
            return self

        def decision_function(self, x: np.ndarray) -> np.ndarray:
            return x

        def predict(self, x: np.ndarray) -> np.ndarray:
            return x.argmax(axis=1)

    frozen = FrozenEstimator(Logits().fit(logits, labels))
    found = {}

    def public() -> None:
        CalibratedClassifierCV(frozen, method="temperature").fit(logits, labels)

    def inner() -> None:
        found["theirs"] = 1 / float(_TemperatureScaling().fit(logits, labels).beta_)

    def ours() -> None:
        found["ours"] = float(TemperatureScaling().fit(logits, labels).temperature)

    return {
        "CalibratedClassifierCV(FrozenEstimator)": paired(ours, public, rounds),
        "its private fit alone": paired(ours, inner, rounds),
        "temperatures": {name: round(t, 6) for name, t in found.items()},
    }


def bench_one_pass(logits: np.ndarray, labels: np.ndarray, rounds: int) -> dict:
    from torchmetrics.functional.classification import multiclass_calibration_error

    tensor, truth = torch.from_numpy(logits), torch.from_numpy(labels)
    probabilities = tensor.softmax(dim=1)
    found = {}

    def ours() -> None:
        rows = row_statistics(logits, labels)
        table = CellTable.of(rows, BINS)
        gaps = table.by_bin(table.gap.sum(axis=0))
        found["ours"] = float(np.abs(gaps).sum()) / len(rows)
        _ = nll(rows), brier(rows), accuracy(rows)

    def theirs(given: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            value = multiclass_calibration_error(
                given, truth, num_classes=logits.shape[1], n_bins=BINS
            )
            found["theirs"] = float(value)

        return run

    return {
        "theirs from logits": paired(ours, theirs(tensor), rounds),
        "theirs from a given softmax": paired(ours, theirs(probabilities), rounds),
        "values": {name: round(value, 6) for name, value in found.items()},
    }


def bench_bootstrap(logits: np.ndarray, labels: np.ndarray, rounds: int, draws: int) -> dict:
    from torchmetrics.classification import MulticlassCalibrationError
    from torchmetrics.wrappers import BootStrapper

    tensor, truth = torch.from_numpy(logits).softmax(dim=1), torch.from_numpy(labels)
    rows = row_statistics(logits, labels)

    def ours() -> None:
        ece(rows, draws=1000)

    def theirs() -> None:
        torch.manual_seed(0)
        metric = MulticlassCalibrationError(num_classes=logits.shape[1], n_bins=BINS)
        boot = BootStrapper(metric, num_bootstraps=draws, sampling_strategy="multinomial")
        boot.update(tensor, truth)
        boot.compute()

    result = paired(ours, theirs, rounds)
    scale = 1000 / draws
    for name in ("theirs_cpu_s", "ratio_median", "ratio_min"):
        result[name] = round(result[name] * scale, 1)
    note = (
        f"theirs: {draws} draws measured, scaled by {scale:g}; ours: 1,000 draws, interval and null"
    )
    return result | {"note": note}


def bench_smooth(logits: np.ndarray, labels: np.ndarray, rounds: int, python: str | None) -> dict:
    if python is None:
        return {"note": "not run: --relplot-python was not given"}
    rows = row_statistics(logits, labels)
    ours = [cpu(lambda: smooth_ece_value(rows)) for _ in range(rounds + 1)][1:]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npz"
        np.savez(path, confidence=rows.confidence, correct=rows.correct)
        done = subprocess.run(
            [python, "-c", RELPLOT, str(path), str(rounds)],
            check=True,
            capture_output=True,
            text=True,
        )
    lines = [line.split() for line in done.stdout.splitlines()]
    theirs = [float(line[0]) for line in lines]
    return {
        "ours_cpu_s": round(statistics.median(ours), 4),
        "theirs_cpu_s": round(statistics.median(theirs), 4),
        "ratio_median": round(statistics.median(theirs) / statistics.median(ours), 2),
        "ratio_min": round(min(theirs) / max(ours), 2),
        "values": {
            "ours": round(smooth_ece_value(rows), 6),
            "theirs": round(float(lines[0][1]), 6),
        },
        "note": "not paired: relplot runs in its own process",
    }


def bench_all(logits: np.ndarray, labels: np.ndarray) -> dict:
    rows = row_statistics(logits, labels)
    return {
        "row_statistics": round(cpu(lambda: row_statistics(logits, labels)), 3),
        "calibration_metrics": round(cpu(lambda: calibration_metrics(rows)), 3),
        "ece_classwise": round(cpu(lambda: ece_classwise(logits, labels)), 3),
        "class_table": round(cpu(lambda: class_table(rows, logits.shape[1])), 3),
    }


def memory() -> dict:
    """Peak of what Python and numpy allocate beyond the loaded logits, in MB."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((50_000, 1000), dtype=np.float32)
    labels = rng.integers(0, 1000, 50_000)
    tracemalloc.start()
    found = {}
    rows = row_statistics(logits, labels)
    found["row_statistics"] = tracemalloc.get_traced_memory()[1]
    calibration_metrics(rows)
    found["and calibration_metrics"] = tracemalloc.get_traced_memory()[1]
    class_table(rows, 1000)
    ece_classwise(logits, labels)
    found["and class_table, ece_classwise"] = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {name: round(value / 1e6) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--boot-draws", type=int, default=5)
    parser.add_argument("--relplot-python")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logits, labels = sample(arguments.rows, 10)
    rounds = arguments.rounds
    result = {
        "what": "CPU seconds, one thread; ratio = theirs / ours, paired",
        "rows": arguments.rows,
        "classes": 10,
        "rounds": rounds,
        "temperature, scikit-learn": bench_temperature(logits, labels, rounds),
        "ECE + NLL + Brier + accuracy, torchmetrics' ECE alone": bench_one_pass(
            logits, labels, rounds
        ),
        "bootstrap of the ECE, torchmetrics": bench_bootstrap(
            logits, labels, 2, arguments.boot_draws
        ),
        "smooth ECE, relplot": bench_smooth(logits, labels, rounds, arguments.relplot_python),
        "ours alone, CPU s": bench_all(logits, labels),
        "peak MB above 50,000 x 1,000 float32 logits": memory(),
        "versions": {name: version(name) for name in ("scikit-learn", "torchmetrics", "torch")},
        "machine": platform.machine(),
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

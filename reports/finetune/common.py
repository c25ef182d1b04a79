"""What the fine-tuning experiments share: evaluate a net, compare it with another, write a table."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ebm_guard import EnergyClassifier, Predictions, predict
from ebm_guard.calibration import row_statistics
from ebm_guard.calibration.calibrators import make_calibrator
from ebm_guard.calibration.metrics import accuracy, ece, nll
from ebm_guard.intervals import mean
from ebm_guard.model import Preprocessing
from ebm_guard.ood.metrics import auroc, auroc_difference, fpr95
from ebm_guard.training import FinetuneResult


@dataclass(frozen=True)
class Sets:
    """Where a net is judged; nothing here was seen in training or in the acceptance test.

    Args:
        pixels: (N, C, H, W) in [0, 1] of the known classes.
        labels: (N,) int64.
        half: rows that fit the temperature; all others are judged after it.
        ood: pixels by name.
        natural: names of the sets of real images.
    """

    pixels: Tensor
    labels: Tensor
    half: NDArray[np.int64]
    ood: Mapping[str, Tensor]
    natural: tuple[str, ...]


@dataclass(frozen=True)
class Judged:
    """What a net said about all sets."""

    logits: NDArray[np.float32]
    energy: NDArray[np.float64]
    ood: Mapping[str, NDArray[np.float64]]


def judge(net: nn.Module, sets: Sets, batch_size: int = 250) -> Judged:
    """Run a net over all sets."""
    classifier = EnergyClassifier(net, preprocessing=Preprocessing.from_model(net))

    def rows(pixels: Tensor) -> Predictions:
        parts = (classifier.pixels(part) for part in pixels.split(batch_size))
        return predict(classifier, parts)

    known = rows(sets.pixels)
    return Judged(
        np.asarray(known.logits),
        _energy(known.logits),
        {name: _energy(rows(pixels).logits) for name, pixels in sets.ood.items()},
    )


def _energy(logits: Any) -> NDArray[np.float64]:
    return -np.logaddexp.reduce(np.asarray(logits, dtype=np.float64), axis=1)


def figures(judged: Judged, sets: Sets) -> dict[str, Any]:
    """Return accuracy, NLL and ECE before and after temperature, and AUROC and FPR95 per set."""
    labels = sets.labels.numpy()
    rest = np.setdiff1d(np.arange(len(labels)), sets.half)
    temperature = make_calibrator("temperature").fit(judged.logits[sets.half], labels[sets.half])
    before = row_statistics(judged.logits[rest], labels[rest])
    after = row_statistics(judged.logits[rest], labels[rest], float(temperature.temperature))
    everything = row_statistics(judged.logits, labels)
    return {
        "accuracy": accuracy(everything).value,
        "nll": nll(before).value,
        "nll_after_temperature": nll(after).value,
        "ece": ece(before).value,
        "ece_after_temperature": ece(after).value,
        "temperature": float(temperature.temperature),
        "auroc": {name: auroc(judged.energy, part).value for name, part in judged.ood.items()},
        "fpr95": {name: fpr95(judged.energy, part).value for name, part in judged.ood.items()},
    }


def against(
    judged: Judged,
    control: Judged,
    sets: Sets,
    groups: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[str, Any]:
    """Return differences to a control with paired 95 % intervals: judged minus control.

    Args:
        judged: the net in question.
        control: the net that it is compared with, on the same rows.
        sets: these rows.
        groups: OOD sets whose mean AUROC is compared, by name; default: the natural ones, and all.
    """
    labels = sets.labels.numpy()
    right = [(part.logits.argmax(axis=1) == labels).astype(float) for part in (judged, control)]

    def area(names: tuple[str, ...]) -> dict[str, Any]:
        ours, theirs = ([part.ood[name] for name in names] for part in (judged, control))
        return auroc_difference(judged.energy, control.energy, ours, theirs).to_dict()

    every = tuple(sets.ood)
    groups = groups or {"auroc_natural": sets.natural, "auroc_all": every}
    return {
        "accuracy": mean(right[0] - right[1]).to_dict(),
        **{group: area(names) for group, names in groups.items()},
        "auroc": {name: area((name,)) for name in every},
    }


def outcome(result: FinetuneResult, clock: Clock) -> dict[str, Any]:
    """Return what a run came to, beside its figures."""
    return {
        "status": result.status,
        "reason": result.reason,
        "trained": result.candidate is not None,
        "density": None if result.density is None else result.density.reason or "offered",
        "cpu_seconds": clock.seconds,
        "settings": result.settings,
    }


def compared(
    facts: Mapping[str, Mapping[str, Any]], judged: Mapping[str, Judged], sets: Sets, control: str
) -> dict[str, Any]:
    """Return facts and figures of every arm, with its differences to the control."""
    return {
        arm: facts[arm]
        | figures(part, sets)
        | {"against_control": against(part, judged[control], sets)}
        for arm, part in judged.items()
    }


def status(row: Mapping[str, Any]) -> str:
    """Return the verdict in a word or two; a run without any usable state is named."""
    return row["status"] if row.get("trained", True) else "no usable state"


class Clock:
    """CPU seconds of a block, all threads of this process."""

    def __enter__(self) -> Clock:
        self._start = time.process_time()
        return self

    def __exit__(self, *problem: object) -> None:
        self.seconds = time.process_time() - self._start


def environment() -> dict[str, Any]:
    """Return what the figures hang on besides the seed."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def read_images(path: Path, name: str = "images") -> Tensor:
    """Read uint8 images (N, H, W[, C]) as pixels (N, C, H, W) in [0, 1]."""
    with np.load(path) as stored:
        images = stored[name]
    images = images[..., None] if images.ndim == 3 else images
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 255


def read_labels(path: Path, name: str = "labels") -> Tensor:
    """Read labels (N,) int64."""
    with np.load(path) as stored:
        return torch.from_numpy(stored[name]).long()


def write(folder: Path, content: dict[str, Any], text: str) -> None:
    """Write results.json and README.md."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment()} | content
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(text, encoding="utf-8")


def signed(metric: Mapping[str, Any], digits: int = 1) -> str:
    """Return a difference with its interval, in points."""
    value, low, high = (100 * metric[key] for key in ("value", "low", "high"))
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"

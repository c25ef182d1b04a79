"""How a report was made: model, data, preprocessing, environment, time."""

from __future__ import annotations

import platform
import socket
import time
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from ebm_guard.model import EnergyClassifier, Preprocessing
from ebm_guard.predictions import Predictions
from ebm_guard.report.record import DataSet, ModelCard


def run_facts(started: datetime, clock: float) -> dict[str, Any]:
    """Return when, where and how long; the only part of a report that differs between runs."""
    return {
        "started": started.isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "wall_seconds": round(time.perf_counter() - clock, 3),
        "peak_memory_mb": _peak_memory(),
    }


def data_set(part: Predictions, role: str) -> DataSet:
    """Describe a set of rows."""
    notes = part.notes
    foreign = role.endswith("ood")
    return DataSet(
        spec=part.source,
        role=role,
        n=len(part),
        labelled=part.labels is not None,
        skipped=len(part.skipped),
        skipped_examples=[{"id": name, "error": error} for name, error in part.skipped[:5]],
        num_classes=None if foreign else part.num_classes,
        classes=None if foreign or part.classes is None else list(part.classes),
        class_match=str(notes.get("class_match", "labels are taken as class numbers")),
        fingerprint=part.fingerprint,
        limit=notes.get("limit"),
    )


def model_card(evaluation: Predictions, classifier: EnergyClassifier | None) -> ModelCard:
    """Return what is known of the model."""
    if classifier is None:
        return ModelCard("stored predictions", evaluation.source, evaluation.num_classes)
    head = classifier.head
    return ModelCard(
        name=classifier.name,
        source=type(classifier.model).__name__,
        num_classes=evaluation.num_classes,
        num_parameters=classifier.num_parameters,
        weights_sha256=classifier.weights_hash(),
        head=None if head is None else {"found": head.found, "message": head.message},
        loss_note=classifier.loss_note,
    )


def _peak_memory() -> float | None:
    """Return the most memory that this process has held, in MB, where the system tells."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kilobytes, macOS bytes.
    return round(peak / (1024 if platform.system() == "Linux" else 1024**2), 1)


def preprocessing_facts(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return the preprocessing as JSON types."""
    size = preprocessing.image_size
    resize = None if size is None else [int(side / preprocessing.crop_pct) for side in size]
    return {
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "image_size": None if size is None else list(size),
        "resize_size": resize,
        "interpolation": preprocessing.interpolation,
        "channels": preprocessing.channels,
        "source": preprocessing.source,
    }


def environment_facts(
    evaluation: Predictions, classifier: EnergyClassifier | None
) -> dict[str, Any]:
    """Return versions, device and dtype."""
    try:
        timm = version("timm")
    except PackageNotFoundError:
        timm = None
    device = None if classifier is None else classifier.device
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "timm": timm,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": "none: stored predictions" if classifier is None else str(device or "unknown"),
        "dtype": evaluation.dtype,
    }

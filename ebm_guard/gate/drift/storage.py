"""A monitor's state to one file and back: the arrays, and the rest as JSON, under one hash."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from ebm_guard.errors import ArtifactError
from ebm_guard.gate.artifact import read_artifact, write_artifact

SCHEMA = "ebm_guard.drift_monitor/1"


def write_monitor(
    path: str | Path, arrays: Mapping[str, NDArray[Any]], settings: Mapping[str, Any]
) -> Path:
    """Write a monitor's state as one ``.safetensors`` file, all of it or nothing.

    Raises:
        DataError: the place cannot be written.
    """
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    write_artifact(path, tensors, {"schema": SCHEMA, "monitor": dict(settings)})
    return Path(path)


def read_monitor(path: str | Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read what :func:`write_monitor` wrote; nothing is unpickled.

    Raises:
        ArtifactError: missing, damaged, edited, or not a monitor.
    """
    tensors, manifest = read_artifact(path, schemas=(SCHEMA,), what="drift monitor")
    settings = manifest.get("monitor")
    if not isinstance(settings, dict):
        raise ArtifactError(f"{path} holds no drift monitor; needed a file of DriftMonitor.save")
    return {name: tensor.numpy() for name, tensor in tensors.items()}, settings

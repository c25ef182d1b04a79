"""The guard in other people's tools: Lightning, Hugging Face's Trainer, scikit-learn.

Each name needs the library that it serves, and imports it on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "GuardedClassifier": "ebm_guard.faces.scikit",
    "LightningMonitor": "ebm_guard.faces.lightning",
    "TrainerMonitor": "ebm_guard.faces.trainer",
    "energy_metrics": "ebm_guard.faces.trainer",
}

__all__ = ["GuardedClassifier", "LightningMonitor", "TrainerMonitor", "energy_metrics"]


def __getattr__(name: str) -> Any:
    """Import a face on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ebm_guard.faces' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the faces."""
    return sorted(__all__)

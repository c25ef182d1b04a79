"""Make a trained classifier trustworthy: energy, calibration, OOD scores, and a gate.

>>> import ebm_guard
>>> guard = ebm_guard.wrap(model)                      # doctest: +SKIP
>>> guard.fit(validation_loader)                       # doctest: +SKIP
>>> decision = guard(images)                           # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebm_guard.deploy import Exported, export, load_exported
    from ebm_guard.gate import ACCEPT, INVALID, REJECT, Decision, Guard, wrap
    from ebm_guard.model import EnergyClassifier, EnergyEnsemble, Preprocessing
    from ebm_guard.predictions import Predictions, predict
    from ebm_guard.report import Report, build_report
    from ebm_guard.robustness import AttackOptions, evaluate_robustness
    from ebm_guard.sampling import SampleSheet, sample
    from ebm_guard.training import FinetuneResult, finetune

# Names load on first use (PEP 562): `import ebm_guard` imports neither torch nor matplotlib.
_HOMES = {
    "ACCEPT": "ebm_guard.gate",
    "INVALID": "ebm_guard.gate",
    "REJECT": "ebm_guard.gate",
    "Decision": "ebm_guard.gate",
    "Guard": "ebm_guard.gate",
    "wrap": "ebm_guard.gate",
    "Exported": "ebm_guard.deploy",
    "export": "ebm_guard.deploy",
    "load_exported": "ebm_guard.deploy",
    "EnergyClassifier": "ebm_guard.model",
    "EnergyEnsemble": "ebm_guard.model",
    "Preprocessing": "ebm_guard.model",
    "Predictions": "ebm_guard.predictions",
    "predict": "ebm_guard.predictions",
    "Report": "ebm_guard.report",
    "build_report": "ebm_guard.report",
    "AttackOptions": "ebm_guard.robustness",
    "evaluate_robustness": "ebm_guard.robustness",
    "SampleSheet": "ebm_guard.sampling",
    "sample": "ebm_guard.sampling",
    "FinetuneResult": "ebm_guard.training",
    "finetune": "ebm_guard.training",
}

__all__ = [
    "ACCEPT",
    "INVALID",
    "REJECT",
    "AttackOptions",
    "Decision",
    "EnergyClassifier",
    "EnergyEnsemble",
    "Exported",
    "FinetuneResult",
    "Guard",
    "Predictions",
    "Preprocessing",
    "Report",
    "SampleSheet",
    "build_report",
    "evaluate_robustness",
    "export",
    "finetune",
    "load_exported",
    "predict",
    "sample",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name == "__version__":
        from importlib.metadata import version

        return version("ebm-guard")
    if name not in _HOMES:
        raise AttributeError(f"module 'ebm_guard' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted([*__all__, "__version__"])

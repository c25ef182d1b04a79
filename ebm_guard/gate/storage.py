"""A guard to its artefact and back, with the proof that it belongs to the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebm_guard import registry
from ebm_guard.calibration.calibrators import Calibrator, describe_facts
from ebm_guard.errors import ArtifactError, EbmGuardError, first_line
from ebm_guard.gate.artifact import SCHEMA, Canary, read_artifact, write_artifact
from ebm_guard.gate.thresholds import Threshold
from ebm_guard.model import EnergyClassifier, Preprocessing
from ebm_guard.ood import Score
from ebm_guard.precision import KeepDouble


@dataclass(frozen=True)
class GuardState:
    """All that a fitted guard consists of.

    Args:
        score: the OOD score.
        threshold: the cut on it.
        calibrator: of the confidence, or None.
        canary: inputs with their logits, or None.
        facts: what it was fitted on.
        classifier: the wrapped model, or None.
    """

    score: Score
    threshold: Threshold
    calibrator: Calibrator | None
    canary: Canary | None
    facts: Mapping[str, Any]
    classifier: EnergyClassifier | None


def write_state(guard: GuardState, path: str | Path) -> Path:
    """Write a fitted guard as one artefact.

    Raises:
        DataError: the place cannot be written; nothing is left behind.
    """
    parts: dict[str, KeepDouble] = {"score": guard.score, "threshold": guard.threshold}
    if guard.calibrator is not None:
        parts["calibrator"] = guard.calibrator
    tensors = {
        f"{part}.{name}": value
        for part, module in parts.items()
        for name, value in module.state_dict().items()
    }
    if guard.canary is not None:
        tensors |= {"canary.inputs": guard.canary.inputs, "canary.logits": guard.canary.logits}
    path = Path(path)
    write_artifact(path, tensors, manifest_of(guard))
    return path


def manifest_of(guard: GuardState) -> dict[str, Any]:
    """Return all that an artefact says about a fitted guard, as JSON types."""
    threshold = guard.threshold
    classifier = guard.classifier
    preprocessing = None if classifier is None else classifier.preprocessing
    calibrator = guard.calibrator
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"ebm_guard": version("ebm-guard"), "torch": torch.__version__},
        "model": {
            "name": None if classifier is None else classifier.name,
            "weights_sha256": None if classifier is None else classifier.weights_hash(),
        },
        "score": {"name": guard.score.name, "settings": guard.score.settings()},
        "calibrator": None
        if calibrator is None
        else {
            "name": calibrator.name,
            "settings": calibrator.settings(),
            "facts": calibrator.facts(),
        },
        "threshold": threshold.settings() | {"n": threshold.n, "cut": float(threshold.cut)},
        "guarantee": threshold.guarantee,
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
        "canary": None if guard.canary is None else {"device": guard.canary.device},
        "facts": dict(guard.facts),
    }


def read_state(
    path: str | Path,
    model: Callable[..., Any] | None,
    logits: Callable[[Any], Tensor] | None,
) -> GuardState:
    """Read an artefact, and prove that it belongs to the model, where one is given.

    Raises:
        ArtifactError: damaged, edited, incomplete, or of another model.
    """
    tensors, manifest = read_artifact(path)
    try:
        state = _rebuilt(tensors, manifest)
        stored = manifest["preprocessing"]
        preprocessing = None if stored is None else Preprocessing.from_dict(stored)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ArtifactError(
            f"{path} lacks what this version needs ({error}); fit the guard again"
        ) from None
    if model is None:
        return state
    classifier = EnergyClassifier(model, logits=logits, preprocessing=preprocessing)
    _verify(Path(path), state.canary, classifier, manifest)
    return replace(state, classifier=classifier)


def describe_manifest(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return an artefact's manifest as (word, sentence) rows."""
    threshold, calibrator, facts = (
        manifest["threshold"],
        manifest["calibrator"],
        manifest["facts"],
    )
    if calibrator is None:
        calibrated = "none: fitted without labels, confidence is the plain softmax probability"
    else:
        # Guards of version 0.1.0 hold no facts beside the settings.
        calibrated = describe_facts(calibrator.get("facts", _first_facts(calibrator)))
    weights = manifest["model"]["weights_sha256"]
    canary = "8 stored inputs" if manifest["canary"] else "none"
    return [
        ("model", f"{manifest['model']['name'] or 'none, stored logits'}"),
        ("weights", weights or "not known (no module)"),
        ("classes", str(facts["num_classes"])),
        ("fitted on", f"{facts['n']:,} rows of {facts['source']} ({facts['dtype']} logits)"),
        ("score", f"{manifest['score']['name']} {manifest['score']['settings'] or ''}".strip()),
        ("threshold", f"{threshold['cut']:.6g} ({threshold['method']}, rank {threshold['rank']})"),
        ("guarantee", manifest["guarantee"]),
        ("calibrator", calibrated),
        ("canary", canary),
        ("created", f"{manifest['created']} by ebm_guard {manifest['versions']['ebm_guard']}"),
    ]


def _first_facts(calibrator: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": calibrator["name"], **calibrator["settings"]}


def _rebuilt(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> GuardState:
    for name in ("model", "facts", "score", "threshold"):
        if not isinstance(manifest[name], dict):
            raise TypeError(f"{name} is {manifest[name]!r}")
    if "weights_sha256" not in manifest["model"] or "num_classes" not in manifest["facts"]:
        raise KeyError("weights_sha256 or num_classes")
    score, calibrator, canary = manifest["score"], manifest["calibrator"], manifest["canary"]
    score_class: type[Score] = registry.get("score", score["name"]).load()
    fitted: Calibrator | None = None
    if calibrator is not None:
        kind: type[Calibrator] = registry.get("calibrator", calibrator["name"]).load()
        fitted = kind.from_state(_part(tensors, "calibrator"), calibrator["settings"])
    return GuardState(
        score=score_class.from_state(_part(tensors, "score"), score["settings"]),
        threshold=Threshold.from_state(_part(tensors, "threshold"), manifest["threshold"]),
        calibrator=fitted,
        canary=None
        if canary is None
        else Canary(tensors["canary.inputs"], tensors["canary.logits"], canary["device"]),
        facts=manifest["facts"],
        classifier=None,
    )


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = f"{part}."
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _verify(
    path: Path, canary: Canary | None, classifier: EnergyClassifier, manifest: Mapping[str, Any]
) -> None:
    model, classes = manifest["model"], manifest["facts"]["num_classes"]
    found = classifier.weights_hash()
    if model["weights_sha256"] != found:
        raise ArtifactError(
            f"{path} was fitted on {model['name']} ({classes} classes) with weights "
            f"{_short(model['weights_sha256'])}; "
            f"this {classifier.name} has {_short(found)}. Its threshold means nothing here: load "
            "the model it was fitted on, or fit a new guard"
        )
    if canary is None:
        return
    logits = _run_canary(path, canary, classifier)
    if logits.shape != canary.logits.shape:
        raise ArtifactError(
            f"{path} was fitted on {model['name']} with {classes} classes; this "
            f"{classifier.name} has {logits.shape[1]}"
        )
    if logits.dtype != canary.logits.dtype:
        raise ArtifactError(
            f"{path} was fitted on {canary.logits.dtype} logits; this model gives {logits.dtype}. "
            "Fit and serve in the same dtype"
        )
    difference, allowed = canary.difference(logits), canary.tolerance(logits.device.type)
    if not difference <= allowed:
        raise ArtifactError(
            f"{path}: this model has the right weights but gives other logits for the stored "
            f"canary inputs (relative difference {difference:.2g}, allowed {allowed:.0e}): its "
            "code, its `logits=` callable, or its settings changed. Fit a new guard"
        )


def _short(weights: str | None) -> str:
    return "none" if weights is None else f"{weights[:19]}..."


def _run_canary(path: Path, canary: Canary, classifier: EnergyClassifier) -> Tensor:
    try:
        with torch.no_grad():
            return classifier(canary.inputs)
    except (EbmGuardError, Warning):
        raise
    except Exception as error:
        raise ArtifactError(
            f"{path}: this model cannot run on the inputs that the guard was fitted on "
            f"({type(error).__name__}: {first_line(error)}); it is another model"
        ) from error

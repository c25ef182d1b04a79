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
from ebm_guard.gate.artifact import SCHEMA, SCHEMAS, Canary, read_artifact, write_artifact
from ebm_guard.gate.class_conditional import KIND, AnyThreshold, ClassConditionalThreshold
from ebm_guard.gate.deciding import Parts, decide
from ebm_guard.gate.risk_rule import RiskRule
from ebm_guard.gate.thresholds import Threshold
from ebm_guard.model import EnergyClassifier, Preprocessing
from ebm_guard.ood import Score, score_class
from ebm_guard.precision import KeepDouble

# A prime that is no likely width, so that nothing fits by broadcasting.
_TRIED = 7


@dataclass(frozen=True)
class GuardState:
    """All that a fitted guard consists of.

    Args:
        score: the OOD score.
        threshold: the cut or cuts on it.
        calibrator: of the confidence, or None.
        canary: inputs with their logits, or None.
        facts: what it was fitted on.
        classifier: the wrapped model, or None.
        rule: the rule with a certified risk, or None.
    """

    score: Score
    threshold: AnyThreshold
    calibrator: Calibrator | None
    canary: Canary | None
    facts: Mapping[str, Any]
    classifier: EnergyClassifier | None
    rule: RiskRule | None = None

    @property
    def parts(self) -> Parts:
        """What decides."""
        return Parts(self.score, self.threshold, self.calibrator, self.rule)

    @property
    def guarantee(self) -> str:
        """All promises, in words."""
        if self.rule is None:
            return self.threshold.guarantee
        return f"{self.threshold.guarantee} {self.rule.guarantee}"


def write_state(guard: GuardState, path: str | Path) -> Path:
    """Write a fitted guard as one artefact.

    Raises:
        DataError: the place cannot be written; nothing is left behind.
        InvalidInputError: the score is another library's detector, which cannot be stored.
    """
    parts: dict[str, KeepDouble] = {"score": guard.score, "threshold": guard.threshold}
    if guard.calibrator is not None:
        parts["calibrator"] = guard.calibrator
    if guard.rule is not None:
        parts["rule"] = guard.rule
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
        "threshold": threshold.settings()
        | {
            "n": threshold.n,
            "cut": float(threshold.cut) if isinstance(threshold, Threshold) else None,
        },
        "rule": None if guard.rule is None else guard.rule.settings() | {"words": guard.rule.words},
        "guarantee": guard.guarantee,
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
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        EbmGuardError,
    ) as error:
        raise ArtifactError(
            f"{path} lacks what this version needs ({error}); fit the guard again"
        ) from None
    if model is None:
        return state
    classifier = EnergyClassifier(model, logits=logits, preprocessing=preprocessing)
    _verify(Path(path), state.canary, classifier, manifest)
    _find_head(Path(path), state, classifier)
    return replace(state, classifier=classifier)


def _find_head(path: Path, state: GuardState, classifier: EnergyClassifier) -> None:
    """Find the layer whose input the score takes, on the canary's inputs."""
    if not state.score.needs_features or state.canary is None:
        return
    head = classifier.probe_head(state.canary.inputs)
    width = state.facts["features"]
    if not head.found or head.weight.shape[1] != width:
        found = f"features of width {head.weight.shape[1]}" if head.found else head.message
        raise ArtifactError(
            f"{path} was fitted on features of width {width}, and this {classifier.name} gives "
            f"none: {found}. Load the model as it was when the guard was fitted"
        )


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
    rule = manifest.get("rule")
    rows = [
        ("model", f"{manifest['model']['name'] or 'none, stored logits'}"),
        ("weights", weights or "not known (no module)"),
        ("classes", str(facts["num_classes"])),
        ("fitted on", f"{facts['n']:,} rows of {facts['source']} ({facts['dtype']} logits)"),
        ("rows", _rows_words(facts)),
        ("score", _score_words(manifest["score"])),
        ("detector", _detector_words(facts)),
        ("chosen", (facts.get("auto") or {}).get("sentence", "")),
        ("threshold", _threshold_words(threshold)),
        ("rule", "" if rule is None else f"{rule['words']} (risk {rule['risk']:g})"),
        ("guarantee", manifest["guarantee"]),
        ("calibrator", calibrated),
        ("canary", canary),
        *(("history", _entry_words(entry)) for entry in facts.get("lineage", [])[1:]),
        ("created", f"{manifest['created']} by ebm_guard {manifest['versions']['ebm_guard']}"),
    ]
    return [(word, sentence) for word, sentence in rows if sentence]


def _rows_words(facts: Mapping[str, Any]) -> str:
    rows = facts.get("rows", {})
    return ", ".join(f"{n:,} for {part}" for part, n in rows.items()) if len(rows) > 1 else ""


def _score_words(score: Mapping[str, Any]) -> str:
    settings = {name: value for name, value in score["settings"].items() if name != "fit"}
    if "scores" in settings:
        settings["scores"] = [part["name"] for part in settings["scores"]]
    return f"{score['name']} {settings or ''}".strip()


def _detector_words(facts: Mapping[str, Any]) -> str:
    fit = facts.get("fit")
    return "" if fit is None else f"fitted on {fit['n']:,} rows of {fit['source']}"


def _threshold_words(threshold: Mapping[str, Any]) -> str:
    if threshold.get("kind") != KIND:
        return f"{threshold['cut']:.6g} ({threshold['method']}, rank {threshold['rank']})"
    cuts = threshold["cuts"]
    shared = f", {len(threshold['shared'])} classes share one" if threshold["shared"] else ""
    return (
        f"{len(cuts)} cuts from {min(cuts):.6g} to {max(cuts):.6g} by predicted class "
        f"({threshold['method']}){shared}"
    )


def _entry_words(entry: Mapping[str, Any]) -> str:
    changed = ", ".join(entry["changed"])
    return f"{entry['created']}: new {changed} on {entry['n']:,} rows of {entry['source']}"


def _first_facts(calibrator: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": calibrator["name"], **calibrator["settings"]}


def _rebuilt(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> GuardState:
    for name in ("model", "facts", "score", "threshold"):
        if not isinstance(manifest[name], dict):
            raise TypeError(f"{name} is {manifest[name]!r}")
    if "weights_sha256" not in manifest["model"] or "num_classes" not in manifest["facts"]:
        raise KeyError("weights_sha256 or num_classes")
    score, calibrator, canary = manifest["score"], manifest["calibrator"], manifest["canary"]
    fitted: Calibrator | None = None
    if calibrator is not None:
        kind: type[Calibrator] = registry.get("calibrator", calibrator["name"]).load()
        fitted = kind.from_state(_part(tensors, "calibrator"), calibrator["settings"])
    kind_of_cut = (
        ClassConditionalThreshold if manifest["threshold"].get("kind") == KIND else Threshold
    )
    # Artefacts of schema 1 have no rule, and nothing to say about one.
    rule = manifest["rule"] if manifest["schema"] != SCHEMAS[0] else None
    state = GuardState(
        score=score_class(score["name"]).from_state(_part(tensors, "score"), score["settings"]),
        threshold=kind_of_cut.from_state(_part(tensors, "threshold"), manifest["threshold"]),
        calibrator=fitted,
        canary=None
        if canary is None
        else Canary(tensors["canary.inputs"], tensors["canary.logits"], canary["device"]),
        facts=manifest["facts"],
        classifier=None,
        rule=None if rule is None else RiskRule.from_state(_part(tensors, "rule"), rule),
    )
    _try_out(state)
    # What cannot be described lacks something, too.
    for described in (manifest, manifest_of(state)):
        describe_manifest(described)
    return state


def _try_out(state: GuardState) -> None:
    """Decide on rows of zeros: parts that do not fit each other fail here and not in service."""
    classes = int(state.facts["num_classes"])
    features = None
    if state.score.needs_features:
        features = torch.zeros(_TRIED, int(state.facts["features"]))
    threshold = state.threshold
    if isinstance(threshold, ClassConditionalThreshold) and len(threshold.group_of) != classes:
        raise ValueError(f"cuts for {len(threshold.group_of)} classes of {classes}")
    decision = decide(state.parts, torch.zeros(_TRIED, classes), features)
    for name in ("status", "label", "score", "p_value"):
        if getattr(decision, name).shape != (_TRIED,):
            raise ValueError(f"a {name} of shape {tuple(getattr(decision, name).shape)}")


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

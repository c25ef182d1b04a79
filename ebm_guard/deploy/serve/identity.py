"""Which artefact answers: a name that is the same wherever the same gate runs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ebm_guard.gate import Guard
from ebm_guard.gate.artifact import canonical, read_artifact
from ebm_guard.gate.storage import GuardState, manifest_of, read_state


@dataclass(frozen=True)
class Identity:
    """What a guard is, for the answers and the metrics.

    Args:
        sha256: over all that decides: score, cut, calibrator, rule and what they were fitted on,
            and the weights' hash of the model. A guard and each saved copy of it have the same one;
            ``ebm-guard info`` prints it. It is not the hash of the file, which says when it was
            written, too.
        model: name of the model.
        score: name of the score.
        version: of this library.
    """

    sha256: str
    model: str
    score: str
    version: str

    def to_dict(self) -> dict[str, str]:
        """Return the record as JSON types."""
        return {
            "sha256": self.sha256,
            "model": self.model,
            "score": self.score,
            "version": self.version,
        }


def identity_of(guard: Guard) -> Identity:
    """Compute a guard's identity.

    Raises:
        NotFittedError: the guard was not fitted.

    Example:
        >>> import numpy as np
        >>> from ebm_guard.predictions import Predictions
        >>> logits = np.random.default_rng(0).normal(0, 5, size=(200, 3))
        >>> labels = np.where(np.arange(200) % 5, logits.argmax(axis=1), 0)
        >>> rows = Predictions(logits, labels=labels)
        >>> guards = [Guard().fit(rows, false_reject_rate=rate) for rate in (0.05, 0.05, 0.1)]
        >>> one, same, other = (identity_of(guard).sha256 for guard in guards)
        >>> one == same, one == other
        (True, False)
    """
    state = guard.state()
    manifest = manifest_of(state)
    return Identity(
        sha256=_hash(state, manifest),
        model=str(manifest["model"]["name"]),
        score=guard.score.name,
        version=manifest["versions"]["ebm_guard"],
    )


def saved_sha256(path: str | Path) -> str:
    """Return the hash with which a saved guard is served, without its model.

    Raises:
        ArtifactError: damaged, edited, or incomplete.
    """
    state = read_state(path, None, None)
    _, stored = read_artifact(path)
    # The model is not here, so what is known of it is what was written.
    known = {key: stored[key] for key in ("model", "preprocessing")}
    return _hash(state, manifest_of(state) | known)


def _hash(state: GuardState, manifest: Mapping[str, Any]) -> str:
    # When it was written, and by what, does not decide; nor do stored example inputs.
    decides = {
        key: value
        for key, value in manifest.items()
        if key not in ("created", "versions", "canary", "schema")
    }
    # Nor does the name under which the model was loaded: its weights' hash does.
    decides["model"] = manifest["model"]["weights_sha256"]
    digest = hashlib.sha256(canonical(decides).encode())
    parts = (state.score, state.threshold, state.calibrator, state.rule)
    for number, part in enumerate(parts):
        for name, tensor in sorted({} if part is None else part.state_dict().items()):
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"|{number}.{name}|{plain.dtype}|{tuple(plain.shape)}|".encode())
            if plain.numel():
                digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

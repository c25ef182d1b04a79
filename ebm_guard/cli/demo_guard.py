"""Guards of the demo classifier, which commands make themselves where no ``--model`` is given."""

from __future__ import annotations


def demo_specs(guard_path: str) -> list[str]:
    """Return ``demo:`` as the data of a command without data, if a guard is of the demo classifier.

    Told by the hash of the weights, not by a name: loading the guard checks the same one.

    Raises:
        ArtifactError: the artefact cannot be read.
    """
    from ebm_guard.data.demo import demo_classifier
    from ebm_guard.gate.artifact import read_artifact
    from ebm_guard.model.weights import weights_hash

    _, manifest = read_artifact(guard_path)
    model = manifest.get("model")
    stored = model.get("weights_sha256") if isinstance(model, dict) else None
    return ["demo:"] if stored == weights_hash(demo_classifier()) else []

"""One file for a fitted guard: tensors, a JSON manifest, and a hash over both.

The hash guards integrity, not authenticity: it tells a damaged or carelessly edited file, not a
forged one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebm_guard.errors import ArtifactError, DataError
from ebm_guard.files import replace_file

# What is written, and all that can be read: 1 had neither features, nor rules, nor a lineage.
SCHEMA = "ebm_guard.artifact/2"
SCHEMAS = ("ebm_guard.artifact/1", SCHEMA)
_MANIFEST, _HASH = "ebm_guard", "sha256"
CANARY_ROWS = 8


@dataclass(frozen=True)
class Canary:
    """A few real inputs with the logits that the model gave for them.

    They catch what a hash of the weights cannot see: changed code, a changed callable, another
    dtype or device. They are stored in the artefact: turn them off for confidential images.

    Args:
        inputs: (8, ...) as the model took them.
        logits: (8, C).
        device: device type that the logits were computed on.
    """

    inputs: Tensor
    logits: Tensor
    device: str

    def difference(self, logits: Tensor) -> float:
        """Return max |logits - stored| relative to max |stored|."""
        stored = self.logits.double()
        scale = float(stored.abs().max()) or 1.0
        return float((logits.detach().cpu().double() - stored).abs().max()) / scale

    def tolerance(self, device: str) -> float:
        """Return the relative tolerance: tight on one device type, loose across (TF32, kernels)."""
        if self.logits.dtype in (torch.float16, torch.bfloat16):
            return 3e-2
        return 1e-4 if device == self.device else 1e-2


def write_artifact(
    path: str | Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]
) -> None:
    """Write an artefact, all of it or nothing.

    Raises:
        DataError: the place cannot be written.
    """
    from safetensors.torch import save

    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = canonical(manifest)
    metadata = {_MANIFEST: text, _HASH: _digest(text, plain)}
    path = Path(path)
    if path.is_dir():
        raise DataError(f"cannot write {path}: it is a folder; give a file name")
    # Bytes, not save_file: that makes files which only their owner may read.
    content = save(plain, metadata=metadata)
    with replace_file(path) as new:
        new.write_bytes(content)


def read_artifact(
    path: str | Path, *, schemas: Sequence[str] = SCHEMAS, what: str = "guard"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and verify an artefact; nothing is unpickled.

    Args:
        path: the file.
        schemas: those that the caller can read.
        what: what the file should hold, for the errors.

    Raises:
        ArtifactError: missing, truncated, edited, or of a schema that this version does not read.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise ArtifactError(
            f"got {path}, which is not a file; needed a {what} saved by {what}.save"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Clones: safetensors maps the file, which may be replaced while the guard lives.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} is damaged or not a {what} artefact ({error}); save the {what} again"
        ) from None
    if _MANIFEST not in metadata or _HASH not in metadata:
        raise ArtifactError(
            f"{path} is a safetensors file, but not a {what}: it has no manifest. Model weights go "
            "to --checkpoint, a guard is made by `ebm-guard fit` or guard.save"
        )
    text = metadata[_MANIFEST]
    if _digest(text, tensors) != metadata[_HASH]:
        raise ArtifactError(
            f"{path} was changed after it was saved: its content does not match its hash. Fit and "
            f"save the {what} again"
        )
    try:
        manifest = json.loads(text)
    # The second, for brackets inside brackets without end.
    except (ValueError, RecursionError):
        manifest = None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema not in schemas:
        raise ArtifactError(
            f"{path} has schema {schema!r} and is not a {what} that this version reads "
            f"({' or '.join(schemas)}). Fit the {what} again with this version"
        )
    return tensors, manifest


def canonical(manifest: Mapping[str, Any]) -> str:
    """Return canonical JSON: sorted keys, no blanks, no NaN."""
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        # An empty tensor has no bytes, and cannot be viewed as some.
        if tensor.numel():
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""Export a fitted guard with its model as one program, and prove that it decides the same."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebm_guard.deploy.export_formats import onnx_content, torch_content, traced
from ebm_guard.deploy.export_parity import check_parity, parity_inputs, reference
from ebm_guard.deploy.export_program import GuardProgram
from ebm_guard.deploy.exported import OUTPUTS, SCHEMA, Exported, open_program, self_test_input
from ebm_guard.errors import (
    ArtifactError,
    DataError,
    InvalidInputError,
    UnsupportedModelError,
    first_line,
)
from ebm_guard.files import replace_file
from ebm_guard.gate import Guard
from ebm_guard.gate.artifact import canonical
from ebm_guard.gate.class_conditional import require_threshold
from ebm_guard.gate.storage import manifest_of

FORMATS = ("torch", "onnx")
INPUTS = ("model", "pixels")


def export(
    guard: Guard,
    format: str,  # noqa: A002
    path: str | Path,
    *,
    input: str = "model",  # noqa: A002
    example: Tensor | None = None,
    opset: int | None = None,
) -> Exported:
    """Write the model and the gate as one program with a batch of any size.

    The program computes (logits, probabilities, energy, score, p_value, accept) for each row, with
    the calibrator, the threshold (global or by class) and the certified rule inside. Before the
    file appears it is loaded and compared with ``guard(x)`` on 256 rows: decisions must be equal,
    but where a score lies within the tolerance of its cut (counted in ``facts["parity"]``).

    Two things differ from ``guard(x)``, because a graph cannot raise: a row with a NaN or infinite
    input, and with ``input="pixels"`` one outside [0, 1], is INVALID.

    Args:
        guard: fitted, around an ``nn.Module`` that takes one floating tensor (B, ...).
        format: ``torch``, a ``torch.export`` program (``.pt2``), or ``onnx``.
        path: the file to write.
        input: ``model``: what the model takes; ``pixels``: [0, 1] pixels (B, C, H, W) of the
            model's input size, normalised inside.
        example: inputs of that kind to compare on, best 256 real ones; fewer are filled up with
            mixes of them. Default: the guard's canary.
        opset: ONNX opset; default: that of the installed exporter.

    Returns:
        The program, as :func:`load_exported` gives it.

    Raises:
        InvalidInputError: unknown format or input, no example, a score that cannot be exported, or
            the extra ``onnx`` is not installed.
        UnsupportedModelError: the model cannot be exported, or the program does not agree with the
            guard; no file is left.
        NotFittedError: the guard is not fitted, or holds no model.
        DataError: the place cannot be written.

    References:
        PyTorch 2 export (``torch.export``), and its ONNX exporter (``dynamo=True``).

    Example:
        >>> import tempfile
        >>> from ebm_guard.gate import wrap
        >>> x = torch.randn(100, 4)
        >>> guard = wrap(torch.nn.Linear(4, 3).eval())
        >>> guard = guard.fit([(x, torch.randint(3, (100,)))])  # doctest: +SKIP
        >>> program = export(guard, "torch", f"{tempfile.mkdtemp()}/gate.pt2")  # doctest: +SKIP
        >>> bool((program(x).accept == guard(x).accept).all())  # doctest: +SKIP
        True
    """
    if format not in FORMATS or input not in INPUTS:
        raise InvalidInputError(
            f"got format {format!r} and input {input!r}; needed one of {', '.join(FORMATS)}, and "
            f"one of {', '.join(INPUTS)}"
        )
    if opset is not None and format != "onnx":
        raise InvalidInputError("got opset for a torch program, which has none; leave it out")
    require_threshold(guard.threshold)
    if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        raise InvalidInputError("export computes without autocast; leave the autocast context")
    path = Path(path)
    if path.is_dir():
        raise DataError(f"cannot write {path}: it is a folder; give a file name")
    return _Export(guard, format, input == "pixels", opset).write(path, example)


@dataclass(frozen=True)
class _Export:
    guard: Guard
    format: str
    pixels: bool
    opset: int | None

    def write(self, path: Path, example: Tensor | None) -> Exported:
        guard = self.guard
        # Made first: what cannot be exported is refused before any work.
        GuardProgram(guard, pixels=self.pixels)
        inputs = parity_inputs(self._example(example), pixels=self.pixels)
        wanted = reference(guard, inputs, pixels=self.pixels)
        self._check_dtype(wanted.decision.logits.dtype)
        # Made again: the guard has found the model's head on the way.
        program = GuardProgram(guard, pixels=self.pixels)
        name = "pixels" if self.pixels else "input"
        graph = traced(program, inputs[:2])
        content, versions = torch_content(graph), {"torch": torch.__version__}
        if self.format == "onnx":
            content, versions = onnx_content(graph, name, self.opset)
        facts = self._facts(program, inputs, versions)
        row = self_test_input(tuple(inputs.shape[1:]), inputs.dtype, pixels=self.pixels)
        try:
            loaded = open_program(content(canonical(facts)), str(path))
            logits = loaded(row).logits[0].double()
        except ArtifactError as error:
            raise self._no_runtime(error, inputs.dtype) from error
        finite = bool(torch.isfinite(logits).all())
        facts["self_test"] = {"logits": logits.tolist() if finite else None}
        facts["parity"] = check_parity(guard, wanted, loaded)
        with replace_file(path) as new:
            new.write_bytes(content(canonical(facts)))
        return Exported(loaded.run, facts)

    def _no_runtime(self, error: ArtifactError, dtype: torch.dtype) -> UnsupportedModelError:
        advice = "export it with another version of torch"
        if self.format == "onnx":
            advice = (
                f"its input is {dtype}, and ONNX Runtime on a CPU has few operations for other "
                "types than float32, and knows the opsets of its time: export the model in "
                "float32, with a lower opset, or as a torch program"
            )
        cause = first_line(error.__cause__ or error)
        return UnsupportedModelError(
            f"the program was made and cannot be run here ({cause}). No file was written; {advice}"
        )

    def _example(self, example: Tensor | None) -> Tensor:
        guard = self.guard
        if example is None:
            if guard.canary is None:
                raise InvalidInputError(
                    "this guard keeps no canary inputs to compare the program on; give example=, a "
                    "batch of real inputs"
                )
            example = guard.canary.inputs
            preprocessing = None if guard.classifier is None else guard.classifier.preprocessing
            if self.pixels and preprocessing is not None:
                example = preprocessing.denormalize(example)
        if (
            not isinstance(example, Tensor)
            or example.ndim < 2
            or not len(example)
            or not example.is_floating_point()
        ):
            came = (
                f"{tuple(example.shape)} {example.dtype}"
                if isinstance(example, Tensor)
                else type(example).__name__
            )
            raise InvalidInputError(
                f"got an example of {came}; an exported program takes one floating tensor (B, ...)"
            )
        return example.detach().cpu()

    def _check_dtype(self, dtype: torch.dtype) -> None:
        fitted = self.guard.facts.get("dtype")
        if fitted is not None and fitted != str(dtype).removeprefix("torch."):
            raise InvalidInputError(
                f"this guard was fitted on {fitted} logits, and the model gives {dtype} here; a "
                "program computes without autocast, so fit the guard without it too"
            )

    def _facts(
        self, program: GuardProgram, inputs: Tensor, versions: dict[str, Any]
    ) -> dict[str, Any]:
        manifest = manifest_of(self.guard.state())
        for name in ("schema", "created", "versions", "canary"):
            del manifest[name]
        return {
            "schema": SCHEMA,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {"ebm_guard": version("ebm-guard"), **versions},
            "format": self.format,
            "input": {
                "kind": "pixels" if self.pixels else "model",
                "shape": list(inputs.shape[1:]),
                "dtype": str(inputs.dtype).removeprefix("torch."),
            },
            "outputs": list(OUTPUTS),
            "label": "logits" if program.keeps_prediction else "probabilities",
            "guard_sha256": self._guard_hash(manifest),
            "weights_sha256": manifest["model"]["weights_sha256"],
            "guard": manifest,
        }

    def _guard_hash(self, manifest: dict[str, Any]) -> str:
        """Hash all that decides, and not when it was written: the same guard, the same hash."""
        state = self.guard.state()
        digest = hashlib.sha256(canonical(manifest).encode())
        for part in (state.score, state.threshold, state.calibrator, state.rule):
            for name, value in [] if part is None else sorted(part.state_dict().items()):
                digest.update(f"|{name}|{value.dtype}|{tuple(value.shape)}|".encode())
                digest.update(value.cpu().contiguous().numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"

"""The two formats of an exported program: a ``torch.export`` archive and an ONNX model."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor

from ebm_guard.deploy.export_program import GuardProgram
from ebm_guard.deploy.exported import FACTS, FACTS_FILE, OUTPUTS, check_archive
from ebm_guard.errors import (
    EbmGuardError,
    InvalidInputError,
    UnsupportedModelError,
    first_line,
)
from ebm_guard.model.mode import evaluation_mode

# From the facts, as JSON, to the bytes of the file.
Content = Callable[[str], bytes]
_OLDEST_OPSET = 18
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def traced(program: GuardProgram, example: Tensor) -> torch.export.ExportedProgram:
    """Trace the program with a batch of any size.

    Args:
        program: the gate with its model.
        example: (B, ...), two rows or more.

    Raises:
        UnsupportedModelError: the model has code that cannot be traced, with the reason.
    """
    rows = torch.export.Dim("batch", min=1)
    # A 0/1 batch is special to the tracer.
    example = example if len(example) > 1 else example.repeat(2, *[1] * (example.ndim - 1))
    # The tracer prints the graph of what it refuses.
    silent = redirect_stderr(io.StringIO())
    with silent, _refused("traced"), evaluation_mode(program.model), torch.no_grad():
        return torch.export.export(program, (example,), dynamic_shapes=({0: rows},), strict=False)


def torch_content(graph: torch.export.ExportedProgram) -> Content:
    """Return what writes the program as a ``.pt2`` archive, without pickled parts."""
    # Example inputs would be pickled, and are somebody's images.
    graph.example_inputs = None

    def content(facts: str) -> bytes:
        buffer = io.BytesIO()
        with _refused("saved"):
            torch.export.save(graph, buffer, extra_files={FACTS_FILE: facts})
        check_archive(buffer.getvalue())
        return buffer.getvalue()

    return content


def onnx_content(
    graph: torch.export.ExportedProgram, name: str, opset: int | None
) -> tuple[Content, dict[str, Any]]:
    """Return what writes the program as an ONNX model in one file, and the versions used.

    Raises:
        InvalidInputError: the extra ``onnx`` is not installed.
        UnsupportedModelError: ONNX has no form for something in the model, or it is over 2 GiB.
    """
    if opset is not None and opset < _OLDEST_OPSET:
        raise InvalidInputError(f"got opset {opset}; needed {_OLDEST_OPSET} or higher")
    missing = [item for item in _ONNX_PACKAGES if importlib.util.find_spec(item) is None]
    if missing:
        raise InvalidInputError(
            f"an export to ONNX needs {', '.join(missing)}: pip install 'ebm-guard[onnx]'"
        )
    with _refused("turned into ONNX"):
        program = torch.onnx.export(
            graph,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=[name],
            output_names=list(OUTPUTS),
        )
        if program is None:
            raise RuntimeError("the exporter gave nothing")
    used = int(program.model.opset_imports[""])
    if opset is not None and used != opset:
        raise InvalidInputError(
            f"got opset {opset}, and this model came out with {used}; leave the option out"
        )

    _name_batch(program.model.graph)

    def content(facts: str) -> bytes:
        program.model.metadata_props[FACTS] = facts
        with _refused("written as one ONNX file (2 GiB at most)"):
            data: bytes = program.model_proto.SerializeToString()
        return data

    return content, {"torch": torch.__version__, **_versions(), "opset": used}


def _name_batch(graph: Any) -> None:
    """Call the free axis ``batch`` in the graph's own inputs and outputs, as servers show it."""
    old = str(graph.inputs[0].shape[0])
    values = [*graph.inputs, *(value for node in graph.all_nodes() for value in node.outputs)]
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and old in str(size):
                value.shape[axis] = str(size).replace(old, "batch")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in _ONNX_PACKAGES}


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Turn whatever an exporter raises into one error; its warnings are not the user's."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except EbmGuardError:
        raise
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        raise UnsupportedModelError(
            f"the model with its gate cannot be {what} ({type(root).__name__}: "
            f"{first_line(root)}); no file was written. Export needs a model whose code does not "
            "depend on the values of its input, and takes a batch of any size"
        ) from error

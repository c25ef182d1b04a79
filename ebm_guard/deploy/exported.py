"""Run an exported program, and read what it says about itself; nothing is unpickled."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebm_guard.deploy.export_text import check_names, check_program_text, repacked
from ebm_guard.errors import ArtifactError, InvalidInputError, first_line
from ebm_guard.gate.decision import ACCEPT, INVALID, REJECT

OUTPUTS = ("logits", "probabilities", "energy", "score", "p_value", "accept")
SCHEMA = "ebm_guard.export/1"
FACTS = "ebm_guard"
FACTS_FILE = f"{FACTS}.json"
# Another machine or runtime rounds otherwise; a damaged file gives another thing altogether.
SELF_TEST = 1e-2
_EXTERNAL = "session.model_external_initializers_file_folder_path"
# All that an archive of ours holds. By name and case: torch finds members without regard to case,
# and unpickles what it finds under other names.
_PROGRAM, _SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
_WEIGHTS = "data/weights/model_weights_config.json"
_CONSTANTS = "data/constants/model_constants_config.json"
_FACTS_MEMBER = f"extra/{FACTS_FILE}"
_NEEDED = frozenset((_PROGRAM, _WEIGHTS, _CONSTANTS))
_MEMBER = re.compile(
    "|".join(map(re.escape, (*sorted(_NEEDED), _SAMPLES, _FACTS_MEMBER)))
    + r"|data/weights/weight_\d+|data/constants/tensor_\d+|archive_format|archive_version"
    + r"|byteorder|version|\.data/(?:version|serialization_id)",
    re.ASCII,
)
_ZIP = b"PK\x03\x04"
Run = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class ExportedOutput:
    """What an exported program says about a batch; tensors on the CPU.

    Args:
        logits: (B, C), the model's own.
        probabilities: (B, C), after calibration; 0 where INVALID.
        energy: (B,), E(x) at temperature 1, higher = more OOD.
        score: (B,) float64, the gate's score.
        p_value: (B,) float64, marginal conformal p-value of the score; 0 where INVALID, and only
            there.
        accept: (B,) bool.
        keeps_prediction: whether the label is the argmax of the logits, and not of the
            probabilities.
    """

    logits: Tensor = field(repr=False)
    probabilities: Tensor = field(repr=False)
    energy: Tensor
    score: Tensor
    p_value: Tensor
    accept: Tensor
    keeps_prediction: bool = True

    @classmethod
    def of(cls, outputs: tuple[Tensor, ...], keeps_prediction: bool) -> ExportedOutput:
        """Name the six outputs of a program."""
        logits, probabilities, energy, score, p_value, accept = outputs
        return cls(logits, probabilities, energy, score, p_value, accept, keeps_prediction)

    @property
    def status(self) -> Tensor:
        """(B,) int8: ACCEPT, REJECT or INVALID, as in :class:`ebm_guard.gate.Decision`."""
        refused = torch.where(self.p_value > 0, REJECT, INVALID)
        return torch.where(self.accept, ACCEPT, refused).to(torch.int8)

    @property
    def label(self) -> Tensor:
        """(B,) int64, the predicted class; -1 where INVALID."""
        label = (self.logits if self.keeps_prediction else self.probabilities).argmax(dim=1)
        return torch.where(self.p_value > 0, label, -1)

    @property
    def confidence(self) -> Tensor:
        """(B,), the calibrated probability of the label; 0 where INVALID."""
        place = self.label.clamp_min(0)[:, None]
        return self.probabilities.gather(1, place).squeeze(1)


class Exported:
    """A loaded program: call it with what it was exported for.

    Attributes:
        run: the program itself, from (B, ...) on the CPU to its six outputs; nothing is checked.
        facts: what :func:`ebm_guard.deploy.export` wrote: the input it takes, the guard inside, and
            the parity that was measured.
    """

    def __init__(self, run: Run, facts: Mapping[str, Any]) -> None:
        self.run = run
        self.facts = dict(facts)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> ExportedOutput:
        """Run the program on a batch of one row or more.

        Args:
            x: (B, ...), the model's input or [0, 1] pixels: ``facts["input"]`` says which.

        Raises:
            InvalidInputError: another shape or dtype than the program takes.
        """
        wanted = self.facts["input"]
        dtype = getattr(torch, wanted["dtype"])
        shape = tuple(wanted["shape"])
        if not isinstance(x, Tensor) or x.shape[1:] != shape or x.dtype != dtype or not len(x):
            came = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise InvalidInputError(
                f"got {came}; this program takes {_words(wanted)} of shape (B, "
                f"{', '.join(map(str, shape))}) and dtype {dtype}, with B of 1 or more"
            )
        outputs = self.run(x.detach().cpu())
        return ExportedOutput.of(outputs, self.facts["label"] == "logits")


def load_exported(path: str | Path) -> Exported:
    """Read a program that :func:`ebm_guard.deploy.export` wrote, and let it repeat its self-test.

    The self-test runs the stored test input (made by a formula, no image of anybody) and compares
    the logits with those at the export: it catches damage and a runtime that computes something
    else. It proves no origin: load files of your own only. An ONNX program needs onnxruntime
    alone.

    Args:
        path: ``.pt2`` or ``.onnx`` file.

    Raises:
        ArtifactError: missing, damaged, not such a program, with pickled parts, or it fails its
            self-test.
        InvalidInputError: onnxruntime is missing.

    Example:
        >>> program = load_exported("gate.onnx")  # doctest: +SKIP
        >>> program(images).accept  # doctest: +SKIP
        tensor([ True, False])
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"cannot read {path}: {error.strerror or error}; needed a file written by `ebm-guard "
            "export`"
        ) from None
    program = open_program(content, str(path))
    _self_test(program, str(path))
    return program


def open_program(content: bytes, name: str) -> Exported:
    """Make the bytes of a program callable; see :func:`load_exported`."""
    torch_format = content[:4] == _ZIP
    try:
        run, text = _open_torch(content) if torch_format else _open_onnx(content)
        facts = json.loads(text)
        if facts["schema"] != SCHEMA or facts["label"] not in ("logits", "probabilities"):
            raise ValueError(f"schema {facts['schema']!r}")
        tuple(facts["input"]["shape"]), getattr(torch, facts["input"]["dtype"])
    except (ArtifactError, InvalidInputError):
        raise
    # Torch and onnxruntime raise what their parsers raise on damaged files.
    except Exception as error:
        raise ArtifactError(
            f"{name} is damaged, or no program that this version of ebm_guard, torch "
            f"{torch.__version__} and onnxruntime can run ({type(error).__name__}: "
            f"{first_line(error)}); export it again"
        ) from error
    return Exported(run, facts)


def self_test_input(shape: tuple[int, ...], dtype: torch.dtype, *, pixels: bool) -> Tensor:
    """Return the row (1, ...) of the self-test: sines, in [0, 1] for pixels.

    Example:
        >>> self_test_input((2,), torch.float32, pixels=False).shape
        torch.Size([1, 2])
    """
    places = torch.arange(int(torch.Size(shape).numel()), dtype=torch.float64)
    values = torch.sin(1.7 * places + places.square() / 999)
    if pixels:
        values = (values + 1) / 2
    return values.view(1, *shape).to(dtype)


def check_archive(content: bytes) -> str:
    """Refuse a ``.pt2`` archive with pickled parts, or with text that torch would run as code.

    ``torch.export.load`` unpickles example inputs, members of older layouts, and weights and
    constants that are marked so. Ours have none of these.

    Raises:
        ArtifactError: pickled parts, an older layout, or no facts.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
        inside = {name.partition("/")[2]: name for name in names}
        roots = {name.partition("/")[0] for name in names}
        strange = [name for name in inside if not _MEMBER.fullmatch(name)]
        if strange or len(inside) < len(names) or len(roots) != 1 or _NEEDED - inside.keys():
            what = f"holds {', '.join(strange[:3])}" if strange else "is of another layout"
            raise ArtifactError(
                f"the .pt2 file {what}: it is no archive of the current layout, which is the only "
                "one that can be read without unpickling pickled parts; export it again with "
                "ebm_guard"
            )
        if _FACTS_MEMBER not in inside:
            raise ArtifactError("the .pt2 file holds no guard: it has no facts of ebm_guard")
        samples = inside.get(_SAMPLES)
        pickled = samples is not None and archive.getinfo(samples).file_size > 0
        for kind, name in (("weight", _WEIGHTS), ("tensor", _CONSTANTS)):
            config = json.loads(archive.read(inside[name]))
            check_names(config)
            for entry in config.get("config", {}).values():
                plain = re.fullmatch(rf"{kind}_\d+", str(entry.get("path_name")), re.ASCII)
                pickled |= entry.get("use_pickle", True) or not plain
        if pickled:
            raise ArtifactError(
                "the .pt2 file holds pickled parts, and nothing is unpickled here; export it again "
                "with ebm_guard"
            )
        check_program_text(archive.read(inside[_PROGRAM]))
        return archive.read(inside[_FACTS_MEMBER]).decode()


def _open_torch(content: bytes) -> tuple[Run, str]:
    content = repacked(content)
    text = check_archive(content)
    module = torch.export.load(io.BytesIO(content)).module()
    return lambda x: tuple(module(x)), text


def _open_onnx(content: bytes) -> tuple[Run, str]:
    try:
        onnxruntime = import_module("onnxruntime")
    except ImportError:
        raise InvalidInputError(
            "an ONNX program needs onnxruntime: pip install 'ebm-guard[onnx]'"
        ) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Weights outside of the file would be read from the working folder: there is nothing here.
    options.add_session_config_entry(_EXTERNAL, f"{os.devnull}/none")
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    text = session.get_modelmeta().custom_metadata_map.get(FACTS)
    if text is None:
        raise ArtifactError("the ONNX file holds no guard: it has no facts of ebm_guard")
    (name,) = (item.name for item in session.get_inputs())

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(found) for found in session.run(None, {name: x.numpy()}))

    return run, str(text)


def _self_test(program: Exported, name: str) -> None:
    try:
        stored = program.facts["self_test"]["logits"]
        if stored is None:
            return
        wanted = program.facts["input"]
        shape, dtype = tuple(wanted["shape"]), getattr(torch, wanted["dtype"])
        found = program(self_test_input(shape, dtype, pixels=wanted["kind"] == "pixels"))
        expected = torch.tensor(stored, dtype=torch.float64)
        gap = float((found.logits[0].double() - expected).abs().max())
    except Exception as error:
        raise ArtifactError(
            f"{name} cannot run its self-test ({type(error).__name__}: {first_line(error)}); "
            "export it again"
        ) from error
    allowed = SELF_TEST * (float(expected.abs().max()) or 1.0)
    if not gap <= allowed:
        raise ArtifactError(
            f"{name} fails its self-test: its logits are off by {gap:.3g} where {allowed:.3g} is "
            "allowed. The file is damaged, or this runtime computes something else; export again"
        )


def _words(wanted: Mapping[str, Any]) -> str:
    return "[0, 1] pixels" if wanted["kind"] == "pixels" else "the model's input"

"""Wrap any classifier: bit-identical logits, verified features, nothing of the model touched."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ebm_guard import energy as formulas
from ebm_guard.errors import EbmGuardWarning, InvalidInputError, UnsupportedModelError
from ebm_guard.model.head import Head, capture_inputs, find_head
from ebm_guard.model.mode import evaluation_mode
from ebm_guard.model.pixels import Preprocessing, pretrained_cfg
from ebm_guard.model.weights import weights_hash
from ebm_guard.model.wrappers import eager_run, unwrapped

_BCE_TAGS = frozenset({"a1", "a2", "a3", "d", "d1", "d2"})
_PROBABILITY_TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class ClassifierOutput:
    """What one forward pass gives.

    Args:
        logits: (B, C), exactly as the model gives them.
        features: (B, D), the input of the verified head, or None when not asked for or not found.
    """

    logits: Tensor
    features: Tensor | None


class EnergyClassifier:
    """Read a pretrained softmax classifier as an energy-based model.

    The model is held as it is: never moved, edited, or left in another mode. Logits are
    bit-identical to the model's own. A model in train mode is switched to eval for each call and
    restored (see :func:`ebm_guard.model.mode.evaluation_mode`).

    Args:
        model: an ``nn.Module`` or any callable from a batch to logits (B, C): a tensor, an object
            with ``.logits``, or a mapping with the key ``logits``.
        logits: callable that takes the model's output and returns the logits, for anything else.
        preprocessing: how pixels become the model's input; default: the model's
            ``pretrained_cfg``.

    Raises:
        UnsupportedModelError: the model says that it has no classes, or is a multi-label model.

    Example:
        >>> classifier = EnergyClassifier(nn.Linear(4, 3).eval())
        >>> classifier.energy(torch.zeros(2, 4)).shape
        torch.Size([2])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        logits: Callable[[Any], Tensor] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        if not callable(model):
            raise InvalidInputError(
                f"got {type(model).__name__}; needed an nn.Module or a callable from a batch to "
                "logits. A model name is not enough: create the model first"
            )
        _refuse_declared(model)
        _warn_bce(model)
        self.model = model
        self.preprocessing = preprocessing or Preprocessing.from_model(model)
        self._pick_logits = logits
        self._head: Head | None = None

    @property
    def name(self) -> str:
        """Name of the model's architecture."""
        architecture = pretrained_cfg(self.model).get("architecture")
        model = unwrapped(self.model)
        scripted = getattr(model, "original_name", None)  # TorchScript keeps the class's name here
        return str(architecture or scripted or getattr(model, "__name__", type(model).__name__))

    @property
    def loss_note(self) -> str:
        """What is known of the loss that the model was trained with, in words for a model card."""
        tag = _bce_tag(self.model)
        if tag is None:
            return "training loss unknown"
        return f"known BCE tag {tag!r}: binary cross-entropy, if these are timm's published weights"

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names in logit order (timm's label names, Hugging Face's id2label), or None."""
        names = pretrained_cfg(self.model).get("label_names")
        if names is None:
            config = getattr(unwrapped(self.model), "config", None)
            table = getattr(config, "id2label", None) or {}
            names = [str(table[key]) for key in sorted(table, key=int)]
        # Hugging Face fills in LABEL_0, LABEL_1, ... where nobody gave names.
        if not names or all(str(name).startswith("LABEL_") for name in names):
            return None
        return tuple(map(str, names))

    @property
    def device(self) -> torch.device | None:
        """Device of the model's first parameter or buffer, or None for a plain callable."""
        if not isinstance(self.model, nn.Module):
            return None
        tensors = itertools.chain(self.model.parameters(), self.model.buffers())
        tensor = next(tensors, None)
        return None if tensor is None else tensor.device

    @property
    def num_parameters(self) -> int | None:
        """Number of the model's parameters, or None for a plain callable."""
        if not isinstance(self.model, nn.Module):
            return None
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def compiled(self) -> bool:
        """Whether features cost a second, plain run of the model (see :meth:`forward`)."""
        return isinstance(self.model, nn.Module) and eager_run(self.model) is not None

    @property
    def head(self) -> Head | None:
        """The verified last linear layer; None until :meth:`probe_head` has run."""
        return self._head

    def weights_hash(self) -> str | None:
        """Return the fingerprint of the weights, or None for a plain callable."""
        return weights_hash(self.model)

    def __call__(self, x: Any) -> Tensor:
        """Return the logits (B, C) of a batch, bit-identical to the model's own."""
        return self.forward(x).logits

    def forward(self, x: Any, *, features: bool = False) -> ClassifierOutput:
        """Run the model once.

        Args:
            x: exactly what the model takes; a tensor is moved to the model's device.
            features: also return the features, if the head was found by :meth:`probe_head`. A
                compiled model runs twice for them: hooks would become a part of its code.

        Returns:
            Logits, and features where asked for and available. Gradients flow as in the model;
            callers that need none use ``torch.no_grad()``.

        Raises:
            UnsupportedModelError: the output holds no logits of shape (B, C), C >= 2.
        """
        head = self._head if features else None
        if head is None or not head.found:
            return ClassifierOutput(self._run(x, ())[0], None)
        logits, inputs = self._run(x, head.layers)
        return ClassifierOutput(logits, head.features(inputs))

    def energy(self, x: Any, temperature: float = 1.0) -> Tensor:
        """Compute the energy (B,) of a batch; higher = more out-of-distribution."""
        return formulas.energy(self(x), temperature)

    def pixels(self, pixels: Tensor) -> Tensor:
        """Turn [0, 1] pixels (B, C, H, W) into the model's input.

        Raises:
            InvalidInputError: values outside [0, 1], or no mean and std are known.
        """
        if self.preprocessing is None:
            raise InvalidInputError(
                "this model has no pretrained_cfg, so its normalisation is not known; wrap it with "
                "mean=(...), std=(...) (mean 0 and std 1 for a model that takes [0, 1] pixels)"
            )
        self.preprocessing.check_pixels(pixels)
        return self.preprocessing.normalize(pixels)

    def probe_head(self, x: Any) -> Head:
        """Find and verify the head on a batch of real inputs; done once and kept.

        A probe that proved nothing (one row, or equal rows) is not kept: the next batch may do.
        """
        if self._head is not None and self._head.found:
            return self._head
        with torch.no_grad():
            self._head = find_head(self.model, lambda layers: self._run(x, layers))
        return self._head

    def _run(
        self, x: Any, layers: Sequence[nn.Module]
    ) -> tuple[Tensor, dict[nn.Module, list[Tensor]]]:
        """Return the logits, and what each of the layers received."""
        x = self._moved(x)
        plain = eager_run(self.model) if layers and isinstance(self.model, nn.Module) else None
        with self._mode():
            with capture_inputs(layers) as inputs:
                output = self.model(x) if plain is None else plain(x)
            return self._logits(output if plain is None else self.model(x)), inputs

    def _mode(self) -> Any:
        if isinstance(self.model, nn.Module):
            return evaluation_mode(self.model)
        return nullcontext()

    def _moved(self, x: Any) -> Any:
        device = self.device
        return x.to(device) if isinstance(x, Tensor) and device is not None else x

    def _logits(self, output: Any) -> Tensor:
        logits = self._pick_logits(output) if self._pick_logits else _pick(output)
        if not isinstance(logits, Tensor):
            raise UnsupportedModelError(
                f"the logits are a {type(logits).__name__}; needed a torch tensor (B, C)"
            )
        try:
            formulas.check_logits(logits)
        except InvalidInputError as error:
            raise UnsupportedModelError(f"the model's output is not usable: {error}") from None
        return logits


def check_kind(logits: Tensor) -> None:
    """Refuse probabilities and log-probabilities, which carry no energy.

    After a softmax the logsumexp of the row is gone: log-probabilities have energy 0 for every x.

    Args:
        logits: (B, C); judged on its finite rows.

    Raises:
        UnsupportedModelError: all rows are probabilities, or all are log-probabilities.

    Example:
        >>> check_kind(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))
    """
    rows = logits.detach()
    tolerance = _PROBABILITY_TOLERANCE.get(rows.dtype, 1e-4)
    rows = rows.double()[torch.isfinite(rows).all(dim=1)]
    if not len(rows):
        return
    if bool((rows >= 0).all()) and bool(((rows.sum(dim=1) - 1).abs() < tolerance).all()):
        raise UnsupportedModelError(
            "the model returns probabilities (every row is >= 0 and sums to 1); energies need the "
            "logits before the softmax: remove the final Softmax, or pass logits=..."
        )
    if bool((torch.logsumexp(rows, dim=1).abs() < tolerance).all()):
        raise UnsupportedModelError(
            "the model returns log-probabilities (every row's logsumexp is 0, so every energy is "
            "0): remove the final LogSoftmax, or pass logits=..."
        )


def _pick(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, Mapping):
        if "logits" in output:
            return output["logits"]
        raise UnsupportedModelError(
            f"the model returned a mapping with keys {sorted(map(str, output))}; needed logits "
            "(B, C): pass logits=lambda output: output['...']"
        )
    if isinstance(output, (tuple, list)):
        raise UnsupportedModelError(
            f"the model returned a {type(output).__name__} of {len(output)}; needed logits (B, C): "
            "pass logits=lambda output: output[0] if the first item holds them. Distilled and "
            "Inception models return one tensor in eval mode"
        )
    raise UnsupportedModelError(
        f"the model returned a {type(output).__name__}; needed a tensor (B, C), an object with "
        ".logits, or a mapping with 'logits': pass logits=lambda output: ..."
    )


def _refuse_declared(wrapped: object) -> None:
    model = unwrapped(wrapped)
    if type(model).__name__ == "ExportedProgram":
        raise UnsupportedModelError(
            "an ExportedProgram cannot be called; wrap its module: program.module()"
        )
    classes = getattr(model, "num_classes", None)
    if isinstance(classes, int) and not isinstance(classes, bool) and classes == 0:
        raise UnsupportedModelError(
            "the model has num_classes=0, so it returns features and no logits; create it with its "
            "classifier, for example timm.create_model(name, num_classes=10)"
        )
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem == "multi_label_classification":
        raise UnsupportedModelError(
            "the model is a multi-label classifier (sigmoid per class); energy, ECE and the gate "
            "read a softmax over exclusive classes"
        )


def _bce_tag(model: object) -> str | None:
    """Return timm's tag of the weights if it is known for binary cross-entropy."""
    tag = str(pretrained_cfg(model).get("tag") or "")
    return tag if tag.partition("_")[0] in _BCE_TAGS else None


def _warn_bce(model: object) -> None:
    tag = _bce_tag(model)
    if tag is not None:
        architecture = pretrained_cfg(model).get("architecture", "this model")
        warnings.warn(
            f"the tag {tag!r} of {architecture} is trained with binary "
            "cross-entropy, if these are timm's published weights: its logits have no softmax "
            "reading, so energies are uncalibrated and ECE before temperature means little",
            EbmGuardWarning,
            stacklevel=4,
        )

"""A guard as one module from the model's input, or from pixels, to all that it says."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from ebm_guard import energy as formulas
from ebm_guard.deploy.export_ensemble import without_checks
from ebm_guard.deploy.export_scores import Cuts, calibrator_module, score_module
from ebm_guard.errors import InvalidInputError, NotFittedError, UnsupportedModelError
from ebm_guard.gate import Guard
from ebm_guard.gate.class_conditional import require_threshold
from ebm_guard.model import EnergyClassifier
from ebm_guard.model.wrappers import unwrapped

Part = TypeVar("Part", bound=nn.Module)


class GuardProgram(nn.Module):
    """Compute (logits, probabilities, energy, score, p_value, accept), as ``guard(x)`` does.

    A graph cannot raise, so a row whose *input* is NaN or infinite, or holds a pixel outside
    [0, 1], is INVALID like a row with a non-finite logit: accept False, p-value and probabilities
    0. (``guard.pixels`` raises for pixels outside [0, 1]; runtimes differ in what a ReLU makes of
    NaN, so the input is looked at and not what became of it.)

    Args:
        guard: fitted, around an ``nn.Module``.
        pixels: take [0, 1] pixels (B, C, H, W) and normalise them inside.

    Raises:
        NotFittedError: the guard is not fitted, or holds no model.
        UnsupportedModelError: the model is not an ``nn.Module``, or compiled in place.
        InvalidInputError: the score cannot be exported, or the normalisation is not known.
    """

    def __init__(self, guard: Guard, *, pixels: bool = False) -> None:
        super().__init__()
        self._classifier = exportable(guard.classifier)
        # Registered, so that its weights are the program's.
        self.model: nn.Module = self._classifier.model  # type: ignore[assignment]
        self.needs_features = guard.score.needs_features
        self.score = score_module(_on_cpu(guard.score))
        calibrator = None if guard.calibrator is None else _on_cpu(guard.calibrator)
        self.calibrator = None if calibrator is None else calibrator_module(calibrator)
        self.keeps_prediction = calibrator is not None and calibrator.keeps_prediction
        self.cuts = Cuts(require_threshold(guard.threshold))
        self.rule = None if guard.rule is None else _on_cpu(guard.rule)
        self._preprocessing = self._classifier.preprocessing if pixels else None
        if pixels and self._preprocessing is None:
            raise InvalidInputError(
                "got input='pixels', and the model's normalisation is not known; wrap it with "
                "mean=(...), std=(...), or export with input='model'"
            )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the six outputs for a batch of the program's input."""
        if self._preprocessing is None:
            usable = torch.isfinite(x).flatten(1).all(dim=1)
        else:
            usable = ((x >= 0) & (x <= 1)).flatten(1).all(dim=1)
            x = self._preprocessing.normalize(x)
        output = self._classifier.forward(x, features=self.needs_features)
        return self.decide(output.logits, output.features, usable)

    def decide(self, logits: Tensor, features: Tensor | None, usable: Tensor) -> tuple[Tensor, ...]:
        """Return the six outputs for logits (B, C), as :func:`ebm_guard.gate.deciding.decide`."""
        score = self.score(logits, features).double()
        valid = usable & torch.isfinite(logits).all(dim=1) & torch.isfinite(score)
        if features is not None:
            valid = valid & torch.isfinite(features).all(dim=1)
        log_p = (
            formulas.log_probabilities(logits)
            if self.calibrator is None
            else self.calibrator.log_probabilities(logits)  # type: ignore[operator]
        )
        accept, p_value = self.cuts(score, logits.argmax(dim=1))
        if self.rule is not None:
            label = (logits if self.keeps_prediction else log_p).argmax(dim=-1, keepdim=True)
            confidence = torch.where(valid, log_p.gather(-1, label).squeeze(-1).exp(), 0.0)
            accept = accept & self.rule.accept(confidence, score)
        return (
            # A graph's output must not be one of its inputs' views, so that runtimes keep both.
            logits.clone(),
            torch.where(valid[:, None], log_p.exp(), 0.0),
            formulas.energy(logits),
            score,
            torch.where(valid, p_value, 0.0),
            accept & valid,
        )


def exportable(classifier: EnergyClassifier | None) -> EnergyClassifier:
    """Return the classifier around the plain module on the CPU; the user's model is not changed.

    Raises:
        NotFittedError: there is no model.
        UnsupportedModelError: it is not an ``nn.Module``, or compiled in place.
    """
    if classifier is None:
        raise NotFittedError(
            "this guard holds no model, and an exported program needs one; load the guard with "
            "Guard.load(path, model)"
        )
    model = unwrapped(classifier.model)
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"the model is a {type(model).__name__}; an export traces the layers of an nn.Module "
            "written in Python. Wrap that module"
        )
    device = classifier.device
    # A deep copy keeps the layers of the verified head inside the copied model.
    own = copy.copy(classifier) if device in (None, _CPU) else copy.deepcopy(classifier)
    model = unwrapped(own.model)
    own.model = model if device in (None, _CPU) else model.to(_CPU)
    if own.compiled:
        raise UnsupportedModelError(
            "the model was compiled in place, and compiled code cannot be exported; wrap the model "
            "as it was before model.compile()"
        )
    return without_checks(own)


def _on_cpu(part: Part) -> Part:
    tensors = [*part.buffers(), *part.parameters()]
    return part if all(t.device == _CPU for t in tensors) else copy.deepcopy(part).to(_CPU)


_CPU = torch.device("cpu")

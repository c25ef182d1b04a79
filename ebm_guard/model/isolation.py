"""Run attacks on a user's model without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ebm_guard.errors import InvalidInputError
from ebm_guard.model.classifier import ClassifierOutput, EnergyClassifier
from ebm_guard.model.mode import evaluation_mode

# From pixels (B, C, H, W) in [0, 1] to logits, and features where they are needed.
Forward = Callable[[Tensor], ClassifierOutput]


@contextmanager
def untouched(model: Any, seed: int = 0) -> Iterator[None]:
    """Hold a model in eval mode, without weight gradients, and restore all of it afterwards.

    Parameters lose ``requires_grad`` for the time: no ``.grad`` is written, and backward passes do
    not pay for weights. Flags, and the state of torch's global random numbers, are restored, also
    after an exception. Inside, those numbers start from ``seed``, so that a model with random
    inference repeats itself.

    Args:
        model: the user's model, or any callable.
        seed: of torch's global generators while it lasts.

    Example:
        >>> model = nn.Linear(2, 2).eval()
        >>> with untouched(model):
        ...     model.weight.requires_grad
        False
        >>> model.weight.requires_grad
        True
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=_devices(model)))
        torch.manual_seed(seed)
        if isinstance(model, nn.Module):
            stack.enter_context(evaluation_mode(model))
            if any(isinstance(part, nn.RNNBase) for part in model.modules()):
                # cuDNN has no backward pass for recurrent layers in eval mode.
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            wanted = [part for part in model.parameters() if part.requires_grad]
            stack.callback(lambda: [part.requires_grad_(True) for part in wanted])
            for part in wanted:
                part.requires_grad_(False)
        yield


def pixel_forward(classifier: EnergyClassifier, *, features: bool = False) -> Forward:
    """Return the function from [0, 1] pixels to the classifier's output, normalisation inside.

    Runs in float32, or in the dtype of the model's parameters, with autocast off.

    Args:
        classifier: the wrapped model.
        features: also return the features; the head must have been found.

    Raises:
        InvalidInputError: the normalisation is not known, so pixel budgets have no meaning.

    Example:
        >>> from ebm_guard.model import Preprocessing
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
        >>> classifier = EnergyClassifier(model, preprocessing=Preprocessing((0.5,), (0.5,)))
        >>> pixel_forward(classifier)(torch.zeros(2, 1, 2, 2)).logits.shape
        torch.Size([2, 3])
    """
    preprocessing = classifier.preprocessing
    if preprocessing is None:
        raise InvalidInputError(
            "attacks and samplers work on [0, 1] pixels, and this model has no pretrained_cfg, so "
            "its normalisation is not known; give mean and std (0 and 1 for a model that takes "
            "[0, 1] pixels)"
        )
    dtype, device = _dtype(classifier.model), classifier.device

    def forward(pixels: Tensor) -> ClassifierOutput:
        pixels = pixels if device is None else pixels.to(device)
        inputs = preprocessing.normalize(pixels).to(dtype)
        with _autocast_off(inputs.device.type):
            return classifier.forward(inputs, features=features)

    return forward


def _dtype(model: Any) -> torch.dtype:
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    found = (part.dtype for part in parameters if part.is_floating_point())
    return next(found, torch.float32)


def _devices(model: Any) -> list[torch.device]:
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return sorted({part.device for part in parameters if part.device.type == "cuda"}, key=str)


def _autocast_off(kind: str) -> Any:
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()

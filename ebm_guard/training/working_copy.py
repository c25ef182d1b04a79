"""A deep copy of the user's model to train, and copies of it to give back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ebm_guard.errors import InvalidInputError, UnsupportedModelError, first_line
from ebm_guard.gate import Guard
from ebm_guard.model import EnergyClassifier
from ebm_guard.model.isolation import pixel_forward
from ebm_guard.model.wrappers import unwrapped

# Of the largest logit.
_MIXING = 0.01


def classifier_of(given: Any) -> tuple[EnergyClassifier, Guard | None]:
    """Return the classifier inside what the user gave, and the guard where it is one.

    Raises:
        InvalidInputError: a guard without a model, or nothing that can be trained.
    """
    if isinstance(given, Guard):
        if given.classifier is None:
            raise InvalidInputError(
                "this guard holds no model; load it with Guard.load(path, model)"
            )
        return given.classifier, given
    if isinstance(given, EnergyClassifier):
        return given, None
    return EnergyClassifier(given), None


def working_copy(classifier: EnergyClassifier, probe: Tensor) -> EnergyClassifier:
    """Copy the model, and prove that the copy is one.

    Args:
        classifier: around the user's model, which is not changed.
        probe: (B, C, H, W) pixels.

    Returns:
        A classifier around the copy, in eval mode.

    Raises:
        UnsupportedModelError: no ``nn.Module``, half-precision weights, logits that depend on the
            other images of a batch, or a copy that fails, shares weights with the model, or gives
            other logits.
    """
    model = unwrapped(classifier.model)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"got a {type(model).__name__}; fine-tuning trains weights, and needs an nn.Module"
        )
    _refuse_half(model)
    _refuse_batch_statistics(model)
    try:
        made = copy.deepcopy(model)
    except Exception as error:  # the copy runs whatever the user's model holds
        raise UnsupportedModelError(
            f"this {classifier.name} cannot be copied ({type(error).__name__}: "
            f"{first_line(error)}); fine-tuning trains a copy, so that yours stays as it is. "
            "Remove what copy.deepcopy refuses, such as tensors kept from a forward pass"
        ) from error
    ours = {part.data_ptr() for part in made.parameters() if part.numel()}
    theirs = {part.data_ptr() for part in model.parameters() if part.numel()}
    if ours & theirs:
        raise UnsupportedModelError(
            f"copy.deepcopy of this {classifier.name} shares weights with the model; fine-tuning "
            "would change them. Give a model whose __deepcopy__ copies its weights"
        )
    for part in made.modules():
        part.training = False
    for weight in made.parameters():
        weight.grad = None
    copied = around(classifier, made)
    with torch.no_grad():
        before = pixel_forward(classifier)(probe).logits
        after = pixel_forward(copied)(probe).logits
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-4):
        gap = float((before - after).abs().max())
        raise UnsupportedModelError(
            f"a copy of this {classifier.name} gives other logits than the model (by {gap:.3g}): "
            "its forward pass is random, or uses what a copy does not hold"
        )
    _refuse_mixing(copied, probe, after)
    return copied


def around(classifier: EnergyClassifier, model: nn.Module) -> EnergyClassifier:
    """Wrap another model as this classifier wraps its own."""
    return EnergyClassifier(
        model, logits=classifier._pick_logits, preprocessing=classifier.preprocessing
    )


@torch.no_grad()
def finished(copied: nn.Module, model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return a model with the best weights, flags as in the user's, in eval mode.

    Args:
        copied: the working copy, which is not changed.
        model: the user's, for its ``requires_grad`` flags.
        weights: by parameter name.
    """
    made = copy.deepcopy(copied)
    wanted = {name: part.requires_grad for name, part in unwrapped(model).named_parameters()}
    for name, part in made.named_parameters():
        if name in weights:
            part.copy_(weights[name])
        part.grad = None
        part.requires_grad_(wanted[name])
    return made


def _refuse_batch_statistics(model: nn.Module) -> None:
    found = [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None
    ]
    if found:
        raise UnsupportedModelError(
            f"got batch norm that keeps no running statistics ({', '.join(found[:3])}): it "
            "normalises by the batch also in eval mode, so data and negatives would see each "
            "other, and an image has no energy of its own. Use track_running_stats=True"
        )


def _refuse_mixing(copied: EnergyClassifier, probe: Tensor, whole: Tensor) -> None:
    """Refuse logits that depend on the other images of the batch, however that comes about."""
    forward, middle = pixel_forward(copied), len(probe) // 2
    with torch.no_grad():
        halves = torch.cat([forward(part).logits for part in (probe[:middle], probe[middle:])])
    gap = float((halves - whole).abs().max())
    # Kernels for another batch size round otherwise; a mean over the batch moves logits by more.
    if gap > _MIXING * (1 + float(whole.abs().max())):
        raise UnsupportedModelError(
            f"the logits of this {copied.name} for an image depend on the other images of its "
            f"batch (by {gap:.3g}), so an image has no energy of its own, and data and negatives "
            "would see each other. Give a model that treats every image by itself"
        )


def _refuse_half(model: nn.Module) -> None:
    half = {part.dtype for part in model.parameters()} & {torch.float16, torch.bfloat16}
    if half:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in half))
        raise UnsupportedModelError(
            f"got a model with {names} weights; small updates vanish in them. Give it in float32 "
            "(model.float()); precision='bfloat16' computes in half precision all the same"
        )

"""Scores that need a backward pass through the model, so they take inputs and a classifier."""

from __future__ import annotations

import torch
from torch import Tensor

from ebm_guard.errors import InvalidInputError, UnsupportedModelError
from ebm_guard.model import EnergyClassifier


def approximate_mass(classifier: EnergyClassifier, inputs: Tensor) -> Tensor:
    """Compute the approximate mass ||dE(x)/dx||; higher = more out-of-distribution.

    A typical sample of a density lies where there is much mass around it, so log p is flat there:
    a steep energy says that the row is atypical. It costs a forward and a backward pass, and is
    meant for models with an energy term in their training; off by default everywhere.

    Nothing of the model is touched: no parameter's gradient, no flag, no batch-norm statistics, no
    global random numbers.

    Args:
        classifier: the wrapped model.
        inputs: (B, ...) floating, exactly what the model takes; its units are those of dx.

    Returns:
        (B,) float32 or float64, on the inputs' device.

    Raises:
        InvalidInputError: the inputs are not a floating tensor.
        UnsupportedModelError: the logits do not depend on the inputs differentiably.

    References:
        Grathwohl et al., Your Classifier is Secretly an Energy Based Model, ICLR 2020, section
        5.3.3. The paper's score is the negative, high for ID; log Z drops out of the gradient.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(2, 2, bias=False).eval()
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 4.0], [3.0, 4.0]]))
        >>> approximate_mass(EnergyClassifier(layer), torch.ones(1, 2))
        tensor([5.])
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.ndim < 2:
        found = f"{inputs.dtype}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise InvalidInputError(f"got inputs of {found}; needed a floating tensor (B, ...)")
    device = classifier.device
    devices = [device] if device is not None and device.type == "cuda" else []
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=devices),
    ):
        x = inputs.detach().clone().requires_grad_(True)
        energies = classifier.energy(x)
        if not energies.requires_grad:
            raise UnsupportedModelError(
                "the model's logits carry no gradient to its inputs (it runs under no_grad, or "
                "rounds them), so dE/dx does not exist"
            )
        # Rows do not mix in eval mode, so the gradient of the sum holds each row's own.
        (gradient,) = torch.autograd.grad(energies.sum(), x)
    flat = gradient.detach().flatten(1)
    wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
    length: Tensor = torch.linalg.vector_norm(wide, dim=1)
    return length

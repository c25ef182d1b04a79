"""The head that a density of features stands on: found, asked, and set to a discriminant."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebm_guard import energy as formulas
from ebm_guard.errors import InvalidInputError, NotFittedError, UnsupportedModelError
from ebm_guard.model import EnergyClassifier
from ebm_guard.model.head import Head, capture_inputs
from ebm_guard.sampling.densities import GaussianMixture
from ebm_guard.training.context import Context

_OTHERWISE = "Otherwise keep the head as it is: head='given', with base='gaussian' or 'mixture'"


def classifier_of(context: Context) -> EnergyClassifier:
    """Return the classifier that is trained.

    Raises:
        InvalidInputError: the context has none.
    """
    if context.classifier is None:
        raise InvalidInputError(
            "this context has no classifier; densities need its features and its head"
        )
    return context.classifier


def found_head(classifier: EnergyClassifier, pixels: Tensor) -> Head:
    """Return the verified head, which is looked for once.

    Raises:
        UnsupportedModelError: there is none.
    """
    head = classifier.head
    if head is None or not head.found:
        head = classifier.probe_head(classifier.pixels(pixels[:8]))
    if not head.found:
        raise UnsupportedModelError(
            f"the head of this {classifier.name} was not found: {head.message}. A density on "
            "features needs it; small images may use space='pixels'"
        )
    return head


def head_weights(classifier: EnergyClassifier) -> tuple[Tensor, Tensor]:
    """Return W (C, D) and b (C,) of the verified head, detached."""
    head = classifier.head
    if head is None or not head.found:
        raise NotFittedError("the head was not looked for yet; call probe_head(batch) first")
    return head.weight.detach(), head.bias.detach()


def features_of(context: Context, head: Head, pixels: Tensor) -> Tensor:
    """Return the head's inputs (N, D) in the precision that the run trains in, as float64."""
    with torch.no_grad(), capture_inputs(head.layers) as inputs:
        context.logits(pixels)
    return head.features(inputs).double()


def linear_energies(head: Head, *points: Tensor) -> tuple[Tensor, ...]:
    """Compute the energies of sets of features by one product, with gradients to the head.

    In float32 or better: a difference of log densities is smaller than what bfloat16 drops, and
    data and noise must meet the same rounding.

    Args:
        head: the verified one.
        points: (N_i, D).
    """
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    with torch.autocast(points[0].device.type, enabled=False):
        rows = torch.cat([part.to(head.weight.device, dtype) for part in points])
        energies = formulas.energy(F.linear(rows, head.weight.to(dtype), head.bias.to(dtype)))
    return torch.split(energies, [len(part) for part in points])


@torch.no_grad()
def set_discriminant(
    head: Head, base: GaussianMixture, mixture: GaussianMixture, num_classes: int
) -> None:
    """Give the head the weights for which base exp(-E) is the mixture.

    Raises:
        InvalidInputError: a head whose weights cannot be set, or that is not trained as a whole;
            classes without a row.
    """
    weight, bias = _own_weights(head)
    if len(mixture.means) < num_classes:
        raise InvalidInputError(
            f"the training rows have labels of {len(mixture.means)} of {num_classes} classes; a "
            f"discriminant needs some of each. {_OTHERWISE}"
        )
    inverse = torch.cholesky_inverse(base.scale_tril)
    middle, means = base.means[0], mixture.means
    found = (means - middle) @ inverse
    squares = ((means @ inverse) * means).sum(dim=1) - middle @ inverse @ middle
    weight.copy_(found.view(weight.shape))
    bias.copy_(mixture.weights.log() - squares / 2)


def _own_weights(head: Head) -> tuple[nn.Parameter, nn.Parameter]:
    """Return weight and bias of a head that may be written to."""
    layer, names = head.layers[0], ", ".join(head.names)
    if len(head.layers) > 1 or getattr(layer, "bias", None) is None:
        raise InvalidInputError(
            f"got a head of {len(head.layers)} layers ({names}); a discriminant needs one layer "
            f"with a bias. {_OTHERWISE}"
        )
    own = dict(layer.named_parameters(recurse=False))
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or bias is None:
        raise InvalidInputError(
            f"the weights of the head {names} are computed from others (weight_norm, "
            f"spectral_norm, ...), so those of a discriminant cannot be set. {_OTHERWISE}"
        )
    still = [name for name in ("weight", "bias") if not own[name].requires_grad]
    if still:
        raise InvalidInputError(
            f"the scope does not train {' and '.join(still)} of the head {names}, which a "
            f"discriminant would replace: use scope='head'. {_OTHERWISE}"
        )
    return weight, bias


def check_fixed(classifier: EnergyClassifier, head: Head) -> None:
    """Refuse to train weights that features come from.

    Raises:
        InvalidInputError: some are.
    """
    own = {id(part) for layer in head.layers for part in layer.parameters()}
    model = classifier.model
    parts = model.named_parameters() if isinstance(model, nn.Module) else ()
    moving = [name for name, part in parts if part.requires_grad and id(part) not in own]
    if moving:
        raise InvalidInputError(
            f"{len(moving):,} weights outside of the head are trained, such as {moving[0]}: the "
            "features would move away from the density that was fitted to them. Use "
            "scope='head', or space='pixels' for small images"
        )

"""A small net and its images, which the tests of attacks share."""

import torch
from torch import nn

from ebm_guard import EnergyClassifier, Preprocessing
from ebm_guard.attacks import APGD, FGSM, PGD, Examples, pixel_forward, untouched

HALF = Preprocessing((0.5,) * 3, (0.5,) * 3)
EPSILON = 0.02
RULES = [FGSM(), PGD(6), PGD(6, norm="l2"), APGD(12), APGD(12, "l2")]


def name_of(rule):
    return f"{rule.name}-{rule.norm}"


def small_net(seed=0):
    """A smooth conv net: no pooled ties, so that rounding alone does not change its gradients."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, 5)
    )
    with torch.no_grad():
        for part in net.parameters():
            scale = (2 / part[0].numel()) ** 0.5 if part.ndim > 1 else 0.1
            part.copy_(scale * torch.randn(part.shape, generator=generator))
    return net.eval()


def pixels_of(n, seed=1, size=8):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def case(model=None, n=64, seed=1):
    """A model's forward on pixels, and images labelled by the model itself."""
    model = small_net() if model is None else model
    forward = pixel_forward(EnergyClassifier(model, preprocessing=HALF))
    pixels = pixels_of(n, seed)
    with torch.no_grad(), untouched(model):
        labels = forward(pixels).logits.argmax(dim=1)
    return forward, Examples.of(pixels, labels)

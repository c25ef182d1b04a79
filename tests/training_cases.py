"""A tiny net, batches and contexts that the tests of objectives and negatives share."""

import numpy as np
import torch
from torch import nn

from ebm_guard import EnergyClassifier
from ebm_guard.energy import energy
from ebm_guard.model import Preprocessing
from ebm_guard.model.isolation import pixel_forward
from ebm_guard.training.context import Context, Measured, PixelNet, TrainingBatch
from ebm_guard.training.negatives import Negatives

CLASSES = 3


class Fixed(Negatives):
    """Always the same negatives."""

    name = "fixed"

    def __init__(self, pixels):
        self.pixels = pixels

    def draw(self, context, batch):
        return self.pixels

    def settings(self):
        return {"negatives": self.name}


def noise(n=12, seed=7):
    return torch.from_numpy(np.random.default_rng(seed).uniform(0, 1, (n, 1, 4, 4)))


def tiny_net(seed=0, dtype=torch.float64):
    """A smooth batch-norm net for (B, 1, 4, 4), in eval mode, with logits that tell classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Softplus(),
            nn.Flatten(),
            nn.Linear(64, CLASSES),
        )
        with torch.no_grad():
            net[4].weight.mul_(3)
            net[1].running_mean.normal_(0, 0.1)
            net[1].running_var.uniform_(0.5, 1.5)
    return net.to(dtype).eval()


def batch_of(n=12, seed=0, dtype=torch.float64, labels=None):
    """Each class has its own bright half, so that images of one class look alike."""
    rng = np.random.default_rng(seed)
    classes = np.arange(n) % CLASSES if labels is None else np.asarray(labels)
    pixels = rng.uniform(0, 0.6, (n, 1, 4, 4))
    for row, label in enumerate(classes):
        pixels[row, 0, int(label) % 4] += 0.35
    pixels = torch.from_numpy(pixels).to(dtype)
    return TrainingBatch(pixels, torch.from_numpy(classes).long(), pixels, torch.arange(n))


def context_of(net=None, updates=10, update=9, scope="all", **settings):
    """A context at the end of a run, where every warm-up is over.

    With ``scope="head"`` nothing but the last layer is trained.
    """
    net = tiny_net() if net is None else net
    if scope == "head":
        for part in net[:-1].parameters():
            part.requires_grad_(False)
    classifier = EnergyClassifier(net, preprocessing=Preprocessing((0.0,), (1.0,)))
    pixels = PixelNet(classifier)
    with torch.no_grad():
        measured = Measured.of(energy(pixels(batch_of(60, seed=5).pixels.to(_dtype(net)))))
    return Context(
        pixels,
        pixel_forward(classifier),
        CLASSES,
        measured,
        updates,
        update=update,
        **{"classifier": classifier} | settings,
    )


def energies_of(context, pixels):
    """Energies with gradients to the weights."""
    return energy(context.logits(pixels))


def gradients(net, loss):
    """Flat gradient of a loss with respect to all weights."""
    found = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    zipped = zip(found, net.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zipped])


def _dtype(net):
    return next(net.parameters()).dtype

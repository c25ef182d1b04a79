"""Gaussian classes as tiny images, whose density is known, and a linear net on them."""

import math

import torch
from torch import nn

from ebm_guard import EnergyClassifier
from ebm_guard.model import Preprocessing
from ebm_guard.model.isolation import pixel_forward
from ebm_guard.sampling.densities import GaussianMixture
from ebm_guard.training.context import Context, Measured, PixelNet, TrainingBatch
from ebm_guard.training.images import TrainingImages

SCALE = 16.0  # pixels are 1/2 + h / 16
CLASSES = 3


def truth(shape=(1, 2)):
    """The density of the features: three normals, two values an image by default."""
    dim = math.prod(shape)
    means = torch.zeros(CLASSES, dim, dtype=torch.float64)
    means[0, 0], means[1, 1], means[2, :2] = 1.6, 1.6, -1.2
    return GaussianMixture(torch.tensor([0.5, 0.3, 0.2]), means, torch.eye(dim))


def rows(n, seed, shape=(1, 2)):
    """Points, their images and labels."""
    density = truth(shape)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(density.weights, n, replacement=True, generator=generator)
    normal = torch.randn(n, density.dim, generator=generator, dtype=torch.float64)
    points = density.means[labels] + normal
    pixels = (points / SCALE + 0.5).clamp(0, 1).float().view(n, 1, *shape)
    return points, pixels, labels


def linear_net(shape=(1, 2), seed=0, size=0.1):
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), CLASSES)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in net.parameters():
            part.copy_(size * torch.randn(part.shape, generator=generator))
    return net


def classifier_around(net):
    ends = Preprocessing((0.5,), (1 / SCALE,))
    return EnergyClassifier(net, preprocessing=ends)


def toy_context(net, updates=10, update=9, **settings):
    """A context whose features are the points, and that trains the head."""
    classifier = classifier_around(net)
    return Context(
        PixelNet(classifier),
        pixel_forward(classifier),
        CLASSES,
        Measured(0.0, 1.0, 2),
        updates,
        update=update,
        classifier=classifier,
        **settings,
    )


def batch(n, seed, shape=(1, 2)):
    _, pixels, labels = rows(n, seed, shape)
    return TrainingBatch(pixels, labels, pixels, torch.arange(n))


def start_net(shape=(4, 4)):
    """A linear net that knows the classes, but badly."""
    net = linear_net(shape)
    with torch.no_grad():
        net[1].weight.add_(0.5 * truth(shape).means)
    return net


def correlated(n, seed):
    """Images of two pixels that go together, which no product over pixels can say, and labels."""
    points, _, labels = rows(n, seed)
    points[:, 1] += 0.8 * points[:, 0]
    pixels = ((points / SCALE + 0.5).clamp(0, 1) * 255).round() / 255
    pixels = pixels.float().view(n, 1, 1, 2)
    return TrainingBatch(pixels, labels, pixels, torch.arange(n))


def images(n, seed, shape=(4, 4)):
    _, pixels, labels = rows(n, seed, shape)
    return TrainingImages(pixels, labels)

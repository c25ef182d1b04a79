"""Small models and data that several test modules share; none of them needs files or a network."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from ebm_guard import Predictions


def linear(inputs=4, classes=3, seed=0, dtype=torch.float32):
    """Build a linear classifier in eval mode whose logits differ well between rows."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(inputs, classes, dtype=dtype)
    with torch.no_grad():
        model.weight.copy_(torch.randn(classes, inputs, generator=generator) * 2)
        model.bias.copy_(torch.randn(classes, generator=generator))
    return model.eval()


def inputs_of(n, width=4, seed=1, dtype=torch.float32):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labelled(model, n=200, seed=1, batch_size=32, noise=0.2):
    """Batches (inputs, labels) that the model gets right except for a share ``noise``."""
    generator = torch.Generator().manual_seed(seed)
    weight = next(model.parameters())
    x = torch.randn(n, weight.shape[1], generator=generator, dtype=weight.dtype)
    with torch.no_grad():
        logits = model(x)
    labels = logits.argmax(dim=1)
    wrong = torch.rand(n, generator=generator) < noise
    labels[wrong] = (labels[wrong] + 1) % logits.shape[1]
    return list(zip(x.split(batch_size), labels.split(batch_size), strict=True))


def unlabelled(model, **settings):
    return [x for x, _ in labelled(model, **settings)]


class Pixels(nn.Module):
    """Classify (B, 3, 8, 8) by the channel means; with a pretrained_cfg."""

    def __init__(self, classes=3, size=8):
        super().__init__()
        self.fc = linear(3, classes, seed=5)
        self.pretrained_cfg = {
            "architecture": "pixels",
            "input_size": (3, size, size),
            "mean": (0.5, 0.4, 0.3),
            "std": (0.2, 0.25, 0.3),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
        }
        self.eval()

    def forward(self, x):
        return self.fc(x.mean(dim=(2, 3)))


class Moody(nn.Module):
    """Dropout and batch norm: gives other logits in train mode, and moves its statistics."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Linear(4, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(16, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            self.norm.running_mean.copy_(torch.randn(16, generator=generator))

    def forward(self, x):
        return self.last(self.drop(self.norm(self.first(x)).relu()))


def logits_with(n, classes=4, scale=3.0, accuracy=0.8, seed=0, shift=0.0):
    """Predictions with float32 logits; ``accuracy`` of the labels are the argmax."""
    generator = np.random.default_rng(seed)
    logits = (generator.normal(size=(n, classes)) * scale + shift).astype(np.float32)
    labels = logits.argmax(axis=1)
    wrong = generator.random(n) >= accuracy
    labels[wrong] = (labels[wrong] + generator.integers(1, classes, n)[wrong]) % classes
    return Predictions(logits, labels=labels.astype(np.int64), source=f"synthetic {seed}")


def with_logits(logits):
    """An output as Hugging Face models give it."""
    return SimpleNamespace(logits=logits)


def listing(folder):
    """Every path below a folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))

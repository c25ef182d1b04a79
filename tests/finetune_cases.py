"""Nets and images for the tests of fine-tuning: small, seeded, and fast."""

import numpy as np
import torch
from torch import nn

from ebm_guard import EnergyClassifier
from ebm_guard.data.demo import demo_classifier, load_demo
from ebm_guard.training import TrainingImages, finetune

# Few rows: what is tested is the loop, not the gain.
QUICK = {
    "updates": 6,
    "batch_size": 16,
    "evaluate_every": 3,
    "selection_rows": 60,
    "outlier_rows": 30,
    "max_acc_drop": 0.05,
    "max_nll_rise": 0.2,
}


def demo_sets():
    train, validation = (load_demo(role) for role in ("train", "calibration"))
    return (train.images, train.labels), (validation.images, validation.labels)


def quick(model=None, train=None, validation=None, **settings):
    """Fine-tune the demo classifier, or another model, for a few updates."""
    sets = demo_sets()
    return finetune(
        demo_classifier() if model is None else model,
        sets[0] if train is None else train,
        sets[1] if validation is None else validation,
        **(QUICK | settings),
    )


class Normed(nn.Module):
    """A small net with batch norm and dropout for 8x8 grey images."""

    def __init__(self, classes=8):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, classes)
        with torch.no_grad():
            for part in self.parameters():
                part.copy_(torch.randn(part.shape, generator=generator) / 2)
            for norm in (self.body[1], self.norm):
                norm.running_mean.copy_(torch.randn(8, generator=generator))
        self.pretrained_cfg = {"mean": (0.3,), "std": (0.4,), "input_size": (1, 8, 8)}

    def forward(self, x):
        hidden = self.norm(self.body(self.stem(x).relu())).relu()
        return self.fc(self.drop(hidden.amax(dim=(2, 3))))


def images_of(n, seed=0, classes=8, side=8):
    """Random labelled images."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 1, side, side), generator=generator, dtype=torch.uint8)
    return TrainingImages(pixels, torch.from_numpy(np.arange(n) % classes))


def images_for(model, n, seed=0, noise=0.2):
    """Random images whose labels are a model's predictions, but for a share of them."""
    images = images_of(n, seed)
    with torch.no_grad():
        logits = EnergyClassifier(model)(EnergyClassifier(model).pixels(images.all_pixels()))
    labels = torch.where(torch.arange(n) < noise * n, images.labels, logits.argmax(dim=1))
    return TrainingImages((images.all_pixels() * 255).round().to(torch.uint8), labels)


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )

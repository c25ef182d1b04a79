"""The three networks of the measurements, and guards on them with each kind of score."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import ebm_guard
from ebm_guard.data.demo import demo_classifier
from ebm_guard.model.loading import load_model
from ebm_guard.predictions import LinearHead, Predictions

ROOT = Path(__file__).parents[2]
FACTORIES = f"{ROOT / 'examples' / 'published_nets.py'}"
# Costs depend on the shape of the statistics and not on their values.
SCORES = (
    "energy", "msp", "gen", "energy_react", "energy_scale", "fdbd", "mahalanobis", "vim", "knn",
    "kmeans_energy",
)  # fmt: skip


@dataclass(frozen=True)
class Net:
    """A network and what its rows look like.

    Args:
        name: in the results.
        factory: for ``--model``, or None for the demo's own.
        checkpoint: file in the data folder.
        batch: rows of a forward pass.
        fit_rows: rows that feature scores are fitted on.
    """

    name: str
    factory: str | None
    checkpoint: str | None
    batch: int
    fit_rows: int

    def model(self, data: Path) -> nn.Module:
        """Load it in eval mode."""
        if self.factory is None:
            return demo_classifier()
        return load_model(f"{FACTORIES}:{self.factory}", checkpoint=data / str(self.checkpoint))

    def options(self, data: Path) -> list[str]:
        """Return what the command line needs to load it."""
        if self.factory is None:
            return ["--model", "ebm_guard.data.demo:demo_classifier"]
        return [
            "--model", f"{FACTORIES}:{self.factory}", "--checkpoint", str(data / str(self.checkpoint)),
        ]  # fmt: skip

    def inputs(self, model: nn.Module, rows: int) -> Tensor:
        """Return random rows of its input."""
        size = model.pretrained_cfg["input_size"]
        return torch.from_numpy(np.random.default_rng(0).normal(size=(rows, *size)).astype("f4"))


NETS = (
    Net("demo", None, None, 64, 2000),
    Net("cifar10_resnet20", "cifar10_resnet20", "cifar10_resnet20.safetensors", 64, 10_000),
    Net(
        "imagenet_efficientnet_lite0",
        "imagenet_tf_efficientnet_lite0",
        "imagenet_tf_efficientnet_lite0_fp16.safetensors",
        16,
        10_000,
    ),
)


def stored(net: Net, guard: ebm_guard.Guard, model: nn.Module) -> tuple[Predictions, Predictions]:
    """Return 5,000 calibration rows and ``fit_rows`` rows that resemble the network's own."""
    classifier = guard.classifier
    x = net.inputs(model, 32)
    head = LinearHead.of_model(classifier.probe_head(x[:8]))
    features = classifier.forward(x, features=True).features.detach().numpy()
    rng = np.random.default_rng(1)

    def rows(count: int, *, every_class: bool) -> Predictions:
        drawn = features[rng.integers(0, len(features), count)]
        noise = rng.normal(0, 0.05, drawn.shape)
        drawn = np.abs(drawn * rng.uniform(0.5, 1.5, drawn.shape) + noise).astype(np.float32)
        logits = head.logits(drawn).astype(np.float32)
        # A fifth of the labels are wrong, as temperature scaling needs; statistics of classes need
        # rows of each of them.
        balanced = np.arange(count) % logits.shape[1]
        guessed = np.where(rng.random(count) < 0.2, balanced, logits.argmax(axis=1))
        labels = balanced if every_class else guessed
        return Predictions(logits, features=drawn, labels=labels, head=head)

    return rows(5000, every_class=False), rows(net.fit_rows, every_class=True)


def guards(net: Net, data: Path, scores: tuple[str, ...] = SCORES) -> dict[str, ebm_guard.Guard]:
    """Return one fitted guard for each score, all of one network."""
    model = net.model(data)
    calibration, fit = stored(net, ebm_guard.wrap(model), model)
    canary = net.inputs(model, 8)
    found = {}
    for score in scores:
        rows = fit if guard_needs_features(score) else None
        guard = ebm_guard.wrap(model)
        found[score] = guard.fit(calibration, fit_data=rows, score=score, canary=canary)
    return found


def guard_needs_features(score: str) -> bool:
    return score not in ("energy", "msp", "maxlogit", "gen")

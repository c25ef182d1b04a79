"""A small batch-norm network for 28x28 grey images, and its training by plain cross-entropy.

    python examples/fashion_cnn.py --data DIR --seed 0 --output fashion_cnn.safetensors

DIR holds fashion_mnist_train20k.npz. The factory gives the network with random weights and a
`pretrained_cfg`, for `--model examples/fashion_cnn.py:fashion_cnn --checkpoint FILE`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
EPOCHS, BATCH_SIZE, LEARNING_RATE = 4, 64, 2e-3


def fashion_cnn() -> nn.Module:
    """Return the network in eval mode with random weights: pixels / 255, (B, 1, 28, 28)."""

    def stage(width_in: int, width: int) -> list[nn.Module]:
        convolution = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(width), nn.ReLU()]

    net = nn.Sequential(
        *stage(1, 16),
        *stage(16, 16),
        nn.MaxPool2d(2),
        *stage(16, 32),
        *stage(32, 32),
        nn.MaxPool2d(2),
        *stage(32, 32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, len(CLASSES)),
    )
    net.pretrained_cfg = {
        "architecture": "fashion_cnn",
        "input_size": (1, 28, 28),
        "mean": (0.0,),
        "std": (1.0,),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "label_names": CLASSES,
    }
    return net.eval()


def train(pixels: Tensor, labels: Tensor, seed: int, epochs: int = EPOCHS) -> nn.Module:
    """Train the network with cross-entropy; equal seeds give equal weights on one machine.

    Args:
        pixels: (N, 1, 28, 28) in [0, 1].
        labels: (N,) int64.
        seed: of the first weights and of the order.
        epochs: passes over the data; the learning rate falls to 0 along a cosine.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = fashion_cnn().train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    steps = epochs * (len(pixels) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        order = torch.randperm(len(pixels), generator=generator)
        for rows in order.split(BATCH_SIZE)[: len(pixels) // BATCH_SIZE]:
            loss = F.cross_entropy(net(pixels[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def load_rows(path: Path) -> tuple[Tensor, Tensor]:
    """Read images (N, 28, 28) uint8 and labels as pixels (N, 1, 28, 28) in [0, 1] and int64."""
    with np.load(path) as stored:
        images, labels = stored["images"], stored["labels"]
    return torch.from_numpy(images)[:, None].float() / 255, torch.from_numpy(labels).long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    net = train(*load_rows(args.data / "fashion_mnist_train20k.npz"), seed=args.seed)
    save_file(net.state_dict(), args.output)


if __name__ == "__main__":
    main()

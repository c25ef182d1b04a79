"""What a step of our sampler costs, against the reference loop of JEM on the same energies.

Run: python tests/benchmarks/bench_sampling.py --data DIR [--batch 64] [--steps 20] [--rounds 3]
     [--output FILE.json]

ResNet-20 with published weights on CIFAR-10 test images, CPU, one thread. The reference is the loop
of JEM's released code, in its kinder form: eval mode, gradients of the pixels alone, the graph
retained, noise for the whole batch, no box. Both go the same number of steps of the same size. CPU
seconds are taken in pairs, in an order that alternates; a speed is theirs over ours. DIR is the
folder of real data and weights.

The update of JEM is cross-entropy and E(x+) - E(x-) on one forward pass, after SGLD from a buffer:
ours as `ebm_guard.training` has it, theirs as three passes and the loop above.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebm_guard import EnergyClassifier
from ebm_guard.model.isolation import pixel_forward, untouched
from ebm_guard.model.loading import load_model
from ebm_guard.sampling import SGLD, SamplingNet, energy_and_gradient

NETS = Path(__file__).parents[2] / "examples" / "published_nets.py"
FACTORY = "cifar10_resnet20"
STEP, NOISE = 0.25, 0.005


def images(folder: Path, n: int) -> tuple[Tensor, Tensor]:
    with np.load(folder / "cifar10_test.npz", allow_pickle=False) as found:
        pixels, labels = found["images"][:n], found["labels"][:n]
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255
    return values, torch.from_numpy(labels)


def reference(energy: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
    """Sample as JEM's code does."""
    points = start.clone().requires_grad_()
    for _ in range(steps):
        gradient = torch.autograd.grad(energy(points).sum(), [points], retain_graph=True)[0]
        points.data += -STEP * gradient + NOISE * torch.randn_like(points)
    return points.detach()


def seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def paired(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Take both in each round, after one of each that is not counted."""
    ours(), theirs()
    taken: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(rounds):
        pair = [("ours", ours), ("theirs", theirs)]
        for name, run in pair if number % 2 == 0 else pair[::-1]:
            taken[name].append(seconds(run))
    speeds = [b / a for a, b in zip(taken["ours"], taken["theirs"], strict=True)]
    return {
        "cpu_seconds_ours": statistics.median(taken["ours"]),
        "cpu_seconds_theirs": statistics.median(taken["theirs"]),
        "speed_median": statistics.median(speeds),
        "speeds": speeds,
    }


def sampling(model: nn.Module, pixels: Tensor, steps: int, rounds: int) -> dict[str, Any]:
    classifier = EnergyClassifier(model)
    forward = pixel_forward(classifier)

    def energy(points: Tensor) -> Tensor:
        return -torch.logsumexp(forward(points).logits, dim=1)

    net = SamplingNet(classifier, pixels[:8])
    plain = SGLD(steps, STEP, NOISE, box=None)
    generator = torch.Generator().manual_seed(0)
    (ours, steep), (theirs, exact) = (
        energy_and_gradient(each, pixels) for each in (net.energy, energy)
    )
    result = {
        "net": net.settings(),
        "energy_gap": float((ours - theirs).abs().max()),
        "gradient_gap": float((steep - exact).norm() / exact.norm()),
        "same_rule": paired(
            lambda: plain.run(net.energy, pixels, generator),
            lambda: reference(energy, pixels, steps),
            rounds,
        ),
        "refresh_cpu_seconds": statistics.median(seconds(net.refresh) for _ in range(9)),
    }
    with untouched(model):
        unfolded = paired(
            lambda: plain.run(energy, pixels, generator),
            lambda: reference(energy, pixels, steps),
            rounds,
        )
    return {**result, "without_the_copy": unfolded}


def bfloat16(model: nn.Module, pixels: Tensor, rounds: int) -> dict[str, Any]:
    """Measure what `auto` leaves out on a CPU: it pays only where bfloat16 is native."""
    classifier, generator = EnergyClassifier(model), torch.Generator().manual_seed(0)
    forward = pixel_forward(classifier)

    def energy(points: Tensor) -> Tensor:
        return -torch.logsumexp(forward(points).logits, dim=1)

    net = SamplingNet(classifier, pixels[:8], precision="bfloat16")
    sampler = SGLD(5, STEP, NOISE, box=None)
    with torch.no_grad():
        gap = (net.energy(pixels) - energy(pixels)).abs()
    return {
        "energy_gap_mean": float(gap.mean()),
        "energy_gap": float(gap.max()),
        **paired(
            lambda: sampler.run(net.energy, pixels, generator),
            lambda: reference(energy, pixels, 5),
            rounds,
        ),
    }


def jem_update(model: nn.Module, pixels: Tensor, labels: Tensor, rounds: int) -> dict[str, Any]:
    """Compare one update of JEM, sampling and optimiser included."""
    theirs = Reference(deepcopy(model), pixels, labels)
    ours = Ours(deepcopy(model), pixels, labels)
    return paired(ours.update, theirs.update, rounds)


class Reference:
    """The update of JEM's code, in eval mode."""

    def __init__(self, model: nn.Module, pixels: Tensor, labels: Tensor) -> None:
        self.forward = pixel_forward(EnergyClassifier(model))
        self.pixels, self.labels = pixels, labels
        self.buffer = torch.rand(10_000, *pixels.shape[1:])
        self.optimiser = torch.optim.Adam(model.parameters(), 1e-5)

    def energy(self, points: Tensor) -> Tensor:
        return -torch.logsumexp(self.forward(points).logits, dim=1)

    def update(self) -> None:
        n = len(self.pixels)
        slots = torch.randint(0, len(self.buffer), (n,))
        fresh = (torch.rand(n) < 0.05).float()[:, None, None, None]
        start = fresh * torch.rand_like(self.pixels) + (1 - fresh) * self.buffer[slots]
        negatives = reference(self.energy, start, 20)
        self.buffer[slots] = negatives
        loss = self.energy(self.pixels).mean() - self.energy(negatives).mean()
        loss = loss + F.cross_entropy(self.forward(self.pixels).logits, self.labels)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()


class Ours:
    """The same update by our objective, with 20 steps from a buffer of uniform starts."""

    def __init__(self, model: nn.Module, pixels: Tensor, labels: Tensor) -> None:
        from ebm_guard.training.context import Context, Measured, PixelNet, TrainingBatch
        from ebm_guard.training.objectives import make_objective

        classifier = EnergyClassifier(model)
        self.sampling = SamplingNet(classifier, pixels[:8])
        with torch.no_grad():
            measured = Measured.of(self.sampling.energy(pixels))
        net = PixelNet(classifier)
        self.context = Context(net, self.sampling, 10, measured, updates=1000)
        self.batch = TrainingBatch(pixels, labels, pixels, torch.arange(len(labels)))
        self.objective = make_objective("jem", num_steps=20)
        self.objective.begin(self.context, self.batch)
        self.optimiser = torch.optim.Adam(model.parameters(), 1e-5)

    def update(self) -> None:
        loss = self.objective.loss(self.context, self.batch).total
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.sampling.refresh()
        self.context.update += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = load_model(
        f"{NETS}:{FACTORY}", checkpoint=arguments.data / f"{FACTORY}.safetensors"
    ).eval()
    pixels, labels = images(arguments.data, arguments.batch)
    result: dict[str, Any] = {
        "what": "ResNet-20, CIFAR-10 test images, CPU, one thread; speed = theirs / ours",
        "batch": arguments.batch,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "sampling": sampling(model, pixels, arguments.steps, arguments.rounds),
        "bfloat16": bfloat16(model, pixels, arguments.rounds),
        "jem_update": jem_update(model, pixels, labels, max(2, arguments.rounds // 2)),
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

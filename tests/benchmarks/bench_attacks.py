"""What a verdict costs: our attacks against foolbox's PGD and pyautoattack's standard AutoAttack.

Run: python tests/benchmarks/bench_attacks.py --data DIR [--images 200] [--strong-images 50]
     [--rounds 2] [--output FILE.json]

ResNet-20 on the first images of the CIFAR-10 test set, linf. Gradients and images passed forward
are counted at the net itself, so they hang on no machine. CPU seconds are taken in pairs, in an
order that alternates; ratios are ours over theirs. DIR is the folder of real data and weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ebm_guard import EnergyClassifier
from ebm_guard.attacks import (
    APGD,
    PGD,
    Examples,
    Misclassify,
    Query,
    TargetedMisclassify,
    climb,
    pixel_forward,
    untouched,
)
from ebm_guard.model.loading import load_model

NETS = Path(__file__).parents[2] / "examples" / "published_nets.py"
FACTORY = "cifar10_resnet20"


class Counted(nn.Module):
    """Count images that pass forward, and those whose gradient is taken."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.pretrained_cfg = net, net.pretrained_cfg
        self.forwards = self.gradients = 0

    def forward(self, images: Tensor) -> Tensor:
        self.forwards += len(images)
        logits: Tensor = self.net(images)
        if images.requires_grad and logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def _backward(self, gradient: Tensor) -> None:
        self.gradients += len(gradient)

    def taken(self, run: Callable[[], Tensor]) -> dict[str, Any]:
        """Run once; return costs for each image and the share that stands."""
        self.forwards = self.gradients = 0
        start = time.process_time()
        stands = run()
        seconds = time.process_time() - start
        return {
            "robust": int(stands.sum()) / len(stands),
            "gradients_per_image": self.gradients / len(stands),
            "forwards_per_image": self.forwards / len(stands),
            "cpu_seconds": seconds,
        }


class Rivals:
    """The same images for every attack."""

    def __init__(self, folder: Path, n: int) -> None:
        net = load_model(f"{NETS}:{FACTORY}", checkpoint=folder / f"{FACTORY}.safetensors")
        self.model = Counted(net).eval()
        self.forward = pixel_forward(EnergyClassifier(self.model))
        with np.load(folder / "cifar10_test.npz", allow_pickle=False) as found:
            images, labels = found["images"][:n], found["labels"][:n]
        self.pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 255
        self.labels = torch.from_numpy(labels)

    def pgd(self, epsilon: float) -> Tensor:
        examples = Examples.of(self.pixels, self.labels)
        with untouched(self.model):
            query = Query(self.forward, Misclassify())
            return ~climb(PGD(20), query, examples, epsilon).success

    def foolbox_pgd(self, epsilon: float) -> Tensor:
        import foolbox

        cfg = self.model.pretrained_cfg
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = foolbox.PyTorchModel(
                self.model,
                bounds=(0, 1),
                preprocessing={"mean": cfg["mean"], "std": cfg["std"], "axis": -3},
            )
            attack = foolbox.attacks.LinfPGD(rel_stepsize=0.125, steps=20)
            parts = [
                attack(model, pixels, labels, epsilons=epsilon)[2]
                for pixels, labels in zip(self.pixels.split(64), self.labels.split(64), strict=True)
            ]
        return ~torch.cat(parts)

    def strong(self, epsilon: float) -> Tensor:
        """APGD-CE, APGD-DLR, then APGD-T by rank, each on the survivors of the last."""
        examples = Examples.of(self.pixels, self.labels)
        goals = [Misclassify("ce"), Misclassify("dlr"), *map(TargetedMisclassify, range(1, 10))]
        with untouched(self.model):
            for number, goal in enumerate(goals):
                query = Query(self.forward, goal)
                outcome = climb(APGD(100), query, examples, epsilon, seed=(0, number))
                examples = examples.select(~outcome.success)
                if not len(examples):
                    break
        return torch.isin(torch.arange(len(self.labels)), examples.ids)

    def autoattack(self, epsilon: float) -> Tensor:
        import pyautoattack

        attack = pyautoattack.AutoAttack(
            lambda pixels: self.forward(pixels).logits, norm="Linf", eps=epsilon, seed=0
        )
        with untouched(self.model):
            attacked, _ = attack.run_standard_evaluation(self.pixels, self.labels, batch_size=64)
            return self.forward(attacked).logits.argmax(dim=1) == self.labels


def paired(
    rivals: Rivals, one: Callable[[], Tensor], other: Callable[[], Tensor], rounds: int
) -> dict[str, Any]:
    """Take both in each round; counts are those of the last round, times of all."""
    results: dict[Callable[[], Tensor], dict[str, Any]] = {}
    ratios = []
    for number in range(rounds):
        for run in (one, other) if number % 2 == 0 else (other, one):
            results[run] = rivals.model.taken(run)
        ratios.append(results[one].pop("cpu_seconds") / results[other].pop("cpu_seconds"))
    ours, theirs = results[one], results[other]
    return {
        "ours": ours,
        "theirs": theirs,
        "gradients_ratio": ours["gradients_per_image"] / theirs["gradients_per_image"],
        "cpu_ratio_median": statistics.median(ratios),
        "cpu_ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--strong-images", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "what": "ResNet-20, first images of the CIFAR-10 test set, linf, CPU, one thread",
        "rounds": arguments.rounds,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    rivals = Rivals(arguments.data, arguments.images)
    result["pgd20_against_foolbox"] = {"images": arguments.images}
    for unit in (1, 2, 8):
        epsilon = unit / 255
        result["pgd20_against_foolbox"][f"{unit}/255"] = paired(
            rivals,
            lambda epsilon=epsilon: rivals.pgd(epsilon),
            lambda epsilon=epsilon: rivals.foolbox_pgd(epsilon),
            arguments.rounds,
        )
    rivals = Rivals(arguments.data, arguments.strong_images)
    result["apgd_against_autoattack"] = {"images": arguments.strong_images}
    for unit in (1, 8):
        epsilon = unit / 255
        result["apgd_against_autoattack"][f"{unit}/255"] = paired(
            rivals,
            lambda epsilon=epsilon: rivals.strong(epsilon),
            lambda epsilon=epsilon: rivals.autoattack(epsilon),
            arguments.rounds,
        )
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

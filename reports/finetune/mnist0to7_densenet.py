"""Fine-tune the published MNIST-0..7 DenseNet by `margin`, against its published fine-tuned twin.

    python reports/finetune/mnist0to7_densenet.py --data DIR [--updates 100] [--scope all]

Two runs from `_pretrained`: without any real outlier (negatives are made from the batch), and with 32
images of MNIST train 8 and 9, as the published `_energy_ft` had. Training: MNIST train 0..7;
validation: other rows of MNIST train. Figures: every second image of MNIST test, digits 8 and 9 as
OOD; the run with 32 real outliers has seen their kind, the other has not. DIR is the folder of real
data and weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor

import ebm_guard
from ebm_guard.model.loading import load_model

HERE = Path(__file__).parent / "mnist0to7_densenet"
NETS = Path(__file__).parents[2] / "examples" / "published_nets.py"
FACTORY = "mnist0to7_densenet_bc100_k12"
ARMS = ("made", "real_8_and_9")


def digits(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Read a split of MNIST."""
    path = data / "mnist.npz"
    return common.read_images(path, f"{split}_images"), common.read_labels(path, f"{split}_labels")


def net_of(data: Path, name: str) -> torch.nn.Module:
    """Load one of the published networks."""
    return load_model(f"{NETS}:{FACTORY}", checkpoint=data / f"{FACTORY}_{name}.safetensors")


def run(data: Path, updates: int, seed: int, scope: str, arms: list[str]) -> dict[str, Any]:
    """Fine-tune and measure; the published pair is measured on the same rows."""
    pixels, labels = digits(data, "test")
    pixels, labels = pixels[::2], labels[::2]
    known = labels < 8
    n = int(known.sum())
    sets = common.Sets(
        pixels[known], labels[known], np.arange(0, n, 2), {"digits_8_9": pixels[~known]}, ()
    )
    pixels, labels = digits(data, "train")
    inside = torch.nonzero(labels < 8).flatten()
    outliers = pixels[labels >= 8][:32]
    train, validation = inside[:8000], inside[8000:9200]
    judged, rows = {}, {}
    for name in ("pretrained", "energy_ft"):
        judged[name] = common.judge(net_of(data, name), sets)
        rows[name] = {"status": "published", "cpu_seconds": 0.0}
    for arm in arms:
        with common.Clock() as clock:
            result = ebm_guard.finetune(
                net_of(data, "pretrained"),
                (pixels[train], labels[train]),
                (pixels[validation], labels[validation]),
                objective="margin",
                outliers=outliers if arm == "real_8_and_9" else None,
                updates=updates,
                batch_size=32,
                scope=scope,
                # This net passes some 30 images a second: fewer evaluations, on fewer rows.
                evaluate_every=max(1, updates // 2),
                outlier_rows=80,
                seed=seed,
            )
        print(f"{arm}: {result.status}, {result.reason}", file=sys.stderr)
        judged[arm] = common.judge(result.candidate or result.start, sets)
        rows[arm] = {
            "status": result.status,
            "reason": result.reason,
            "cpu_seconds": clock.seconds,
            "settings": result.settings,
        }
    return {
        arm: rows[arm]
        | common.figures(part, sets)
        | {
            "against_start": _against(part, judged["pretrained"], sets),
            "against_energy_ft": _against(part, judged["energy_ft"], sets),
        }
        for arm, part in judged.items()
    }


def _against(part: common.Judged, start: common.Judged, sets: common.Sets) -> dict[str, Any]:
    found = common.against(part, start, sets, groups={"auroc_all": tuple(sets.ood)})
    return {name: found[name] for name in ("accuracy", "auroc_all")}


def page(found: Mapping[str, Mapping[str, Any]], command: str, updates: int) -> str:
    """Return the README of the folder."""
    lines = [
        "| net | accuracy | ECE | energy AUROC, 8 and 9 | FPR95 | AUROC to pretrained | to energy_ft | CPU s | status |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for arm, row in found.items():
        lines.append(
            f"| {arm} | {row['accuracy']:.4f} | {row['ece']:.4f} "
            f"| {row['auroc']['digits_8_9']:.4f} | {row['fpr95']['digits_8_9']:.4f} "
            f"| {common.signed(row['against_start']['auroc_all'], digits=2)} "
            f"| {common.signed(row['against_energy_ft']['auroc_all'], digits=2)} "
            f"| {row['cpu_seconds']:.0f} | {row['status']} |"
        )
    return f"""# MNIST 0..7 DenseNet: our margin against the published fine-tuned net

Made by `{command}`; figures, settings and the environment are in `results.json`. {updates} updates of 32
images. `made`: negatives are made from the batch, no real outlier. `real_8_and_9`: 32 images of MNIST
train 8 and 9, half of the negatives. Every second image of MNIST test; what is shown for an arm is what
training reached, also where the start was returned. `energy_ft` is the published net, which was
fine-tuned with 32 outliers; on the whole test set it has AUROC 0.9988. The columns `to ...` are
differences in AUROC points with paired 95 % intervals (DeLong).

{chr(10).join(lines)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scope", default="all")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()
    # Values that are too small for float32's normal range slow this net down several times.
    torch.set_flush_denormal(True)
    found = run(args.data, args.updates, args.seed, args.scope, args.arms)
    command = (
        "python reports/finetune/mnist0to7_densenet.py --data DIR "
        f"--updates {args.updates} --seed {args.seed} --scope {args.scope}"
    )
    content = {"command": command, "arms": found}
    common.write(args.output, content, page(found, command, args.updates))


if __name__ == "__main__":
    main()

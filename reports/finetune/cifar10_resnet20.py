"""Fine-tune the published CIFAR-10 ResNet-20 and compare with a cross-entropy control.

    python reports/finetune/cifar10_resnet20.py --data DIR [--updates 200] [--arms margin dat]

Training: cifar10_train10k, a part of what that network was trained on. Validation (selection,
acceptance, guard): the first 5,000 test images. Figures: the other 5,000, and CIFAR-100 and
textures, which no run saw. DIR is the folder of real data and weights. `--render` writes the page
again from results.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common
import numpy as np

import ebm_guard
from ebm_guard.model.loading import load_model

HERE = Path(__file__).parent / "cifar10_resnet20"
NETS = Path(__file__).parents[2] / "examples" / "published_nets.py"
CONTROL = "cross_entropy"
# What an arm differs in from the package's defaults: an objective, and its settings.
ARMS: dict[str, tuple[str, dict[str, float]]] = {
    CONTROL: (CONTROL, {}),
    "margin": ("margin", {}),
    "margin, weight 1, outside 4": ("margin", {"weight": 1.0, "outside": 4.0}),
    "dat": ("dat", {}),
}
AUGMENT = "flip_crop"


def run(data: Path, updates: int, seed: int, arms: list[str]) -> dict[str, Any]:
    """Fine-tune by every arm and measure."""
    start = load_model(f"{NETS}:cifar10_resnet20", checkpoint=data / "cifar10_resnet20.safetensors")
    pixels = common.read_images(data / "cifar10_test.npz")
    labels = common.read_labels(data / "cifar10_test.npz")
    known = pixels[5000:]
    sets = common.Sets(
        known,
        labels[5000:],
        np.arange(0, len(known), 2),
        {
            # The other rows were looked at while the package's defaults were chosen.
            "cifar100": common.read_images(data / "cifar100_test3k.npz")[1500:],
            "dtd": common.read_images(data / "dtd_1200_32x32.npz")[1::2],
        },
        ("cifar100", "dtd"),
    )
    training = (
        common.read_images(data / "cifar10_train10k.npz"),
        common.read_labels(data / "cifar10_train10k.npz"),
    )
    judged = {"start": common.judge(start, sets)}
    rows: dict[str, Any] = {"start": {"status": "-", "cpu_seconds": 0.0}}
    for arm in arms:
        objective, chosen = ARMS[arm]
        with common.Clock() as clock:
            result = ebm_guard.finetune(
                start,
                training,
                (pixels[:5000], labels[:5000]),
                objective=objective,
                objective_settings=chosen,
                updates=updates,
                augment=AUGMENT,
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
        | {"against_control": common.against(part, judged[CONTROL], sets)}
        for arm, part in judged.items()
    }


def page(found: Mapping[str, Mapping[str, Any]], updates: int, seed: int) -> str:
    """Return the README of the folder."""
    lines = [
        "| arm | accuracy | NLL after T | ECE | ECE after T | cifar100 | dtd | CPU s | status |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for arm, row in found.items():
        sets = " | ".join(
            f"{row['auroc'][name]:.4f} ({row['fpr95'][name]:.3f})" for name in ("cifar100", "dtd")
        )
        lines.append(
            f"| {arm} | {row['accuracy']:.4f} | {row['nll_after_temperature']:.4f} "
            f"| {row['ece']:.4f} | {row['ece_after_temperature']:.4f} | {sets} "
            f"| {row['cpu_seconds']:.0f} | {row['status']} |"
        )
    changes = [
        "| arm | accuracy | cifar100 AUROC | dtd AUROC | mean of both |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for arm, row in found.items():
        if arm != CONTROL:
            part = row["against_control"]
            changes.append(
                f"| {arm} | {common.signed(part['accuracy'])} "
                f"| {common.signed(part['auroc']['cifar100'])} "
                f"| {common.signed(part['auroc']['dtd'])} "
                f"| {common.signed(part['auroc_natural'])} |"
            )
    return f"""# CIFAR-10 ResNet-20, fine-tuned

Made by `python reports/finetune/cifar10_resnet20.py --data DIR --updates {updates} --seed {seed}`; all
figures, settings and the environment are in `results.json`. {updates} updates of 64 images of cifar10_train10k,
mirrored and shifted for the cross-entropy. `margin` and `dat` are the package's defaults; other settings
are in the name of the arm. 5,000 test images that nothing was chosen on. Columns cifar100 and dtd: energy
AUROC (FPR95) on images that no run saw; the settings were chosen on the other half of each of these two
sets. What is shown for an arm is what training reached, also where the start was returned.

{chr(10).join(lines)}

Differences to the cross-entropy control, in points, with paired 95 % intervals:

{chr(10).join(changes)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--render", action="store_true")
    args = parser.parse_args()
    if args.render:
        content = json.loads((args.output / "results.json").read_text(encoding="utf-8"))
    else:
        arms = [CONTROL, *(arm for arm in args.arms if arm != CONTROL)]
        found = run(args.data, args.updates, args.seed, arms)
        content = {"updates": args.updates, "seed": args.seed, "arms": found}
    text = page(content["arms"], content["updates"], content["seed"])
    common.write(args.output, content, text)


if __name__ == "__main__":
    main()

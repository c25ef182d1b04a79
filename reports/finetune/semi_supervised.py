"""Fine-tune with 100 and with 1,000 labels, with and without the images that have none.

    python reports/finetune/semi_supervised.py --data DIR [--seeds 0 1 2] [--updates 200]

Fashion-MNIST, 20,000 training images of which 100 or 1,000 have a label. For each seed and number of
labels a small network (examples/fashion_cnn.py) is trained on the labelled images alone by plain
cross-entropy; every arm starts from it. The validation rows (2,400 test images, in three disjoint parts)
have labels: nothing can be accepted without. Everything in the table is measured on 5,000 other test
images and on OOD images that no run saw. `--render` writes the page again from results.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import common
from fashion_cnn import load_rows, train
from fashion_mnist import sets_of

import ebm_guard

HERE = Path(__file__).parent / "semi_supervised"
CONTROL = "labelled only"
LABELS = (100, 1000)
# Steps of the labelled-only training that every arm starts from.
STEPS = 300
VALIDATION = 2400
# Settings, and whether the arm sees the images without label.
ARMS: dict[str, tuple[dict[str, Any], bool]] = {
    CONTROL: ({"objective": "cross_entropy"}, False),
    "labelled only, margin": ({"objective": "margin"}, False),
    "entropy": ({"objective": "cross_entropy", "regularisers": ["entropy"]}, True),
    "margin": ({"objective": "margin"}, True),
    "margin + entropy": ({"objective": "margin", "regularisers": ["entropy"]}, True),
    "dat": ({"objective": "dat"}, True),
    "jem": ({"objective": "jem"}, True),
}


def labelled_rows(labels: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Return row numbers, as many of every class."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    per_class = count // 10
    return torch.cat([order[labels[order] == label][:per_class] for label in range(10)])


def run(data: Path, seed: int, count: int, updates: int) -> dict[str, Any]:
    """Train on the labelled images, fine-tune by every arm, and measure all of them."""
    sets, (validation, targets) = sets_of(data)
    pixels, labels = load_rows(data / "fashion_mnist_train20k.npz")
    rows = labelled_rows(labels, count, seed)
    rest = torch.from_numpy(np.setdiff1d(np.arange(len(labels)), rows.numpy()))
    epochs = max(1, STEPS // max(1, count // 64))
    start = train(pixels[rows], labels[rows], seed, epochs=epochs)
    judged, facts = {"start": common.judge(start, sets)}, {"start": {"status": "-"}}
    for arm, (settings, unlabelled) in ARMS.items():
        with common.Clock() as clock:
            result = ebm_guard.finetune(
                start,
                (pixels[rows], labels[rows]),
                (validation[:VALIDATION], targets[:VALIDATION]),
                unlabelled=pixels[rest] if unlabelled else None,
                updates=updates,
                seed=seed,
                **settings,
            )
        print(f"{count} labels, seed {seed}, {arm}: {result.status}", file=sys.stderr)
        net = result.start if result.candidate is None else result.candidate
        judged[arm] = common.judge(net, sets)
        facts[arm] = common.outcome(result, clock)
    return common.compared(facts, judged, sets, CONTROL)


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one row for each arm: means over the seeds, and the spread of the accuracy gain."""
    head = (
        "| arm | accuracy | gain over the control, by seed | ECE after T | AUROC, natural sets "
        "| AUROC, all sets | CPU s | status by seed |"
    )
    lines = [
        head,
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for arm in next(iter(found.values())):
        rows = [seed[arm] for seed in found.values()]
        natural = [np.mean([row["auroc"][name] for name in _NATURAL]) for row in rows]
        every = [np.mean(list(row["auroc"].values())) for row in rows]
        gains = ", ".join(common.signed(row["against_control"]["accuracy"]) for row in rows)
        seconds = [row.get("cpu_seconds") for row in rows]
        cells = [
            arm,
            f"{np.mean([row['accuracy'] for row in rows]):.4f}",
            gains if arm != CONTROL else "",
            f"{np.mean([row['ece_after_temperature'] for row in rows]):.3f}",
            f"{np.mean(natural):.3f}",
            f"{np.mean(every):.3f}",
            "" if None in seconds else f"{np.mean(seconds):.0f}",
            ", ".join(common.status(row) for row in rows),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


_NATURAL = ("mnist", "grey_cifar10", "grey_dtd")


def page(content: Mapping[str, Any]) -> str:
    """Return the README of the folder."""
    seeds = next(iter(content["labels"].values()))
    parts = "\n\n".join(
        f"## {int(count):,} labels\n\n{table(found)}" for count, found in content["labels"].items()
    )
    return f"""# Fashion-MNIST with few labels

Made by `python reports/finetune/semi_supervised.py --data DIR --seeds {" ".join(seeds)} --updates
{content["updates"]}`; all figures, settings and the environment are in `results.json`. {len(seeds)} seeds, each with
labelled images and a network of its own. Of 20,000 training images 100 or 1,000 have a label; the start
was trained on these alone for {STEPS} steps. `labelled only` is the control: cross-entropy on the labelled
images for as many updates as the others have. Half of every batch of the other arms has no label. Gains in
points, with paired 95 % intervals on 5,000 test images. What is shown for an arm is what training
reached, also where the acceptance test gave the start back; `no usable state` means that no evaluation of
the run was within its limits, and the figures are the start's. The 2,400 validation rows have labels, and
choose the checkpoint: with 100 labels for training that is the dearer part, and it is the price of an
acceptance test that can say no.

Images without label made no arm more accurate than its start on the mean of the seeds. What they buy is the energy: with 100
labels `margin` and `dat` tell natural unknown images apart better with them than `margin` does on the
labelled images alone, wherever a run ended in a usable state; with 1,000 labels `margin` gains nothing by
them.

{parts}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--render", action="store_true")
    args = parser.parse_args()
    if args.render:
        content = json.loads((args.output / "results.json").read_text(encoding="utf-8"))
    else:
        found = {
            str(count): {
                str(seed): run(args.data, seed, count, args.updates) for seed in args.seeds
            }
            for count in LABELS
        }
        content = {"updates": args.updates, "labels": found}
    common.write(args.output, content, page(content))


if __name__ == "__main__":
    main()

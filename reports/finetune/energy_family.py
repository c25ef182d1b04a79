"""Fine-tune a small Fashion-MNIST network with every objective, class loss and regulariser.

    python reports/finetune/energy_family.py --data DIR [--seeds 0 1 2] [--updates 100] [--only ARM ...]

The wide table beside `fashion_mnist.py`, which compares six objectives in depth: one row for each
registered objective and class loss, for negatives made by corruption and for score matching, all
against cross-entropy alone, three seeds. DIR is the folder of real data. `--only` runs some arms, and the
control, and puts them into the results that are there; `--render` writes the page again from them.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import common
from fashion_cnn import load_rows, train
from fashion_mnist import NATURAL, sets_of

import ebm_guard
from ebm_guard import registry
from ebm_guard.training import make_regulariser

HERE = Path(__file__).parent / "energy_family"
CONTROL = "cross_entropy"
# Rows that are judged: a third of those of fashion_mnist.py.
KNOWN, OOD, VALIDATION = 2500, 1000, 2400


def arms() -> dict[str, dict[str, Any]]:
    """Return the settings of every row of the table, in its order."""
    objectives = [row.name for row in registry.methods("objective")]
    losses = [row.name for row in registry.methods("class_loss") if row.name != "nll"]
    found: dict[str, dict[str, Any]] = {CONTROL: {"objective": CONTROL}}
    found |= {name: {"objective": name} for name in objectives if name != CONTROL}
    # By default the given head is trained on; this starts from the head of a discriminant.
    for name in ("nce", "fce"):
        found[f"{name}, gaussian base"] = {
            "objective": name,
            "objective_settings": {"base": "gaussian"},
        }
    found["margin, denoising negatives"] = {
        "objective": "margin",
        "objective_settings": {"negatives": "denoising"},
    }
    # The other regulariser acts on images without label, of which there are none here.
    found["cross_entropy + dsm"] = {"objective": CONTROL, "regularisers": ["dsm"]}
    found["margin + dsm"] = {"objective": "margin", "regularisers": ["dsm"]}
    strong = {"regularisers": [make_regulariser("dsm", weight=1.0)]}
    found["margin + dsm, weight 1"] = {"objective": "margin", **strong}
    found |= {f"class loss {name}": {"objective": CONTROL, "class_loss": name} for name in losses}
    return found


def few(sets: common.Sets) -> common.Sets:
    """Return the first rows of every set."""
    return common.Sets(
        sets.pixels[:KNOWN],
        sets.labels[:KNOWN],
        sets.half[sets.half < KNOWN],
        {name: pixels[:OOD] for name, pixels in sets.ood.items()},
        sets.natural,
    )


def run_seed(data: Path, seed: int, updates: int, only: list[str] | None) -> dict[str, Any]:
    """Train a network, fine-tune it by every arm, or some and the control, and measure all."""
    sets, (validation, targets) = sets_of(data)
    sets = few(sets)
    pixels, labels = load_rows(data / "fashion_mnist_train20k.npz")
    start = train(pixels, labels, seed)
    judged, facts = {"start": common.judge(start, sets)}, {"start": {"status": "-"}}
    for arm, settings in arms().items():
        if only is not None and arm not in (CONTROL, *only):
            continue
        with common.Clock() as clock, warnings.catch_warnings():
            warnings.simplefilter("ignore", ebm_guard.errors.EbmGuardWarning)
            result = ebm_guard.finetune(
                start,
                (pixels, labels),
                (validation[:VALIDATION], targets[:VALIDATION]),
                updates=updates,
                selection_rows=600,
                outlier_rows=150,
                seed=seed,
                **settings,
            )
        print(f"seed {seed} {arm}: {result.status}, {result.reason}", file=sys.stderr)
        # What training reached is judged, also where the user would get the start back.
        net = result.start if result.candidate is None else result.candidate
        judged[arm] = common.judge(net, sets)
        facts[arm] = common.outcome(result, clock)
    return common.compared(facts, judged, sets, CONTROL)


def table(seeds: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one row for each arm: means over the seeds, differences as means of the intervals."""
    sets = next(iter(seeds.values()))["start"]["auroc"]
    lines = [
        "| arm | accuracy | to the control | ECE after T | "
        + " | ".join(sets)
        + " | natural sets, to the control | CPU s | status by seed |",
        "| --- | ---: | ---: | ---: |" + " ---: |" * (len(sets) + 2) + " --- |",
    ]
    for arm in next(iter(seeds.values())):
        rows = [found[arm] for found in seeds.values()]
        versus = [row["against_control"] for row in rows]
        seconds = [row.get("cpu_seconds") for row in rows]
        cells = [
            arm,
            f"{np.mean([row['accuracy'] for row in rows]):.4f}",
            ""
            if arm == CONTROL
            else common.signed(averaged([part["accuracy"] for part in versus])),
            f"{np.mean([row['ece_after_temperature'] for row in rows]):.3f}",
            *(f"{np.mean([row['auroc'][name] for row in rows]):.3f}" for name in sets),
            ""
            if arm == CONTROL
            else common.signed(averaged([part["auroc_natural"] for part in versus])),
            "" if None in seconds else f"{np.mean(seconds):.0f}",
            ", ".join(common.status(row) for row in rows),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def averaged(parts: list[Mapping[str, Any]]) -> dict[str, float]:
    """Average values and ends: the rows are the same for all seeds, so nothing is gained in n."""
    return {key: float(np.mean([part[key] for part in parts])) for key in ("value", "low", "high")}


def page(content: Mapping[str, Any]) -> str:
    """Return the README of the folder."""
    seeds = content["seeds"]
    minutes = (
        sum(row.get("cpu_seconds", 0) for found in seeds.values() for row in found.values()) / 60
    )
    return f"""# Fashion-MNIST, the whole family

Made by `python reports/finetune/energy_family.py --data DIR --seeds {" ".join(seeds)} --updates
{content["updates"]}` in {minutes:.0f} CPU-minutes of fine-tuning; all figures, settings and the environment are in
`results.json`. {len(seeds)} seeds, each with a network of its own (examples/fashion_cnn.py), which every arm starts
from; {content["updates"]} updates of 64 images with the package's default settings. The figures are of {KNOWN:,} test
images and at most {OOD:,} images of each OOD set; none of them was seen by a run. The first block are
objectives, with negatives by corruption and score matching behind them; the second are class losses in
the place of cross-entropy, without any energy term.

`{"`, `".join(NATURAL)}` are natural images of no kind that a run trained on or chose by; `flipped` is kin to
rotations, and `uniform_noise` is a kind that checkpoints are chosen by. AUROC is that of the energy. ECE
after T: the temperature is fitted on every second row and measured on the others. Differences in points,
with paired 95 % intervals, averaged over the seeds. What is shown for an arm is what training reached, also
where the acceptance test gave the start back; `no usable state` means that no evaluation of the run was
within its limits, and the figures are the start's.

{table(seeds)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=list(arms()))
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--render", action="store_true")
    args = parser.parse_args()
    if args.render:
        content = json.loads((args.output / "results.json").read_text(encoding="utf-8"))
    else:
        torch.set_num_threads(1)
        stored = args.output / "results.json"
        known = (
            json.loads(stored.read_text(encoding="utf-8"))["seeds"]
            if args.only and stored.exists()
            else {}
        )
        seeds = {}
        for seed in args.seeds:
            found = run_seed(args.data, seed, args.updates, args.only)
            both = known.get(str(seed), {}) | found
            seeds[str(seed)] = {arm: both[arm] for arm in ("start", *arms()) if arm in both}
        content = {"updates": args.updates, "seeds": seeds}
    common.write(args.output, content, page(content))


if __name__ == "__main__":
    main()

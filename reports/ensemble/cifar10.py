"""Compose the published CIFAR-10 ResNet-20 and DenseNet, and compare with simpler ways.

    OMP_NUM_THREADS=1 python reports/ensemble/cifar10.py --data DIR

Calibration (energies' means and deviations, temperatures): the first 1,000 test images. Figures: the
2,000 after them, and the first 1,000 images each of CIFAR-100 and textures. DIR is the folder of
real data and weights. Logits are kept in a folder for temporary files, so a second run is quick.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax

from ebm_guard import EnergyClassifier, Predictions, predict
from ebm_guard.calibration import row_statistics
from ebm_guard.calibration.calibrators import make_calibrator
from ebm_guard.calibration.metrics import accuracy, ece, nll
from ebm_guard.intervals import mean
from ebm_guard.model import EnergyEnsemble
from ebm_guard.model.loading import load_model
from ebm_guard.ood import make_score
from ebm_guard.ood.metrics import auroc, auroc_difference

HERE = Path(__file__).parent
NETS = Path(__file__).parents[2] / "examples" / "published_nets.py"
MEMBERS = ("cifar10_resnet20", "cifar10_densenet_bc100_k12")
AVERAGE = "mean of probabilities"
CALIBRATION, EVALUATION, OOD = 1000, 2000, 1000
SETS = {"cifar100": "cifar100_test3k.npz", "dtd": "dtd_1200_32x32.npz"}

Floats = NDArray[np.float64]
# The logits of one model by set: calibration, evaluation, cifar100, dtd.
Logits = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Arm:
    """A way to turn two networks into one answer.

    Args:
        logits: by set.
        energies: whether the logits carry an energy; those of averaged probabilities do not.
    """

    logits: Logits
    energies: bool = True


def read(data: Path) -> tuple[dict[str, NDArray[np.uint8]], dict[str, NDArray[np.int64]]]:
    """Return images and labels by set."""
    known = np.load(data / "cifar10_test.npz")
    until = CALIBRATION + EVALUATION
    images = {
        "calibration": known["images"][:CALIBRATION],
        "evaluation": known["images"][CALIBRATION:until],
    } | {name: np.load(data / file)["images"][:OOD] for name, file in SETS.items()}
    labels = known["labels"].astype(np.int64)
    return images, {
        "calibration": labels[:CALIBRATION],
        "evaluation": labels[CALIBRATION:until],
    }


def member_logits(
    classifier: EnergyClassifier, images: Mapping[str, NDArray[np.uint8]], cache: Path
) -> tuple[Logits, float]:
    """Run a network over all sets, or read what an earlier run kept; and the seconds it took."""
    key = str(classifier.weights_hash()).removeprefix("sha256:")[:16]
    path = cache / f"{classifier.name}-{key}-{CALIBRATION}-{EVALUATION}-{OOD}.npz"
    if not path.exists():
        begin = time.process_time()
        found = {}
        for name, part in images.items():
            pixels = torch.from_numpy(part).permute(0, 3, 1, 2).float() / 255
            batches = (classifier.pixels(block) for block in pixels.split(250))
            found[name] = np.asarray(predict(classifier, batches).logits)
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(path, seconds=time.process_time() - begin, **found)
    stored = np.load(path, allow_pickle=False)
    return {name: stored[name] for name in images}, float(stored["seconds"])


def composed(ensemble: EnergyEnsemble, members: list[Logits]) -> Arm:
    """Fit an ensemble on the calibration logits and compose all sets."""
    parts = {name: [torch.from_numpy(member[name]) for member in members] for name in members[0]}
    ensemble.fit_logits(parts["calibration"])
    return Arm({name: ensemble.compose(part).numpy() for name, part in parts.items()})


def arms(nets: list[EnergyClassifier], members: list[Logits], labels: NDArray[np.int64]) -> Any:
    """Return every way by name."""
    temperatures = [
        float(make_calibrator("temperature").fit(part["calibration"], labels).temperature)
        for part in members
    ]
    found = {net.name: Arm(part) for net, part in zip(nets, members, strict=True)}
    found[AVERAGE] = Arm(
        {
            name: np.log(
                np.mean([softmax(part[name].astype(float), axis=1) for part in members], 0)
            )
            for name in members[0]
        },
        energies=False,
    )
    found["mean of logits"] = Arm(
        {name: np.mean([part[name] for part in members], axis=0) for name in members[0]}
    )
    for combine in ("product", "mixture"):
        found[combine] = composed(EnergyEnsemble(nets, combine=combine), members)
        calibrated = EnergyEnsemble(nets, combine=combine, temperatures=temperatures)
        found[f"{combine}, T of each member"] = composed(calibrated, members)
    return found, temperatures


@dataclass(frozen=True)
class Judged:
    """Per-row figures of an arm, for paired differences."""

    right: Floats
    loss: Floats
    scores: Mapping[str, Mapping[str, Floats]]


def judge(arm: Arm, labels: Mapping[str, NDArray[np.int64]]) -> tuple[dict[str, Any], Judged]:
    """Measure one arm on the evaluation rows and the OOD sets."""
    calibrator = make_calibrator("temperature").fit(
        arm.logits["calibration"], labels["calibration"]
    )
    temperature = float(calibrator.temperature)
    logits, truth = arm.logits["evaluation"].astype(np.float64), labels["evaluation"]
    before, after = (row_statistics(logits, truth, each) for each in (1.0, temperature))
    scaled = logits / temperature
    loss = logsumexp(scaled, axis=1) - scaled[np.arange(len(truth)), truth]
    scores = {
        name: {
            part: make_score(name).of(Predictions(arm.logits[part]))
            for part in ("evaluation", *SETS)
        }
        for name in (("energy", "msp") if arm.energies else ("msp",))
    }
    figures = {
        "temperature": temperature,
        "accuracy": accuracy(after).to_dict(),
        "nll": nll(before).to_dict(),
        "nll_after_temperature": nll(after).to_dict(),
        "ece": ece(before).to_dict(),
        "ece_after_temperature": ece(after).to_dict(),
        "auroc": {
            name: {part: auroc(found["evaluation"], found[part]).to_dict() for part in SETS}
            for name, found in scores.items()
        },
    }
    right = (logits.argmax(axis=1) == truth).astype(np.float64)
    return figures, Judged(right, loss, scores)


def against(arm: Judged, other: Judged, score: str, other_score: str) -> dict[str, Any]:
    """Return paired differences, arm minus other."""
    mine, theirs = arm.scores[score], other.scores[other_score]
    return {
        "accuracy": mean(arm.right - other.right).to_dict(),
        "nll_after_temperature": mean(arm.loss - other.loss).to_dict(),
        "auroc": {
            name: auroc_difference(
                mine["evaluation"], theirs["evaluation"], [mine[name]], [theirs[name]]
            ).to_dict()
            for name in SETS
        },
    }


def run(data: Path, cache: Path) -> dict[str, Any]:
    """Measure every arm."""
    images, labels = read(data)
    nets = [
        EnergyClassifier(load_model(f"{NETS}:{name}", checkpoint=data / f"{name}.safetensors"))
        for name in MEMBERS
    ]
    runs = [member_logits(net, images, cache) for net in nets]
    found, temperatures = arms(nets, [part for part, _ in runs], labels["calibration"])
    judged = {name: judge(arm, labels) for name, arm in found.items()}
    rows = {name: figures for name, (figures, _) in judged.items()}
    for figures, mine in judged.values():
        average = judged[AVERAGE][1]
        figures["against_average"] = {
            score: against(mine, average, score, "msp") for score in mine.scores
        }
        if "energy" in mine.scores:
            figures["energy_against_members"] = {
                net.name: against(mine, judged[net.name][1], "energy", "energy")["auroc"]
                for net in nets
            }
    return {
        "rows": {"calibration": CALIBRATION, "evaluation": EVALUATION, "each OOD set": OOD},
        "members": {
            net.name: {"weights_hash": net.weights_hash(), "cpu_seconds": seconds, "T": temperature}
            for net, (_, seconds), temperature in zip(nets, runs, temperatures, strict=True)
        },
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        "arms": rows,
    }


def page(found: Mapping[str, Any]) -> str:
    """Return the README of the folder."""
    table = [
        (
            "| arm | accuracy | NLL | NLL after T | ECE | ECE after T | energy: cifar100 | dtd "
            "| msp: cifar100 | dtd |"
        ),
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    differences = [
        "| arm | accuracy | NLL after T | msp: cifar100 | dtd | energy: cifar100 | dtd |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    alone = list(found["members"])
    members = [
        f"| arm | {' | '.join(f'{name}: cifar100 | dtd' for name in alone)} |",
        "| --- |" + " ---: |" * (2 * len(alone)),
    ]
    for name, row in found["arms"].items():
        cells = [
            f"{row[key]['value']:.4f}"
            for key in ("accuracy", "nll", "nll_after_temperature", "ece", "ece_after_temperature")
        ]
        for score in ("energy", "msp"):
            part = row["auroc"].get(score)
            cells += [f"{part[each]['value']:.4f}" if part else "-" for each in SETS]
        table.append(f"| {name} | {' | '.join(cells)} |")
        if name == AVERAGE:
            continue
        part = row["against_average"]
        cells = [_points(part["msp"]["accuracy"]), _nats(part["msp"]["nll_after_temperature"])]
        for score in ("msp", "energy"):
            cells += [_points(part[score]["auroc"][each]) for each in SETS]
        differences.append(f"| {name} | {' | '.join(cells)} |")
        if name not in alone:
            cells = [
                _points(row["energy_against_members"][other][each])
                for other in alone
                for each in SETS
            ]
            members.append(f"| {name} | {' | '.join(cells)} |")
    counts = found["rows"]
    return TEXT.format(
        table="\n".join(table),
        differences="\n".join(differences),
        members="\n".join(members),
        best=_best(found["arms"]),
        seconds=", ".join(f"{n}: {m['cpu_seconds']:.0f} s" for n, m in found["members"].items()),
        **{key.split()[0]: value for key, value in counts.items()},
    )


TEXT = """# CIFAR-10: ResNet-20 and DenseNet as one energy-based model

Made by `OMP_NUM_THREADS=1 python reports/ensemble/cifar10.py --data DIR`; all figures, intervals and the
environment are in `results.json`. {calibration:,} test images for what is calibrated, {evaluation:,} others for
the figures, {each:,} images of each OOD set. CPU time of the networks:
{seconds}.
The average of probabilities has no energy. All arms run both networks but the first two.

{table}

{best}

Differences to the average of probabilities, with paired 95 % intervals: accuracy and AUROC in points,
NLL in nats (lower is better). The energy columns compare the arm's energy with the average's msp.

{differences}

The energy's AUROC against the energy of each member alone, in points:

{members}
"""


def _best(rows: Mapping[str, Any]) -> str:
    """Say which arm is ahead; chosen after the fact, so a narrow lead says little."""

    def area(name: str, score: str) -> float:
        return float(np.mean([metric["value"] for metric in rows[name]["auroc"][score].values()]))

    def loss(name: str) -> float:
        return float(rows[name]["nll_after_temperature"]["value"])

    energies = sorted(
        (n for n in rows if "energy" in rows[n]["auroc"]), key=lambda n: -area(n, "energy")
    )
    odds = sorted(rows, key=lambda n: -area(n, "msp"))
    losses = sorted(rows, key=loss)
    return (
        f"Lowest NLL after T: {losses[0]} ({loss(losses[0]):.4f}; next {losses[1]}, "
        f"{loss(losses[1]):.4f}).\n"
        f"Highest mean AUROC of the energy: {energies[0]} ({area(energies[0], 'energy'):.4f}; next "
        f"{energies[1]}, {area(energies[1], 'energy'):.4f}).\n"
        f"Highest mean AUROC of msp: {odds[0]} ({area(odds[0], 'msp'):.4f}; next {odds[1]}, "
        f"{area(odds[1], 'msp'):.4f}).\n"
        "The leaders are named after the fact: a narrow lead says little. The mean of logits needs "
        "no fit, and is the one to beat."
    )


def _points(metric: Mapping[str, Any]) -> str:
    value, low, high = (100 * metric[key] for key in ("value", "low", "high"))
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _nats(metric: Mapping[str, Any]) -> str:
    return f"{metric['value']:+.4f} [{metric['low']:+.4f}, {metric['high']:+.4f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "ebm_guard_ensemble"
    )
    parser.add_argument("--render", action="store_true", help="write the page from results.json")
    args = parser.parse_args()
    path = args.output / "results.json"
    if not args.render:
        args.output.mkdir(parents=True, exist_ok=True)
        found = run(args.data, args.cache)
        path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    text = page(json.loads(path.read_text(encoding="utf-8")))
    (args.output / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

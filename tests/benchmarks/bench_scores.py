"""What the nine scores cost: over the bare model, against pytorch-ood, and in memory to fit.

Run: python tests/benchmarks/bench_scores.py [--batch 8] [--rounds 20] [--output FILE.json]

Ratios are taken within a round, in an order that alternates, so that a drift of the machine
cancels. Without pytorch-ood (the `bench` extra) its parts are left out. Weights and features are
random: costs do not depend on them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

from ebm_guard.model import EnergyClassifier
from ebm_guard.ood import Score, make_score
from ebm_guard.predictions import LinearHead, Predictions

NINE = ("energy", "msp", "maxlogit", "gen", "energy_react", "energy_scale", "vim", "mahalanobis")
NINE += ("knn",)
WIDTH = 512


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def paired(
    one: Callable[[], object], other: Callable[[], object], rounds: int
) -> dict[str, object]:
    """Time both in each round; the ratio is one over other."""
    one(), other()
    ratios = []
    for number in range(rounds):
        first, second = (one, other) if number % 2 == 0 else (other, one)
        times = {first: seconds(first), second: seconds(second)}
        ratios.append(times[one] / times[other])
    return {
        "ratio_median": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "rounds": rounds,
    }


def rows_of(n: int, classes: int, folder: Path | None = None) -> Predictions:
    """Rows around class means with a head that sees them, in memory or memory-mapped."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(classes, WIDTH)).astype(np.float32) / 8
    labels = np.arange(n) % classes
    shapes = {"features": (n, WIDTH), "logits": (n, classes)}
    if folder is None:
        arrays = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
    else:
        arrays = {
            name: np.memmap(folder / name, np.float32, "w+", shape=shape)
            for name, shape in shapes.items()
        }
    for start in range(0, n, 2000):
        part = slice(start, min(start + 2000, n))
        near = weight[labels[part]] * 4
        arrays["features"][part] = np.abs(near + rng.normal(size=near.shape)).astype(np.float32)
        arrays["logits"][part] = arrays["features"][part] @ weight.T
    return Predictions(
        **arrays,
        labels=labels,
        head=LinearHead(weight),
        hashes=np.arange(n, dtype=np.uint64),
    )


def nine_scores(rows: Predictions) -> list[Score]:
    return [make_score(name).fit(rows) for name in NINE]


def over_the_bare_model(batch: int, rounds: int) -> dict[str, object]:
    model = timm.create_model("resnet18.tv_in1k").eval()
    classifier = EnergyClassifier(model)
    x = torch.randn(batch, 3, 224, 224)
    classifier.probe_head(x)
    # 50 images of each of 1,000 classes: the whole bank of kNN, a mean of each class.
    scores = nine_scores(rows_of(50_000, 1000))

    @torch.no_grad()
    def bare() -> object:
        return model(x)

    @torch.no_grad()
    def scored() -> object:
        output = classifier.forward(x, features=True)
        return [score(output.logits, output.features) for score in scores]

    result = paired(scored, bare, rounds)
    with torch.no_grad():
        output = classifier.forward(x, features=True)
        forward = statistics.median(seconds(bare) for _ in range(5))
        result["share_of_forward"] = {
            score.name: statistics.median(
                seconds(lambda score=score: score(output.logits, output.features)) for _ in range(5)
            )
            / forward
            for score in scores
        }
    return {"what": "nine scores in one pass / model(x), resnet18, 224 px"} | result


def mahalanobis_against(detectors: object, rounds: int) -> dict[str, object]:
    found = {}
    for classes in (10, 100):
        fit, rows = rows_of(5000, classes), rows_of(10_000, classes)
        ours = make_score("mahalanobis", normalize=False).fit(fit)
        theirs = detectors.Mahalanobis(None)
        theirs.fit_features(torch.from_numpy(fit.features), torch.from_numpy(fit.labels))
        logits, features = torch.from_numpy(rows.logits), torch.from_numpy(rows.features)
        found[f"{classes}_classes"] = paired(
            lambda theirs=theirs, features=features: theirs.predict_features(features),
            lambda ours=ours, pair=(logits, features): ours(*pair),
            rounds,
        )
    return {"what": "pytorch-ood / ours, Mahalanobis predict, 10,000 x 512"} | found


def images_against(detectors: object, batch: int, rounds: int) -> dict[str, object]:
    """Nine detectors of pytorch-ood, each called on images as its page says."""
    model = timm.create_model("resnet18.tv_in1k").eval()
    classifier = EnergyClassifier(model)
    x = torch.randn(batch, 3, 224, 224)
    classifier.probe_head(x)
    rows = rows_of(10_000, 1000)
    scores = nine_scores(rows)
    layer = nn.Linear(WIDTH, 1000)

    def encoder(values: torch.Tensor) -> torch.Tensor:
        return model.forward_head(model.forward_features(values), pre_logits=True)

    def head(maps: torch.Tensor) -> torch.Tensor:
        return layer(maps.mean(dim=(2, 3)))

    features, labels = torch.from_numpy(rows.features), torch.from_numpy(rows.labels)
    theirs = [
        detectors.EnergyBased(model),
        detectors.MaxSoftmax(model),
        detectors.MaxLogit(model),
        detectors.GEN(model),
        detectors.ReAct(model.forward_features, head, threshold=1.0),
        detectors.SCALE(model.forward_features, head),
        detectors.ViM(encoder, 256, layer.weight, layer.bias).fit_features(features, labels),
        detectors.Mahalanobis(encoder).fit_features(features, labels),
        detectors.KNN(encoder).fit_features(features, labels),
    ]

    @torch.no_grad()
    def one_pass() -> object:
        output = classifier.forward(x, features=True)
        return [score(output.logits, output.features) for score in scores]

    @torch.no_grad()
    def nine_passes() -> object:
        return [detector(x) for detector in theirs]

    result = paired(nine_passes, one_pass, rounds)
    return {"what": "nine pytorch-ood detectors / our nine, resnet18, 224 px"} | result


def _anonymous_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return 0.0


def _fit_peak(name: str, folder: str, n: int, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    rows = rows_of(n, 10, Path(folder))
    settings = {"bank_size": 5000} if name == "knn" else {}
    before, peak, done = _anonymous_mb(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    make_score(name, **settings).fit(rows)
    done.set()
    watcher.join()
    queue.put(peak - before)


def fit_memory() -> dict[str, object]:
    context = multiprocessing.get_context("spawn")
    found: dict[str, object] = {"what": "peak MiB that fit adds, D = 512, rows on disk, bank 5,000"}
    for name in ("energy_react", "vim", "mahalanobis", "knn"):
        peaks = {}
        for n in (10_000, 100_000):
            with tempfile.TemporaryDirectory() as folder:
                queue = context.Queue()
                child = context.Process(target=_fit_peak, args=(name, folder, n, queue))
                child.start()
                peaks[str(n)] = round(queue.get(), 1)
                child.join()
        found[name] = peaks
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    batch, rounds = arguments.batch, arguments.rounds
    result: dict[str, object] = {
        "one_pass": over_the_bare_model(batch, rounds),
        "fit_memory": fit_memory(),
    }
    try:
        from pytorch_ood import detector as detectors
    except ImportError:
        result["pytorch_ood"] = "not installed"
    else:
        result["mahalanobis"] = mahalanobis_against(detectors, rounds)
        result["images"] = images_against(detectors, batch, rounds)
    result |= {
        "batch": batch,
        "threads": 1,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""CPU-seconds of a million images: the bare model, the guard, and each score by itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nets import NETS, Net, guards


def cpu(run: Callable[[], object], repeats: int = 1) -> float:
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats


@torch.no_grad()
def paired(one: Callable[[], object], other: Callable[[], object], rounds: int) -> dict[str, Any]:
    """Time both in turn; the ratio is other / one of the same round."""
    one(), other()
    times: list[tuple[float, float]] = []
    for number in range(rounds):
        if number % 2:
            first = cpu(one)
            times.append((first, cpu(other)))
        else:
            second = cpu(other)
            times.append((cpu(one), second))
    ratios = [b / a for a, b in times]
    return {
        "bare": statistics.median(a for a, _ in times),
        "gated": statistics.median(b for _, b in times),
        "ratio_median": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "rounds": rounds,
    }


@torch.no_grad()
def measure_net(net: Net, data: Path, rounds: int) -> dict[str, Any]:
    made = guards(net, data)
    guard = made["energy"]
    model = guard.classifier.model
    x = net.inputs(model, net.batch)
    pair = paired(lambda: model(x), lambda: guard(x), rounds)
    million = 1e6 / net.batch
    guard.classifier.probe_head(x[:8])
    output = guard.classifier.forward(x, features=True)
    decisions = {}
    for score, one in made.items():
        features = output.features if one.score.needs_features else None
        one.decide(output.logits, features)
        runs = [cpu(lambda: one.decide(output.logits, features), 5) for _ in range(9)]  # noqa: B023
        decisions[score] = million * statistics.median(runs)
    bare = million * pair["bare"]
    return {
        "batch": net.batch,
        "classes": output.logits.shape[1],
        "features": output.features.shape[1],
        "rows_of_feature_statistics": net.fit_rows,
        "bare_cpu_seconds_per_million": bare,
        "guard_over_bare_ratio_median": pair["ratio_median"],
        "guard_over_bare_ratio_quartiles": pair["ratio_quartiles"],
        "rounds": pair["rounds"],
        "decision_cpu_seconds_per_million": decisions,
        "decision_share_of_bare": {name: value / bare for name, value in decisions.items()},
    }


def measure(data: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    rounds = {"demo": 60, "cifar10_resnet20": 40, "imagenet_efficientnet_lite0": 8}
    return {net.name: measure_net(net, data, rounds[net.name]) for net in NETS}

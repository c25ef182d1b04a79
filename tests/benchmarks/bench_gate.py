"""What the energy gate costs over the bare model: ResNet-18 at 224 px, paired ratios.

Run: python tests/benchmarks/bench_gate.py [--batch 8] [--rounds 40] [--output FILE.json]

Each round times the bare model and the guard one after the other, on the same batch, in an order
that alternates; the ratio is taken within the round, so that a drift of the machine cancels.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch

import ebm_guard


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Random weights: the cost does not depend on them. A cross-entropy tag warns of nothing.
    model = timm.create_model("resnet18.tv_in1k").eval()
    guard = ebm_guard.wrap(model)
    logits = torch.randn(1000, 1000).numpy()
    labels = torch.randint(0, 1000, (1000,)).numpy()
    guard.fit(ebm_guard.Predictions(logits, labels=labels), canary=False)
    x = torch.randn(arguments.batch, 3, 224, 224)

    def bare() -> object:
        with torch.no_grad():
            return model(x)

    def gated() -> object:
        return guard(x)

    for run in (bare, gated):
        run()
    ratios, bare_seconds = [], []
    for number in range(arguments.rounds):
        first, second = (bare, gated) if number % 2 == 0 else (gated, bare)
        times = {first: seconds(first), second: seconds(second)}
        ratios.append(times[gated] / times[bare])
        bare_seconds.append(times[bare])
    with torch.no_grad():
        fixed = model(x)
    decide = [seconds(lambda: guard.decide(fixed)) for _ in range(50)]
    result = {
        "what": "guard(x) / model(x), resnet18, 224 px, CPU, one thread",
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "ratio_median": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "decide_share_of_forward": statistics.median(decide) / statistics.median(bare_seconds),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

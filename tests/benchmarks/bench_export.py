"""What the gate costs inside an exported program: CIFAR-10 ResNet-20, paired ratios.

Run: OMP_NUM_THREADS=1 python tests/benchmarks/bench_export.py [--formats onnx torch] [--rounds 400]
     --output reports/benchmarks/export.json

The bare model is exported alone, and with the gate (temperature, one cut, 5,000 calibration scores;
and with a cut for each class). Each round runs both on the same batch, one after the other, in an
order that alternates; the ratio is taken within the round, so that a drift of the machine cancels.
p50 and p99 are of wall time, which other work on the machine lengthens; CPU time is beside them.
Needs the extra onnx for the format onnx. Weights are random: the cost does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import ebm_guard
from ebm_guard.deploy import export
from ebm_guard.model.loading import load_model

NETS = Path(__file__).parents[2] / "examples" / "published_nets.py"
ROWS = torch.export.Dim("batch", min=1)
Run = Callable[[Tensor], object]
LEAST_P99 = 100


def bare(model: nn.Module, x: Tensor, format_: str, folder: Path) -> Run:
    if format_ == "torch":
        graph = torch.export.export(model, (x,), dynamic_shapes=({0: ROWS},), strict=False)
        return graph.module()
    path = folder / "bare.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        graph = torch.export.export(model, (x,), dynamic_shapes=({0: ROWS},), strict=False)
        torch.onnx.export(graph, f=str(path), dynamo=True, verbose=False, input_names=["input"])
    return session(path)


def session(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    made = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: made.run(None, {"input": x.numpy()})


def gated(guard: ebm_guard.Guard, x: Tensor, format_: str, folder: Path) -> Run:
    path = folder / f"gated.{format_}"
    program = export(guard, format_, path, example=x)
    return session(path) if format_ == "onnx" else program.run


def seconds(run: Run, x: Tensor) -> tuple[float, float]:
    start, used = time.perf_counter(), time.process_time()
    run(x)
    return time.perf_counter() - start, time.process_time() - used


@torch.no_grad()
def paired(plain: Run, whole: Run, x: Tensor, rounds: int) -> dict[str, object]:
    for run in (plain, whole) * 3:
        run(x)
    times: dict[Run, list[tuple[float, float]]] = {plain: [], whole: []}
    for number in range(rounds):
        for run in (plain, whole) if number % 2 else (whole, plain):
            times[run].append(seconds(run, x))
    bare, gated = (np.array(times[run]) for run in (plain, whole))
    found: dict[str, object] = {"rounds": rounds}
    for place, clock in enumerate(("wall", "cpu")):
        ratios = gated[:, place] / bare[:, place]
        found[clock] = {
            "bare_ms_p50": 1e3 * float(np.median(bare[:, place])),
            "gated_ms_p50": 1e3 * float(np.median(gated[:, place])),
            "ratio_median": float(np.median(ratios)),
            "ratio_quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
        }
    # Below a hundred rounds the 99th percentile is the slowest round and nothing else.
    if rounds >= LEAST_P99:
        p99 = [1e3 * float(np.quantile(part[:, 0], 0.99)) for part in (bare, gated)]
        found["p99"] = {"bare_ms": p99[0], "gated_ms": p99[1], "ratio": p99[1] / p99[0]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", default=["onnx", "torch"])
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = load_model(f"{NETS}:cifar10_resnet20").eval()
    logits = torch.randn(5000, 10) * 4
    labels = logits.argmax(dim=1)
    labels[::5] = (labels[::5] + 1) % 10
    stored = ebm_guard.Predictions(logits.numpy(), labels=labels.numpy())
    x = torch.randn(64, 3, 32, 32)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for format_ in arguments.formats:
            plain = bare(model, x[:2], format_, folder)
            for gate, settings in (("one_cut", {}), ("cut_per_class", {"per_class": True})):
                guard = ebm_guard.wrap(model).fit(stored, canary=False, **settings)
                whole = gated(guard, x, format_, folder)
                for batch in (1, 64):
                    rounds = arguments.rounds if batch == 1 else max(20, arguments.rounds // 8)
                    key = f"{format_}, {gate}, batch {batch}"
                    found[key] = paired(plain, whole, x[:batch], rounds)
    result = {
        "what": "exported model with its gate / exported model, ResNet-20, 32 px, one thread",
        "found": found,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

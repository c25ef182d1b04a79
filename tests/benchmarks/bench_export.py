"""What the gate costs inside an exported program: CIFAR-10 ResNet-20, paired ratios.

Run: python tests/benchmarks/bench_export.py [--formats onnx torch] [--rounds 200] [--output FILE]

The bare model is exported alone, and with the gate (temperature, one cut, 5,000 calibration scores;
and with a cut for each class). Each round runs both on the same batch, one after the other, in an
order that alternates; the ratio is taken within the round, so that a drift of the machine cancels.
Needs the extra onnx for the format onnx. Weights are random: the cost does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import ebm_guard
from ebm_guard.deploy import export
from ebm_guard.model.loading import load_model

NETS = Path(__file__).parents[2] / "examples" / "published_nets.py"
ROWS = torch.export.Dim("batch", min=1)
Run = Callable[[Tensor], object]


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


def seconds(run: Run, x: Tensor) -> float:
    start = time.perf_counter()
    run(x)
    return time.perf_counter() - start


@torch.no_grad()
def paired(plain: Run, whole: Run, x: Tensor, rounds: int) -> dict[str, float]:
    for run in (plain, whole) * 3:
        run(x)
    times: dict[Run, list[float]] = {plain: [], whole: []}
    for number in range(rounds):
        for run in (plain, whole) if number % 2 else (whole, plain):
            times[run].append(seconds(run, x))
    ratios = [b / a for a, b in zip(times[plain], times[whole], strict=True)]
    p99 = [statistics.quantiles(times[run], n=100)[98] for run in (plain, whole)]
    return {
        "bare_ms": 1e3 * statistics.median(times[plain]),
        "gated_ms": 1e3 * statistics.median(times[whole]),
        "ratio_median": statistics.median(ratios),
        "ratio_low_quartile": statistics.quantiles(ratios, n=4)[0],
        "ratio_high_quartile": statistics.quantiles(ratios, n=4)[2],
        "bare_p99_ms": 1e3 * p99[0],
        "gated_p99_ms": 1e3 * p99[1],
        "ratio_p99": p99[1] / p99[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", default=["onnx", "torch"])
    parser.add_argument("--rounds", type=int, default=200)
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
                    found[key] = {"rounds": rounds} | paired(plain, whole, x[:batch], rounds)
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

"""What the gate costs in the server: p50 and p99 over HTTP, against the same server without it.

Run: OMP_NUM_THREADS=1 python tests/benchmarks/bench_serve.py --output reports/benchmarks/serve.json
     [--requests 200] [--rounds 20] [--clients 1 8]

Two servers of one ResNet-20 for 32 px run side by side; one answers with the guard's decision, the
other with the label of the bare model. Rounds take turns, and p50 and p99 are compared within a
round, so that a drift of the machine cancels. p99 is also taken over the requests of all rounds
together, because that of one round of 200 requests is its second slowest. Clients and servers share
this process, so CPU time is of a request with its client.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import torch
import uvicorn
from PIL import Image

import ebm_guard
from ebm_guard.deploy.serve import make_app
from ebm_guard.model.loading import load_model

NETS = Path(__file__).parents[2] / "examples" / "published_nets.py"


def server(app: object) -> tuple[uvicorn.Server, str]:
    listener = socket.socket(proto=socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(256)
    made = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on"))
    threading.Thread(target=made.run, args=([listener],), daemon=True).start()
    while not made.started:
        time.sleep(0.01)
    return made, f"http://127.0.0.1:{listener.getsockname()[1]}/predict"


def without_gate(app: object, model: torch.nn.Module) -> object:
    """Let an application answer with the model's label alone."""

    @torch.no_grad()
    def run(inputs: torch.Tensor) -> object:
        labels = model(inputs).argmax(dim=1).tolist()
        return [{"label": label} for label in labels], lambda: None

    app.state.service._run = run
    return app


def latencies(url: str, bodies: list[bytes], clients: int) -> list[float]:
    """Return the seconds of each request."""

    def ask(part: list[bytes]) -> list[float]:
        found = []
        with httpx.Client(verify=False, trust_env=False, timeout=60) as client:
            for body in part:
                start = time.perf_counter()
                reply = client.post(url, content=body, headers={"content-type": "image/png"})
                found.append(time.perf_counter() - start)
                reply.raise_for_status()
        return found

    parts = [bodies[index::clients] for index in range(clients)]
    with ThreadPoolExecutor(clients) as pool:
        return [item for found in pool.map(ask, parts) for item in found]


def compared(
    bare: list[tuple[list[float], float]], gated: list[tuple[list[float], float]]
) -> dict[str, object]:
    """Compare rounds of requests: p50 and p99 of the wait, and the CPU time of a request."""
    waits = [np.array([wait for wait, _ in part]) for part in (bare, gated)]
    kinds = {f"p{q}": [np.quantile(part, q / 100, axis=1) for part in waits] for q in (50, 99)}
    kinds["cpu_of_a_request"] = [np.array([used for _, used in part]) for part in (bare, gated)]
    found: dict[str, object] = {}
    for name, (one, other) in kinds.items():
        found[name] = {
            "bare_ms": 1000 * float(np.median(one)),
            "gated_ms": 1000 * float(np.median(other)),
            "ratio_median": float(np.median(other / one)),
            "ratio_quartiles": np.quantile(other / one, [0.25, 0.75]).tolist(),
        }
    pooled = [1000 * float(np.quantile(part, 0.99)) for part in waits]
    found["p99_of_all_requests"] = {
        "bare_ms": pooled[0],
        "gated_ms": pooled[1],
        "ratio": pooled[1] / pooled[0],
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    # Random weights: the cost does not depend on them.
    model = load_model(f"{NETS}:cifar10_resnet20")
    guard = ebm_guard.wrap(model)
    rows = torch.from_numpy(generator.normal(size=(500, 3, 32, 32)).astype(np.float32))
    guard.fit([(rows, torch.from_numpy(generator.integers(0, 10, 500)))])
    bodies = []
    for pixels in generator.integers(0, 256, (arguments.requests, 32, 32, 3), dtype=np.uint8):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        bodies.append(file.getvalue())
    apps = {"gated": make_app(guard), "bare": without_gate(make_app(guard), model)}
    running = {name: server(app) for name, app in apps.items()}
    results = {}
    for clients in arguments.clients:
        for _, url in running.values():
            latencies(url, bodies[:20], clients)
        rounds: dict[str, list[tuple[list[float], float]]] = {name: [] for name in running}
        for number in range(arguments.rounds):
            for name in ("bare", "gated") if number % 2 else ("gated", "bare"):
                used = time.process_time()
                waited = latencies(running[name][1], bodies, clients)
                rounds[name].append((waited, (time.process_time() - used) / len(bodies)))
        results[f"clients {clients}"] = compared(rounds["bare"], rounds["gated"])
    for made, _ in running.values():
        made.should_exit = True
    result = {
        "what": "latency over HTTP, ResNet-20, 32 px PNG, CPU, one thread; gated / bare server",
        "requests_a_round": arguments.requests,
        "rounds": arguments.rounds,
        **results,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

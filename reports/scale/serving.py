"""One replica of ``ebm-guard serve``, and ``ebm-guard predict``: memory, CPU-seconds, /metrics."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from nets import NETS, Net, guards
from PIL import Image

CLIENTS = 4
REQUESTS = {"demo": 2000, "cifar10_resnet20": 2000, "imagenet_efficientnet_lite0": 300}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@contextmanager
def replica(path: Path, *options: str) -> Iterator[tuple[int, str]]:
    """Start a server; yield its process id and its URL."""
    made = subprocess.Popen(  # noqa: S603 - this Python
        [sys.executable, "-m", "ebm_guard", "serve", str(path), *options, "--port", "0", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    try:
        yield made.pid, json.loads(made.stdout.readline())["url"]
    finally:
        made.terminate()
        made.communicate()


def resident(pid: int, field: str = "VmRSS") -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pictures(size: int, count: int) -> list[bytes]:
    found = []
    for pixels in np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8):
        file = io.BytesIO()
        Image.fromarray(pixels).resize((size, size)).save(file, "PNG")
        found.append(file.getvalue())
    return found


def ask(url: str, bodies: list[bytes], requests: int) -> None:
    def part(offset: int) -> None:
        with httpx.Client(trust_env=False, timeout=120) as client:
            for number in range(offset, requests, CLIENTS):
                body = bodies[number % len(bodies)]
                kind = {"content-type": "image/png"}
                client.post(f"{url}/predict", content=body, headers=kind).raise_for_status()

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(part, range(CLIENTS)))


def measure_replica(net: Net, data: Path, path: Path, *extra: str) -> dict[str, Any]:
    size = 8 if net.factory is None else net.inputs(net.model(data), 1).shape[-1]
    bodies, requests = pictures(size, 64), REQUESTS[net.name]
    with replica(path, *net.options(data), *extra) as (pid, url):
        start_cpu, start_rss = cpu_seconds(pid), resident(pid)
        ask(url, bodies, 64)
        warm_rss, before = resident(pid), cpu_seconds(pid)
        ask(url, bodies, requests)
        used, after_rss = cpu_seconds(pid) - before, resident(pid)
        before = cpu_seconds(pid)
        with httpx.Client(trust_env=False) as client:
            for _ in range(200):
                page = client.get(f"{url}/metrics")
        scrape = (cpu_seconds(pid) - before) / 200
    return {
        "cpu_seconds_to_start": start_cpu,
        "resident_at_start": start_rss,
        "resident_after_64_requests": warm_rss,
        "resident_after_all_requests": after_rss,
        "requests": requests,
        "cpu_seconds_per_million_requests": 1e6 * used / requests,
        "metrics_bytes": len(page.content),
        "metrics_series": sum(not line.startswith("#") for line in page.text.splitlines()),
        "cpu_ms_per_scrape": 1000 * scrape,
    }


def child_cpu(*arguments: str) -> float:
    """Run a command and return the CPU-seconds of it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(  # noqa: S603 - this Python
        [sys.executable, "-m", "ebm_guard", *arguments], check=True, capture_output=True,
        env=ENVIRONMENT,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure_predict(net: Net, data: Path, path: Path, folder: Path) -> dict[str, Any]:
    """Two runs of different length: what a run costs, and what an image costs."""
    if net.factory is None:
        sizes, specs = (200, 400), None
    elif net.name.startswith("cifar"):
        sizes = (500, 5500)
        specs = [f"npz:{data / 'cifar10_test.npz'}[:{size}]" for size in sizes]
    else:
        sizes = (16, 316)
        files = sorted((data / "imagenet_sample").glob("*/*.jpg"))
        specs = []
        for size in sizes:
            (folder / f"{size}.txt").write_text("".join(f"{file}\n" for file in files[:size]))
            specs.append(f"list:{folder / f'{size}.txt'}")
    if specs is None:
        return {}
    out = folder / "rows.jsonl"
    costs = []
    for spec in specs:
        out.unlink(missing_ok=True)
        costs.append(
            child_cpu("predict", str(path), "--data", spec, "-o", str(out), *net.options(data))
        )
    each = (costs[1] - costs[0]) / (sizes[1] - sizes[0])
    return {
        "images": list(sizes),
        "cpu_seconds": costs,
        "cpu_seconds_of_a_run_without_images": costs[0] - each * sizes[0],
        "cpu_seconds_per_million_images": 1e6 * each,
    }


def measure(data: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for net in NETS:
            path = guards(net, data, ("energy",))["energy"].save(folder / f"{net.name}.safetensors")
            found[net.name] = {"serve": measure_replica(net, data, path)}
            if net.name == "cifar10_resnet20":
                shadowed = measure_replica(net, data, path, "--shadow", str(path))
                found[net.name]["serve_with_a_shadow"] = shadowed
            if predicted := measure_predict(net, data, path, folder):
                found[net.name]["predict"] = predicted
    return found

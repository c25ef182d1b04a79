"""Measure everything that reports/scale.md tells of; under 15 CPU-minutes for all parts.

Run: OMP_NUM_THREADS=1 python reports/scale/measure.py --data DIR [--parts costs memory ...]

DIR holds the networks' published weights and images, as the tests have them (EBM_GUARD_DATA). The
parts go to reports/scale/results.json, each by itself; those not asked for are left as they are.
Times are CPU-seconds of one thread, and ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
PARTS = ("costs", "memory", "serving", "merging", "skew", "simulation")


def run(part: str, data: Path) -> dict[str, Any]:
    if part == "merging":
        import merging

        return merging.measure()
    if part == "simulation":
        import simulate

        return simulate.measure()
    return __import__(part).measure(data)


def cpu_now() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("EBM_GUARD_DATA"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--output", type=Path, default=HERE / "results.json")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("needs --data, or EBM_GUARD_DATA")
    torch.set_num_threads(1)
    for part in arguments.parts:
        start = cpu_now()
        found = run(part, Path(arguments.data))
        found["cpu_seconds_of_this_part"] = round(cpu_now() - start, 1)
        found["command"] = f"python reports/scale/measure.py --data DIR --parts {part}"
        found["environment"] = {"torch": torch.__version__, "machine": platform.machine()}
        output = arguments.output
        held = json.loads(output.read_text()) if output.exists() else {}
        held[part] = found
        ordered = {name: held[name] for name in PARTS if name in held}
        output.write_text(json.dumps(ordered, indent=1) + "\n")
        print(f"{part}: {found['cpu_seconds_of_this_part']} CPU-seconds")


if __name__ == "__main__":
    main()

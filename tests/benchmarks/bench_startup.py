"""How long the command line takes to say something: whole processes, against `python -c pass`.

Run: python tests/benchmarks/bench_startup.py [--rounds 10] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "ebm-guard --help": [sys.executable, "-m", "ebm_guard", "--help"],
    "ebm-guard report --help": [sys.executable, "-m", "ebm_guard", "report", "--help"],
    "ebm-guard list": [sys.executable, "-m", "ebm_guard", "list"],
    "import ebm_guard": [sys.executable, "-c", "import ebm_guard"],
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for command in COMMANDS.values():
        seconds(command)
    for _ in range(arguments.rounds):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    result = {
        name: {"median": round(statistics.median(row), 3), "max": round(max(row), 3)}
        for name, row in times.items()
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Run the fuzz targets of tests/fuzzing at length, and write reports/security/results.json.

    python reports/security/fuzz.py --inputs 2000 --seed 1

Each parser runs in a process of its own, so that a crash in native code is counted and does not end
the run. An input is known by its parser and seed: ``--only NAME --seed S --first I --inputs 1``
repeats one.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import platform
import random
import shlex
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
# A native crash ends a process; so often may one parser begin anew.
_MOST_DEATHS = 20
_SHOWN = 10


def all_targets(folder: Path) -> dict:
    """Every parser by name."""
    from fuzzing.files import file_targets
    from fuzzing.requests import request_targets

    return {target.name: target for target in (*file_targets(folder), *request_targets())}


def work(name: str, seeds: range, run_seed: int, limit: float, folder: str, pipe: object) -> None:
    """Try inputs; tell the parent the number of each before, and all outcomes at the end."""
    import torch
    from fuzzing.bounds import BrokenError, Outcomes, try_one

    torch.set_num_threads(1)
    # Torch logs each damaged program at length.
    logging.disable(logging.WARNING)
    target = all_targets(Path(folder))[name]
    # Sound files are made before anything is measured or limited.
    target.make(random.Random(0))  # noqa: S311 - no secret
    outcomes = Outcomes()
    clock = time.process_time()
    for number in seeds:
        if time.process_time() - clock > limit:
            break
        pipe.send(number)
        try:
            try_one(target, f"{run_seed}.{number}", Path(folder) / "root" / name, outcomes)
        except BrokenError as error:
            outcomes.broken.append(str(error))
    pipe.send({**vars(outcomes), "cpu_seconds": time.process_time() - clock})


def run_target(name: str, first: int, count: int, seed: int, seconds: float) -> dict:
    """Run one parser to its end, through crashes of the process."""
    total = {"taken": 0, "refused": 0, "broken": [], "seconds": 0.0, "cpu_seconds": 0.0}
    total |= {"slowest": 0.0, "megabytes": 0.0, "died": 0}
    context = multiprocessing.get_context("spawn")
    start, end = first, first + count
    while start < end and total["died"] < _MOST_DEATHS and total["cpu_seconds"] < seconds:
        left = seconds - total["cpu_seconds"]
        mine, theirs = context.Pipe(duplex=False)
        with tempfile.TemporaryDirectory() as folder:
            process = context.Process(
                target=work, args=(name, range(start, end), seed, left, folder, theirs)
            )
            process.start()
            theirs.close()
            last, found = start, None
            while found is None:
                try:
                    got = mine.recv()
                except EOFError:
                    break
                last, found = (last, got) if isinstance(got, dict) else (got, None)
            process.join()
        if found is None:
            total["died"] += 1
            total["broken"].append(f"{name} {seed}.{last}: the process ended ({process.exitcode})")
            start = last + 1
            continue
        for key in ("taken", "refused", "broken", "seconds", "cpu_seconds"):
            total[key] += found[key]
        for key in ("slowest", "megabytes"):
            total[key] = max(total[key], found[key])
        break
    total["inputs"] = total["taken"] + total["refused"] + len(total["broken"])
    return total


def main() -> int:
    """Run what was asked for; the exit code is 1 where anything broke."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=500, help="for each parser")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="names of parsers")
    parser.add_argument("--seconds", type=float, default=15, help="CPU time for each parser")
    parser.add_argument("--output", default=str(Path(__file__).with_name("results.json")))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        names = given.only or list(all_targets(Path(folder)))
    parsers = {}
    for name in names:
        found = run_target(name, given.first, given.inputs, given.seed, given.seconds)
        parsers[name] = {
            key: round(value, 3) if isinstance(value, float) else value
            for key, value in found.items()
        }
        parsers[name]["broken"] = found["broken"][:_SHOWN]
        parsers[name]["broken_count"] = len(found["broken"])
        print(name, {key: value for key, value in parsers[name].items() if value}, flush=True)
    commands = [f"python reports/security/fuzz.py {shlex.join(sys.argv[1:])}"]
    output = Path(given.output)
    if given.only and output.exists():
        # Some parsers anew, beside the others of the earlier run.
        old = json.loads(output.read_text())
        commands, parsers = old["commands"] + commands, old["parsers"] | parsers
    broken = sum(part["broken_count"] for part in parsers.values())
    packages = ("torch", "numpy", "pillow", "safetensors", "onnxruntime", "python-multipart")
    result = {
        "commands": commands,
        "inputs": sum(part["inputs"] for part in parsers.values()),
        "cpu_seconds": round(sum(part["cpu_seconds"] for part in parsers.values()), 1),
        "broken": broken,
        "parsers": parsers,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in packages},
    }
    output.write_text(json.dumps(result, indent=1) + "\n")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Bytes of an artefact on disk, and of the guard in memory, by kind of score."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from nets import NETS, guards

SCORES = ("energy", "mahalanobis", "vim", "knn")
# What a process holds: after the imports, with the network, with the guard.
_PROBE = """
import ctypes, gc, json, sys
from pathlib import Path
sys.path.insert(0, {here!r})
import ebm_guard, torch
from ebm_guard.gate import Guard
from nets import NETS
def resident():
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        pass
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
net = next(one for one in NETS if one.name == {name!r})
found = [resident()]
model = net.model(Path({data!r}))
found.append(resident())
guard = Guard.load({path!r}, model)
with torch.no_grad():
    guard(net.inputs(model, 1))
found.append(resident())
monitor = guard.drift_monitor()
found.append(resident())
print(json.dumps(found))
"""


def probe(net: str, path: Path, data: Path) -> dict[str, int]:
    code = _PROBE.format(here=str(Path(__file__).parent), name=net, data=str(data), path=str(path))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out = subprocess.run(  # noqa: S603 - this Python, and code from this file
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    bare, with_net, with_guard, with_monitor = json.loads(out.stdout)
    return {
        "resident_after_imports": bare,
        "network": with_net - bare,
        "guard_and_one_forward_pass": with_guard - with_net,
        "drift_monitor": with_monitor - with_guard,
    }


def measure(data: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for net in NETS:
            found[net.name] = {}
            for score, guard in guards(net, data, SCORES).items():
                path = guard.save(Path(name) / "guard.safetensors")
                size = path.stat().st_size
                example = net.inputs(guard.classifier.model, 8)
                found[net.name][score] = {
                    "artefact_bytes": size,
                    "of_them_canary_inputs": example.numel() * 4,
                    **probe(net.name, path, data),
                }
    return found

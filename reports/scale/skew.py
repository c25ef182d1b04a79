"""Rows that replicas of one artefact may decide differently: batch sizes, layouts, precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from nets import NETS
from torch import Tensor

import ebm_guard
from ebm_guard.gate import Guard

ROWS, FIT = 1000, 2000


@torch.no_grad()
def measure(data: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    net = NETS[1]
    model = net.model(data)
    arrays = np.load(data / "cifar10_test.npz")
    images, labels = arrays["images"][: FIT + ROWS], arrays["labels"][: FIT + ROWS]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    x = ebm_guard.Preprocessing.from_model(model).normalize(pixels)
    guard = ebm_guard.wrap(model)
    guard.fit([(x[i : i + 100], torch.tensor(labels[i : i + 100])) for i in range(0, FIT, 100)])
    rows = x[FIT:]
    base = scores(guard, rows, 64)
    cut = float(guard.threshold.cut)
    kinds = {
        "batches_of_1": scores(guard, rows, 1),
        "batches_of_7": scores(guard, rows, 7),
        "channels_last": scores(guard, rows.contiguous(memory_format=torch.channels_last), 64),
    }
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kinds["bfloat16_autocast"] = scores(guard, rows, 64)
    found: dict[str, Any] = {"rows": ROWS, "network": net.name, "against": "float32, batches of 64"}
    for name, other in kinds.items():
        found[name] = {
            "decisions_that_differ": int(((other <= cut) != (base <= cut)).sum()),
            "largest_score_difference": float((other - base).abs().max()),
            "reject_rate": float((other > cut).double().mean()),
        }
    found["reject_rate"] = float((base > cut).double().mean())
    gaps = (base - cut).abs()
    found["rows_within_1e-3_of_the_cut"] = int((gaps < 1e-3).sum())
    return found


def scores(guard: Guard, x: Tensor, batch: int) -> Tensor:
    return torch.cat([guard(x[i : i + batch]).score for i in range(0, len(x), batch)])

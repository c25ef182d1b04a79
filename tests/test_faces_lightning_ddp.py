"""Two processes log what one process logs, to the last bit, whatever pads their shares."""

import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lightning", reason="lightning is not installed")

WORKER = """
import json
import sys
import warnings
from pathlib import Path

import torch
from faces_cases import loader
from test_faces_lightning import Module, logged, pl

from ebm_guard.faces import LightningMonitor

folder, devices = Path(sys.argv[1]), int(sys.argv[2])
ood = {"shuffled": loader(21, 2, 0.5, shuffle=True), "second": 1}
module = Module()
settings = {
    "max_epochs": 1,
    "accelerator": "cpu",
    "devices": devices,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "default_root_dir": folder,
    "strategy": "ddp" if devices > 1 else "auto",
}
trainer = pl.Trainer(callbacks=[LightningMonitor(ood)], **settings)
trainer.validate(module, [loader(37, 1), loader(15, 3, 4.0, shuffle=True)], verbose=False)
found = logged(trainer)
rank = trainer.global_rank
# Also in the middle of a training, whose weights are the same on both.
trainer = pl.Trainer(callbacks=[LightningMonitor(ood)], **settings)
trainer.fit(module, loader(32, 0), [loader(37, 1), loader(15, 3, 4.0)])
state = torch.cat([part.flatten().double() for part in module.state_dict().values()])
(folder / f"{devices}_{rank}.json").write_text(
    json.dumps({"validate": found, "fit": logged(trainer), "weights": float(state.sum())})
)
"""


def run(folder, devices):
    script = folder / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        # Two processes find each other on this machine, whatever its name says.
        "GLOO_SOCKET_IFNAME": "lo",
    }
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(devices)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{devices}_{rank}.json").read_text()) for rank in range(devices)]


@pytest.mark.slow
def test_two_processes_log_what_one_logs(tmp_path):
    (one,), (first, second) = run(tmp_path, 1), run(tmp_path, 2)
    assert len(one["validate"]) == 13
    # 37 rows pad a share of two processes, 15 rows and 3 batches do too; nothing counts twice.
    assert first["validate"] == second["validate"] == one["validate"]
    assert first == second
    assert first["fit"].keys() == one["fit"].keys()

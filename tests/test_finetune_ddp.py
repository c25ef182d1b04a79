"""Two processes with half the batch each equal one process with the whole batch."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ebm_guard.data.demo import demo_classifier

WORKER = """
import os
import signal
import sys
from pathlib import Path

from finetune_cases import quick
from safetensors.torch import save_file

from ebm_guard.data.demo import load_demo

folder, objective, stop = Path(sys.argv[1]), sys.argv[2], len(sys.argv) > 3
checkpoint, rank = folder / "checkpoint", os.environ.get("RANK", "0")
settings = {"learning_rate": 1e-4}
if objective == "margin":
    settings |= {"outliers": load_demo("far_ood").images, "outlier_share": 1.0}
if objective == "few":
    # Four labelled images in a batch of 64, and nothing drawn by a process for itself.
    objective = "cross_entropy"
    far = load_demo("far_ood").images
    settings |= {"unlabelled": far, "labelled_share": 0.0625, "regularisers": ["entropy"]}
if objective == "regularised":
    objective = "margin"
    far = load_demo("far_ood").images
    settings |= {"regularisers": ["dsm", "entropy"], "unlabelled": far, "labelled_share": 0.75}


def press(line):
    # The first process alone is told to stop; both must.
    if line["kind"] == "update" and line["update"] == 1:
        os.kill(os.getpid(), signal.SIGINT)


result = quick(
    objective=objective,
    batch_size=64,
    ema=0.5,
    updates=8,
    evaluate_every=4,
    max_ece_rise=1.0,
    checkpoint=checkpoint,
    resume=(checkpoint / "checkpoint.pt").exists(),
    on_event=press if stop else None,
    **settings,
)
if result.candidate is not None:
    save_file(result.candidate.state_dict(), folder / f"candidate{rank}.safetensors")
print(rank, result.interrupted, result.acceptance)
"""


def run(folder, size, objective="margin", extra=()):
    """Start ``size`` processes as torchrun does, and return what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    tests = str(Path(__file__).parent)
    processes = []
    for rank in range(size):
        env = os.environ | {"PYTHONPATH": tests, "OMP_NUM_THREADS": "1"}
        if size > 1:
            env |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        command = [sys.executable, "-c", textwrap.dedent(WORKER), str(folder), objective]
        command += extra
        processes.append(
            subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    printed = []
    for process in processes:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-3000:]
        printed.append(out)
    return printed


def candidate(folder, rank=0):
    return load_file(folder / f"candidate{rank}.safetensors")


@pytest.mark.slow
def test_two_processes_equal_one_for_margin_with_given_outliers(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run(one, 1)
    run(two, 2)
    first, second, third = candidate(one), candidate(two, 0), candidate(two, 1)
    start = demo_classifier().state_dict()
    for name, value in first.items():
        moved = float((value - start[name]).abs().max())
        assert moved > 1e-5, name
        # Sums in another order.
        assert float((value - second[name]).abs().max()) < 1e-2 * moved, name
        assert second[name].equal(third[name])


@pytest.mark.slow
def test_a_double_backward_pass_and_unlabelled_images_keep_two_processes_equal(tmp_path):
    run(tmp_path, 2, "regularised")
    first, second = candidate(tmp_path, 0), candidate(tmp_path, 1)
    start = demo_classifier().state_dict()
    for name, value in first.items():
        assert value.equal(second[name])
        assert not value.equal(start[name]), name


@pytest.mark.slow
def test_processes_stop_together_and_resume_bit_by_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, 2, "jem")
    printed = run(parts, 2, "jem", extra=("stop",))
    assert all(" True " in line for line in printed)
    assert not (parts / "candidate0.safetensors").exists()
    printed = run(parts, 2, "jem")
    assert all(" False " in line for line in printed)
    first, again = candidate(whole), candidate(parts)
    assert all(value.equal(again[name]) for name, value in first.items())


@pytest.mark.slow
def test_two_processes_equal_one_with_few_labels(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run(one, 1, "few")
    run(two, 2, "few")
    first, second = candidate(one), candidate(two)
    start = demo_classifier().state_dict()
    for name, value in first.items():
        moved = float((value - start[name]).abs().max())
        assert float((value - second[name]).abs().max()) < 1e-2 * moved, name

"""``ebm-guard finetune --resume`` under kill -9: the end is that of a run that nobody killed."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

# A process of its own, whose children are killed: torch is imported once for all of them.
DRIVER = """
import json, os, random, signal, sys, time
folder = sys.argv[1]
import torch
torch.set_num_threads(1)
import ebm_guard.cli.finetuning, ebm_guard.training.density, ebm_guard.cli.session
from ebm_guard.cli import run

def child(output, *more):
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    sys.stdout = open(os.devnull, "w")
    sys.stderr = open(f"{folder}/errors", "a")
    os._exit(run(["finetune", "--train-data", "demo:", "--val-data", "demo:", "-q", "--updates",
                  "40", "--train-batch-size", "16", "--evaluate-every", "5", "--outlier-rows", "30",
                  "--selection-rows", "60", "--max-acc-drop", "0.05",
                  "-o", f"{folder}/{output}", *more]))

clock = time.perf_counter()
assert os.waitpid(child("one"), 0)[1] == 0
whole, killed = time.perf_counter() - clock, []
state = f"{folder}/two/finetune-state/checkpoint.pt"
while True:
    pid = child("two", *(["--resume"] if os.path.exists(state) else []))
    # Kills come at any moment of a run; the last runs are left alone.
    if len(killed) < 6:
        time.sleep(random.uniform(0, 0.6 * whole))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        there = sorted(name for name in os.listdir(f"{folder}/two") if name[0] != ".") \\
            if os.path.exists(f"{folder}/two") else []
        killed.append([os.path.exists(state), there])
        for name in there:
            # What has its name is whole.
            path = f"{folder}/two/{name}"
            if name.endswith(".json"):
                json.load(open(path))
            elif name.endswith(".safetensors"):
                from safetensors.torch import load_file
                load_file(path)
        if os.path.exists(state):
            torch.load(state, weights_only=True)
        continue
    assert status == 0, (status, open(f"{folder}/errors").read()[-2000:])
    if len(killed) >= 3:
        break
    # It came to its end before the kill: begin again.
    import shutil
    shutil.rmtree(f"{folder}/two")
print(json.dumps(killed))
"""
# What says when and how long, and that there were interruptions.
_TIMES = ("seconds", "time", "created", "wall_seconds", "wall_time")


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in _TIMES}
    if isinstance(value, list):
        return [without_times(item) for item in value]
    return value


def history_of(folder):
    lines = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return [without_times(line) for line in lines if line["kind"] != "event"]


def test_killed_at_any_moment(tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(driver), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    killed = json.loads(done.stdout)
    print(killed)
    assert len(killed) >= 3
    one, two = tmp_path / "one", tmp_path / "two"
    for name in ("weights.safetensors", "guard.safetensors"):
        first, second = load_file(one / name), load_file(two / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    assert history_of(one) == history_of(two)
    facts = [json.loads((folder / "finetune.json").read_text()) for folder in (one, two)]
    for key in ("acceptance", "settings", "status"):
        assert facts[0][key] == facts[1][key], key
    # Nothing of the interrupted runs is left beside the results.
    assert {path.name for path in one.iterdir()} == {
        path.name for path in two.iterdir() if path.name[0] != "."
    }

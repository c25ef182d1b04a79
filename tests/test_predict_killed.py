"""``ebm-guard predict --resume`` under kill -9, and the memory of long runs."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from predict_cases import FORMATS, IDENTITY, Lines, files_of, outputs_in

from ebm_guard.deploy.batch import Tally, write_once, write_resumable

pytestmark = pytest.mark.slow

# A process of its own, whose children are killed: torch is imported once for all of them.
DRIVER = """
import json, os, random, signal, sys, time
folder, file_format, guard, data = sys.argv[1:]
import torch
import ebm_guard.cli.predicting, ebm_guard.training.checkpoint, ebm_guard.cli.session
from ebm_guard.cli import run

def child(output, *more):
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    sys.stdout = open(os.devnull, "w")
    os._exit(run(["predict", guard, "--model", "ebm_guard.data.demo:demo_classifier",
                  "--data", data, "-q", "-b", "16", "--format", file_format,
                  "-o", f"{folder}/{output}/rows", "--review", f"{folder}/{output}/queue", *more]))

os.mkdir(f"{folder}/one"), os.mkdir(f"{folder}/two")
clock = time.perf_counter()
assert os.waitpid(child("one"), 0)[1] == 0
whole, kept = time.perf_counter() - clock, []
while True:
    pid = child("two", "--resume")
    # Kills come at any moment of a run; the last runs are left alone.
    if len(kept) < 12:
        time.sleep(random.uniform(0, 0.6 * whole))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        part = f"{folder}/two/rows.part"
        kept.append(os.path.getsize(part) if os.path.exists(part) else 0)
        continue
    assert status == 0, status
    # It came to its end before the kill: killed often enough, or begin again.
    if len(kept) >= 4:
        break
print(json.dumps(kept))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A guard of the demo, and 900 images for it."""
    from ebm_guard.cli import run
    from ebm_guard.data.demo import load_demo

    folder = tmp_path_factory.mktemp("place")
    guard, data = folder / "guard.safetensors", folder / "images.npz"
    assert run(["fit", "--data", "demo:", "-o", str(guard), "-q"]) == 0
    images = load_demo("evaluation").images
    np.savez(data, images=np.concatenate([images, load_demo("near_ood").images] * 2)[:900])
    return guard, data


@pytest.mark.parametrize("file_format", FORMATS)
def test_killed_at_any_moment(file_format, place, tmp_path):
    if file_format == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is the extra `parquet`")
    guard, data = place
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(driver), tmp_path, file_format, guard, f"npz:{data}"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kept = json.loads(done.stdout)
    assert len(kept) >= 4
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    assert len((tmp_path / "two" / "queue").read_bytes().splitlines()) > 100


@pytest.mark.parametrize("file_format", FORMATS)
def test_memory_does_not_grow_with_the_rows(file_format, tmp_path, monkeypatch):
    """Python's own memory, for a run with a journal and for one without."""
    if file_format == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is the extra `parquet`")
    monkeypatch.setattr("ebm_guard.deploy.batch_formats.ROW_GROUP", 500)

    def peaks(n):
        found = []
        for name in ("once", "kept"):
            outputs, lines = outputs_in(tmp_path / f"{name}{n}", file_format), Lines(n, 100)
            lines.made = Forgets()
            tracemalloc.start()
            if name == "once":
                write_once(outputs, lines(0), Tally())
            else:
                write_resumable(outputs, IDENTITY, lines, Tally())
            found.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        return np.array(found)

    peaks(200)
    few, many = peaks(2000), peaks(8000)
    # Six thousand rows more, of some 500 bytes each as text and of far more as Python's dicts.
    assert (many - few < 200_000).all(), (few, many)


class Forgets(list):
    def __iadd__(self, other):
        return self


MEMORY = """
import resource, sys
from pathlib import Path
from predict_cases import IDENTITY, Lines, outputs_in, run_to_the_end
from ebm_guard.deploy import batch_formats
batch_formats.ROW_GROUP = 2000
for n in (5000, 50_000):
    lines = Lines(n, 500)
    run_to_the_end(outputs_in(Path(sys.argv[1]) / str(n), sys.argv[2]), lines)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_resident_memory_is_flat_over_ten_times_the_rows(file_format, tmp_path):
    """The whole process, with what Arrow holds: 45,000 rows more are some 20 MB as text."""
    if file_format == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is the extra `parquet`")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path, file_format],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    few, many = map(int, done.stdout.split())
    assert many - few < 8000, f"{few} kB, then {many} kB"

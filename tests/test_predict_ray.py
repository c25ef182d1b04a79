"""The example with Ray Data: the decisions of two workers are those of this process."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ebm_guard.cli import run
from ebm_guard.data.demo import load_demo

EXAMPLE = Path(__file__).parents[1] / "examples" / "ray_batch.py"
MODEL = "ebm_guard.data.demo:demo_classifier"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A guard, a folder of 40 images of which one is broken, and what `predict` says of them."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "images").mkdir()
    for number, image in enumerate(load_demo("near_ood").images[:40]):
        Image.fromarray(image).save(folder / "images" / f"{number:02}.png")
    (folder / "images" / "07.png").write_bytes(b"broken")
    guard, rows = str(folder / "guard.safetensors"), str(folder / "rows.jsonl")
    assert run(["fit", "--data", "demo:", "-o", guard, "-q"]) == 0
    data = ["--model", MODEL, "--data", str(folder / "images"), "-b", "16"]
    assert run(["predict", guard, *data, "-o", rows, "-q"]) == 0
    lines = Path(rows).read_text().splitlines()
    return folder, {row["id"]: row for row in map(json.loads, lines)}


def same(found, truth):
    assert set(found) == set(truth)
    for name, row in truth.items():
        got = found[name]
        assert (got["status"], got["accept"]) == (row["status"], row["accept"]), name
        assert got["reason"].startswith("unreadable") == row["reason"].startswith("unreadable")
        if row["energy"] is None:
            assert got["energy"] != got["energy"]
            assert got["label"] == -1
            continue
        assert got["label"] == row["label"]
        # Another batch is another sum.
        for number in ("confidence", "energy", "score", "p_value"):
            assert got[number] == pytest.approx(row[number], rel=1e-4, abs=1e-6)


def test_the_worker_of_the_example_decides_as_predict_does(place):
    """Without Ray: the class that Ray calls."""
    spec = importlib.util.spec_from_file_location("ray_batch", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    folder, truth = place
    decide = example.Decide(folder / "guard.safetensors", MODEL, None, False)
    names = sorted(truth)
    found = {}
    for part in (names[:7], names[7:8], names[8:]):
        columns = decide({"path": [str(folder / "images" / name) for name in part]})
        assert {len(column) for column in columns.values()} == {len(part)}
        for place_of, name in enumerate(part):
            found[name] = {key: column[place_of] for key, column in columns.items()}
    same(found, truth)


@pytest.mark.slow
def test_the_example_runs_on_a_local_ray(place, tmp_path):
    pytest.importorskip("ray", reason="ray is not in CI")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is the extra `parquet`")
    folder, truth = place
    command = [sys.executable, EXAMPLE, folder / "guard.safetensors", "--model", MODEL]
    more = ["--data", folder / "images", "--output", tmp_path / "out", "--batch-size", "8"]
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    done = subprocess.run(
        [*command, *more],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        cwd=tmp_path,
        env=os.environ | quiet,
    )
    assert done.returncode == 0, done.stderr
    assert "40 images" in done.stdout
    rows = parquet.read_table(tmp_path / "out").to_pylist()
    assert len(rows) == 40
    same({Path(row["path"]).name: row for row in rows}, truth)

"""A saved guard loads, decides, is exported and served where optional packages are absent."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from export_cases import CASES, case, inputs

ABSENT = ("timm", "torchvision", "matplotlib", "sklearn")
ROWS = (40, 9)

START = f"""
import sys
for name in {ABSENT}:
    sys.modules[name] = None
import json
from pathlib import Path
folder = Path(sys.argv[1])
def end():
    found = [n for n in sys.modules if n.partition(".")[0] in {ABSENT} and sys.modules[n]]
    assert not found, found
"""

DECIDE = """
import numpy as np
from export_cases import Net, inputs
import ebm_guard
done = []
for path in sorted(folder.glob("*.safetensors")):
    guard = ebm_guard.Guard.load(path, Net())
    decision = guard(inputs(*json.loads(sys.argv[2]), spread=2.0))
    stored = np.load(path.with_suffix(".npz"))
    for name in ("status", "label"):
        assert np.array_equal(getattr(decision, name).numpy(), stored[name]), (path.stem, name)
    for name in ("score", "p_value", "confidence"):
        np.testing.assert_array_equal(getattr(decision, name).numpy(), stored[name], path.stem)
    assert guard.summary()
    guard.drift_monitor().update(decision.score)
    done.append(path.stem)
print(json.dumps(done))
end()
"""

EXPORT = """
import torch
from export_cases import Net, inputs
import ebm_guard
from ebm_guard.deploy import export, load_exported
guard = ebm_guard.Guard.load(folder / "0.safetensors", Net())
x = inputs(20, 3, spread=2.0)
for kind in sys.argv[2:]:
    export(guard, kind, folder / f"gate.{kind}", example=inputs(64, 9))
    found = load_exported(folder / f"gate.{kind}")(x)
    assert torch.equal(found.status, guard(x).status)
print("[]")
end()
"""

SERVE = """
import asyncio, httpx
from serving import fitted, image_of, png
from ebm_guard.deploy.serve import make_app
guard = fitted()
app = make_app(guard)
app.state.service.start()
async def ask():
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        return await client.post("/predict", content=png(image_of(5)),
                                 headers={"content-type": "image/png"})
reply = asyncio.run(ask())
app.state.service.stop()
assert reply.status_code == 200, reply.text
expected = guard.predict(image_of(5)).rows()[0]
assert reply.json()["decisions"][0]["status"] == expected["status"]
print("[]")
end()
"""

COMMANDS = """
from ebm_guard.cli import run
guard, out = str(folder / "demo.safetensors"), folder / "rows.jsonl"
assert run(["info", guard]) == 0
model = ["--model", "ebm_guard.data.demo:demo_classifier"]
data = ["--data", f"npz:{folder / 'images.npz'}"]
assert run(["predict", guard, *model, *data, "-o", str(out), "-q"]) == 0
export = ["export", guard, *model, "--format", "torch", "-q"]
assert run([*export, "-o", str(folder / "gate.pt2")]) == 0
assert out.read_bytes() == (folder / "expected.jsonl").read_bytes()
print("[]")
end()
"""


def without(body, *args):
    """Run code in a process that cannot import the optional packages; return its last line."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", START + body, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def write(guard, folder, name):
    guard.save(folder / f"{name}.safetensors")
    decision = guard(inputs(*ROWS, spread=2.0))
    columns = ("status", "label", "score", "p_value", "confidence")
    np.savez(folder / name, **{column: getattr(decision, column).numpy() for column in columns})


def test_the_blocker_blocks(tmp_path):
    body = """
import importlib
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except ImportError:
        continue
    raise SystemExit(name)
print("[]")
end()
"""
    assert without(body, tmp_path, *ABSENT, "sklearn.datasets", "torchvision.ops") == "[]"


def test_a_guard_of_every_score_decides(tmp_path):
    for number, name in enumerate(CASES):
        write(case(name), tmp_path, str(number))
    done = without(DECIDE, tmp_path, list(ROWS))
    assert sorted(done.strip("[]").replace('"', "").split(", ")) == sorted(
        str(number) for number in range(len(CASES))
    )


@pytest.mark.slow
def test_a_guard_is_exported(tmp_path):
    write(case("vim"), tmp_path, "0")
    kinds = ["torch"]
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        pass
    else:
        kinds.append("onnx")
    without(EXPORT, tmp_path, *kinds)


@pytest.mark.slow
def test_a_guard_is_served(tmp_path):
    for extra in ("fastapi", "uvicorn", "httpx", "prometheus_client", "python_multipart"):
        pytest.importorskip(extra, reason="the extra `serve` is not installed")
    without(SERVE, tmp_path)


@pytest.mark.slow
def test_the_commands_of_a_guard_run(tmp_path):
    """The demo's digits come from scikit-learn, and nothing else of these commands does."""
    from ebm_guard.cli import run
    from ebm_guard.data.demo import load_demo

    guard, data = tmp_path / "demo.safetensors", tmp_path / "images.npz"
    np.savez(data, images=load_demo("evaluation").images)
    assert run(["fit", "--data", "demo:", "-o", str(guard), "-q"]) == 0
    model = ["--model", "ebm_guard.data.demo:demo_classifier", "--data", f"npz:{data}", "-q"]
    assert run(["predict", str(guard), *model, "-o", str(tmp_path / "expected.jsonl")]) == 0
    without(COMMANDS, tmp_path)

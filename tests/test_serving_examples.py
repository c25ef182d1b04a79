"""The examples for other servers, each as a process that is asked over HTTP."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from serving import agrees, fitted, image_of, in_parallel, png, until

from ebm_guard.deploy import export

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "serving"
MODEL = f"{ROOT / 'tests' / 'toys.py'}:Pixels"
pytestmark = pytest.mark.slow


@contextmanager
def process(script, *args, port_option, ready, folder):
    """Run an example until it is ready; yield its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, EXAMPLES / script, *args, port_option, str(port)]
    url = f"http://127.0.0.1:{port}"
    log = folder / "log"
    with log.open("w") as file:
        # A session of its own: these servers start processes that must end with them.
        made = subprocess.Popen(
            command, stdout=file, stderr=file, cwd=folder, start_new_session=True
        )

    def answers():
        assert made.poll() is None, log.read_text()
        try:
            return httpx.get(url + ready, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    try:
        until(answers, 240)
        yield url
    finally:
        os.killpg(made.pid, signal.SIGTERM)
        try:
            made.wait(30)
        finally:
            if made.poll() is None:
                os.killpg(made.pid, signal.SIGKILL)
                made.wait()


def test_litserve_answers_as_the_guard_does(tmp_path):
    pytest.importorskip("litserve", reason="litserve is not installed")
    guard = fitted()
    path = guard.save(tmp_path / "guard.safetensors")
    options = {"port_option": "--port", "ready": "/health", "folder": tmp_path}
    with process("litserve_server.py", path, MODEL, **options) as url:

        def ask(client, number):
            return client.post(f"{url}/predict", files={"file": png(image_of(number))})

        replies = in_parallel(ask, range(40))
        for number, reply in enumerate(replies):
            assert reply.status_code == 200, reply.text
            (row,) = reply.json()["decisions"]
            agrees(row, guard.predict(image_of(number)))
        rows = [reply.json()["decisions"][0] for reply in replies]
        assert len({row["accept"] for row in rows}) == 2
        bad = httpx.post(f"{url}/predict", files={"file": b"no image"}, trust_env=False)
        assert bad.status_code == 400, bad.text
        assert "`file`" in bad.text


def infer(url, name, x):
    tensor = {"name": name, "datatype": "FP32", "shape": list(x.shape)}
    body = {"id": "7", "inputs": [tensor | {"data": x.flatten().tolist()}]}
    return httpx.post(f"{url}/v2/models/gate/infer", json=body, trust_env=False, timeout=60)


def test_kserve_answers_by_the_open_inference_protocol(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime", "kserve"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    guard, path = fitted(), tmp_path / "gate.onnx"
    export(guard, "onnx", path, input="pixels")
    args = (path, "--model_name", "gate", "--enable_grpc", "false")
    options = {"port_option": "--http_port", "ready": "/v2/models/gate/ready", "folder": tmp_path}
    with process("kserve_server.py", *args, **options) as url:
        for n in (1, 2, 7, 64):
            x = torch.rand(n, 3, 1, 1, generator=torch.Generator().manual_seed(n))
            x = x.expand(n, 3, 8, 8).contiguous()
            reply = infer(url, "pixels", x)
            assert reply.status_code == 200, reply.text
            answer, decision = reply.json(), guard.pixels(x)
            assert answer["id"] == "7"
            found = {part["name"]: part for part in answer["outputs"]}
            names = ["logits", "probabilities", "energy", "score", "p_value", "accept"]
            assert list(found) == names
            assert found["logits"]["shape"] == [n, 3]
            assert [found[name]["datatype"] for name in names[2:]] == [
                "FP32",
                *["FP64"] * 2,
                "BOOL",
            ]
            assert found["accept"]["data"] == decision.accept.tolist()
            assert found["score"]["data"] == pytest.approx(decision.score.tolist(), rel=1e-5)
            assert found["p_value"]["data"] == pytest.approx(decision.p_value.tolist(), abs=0.01)
        for name, x in (("images", torch.rand(1, 3, 8, 8)), ("pixels", torch.rand(1, 3, 9, 9))):
            refused = infer(url, name, x)
            assert refused.status_code == 400, refused.text
            assert "[batch, *[3, 8, 8]]" in refused.text

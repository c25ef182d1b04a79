"""``ebm-guard serve`` as a process: starting, stopping, going back, and 10,000 requests."""

import collections
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

for extra in ("fastapi", "uvicorn", "httpx", "prometheus_client", "python_multipart"):
    pytest.importorskip(extra, reason="the extra `serve` is not installed")

from serving import agrees, counts, decisions, fitted, get, image_of, in_parallel, png, post, until  # noqa: E402

from ebm_guard.cli import run  # noqa: E402
from ebm_guard.deploy.serve.identity import identity_of  # noqa: E402
from ebm_guard.deploy.serve.server import _listening  # noqa: E402
from ebm_guard.errors import InvalidInputError  # noqa: E402

ROOT = Path(__file__).parents[1]
MODEL = f"{ROOT / 'tests' / 'toys.py'}:Pixels"


@contextmanager
def process(*args):
    """Run the command until its port is open; yield the process and its URL."""
    made = subprocess.Popen(
        [sys.executable, "-m", "ebm_guard", "serve", *map(str, args), "--port", "0", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = made.stdout.readline()
        assert line, made.stderr.read()
        yield made, json.loads(line)
    finally:
        made.kill()
        made.communicate()


@pytest.fixture
def guards(tmp_path):
    old, new = fitted(), fitted(false_reject_rate=0.3)
    return old.save(tmp_path / "old.safetensors"), new.save(tmp_path / "new.safetensors"), old, new


@pytest.mark.slow
def test_a_process_serves_and_ends_cleanly_on_sigterm(guards, tmp_path, capsys, monkeypatch):
    old_path, new_path, old, _ = guards
    with process(old_path, "--model", MODEL, "--shadow", new_path) as (made, facts):
        assert facts["sha256"] == identity_of(old).sha256
        assert get(f"{facts['url']}/ready").json()["sha256"] == facts["sha256"]
        reply = post(facts["url"], png(image_of(3)))
        agrees(reply.json()["decisions"][0], old.predict(image_of(3)))
        assert sum('role="shadow"' in name for name in counts(facts["url"])) == 1
        # The client of the examples, on files.
        for index in (3, 4):
            (tmp_path / f"{index}.png").write_bytes(png(image_of(index)))
        paths = [str(tmp_path / f"{index}.png") for index in (3, 4)]
        monkeypatch.setattr(sys, "argv", ["client.py", facts["url"], *paths])
        runpy.run_path(str(ROOT / "examples/serving/client.py"), run_name="__main__")
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) == 2
        for line, path, row in zip(printed, paths, old.predict(paths).rows(), strict=True):
            word = f"{row['label']} (" if row["accept"] else f"{row['status']}, ask a human"
            assert line.startswith(f"{path}: {word}")
        made.send_signal(signal.SIGTERM)
        out, err = made.communicate(timeout=60)
        assert made.returncode == 0, err
        assert out == ""
        assert "stopped" in err
        assert "Traceback" not in err


def test_wrong_usage(guards, tmp_path, capsys):
    path = str(guards[0])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = [
            ([path], 2, "no --model was given"),
            ([path, "--model", MODEL, "--port", port], 2, "Choose another --port"),
            ([path, "--model", MODEL, "--port", "65536"], 2, "--port"),
            ([path, "--model", MODEL, "--max-delay", "inf"], 2, "--max-delay"),
            ([path, "--model", MODEL, "--shutdown-timeout", "inf"], 2, "--shutdown-timeout"),
            ([path, "--model", MODEL, "--body-timeout", "nan"], 2, "body_timeout"),
            ([path, "--model", MODEL, "--max-pixels", str(10**12)], 2, "max_pixels"),
            ([path, "--model", f"{ROOT / 'tests/toys.py'}:Moody"], 3, "was fitted on"),
            ([str(tmp_path / "none"), "--model", MODEL], 3, "not a file"),
            ([path, "--model", MODEL, "--limit", "3"], 2, "--limit"),
        ]
        for args, code, words in cases:
            assert run(["serve", *args]) == code, args
            assert words in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_answers_do_not_wait_for_an_acknowledgement(host):
    """asyncio sets TCP_NODELAY only on sockets that say that they are TCP."""
    try:
        with _listening(host, 0) as listener:
            assert listener.proto == socket.IPPROTO_TCP
    except InvalidInputError:
        if host == "127.0.0.1":
            raise
        pytest.skip("this machine has no IPv6")


def test_without_the_extra_the_message_names_it(guards, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert run(["serve", str(guards[0]), "--model", MODEL]) == 2
    assert "pip install 'ebm-guard[serve]'" in capsys.readouterr().err


def resident(pid):
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read memory from")
def test_ten_thousand_requests_of_32_clients_are_right_counted_and_leave_memory_flat(guards):
    old_path, _, old, _ = guards
    kinds, n = 500, 10_000
    bodies = [png(image_of(index)) for index in range(kinds)]
    expected = old.predict([image_of(index) for index in range(kinds)])

    def ask(client, index):
        reply = client.post(
            f"{url}/predict", content=bodies[index % kinds], headers={"content-type": "image/png"}
        )
        assert reply.status_code == 200, reply.text
        (row,) = reply.json()["decisions"]
        agrees(row, expected, index % kinds)
        return row["status"].lower()

    with process(old_path, "--model", MODEL) as (made, facts):
        url = facts["url"]
        memory, statuses = [], collections.Counter()
        for start in range(0, n, 1000):
            statuses.update(in_parallel(ask, range(start, start + 1000), clients=32))
            memory.append(resident(made.pid))
        found = counts(url)
        made.send_signal(signal.SIGTERM)
        assert made.wait(60) == 0
    assert decisions(found) == {word: statuses[word] for word in ("accept", "reject", "invalid")}
    assert found['ebm_guard_responses_total{code="200"}'] == n == sum(statuses.values())
    print("resident MiB after each thousand:", [m >> 20 for m in memory])
    # The drift monitor keeps 8 bytes a score; the first thousands fill caches and thread stacks.
    # Rows that stayed would be 1 KB each, and jobs 3 KB.
    grown = (memory[-1] - memory[3]) / (n - 4000)
    assert grown < 500, f"{grown:.0f} bytes a request: {[m >> 10 for m in memory]} KiB"


@pytest.mark.slow
def test_sigterm_under_load_ends_cleanly_and_every_answer_is_right(guards):
    """What is queued is answered: see test_serve. Later requests find no connection."""
    old_path, _, old, _ = guards
    expected = old.predict([image_of(index) for index in range(50)])

    def ask(client, index):
        import httpx

        try:
            reply = client.post(f"{url}/predict", content=png(image_of(index % 50)))
        except httpx.TransportError:
            return "not taken"
        if reply.status_code == 503:
            return "refused"
        agrees(reply.json()["decisions"][0], expected, index % 50)
        return "answered"

    with process(old_path, "--model", MODEL) as (made, facts):
        url = facts["url"]
        import threading

        def stop():
            until(lambda: decisions(counts(url))["accept"] > 50)
            made.send_signal(signal.SIGTERM)

        killer = threading.Thread(target=stop)
        killer.start()

        def typed(client, index):
            client.headers["content-type"] = "image/png"
            return ask(client, index)

        kinds = collections.Counter(in_parallel(typed, range(3000), clients=16))
        killer.join(60)
        _, err = made.communicate(timeout=60)
        assert made.returncode == 0, err
    assert kinds["answered"] > 50
    assert kinds["not taken"] > 0
    assert "Traceback" not in err


@pytest.mark.slow
def test_the_triton_example_names_the_tensors_of_the_exported_graph(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="the extra `onnx` is not installed")
    import onnxruntime

    from ebm_guard.deploy.exporting import export

    path = tmp_path / "gate.onnx"
    export(fitted(), "onnx", path, input="pixels")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    text = (ROOT / "examples/serving/triton/gate/config.pbtxt").read_text()
    kinds = {"FP32": "tensor(float)", "FP64": "tensor(double)", "BOOL": "tensor(bool)"}
    pattern = (
        r'name: "(\w+)" data_type: TYPE_(\w+) dims: \[ ([\d, ]+) \]( reshape { shape: \[ \] })?'
    )
    written = [
        (name, kinds[kind], [] if scalar else [int(part) for part in dims.split(",")])
        for name, kind, dims, scalar in re.findall(pattern, text)
    ]
    made = [
        (item.name, item.type, list(item.shape[1:]))
        for item in (*session.get_inputs(), *session.get_outputs())
    ]
    assert written == made

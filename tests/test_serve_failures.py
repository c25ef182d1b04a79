"""A model that fails, hangs or misbehaves, and requests that are given up."""

import asyncio
import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from torch import nn

for extra in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
    pytest.importorskip(extra, reason="the extra `serve` is not installed")

from serving import (  # noqa: E402
    NPY,
    PNG,
    Gate,
    Hook,
    agrees,
    counts,
    decisions,
    fitted,
    fitted_on,
    get,
    image_of,
    npy,
    png,
    post,
    served,
    until,
)
from toys import linear  # noqa: E402

from ebm_guard.deploy.serve import ServeSettings, make_app, run_server  # noqa: E402
from ebm_guard.deploy.serve import service as service_module  # noqa: E402
from ebm_guard.errors import InvalidInputError  # noqa: E402


def health(url):
    return tuple(get(f"{url}/{name}").status_code for name in ("health", "ready"))


def client_of(app):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x")


def test_a_request_that_is_given_up_spoils_no_other():
    gate = Gate()
    model = Hook(gate)
    guard = fitted(model)
    expected = guard.predict([image_of(i) for i in range(5)])
    app = make_app(guard, settings=ServeSettings(max_delay=0))
    service = app.state.service
    service.start()
    model.arm()

    async def ask():
        async with asyncio.timeout(60), client_of(app) as client:

            def send(index):
                body = png(image_of(index))
                return asyncio.create_task(client.post("/predict", content=body, headers=PNG))

            first = send(0)
            while not gate.entered.is_set():
                await asyncio.sleep(0.001)
            others = [send(index) for index in (1, 2, 3)]
            while service.batcher.depth < 3:
                await asyncio.sleep(0.001)
            others[0].cancel()
            await asyncio.gather(others[0], return_exceptions=True)
            gate.opened.set()
            replies = await asyncio.gather(first, *others[1:], return_exceptions=True)
            return replies, await client.post("/predict", content=png(image_of(4)), headers=PNG)

    replies, later = asyncio.run(ask())
    for index, reply in zip((0, 2, 3, 4), (*replies, later), strict=True):
        assert reply.status_code == 200
        agrees(reply.json()["decisions"][0], expected, index)
    sample = service.metrics.registry.get_sample_value
    assert sample("ebm_guard_decisions_total", {"status": "invalid"}) == 0
    assert service.sick() == service.unready() == ""
    service.stop()


@pytest.mark.parametrize("error", [StopIteration, concurrent.futures.CancelledError, TimeoutError])
def test_errors_that_futures_take_for_their_own_are_answered(error):
    def before(x):
        raise error

    model = Hook(before)
    with served(fitted(model)) as (url, state):
        model.arm()
        reply = post(url, png(image_of(1)))
        assert reply.status_code == 200
        (row,) = reply.json()["decisions"]
        assert (row["status"], row["reason"]) == ("INVALID", f"the model raised {error.__name__}")
        until(lambda: state.service.batcher.inside == 0)
        assert decisions(counts(url))["invalid"] == 1


def test_a_batch_that_does_not_end_shows_in_health():
    gate = Gate()
    model = Hook(gate)
    with served(fitted(model), model_timeout=0.2) as (url, state), ThreadPoolExecutor(1) as pool:
        assert health(url) == (200, 200)
        model.arm()
        asked = pool.submit(post, url, png(image_of(1)))
        assert gate.entered.wait(30)
        until(state.service.sick)
        assert health(url) == (503, 503)
        assert "for more than 0.2 seconds" in get(f"{url}/health").json()["reason"]
        gate.opened.set()
        assert asked.result().status_code == 200
        until(lambda: not state.service.sick())
        assert health(url) == (200, 200)


def test_a_model_that_fails_on_everything_is_not_ready_and_comes_back(monkeypatch):
    broken = True

    def before(x):
        if broken:
            raise RuntimeError("out of memory")

    model = Hook(before)
    with served(fitted(model), max_failures=3) as (url, _):
        model.arm()
        for index in range(3):
            assert health(url) == (200, 200)
            post(url, png(image_of(index)))
        assert health(url) == (200, 503)
        assert get(f"{url}/ready").json()["reason"] == "the model raised 3 times in a row"
        # After a pause it is tried again; one more failure is enough, and so is one answer.
        monkeypatch.setattr(service_module, "_PAUSE", 0.0)
        assert health(url) == (200, 200)
        monkeypatch.setattr(service_module, "_PAUSE", 600.0)
        post(url, png(image_of(1)))
        assert health(url) == (200, 503)
        broken = False
        assert post(url, png(image_of(1))).json()["decisions"][0]["status"] != "INVALID"
        assert health(url) == (200, 200)


def test_inputs_that_make_a_sound_model_raise_do_not_take_it_down():
    def before(x):
        if (x.flatten(1).mean(dim=1) > 1).any():
            raise ValueError("too bright")

    model = Hook(before)
    white = image_of(0)
    white.paste((255, 255, 255), (0, 0, 8, 8))
    with served(fitted(model), max_failures=2) as (url, _):
        model.arm()
        for _ in range(7):
            reply = post(url, png(white)).json()["decisions"][0]
            assert reply["reason"] == "the model raised ValueError"
            assert health(url) == (200, 200)


def test_drift_counts_invalid_rows_as_refused():
    """Their scores may look well: an infinite logit of one class leaves the energy finite."""

    class Negative(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear()
            self.eval()

        def forward(self, x):
            logits = self.inner(x).clone()
            logits[torch.arange(len(x)), logits.argmin(dim=1)] = -torch.inf
            return logits

    guard = fitted_on(Negative())
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(2)) * 3
    decision = guard(x)
    assert {row["status"] for row in decision.rows()} == {"INVALID"}
    assert decision.score.isfinite().all()
    with served(guard, max_batch=64) as (url, state):
        post(url, npy(x.numpy()), NPY)
        found = state.service.monitor.state
    assert (found.n, found.invalid) == (64, 64)


@pytest.mark.parametrize(("on_error", "seen"), [("invalid", 5), ("raise", 0)])
def test_drift_sees_the_rows_that_were_answered_though_the_model_raised(on_error, seen):
    def before(x):
        raise ValueError

    model = Hook(before)
    with served(fitted(model), on_error=on_error) as (url, state):
        model.arm()
        for index in range(5):
            post(url, png(image_of(index)))
        found = state.service.monitor.state
    assert (found.n, found.invalid) == (seen, seen)


def test_an_application_starts_again_after_it_ended():
    guard = fitted()
    app = make_app(guard)
    expected = guard.predict(image_of(1))

    async def ask():
        async with app.router.lifespan_context(app), client_of(app) as client:
            reply = await client.post("/predict", content=png(image_of(1)), headers=PNG)
            return reply, (await client.get("/ready")).status_code

    for _ in range(3):
        reply, ready = asyncio.run(ask())
        assert (reply.status_code, ready) == (200, 200), reply.text
        agrees(reply.json()["decisions"][0], expected)


@pytest.mark.parametrize("name", ["max_delay", "body_timeout", "decode_timeout", "model_timeout"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e9, -1])
def test_waits_without_an_end_are_refused(name, value):
    with pytest.raises(InvalidInputError, match=f"{name}.*seconds"):
        ServeSettings(**{name: value})


def test_run_server_refuses_to_wait_for_ever():
    with pytest.raises(InvalidInputError, match="shutdown_timeout"):
        run_server(make_app(fitted()), port=0, shutdown_timeout=float("inf"))


def test_a_signal_before_the_server_listens_ends_it(monkeypatch):
    import uvicorn

    assert threading.current_thread() is threading.main_thread()
    before, opened, second = uvicorn.Server.run, [], []

    def run(self, sockets=None):
        os.kill(os.getpid(), signal.SIGTERM)
        before(self, sockets)

    def again():
        second.append(True)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(uvicorn.Server, "run", run)
    rescue = threading.Timer(20, again)
    rescue.start()
    run_server(make_app(fitted()), port=0, started=opened.append)
    rescue.cancel()
    assert not second
    assert not opened


HANGING = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
from serving import Hook, fitted
from ebm_guard.deploy.serve import make_app, run_server
model = Hook(lambda x: time.sleep(10**6))
app = make_app(fitted(model))
class Slow:
    example = None
    def rows(self, content_type, body, kind):
        if body == b"hang":
            time.sleep(10**6)
        return plain.rows(content_type, body, kind)
plain, app.state.service.parser = app.state.service.parser, Slow()
def started(url):
    model.arm()
    print(url, flush=True)
run_server(app, port=0, shutdown_timeout=float(sys.argv[2]), started=started)
print("ended")
"""


@pytest.mark.slow
def test_a_process_whose_model_and_decoders_hang_ends_in_time():
    folder = str(Path(__file__).parent)
    made = subprocess.Popen(
        [sys.executable, "-c", HANGING, folder, "0.5"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        url = made.stdout.readline().strip()
        assert url, made.stderr.read()
        with ThreadPoolExecutor(3) as pool:
            model = pool.submit(post, url, png(image_of(1)))
            decoder = pool.submit(post, url, b"hang")
            until(lambda: counts(url)["ebm_guard_requests_inside"] == 2)
            time.sleep(0.5)
            made.send_signal(signal.SIGTERM)
            # The old one waited for the model for ever.
            out, err = made.communicate(timeout=120)
            reply = model.result()
            decoder.exception()
    finally:
        made.kill()
        made.communicate()
    assert made.returncode == 0, err
    assert "ended" in out
    # Told, not dropped.
    assert (reply.status_code, reply.json()["error"]) == (503, "closing")

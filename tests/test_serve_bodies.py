"""What is done with bodies: dropped once they are rows, and read on where they are refused."""

import asyncio
import contextlib
import gc
import http.server
import runpy
import socket
import struct
import threading
import tracemalloc
import urllib.error
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

for extra in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
    pytest.importorskip(extra, reason="the extra `serve` is not installed")

from serving import (  # noqa: E402
    NPY,
    PNG,
    Gate,
    Hook,
    counts,
    fitted,
    fitted_on,
    image_of,
    npy,
    png,
    post,
    refused,
    served,
    until,
)
from toys import linear  # noqa: E402

from ebm_guard.deploy.serve import (  # noqa: E402
    ServeSettings,
    batching,
    make_app,
)
from ebm_guard.deploy.serve.batching import Job  # noqa: E402
from ebm_guard.deploy.serve.refusal import RefusedError  # noqa: E402
from ebm_guard.deploy.serve.workers import CallError, Workers  # noqa: E402

ASK = runpy.run_path(str(Path(__file__).parents[1] / "examples/serving/client.py"))["ask"]


@contextlib.contextmanager
def full(**settings):
    """A server whose one place is taken."""
    gate = Gate()
    model = Hook(gate)
    with served(fitted(model), queue_size=1, **settings) as (url, state):
        model.arm()
        with ThreadPoolExecutor(1) as pool:
            inside = pool.submit(post, url, png(image_of(0)))
            assert gate.entered.wait(30)
            try:
                yield url, state
            finally:
                gate.opened.set()
            assert inside.result().status_code == 200


def connect(url):
    host, port = url.removeprefix("http://").split(":")
    found = socket.create_connection((host, int(port)))
    found.settimeout(30)
    return found


def head(length, more=""):
    return f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{more}\r\n".encode()


def all_of(connection):
    """Read until the server closes; a reset is an end, too."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            found += part
    return found


def test_clients_that_send_before_they_read_get_their_refusal():
    with full(max_bytes=8 * 2**20) as (url, _), pytest.raises(urllib.error.HTTPError) as caught:
        ASK(url, bytes(8 * 2**20), tries=1)
    assert (caught.value.code, caught.value.headers["Retry-After"]) == (503, "1")
    assert caught.value.headers["Connection"] == "close"
    caught.value.close()
    with served(fitted(), max_bytes=4 * 2**20) as (url, _):
        with pytest.raises(urllib.error.HTTPError) as caught:
            ASK(url, bytes(7 * 2**20), tries=1)
        assert caught.value.code == 413
        caught.value.close()
        # Without a length, too.
        assert post(url, (bytes(2**20) for _ in range(7)), PNG).status_code == 413
        assert refused(counts(url), "too_large") == 2


def test_a_refused_body_is_not_read_without_end():
    with served(fitted(), max_bytes=10_000, body_timeout=0.3) as (url, _):
        # So long that there is no hope, too slow, and asked whether it may come.
        for first, code in (
            (head(10**12), b"413"),
            (head(100) + b"abc", b"408"),
            (head(15_000, "Expect: 100-continue\r\n"), b"413"),
        ):
            with connect(url) as connection:
                connection.sendall(first)
                answer = all_of(connection)
            assert answer.startswith(b"HTTP/1.1 " + code)
            assert b"connection: close" in answer.lower()
            assert b"100 Continue" not in answer
        # A client that sends and sends is cut off, far below what it would send.
        with connect(url) as connection:
            connection.sendall(
                head("0", "").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
            )
            piece, sent = b"8000\r\n" + bytes(0x8000) + b"\r\n", 0
            with contextlib.suppress(ConnectionError):
                while sent < 500 * 2**20:
                    sent += connection.send(piece)
        assert sent < 50 * 2**20


def test_a_small_body_that_is_refused_keeps_its_connection():
    with full() as (url, _), connect(url) as connection:
        for _ in range(3):
            connection.sendall(head(5) + b"abcde")
            answer = b""
            while b'"}' not in answer:
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 503")
            assert b"close" not in answer.lower()


def test_the_client_tries_again_where_a_connection_breaks(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    seen = []

    class Moody(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append(self.path)
            if len(seen) < 3:
                # Closed so, the kernel sends a reset.
                self.connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                self.connection.close()
                return
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"decisions": [1]}')

        def finish(self):
            with contextlib.suppress(OSError, ValueError):
                super().finish()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Moody) as server:
        server.handle_error = lambda *_: None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert ASK(url, bytes(100)) == [1]
        assert len(seen) == 3
        seen.clear()
        with pytest.raises((ConnectionError, urllib.error.URLError)):
            ASK(url, bytes(100), tries=2)
        assert len(seen) == 2
        server.shutdown()


def test_bodies_are_dropped_once_they_are_rows():
    """What waits in the queue is the tensor alone."""
    gate, width, n = Gate(), 2**18, 8

    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.armed = linear(), False
            self.eval()

        def forward(self, x):
            if self.armed:
                gate(x)
            return self.inner(x[:, :4])

    model = Wide()
    app = make_app(fitted_on(model), settings=ServeSettings(max_delay=0))
    service = app.state.service
    service.start()
    model.armed = True
    body = npy(np.ones((1, width), dtype=np.float32))

    async def ask():
        async with (
            asyncio.timeout(60),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client,
        ):

            def send():
                # A new object each: sent as one, they would share their memory.
                content = bytes(bytearray(body))
                return asyncio.create_task(client.post("/predict", content=content, headers=NPY))

            first = send()
            while not gate.entered.is_set():
                await asyncio.sleep(0.001)
            before = tracemalloc.get_traced_memory()[0]
            tasks = [send() for _ in range(n)]
            while service.batcher.depth < n:
                await asyncio.sleep(0.001)
            held = tracemalloc.get_traced_memory()[0] - before
            gate.opened.set()
            replies = await asyncio.gather(first, *tasks)
            return held, {reply.status_code for reply in replies}

    tracemalloc.start()
    try:
        held, codes = asyncio.run(ask())
    finally:
        tracemalloc.stop()
        service.stop()
    assert codes == {200}
    # The client of this process holds each body, too.
    assert held / n < 2.5 * len(body)


def test_no_job_outlives_its_answer(monkeypatch):
    made = []

    class Seen(Job):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr(batching, "Job", Seen)
    with served(fitted()) as (url, _):
        for index in range(30):
            assert post(url, png(image_of(index))).status_code == 200
        assert len(made) == 30

        def alive():
            gc.collect()
            return sum(job() is not None for job in made)

        until(lambda: alive() == 0)


def test_decoding_has_a_limit_and_a_hanging_decoder_shows():
    opened = threading.Event()

    class Slow:
        def rows(self, content_type, body, kind):
            assert opened.wait(30)
            raise StopIteration

    settings = {"decoders": 1, "decode_timeout": 0.1, "model_timeout": 0.2}
    with served(fitted(), **settings) as (url, state):
        parser, state.service.parser = state.service.parser, Slow()
        one, two = post(url, b"slow"), post(url, b"waits")
        assert (one.status_code, one.json()["error"]) == (413, "too_large")
        assert "not decoded within 0.1 seconds" in one.json()["message"]
        assert (two.status_code, two.json()["error"]) == (503, "load")
        until(state.service.sick)
        assert "all threads that decode" in state.service.sick()
        threads = [t for t in threading.enumerate() if t.name.startswith("ebm-guard-")]
        # Or they would keep a process alive that was told to end.
        assert len(threads) >= 2
        assert all(thread.daemon for thread in threads)
        opened.set()
        until(lambda: not state.service.sick())
        # Asyncio cannot carry a StopIteration.
        broken = post(url, b"")
        assert (broken.status_code, broken.json()["message"]) == (500, "StopIteration")
        state.service.parser = parser
        assert post(url, png(image_of(1))).status_code == 200


def test_workers_give_each_caller_its_own_result():
    workers = Workers(2, "example")

    def call(number):
        if number % 3 == 0:
            raise (RefusedError("load", "no") if number % 2 else KeyError(number))
        return number

    async def ask(number):
        try:
            return await workers.run(lambda: call(number), seconds=30)
        except CallError as error:
            return type(error.error)
        except RefusedError:
            return RefusedError

    async def all_calls():
        return await asyncio.gather(*(ask(number) for number in range(60)))

    found = asyncio.run(all_calls())
    workers.close()
    for number, value in enumerate(found):
        assert value == (number if number % 3 else RefusedError if number % 2 else KeyError)

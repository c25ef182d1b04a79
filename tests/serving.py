"""A server on a real port, what it is sent, and what its metrics say."""

import contextlib
import io
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import torch
from PIL import Image
from torch import nn
from toys import Pixels, logits_with

import ebm_guard
from ebm_guard import Predictions
from ebm_guard.deploy.serve import ServeSettings, make_app

PNG = {"content-type": "image/png"}
NPY = {"content-type": "application/x-npy"}
STATUSES = ("accept", "reject", "invalid")


def fitted(model=None, n=400, seed=0, **settings):
    """Fit a guard for (3, 8, 8) images of one colour."""
    generator = torch.Generator().manual_seed(seed)
    model = model or Pixels()
    # Colours of the middle: dark and bright ones are refused now and then.
    pixels = 0.3 + 0.5 * torch.rand(n, 3, 1, 1, generator=generator).expand(n, 3, 8, 8)
    rows = ebm_guard.Preprocessing.from_model(model).normalize(pixels)
    with torch.no_grad():
        labels = model(rows).argmax(dim=1)
    wrong = torch.rand(n, generator=generator) < 0.2
    labels[wrong] = (labels[wrong] + 1) % 3
    return ebm_guard.wrap(model).fit([(rows, labels)], **settings)


def fitted_on(model, classes=None, n=300, **settings):
    """Fit a guard on stored rows that look like the logits of some classifier."""
    rows = logits_with(n, classes=3)
    rows = Predictions(rows.logits, labels=rows.labels, classes=classes)
    return ebm_guard.wrap(model).fit(rows, canary=False, **settings)


class Hook(nn.Module):
    """Pixels, with something that happens before each forward pass."""

    def __init__(self, before):
        super().__init__()
        self.inner, self.before = Pixels(), lambda x: None
        self.pretrained_cfg = self.inner.pretrained_cfg
        self.then = before
        self.eval()

    def forward(self, x):
        self.before(x)
        return self.inner(x)

    def arm(self):
        self.before = self.then
        return self


class Gate:
    """Hold the model until it is opened."""

    def __init__(self):
        self.opened, self.entered = threading.Event(), threading.Event()

    def __call__(self, x):
        self.entered.set()
        assert self.opened.wait(30)


@contextlib.contextmanager
def served(guard, *, shadow=None, **settings):
    """Run a server in a thread; yield its URL and its service."""
    import uvicorn

    app = make_app(guard, shadow=shadow, settings=ServeSettings(**settings))
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(256)
        config = uvicorn.Config(app, log_level="critical", lifespan="on")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        until(lambda: server.started or not thread.is_alive())
        app.state.stop = lambda: setattr(server, "should_exit", True)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", app.state
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def until(condition, seconds=30):
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def image_of(index, size=8):
    """An 8-bit image of one colour that no other index below 2**24 has."""
    colour = tuple((index * 7919 + 12345) >> shift & 255 for shift in (0, 8, 16))
    return Image.new("RGB", (size, size), colour)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def npy(rows):
    file = io.BytesIO()
    np.save(file, np.asarray(rows), allow_pickle=False)
    return file.getvalue()


def agrees(row, decision, index=0):
    """A served row is that of a decision, up to the rounding of other batch sizes."""
    expected = decision.rows()[index]
    for name in ("status", "accept", "label"):
        assert row[name] == expected[name], (name, row, expected)
    for name in ("confidence", "energy", "score"):
        np.testing.assert_allclose(row[name], expected[name], rtol=1e-5, atol=1e-6)


def get(url):
    # Not httpx.get: it reads all certificates of the machine first.
    with httpx.Client(verify=False, trust_env=False, timeout=30) as client:
        return client.get(url)


def post(url, content, headers=PNG, **settings):
    with httpx.Client(verify=False, trust_env=False, timeout=60) as client:
        return client.post(f"{url}/predict", content=content, headers=headers, **settings)


def counts(url):
    """Read /metrics: name with labels -> number."""
    text = get(f"{url}/metrics").text
    found = re.findall(r"^(ebm_guard_\S+?(?:\{[^}]*\})?) (\S+)$", text, re.MULTILINE)
    return {name: float(number) for name, number in found}


def decisions(found):
    return {word: found[f'ebm_guard_decisions_total{{status="{word}"}}'] for word in STATUSES}


def refused(found, reason):
    return found[f'ebm_guard_refused_total{{reason="{reason}"}}']


def in_parallel(work, items, clients=8):
    """Run work(client, item) over keep-alive connections, in many threads."""
    own = threading.local()
    opened = []

    def run(item):
        if not hasattr(own, "client"):
            own.client = httpx.Client(verify=False, trust_env=False, timeout=60)
            opened.append(own.client)
        return work(own.client, item)

    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(run, items))
    for client in opened:
        client.close()
    return found

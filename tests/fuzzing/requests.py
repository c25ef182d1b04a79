"""Parsers of what strangers send to the server."""

import asyncio
import io
from functools import cache

import httpx
import numpy as np
import torch
from PIL import Image
from serving import fitted, npy

from ebm_guard import Preprocessing
from ebm_guard.deploy.serve import ServeSettings, make_app
from ebm_guard.deploy.serve.forms import file_of_form
from ebm_guard.deploy.serve.pictures import FORMATS, row_of_image
from ebm_guard.deploy.serve.refusal import STATUS
from ebm_guard.deploy.serve.tensors import rows_of_npy
from fuzzing.bounds import Target
from fuzzing.mutations import TEXTS, bytes_of, npy_of, png_bomb, zip_of

PLAIN = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), image_size=(8, 8), interpolation="bilinear")
MOST = 4_000_000
TYPES = (
    "image/png",
    "application/x-npy",
    "multipart/form-data; boundary=x",
    "",
    "application/json",
)


@cache
def pictures():
    made = []
    for kind in FORMATS:
        for mode in ("RGB", "L", "P", "RGBA", "1"):
            image = Image.effect_noise((12, 10), 80).convert(mode)
            file = io.BytesIO()
            try:
                image.save(file, kind)
            except OSError:
                continue
            made.append(file.getvalue())
    return made


def picture(rng):
    way = rng.random()
    if way < 0.3:
        return png_bomb(rng)
    body = rng.choice(pictures())
    if way < 0.6:
        # Sizes and counts lie in the first bytes of most formats.
        at = rng.randrange(min(len(body), 120))
        number = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff", b"\x40\0"])
        return body[:at] + number + body[at + len(number) :]
    return bytes_of(rng, body)


def array(rng):
    way = rng.random()
    if way < 0.6:
        return npy_of(rng, "'<f4'", "(2, 3, 8, 8)", b"\0" * 4 * 2 * 192)
    dtype = rng.choice(["<f4", ">f4", "<f8", "<f2", "<u2", "<i8", ">u4", "|u1", "|i1"])
    body = npy(np.ones((2, 3, 8, 8), dtype=dtype))
    return bytes_of(rng, body) if way < 0.8 else body


def form(rng):
    """Parts without number, without end, with long names, names of other folders, and bombs."""
    parts = []
    for _ in range(rng.choice([1, 1, 1, 2, 5, 40])):
        name = rng.choice(["file", "file", "file", *TEXTS]).encode("utf-8", "ignore")
        file = rng.choice(TEXTS).encode("utf-8", "ignore")
        head = b'Content-Disposition: form-data; name="' + name + b'"; filename="' + file + b'"'
        if rng.random() < 0.2:
            head += rng.choice([b"; a" * 3000, b'; x="' + b"\\" * 9000, b"\r\nA: b" * 200])
        body = rng.choice(pictures()) if rng.random() < 0.7 else b"\r\n--x" * rng.randint(1, 2000)
        parts.append(b"--x\r\n" + head + b"\r\n\r\n" + body + b"\r\n")
    body = b"".join(parts) + rng.choice([b"--x--\r\n"] * 4 + [b"--x--", b"--x", b""])
    return bytes_of(rng, body) if rng.random() < 0.5 else body


def read_array(body, place):
    rows = rows_of_npy(body, 8)
    # Numpy reads the same, where it reads it at all.
    expected = np.load(io.BytesIO(body), allow_pickle=False)
    np.testing.assert_array_equal(rows.numpy(), expected)
    return 1 <= len(rows) <= 8


def read_picture(body, place):
    row = row_of_image(body, PLAIN, 1_000_000)
    assert row.shape == (1, 3, 8, 8)
    assert torch.isfinite(row).all()
    return True


def read_form(body, place):
    return isinstance(file_of_form("multipart/form-data; boundary=x", body), bytes)


def request(rng):
    place = rng.randrange(3)
    body = (picture, array, form)[place](rng)
    kind = TYPES[place] if rng.random() < 0.7 else rng.choice([*TYPES, *TEXTS])
    # The HTTP server lets no line end or zero byte into a header.
    kind = kind.encode("utf-8", "ignore").replace(b"\n", b" ").replace(b"\0", b"")
    return body, kind, rng.choice(["model", "model", "pixels", "x", ""])


@cache
def application():
    """The application in this process, without a port; started once."""
    limits = ServeSettings(max_bytes=2**20, max_pixels=1_000_000)
    app = make_app(fitted(), settings=limits)
    app.state.service.start()
    return app


async def asked(body, kind, query):
    transport = httpx.ASGITransport(application())
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        return await client.post(
            "/predict", content=body, headers={"content-type": kind}, params={"input": query}
        )


def read_request(given, place):
    reply = asyncio.run(asked(*given))
    assert reply.status_code in {200, *STATUS.values()} - {500, 503}, reply.text
    content = reply.json()
    if reply.status_code != 200:
        assert set(content) == {"error", "message"}
        return False
    assert content["decisions"]
    return True


def bomb_in_npz(rng):
    """An npz archive where an array is asked for: refused, and never inflated."""
    return zip_of(rng, {"images.npy": npy(np.zeros((2, 8, 8)))})


def request_targets():
    """All parsers of requests."""
    return [
        Target(
            "array", lambda rng: bomb_in_npz(rng) if rng.random() < 0.05 else array(rng), read_array
        ),
        Target("image", picture, read_picture),
        Target("form", form, read_form),
        Target("request", request, read_request),
    ]

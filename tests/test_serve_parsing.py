"""What strangers send: limits, bombs, garbage, and a count of the inputs tried."""

import asyncio
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

for extra in ("fastapi", "uvicorn", "httpx", "prometheus_client", "python_multipart"):
    pytest.importorskip(extra, reason="the extra `serve` is not installed")

import httpx  # noqa: E402
from PIL import Image  # noqa: E402
from serving import NPY, PNG, counts, fitted, fitted_on, image_of, npy, png, post, refused, served  # noqa: E402
from toys import linear  # noqa: E402

from ebm_guard import Preprocessing  # noqa: E402
from ebm_guard.deploy.serve import ServeSettings, make_app  # noqa: E402
from ebm_guard.deploy.serve.forms import file_of_form  # noqa: E402
from ebm_guard.deploy.serve.parsing import Parser  # noqa: E402
from ebm_guard.deploy.serve.pictures import row_of_image  # noqa: E402
from ebm_guard.deploy.serve.refusal import STATUS, RefusedError  # noqa: E402
from ebm_guard.deploy.serve.tensors import rows_of_npy  # noqa: E402

PLAIN = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), image_size=(8, 8), interpolation="bilinear")
FUZZED = {"forms": 0, "arrays": 0, "images": 0, "requests": 0}


def header_of(shape, descr="<f4", order=False):
    text = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def huge_png(width, height):
    """A PNG of a few bytes whose header claims any size."""

    def chunk(name, data):
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    dtype=st.sampled_from(["<f4", ">f4", "<f2", "<f8", ">i4", "<i8", "|u1", "|i1", "<u2"]),
    fortran=st.booleans(),
    version=st.sampled_from([(1, 0), (2, 0)]),
)
def test_arrays_are_read_as_numpy_reads_them(shape, dtype, fortran, version):
    rows = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    rows = np.asfortranarray(rows) if fortran else rows
    file = io.BytesIO()
    np.lib.format.write_array(file, rows, version=version, allow_pickle=False)
    found = rows_of_npy(file.getvalue(), 8)
    assert found.dtype == torch.from_numpy(rows.astype(rows.dtype.newbyteorder("="))).dtype
    np.testing.assert_array_equal(found.numpy(), rows)
    with pytest.raises(RefusedError, match="bytes follow"):
        rows_of_npy(file.getvalue()[:-1], 8)


@pytest.mark.parametrize(
    ("body", "words", "reason"),
    [
        (b"", "no .npy file", "unreadable"),
        (b"\x93NUMPY\x01", "no .npy file", "unreadable"),
        (b"\x93NUMPY\x03\x00" + b"\0" * 20, "version 1 or 2", "unreadable"),
        (b"\x93NUMPY\x01\x00\xff\xff{", "cut off or too long", "unreadable"),
        # 4 TB from 90 bytes.
        (header_of("(1, 1000000, 1000000)"), "bytes follow", "unreadable"),
        (header_of("(9, 2)") + b"\0" * 72, "1 <= B <= 8", "too_large"),
        (header_of("(0, 2)"), "1 <= B <= 8", "unreadable"),
        (header_of("(2, 0)"), "1 <= B <= 8", "unreadable"),
        (header_of("(2,)") + b"\0" * 8, "(B, ...)", "unreadable"),
        (header_of("()") + b"\0" * 4, "(B, ...)", "unreadable"),
        (header_of("(2, -2)"), "header is not", "unreadable"),
        (header_of("(1, 2)", "|O"), "header is not", "unreadable"),
        (header_of("(1, 2)", "|V8") + b"\0" * 16, "header is not", "unreadable"),
        (header_of("(1, 2)", "<i4', 'descr': '|O"), "header is not", "unreadable"),
        (header_of("(1, 2)", "<f1") + b"\0" * 2, "no dtype", "unreadable"),
        (header_of("(1, 2)", "<c8") + b"\0" * 16, "header is not", "unreadable"),
    ],
)
def test_bad_arrays_are_refused(body, words, reason):
    with pytest.raises(RefusedError) as caught:
        rows_of_npy(body, 8)
    assert words in str(caught.value)
    assert caught.value.reason == reason


def test_pickled_arrays_are_refused_and_nothing_runs():
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    file = io.BytesIO()
    np.save(file, np.array([[Evil()]], dtype=object), allow_pickle=True)
    with pytest.raises(RefusedError, match="header is not"):
        rows_of_npy(file.getvalue(), 8)


@pytest.mark.parametrize(
    ("size", "words"),
    [((60_000, 60_000), "got an image"), ((1001, 1000), "1001 x 1000"), ((9000, 9000), "9000 x")],
)
def test_a_bomb_is_refused_by_its_header(size, words):
    with pytest.raises(RefusedError, match=words) as caught:
        row_of_image(huge_png(*size), PLAIN, 1_000_000)
    assert caught.value.status == 413


def test_a_thin_image_that_would_grow_is_refused_and_one_that_fits_is_not():
    thin = png(Image.new("RGB", (20_000, 1)))
    with pytest.raises(RefusedError, match="before and after resizing"):
        row_of_image(thin, PLAIN, 1_000_000)
    assert row_of_image(thin, PLAIN, 2_000_000).shape == (1, 3, 8, 8)


def test_formats_that_start_programs_or_are_rare_are_not_opened(tmp_path):
    for kind in ("EPS", "PPM", "PCX", "ICO"):
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, kind)
        with pytest.raises(RefusedError, match="no image of the formats JPEG"):
            row_of_image(file.getvalue(), PLAIN, 1000)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats_that_are_read_give_what_the_guard_gives(kind):
    guard = fitted()
    image = Image.effect_noise((11, 9), 60).convert("RGB")
    file = io.BytesIO()
    image.save(file, kind)
    row = row_of_image(file.getvalue(), guard.classifier.preprocessing, 1000)
    with Image.open(io.BytesIO(file.getvalue())) as again:
        expected = guard.predict(again.copy())
    assert guard(row).energy.tolist() == expected.energy.tolist()


def test_every_refusal_over_http_has_its_code_and_its_count():
    guard = fitted()
    rows = np.zeros((1, 3, 8, 8), dtype=np.float32)
    cases = [
        ("unreadable", b"garbage", PNG, {}),
        ("unreadable", b"", PNG, {}),
        ("unreadable", png(image_of(1))[:-40], PNG, {}),
        ("unreadable", npy(rows)[:-1], NPY, {}),
        ("unreadable", npy(np.zeros((1, 3, 9, 8), dtype=np.float32)), NPY, {}),
        ("unreadable", npy(np.zeros((1, 3, 8, 8), dtype=np.uint8)), NPY, {}),
        ("unreadable", npy(rows + 2), NPY, {"input": "pixels"}),
        ("unreadable", npy(rows), NPY, {"input": "pickle"}),
        ("unreadable", b"--", {"content-type": "multipart/form-data; boundary=x"}, {}),
        ("unreadable", b"--", {"content-type": "multipart/form-data"}, {}),
        ("too_large", npy(np.zeros((5, 3, 8, 8), dtype=np.float32)), NPY, {}),
        ("too_large", huge_png(40_000, 40_000), PNG, {}),
        ("too_large", png(image_of(1, size=40)), PNG, {}),
        ("too_large", b"\0" * 8001, PNG, {}),
        ("unsupported", png(image_of(1)), {"content-type": "text/plain"}, {}),
        ("unsupported", b"{}", {"content-type": "application/json"}, {}),
        ("unsupported", png(image_of(1)), {}, {}),
    ]
    with served(guard, max_bytes=8000, max_pixels=1000, max_batch=4) as (url, _):
        for reason, body, headers, params in cases:
            reply = post(url, body, headers, params=params)
            assert (reply.status_code, reply.json()["error"]) == (STATUS[reason], reason), body[:40]
            assert "Traceback" not in reply.text
        # Without a length in the header, the limit is found on the way.
        chunks = (b"\0" * 1000 for _ in range(100))
        assert post(url, chunks, PNG).json()["error"] == "too_large"
        good = post(url, png(image_of(1)), PNG)
        found = counts(url)
    assert good.status_code == 200
    for reason in ("unreadable", "too_large", "unsupported"):
        expected = sum(case[0] == reason for case in cases) + (reason == "too_large")
        assert refused(found, reason) == expected
    total = sum(value for name, value in found.items() if "responses_total" in name)
    assert total == len(cases) + 2
    assert sum(value for name, value in found.items() if "decisions_total" in name) == 1


def test_a_body_that_does_not_come_ends_with_408():
    with served(fitted(), body_timeout=0.2) as (url, _):
        host, port = url.removeprefix("http://").split(":")

        async def slow():
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
            head = await asyncio.wait_for(reader.readline(), 30)
            writer.close()
            await writer.wait_closed()
            return head

        assert b"408" in asyncio.run(slow())
        assert refused(counts(url), "timeout") == 1


def test_a_client_that_goes_away_frees_its_place():
    with served(fitted(), queue_size=1) as (url, state):
        host, port = url.removeprefix("http://").split(":")

        async def leave():
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
            await writer.drain()
            while state.service.batcher.inside != 1:
                await asyncio.sleep(0.001)
            writer.close()
            while state.service.batcher.inside:
                await asyncio.sleep(0.001)

        asyncio.run(asyncio.wait_for(leave(), 30))
        assert post(url, png(image_of(1))).status_code == 200


def test_a_model_without_preprocessing_takes_arrays_only():
    parser = Parser.of(fitted_on(linear()), 4, 1000)
    for content_type, body, kind in (
        ("image/png", png(image_of(1)), "model"),
        ("application/x-npy", npy(np.zeros((1, 4), dtype=np.float32)), "pixels"),
    ):
        with pytest.raises(RefusedError) as caught:
            parser.rows(content_type, body, kind)
        assert caught.value.reason == "unsupported"
    assert parser.rows("application/x-npy", npy(np.zeros((2, 4))), "model").dtype == torch.float64


# --- fuzz: whatever comes, it is rows or a refusal that is on the list


def tried(name, work, *args):
    FUZZED[name] += 1
    try:
        return work(*args)
    except RefusedError as error:
        if error.reason not in STATUS:
            raise
        return None


@st.composite
def damaged(draw, whole):
    """Cut, overwrite, repeat: bytes that begin as something valid."""
    body = bytearray(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(len(body) - 1, 0)))
        action = draw(st.sampled_from(["cut", "write", "insert"]))
        if action == "cut":
            del body[at : at + draw(st.integers(1, 40))]
        elif action == "write":
            new = draw(st.binary(min_size=1, max_size=6))
            body[at : at + len(new)] = new
        else:
            body[at:at] = draw(st.binary(min_size=1, max_size=20))
    return bytes(body)


def images():
    made = []
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        for mode in ("RGB", "L"):
            file = io.BytesIO()
            Image.effect_noise((12, 10), 80).convert(mode).save(file, kind)
            made.append(file.getvalue())
    return made


ARRAYS = [npy(np.ones((2, 3, 8, 8), dtype=np.float32)), npy(np.ones((1, 5))), header_of("(1, 2)")]
FORM = (
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n'
    b"Content-Type: image/png\r\n\r\n" + png(image_of(1)) + b"\r\n--x--\r\n"
)
FUZZ = settings(deadline=None, max_examples=250, suppress_health_check=[HealthCheck.too_slow])


@FUZZ
@given(body=st.one_of(damaged(ARRAYS), st.binary(max_size=200)))
def test_fuzz_arrays(body):
    rows = tried("arrays", rows_of_npy, body, 8)
    assert rows is None or 1 <= len(rows) <= 8


@FUZZ
@given(body=damaged(images()))
def test_fuzz_images(body):
    row = tried("images", row_of_image, body, PLAIN, 100_000)
    assert row is None or row.shape == (1, 3, 8, 8)


@FUZZ
@given(body=damaged([FORM]), boundary=st.sampled_from(["x", "xx", '"x"', "", "é", "y" * 300]))
def test_fuzz_forms(body, boundary):
    found = tried("forms", file_of_form, f"multipart/form-data; boundary={boundary}", body)
    assert found is None or isinstance(found, bytes)


@settings(FUZZ, max_examples=100)
@given(
    body=st.one_of(damaged([FORM, *ARRAYS, png(image_of(1))]), st.binary(max_size=50)),
    kind=st.sampled_from(
        ["image/png", "application/x-npy", "multipart/form-data; boundary=x", "", "a/b", "é"]
    ),
    query=st.text(st.characters(codec="utf-8"), max_size=8) | st.just("pixels"),
)
def test_fuzz_whole_requests(body, kind, query):
    FUZZED["requests"] += 1
    reply = CALLS(body, kind, query)
    assert reply.status_code in {200, *STATUS.values()} - {500, 503}
    content = reply.json()
    assert set(content) in ({"error", "message"}, {"artifact", "decisions"})


class Calls:
    """The application in this process, without a port; started once."""

    def __init__(self):
        self.app = None

    def __call__(self, body, kind, query):
        if self.app is None:
            self.app = make_app(fitted(), settings=ServeSettings(max_bytes=4000, max_pixels=10_000))
            self.app.state.service.start()
        return asyncio.run(self._call(body, kind, query))

    async def _call(self, body, kind, query):
        transport = httpx.ASGITransport(self.app)
        headers = {"content-type": kind.encode("latin-1")}
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.post(
                "/predict", content=body, headers=headers, params={"input": query}
            )


CALLS = Calls()


def test_fuzz_count():
    """Say how many inputs were tried, where all of this file ran."""
    print(f"inputs tried: {FUZZED}")
    if all(FUZZED.values()):
        assert sum(FUZZED.values()) >= 700

"""Files that are small and take long: refused by what their headers say, whatever is in them."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from ebm_guard import Preprocessing
from ebm_guard.deploy.serve.bombs import check_cost
from ebm_guard.deploy.serve.pictures import row_of_image
from ebm_guard.deploy.serve.refusal import RefusedError

PLAIN = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), image_size=(8, 8), interpolation="bilinear")
NOISE = Image.effect_noise((40, 30), 60)


def saved(image, kind, **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def tiff(*entries, order="<"):
    """A TIFF of one grey pixel's tags, with more of them; entries are (tag, type, count, value)."""
    tags = [(256, 4, 1, 1), (257, 4, 1, 1), (258, 3, 1, 8), (262, 3, 1, 1), *entries]
    ends = {3: "HH", 4: "L"}
    directory = struct.pack(f"{order}H", len(tags))
    for tag, kind, count, value in tags:
        values = (value, 0) if kind == 3 else (value,)
        directory += struct.pack(f"{order}HHL{ends.get(kind, 'L')}", tag, kind, count, *values)
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HL", 42, 8)
    return head + directory + bytes(64)


def chunk(name, data=b""):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def refused(body, max_pixels=1_000_000):
    with pytest.raises(RefusedError) as caught:
        row_of_image(body, PLAIN, max_pixels)
    return caught.value


def test_scans_are_counted():
    """Each scan is a pass over all pixels: 53 bytes are 33 ms of an image of 32 million."""
    body = saved(NOISE, "JPEG", progressive=True)
    scan = body[body.rindex(b"\xff\xda") : -2]
    usual = body.count(b"\xff\xda")
    assert 1 < usual < 20
    most = body[:-2] + scan * (100 - usual) + b"\xff\xd9"
    assert row_of_image(most, PLAIN, 10_000).shape == (1, 3, 8, 8)
    error = refused(body[:-2] + scan * (101 - usual) + b"\xff\xd9")
    assert (error.status, error.reason) == (413, "too_large")
    assert "more than 100 scans" in str(error)
    # Those of a second image, and bytes in metadata that only look like scans, are never decoded.
    assert row_of_image(body + scan * 200, PLAIN, 10_000).shape == (1, 3, 8, 8)
    note = b"\xff\xda" * 300
    comment = b"\xff\xfe" + struct.pack(">H", len(note) + 2) + note
    assert row_of_image(body[:2] + comment + body[2:], PLAIN, 10_000).shape == (1, 3, 8, 8)
    # A comment of no bytes hides nothing that comes after it.
    assert "scans" in str(refused(body[:-2] + b"\xff\xfe\x00\x02" + scan * 200 + b"\xff\xd9"))


def test_files_in_very_many_pieces_are_refused():
    """Pillow looks at each: a million empty strips take 42 seconds."""
    jpeg = saved(NOISE, "JPEG")
    assert "2000 segments" in str(refused(jpeg[:2] + b"\xff\xfe\x00\x02" * 2001 + jpeg[2:]))
    assert row_of_image(jpeg[:2] + b"\xff\xfe\x00\x02" * 1900 + jpeg[2:], PLAIN, 10_000).any()
    png = saved(NOISE, "PNG")
    assert "20,000 chunks" in str(refused(png[:33] + chunk(b"abCd") * 20_001 + png[33:]))
    assert row_of_image(png[:33] + chunk(b"abCd") * 2000 + png[33:], PLAIN, 10_000).any()
    for tag in (258, 273, 279, 324, 325):
        for kind in (1, 3, 4, 7):
            assert f"values of tag {tag}" in str(refused(tiff((tag, kind, 20_001, 8))))
    assert "values of tag 40000" in str(refused(tiff((40000, 5, 20_001, 8))))


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_tiles_count_as_pixels(order):
    """A megabyte made 1 GiB: the image had 64 x 64 pixels and its one tile 32768 x 32768."""
    tile = ((322, 4, 1, 32768), (323, 4, 1, 32768))
    error = refused(tiff(*tile, order=order))
    assert (error.reason, "32768 x 32768" in str(error)) == ("too_large", True)
    # The decoder may believe the first of two, and Pillow the last.
    small = ((322, 3, 1, 16), (323, 3, 1, 16))
    for both in ((*tile, *small), (*small, *tile)):
        assert "32768 x 32768" in str(refused(tiff(*both, order=order)))
    check_cost(tiff(*small, order=order), 1000)
    for odd in ((322, 5, 1, 8), (322, 4, 2, 8)):
        assert "odd type" in str(refused(tiff(odd, order=order)))


def test_tiff_of_rare_kinds_is_refused():
    for compression in (6, 7, 34925, 50000, 50001):
        error = refused(tiff((259, 3, 1, compression)))
        assert (error.status, error.reason) == (415, "unsupported")
    assert refused(tiff((259, 3, 1, 1), (259, 3, 1, 7))).reason == "unsupported"
    assert "BigTIFF" in str(refused(saved(NOISE, "TIFF", big_tiff=True)))
    for cut in (4, 8, 9, 20):
        assert refused(tiff()[:cut]).reason == "unreadable"


def test_what_encoders_write_is_taken():
    bodies = [
        saved(NOISE.convert(mode), "JPEG", progressive=progressive, quality=quality)
        for mode in ("L", "RGB", "CMYK")
        for progressive in (False, True)
        for quality in (10, 100)
    ]
    bodies += [
        saved(NOISE.convert(mode), "TIFF", compression=compression, tiffinfo=info)
        for mode, compression in [
            ("L", None), ("RGB", "tiff_lzw"), ("RGBA", "tiff_adobe_deflate"),
            ("RGB", "tiff_deflate"), ("L", "packbits"), ("1", "group4"), ("1", "group3"),
        ]
        for info in ({}, one_row_a_strip())
    ]  # fmt: skip
    profile = np.random.default_rng(0).bytes(3_000_000)
    bodies.append(saved(NOISE, "JPEG", icc_profile=profile))
    bodies.append(saved(NOISE, "PNG", icc_profile=profile[:900_000]))
    bodies.append(saved(NOISE, "TIFF", icc_profile=profile))
    for body in bodies:
        assert row_of_image(body, PLAIN, 10_000).shape == (1, 3, 8, 8)


def one_row_a_strip():
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[278] = 1
    return info

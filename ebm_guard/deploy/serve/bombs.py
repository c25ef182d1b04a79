"""Files whose header is small and whose decoding is not: refused before a decoder sees them.

Pillow's own limit is on the pixels. A progressive JPEG may go over all of them thousands of times,
a file may come in millions of empty pieces, each of which is looked at, and a TIFF has sizes of its
own: of tiles, and of the tables that say where they are.
"""

from __future__ import annotations

import re
import struct

from ebm_guard.deploy.serve.refusal import RefusedError

# Encoders write about 10 scans, and up to 64 where they search for the smallest file.
_MOST_SCANS = 100
# Profiles and metadata come in pieces of 64 KiB; Pillow reads piece by piece.
_MOST_SEGMENTS = 2000
# Encoders write 8 KiB of pixels to a chunk, and few write less.
_MOST_CHUNKS = 20_000
# A fill byte, a stuffed zero and a restart begin nothing.
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_TEM, _SOI, _EOI, _SOS = 0x01, 0xD8, 0xD9, 0xDA

_LONGEST_TABLE = 20_000
# Text and blobs, which are read as they are; but not where a table is due.
_BLOBS = (1, 2, 7)
_BITS, _COMPRESSION, _TILE_WIDTH, _TILE_LENGTH = 258, 259, 322, 323
# Where the strips and tiles are, and how long.
_TABLES = (_BITS, 273, 279, 324, 325)
# None, fax, LZW, deflate and PackBits; each is one pass over the pixels, unlike JPEG inside TIFF.
_COMPRESSIONS = (1, 2, 3, 4, 5, 8, 32773, 32946)
_SHORT, _LONG = 3, 4


def check_cost(body: bytes, max_pixels: int) -> None:
    """Refuse a JPEG, PNG or TIFF file that would take much more than its pixels to decode.

    Args:
        body: an image file of any format.
        max_pixels: most pixels of a tile.

    Raises:
        RefusedError: it would; or the TIFF file is of a kind that is not decoded.

    Example:
        >>> check_cost(b"GIF89a", 100)
    """
    if body.startswith(b"\xff\xd8"):
        _check_jpeg(body)
    elif body.startswith(b"\x89PNG"):
        _check_png(body)
    elif body[:2] in (b"II", b"MM"):
        _check_tiff(body, max_pixels)


def _check_jpeg(body: bytes) -> None:
    """Walk from marker to marker as decoders do, up to the end of the first image."""
    scans = segments = at = 0
    while (found := _MARKER.search(body, at)) is not None:
        marker, at = found[1][0], found.end()
        if marker == _EOI:
            return
        segments += 1
        scans += marker == _SOS
        if scans > _MOST_SCANS or segments > _MOST_SEGMENTS:
            raise RefusedError(
                "too_large",
                f"the JPEG file has more than {_MOST_SCANS} scans or {_MOST_SEGMENTS} segments, "
                "which takes long to decode; save it again",
            )
        if marker not in (_TEM, _SOI):
            at += int.from_bytes(body[at : at + 2], "big")


def _check_png(body: bytes) -> None:
    chunks, at = 0, 8
    while at + 8 <= len(body) and body[at + 4 : at + 8] != b"IEND":
        chunks += 1
        if chunks > _MOST_CHUNKS:
            raise RefusedError(
                "too_large",
                f"the PNG file has more than {_MOST_CHUNKS:,} chunks, which takes long to decode; "
                "save it again",
            )
        at += 12 + int.from_bytes(body[at : at + 4], "big")


def _check_tiff(body: bytes, max_pixels: int) -> None:
    """Look at each entry of the first directory, also at those that are there twice."""
    order = "<" if body.startswith(b"II") else ">"
    if body[2:4] != struct.pack(f"{order}H", 42) or len(body) < 8:
        raise RefusedError("unreadable", "the body is no plain TIFF file (BigTIFF is not decoded)")
    (start,) = struct.unpack_from(f"{order}L", body, 4)
    if start + 2 > len(body):
        raise RefusedError("unreadable", "the TIFF file is cut off: send it whole")
    (count,) = struct.unpack_from(f"{order}H", body, start)
    sides = {_TILE_WIDTH: 1, _TILE_LENGTH: 1}
    for number in range(count):
        entry = body[start + 2 + 12 * number : start + 14 + 12 * number]
        if len(entry) < 12:
            raise RefusedError("unreadable", "the TIFF file is cut off: send it whole")
        tag, kind, length = struct.unpack(f"{order}HHL", entry[:8])
        if length > _LONGEST_TABLE and (kind not in _BLOBS or tag in _TABLES):
            raise RefusedError(
                "too_large",
                f"the TIFF file has {length:,} values of tag {tag}; at most {_LONGEST_TABLE:,} are "
                "read. Save it with larger strips or tiles",
            )
        if tag in sides:
            sides[tag] = max(sides[tag], _number(entry, order, kind, length))
        if tag == _COMPRESSION and _number(entry, order, kind, length) not in _COMPRESSIONS:
            raise RefusedError(
                "unsupported",
                "the TIFF file is compressed in a way that is not decoded; needed none, LZW, "
                "deflate, PackBits or fax. Save it so, or as JPEG or PNG",
            )
    width, height = sides.values()
    if width * height > max_pixels:
        raise RefusedError(
            "too_large",
            f"the TIFF file has tiles of {width} x {height} pixels; at most {max_pixels:,} are "
            "decoded. Save it with smaller tiles",
        )


def _number(entry: bytes, order: str, kind: int, length: int) -> int:
    """Return the one number of an entry."""
    if length != 1 or kind not in (_SHORT, _LONG):
        raise RefusedError("unreadable", "the TIFF file has a size or a compression of odd type")
    (number,) = struct.unpack_from(f"{order}{'H' if kind == _SHORT else 'L'}", entry, 8)
    return int(number)

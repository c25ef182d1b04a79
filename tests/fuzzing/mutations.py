"""Mutations that know the formats: JSON, safetensors, npy, zip, images and forms.

Everything is drawn from one ``random.Random``, so that an input is known by its seed.
"""

import io
import json
import struct
import zipfile
import zlib

DEEP = 3000
NUMBERS = (-1, 0, 1, 2**31, 2**63 - 1, 2**64, 10**30, -(10**12), 1e308, 0.5, float("nan"))
TEXTS = (
    "",
    "x",
    "../../../../x",
    "/etc/passwd",
    "C:\\x",
    "a/b",
    ".",
    "..",
    "\0",
    "ü\u202e😀",
    "\ud800",
    "NaN",
    "x" * 5000,
    "__import__('os')",
    "$HOME",
    "~",
    "\n",
    "%s%n",
)
OTHERS = (None, True, [], {}, [[]], {"": None}, [1, 2, 3])


def odd_value(rng):
    """A JSON value that is rarely the right one."""
    return rng.choice([*NUMBERS, *TEXTS, *OTHERS])


def odd_tree(rng, value):
    """Replace, drop, repeat or rename one thing somewhere in a JSON tree."""
    if isinstance(value, dict) and value and rng.random() < 0.93:
        key = rng.choice(sorted(value))
        action = rng.random()
        if action < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if action < 0.15:
            return {rng.choice(TEXTS) if name == key else name: v for name, v in value.items()}
        return {**value, key: odd_tree(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        if rng.random() < 0.1:
            return value[:place] + value[place + 1 :]
        if rng.random() < 0.05:
            return value * 50
        return [*value[:place], odd_tree(rng, value[place]), *value[place + 1 :]]
    return odd_value(rng)


def json_text(rng, value, changes=3):
    """A changed JSON tree as bytes; now and then too deep, doubled, cut, or of another coding."""
    for _ in range(rng.randint(0, changes)):
        value = odd_tree(rng, value)
    text = json.dumps(value, ensure_ascii=True)
    way = rng.random()
    if way < 0.04:
        # Where the reader expects a value, and where it expects nothing more.
        deep = rng.choice(["[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP])
        text = deep if way < 0.02 else text.replace("null", deep, 1).replace("{}", deep, 1)
    elif way < 0.07 and text.startswith("{") and len(text) > 2:
        first = text[1 : text.find(",") + 1] or text[1:-1] + ","
        text = "{" + first + text[1:]
    elif way < 0.09:
        text = text.replace("1", "9" * 5000, 1)
    elif way < 0.11:
        return text.encode("utf-16")
    elif way < 0.13:
        return b"\xef\xbb\xbf" + text.encode()
    return text.encode()


def bytes_of(rng, content, most=4):
    """Cut, overwrite, repeat or insert."""
    body = bytearray(content)
    for _ in range(rng.randint(1, most)):
        at = rng.randrange(len(body) + 1)
        action = rng.randrange(6)
        if action == 0:
            del body[at : at + rng.randint(1, 64)]
        elif action == 1:
            body[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 2**16, 2**31, 2**32 - 1]))
        elif action == 2:
            body[at:at] = rng.randbytes(rng.randint(1, 24))
        elif action == 3:
            del body[at:]
        elif action == 4:
            body[at:at] = body[at : at + rng.randint(1, 200)]
        elif len(body) > at:
            body[at] ^= 1 << rng.randrange(8)
    return bytes(body)


# --- safetensors


def safetensors_header(rng, content):
    """Lie in the header: names, types, shapes and places; keep the length that it says, or not."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = rng.choice(sorted(header))
    if name == "__metadata__" or rng.random() < 0.2:
        header = odd_tree(rng, header)
    else:
        part = dict(header[name])
        key = rng.choice(["dtype", "shape", "data_offsets"])
        part[key] = rng.choice(
            {
                "dtype": ["F64", "F16", "BOOL", "U8", "F8_E4M3", "F4", "C64", "F32", "x", 1],
                "shape": [[], [0], [2**40], [2**63], [-1], [1, 1], [2**32, 2**32], "x", None],
                "data_offsets": [[0, 0], [0, 2**60], [8, 4], [0, 8], [-1, 3], [0]],
            }[key]
        )
        header[name] = part
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    said = len(text) if rng.random() < 0.8 else rng.choice([0, 1, 2**20, 2**40, 2**63])
    return said.to_bytes(8, "little") + text + data


# --- npy and zip

SHAPES = (
    "()",
    "(0,)",
    "(-1,)",
    "(2, 3)",
    "(1000000000000,)",
    "(4294967296, 4294967296)",
    f"({10**30},)",
    "(2, 3",
    "((",
    "(1.5,)",
    "('a',)",
    "(True,)",
    "None",
    "(" + "-" * 3000 + "1,)",
    "(1L,)",
    "[2, 3]",
    "(" + "1, " * 3000 + ")",
    "(1" + " " * 300 + "1" + " " * 300 + "1 x",
)
DESCRS = (
    "'<f4'",
    "'<f8'",
    "'|u1'",
    "'<i8'",
    "'|O'",
    "'<U9'",
    "'<U999999999'",
    "'|V4294967295'",
    "[('a', '<f4')]",
    "[('a', '|O')]",
    "'<M8[s]'",
    "'<c16'",
    "'x'",
    "1",
    "(('<f4', 3), (2,))",
    "[]",
)


def npy_of(rng, descr="'<f4'", shape="(2, 3)", data=b"\0" * 24):
    """An npy file whose header lies in one or two places."""
    order = "False"
    for _ in range(rng.randint(1, 2)):
        way = rng.randrange(4)
        if way == 0:
            shape = rng.choice(SHAPES)
        elif way == 1:
            descr = rng.choice(DESCRS)
        elif way == 2:
            order = rng.choice(["True", "1", "None", "'", "False, 'shape': (9,)"])
        else:
            data = rng.choice([b"", data[:-1], data * 2, PICKLE])
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    text = rng.choice([text, text, text, text + " " * 60, "{" * 90, text * 2, "import os"])
    version = rng.choice([b"\1\0", b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\x09\0"])
    head = text.encode() + b"\n"
    length = len(head) if rng.random() < 0.9 else rng.choice([0, 5, 65535])
    size = struct.pack("<H" if version[0] == 1 else "<I", length)
    return b"\x93NUMPY" + version + size + head + data


class Mark:
    """Leaves a file when it is unpickled."""

    path = ""

    def __reduce__(self):
        return open, (Mark.path, "w")


def pickled_mark(path):
    """Bytes that make a file where they are unpickled."""
    import pickle

    Mark.path = str(path)
    return pickle.dumps(Mark())


PICKLE = b"cposix\nsystem\n(S'true'\ntR."
NAMES = ("../x.npy", "/x.npy", "images.npy", "labels.npy", "a\0b.npy", "ü.npy", "", "logits.npy")


def zip_of(rng, members):
    """A zip archive with changed, odd, doubled, bombed, pickled or linked members."""
    import warnings

    members = list(members.items())
    for _ in range(rng.randint(1, 2)):
        way, place = rng.randrange(6), rng.randrange(len(members))
        name, content = members[place]
        if way == 0:
            members[place] = name, npy_of(rng)
        elif way == 1:
            members[place] = rng.choice(NAMES), content
        elif way == 2:
            members.append((name, npy_of(rng)))
        elif way == 3:
            members[place] = name, bytes_of(rng, content)
        elif way == 4:
            members[place] = name, rng.choice([PICKLE, b"", content[:20]])
        else:
            members[place] = name, npy_bomb(rng.choice([10**6, 10**8, 10**11]))
    buffer = io.BytesIO()
    method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")
        for name, content in members:
            archive.writestr(name or "x", content)
    content = buffer.getvalue()
    return bytes_of(rng, content, 2) if rng.random() < 0.25 else content


def npy_bomb(size, held=2_000_000):
    """An npy file that claims ``size`` bytes, and holds some zeros, which deflate to nothing."""
    head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size}, 1, 1), }}\n".encode()
    head = b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head
    return head + b"\0" * min(size, held)


# --- images


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_bomb(rng):
    """A PNG whose header, text or profile grows a thousand times."""
    width, height = rng.choice(
        [(8, 8), (2**31 - 1, 2**31 - 1), (10**5, 10**5), (30_000, 1), (0, 9)]
    )
    head = struct.pack(">IIBBBBB", width, height, rng.choice([1, 8, 16]), rng.choice([0, 2, 3, 6]),
                       0, 0, rng.choice([0, 1]))  # fmt: skip
    zeros = zlib.compress(b"\0" * rng.choice([100, 10**6, 2 * 10**7]))
    extra = rng.choice(
        [
            b"",
            png_chunk(b"zTXt", b"a\0\0" + zeros),
            png_chunk(b"iCCP", b"a\0\0" + zeros),
            png_chunk(b"iTXt", b"a\0\1\0\0\0" + zeros),
            png_chunk(b"tRNS", b"\0" * 700),
            png_chunk(b"PLTE", b"\0" * rng.choice([3, 768, 9000])),
            png_chunk(b"acTL", b"\xff" * 8),
            png_chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff" + b"\x12\1" * 500),
        ]
    )
    body = png_chunk(b"IHDR", head) + extra + png_chunk(b"IDAT", zeros) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body

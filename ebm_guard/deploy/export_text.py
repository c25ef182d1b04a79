"""Refuse a ``.pt2`` archive whose text would run as Python when torch reads it.

``torch.export.load`` evaluates the size expressions of a program as Python, executes its guards,
and finds its operators by walking from the module ``torch``, so that a forged text runs any code.
What our exports hold is a small language; all else is refused before torch sees the archive.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from typing import Any

from ebm_guard.errors import ArtifactError

_LONGEST_EXPRESSION = 500
# Sizes: symbols such as s77, whole numbers, and sums, products and quotients of them. No Pow: a
# tower of powers has no end.
_WORDS = (
    r"(?:Add|Mul|Integer|NegativeOne|Zero|One|Rational|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv"
    r"|IntTrueDiv|TruncToInt|ModularIndexing|Eq|Ne|Equality|Unequality|LessThan|GreaterThan"
    r"|StrictLessThan|StrictGreaterThan|true|false)"
)
_SYMBOL = r"Symbol\('[a-z]{1,4}\d{1,6}'(?:, (?:positive|nonnegative|integer)=True){0,3}\)"
_EXPRESSION = re.compile(rf"(?:{_SYMBOL}|{_WORDS}(?=\(|\b)|-?\d{{1,18}}(?!\d)|[(), ])+")
_OPERATOR = re.compile(
    r"torch\.ops\.aten\.\w{1,80}(?:\.\w{1,80})?"
    r"|_operator\.(?:add|sub|mul|floordiv|truediv|mod|neg|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
    r"|torch\.sym_(?:not|max|min|int|float|sum)"
    r"|torch\.ops\.higher_order\.(?:wrap_with_set_grad_enabled|wrap_with_autocast)"
)
# Containers of inputs and outputs; torch imports modules for some others.
_CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict")
_SPECS = ("in_spec", "out_spec", "treespec")
# Torch writes names of nodes, parameters and buffers into Python source as they stand.
_NAME = re.compile(r"-?(?:[A-Za-z_]\w*(?:\.\w+)*)?", re.ASCII)
# Strings that are arguments are written as literals.
_STRING = re.compile(r"[ \w,.>-]{0,200}", re.ASCII)
# Screened by themselves, or read as text alone.
_OTHERWISE = frozenset(
    (
        *_SPECS,
        "as_operator",
        "expr_str",
        "guards_code",
        "metadata",
        "operator",
        "target",
        "torch_version",
        "verifiers",
    )
)
# The one operator of aten that opens files.
_OPENS_FILES = "torch.ops.aten.from_file"


def repacked(content: bytes) -> bytes:
    """Return an archive with the same members, as Python's zip module read them.

    Torch has a zip reader of its own, which may find other members in a forged file than those that
    were checked.

    Raises:
        ArtifactError: a member is compressed, which none of ours is: a small file could fill the
            memory.

    Example:
        >>> file = io.BytesIO()
        >>> with zipfile.ZipFile(file, "w") as archive:
        ...     archive.writestr("a/b", b"c")
        >>> zipfile.ZipFile(io.BytesIO(repacked(file.getvalue()))).read("a/b")
        b'c'
    """
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as new,
    ):
        if any(info.compress_type != zipfile.ZIP_STORED for info in old.infolist()):
            raise ArtifactError(
                "the .pt2 file holds compressed parts, and ours has none; export it again"
            )
        for info in old.infolist():
            new.writestr(zipfile.ZipInfo(info.filename), old.read(info))
    return buffer.getvalue()


def check_program_text(text: bytes) -> None:
    r"""Refuse the text of a program that holds more than operators and sizes.

    Args:
        text: JSON, a member of ``models/``.

    Raises:
        ArtifactError: with what was found.
        ValueError: not JSON.

    Example:
        >>> check_program_text(b'{"expr_str": "Symbol(\'s77\', positive=True, integer=True)"}')
        >>> check_program_text(b'{"expr_str": "print(1)"}')
        Traceback (most recent call last):
            ...
        ebm_guard.errors.ArtifactError: the .pt2 file holds 'print(1)' as a size, which would run...
    """
    content = json.loads(text)
    for word, value in _said(content):
        trouble = _trouble(word, value)
        if trouble:
            raise _refused(value, trouble)
    check_names(content)


def check_names(content: Any) -> None:
    """Refuse names that are no names, which torch would write into source that it runs.

    Args:
        content: a JSON tree of the archive.

    Raises:
        ArtifactError: with what was found.

    Example:
        >>> check_names({"inputs": [{"as_tensor": {"name": "layer.weight"}}]})
        >>> check_names({"name": "x=print(1)"})
        Traceback (most recent call last):
            ...
        ebm_guard.errors.ArtifactError: the .pt2 file holds 'x=print(1)' as a name, which would...
    """
    waiting = [("", content)]
    while waiting:
        word, found = waiting.pop()
        if isinstance(found, dict):
            for key in found:
                if not _NAME.fullmatch(key):
                    raise _refused(key, "as a name")
            waiting += [(key, each) for key, each in found.items() if key not in _OTHERWISE]
        elif isinstance(found, list):
            waiting += [(word, each) for each in found]
        elif isinstance(found, str):
            wanted = _STRING if word in ("as_string", "as_strings") else _NAME
            if not wanted.fullmatch(found):
                raise _refused(found, "as a name")


def _refused(value: Any, trouble: str) -> ArtifactError:
    return ArtifactError(
        f"the .pt2 file holds {str(value)[:80]!r} {trouble}, which would run as code while it is "
        "read; nothing of a file is run here. Load files of `ebm-guard export` only"
    )


def _trouble(word: str, value: Any) -> str:
    """Say what is wrong with an entry of the program, or ''."""
    if word == "expr_str":
        short = isinstance(value, str) and len(value) <= _LONGEST_EXPRESSION
        return "" if short and _EXPRESSION.fullmatch(value) else "as a size"
    if word == "guards_code":
        return "as guards" if value else ""
    if word in ("operator", "as_operator"):
        plain = isinstance(value, str) and _OPERATOR.fullmatch(value)
        return "" if plain and not value.startswith(_OPENS_FILES) else "as an operator"
    if word in _SPECS and value and not _is_plain_spec(value):
        return "as a container"
    return ""


def _is_plain_spec(text: Any) -> bool:
    """Tell whether the JSON text of a container holds plain ones alone."""
    if not isinstance(text, str):
        return False
    plain = True
    for word, value in _said(json.loads(text)):
        if word == "type":
            plain &= value in _CONTAINERS
        elif word == "context":
            plain &= value is None or _are_names(value)
        else:
            plain &= word == "children_spec"
    return plain


def _are_names(text: Any) -> bool:
    """Tell whether JSON in JSON holds the keys of a dict, or nothing."""
    found = json.loads(text) if isinstance(text, str) and "{" not in text else text
    names = [found] if isinstance(found, str) else found
    return names is None or (
        isinstance(names, list)
        and all(isinstance(name, str) and _NAME.fullmatch(name) for name in names)
    )


def _said(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield every (key, value) of a JSON tree; the target of a node as ``operator``."""
    waiting = [content]
    while waiting:
        found = waiting.pop()
        if isinstance(found, list):
            waiting += found
        elif isinstance(found, dict):
            for key, value in found.items():
                yield "operator" if key == "target" and "inputs" in found else key, value
            waiting += found.values()

"""The one file of a ``multipart/form-data`` body."""

from __future__ import annotations

from typing import Any

from ebm_guard.deploy.serve.refusal import RefusedError

FIELD = "file"
# A browser sends a handful; tens of thousands of empty parts take seconds.
_MOST_PARTS = 32
_LONGEST_HEADER = 8192


class _Parts:
    """Collect the parts of a form by the parser's callbacks; data of other fields is not kept."""

    def __init__(self) -> None:
        self.files: list[bytearray] = []
        self.count = 0
        self.ended = False
        self._field, self._value = bytearray(), bytearray()
        self._into: bytearray | None = None

    def begin(self) -> None:
        self._into = None
        self.count += 1
        if self.count > _MOST_PARTS:
            raise RefusedError(
                "unreadable",
                f"the form has more than {_MOST_PARTS} fields; send one image, in the field "
                f"{FIELD}",
            )

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._add(self._field, data[start:end])

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._add(self._value, data[start:end])

    def header_end(self) -> None:
        from python_multipart.multipart import parse_options_header

        if bytes(self._field).lower() == b"content-disposition":
            _, options = parse_options_header(self._value.decode("latin-1"))
            if options.get(b"name", b"") == FIELD.encode():
                self._into = bytearray()
                self.files.append(self._into)
        self._field, self._value = bytearray(), bytearray()

    def data(self, data: bytes, start: int, end: int) -> None:
        if self._into is not None:
            self._into += data[start:end]

    def end(self) -> None:
        self.ended = True

    def _add(self, to: bytearray, data: bytes) -> None:
        if len(to) + len(data) > _LONGEST_HEADER:
            raise RefusedError(
                "unreadable", f"a header of the form is longer than {_LONGEST_HEADER} bytes"
            )
        to += data

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self.begin,
            "on_header_field": self.header_field,
            "on_header_value": self.header_value,
            "on_header_end": self.header_end,
            "on_part_data": self.data,
            "on_end": self.end,
        }


def file_of_form(content_type: str, body: bytes) -> bytes:
    r"""Return the content of the field ``file``.

    Args:
        content_type: the header, with its boundary.
        body: all of it.

    Raises:
        RefusedError: no whole form, or not exactly one such field.

    Example:
        >>> head = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
        >>> body = head + b"hi\r\n--x--\r\n"
        >>> file_of_form("multipart/form-data; boundary=x", body)
        b'hi'
    """
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header

    parts = _Parts()
    try:
        _, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if not boundary:
            raise RefusedError("unreadable", "the form has no boundary in its Content-Type")
        parser = MultipartParser(boundary, parts.callbacks())
        parser.write(body)
        parser.finalize()
    except (FormParserError, UnicodeError, ValueError) as error:
        raise RefusedError("unreadable", f"the form cannot be parsed: {error}") from None
    if not parts.ended:
        raise RefusedError("unreadable", "the form ends before its last boundary: send it whole")
    if len(parts.files) != 1:
        raise RefusedError(
            "unreadable",
            f"got {len(parts.files)} fields named {FIELD} among {parts.count}; needed one "
            f"image for each request: curl -F {FIELD}=@image.jpg",
        )
    return bytes(parts.files[0])
